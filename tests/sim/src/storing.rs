//! What is put on the image of a disk that lacks blocks, and made stable: in which order, and how that fails. An image
//! is a file, or lies behind a server that forgets what it was not told to flush.

use std::{io, sync::Arc};

use backtide_hydration::{Refusal, StoreError};
use backtide_io_filter::{Change, LocalOp, chunk_items};
use backtide_tracking::DirtyBitmap;
use backtide_units::{BlockRange, ByteRange};
use bytes::Bytes;

use crate::{
    hydration::refusal,
    lacking::{DriverMistake, remove_note},
    world::World,
};

/// What the point holds.
pub(crate) struct Brought {
    pub(crate) range: ByteRange,
    pub(crate) bytes: Bytes,
    /// What of it the image was found to hold.
    pub(crate) held: Vec<ByteRange>,
}

impl World {
    pub(crate) fn do_settle(&mut self) -> Result<(), Refusal> {
        let fails = self.image_fails(&LocalOp::Change(Change::Flush)) || self.lacking.untold;
        if self.plan.server {
            return self.settle_behind_server(fails);
        }
        let forgets = self.lacking.mistake == Some(DriverMistake::DurableBeforeSync);
        let file = Arc::clone(&self.hydrating().file);
        if fails {
            self.refuse_flush();
        }
        let local = &mut self.local;
        let settled = file.settle(|| {
            match fails {
                true => return Err(io::Error::other("the image cannot be synced")),
                false if forgets => {}
                false => local.flush(local.flush_mark()),
            }
            Ok(())
        });
        self.hydrating().troubled |= settled.is_err();
        self.hydrating().gave_up |= fails;
        settled.map_err(refusal)
    }

    /// There whatever the journal calls present was flushed before.
    fn settle_behind_server(&mut self, fails: bool) -> Result<(), Refusal> {
        if fails {
            self.lacking.untold = false;
            self.refuse_flush();
            self.distrust_image();
            return Err(Refusal::Failed { errno: 5 });
        }
        if self.lacking.mistake != Some(DriverMistake::DurableBeforeSync) {
            self.local.flush(self.local.flush_mark());
        }
        let settled = self.hydrating().file.settle(|| Ok(()));
        self.hydrating().troubled |= settled.is_err();
        settled.map_err(refusal)
    }

    /// The image refuses a flush; what it shows is what it showed.
    pub(crate) fn refuse_flush(&mut self) {
        self.stats.flushes_refused += 1;
        self.lacking.refusals += 1;
        self.local.refuse_flush();
        self.shown.disk.refuse_flush();
    }

    /// The next attach does not believe what the image shows of missing blocks either.
    fn distrust_image(&mut self) {
        let forgets = self.lacking.mistake == Some(DriverMistake::ComparesNextTime);
        if !forgets && self.hydrating().file.stop_comparing().is_err() {
            // Two faults at once: nothing could be done about both.
            self.local.forgive(&DirtyBitmap::new());
        }
    }

    /// Puts what was fetched on the image, and notes it; `dies` half way.
    pub(crate) fn do_store(
        &mut self,
        runs: &[BlockRange],
        brought: &Brought,
        dies: bool,
    ) -> Result<(), StoreError> {
        let refused = self.plan.server && !self.calm && self.random.permille(self.plan.refused_permille);
        let fails = dies || self.image_fails(&LocalOp::Change(Change::Flush));
        let file = Arc::clone(&self.hydrating().file);
        let last = if fails { self.random.below(runs.len() as u64 + 1) as usize } else { runs.len() };
        let mut changed = false;
        for run in &runs[..last] {
            for part in brought.lacking(run.bytes(self.plan.size)) {
                let content = brought.content(part);
                let zeroes = content.iter().all(|byte| *byte == 0);
                self.local.write(part, (!zeroes).then_some(content), zeroes);
                changed = true;
            }
        }
        let stable = match self.plan.server && changed && !fails {
            true => self.flush_of_store(refused),
            false => Ok(()),
        };
        file.store(runs, || {
            stable?;
            if fails { Err(io::Error::other("the image cannot be written")) } else { Ok(()) }
        })
    }

    /// Behind a server what was fetched is stable before the journal hears of it.
    pub(crate) fn flush_of_store(&mut self, refused: bool) -> io::Result<()> {
        if !refused {
            self.local.flush(self.local.flush_mark());
            return Ok(());
        }
        self.refuse_flush();
        // Whoever flushes next has to hear of it.
        self.lacking.untold = true;
        self.distrust_image();
        Err(io::Error::other("the server refuses a flush"))
    }

    pub(crate) fn do_finish(&mut self) {
        let server = self.plan.server;
        let fails = !server && self.image_fails(&LocalOp::Change(Change::Flush));
        let file = Arc::clone(&self.hydrating().file);
        if fails {
            self.refuse_flush();
        }
        let (local, beside) = (&mut self.local, &self.lacking.beside);
        let sync = || {
            if fails {
                return Err(io::Error::other("the image cannot be synced"));
            }
            if !server {
                local.flush(local.flush_mark());
            }
            Ok(())
        };
        match file.finish(sync, || remove_note(beside)) {
            Ok(()) => {
                self.hydrating().complete = true;
                self.stats.hydrated += 1;
            }
            Err(_) => {
                self.hydrating().troubled = true;
                self.hydrating().gave_up |= fails;
            }
        }
    }
}

impl Brought {
    fn content(&self, part: ByteRange) -> &[u8] {
        let from = (part.start().0 - self.range.start().0) as usize;
        &self.bytes[from..from + part.count().0 as usize]
    }

    /// What of `range` the image was not found to hold.
    fn lacking(&self, range: ByteRange) -> Vec<ByteRange> {
        let mut lacking = Vec::new();
        let mut at = range.start();
        for held in self.held.iter().filter_map(|held| held.intersection(range)) {
            lacking.push(ByteRange::between(at, held.start()));
            at = held.end();
        }
        lacking.push(ByteRange::between(at, range.end()));
        lacking.retain(|part| !part.is_empty());
        lacking
    }
}

/// The chunks of `range` in which both have the same.
pub(crate) fn equal(range: ByteRange, seen: &Bytes, bytes: &Bytes) -> Vec<ByteRange> {
    let part = |bytes: &Bytes, chunk: ByteRange| {
        let from = (chunk.start().0 - range.start().0) as usize;
        bytes.slice(from..from + chunk.count().0 as usize)
    };
    let chunks = chunk_items(range, seen).into_iter().map(|item| item.range);
    chunks.filter(|chunk| part(seen, *chunk) == part(bytes, *chunk)).collect()
}
