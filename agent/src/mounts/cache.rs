//! What a mount keeps on this host of the point it serves: chunks in a file of bounded size.
//!
//! The content of a point never changes, so nothing here grows old; what was not used for long makes room (CLOCK:
//! second chance). The file has no name and ends with the process: what is kept is worth a fetch, not a recovery.
//!
//! Invariant: what is given was put in, byte for byte. The checksums are in memory, so that the file may say
//! whatever it wants: a chunk that does not match is dropped, and fetched again by whoever wanted it.

use std::{collections::HashMap, io::IoSlice, ops::Range, sync::Arc};

use backtide_storage::{Storage, StorageFile};
use backtide_units::{ByteCount, ByteOffset};

/// Bytes of a chunk; the last one of a disk may be shorter.
pub(super) const CHUNK: u64 = 64 << 10;

/// Bytes of a part of a chunk with a checksum of its own: what has to be read for one byte.
const PART: usize = 4 << 10;

const PARTS: usize = CHUNK as usize / PART;

/// Below so many free bytes of the file system caches do not grow: the agent's own files lie there too.
const FREE_MIN: ByteCount = ByteCount(512 << 20);

/// Free space is looked at whenever the file has grown by so many chunks.
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

struct Slot {
    chunk: u64,
    /// Since the hand came by.
    used: bool,
    length: u32,
    checksums: [u32; PARTS],
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

    /// Fills `out` with the bytes `span` of `chunk`; false when they are not there.
    pub(super) fn read(&mut self, chunk: u64, span: Range<usize>, out: &mut [u8]) -> bool {
        let Some(&place) = self.places.get(&chunk) else { return false };
        if self.read_slot(place, span, out).is_some() {
            self.slots[place].used = true;
            return true;
        }
        tracing::warn!(chunk, "the cache of a mount does not hold what was put into it: it is fetched again");
        self.places.remove(&chunk);
        self.slots[place].used = false;
        false
    }

    fn read_slot(&self, place: usize, span: Range<usize>, out: &mut [u8]) -> Option<()> {
        let (slot, file) = (&self.slots[place], self.file.as_ref()?);
        let parts = span.start / PART..span.end.div_ceil(PART);
        let whole = parts.start * PART..(parts.end * PART).min(slot.length as usize);
        if span.end > whole.end {
            return None;
        }
        let mut bytes = vec![0; whole.len()];
        let offset = ByteOffset(place as u64 * CHUNK + whole.start as u64);
        if file.read_at(offset, &mut bytes).ok()? < bytes.len() {
            return None;
        }
        let sound = bytes
            .chunks(PART)
            .zip(&slot.checksums[parts])
            .all(|(part, checksum)| crc32c::crc32c(part) == *checksum);
        if !sound {
            return None;
        }
        out.copy_from_slice(&bytes[span.start - whole.start..span.end - whole.start]);
        Some(())
    }

    /// Keeps the whole `chunk`, in the place of another one when it is full.
    pub(super) fn put(&mut self, chunk: u64, bytes: &[u8]) {
        assert!(bytes.len() <= CHUNK as usize, "a chunk is no longer than that");
        let Some(file) = self.file.clone().filter(|_| !self.contains(chunk)) else { return };
        self.look_at_free_space();
        if self.slots_max == 0 {
            return;
        }
        let place = self.free_place();
        let mut checksums = [0; PARTS];
        for (checksum, part) in checksums.iter_mut().zip(bytes.chunks(PART)) {
            *checksum = crc32c::crc32c(part);
        }
        let offset = ByteOffset(place as u64 * CHUNK);
        if let Err(error) = file.write_vectored_at(offset, &[IoSlice::new(bytes)]) {
            tracing::warn!(%error, "cannot write the cache of a mount: it goes on without one");
            (self.file, self.slots, self.places) = (None, Vec::new(), HashMap::new());
            return;
        }
        let length = u32::try_from(bytes.len()).expect("a chunk is short");
        self.slots[place] = Slot { chunk, used: true, length, checksums };
        self.places.insert(chunk, place);
    }

