//! The timeline of a disk: what can be gone back to, and what not and why.

use backtide_units::{ByteCount, CaptureTime, DiskId, DiskName, Lsn};
use serde::{Deserialize, Serialize};

use crate::{DiskOrigin, Lock, Touched};

/// Which disk an answer is about.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct DiskRef {
    /// Its name.
    pub name: DiskName,
    /// Its identity.
    pub uuid: DiskId,
    /// Its size.
    pub size: ByteCount,
}

/// A disk's timeline.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct PointsReport {
    /// The disk.
    pub disk: DiskRef,
    /// What can be gone back to, oldest first.
    pub intervals: Vec<Interval>,
    /// What cannot, oldest first.
    pub holes: Vec<Hole>,
    /// Named points, oldest first.
    pub marks: Vec<MarkPoint>,
    /// Points at which the guest had flushed.
    pub flush_points: FlushPoints,
    /// The oldest point; none before the first is complete.
    pub first: Option<Point>,
    /// The newest point.
    pub last: Option<Point>,
    /// The point of another disk that it began as; none when it did not.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub origin: Option<DiskOrigin>,
    /// Points that nobody can let go before a time.
    #[serde(default)]
    pub locks: Vec<Lock>,
    /// How much was written when; none without writes, and when the log cannot be read for it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub density: Option<Density>,
    /// What is wrong with the disk's log: a sentence with file and place. Either it is damaged and
    /// nothing can be added to it: what is listed is what can still be read, and the next connection
    /// of the disk's agent begins a new log. Or a scrub or a read has found a damaged place in it:
    /// points that need the place are listed and cannot be read.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub damage: Option<String>,
    /// Which points the damaged places that are known touch.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub touched: Vec<Touched>,
    /// Whether the disk's agent is connected: else what was written since the newest point is not here. None where nobody tells.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub connected: Option<bool>,
}

/// How much was written when: the time of a disk's log in equal parts.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Density {
    /// When the first part begins: at the first write.
    pub from_time: CaptureTime,
    /// When the last part ends: at the last write.
    pub to_time: CaptureTime,
    /// The parts, oldest first.
    pub parts: Vec<DensityPart>,
}

/// What was written within one part of the time.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct DensityPart {
    /// Writes, zeroings and discards.
    pub changes: u64,
    /// About what they took in the log, and what resyncs brought meanwhile.
    pub bytes: ByteCount,
}

/// The points around a time.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct AroundReport {
    /// The disk.
    pub disk: DiskRef,
    /// The time as it was asked for.
    pub asked: String,
    /// That time.
    pub time: CaptureTime,
    /// What going back to it gives; none when it cannot be gone back to.
    pub point: Option<Point>,
    /// The hole it lies in.
    pub hole: Option<Hole>,
    /// The nearest point at or before it.
    pub before: Option<Point>,
    /// The nearest point after it.
    pub after: Option<Point>,
    /// The newest point at or before it at which the guest had flushed.
    pub flush_before: Option<Point>,
    /// The newest mark at or before it that can be gone back to.
    pub mark_before: Option<MarkPoint>,
    /// The oldest mark after it that can be gone back to.
    pub mark_after: Option<MarkPoint>,
    /// As in [`ResolvedPoint::warning`](crate::ResolvedPoint::warning).
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub warning: Option<String>,
    /// What is wrong with the disk's log, as in [`PointsReport::damage`].
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub damage: Option<String>,
    /// Which points the damaged places that are known touch.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub touched: Vec<Touched>,
}

/// A place in a timeline.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Point {
    /// The last write it includes.
    pub lsn: Lsn,
    /// When that was captured.
    pub time: CaptureTime,
}

/// A recoverable interval: every LSN from `from_lsn` to `to_lsn`, both included, is a point.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Interval {
    /// Its first LSN.
    pub from_lsn: Lsn,
    /// Its last LSN.
    pub to_lsn: Lsn,
    /// When the first was captured.
    pub from_time: CaptureTime,
    /// When the last was captured.
    pub to_time: CaptureTime,
    /// Whether it still grows.
    pub open: bool,
}

/// LSNs that cannot be gone back to: those above `after_lsn` and below `before_lsn`.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Hole {
    /// The last point before it; 0 when there is none.
    pub after_lsn: Lsn,
    /// The first point after it; none while it is open.
    pub before_lsn: Option<Lsn>,
    /// When it began.
    pub from_time: CaptureTime,
    /// When it ended; none while it is open.
    pub to_time: Option<CaptureTime>,
    /// Why: a sentence.
    pub reason: String,
    /// Why, for scripts: kebab-case, see docs/api.md.
    pub reason_code: String,
    /// Whether it still grows: the resync that closes it is not complete.
    pub open: bool,
}

/// A named point.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct MarkPoint {
    /// Its name.
    pub label: String,
    /// The last write it includes.
    pub lsn: Lsn,
    /// When it was set.
    pub time: CaptureTime,
    /// Whether it can be gone back to; false for a mark that was set in a hole.
    pub recoverable: bool,
}

/// Points at which the guest had flushed: it counts on everything before them.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct FlushPoints {
    /// How many there are.
    pub count: u64,
    /// The newest.
    pub last: Option<Point>,
}

/// The `details` of an error of code `point-in-hole` or `point-not-found`.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct UnavailablePoint {
    /// The point as it was asked for.
    pub asked: String,
    /// The hole it lies in.
    pub hole: Option<Hole>,
    /// The nearest point before.
    pub before: Option<Point>,
    /// The nearest point after.
    pub after: Option<Point>,
}
