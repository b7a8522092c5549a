//! Which bytes of the disk a segment holds: extents by bucket, newest version first.
//!
//! A bucket is 64 KiB of the disk. Extents are split at bucket boundaries, so one range of the key
//! order holds everything about a bucket, and the newest version at or below a point is the first
//! extent at or after a key. Wide extents (more than 1 MiB of zeroes) would be split into thousands
//! of pieces, so they are kept apart.

use std::collections::BTreeMap;

use backtide_units::{ByteCount, ByteOffset, ByteRange, Lsn};
use roaring::RoaringBitmap;

use crate::{EntryHeader, Position, Seq};

/// Bytes of the disk in one bucket.
pub const BUCKET_SIZE: ByteCount = ByteCount(64 << 10);

/// The largest disk the format can hold: 2^32 buckets, 256 TiB.
pub const DISK_SIZE_MAX: ByteCount = ByteCount(BUCKET_SIZE.0 << 32);

/// Zeroes longer than this are wide.
pub const WIDE_OVER: ByteCount = ByteCount(1 << 20);

/// Number of a bucket: byte offset / [`BUCKET_SIZE`].
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Bucket(pub u32);

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
    bucket: u32,
    version_inverted: u64,
    seq_inverted: u64,
}

/// The index of a segment while it is written: in memory.
#[derive(Clone, Debug, Default)]
pub struct OpenIndex {
    extents: BTreeMap<ExtentKey, Piece>,
    wide: Vec<Extent>,
    buckets: RoaringBitmap,
}

/// The part of an extent that its key does not say. `position`'s lowest bit is the zero flag.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Piece {
    pub(crate) start: u16,
    pub(crate) last: u16,
    pub(crate) position: u32,
}

impl Bucket {
    /// The bucket that holds the byte at `offset`.
    ///
    /// # Panics
    /// Beyond [`DISK_SIZE_MAX`].
    pub fn holding(offset: ByteOffset) -> Self {
        Self(u32::try_from(offset.0 / BUCKET_SIZE.0).expect("an offset beyond the largest disk"))
    }

    /// Its bytes of the disk.
    pub fn range(self) -> ByteRange {
        let start = u64::from(self.0) * BUCKET_SIZE.0;
        ByteRange::between(ByteOffset(start), ByteOffset(start + BUCKET_SIZE.0))
    }
}

impl ExtentKey {
    /// The key of one extent.
    pub fn new(bucket: Bucket, version: Lsn, seq: Seq) -> Self {
        Self { bucket: bucket.0, version_inverted: !version.0, seq_inverted: !seq.0 }
    }

    /// At or before every extent of the bucket with a version at or below `at`.
    pub fn newest(bucket: Bucket, at: Lsn) -> Self {
        Self::new(bucket, at, Seq(u64::MAX))
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
        Bucket(self.bucket)
    }

    pub(crate) fn version(self) -> Lsn {
        Lsn(!self.version_inverted)
    }

    pub(crate) fn seq(self) -> Seq {
        Seq(!self.seq_inverted)
    }
}

impl Piece {
    pub(crate) fn extent(self, key: ExtentKey) -> Extent {
        let base = key.bucket().range().start().0;
        Extent {
            range: ByteRange::between(
                ByteOffset(base + u64::from(self.start)),
                ByteOffset(base + u64::from(self.last) + 1),
            ),
            version: key.version(),
            seq: key.seq(),
            position: Position(self.position & !1),
            zero: self.position & 1 != 0,
        }
    }
}

impl Extent {
    /// Its place in the order.
    pub fn key(&self) -> ExtentKey {
        ExtentKey::new(Bucket::holding(self.range.start()), self.version, self.seq)
    }
}

impl OpenIndex {
    /// Adds an entry that stands at `position`; entries without bytes of the disk change nothing.
    pub fn add(&mut self, header: &EntryHeader, position: Position) {
        let Some(range) = header.range() else { return };
        let zero = header.payload_length == 0;
        if zero && range.count() > WIDE_OVER {
            self.wide.push(Extent { range, version: header.lsn, seq: header.seq, position, zero });
            return;
        }
        for part in range.split_at_multiples(BUCKET_SIZE) {
            let bucket = Bucket::holding(part.start());
            let base = bucket.range().start().0;
            let piece = Piece {
                start: (part.start().0 - base) as u16,
                last: (part.end().0 - 1 - base) as u16,
                position: position.0 | u32::from(zero),
            };
            self.extents.insert(ExtentKey::new(bucket, header.lsn, header.seq), piece);
            self.buckets.insert(bucket.0);
        }
    }

    /// How many extents, wide ones included.
    pub fn count(&self) -> usize {
        self.extents.len() + self.wide.len()
    }

    /// Whether any extent that is not wide lies in `bucket`.
    pub fn has(&self, bucket: Bucket) -> bool {
        self.buckets.contains(bucket.0)
    }

    /// Up to `limit` extents of the bucket of `from`, from that key on, in key order.
    pub fn fetch(&self, from: ExtentKey, limit: usize) -> Vec<Extent> {
        let in_bucket = self.extents.range(from..).take_while(|(key, _)| key.bucket == from.bucket);
        in_bucket.take(limit).map(|(key, piece)| piece.extent(*key)).collect()
    }

    /// All extents that are not wide, in key order.
    pub fn extents(&self) -> impl Iterator<Item = Extent> + '_ {
        self.extents.iter().map(|(key, piece)| piece.extent(*key))
    }

    pub(crate) fn pieces(&self) -> impl Iterator<Item = (ExtentKey, Piece)> + '_ {
        self.extents.iter().map(|(key, piece)| (*key, *piece))
    }

    /// The wide extents, in log order.
    pub fn wide(&self) -> &[Extent] {
        &self.wide
    }

    pub(crate) fn buckets(&self) -> &RoaringBitmap {
        &self.buckets
    }
}