    /// Stays as large as it is where there is little room for more.
    fn look_at_free_space(&mut self) {
        let grows = self.slots.len() < self.slots_max;
        if grows
            && self.slots.len().is_multiple_of(LOOK_EVERY)
            && self.storage.free_space().is_ok_and(|free| free < FREE_MIN)
        {
            tracing::warn!(
                bytes = self.bytes().0,
                "the cache of a mount does not grow: its file system is nearly full"
            );
            self.slots_max = self.slots.len();
        }
    }

    /// A place that nobody has, and nobody finds anything in.
    fn free_place(&mut self) -> usize {
        if self.slots.len() < self.slots_max {
            self.slots.push(Slot { chunk: 0, used: false, length: 0, checksums: [0; PARTS] });
            return self.slots.len() - 1;
        }
        loop {
            let place = self.hand;
            self.hand = (self.hand + 1) % self.slots.len();
            let slot = &mut self.slots[place];
            if std::mem::take(&mut slot.used) {
                continue;
            }
            if self.places.get(&slot.chunk) == Some(&place) {
                self.places.remove(&slot.chunk);
            }
            return place;
        }
    }
}

#[cfg(test)]
mod tests {
    use std::path::Path;

    use backtide_storage::MemoryStorage;

    use super::*;

    fn chunk_of(seed: u8) -> Vec<u8> {
        (0..CHUNK as usize).map(|at| (at / 7) as u8 ^ seed).collect()
    }

    fn cache(limit: u64) -> (Arc<dyn StorageFile>, Cache) {
        let storage = MemoryStorage::new();
        let file = storage.create_new(Path::new("cache")).unwrap();
        (Arc::clone(&file), Cache::new(Arc::new(storage), Some(file), ByteCount(limit)))
    }

    fn has(cache: &mut Cache, chunk: u64, seed: u8, span: Range<usize>) -> bool {
        let mut out = vec![0; span.len()];
        let there = cache.read(chunk, span.clone(), &mut out);
        assert!(!there || out == chunk_of(seed)[span], "chunk {chunk} is not what was put in");
        there
    }

    #[test]
    fn what_was_put_in_is_given_at_every_offset() {
        let (_, mut cache) = cache(10 * CHUNK);
        cache.put(3, &chunk_of(3));
        cache.put(9, &chunk_of(9)[..5_000]);
        for span in [0..1, 4_095..4_097, 0..65_536, 65_535..65_536] {
            assert!(has(&mut cache, 3, 3, span));
        }
        assert!(has(&mut cache, 9, 9, 4_090..5_000));
        assert!(!has(&mut cache, 4, 4, 0..1));
    }

    #[test]
    fn what_is_used_stays_and_the_file_does_not_grow() {
        let (file, mut cache) = cache(4 * CHUNK);
        for chunk in 0..4 {
            cache.put(chunk, &chunk_of(chunk as u8));
        }
        // Everything was used once: the hand goes round, and takes the first.
        cache.put(4, &chunk_of(4));
        assert!(!cache.contains(0));
        for chunk in 5..50_u64 {
            assert!(has(&mut cache, 2, 2, 0..100), "chunk 2 is used all the time, and gone at {chunk}");
            cache.put(chunk, &chunk_of(chunk as u8));
            assert!(has(&mut cache, chunk, chunk as u8, 0..10));
        }
        assert_eq!(cache.bytes(), ByteCount(4 * CHUNK));
        assert_eq!(file.len().unwrap(), ByteCount(4 * CHUNK));
    }

    #[test]
    fn a_byte_that_changed_on_disk_is_never_given() {
        let (file, mut cache) = cache(4 * CHUNK);
        cache.put(0, &chunk_of(0));
        file.write_vectored_at(ByteOffset(5_000), &[IoSlice::new(&[0xEE])]).unwrap();
        assert!(has(&mut cache, 0, 0, 0..4_096), "another part is whole");
        assert!(!has(&mut cache, 0, 0, 6_000..6_001));
        assert!(!cache.contains(0));
        cache.put(0, &chunk_of(0));
        assert!(has(&mut cache, 0, 0, 0..65_536));
    }

    #[test]
    fn without_room_nothing_is_kept() {
        let (_, mut cache) = cache(0);
        cache.put(0, &chunk_of(0));
        assert!(!has(&mut cache, 0, 0, 0..1));
    }
}
