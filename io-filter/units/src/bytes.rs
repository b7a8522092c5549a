//! Places on a disk in bytes.

use std::fmt;

use serde::{Deserialize, Serialize};

/// A position on a disk, in bytes from its start.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(transparent)]
pub struct ByteOffset(pub u64);

/// A length in bytes.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(transparent)]
pub struct ByteCount(pub u64);

/// The largest disk: 256 TiB, what a log's index can name.
pub const DISK_SIZE_MAX: ByteCount = ByteCount(256 << 40);

/// The bytes `[start, end)` of a disk.
///
/// Invariant: `start <= end`; the constructors refuse anything else.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct ByteRange {
    start: u64,
    end: u64,
}

impl ByteOffset {
    /// The start of a disk.
    pub const ZERO: Self = Self(0);

    /// The offset `count` bytes further on, or `None` beyond `u64`.
    pub fn checked_add(self, count: ByteCount) -> Option<Self> {
        self.0.checked_add(count.0).map(Self)
    }
}

impl ByteCount {
    /// No bytes.
    pub const ZERO: Self = Self(0);

    /// The length of a buffer.
    pub fn of(buffer: &[u8]) -> Self {
        Self(buffer.len() as u64)
    }

    /// Whether this is no bytes at all.
    pub fn is_zero(self) -> bool {
        self.0 == 0
    }

    /// As an index into memory; `None` where `usize` is too small.
    pub fn as_usize(self) -> Option<usize> {
        usize::try_from(self.0).ok()
    }
}

impl ByteRange {
    /// `[offset, offset + count)`, or `None` when the end is beyond `u64`.
    pub fn new(offset: ByteOffset, count: ByteCount) -> Option<Self> {
        let end = offset.checked_add(count)?;
        Some(Self { start: offset.0, end: end.0 })
    }

    /// `[start, end)`.
    ///
    /// # Panics
    /// When `start > end`: callers compute both, so that is a broken invariant.
    pub fn between(start: ByteOffset, end: ByteOffset) -> Self {
        assert!(start <= end, "byte range {}..{} runs backwards", start.0, end.0);
        Self { start: start.0, end: end.0 }
    }

    /// The first byte.
    pub fn start(self) -> ByteOffset {
        ByteOffset(self.start)
    }

    /// One past the last byte.
    pub fn end(self) -> ByteOffset {
        ByteOffset(self.end)
    }

    /// How many bytes.
    pub fn count(self) -> ByteCount {
        ByteCount(self.end - self.start)
    }

    /// Whether the range holds no bytes.
    pub fn is_empty(self) -> bool {
        self.start == self.end
    }

    /// Whether both ranges share at least one byte.
    pub fn overlaps(self, other: Self) -> bool {
        self.start < other.end && other.start < self.end && !self.is_empty() && !other.is_empty()
    }

    /// The bytes in both ranges, if there are any.
    pub fn intersection(self, other: Self) -> Option<Self> {
        self.overlaps(other)
            .then(|| Self { start: self.start.max(other.start), end: self.end.min(other.end) })
    }

    /// Whether `other` lies wholly inside.
    pub fn contains(self, other: Self) -> bool {
        self.start <= other.start && other.end <= self.end
    }

    /// The range in pieces that do not cross a multiple of `boundary` bytes, in order.
    pub fn split_at_multiples(self, boundary: ByteCount) -> impl Iterator<Item = Self> {
        assert!(!boundary.is_zero(), "cannot split at multiples of zero");
        let mut start = self.start;
        std::iter::from_fn(move || {
            if start >= self.end {
                return None;
            }
            let next = (start / boundary.0 + 1).saturating_mul(boundary.0).min(self.end);
            let piece = Self { start, end: next };
            start = next;
            Some(piece)
        })
    }
}

impl fmt::Display for ByteOffset {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.fmt(f)
    }
}

impl fmt::Display for ByteCount {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.fmt(f)
    }
}

impl fmt::Display for ByteRange {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}..{}", self.start, self.end)
    }
}

/// Whether all bytes are zero.
pub fn is_zeroes(bytes: &[u8]) -> bool {
    // Equal to itself shifted by one, and the first is zero: one pass at the speed of memcmp.
    bytes.first().is_none_or(|first| *first == 0)
        && (bytes.len() < 2 || bytes[1..] == bytes[..bytes.len() - 1])
}

#[cfg(test)]
mod tests {
    use super::*;

    fn range(start: u64, end: u64) -> ByteRange {
        ByteRange::between(ByteOffset(start), ByteOffset(end))
    }

    #[test]
    fn neighbours_do_not_overlap() {
        assert!(!range(0, 4096).overlaps(range(4096, 8192)));
        assert!(range(0, 4097).overlaps(range(4096, 8192)));
        assert!(!range(10, 10).overlaps(range(0, 20)));
    }

    #[test]
    fn split_covers_the_range_once() {
        let pieces: Vec<_> = range(1000, 9000).split_at_multiples(ByteCount(4096)).collect();
        assert_eq!(pieces, [range(1000, 4096), range(4096, 8192), range(8192, 9000)]);
        assert_eq!(range(5, 5).split_at_multiples(ByteCount(4096)).count(), 0);
    }

    #[test]
    fn a_range_beyond_u64_is_refused() {
        assert_eq!(ByteRange::new(ByteOffset(u64::MAX), ByteCount(1)), None);
    }

    #[test]
    fn one_byte_that_is_not_zero_is_seen_wherever_it_is() {
        assert!(is_zeroes(&[]) && is_zeroes(&[0]) && is_zeroes(&[0; 33]));
        for at in 0..33 {
            let mut bytes = [0; 33];
            bytes[at] = 1;
            assert!(!is_zeroes(&bytes), "{at}");
        }
    }
}
