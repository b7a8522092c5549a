//! What the receiver keeps, and whether it is well.

use backtide_control::Address;
use backtide_units::{ByteCount, CaptureTime, DiskId, DiskName, Epoch, HistoryId, Lsn};
use serde::{Deserialize, Serialize};

use crate::{ScrubStatus, Touched};

/// The receiver as a whole.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct ReceiverStatus {
    /// The receiver's version.
    pub version: String,
    /// Its clock when it answered.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub now: Option<CaptureTime>,
    /// The store's directory.
    pub store: String,
    /// The store's identity.
    pub store_id: String,
    /// Where streams are taken, with real ports.
    pub listen: Vec<Address>,
    /// The NBD URI at which every mount is served by its id, if there is one.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub nbd_listen: Option<String>,
    /// The certificate that streams under TLS are shown, when there are such.
    #[serde(default)]
    pub certificate: Option<CertificateStatus>,
    /// What a person should see to of all certificates that are in use, of streams and NBD sockets: those that end soon, and
    /// files that cannot be used. Sentences.
    #[serde(default)]
    pub certificate_warnings: Vec<String>,
    /// Bytes of all disks' logs.
    pub log_bytes: ByteCount,
    /// Why the store cannot be looked at, when it is not where it was: `free_bytes` tells nothing then.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub store_error: Option<String>,
    /// Bytes the store's file system has left.
    pub free_bytes: ByteCount,
    /// New data is refused when less than this is left.
    pub free_bytes_min: ByteCount,
    /// How the store filled in the last hour; none when it was not open for a minute.
    #[serde(default)]
    pub growth: Option<StoreGrowth>,
    /// How many disks it keeps.
    pub disks: u64,
    /// How many of them are connected.
    pub connected: u64,
    /// Open mounts.
    pub mounts: u64,
    /// Overlays of writable mounts, mounted or kept.
    #[serde(default)]
    pub overlays: u64,
    /// Bytes that their files take, at most.
    #[serde(default)]
    pub overlay_bytes: ByteCount,
    /// What making received data durable took since the receiver started.
    #[serde(default)]
    pub commits: CommitCounts,
    /// What a person should look at now: sentences. Empty when all is well.
    #[serde(default)]
    pub alarms: Vec<String>,
    /// The scrub that runs, or the last one in this store.
    #[serde(default)]
    pub scrub: Option<ScrubStatus>,
    /// The next scrub that begins by itself; none when none does, or one of everything runs.
    #[serde(default)]
    pub scrub_next: Option<ScrubNext>,
}

/// A scrub that is to begin by itself.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct ScrubNext {
    /// When it is due, or was.
    pub at: CaptureTime,
    /// Why one that is due has not begun: a sentence. None when it is not due.
    pub waits: Option<String>,
}

/// How often received data was made durable, and what that took.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct CommitCounts {
    /// Disks that were made durable, each as often as it was.
    pub disks: u64,
    /// Flushes of the device for that: disks that wait at once share one.
    pub flushes: u64,
}

/// A certificate that a daemon shows.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct CertificateStatus {
    /// Whose it is.
    pub subject: String,
    /// The hosts it is for.
    pub names: Vec<String>,
    /// Until when it is valid.
    pub not_after: CaptureTime,
    /// The folder it is in.
    pub folder: String,
    /// What a person should see to: it ends soon, or its files have changed and cannot be used. Sentences.
    #[serde(default)]
    pub warnings: Vec<String>,
}

/// The disks of a receiver.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct ReceiverDisks {
    /// Sorted by name.
    pub disks: Vec<ReceiverDisk>,
}

/// One disk as its receiver knows it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct ReceiverDisk {
    /// Its name.
    pub name: DiskName,
    /// Its identity.
    pub uuid: DiskId,
    /// Its size.
    pub size: ByteCount,
    /// Its history here.
    pub history: HistoryId,
    /// The highest epoch seen.
    pub epoch: Epoch,
    /// Whether its agent is connected.
    pub connected: bool,
    /// Whether a resync pass is unfinished.
    pub in_pass: bool,
    /// Everything up to here is in memory.
    pub received: Lsn,
    /// Everything up to here is on disk.
    pub durable: Lsn,
    /// When the last record was captured; none before the first.
    pub last_time: Option<CaptureTime>,
    /// How the clock of the disk's times differs from the receiver's, when that shows: a sentence.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub clock: Option<String>,
    /// When its guest was answered by the last agent that said so, as `attach --ack` has it; none when nobody did.
    #[serde(default)]
    pub ack: Option<String>,
    /// What that means while the receiver is away, as `attach --on-outage` has it; none when nobody said `ack`.
    #[serde(default)]
    pub on_outage: Option<String>,
    /// The point of another disk that it began as; none when it did not.
    #[serde(default)]
    pub origin: Option<DiskOrigin>,
    /// Bytes of its log.
    pub log_bytes: ByteCount,
    /// Files of its log.
    pub segments: u64,
    /// What is wrong with its store, when something is: a sentence.
    pub error: Option<String>,
    /// What is damaged of it, in the log in use and in those before it: a sentence each, with file
    /// and place.
    #[serde(default)]
    pub damage: Vec<String>,
    /// Which points that touches, as far as it was looked for.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub touched: Vec<Touched>,
}

/// The point of another disk that a disk began as. While it lacks blocks of it, that disk's receiver holds the point.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct DiskOrigin {
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

/// A disk that its receiver keeps no longer.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct ForgottenDisk {
    /// The name it had.
    pub name: DiskName,
    /// Its identity.
    pub uuid: DiskId,
    /// Bytes of its log.
    pub log_bytes: ByteCount,
    /// Its overlays, which went too.
    pub overlays: Vec<String>,
}

/// What was said of a disk's store in the past, and is told no more.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Dismissed {
    /// The disk.
    pub uuid: DiskId,
    /// Sentences, without the disk's name: what the store had less of than had been acknowledged.
    pub shortfalls: Vec<String>,
}

/// How the store's file system filled lately, and what that comes to.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct StoreGrowth {
    /// Bytes a second; 0 when what is free did not become less.
    pub bytes_per_second: ByteCount,
    /// In so many seconds.
    pub over_seconds: u64,
    /// New data is refused after so many seconds, if that goes on; none when it does not grow.
    pub full_in_seconds: Option<u64>,
}
