//! A log as it was at one moment, shared with any number of threads.

use std::sync::Arc;

use backtide_units::{ByteCount, ByteRange, CaptureTime, Lsn};
use bytes::Bytes;
use roaring::RoaringTreemap;

use crate::{LogError, Point, PointError, TimedLsn, Timeline};

/// A log as it was at one moment. Cheap to clone; reads block on the file system.
#[derive(Clone)]
pub struct Snapshot {
    timeline: Arc<Timeline>,
}

/// The disk at one point. Cheap to clone.
#[derive(Clone)]
pub struct View {
    snapshot: Snapshot,
    at: Lsn,
}

/// Whether an extent of a view has data or is known to read as zeroes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Allocation {
    /// There may be any bytes.
    Data,
    /// All bytes are zero.
    Zero,
}

impl Snapshot {
    /// What the log gave back then.
    pub fn timeline(&self) -> &Timeline {
        &self.timeline
    }

    /// The disk at a point.
    ///
    /// # Errors
    /// When `at` is not a point: which hole, why, and the nearest points.
    pub fn view(&self, at: Lsn) -> Result<View, PointError> {
        let _ = at;
        unimplemented!()
    }

    /// The newest version of everything, whatever is offered.
    pub fn latest_view(&self) -> View {
        View { snapshot: self.clone(), at: Lsn::MAX }
    }

    /// The LSN that a person's point stands for, seen at `now`.
    ///
    /// # Errors
    /// When it is no point.
    pub fn resolve(&self, point: &Point, now: CaptureTime) -> Result<Lsn, PointError> {
        let _ = (point, now);
        unimplemented!()
    }

    /// The last point captured at or before `time`.
    ///
    /// # Errors
    /// When there is none, or the time lies in a hole.
    pub fn point_at(&self, time: CaptureTime) -> Result<Lsn, PointError> {
        let _ = time;
        unimplemented!()
    }

    /// When the newest record at or below `lsn` was captured.
    ///
    /// # Errors
    /// When the log cannot be read.
    pub fn time_of(&self, lsn: Lsn) -> Result<Option<CaptureTime>, LogError> {
        let _ = lsn;
        unimplemented!()
    }

    /// The blocks (of 4 KiB) with a version in `(after, through]`: those whose content may differ
    /// between the two points, in either direction. A superset: a write of equal bytes counts.
    ///
    /// # Errors
    /// When the log cannot be read.
    pub fn changed_blocks(&self, after: Lsn, through: Lsn) -> Result<RoaringTreemap, LogError> {
        let _ = (after, through);
        unimplemented!()
    }

    /// The newest `limit` flush points at or below `through`, newest first.
    ///
    /// # Errors
    /// When the log cannot be read.
    pub fn flush_points(&self, through: Lsn, limit: usize) -> Result<Vec<TimedLsn>, LogError> {
        let _ = (through, limit);
        unimplemented!()
    }
}

impl View {
    /// The point.
    pub fn at(&self) -> Lsn {
        self.at
    }

    /// The disk's size, as the newest attach gave it.
    pub fn disk_size(&self) -> ByteCount {
        self.snapshot.timeline.attached().map_or(ByteCount::ZERO, |attached| attached.size)
    }

    /// The bytes of `range`, each checked against the checksum it was captured with.
    ///
    /// # Errors
    /// [`LogError::Damaged`] with file and offset; never wrong data.
    pub fn read(&self, range: ByteRange) -> Result<Bytes, LogError> {
        let _ = range;
        unimplemented!()
    }

    /// Where `range` has data and where it is known to be zero: adjoining, in order, covering it.
    ///
    /// # Errors
    /// When an index cannot be read.
    pub fn extents(&self, range: ByteRange) -> Result<Vec<(ByteRange, Allocation)>, LogError> {
        let _ = range;
        unimplemented!()
    }
}
