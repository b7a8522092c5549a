//! How long history is kept: what is promised of each disk, what is there, and what another ladder would change.

use backtide_units::{ByteCount, CaptureTime, DiskName, Lsn};
use serde::{Deserialize, Serialize};

use crate::{DiskRef, MarkPoint, Point};

/// Retention of the receiver and its disks.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct RetentionReport {
    /// The ladder of disks that have none of their own.
    pub default: String,
    /// What a store does that is nearly full: `refuse` or `shrink`.
    pub on_full: String,
    /// The store is nearly full: a sentence.
    pub low: Option<String>,
    /// Why room cannot be given back, or why nothing goes.
    pub error: Option<String>,
    /// Bytes of the files with the images of all disks.
    pub image_bytes: ByteCount,
    /// Bytes that retention has given back since the receiver started.
    pub freed_bytes: ByteCount,
    /// How often it has looked since then.
    pub rounds: u64,
    /// The disks, by name.
    pub disks: Vec<DiskRetention>,
}

/// Retention of one disk.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct DiskRetention {
    /// The disk.
    pub disk: DiskRef,
    /// The ladder that counts.
    pub ladder: String,
    /// Whether it is the disk's own, and not the default.
    pub own: bool,
    /// The oldest point that is left.
    pub oldest: Option<Point>,
    /// From this point on everything is kept, but for holes.
    pub every_point_from: Option<Point>,
    /// Single points before that, each an image, oldest first.
    pub single_points: Vec<Point>,
    /// Points that somebody wants kept whatever the ladder says.
    pub keep: Vec<Point>,
    /// Points that nobody can let go before a time.
    #[serde(default)]
    pub locks: Vec<Lock>,
    /// Points that agents need: for disks whose content is still fetched from there.
    #[serde(default)]
    pub held: Vec<HeldPoint>,
    /// Bytes of the log.
    pub log_bytes: ByteCount,
    /// How often its oldest history went before its time because the store was nearly full, since the receiver
    /// started.
    pub shrunk: u64,
    /// Why its history could not be thinned the last time.
    pub error: Option<String>,
}

/// A point that stays until the agent that needs it says that it does not, or a person releases it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct HeldPoint {
    /// Who needs it.
    pub owner: String,
    /// The point.
    pub lsn: Lsn,
    /// When it was captured.
    pub time: CaptureTime,
}

/// Give a disk another ladder.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct RetentionRequest {
    /// The ladder, such as `any=24h hourly=7d`, or `forever`. None: the receiver's default. In a preview none is the one
    /// that counts now.
    #[serde(default)]
    pub ladder: Option<String>,
}

/// Keep a point, or do so no longer.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct KeepRequest {
    /// The disk's name or UUID.
    pub name: DiskName,
    /// The point.
    pub at: String,
    /// Keep it no longer; what agents hold stays held.
    #[serde(default)]
    pub release: bool,
    /// With `release`: the hold of this owner instead, for an agent that never comes back.
    #[serde(default)]
    pub held: Option<String>,
}

/// Lock a point, or every point of a disk, until a time: until then nobody can let it go.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct LockRequest {
    /// The disk's name or UUID.
    pub name: DiskName,
    /// The point. None: every point, those that are there and those that come.
    #[serde(default)]
    pub at: Option<String>,
    /// An RFC 3339 time, or a duration from now on, such as `30d`.
    pub until: String,
}

/// A lock that holds.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Lock {
    /// The point; none is every point.
    pub point: Option<Point>,
    /// The time that was asked for.
    pub until: CaptureTime,
    /// When it ends if the receiver runs until then: later than asked when the receiver did not run for a while, or its
    /// machine's clock went ahead.
    pub ends: CaptureTime,
}

/// What a ladder would do to a disk now.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct RetentionPreview {
    /// The disk.
    pub disk: DiskRef,
    /// The ladder.
    pub ladder: String,
    /// From this point on everything is kept.
    pub every_point_from: Option<Point>,
    /// Single points before that, oldest first.
    pub keep: Vec<Point>,
    /// Single points of now that go.
    pub drop: Vec<Point>,
    /// Marks whose points go, the newest of each label.
    #[serde(default)]
    pub drop_marks: Vec<MarkPoint>,
    /// Every point is locked: nothing goes before then, whatever the ladder says.
    #[serde(default)]
    pub locked_until: Option<CaptureTime>,
    /// Bytes of the log that go. The images of the points that are kept take a part of that, or more.
    pub log_bytes_freed: ByteCount,
    /// About how much the receiver reads to make the images of the points that are kept, at its own pace.
    #[serde(default)]
    pub fold_read_bytes: ByteCount,
    /// The images take no more than about this; less where content compresses or is stored already.
    #[serde(default)]
    pub fold_write_bytes_max: ByteCount,
    /// Whether it would change anything now.
    pub changes: bool,
    /// What of the logs that have ended is away: a sentence. Points there are in none of the lists, and what the ladder would do
    /// with them shows when they are there again.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub away: Option<String>,
}
