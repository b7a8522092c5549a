//! Places on a disk at the tracking granularity of 4 KiB.

use std::fmt;

use serde::{Deserialize, Serialize};

use crate::{ByteCount, ByteOffset, ByteRange};

/// The tracking granule in bytes: one bit in a dirty bitmap.
pub const BLOCK_SIZE: u64 = 4096;

/// Number of a block: byte offset / [`BLOCK_SIZE`].
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct BlockIndex(pub u64);

/// How many blocks.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(transparent)]
pub struct BlockCount(pub u64);

/// The blocks `[start, end)`.
///
/// Invariant: `start <= end`.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct BlockRange {
    start: u64,
    end: u64,
}

impl BlockIndex {
    /// The block that holds the byte at `offset`.
    pub fn holding(offset: ByteOffset) -> Self {
        Self(offset.0 / BLOCK_SIZE)
    }

    /// The block's first byte.
    pub fn start(self) -> ByteOffset {
        ByteOffset(self.0 * BLOCK_SIZE)
    }
}

impl BlockCount {
    /// How many bytes so many whole blocks have.
    pub fn bytes(self) -> ByteCount {
        ByteCount(self.0 * BLOCK_SIZE)
    }
}

impl BlockRange {
    /// `[start, end)`.
    ///
    /// # Panics
    /// When `start > end`.
    pub fn between(start: BlockIndex, end: BlockIndex) -> Self {
        assert!(start <= end, "block range {}..{} runs backwards", start.0, end.0);
        Self { start: start.0, end: end.0 }
    }

    /// Every block that `bytes` touches, partly touched ones included.
    pub fn touched_by(bytes: ByteRange) -> Self {
        if bytes.is_empty() {
            let at = bytes.start().0 / BLOCK_SIZE;
            return Self { start: at, end: at };
        }
        Self { start: bytes.start().0 / BLOCK_SIZE, end: (bytes.end().0 - 1) / BLOCK_SIZE + 1 }
    }

    /// The blocks that `bytes` covers wholly. A short last block of the disk counts as covered
    /// when `bytes` reaches the disk's end.
    pub fn covered_by(bytes: ByteRange, disk_size: ByteCount) -> Self {
        let start = bytes.start().0.div_ceil(BLOCK_SIZE);
        let end = if bytes.end().0 >= disk_size.0 {
            disk_size.0.div_ceil(BLOCK_SIZE)
        } else {
            bytes.end().0 / BLOCK_SIZE
        };
        Self { start, end: end.max(start) }
    }

    /// All blocks of a disk of `size` bytes, a short last one included.
    pub fn whole_disk(size: ByteCount) -> Self {
        Self { start: 0, end: size.0.div_ceil(BLOCK_SIZE) }
    }

    /// The first block.
    pub fn start(self) -> BlockIndex {
        BlockIndex(self.start)
    }

    /// One past the last block.
    pub fn end(self) -> BlockIndex {
        BlockIndex(self.end)
    }

    /// How many blocks.
    pub fn count(self) -> BlockCount {
        BlockCount(self.end - self.start)
    }

    /// Whether the range holds no block.
    pub fn is_empty(self) -> bool {
        self.start == self.end
    }

    /// Whether both ranges share a block.
    pub fn overlaps(self, other: Self) -> bool {
        self.start < other.end && other.start < self.end && !self.is_empty() && !other.is_empty()
    }

    /// The blocks in both ranges, if there are any.
    pub fn intersection(self, other: Self) -> Option<Self> {
        self.overlaps(other)
            .then(|| Self { start: self.start.max(other.start), end: self.end.min(other.end) })
    }

    /// The bytes of these blocks, cut at the end of a disk of `disk_size` bytes.
    pub fn bytes(self, disk_size: ByteCount) -> ByteRange {
        let end = (self.end.saturating_mul(BLOCK_SIZE)).min(disk_size.0);
        let start = (self.start.saturating_mul(BLOCK_SIZE)).min(end);
        ByteRange::between(ByteOffset(start), ByteOffset(end))
    }

    /// The indices as a std range, for the bitmap libraries.
    pub fn indices(self) -> std::ops::Range<u64> {
        self.start..self.end
    }
}

impl From<std::ops::Range<u64>> for BlockRange {
    fn from(indices: std::ops::Range<u64>) -> Self {
        Self::between(BlockIndex(indices.start), BlockIndex(indices.end))
    }
}

impl fmt::Display for BlockIndex {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.fmt(f)
    }
}

impl fmt::Display for BlockCount {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.fmt(f)
    }
}

impl fmt::Display for BlockRange {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "blocks {}..{}", self.start, self.end)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn bytes(start: u64, end: u64) -> ByteRange {
        ByteRange::between(ByteOffset(start), ByteOffset(end))
    }

    #[test]
    fn a_sector_touches_its_block_and_covers_none() {
        let sector = bytes(4096 + 512, 4096 + 1024);
        assert_eq!(BlockRange::touched_by(sector), BlockRange::from(1..2));
        assert!(BlockRange::covered_by(sector, ByteCount(1 << 20)).is_empty());
    }

    #[test]
    fn the_short_last_block_counts_as_covered() {
        let size = ByteCount(4096 + 512);
        assert_eq!(BlockRange::covered_by(bytes(0, 4608), size), BlockRange::from(0..2));
        assert_eq!(BlockRange::from(1..2).bytes(size), bytes(4096, 4608));
        assert_eq!(BlockRange::whole_disk(size), BlockRange::from(0..2));
    }

    #[test]
    fn an_empty_range_touches_nothing() {
        assert!(BlockRange::touched_by(bytes(5000, 5000)).is_empty());
    }
}
