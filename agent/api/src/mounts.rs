//! Points of disks that an agent serves: read from a log receiver, kept in a cache on this host.

use backtide_control::Address;
use backtide_units::{ByteCount, CaptureTime, DiskId, DiskName, Lsn};
use serde::{Deserialize, Serialize};

use crate::StreamTls;

/// A point to serve on the agent's host.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct AgentMountRequest {
    /// The disk's UUID at the receiver.
    pub disk: DiskId,
    /// The point.
    pub lsn: Lsn,
    /// Where the receiver takes streams. None: where the disk of this UUID that the agent knows has its receiver.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub receiver: Option<Address>,
    /// TLS of a `tls://` receiver. None: as the disk has it, or the agent's configuration.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub stream_tls: Option<StreamTls>,
    /// Tell in a metadata context which blocks changed since this point.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub changed_since: Option<Lsn>,
    /// The NBD listen URI. None: a unix socket of the agent's choice.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub nbd: Option<String>,
    /// The most that is kept here of what was read. None: 1 GiB.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub cache_bytes: Option<ByteCount>,
    /// It can be written: what is written goes to an overlay of its own on the agent's host, which is kept until it is
    /// discarded. Not together with `changed_since`.
    #[serde(default, skip_serializing_if = "is_false")]
    pub writable: bool,
}

fn is_false(value: &bool) -> bool {
    !value
}

/// Serve an overlay of the agent again that was kept.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct AgentRemountRequest {
    /// The NBD listen URI. None: a unix socket of the agent's choice.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub nbd: Option<String>,
}

/// What becomes of the overlay of an agent's mount that ends.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum AgentOverlayFate {
    /// It stays for another mount.
    Keep,
    /// It is removed for good.
    Discard,
}

/// How an agent's mount ends; the query of its call.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct AgentUnmountRequest {
    /// What becomes of its overlay; needed when it has one, refused when it has none.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub overlay: Option<AgentOverlayFate>,
    /// Also while NBD clients have it open: what they ask for from then on is answered with `ESHUTDOWN`.
    #[serde(default)]
    pub force: bool,
}

/// A point that an agent serves.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct AgentMount {
    /// What it is called here.
    pub id: String,
    /// The disk's name when it was mounted.
    pub disk: DiskName,
    /// The disk.
    pub uuid: DiskId,
    /// Where the point is read.
    pub receiver: String,
    /// For NBD clients.
    pub uri: String,
    /// The point.
    pub lsn: Lsn,
    /// When its last change was captured.
    pub time: CaptureTime,
    /// The disk's size at the point.
    pub size: ByteCount,
    /// When it was mounted.
    pub mounted: CaptureTime,
    /// Clients that have it open.
    pub clients: u32,
    /// With `changed_since`: since when, and in which metadata context it is told.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub changed_since: Option<AgentChangedSince>,
    /// What is kept here of what was read.
    pub cache: AgentCache,
    /// What was written to it, when it is writable and served.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub overlay: Option<AgentOverlay>,
    /// Why the receiver could not be read the last time, while that is so; what is wrong with its overlay; or why it is not
    /// served.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub last_error: Option<String>,
}

/// What a mount tells of changes.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct AgentChangedSince {
    /// Since this point.
    pub lsn: Lsn,
    /// The metadata context.
    pub context: String,
}

/// The cache of a mount.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct AgentCache {
    /// What it holds.
    pub bytes: ByteCount,
    /// What it holds at most.
    pub limit: ByteCount,
    /// What came from the receiver since the mount or the agent's start.
    pub fetched: ByteCount,
}

/// What the overlay of an agent's mount takes.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct AgentOverlay {
    /// Bytes of blocks that were written, and not zeroed or discarded since.
    pub bytes: ByteCount,
    /// The most it may hold; a client that writes more is told that there is no space.
    pub limit: ByteCount,
    /// What its files take in the agent's state directory, at most.
    pub file_bytes: ByteCount,
}

/// An overlay of an agent that is not served.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct AgentKeptOverlay {
    /// What it is mounted or discarded by: the id of its mount.
    pub id: String,
    /// The disk's name when it was mounted.
    pub disk: DiskName,
    /// The disk.
    pub uuid: DiskId,
    /// Where the point below is read.
    pub receiver: String,
    /// The point below.
    pub lsn: Lsn,
    /// When its last change was captured.
    pub time: CaptureTime,
    /// The disk's size at the point.
    pub size: ByteCount,
    /// When it was mounted first.
    pub created: CaptureTime,
    /// What its files take in the agent's state directory, at most.
    pub file_bytes: ByteCount,
    /// What is wrong with it: a sentence.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub problem: Option<String>,
}

/// What an agent serves.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct AgentMounts {
    /// By id.
    pub mounts: Vec<AgentMount>,
    /// Overlays that are not served, by id.
    #[serde(default)]
    pub kept: Vec<AgentKeptOverlay>,
}
