//! Setting a disk back to a point, and disks that lack blocks of the point they were set to.

use backtide_units::{BLOCK_SIZE, BlockCount, ByteCount, CaptureTime, DiskId, DiskName, Lsn};
use serde::{Deserialize, Serialize};

use crate::{AckPolicy, Address, Adopted, DiskStatus, OnOutage};

/// Sets a disk back to an earlier point of its own history.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct RewindRequest {
    /// The point.
    pub to: Lsn,
    /// Whether NBD clients that have the disk open are hung up, for them to connect again to another content.
    /// Only a guest that is paused or shut down bears that.
    #[serde(default)]
    pub reconnect: bool,
    /// With `reconnect`: as many clients as whoever asks knows of. With more, counting those that had the disk open and may
    /// come back, it stays as it is. None: however many there are.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub clients_max: Option<u32>,
    /// Also to a point of which blocks are damaged at the receiver, and also a disk that lacks blocks of another point and
    /// is not in sync: what has not reached the receiver is given up.
    #[serde(default)]
    pub force: bool,
}

impl RewindRequest {
    /// How many clients may be hung up on; none for any number.
    pub fn hangs_up_on(&self) -> Option<u32> {
        if self.reconnect { self.clients_max } else { Some(0) }
    }
}

/// A disk that was set back.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct RewindReport {
    /// The point it was at before: a rewind to it undoes this one.
    pub from: Lsn,
    /// The point it is at now.
    pub to: Lsn,
    /// When the last change of that point was captured.
    pub to_time: CaptureTime,
    /// Blocks whose content may differ between the two: they are fetched.
    pub changed_blocks: BlockCount,
    /// The same in bytes.
    pub changed_bytes: ByteCount,
    /// For how long the disk was not served, in milliseconds.
    pub blocked_ms: u64,
    /// NBD clients that were hung up.
    pub hung_up: u32,
    /// Whether the disk had been set to this point before this was asked, lacks blocks of it still, and was not written to
    /// since: nothing was done.
    #[serde(default)]
    pub under_way: bool,
    /// The disk now.
    pub disk: DiskStatus,
}

/// A rewind of a disk.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Rewound {
    /// The point it was at before: a rewind to it undoes this one.
    pub from: Lsn,
    /// The point it was set to.
    pub to: Lsn,
    /// When the last change of that point was captured.
    pub to_time: CaptureTime,
}

impl RewindReport {
    /// Of the rewind to this point that the disk still lacks blocks of; none of any other, and none when the disk was
    /// written to since, or may have been, as one that does not answer may: then it is to be set to that point anew.
    pub fn under_way(disk: &DiskStatus, to: Lsn) -> Option<Self> {
        let found = disk.hydration.as_ref().filter(|_| disk.is_of_now());
        let found = found.filter(|found| found.kind == HydrationKind::Rewind && found.point == to)?;
        let before = found.before?;
        // Each change takes an LSN, and so does each pass. Those of earlier attaches are not among the passes counted, and a
        // crash leaves a gap: either counts as written to.
        let untouched = disk.lsn.last.0.checked_sub(before.0) == Some(disk.counters.passes);
        if !untouched || disk.counters.failed_changes > 0 {
            return None;
        }
        Some(Self {
            from: before,
            to,
            to_time: found.point_time,
            changed_blocks: BlockCount(found.total_bytes.0 / BLOCK_SIZE),
            changed_bytes: found.total_bytes,
            blocked_ms: 0,
            hung_up: 0,
            under_way: true,
            disk: disk.clone(),
        })
    }
}

/// Has a disk go on here again that another agent has had since, from its latest point and with the image it had.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct FailbackRequest {
    /// The disk as its receiver knows it now.
    pub adopt: Adopted,
    /// Where the receiver takes streams; none: where it did.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub receiver: Option<Address>,
    /// Whether nothing is done: the report says what would be.
    #[serde(default)]
    pub dry_run: bool,
    /// Also over an image that is not the one the disk had here: all of it is replaced.
    #[serde(default)]
    pub force: bool,
    /// When its guest is answered from now on; none: as when the disk was here.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub ack: Option<AckPolicy>,
    /// What that means while the receiver is away; none: as when the disk was here.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub on_outage: Option<OnOutage>,
}

/// A disk that goes on where it was before.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct FailbackReport {
    /// The point it goes on from: the latest of its history.
    pub point: Lsn,
    /// When the last change of that point was captured.
    pub point_time: CaptureTime,
    /// What is fetched: blocks that differ from what the image has, or may.
    pub fetched_bytes: ByteCount,
    /// What the image holds that stays.
    pub kept_bytes: ByteCount,
    /// At most so much was changed here that never reached the receiver: it is no part of the disk any more, and is
    /// overwritten.
    pub lost_bytes: ByteCount,
    /// Why nothing of the image is kept, if so: a sentence.
    #[serde(default)]
    pub everything_because: Option<String>,
    /// Whether it had come back before this was asked: nothing was done, and what was fetched then is told, or is still being.
    #[serde(default)]
    pub here_already: bool,
    /// The disk now; none after a dry run.
    #[serde(default)]
    pub disk: Option<DiskStatus>,
}

/// The point of another disk that a disk began as.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Origin {
    /// Where the receiver listens that keeps the other disk's history.
    pub receiver: String,
    /// The other disk's name then.
    pub disk: DiskName,
    /// Its identity.
    pub uuid: DiskId,
    /// The point.
    pub lsn: Lsn,
    /// When the last change of that point was captured.
    pub time: CaptureTime,
}

/// Why a disk lacks blocks.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum HydrationKind {
    /// It was set back to an earlier point of its own history.
    Rewind,
    /// It began as a point of another disk.
    Origin,
    /// It is the same disk on another host, or back on the first.
    Failover,
}

/// What a disk lacks, and how it comes. While there is one the image alone is no disk.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct HydrationStatus {
    /// Why.
    pub kind: HydrationKind,
    /// Where the receiver listens that has the missing blocks.
    pub receiver: String,
    /// The disk whose history has them.
    pub disk: DiskName,
    /// The point there.
    pub point: Lsn,
    /// When its last change was captured.
    pub point_time: CaptureTime,
    /// After a rewind: a rewind to this point undoes it.
    #[serde(default)]
    pub before: Option<Lsn>,
    /// What was missing at first.
    pub total_bytes: ByteCount,
    /// What is missing now.
    pub missing_bytes: ByteCount,
    /// What of it is damaged at the receiver: reads of it fail, and only writes make it whole.
    pub damaged_bytes: ByteCount,
    /// What was fetched since the disk was attached.
    pub fetched_bytes: ByteCount,
    /// Missing bytes that come a second, lately.
    pub rate: ByteCount,
    /// Seconds until nothing is missing, at that rate; none while nothing comes.
    #[serde(default)]
    pub eta_seconds: Option<u64>,
    /// What keeps blocks from coming, if anything does: a sentence.
    #[serde(default)]
    pub trouble: Option<String>,
    /// Whether what is missing does not come before a person has done something: the receiver has no such point, or all of it
    /// is damaged there.
    #[serde(default)]
    pub stuck: bool,
    /// Requests of guests that wait for missing blocks now. They wait as long as the receiver is away.
    #[serde(default)]
    pub waiting_requests: u64,
}
