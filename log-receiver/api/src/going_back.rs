//! Going back: points resolved, mounted and compared.

use backtide_units::{ByteCount, ByteOffset, CaptureTime, DiskName, Lsn};
use serde::{Deserialize, Serialize};

use crate::DiskRef;

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
}

/// Serve a point of a disk over NBD, read-only.
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
}

/// All mounts of a receiver.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Mounts {
    /// Sorted by id.
    pub mounts: Vec<Mount>,
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
