//! Going back: points resolved, mounted and compared.

use backtide_units::{ByteCount, ByteOffset, CaptureTime, DiskName, Lsn};
use serde::{Deserialize, Serialize};

use crate::{DiskRef, Point};

/// Which point is that?
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct ResolveRequest {
    /// The point as people write it.
    pub point: String,
}

/// A point that can be gone back to.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct ResolvedPoint {
    /// The disk.
    pub disk: DiskRef,
    /// The point as it was asked for.
    pub asked: String,
    /// The last write it includes.
    pub lsn: Lsn,
    /// When that was captured.
    pub time: CaptureTime,
    /// What to know of what was asked for: the newest point of a disk whose log has lost its end is an older one, and a time
    /// is another moment than is meant where the clock of the disk's agent differs from the receiver's. A sentence.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub warning: Option<String>,
    /// It was asked for by a time later than what the receiver has heard of the disk, whose agent is not connected: when that
    /// comes, the same time may be another point, or in a hole. `warning` says so.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub unheard: bool,
}

/// Serve a point of a disk over NBD.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct MountRequest {
    /// The disk's name or UUID.
    pub name: DiskName,
    /// The point as people write it.
    pub at: String,
    /// Where to serve it: an NBD URI. None: on a unix socket of the receiver's choice.
    #[serde(default)]
    pub nbd: Option<String>,
    /// It ends by itself when its last client has gone, or when none comes within half a minute.
    #[serde(default)]
    pub temporary: bool,
    /// It can be written: what is written goes to an overlay of its own, which is kept until it is
    /// discarded. Not together with `temporary`.
    #[serde(default)]
    pub writable: bool,
    /// Another point as people write it: what changed between the two is told in the metadata context
    /// `qemu:dirty-bitmap:` and the disk's name. Not together with `writable`.
    #[serde(default)]
    pub changed_since: Option<String>,
}

/// Serve an overlay again that was kept.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct RemountRequest {
    /// Where to serve it: an NBD URI. None: on a unix socket of the receiver's choice.
    #[serde(default)]
    pub nbd: Option<String>,
}

/// What becomes of the overlay of a mount that ends.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum OverlayFate {
    /// It stays for another mount.
    Keep,
    /// It is removed for good.
    Discard,
}

/// How a mount ends; the query of its call.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct UnmountRequest {
    /// What becomes of its overlay; needed when it has one, refused when it has none.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub overlay: Option<OverlayFate>,
    /// Also while NBD clients have it open: what they ask for from then on is answered with `ESHUTDOWN`.
    #[serde(default)]
    pub force: bool,
}

/// A point that is served over NBD.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Mount {
    /// What it is unmounted by: `vm1-1`.
    pub id: String,
    /// The disk.
    pub disk: DiskRef,
    /// Where it is served.
    pub uri: String,
    /// The last write the point includes.
    pub lsn: Lsn,
    /// When that was captured.
    pub time: CaptureTime,
    /// The size served.
    pub size: ByteCount,
    /// Since when.
    pub mounted: CaptureTime,
    /// Open NBD connections.
    pub clients: u32,
    /// What was written to it, when it is writable.
    #[serde(default)]
    pub overlay: Option<MountOverlay>,
    /// The other point, when it was asked for what changed.
    #[serde(default)]
    pub changed_since: Option<ChangedSince>,
    /// As in [`ResolvedPoint::warning`], in the answer to the request that made it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub warning: Option<String>,
}

/// What tells the changes between a mount's point and another one.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct ChangedSince {
    /// The last write the other point includes.
    pub lsn: Lsn,
    /// When that was captured.
    pub time: CaptureTime,
    /// The NBD metadata context.
    pub context: String,
    /// As in [`ResolvedPoint::warning`], in the answer to the request that made the mount.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub warning: Option<String>,
}

/// What the overlay of a mount takes.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct MountOverlay {
    /// Bytes of blocks that were written, and not zeroed or discarded since.
    pub bytes: ByteCount,
    /// The most it may hold; a client that writes more is told that there is no space.
    pub limit: ByteCount,
    /// What its files take in the store, at most.
    pub file_bytes: ByteCount,
}

/// An overlay that is not served.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct KeptOverlay {
    /// What it is mounted or discarded by: the id of its mount.
    pub id: String,
    /// The disk, with the size that is served; none when its record is damaged, and so for what follows.
    pub disk: Option<DiskRef>,
    /// The last write the point below includes.
    pub lsn: Option<Lsn>,
    /// When that was captured.
    pub time: Option<CaptureTime>,
    /// When the overlay was made.
    pub created: Option<CaptureTime>,
    /// What its files take in the store, at most.
    pub file_bytes: ByteCount,
    /// What is wrong with it, or why it is not served although it should be: a sentence.
    pub problem: Option<String>,
}

/// All mounts of a receiver.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Mounts {
    /// Sorted by id.
    pub mounts: Vec<Mount>,
    /// Overlays that are not served, sorted by id.
    #[serde(default)]
    pub kept: Vec<KeptOverlay>,
}

/// When did a block last change?
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct FindChangeRequest {
    /// A byte of the block.
    pub offset: ByteOffset,
    /// Changes up to this point count; as people write it.
    pub at: String,
}

/// The newest change of a block.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct FoundChange {
    /// The point up to which changes were looked for.
    pub at: ResolvedPoint,
    /// The block that was looked at.
    pub block: ByteSpan,
    /// The change; none when the block was never written up to that point.
    pub change: Option<BlockChange>,
}

/// A change of a block.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct BlockChange {
    /// The first point that has it.
    pub lsn: Lsn,
    /// When it was captured.
    pub time: CaptureTime,
    /// What brought it.
    pub by: ChangedBy,
    /// The last point without it; none when there is none.
    pub before: Option<Point>,
}

/// What brought a change to the receiver.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum ChangedBy {
    /// The guest's write, zeroing or discard itself.
    Write,
    /// A resync: the block was written between the point before and this one, or was only sent again.
    Resync,
}

/// Which bytes changed between two points?
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct DiffRequest {
    /// The one point as people write it.
    pub from: String,
    /// The other; either may be the older one.
    pub to: String,
}

/// What changed between two points.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct DiffReport {
    /// The one point.
    pub from: ResolvedPoint,
    /// The other.
    pub to: ResolvedPoint,
    /// Spans are multiples of this many bytes, but for the disk's end. All changes are in the
    /// spans; bytes in them may be unchanged.
    pub granularity: ByteCount,
    /// Bytes in the spans.
    pub bytes: ByteCount,
    /// Where, ascending; neighbors are one span.
    pub ranges: Vec<ByteSpan>,
}

/// Bytes of a disk.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub struct ByteSpan {
    /// The first one.
    pub offset: ByteOffset,
    /// How many.
    pub length: ByteCount,
}
