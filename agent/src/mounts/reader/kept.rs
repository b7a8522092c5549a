//! What the cache keeps: read and written on threads that may wait for its storage.

use std::rc::Rc;

use backtide_units::{ByteOffset, ByteRange};
use bytes::{Bytes, BytesMut};
use tokio::task::spawn_blocking;

use super::{CACHE_PATIENCE, CHUNK, Fetching, KEEPING_CHUNKS, Reader};
use crate::mounts::cache::Lookup;

impl Reader {
    /// Gives what of `range` the cache has from `at` on without a gap. How far that came: nowhere when it is not what was
    /// put in, or takes too long.
    pub(super) async fn read_kept(&self, at: ByteOffset, range: ByteRange, out: &mut BytesMut) -> ByteOffset {
        let lookups = self.lookups(at, range);
        let look = move || lookups.into_iter().map(|lookup| (lookup.read(), lookup)).collect::<Vec<_>>();
        let read = match tokio::time::timeout(CACHE_PATIENCE, spawn_blocking(look)).await {
            Ok(Ok(read)) => read,
            Ok(Err(error)) => return self.without_cache(&error, at),
            Err(_) => return self.without_cache(&STANDS_STILL, at),
        };
        let mut to = at;
        for (bytes, lookup) in read {
            self.cache.borrow_mut().was_read(&lookup, bytes.is_some());
            let Some(bytes) = bytes else { break };
            let start = (to.0 - range.start().0) as usize;
            out[start..start + bytes.len()].copy_from_slice(&bytes);
            to = ByteOffset(to.0 + bytes.len() as u64);
        }
        to
    }

    /// Where the cache has what is wanted, chunk by chunk from `at` on.
    fn lookups(&self, at: ByteOffset, range: ByteRange) -> Vec<Lookup> {
        let cache = self.cache.borrow();
        let mut lookups = Vec::new();
        let mut at = at;
        while at < range.end() {
            let chunk = at.0 / CHUNK;
            let end = ByteOffset(((chunk + 1) * CHUNK).min(range.end().0));
            let span = (at.0 - chunk * CHUNK) as usize..(end.0 - chunk * CHUNK) as usize;
            let Some(lookup) = cache.find(chunk, span) else { break };
            lookups.push(lookup);
            at = end;
        }
        lookups
    }

    fn without_cache(&self, why: &dyn std::fmt::Display, at: ByteOffset) -> ByteOffset {
        self.cache.borrow_mut().give_up(why);
        at
    }

    /// Puts what was fetched into the cache. Until it is there it is given from memory.
    pub(super) fn keep(self: &Rc<Self>, fetching: Fetching, bytes: Bytes) {
        let writing = self.coming.borrow().values().filter(|coming| coming.bytes.is_some()).count();
        if writing >= KEEPING_CHUNKS {
            return;
        }
        let placing = self.cache.borrow_mut().place(fetching.chunks.start, bytes.clone());
        let Some(placing) = placing else { return };
        for (nth, chunk) in fetching.chunks.clone().enumerate() {
            let start = nth * CHUNK as usize;
            let part = bytes.slice(start..(start + CHUNK as usize).min(bytes.len()));
            if let Some(coming) = self.coming.borrow_mut().get_mut(&chunk) {
                coming.bytes = Some(part);
            }
        }
        fetching.over.notify_waiters();
        let reader = Rc::clone(self);
        tokio::task::spawn_local(async move {
            let write = spawn_blocking(move || placing.write());
            match tokio::time::timeout(CACHE_PATIENCE, write).await {
                Ok(Ok(placed)) => reader.cache.borrow_mut().placed(placed),
                Ok(Err(error)) => reader.cache.borrow_mut().give_up(&error),
                Err(_) => reader.cache.borrow_mut().give_up(&STANDS_STILL),
            }
            drop(fetching);
        });
    }
}

const STANDS_STILL: &str = "its storage stands still";
