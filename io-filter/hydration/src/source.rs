//! Which point of which disk's history the missing blocks have their content of.

use backtide_units::{ByteCount, CaptureTime, DiskId, DiskName, HistoryId, Lsn};

/// A point at a log receiver, named so that it can be found again whatever ends in between.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct SourcePoint {
    /// Where the receiver's stream listens, as text.
    pub receiver: String,
    /// The disk whose history has the point.
    pub disk: DiskId,
    /// Its name when the point was chosen: for people.
    pub name: DiskName,
    /// Its history there.
    pub history: HistoryId,
    /// The point.
    pub lsn: Lsn,
    /// When its last change was captured; for people.
    pub time: CaptureTime,
    /// The disk's size at the point.
    pub size: ByteCount,
}
