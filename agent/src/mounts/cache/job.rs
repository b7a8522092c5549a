//! What waits for a cache's storage, for another thread to do.

use std::{
    io::{self, IoSlice},
    ops::Range,
    sync::Arc,
};

use backtide_storage::{Storage, StorageFile};
use backtide_units::ByteOffset;
use bytes::Bytes;

use super::{CHUNK, PART, Sums};
use crate::mounts::FREE_MIN;

/// A part of a chunk that is to be read.
pub(in crate::mounts) struct Lookup {
    pub(super) file: Arc<dyn StorageFile>,
    pub(super) chunk: u64,
    pub(super) place: usize,
    pub(super) generation: u64,
    /// Of the parts that what is wanted lies in.
    pub(super) offset: ByteOffset,
    pub(super) length: usize,
    pub(super) sums: Vec<u32>,
    /// Of these bytes.
    pub(super) wanted: Range<usize>,
}

/// Chunks that are to be written, each to its place.
pub(in crate::mounts) struct Placing {
    pub(super) storage: Arc<dyn Storage>,
    pub(super) file: Arc<dyn StorageFile>,
    /// Where what of the bytes goes.
    pub(super) places: Vec<(usize, Range<usize>)>,
    pub(super) bytes: Bytes,
    /// Whether the file grows by so much that its file system is looked at.
    pub(super) looks: bool,
}

/// What became of them.
pub(in crate::mounts) enum Placed {
    Written(Vec<(usize, Sums)>),
    /// The file system is nearly full: these places are not written.
    NoRoom(Vec<usize>),
    Failed(io::Error),
}

impl Lookup {
    /// Reads it. None when the file does not hold what was put in.
    pub(in crate::mounts) fn read(&self) -> Option<Bytes> {
        let mut bytes = vec![0; self.length];
        if self.file.read_at(self.offset, &mut bytes).ok()? < bytes.len() {
            return None;
        }
        let whole = bytes.chunks(PART).zip(&self.sums).all(|(part, sum)| crc32c::crc32c(part) == *sum);
        whole.then(|| Bytes::from(bytes).slice(self.wanted.clone()))
    }
}

impl Placing {
    /// Writes them.
    pub(in crate::mounts) fn write(self) -> Placed {
        if self.looks && self.storage.free_space().is_ok_and(|free| free < FREE_MIN) {
            return Placed::NoRoom(self.places.into_iter().map(|(place, _)| place).collect());
        }
        let mut written = Vec::with_capacity(self.places.len());
        for (place, range) in self.places {
            let bytes = &self.bytes[range];
            let offset = ByteOffset(place as u64 * CHUNK);
            if let Err(error) = self.file.write_vectored_at(offset, &[IoSlice::new(bytes)]) {
                return Placed::Failed(error);
            }
            written.push((place, Sums::of(bytes)));
        }
        Placed::Written(written)
    }
}
