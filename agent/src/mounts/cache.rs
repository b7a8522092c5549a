//! What a mount keeps on this host of the point it serves: chunks in a file of bounded size.
//!
//! The content of a point never changes, so nothing here grows old; what was not used for long makes room (CLOCK:
//! second chance). The file has no name and ends with the process: what is kept is worth a fetch, not a recovery.
//!
//! Here is only what is kept where. What waits for storage is a value of its own, [`Lookup`] or [`Placing`], to be
//! carried out on another thread: this one serves every mount of the agent.
//!
//! Invariants: what is given was put in, byte for byte. The checksums are in memory, so that the file may say
//! whatever it wants: a chunk that does not match is dropped, and fetched again by whoever wanted it. A place that is
//! being written is nobody else's; one that is being read may become another chunk's, which its generation tells.

mod job;

use std::{collections::HashMap, ops::Range, sync::Arc};

use backtide_storage::{Storage, StorageFile};
use backtide_units::{ByteCount, ByteOffset};
use bytes::Bytes;

pub(super) use self::job::{Lookup, Placed, Placing};

/// Bytes of a chunk; the last one of a disk may be shorter.
pub(super) const CHUNK: u64 = 64 << 10;

/// Bytes of a part of a chunk with a checksum of its own: what has to be read for one byte.
const PART: usize = 4 << 10;

const PARTS: usize = CHUNK as usize / PART;

/// Free space is looked at whenever the file grows by so many chunks.
const LOOK_EVERY: usize = 64;

/// Chunks of one point.
pub(super) struct Cache {
    storage: Arc<dyn Storage>,
    /// None when there can be none, or it has failed: then nothing is kept.
    file: Option<Arc<dyn StorageFile>>,
    slots_max: usize,
    slots: Vec<Slot>,
    places: HashMap<u64, usize>,
    /// The slot that is looked at next when one is needed.
    hand: usize,
}

#[derive(Default)]
struct Slot {
    /// What it holds, or is going to hold.
    chunk: u64,
    /// Since the hand came by.
    used: bool,
    /// It is being written.
    taken: bool,
    /// How often it was given to a chunk.
    generation: u64,
    sums: Sums,
}

/// The length of a chunk, and the checksums of its parts.
#[derive(Clone, Copy, Default)]
pub(super) struct Sums {
    length: u32,
    of_parts: [u32; PARTS],
}

impl Sums {
    fn of(bytes: &[u8]) -> Self {
        assert!(bytes.len() <= CHUNK as usize, "a chunk is no longer than that");
        let mut of_parts = [0; PARTS];
        for (sum, part) in of_parts.iter_mut().zip(bytes.chunks(PART)) {
            *sum = crc32c::crc32c(part);
        }
        Self { length: u32::try_from(bytes.len()).expect("a chunk is short"), of_parts }
    }
}

impl Cache {
    /// An empty one in `file` of `storage`, of at most `limit` bytes.
    pub(super) fn new(
        storage: Arc<dyn Storage>,
        file: Option<Arc<dyn StorageFile>>,
        limit: ByteCount,
    ) -> Self {
        let slots_max = usize::try_from(limit.0 / CHUNK).unwrap_or(usize::MAX);
        Self { storage, file, slots_max, slots: Vec::new(), places: HashMap::new(), hand: 0 }
    }

    /// How many bytes of the file are in use.
    pub(super) fn bytes(&self) -> ByteCount {
        ByteCount(self.places.len() as u64 * CHUNK)
    }

    /// Whether `chunk` is there.
    pub(super) fn contains(&self, chunk: u64) -> bool {
        self.places.contains_key(&chunk)
    }

    /// Where the bytes `span` of `chunk` are, if they are there.
    pub(super) fn find(&self, chunk: u64, span: Range<usize>) -> Option<Lookup> {
        let &place = self.places.get(&chunk)?;
        let slot = &self.slots[place];
        let parts = span.start / PART..span.end.div_ceil(PART);
        let whole = parts.start * PART..(parts.end * PART).min(slot.sums.length as usize);
        assert!(span.end <= whole.end, "a chunk is kept whole, and nothing beyond it is read");
        Some(Lookup {
            file: self.file.clone().expect("what has a place has a file"),
            chunk,
            place,
            generation: slot.generation,
            offset: ByteOffset(place as u64 * CHUNK + whole.start as u64),
            length: whole.len(),
            sums: slot.sums.of_parts[parts].to_vec(),
            wanted: span.start - whole.start..span.end - whole.start,
        })
    }

