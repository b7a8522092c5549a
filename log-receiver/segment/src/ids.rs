//! Places in a log: which segment, which entry, which byte.

use std::fmt;

use backtide_units::ByteOffset;

/// Number of a segment within one disk's log, from 1 without gaps.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct SegmentId(pub u32);

/// Number of an entry within one disk's log, from 1 without gaps, across segments.
/// `Seq(0)` comes before every entry.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Seq(pub u64);

/// Byte position within a segment file. Segments stay below 4 GiB.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Position(pub u32);

impl SegmentId {
    /// The first segment of every log.
    pub const FIRST: Self = Self(1);

    /// The one after this.
    ///
    /// # Panics
    /// After 2^32 - 1 segments.
    pub fn next(self) -> Self {
        Self(self.0.checked_add(1).expect("a log's segment numbers are used up"))
    }

    /// The segment's file name.
    pub fn file_name(self) -> String {
        format!("{:016}.seg", self.0)
    }

    /// The segment a file name stands for; `None` for other files.
    pub fn from_file_name(name: &str) -> Option<Self> {
        let digits = name.strip_suffix(".seg")?;
        if digits.len() != 16 || !digits.bytes().all(|b| b.is_ascii_digit()) {
            return None;
        }
        // The last number has none after it, so no log comes to it.
        digits.parse().ok().filter(|&number| number > 0 && number < u32::MAX).map(Self)
    }
}

impl Seq {
    /// The highest that a file may name, so that counting on from it never ends.
    pub(crate) const MAX: Self = Self(u64::MAX >> 1);

    /// The entry after this one.
    ///
    /// # Panics
    /// After 2^64 - 1 entries.
    pub fn next(self) -> Self {
        Self(self.0.checked_add(1).expect("a log's entry numbers are used up"))
    }
}

impl Position {
    /// As an offset in the file.
    pub fn offset(self) -> ByteOffset {
        ByteOffset(u64::from(self.0))
    }
}

impl fmt::Display for SegmentId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.fmt(f)
    }
}

impl fmt::Display for Seq {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.fmt(f)
    }
}

impl fmt::Display for Position {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.fmt(f)
    }
}
