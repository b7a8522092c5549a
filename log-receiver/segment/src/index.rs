//! Which bytes of the disk a segment holds: extents by bucket, newest version first.
//!
//! Extents are split at the ends of buckets ([`crate::bucket`]), so one range of the key order holds
//! everything about a bucket, and the newest version at or below a point is the first extent at or after a key.

use std::collections::BTreeMap;

use backtide_units::{ByteOffset, ByteRange, Lsn};
use roaring::RoaringTreemap;

use crate::{Bucket, EntryHeader, LEVELS, Position, Seq, bucket};

/// From this level on extents are *coarse*: not in the bitmap of blocks, and so few that they are looked at
/// one by one.
pub const COARSE_LEVEL: u8 = 2;

/// A piece of the disk in one version.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Extent {
    /// Where on the disk.
    pub range: ByteRange,
    /// The version.
    pub version: Lsn,
    /// The entry.
    pub seq: Seq,
    /// Where the entry's header is in the file.
    pub position: Position,
    /// Whether the piece is zeroes: then the entry has no payload.
    pub zero: bool,
}

/// The order of extents: bucket up, version down, entry down.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct ExtentKey {
    bucket: Bucket,
    version_inverted: u64,
    seq_inverted: u64,
}

/// The index of a segment while it is written: in memory.
#[derive(Clone, Debug, Default)]
pub struct OpenIndex {
    extents: BTreeMap<ExtentKey, Piece>,
    /// How many extents each level has.
    levels: [u32; LEVELS as usize],
}

/// The part of an extent that its key does not say. `position`'s lowest bit is the zero flag; the ends are counted
/// in units of the bucket.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Piece {
    pub(crate) start: u16,
    pub(crate) last: u16,
    pub(crate) position: u32,
}

impl ExtentKey {
    /// The key of one extent.
    pub fn new(bucket: Bucket, version: Lsn, seq: Seq) -> Self {
        Self { bucket, version_inverted: !version.0, seq_inverted: !seq.0 }
    }

    /// At or before every extent of the bucket with a version at or below `at`.
    pub fn newest(bucket: Bucket, at: Lsn) -> Self {
        Self::new(bucket, at, Seq(u64::MAX))
    }

    /// At or before every coarse extent.
    pub fn first_coarse() -> Self {
        Self::newest(Bucket::holding(ByteOffset::ZERO, COARSE_LEVEL), Lsn::MAX)
    }

    /// Just after this key: older than it.
    #[must_use]
    pub fn older(self) -> Self {
        let (seq_inverted, carry) = self.seq_inverted.overflowing_add(1);
        let version_inverted = self.version_inverted.saturating_add(u64::from(carry));
        Self { seq_inverted, version_inverted, ..self }
    }

    /// Its bucket.
    pub fn bucket(self) -> Bucket {
        self.bucket
    }

    pub(crate) fn version(self) -> Lsn {
        Lsn(!self.version_inverted)
    }

    pub(crate) fn seq(self) -> Seq {
        Seq(!self.seq_inverted)
    }
}

impl Piece {
    /// Whether a bucket can have such a piece.
    pub(crate) fn fits(self, bucket: Bucket) -> bool {
        let units = bucket.range().count().0 / bucket.unit().0;
        self.start <= self.last && u64::from(self.last) < units
    }

    pub(crate) fn extent(self, key: ExtentKey) -> Extent {
        let (base, unit) = (key.bucket.range().start().0, key.bucket.unit().0);
        Extent {
            range: ByteRange::between(
                ByteOffset(base + u64::from(self.start) * unit),
                ByteOffset(base + (u64::from(self.last) + 1) * unit),
            ),
            version: key.version(),
            seq: key.seq(),
            position: Position(self.position & !1),
            zero: self.position & 1 != 0,
        }
    }
}

impl OpenIndex {
    /// Adds an entry that stands at `position`; entries without bytes of the disk change nothing.
    pub fn add(&mut self, header: &EntryHeader, position: Position) {
        let Some(range) = header.range() else { return };
        let zero = header.payload_length == 0;
        for (bucket, part) in bucket::split(range) {
            let (base, unit) = (bucket.range().start().0, bucket.unit().0);
            let piece = Piece {
                start: ((part.start().0 - base) / unit) as u16,
                last: ((part.end().0 - base) / unit - 1) as u16,
                position: position.0 | u32::from(zero),
            };
            self.extents.insert(ExtentKey::new(bucket, header.lsn, header.seq), piece);
            self.levels[usize::from(bucket.level())] += 1;
        }
    }

    /// How many extents.
    pub fn count(&self) -> usize {
        self.extents.len()
    }

    /// Whether any extent lies in a bucket of `level` that touches `range`.
    pub fn has(&self, level: u8, range: ByteRange) -> bool {
        if range.is_empty() || self.levels[usize::from(level)] == 0 {
            return false;
        }
        let first = Bucket::holding(range.start(), level);
        let last = Bucket::holding(ByteOffset(range.end().0 - 1), level);
        let keys = ExtentKey::newest(first, Lsn::MAX)..=ExtentKey::new(last, Lsn::ZERO, Seq(0));
        self.extents.range(keys).next().is_some()
    }

    /// Up to `limit` extents of the bucket of `from`, from that key on, in key order.
    pub fn fetch(&self, from: ExtentKey, limit: usize) -> Vec<(ExtentKey, Extent)> {
        let in_bucket = self.extents.range(from..).take_while(|(key, _)| key.bucket == from.bucket);
        in_bucket.take(limit).map(|(key, piece)| (*key, piece.extent(*key))).collect()
    }

    /// The extents from a key on, in key order.
    pub fn from(&self, from: ExtentKey) -> impl Iterator<Item = (ExtentKey, Extent)> + '_ {
        self.extents.range(from..).map(|(key, piece)| (*key, piece.extent(*key)))
    }

    /// All extents, in key order.
    pub fn extents(&self) -> impl Iterator<Item = Extent> + '_ {
        self.extents.iter().map(|(key, piece)| piece.extent(*key))
    }

    /// The codes of the buckets that have extents.
    pub fn buckets(&self) -> RoaringTreemap {
        let mut codes: Vec<u64> = self.extents.keys().map(|key| key.bucket.code()).collect();
        codes.dedup();
        let mut buckets: RoaringTreemap = codes.into_iter().collect();
        buckets.optimize();
        buckets
    }

    pub(crate) fn pieces(&self) -> impl Iterator<Item = (ExtentKey, Piece)> + '_ {
        self.extents.iter().map(|(key, piece)| (*key, *piece))
    }
}
