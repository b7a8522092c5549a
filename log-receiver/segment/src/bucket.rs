//! Buckets: the disk cut into powers of 16, so that a long extent is a few pieces and not thousands.
//!
//! ```text
//! level    0       1       2        3        4       5        6       7        8
//! size     64 KiB  1 MiB   16 MiB   256 MiB  4 GiB   64 GiB   1 TiB   16 TiB   256 TiB
//! ```
//! An extent is split where it crosses the end of a bucket of its level, its ends at low levels and its
//! middle at a high one: at most two pieces a level. So whatever holds a byte lies in one of nine buckets, and one
//! look into the sorted index for each finds it.

use backtide_units::{ByteCount, ByteOffset, ByteRange, DISK_SIZE_MAX};

/// How many levels there are.
pub const LEVELS: u8 = 9;

/// Buckets of one level in one of the next, as a power of two.
const FANOUT_BITS: u32 = 4;

/// Bytes of a bucket of level 0, as a power of two.
const SIZE_BITS: u32 = 16;

/// The largest disk the format can hold is one bucket of the highest level.
const _: () = assert!(DISK_SIZE_MAX.0 == 1 << (SIZE_BITS + FANOUT_BITS * (LEVELS as u32 - 1)));

/// A piece of the disk: its level, then its number among those of the level.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Bucket {
    level: u8,
    number: u32,
}

impl Bucket {
    /// The bucket of a level that holds the byte at `offset`.
    ///
    /// # Panics
    /// Beyond [`DISK_SIZE_MAX`], and above the last level.
    pub fn holding(offset: ByteOffset, level: u8) -> Self {
        assert!(offset.0 < DISK_SIZE_MAX.0, "an offset beyond the largest disk");
        let number = offset.0 >> size_bits(level);
        Self { level, number: u32::try_from(number).expect("a disk has less than 2^32 buckets") }
    }

    /// The one with this level and number, if there can be one.
    pub fn new(level: u8, number: u32) -> Option<Self> {
        let exists = level < LEVELS && u64::from(number) < DISK_SIZE_MAX.0 >> size_bits(level);
        exists.then_some(Self { level, number })
    }

    /// Bytes in a bucket of a level.
    ///
    /// # Panics
    /// Above the last level.
    pub fn size(level: u8) -> ByteCount {
        size(level)
    }

    /// The pieces of a range, by their place on the disk: the ends in small buckets, the middle in large ones.
    ///
    /// # Panics
    /// Beyond [`DISK_SIZE_MAX`].
    pub fn split(range: ByteRange) -> Vec<(Self, ByteRange)> {
        split(range)
    }

    /// Its level.
    pub fn level(self) -> u8 {
        self.level
    }

    /// Its number among the buckets of its level.
    pub fn number(self) -> u32 {
        self.number
    }

    /// Its bytes of the disk.
    pub fn range(self) -> ByteRange {
        let start = u64::from(self.number) << size_bits(self.level);
        ByteRange::between(ByteOffset(start), ByteOffset(start + size(self.level).0))
    }

    /// Level and number in one, in the same order; for bitmaps.
    pub fn code(self) -> u64 {
        u64::from(self.level) << 32 | u64::from(self.number)
    }

    /// The bucket with this code, if there can be one.
    pub fn from_code(code: u64) -> Option<Self> {
        Self::new(u8::try_from(code >> 32).ok()?, code as u32)
    }

    /// In what the ends of a piece in this bucket are counted: bytes at level 0, else buckets of the
    /// level below.
    pub(crate) fn unit(self) -> ByteCount {
        match self.level.checked_sub(1) {
            Some(below) => size(below),
            None => ByteCount(1),
        }
    }
}

fn size(level: u8) -> ByteCount {
    ByteCount(1 << size_bits(level))
}

fn size_bits(level: u8) -> u32 {
    assert!(level < LEVELS, "level {level}");
    SIZE_BITS + FANOUT_BITS * u32::from(level)
}

pub(crate) fn split(range: ByteRange) -> Vec<(Bucket, ByteRange)> {
    assert!(range.end().0 <= DISK_SIZE_MAX.0, "a range beyond the largest disk");
    let (mut start, mut end) = (range.start().0, range.end().0);
    let mut pieces = Vec::new();
    let mut tails = Vec::new();
    let piece = |level: u8, start: u64, end: u64| {
        let range = ByteRange::between(ByteOffset(start), ByteOffset(end));
        (Bucket::holding(range.start(), level), range)
    };
    for level in 0..LEVELS {
        if start >= end {
            break;
        }
        let size = size(level).0;
        if start / size == (end - 1) / size {
            pieces.push(piece(level, start, end));
            break;
        }
        if start % size != 0 {
            let boundary = start.next_multiple_of(size);
            pieces.push(piece(level, start, boundary));
            start = boundary;
        }
        if end % size != 0 {
            let boundary = end - end % size;
            tails.push(piece(level, boundary, end));
            end = boundary;
        }
    }
    pieces.extend(tails.into_iter().rev());
    pieces
}

#[cfg(test)]
mod tests {
    use super::*;

    fn range(start: u64, end: u64) -> ByteRange {
        ByteRange::between(ByteOffset(start), ByteOffset(end))
    }

    #[test]
    fn pieces_cover_the_range_in_order_each_in_its_bucket() {
        let mib = 1 << 20;
        for (start, end) in [
            (0, 1),
            (65_535, 65_537),
            (4096, 4096 + mib),
            (mib, 2 * mib),
            (mib - 1, 2 * mib + 1),
            (512, DISK_SIZE_MAX.0 - 512),
            (0, DISK_SIZE_MAX.0),
            (DISK_SIZE_MAX.0 - 1, DISK_SIZE_MAX.0),
        ] {
            let pieces = split(range(start, end));
            assert!(pieces.len() <= 2 * usize::from(LEVELS), "{start}..{end}: {}", pieces.len());
            let mut at = start;
            for (bucket, piece) in pieces {
                assert_eq!(piece.start().0, at, "{start}..{end}");
                assert!(bucket.range().contains(piece), "{bucket:?} {piece}");
                assert_eq!(piece.start().0 % bucket.unit().0, 0);
                assert_eq!(piece.end().0 % bucket.unit().0, 0);
                at = piece.end().0;
            }
            assert_eq!(at, end);
        }
    }

    #[test]
    fn a_whole_large_bucket_is_one_piece() {
        let pieces = split(range(16 << 20, 32 << 20));
        assert_eq!(pieces, [(Bucket { level: 2, number: 1 }, range(16 << 20, 32 << 20))]);
        assert!(split(range(7, 7)).is_empty());
    }

    #[test]
    fn codes_come_back_and_others_are_refused() {
        for bucket in [Bucket { level: 0, number: u32::MAX }, Bucket { level: 8, number: 0 }] {
            assert_eq!(Bucket::from_code(bucket.code()), Some(bucket));
        }
        assert_eq!(Bucket::new(8, 1), None);
        assert_eq!(Bucket::new(9, 0), None);
        assert_eq!(Bucket::from_code(u64::MAX), None);
    }
}
