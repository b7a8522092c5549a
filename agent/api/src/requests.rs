//! Asking for a resync, for another size, for other limits, and for marks.

use backtide_units::{ByteCount, CaptureTime, DiskName, Lsn};
use serde::{Deserialize, Serialize};

use crate::DiskStatus;

/// Force a resync.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct ResyncRequest {
    /// How much is looked at.
    #[serde(default)]
    pub extent: ResyncExtent,
}

/// Change bounds of an attached disk; what is none stays as it is.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct LimitsChange {
    /// As in [`Limits`](crate::Limits).
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub resync_bytes_per_second_max: Option<ByteCount>,
    /// As in [`Limits`](crate::Limits).
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub resync_latency_us_max: Option<u32>,
}

/// How much a forced resync looks at.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum ResyncExtent {
    /// The blocks that are marked as changed.
    #[default]
    Changed,
    /// Every allocated block: hashes are compared, and only what differs is sent.
    Compare,
    /// Every allocated block is sent.
    Full,
}

/// Take over the size that the disk behind has grown to.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct ResizeRequest {
    /// The size it has to have; a raw or qcow2 file is made so long first. Left out: what the disk behind has.
    #[serde(default)]
    pub size: Option<ByteCount>,
    /// Whether NBD clients that have the disk open are hung up, for them to connect again.
    #[serde(default)]
    pub reconnect: bool,
}

/// Which disks may be detached.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct DetachRequest {
    /// Also one whose image lacks blocks, which are still at the receiver.
    #[serde(default)]
    pub incomplete: bool,
    /// Also one that NBD clients have open: they lose it, and requests of theirs that wait for the receiver fail.
    #[serde(default)]
    pub force: bool,
    /// Also one that NBD clients had open when its service was interrupted, of which none is there now: none comes back.
    #[serde(default)]
    pub nobody_returns: bool,
}

/// A disk with another size.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct ResizeReport {
    /// Its size before.
    pub size_before: ByteCount,
    /// NBD clients that were hung up.
    pub hung_up: u32,
    /// The disk now.
    pub disk: DiskStatus,
}

/// One name for the state of several disks at one instant.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct MarkRequest {
    /// The name, at most 256 bytes.
    pub label: String,
    /// At least one disk.
    pub disks: Vec<DiskName>,
    /// How long to wait for the receiver to have the mark durably, in milliseconds; 0: not at all.
    #[serde(default = "mark_wait_ms")]
    pub wait_ms: u32,
}

/// The longest that a mark can be waited for, in milliseconds.
pub const MARK_WAIT_MS_MAX: u32 = 30_000;

/// What is waited for a mark unless something else is asked for, in milliseconds. The guest does not wait.
pub const MARK_WAIT_MS: u32 = 5_000;

fn mark_wait_ms() -> u32 {
    MARK_WAIT_MS
}

/// Where a mark landed.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct MarkReport {
    /// The name.
    pub label: String,
    /// One per disk asked for, in that order.
    pub marks: Vec<DiskMark>,
}

/// A mark's place on one disk.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct DiskMark {
    /// The disk.
    pub disk: DiskName,
    /// The last write the mark includes.
    pub lsn: Lsn,
    /// When it was set.
    pub time: CaptureTime,
    /// Whether the receiver has it durably: nothing but retention takes it away any more.
    pub recoverable: bool,
    /// What stands between it and a point.
    pub state: MarkState,
}

/// What stands between a mark and a point.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum MarkState {
    /// Nothing: the receiver has it durably.
    Kept,
    /// The receiver is connected and has not acknowledged it in time. It is lost if the receiver does not
    /// take it before the retained window overflows.
    Unconfirmed,
    /// The receiver is away. It is lost if that lasts until the retained window overflows.
    Away,
    /// The receiver is there and takes nothing of the disk. It is lost if that lasts until the retained window overflows.
    Refused,
    /// A resync: it is a point when that is complete, and lost when that is interrupted or gives up what was forwarded meanwhile
    /// (`point_recoverable` of the disk's status).
    Resync,
    /// The disk gave it up with the writes around it before the receiver had acknowledged it, and sends it no more. It is a
    /// point only if the receiver took it before.
    Lost,
}