    /// What [`Lookup::read`] has found was whole, or not.
    pub(super) fn was_read(&mut self, lookup: &Lookup, whole: bool) {
        let Some(slot) = self.slots.get_mut(lookup.place) else { return };
        // Meanwhile it may have become another chunk's.
        if slot.generation != lookup.generation || !self.places.contains_key(&lookup.chunk) {
            return;
        }
        slot.used = whole;
        if !whole {
            let chunk = lookup.chunk;
            tracing::warn!(
                chunk,
                "the cache of a mount does not hold what was put into it: it is fetched again"
            );
            self.places.remove(&chunk);
        }
    }

    /// Finds places for the chunks from `first` on that `bytes` are, those of others when it is full. None when
    /// nothing is kept. What is to be written then has to come back as [`Cache::placed`].
    pub(super) fn place(&mut self, first: u64, bytes: Bytes) -> Option<Placing> {
        let file = self.file.clone().filter(|_| self.slots_max > 0)?;
        let slots_before = self.slots.len();
        let mut places = Vec::new();
        for (chunk, part) in (first..).zip(bytes.chunks(CHUNK as usize)) {
            if self.contains(chunk) {
                continue;
            }
            // Everything is being written.
            let Some(place) = self.free_place() else { break };
            let slot = &mut self.slots[place];
            slot.generation += 1;
            (slot.chunk, slot.taken, slot.used) = (chunk, true, true);
            let at = (chunk - first) as usize * CHUNK as usize;
            places.push((place, at..at + part.len()));
        }
        let grows_past = |slots: usize| slots.div_ceil(LOOK_EVERY);
        let looks = grows_past(self.slots.len()) > grows_past(slots_before);
        (!places.is_empty()).then(|| Placing {
            storage: Arc::clone(&self.storage),
            file,
            places,
            bytes,
            looks,
        })
    }

    /// What became of a [`Placing`].
    pub(super) fn placed(&mut self, placed: Placed) {
        match placed {
            Placed::Written(written) => {
                for (place, sums) in written {
                    // Given up meanwhile.
                    let Some(slot) = self.slots.get_mut(place) else { return };
                    (slot.taken, slot.sums) = (false, sums);
                    self.places.insert(slot.chunk, place);
                }
            }
            Placed::NoRoom(places) => {
                let bytes = self.bytes().0;
                tracing::warn!(bytes, "the cache of a mount does not grow: its file system is nearly full");
                for place in places {
                    if let Some(slot) = self.slots.get_mut(place) {
                        (slot.taken, slot.used) = (false, false);
                    }
                }
                // As large as it is.
                let written = self.places.values().max().map_or(0, |place| place + 1);
                self.slots_max = self.slots_max.min(written);
                if !self.slots.iter().skip(written).any(|slot| slot.taken) {
                    self.slots.truncate(written);
                }
            }
            Placed::Failed(error) => self.give_up(&error),
        }
    }

    /// From now on nothing is kept.
    pub(super) fn give_up(&mut self, why: &dyn std::fmt::Display) {
        if self.file.take().is_some() {
            tracing::warn!(%why, "cannot use the cache of a mount: it goes on without one");
        }
        (self.slots, self.places) = (Vec::new(), HashMap::new());
    }

    /// A place that nobody has, and nobody finds anything in.
    fn free_place(&mut self) -> Option<usize> {
        if self.slots.len() < self.slots_max {
            self.slots.push(Slot::default());
            return Some(self.slots.len() - 1);
        }
        // Each is passed once with its second chance, and once without.
        for _ in 0..2 * self.slots.len() {
            let place = self.hand % self.slots.len();
            self.hand = (place + 1) % self.slots.len();
            let slot = &mut self.slots[place];
            if slot.taken || std::mem::take(&mut slot.used) {
                continue;
            }
            if self.places.get(&slot.chunk) == Some(&place) {
                self.places.remove(&slot.chunk);
            }
            return Some(place);
        }
        None
    }
}

#[cfg(test)]
mod tests;
