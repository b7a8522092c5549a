//! What a disk is doing, and why.

use backtide_control::Address;
use backtide_units::{
    BlockCount, ByteCount, ByteOffset, CaptureTime, DiskId, DiskName, Epoch, HistoryId, Lsn,
};
use serde::{Deserialize, Serialize};

use crate::{AckPolicy, CacheMode, HydrationStatus, Limits, OnOutage, Origin, Rewound};

/// The answer to a status call, and what `backtide status --json` prints.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct AgentStatus {
    /// The agent's version.
    pub version: String,
    /// Its clock when it answered.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub now: Option<CaptureTime>,
    /// Another one after every start and restart of the agent.
    #[serde(default)]
    pub instance: String,
    /// Why the last restart that was asked for came to nothing, if it did.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub restart_failure: Option<String>,
    /// The NBD URI at which every disk is served by its name, if there is one.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub nbd_listen: Option<String>,
    /// What a person should see to of all certificates that are in use, of streams, NBD sockets and the servers of NBD disks:
    /// those that end soon, and files that cannot be used. Sentences.
    #[serde(default)]
    pub certificate_warnings: Vec<String>,
    /// The disks, sorted by name.
    pub disks: Vec<DiskStatus>,
}

/// How a disk is protected at this moment.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Mode {
    /// Every write is forwarded or retained, in order. Any LSN is a recovery point.
    Sync,
    /// Changes the receiver misses are being delivered.
    Resync,
    /// Changed blocks are marked; nothing is forwarded.
    Tracking,
    /// Tracking, because a person asked for it.
    Paused,
    /// Not served any more; the bitmap is saved.
    Detached,
}

/// One disk.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct DiskStatus {
    /// Its name.
    pub name: DiskName,
    /// Its identity.
    pub uuid: DiskId,
    /// How it is protected.
    pub mode: Mode,
    /// Why it is in this mode: a sentence.
    pub reason: String,
    /// Why, for scripts: kebab-case, see docs/api.md.
    pub reason_code: String,
    /// Whether the stream to the receiver is established.
    pub connected: bool,
    /// Where the receiver takes streams.
    pub receiver: Address,
    /// Why the last connection failed or ended, if it did.
    pub last_error: Option<PeerError>,
    /// TLS of the stream; none where it is in the clear.
    #[serde(default)]
    pub stream_tls: Option<StreamTlsStatus>,
    /// Where the guest's QEMU finds the disk.
    pub nbd_uri: String,
    /// The disk behind: path or NBD URI.
    pub image: String,
    /// What keeps the disk behind from being used at this moment, if anything is known to.
    #[serde(default)]
    pub local_error: Option<String>,
    /// Whether a QEMU has the image itself open, to write it: nothing is forwarded or resynchronized until it lets go. Told as
    /// `local_error` too, where that is nothing else.
    #[serde(default)]
    pub open_elsewhere: bool,
    /// Why what the agent is to remember of the disk is not saved; it is tried again. Told as `local_error` too, where
    /// that is nothing else.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub unsaved: Option<String>,
    /// Why no activity log is kept, although one should be: a crash of the agent means a compare of everything, until a new
    /// one is begun. Told as `local_error` too where writes fail by it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub untracked: Option<String>,
    /// The disk's size.
    pub size: ByteCount,
    /// How often it was attached.
    pub epoch: Epoch,
    /// Its history at the receiver; none before the first contact.
    pub history: Option<HistoryId>,
    /// How far its writes got.
    pub lsn: LsnStatus,
    /// How far the receiver is behind.
    pub lag: Lag,
    /// What is marked as changed and neither forwarded nor retained.
    pub dirty: Dirty,
    /// What is retained until it is durable at the receiver.
    pub window: Window,
    /// What of it lies on disk; none when the agent has no place for spills.
    #[serde(default)]
    pub spill: Option<Spill>,
    /// The pass that is running.
    pub resync: Option<ResyncStatus>,
    /// Whether a pass over the whole disk is to begin: a forced one, or the first protection. Its
    /// blocks are being found, or it waits for the receiver.
    pub resync_due: bool,
    /// Blocks that the last pass could not read from the local disk.
    pub unreadable: Option<Unreadable>,
    /// What the image lacks of the disk; none where nothing is missing.
    #[serde(default)]
    pub hydration: Option<HydrationStatus>,
    /// The last time it was set back on this host, also when nothing is missing any more: whoever has lost the answer
    /// finds here what undoes it. None when it never was, or nothing differed.
    #[serde(default)]
    pub rewound: Option<Rewound>,
    /// The point of another disk that this one began as.
    #[serde(default)]
    pub origin: Option<Origin>,
    /// When the guest is acknowledged.
    pub ack: AckPolicy,
    /// What that means while the receiver is away.
    pub on_outage: OnOutage,
    /// Bounds in force.
    pub limits: Limits,
    /// What has happened since the disk was attached.
    pub counters: Counters,
    /// How local I/O is done that may wait for a device: `io_uring`, `pread` (a pool of threads) or `nbd`.
    pub engine: String,
    /// Why it is `pread`, where it is.
    #[serde(default)]
    pub engine_reason: Option<String>,
    /// Whether the image is read and written through the page cache.
    #[serde(default)]
    pub cache: CacheMode,
    /// Open NBD connections.
    pub clients: u32,
    /// Clients that had the disk open when its service was interrupted, and have not come back: a virtual machine
    /// connects again with its next request only. A process counts for one.
    #[serde(default)]
    pub awaited_clients: u32,
    /// Requests of theirs that have waited for the receiver for over a second; none where none has. In the answer
    /// to a detach: those that were given up.
    #[serde(default)]
    pub guest_waits: Option<GuestWaits>,
}

impl DiskStatus {
    /// Whether this is how the disk is now. Of one that stands still, or is being let go of, the agent shows how it was when it
    /// answered last, which may be days ago: that proves nothing.
    pub fn is_of_now(&self) -> bool {
        !matches!(self.reason_code.as_str(), "not-answering" | "detaching")
    }
}

/// Requests that are answered only when the receiver has what they changed.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
pub struct GuestWaits {
    /// How many.
    pub requests: u64,
    /// For how long, the first of them.
    pub seconds: f64,
}

/// Why a connection to the receiver failed or ended.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct PeerError {
    /// For scripts: the stream's close code (`fenced`, `version`, `invalid`, `store`, `busy`,
    /// `refused`, `denied`), `unreachable`, `tls` when one side does not accept the other's certificate,
    /// or `lost` for a stream that broke.
    pub code: String,
    /// A sentence; the receiver's own words when it gave some.
    pub message: String,
    /// When.
    pub time: CaptureTime,
}

/// Certificates of a stream under TLS, as its agent knows them.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct StreamTlsStatus {
    /// Whose certificate the agent shows; none when it cannot be read.
    pub subject: Option<String>,
    /// Until when that is valid.
    pub not_after: Option<CaptureTime>,
    /// Whose certificate the receiver has shown; none before the first connection.
    pub receiver: Option<String>,
    /// Until when that is valid.
    pub receiver_not_after: Option<CaptureTime>,
    /// What a person should see to: certificates that end soon or cannot be used. Sentences.
    #[serde(default)]
    pub warnings: Vec<String>,
}

/// How far a disk's writes got.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct LsnStatus {
    /// The last one given to a write.
    pub last: Lsn,
    /// The receiver has everything up to here in memory, as far as it has it at all.
    pub received: Lsn,
    /// The receiver has everything up to here on its disk, as far as it has it at all.
    pub durable: Lsn,
}

/// How far the receiver's durable state is behind the guest: what would be lost now (RPO).
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Lag {
    /// Writes.
    pub records: u64,
    /// Their bytes; while blocks are dirty, at least those blocks' bytes.
    pub bytes: ByteCount,
    /// The age of the oldest write that is not durable there; 0 when nothing is missing.
    pub seconds: f64,
}

/// Blocks that are marked as changed (active and passive together).
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Dirty {
    /// Blocks of 4 KiB.
    pub blocks: BlockCount,
    /// Their bytes.
    pub bytes: ByteCount,
    /// Extents that would be compared after a crash beside them; none without an activity log:
    /// the whole disk would be.
    pub hot_extents: Option<u64>,
}

/// What cannot be read of the local disk. It is tried again; until then no point can be given.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Unreadable {
    /// Blocks of 4 KiB.
    pub blocks: BlockCount,
    /// Where the first of them begin, in bytes.
    pub offset: ByteOffset,
    /// How many bytes follow one another there.
    pub length: ByteCount,
}

/// The retained window.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Window {
    /// Bytes in it.
    pub bytes: ByteCount,
    /// The most it holds.
    pub limit: ByteCount,
}

/// The part of the retained window that is in files.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Spill {
    /// What the files take.
    pub bytes: ByteCount,
    /// The most they take.
    pub limit: ByteCount,
    /// Writes in them that the receiver has not got durably.
    pub records: u64,
    /// Whether there was no room for what came last.
    pub full: bool,
    /// Why it cannot be used at this moment.
    pub error: Option<String>,
}

/// What happens to writes while a pass runs.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum PassKind {
    /// They are forwarded as records: the disk is in sync when the pass ends.
    Forwarding,
    /// They are marked for the next pass: the link cannot carry them.
    Coalescing,
}

/// A resync pass.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct ResyncStatus {
    /// Which pass of this resync: 1 is the first.
    pub pass: u32,
    /// The resync point T: blocks are delivered as they were at this LSN.
    pub at: Lsn,
    /// What happens to writes meanwhile.
    pub kind: PassKind,
    /// Whether hashes are compared, so that only what differs is sent.
    pub compare: bool,
    /// Whether the pass had to give up its T version of some block: it moves data but gives no
    /// point at T.
    pub forfeited: bool,
    /// Bytes looked at so far.
    pub done_bytes: ByteCount,
    /// Bytes to look at in this pass.
    pub total_bytes: ByteCount,
    /// Bytes per second, lately.
    pub rate: ByteCount,
    /// Until this pass ends, when that can be told.
    pub eta_seconds: Option<u64>,
    /// Bytes per second of the guest's that have to be sent beside, lately: every write of a forwarding
    /// pass, and blocks that were not dirty before otherwise.
    #[serde(default)]
    pub guest_rate: ByteCount,
    /// Until the disk is in sync, when that can be told: passes that gather writes are followed by
    /// others, and never catch up with a guest that is faster.
    #[serde(default)]
    pub sync_eta_seconds: Option<u64>,
    /// What its reads are held back to, in bytes per second, for the sake of the guest or by the limit.
    #[serde(default)]
    pub held_to: Option<ByteCount>,
    /// Why the resync began: a sentence.
    pub reason: String,
    /// Why, for scripts.
    pub reason_code: String,
    /// Whether T will be a recovery point when the pass ends.
    pub point_recoverable: bool,
}

/// What has happened since the disk was attached.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct Counters {
    /// Guest writes completed.
    pub writes: u64,
    /// Their bytes.
    pub write_bytes: ByteCount,
    /// Guest trims and write-zeroes completed.
    pub zeroes: u64,
    /// Guest reads completed.
    pub reads: u64,
    /// Their bytes.
    pub read_bytes: ByteCount,
    /// Guest flushes completed.
    pub flushes: u64,
    /// Guest requests answered with an error.
    pub errors: u64,
    /// The longest a guest request was delayed for the receiver's sake, as measured, in microseconds.
    pub guest_delay_max_us: u64,
    /// The longest that a request whose delay was over had to wait until the disk's thread saw to it, in
    /// microseconds; contained in `guest_delay_max_us`.
    pub guest_delay_late_max_us: u64,
    /// Record bytes sent to the receiver.
    pub sent_bytes: ByteCount,
    /// Pass bytes sent to the receiver.
    pub resync_sent_bytes: ByteCount,
    /// Streams established.
    pub connects: u64,
    /// Streams lost.
    pub disconnects: u64,
    /// Times the retained window overflowed.
    pub window_overflows: u64,
    /// Bytes written to the spill.
    pub spilled_bytes: ByteCount,
    /// Bytes read back from it.
    pub unspilled_bytes: ByteCount,
    /// Passes begun.
    pub passes: u64,
    /// Passes that gave up their point.
    pub passes_forfeited: u64,
    /// Blocks read ahead of a guest write for a pass.
    pub copies_before_write: u64,
    /// Passes given up because the stream was lost.
    pub passes_aborted: u64,
    /// Pass bytes that were compared and found equal.
    pub resync_equal_bytes: ByteCount,
    /// Local reads for passes that failed, each try counted.
    pub failed_reads: u64,
    /// Guest changes that the local disk refused.
    pub failed_changes: u64,
    /// Guest requests answered with less than the acknowledgement policy promises.
    pub degraded_answers: u64,
    /// Guest requests that were delayed because the retained window filled up.
    pub delayed_answers: u64,
    /// How long the disk's thread has looked in vain for the guest's next request, instead of having slept, in
    /// microseconds.
    #[serde(default)]
    pub polled_us: u64,
    /// Reads for passes and verifies given up because the guest had waited its time for them.
    pub reads_gave_way: u64,
    /// Guest changes that waited for the activity log.
    pub cold_changes: u64,
    /// Snapshots of the tracking.
    pub snapshots: u64,
    /// Changes of mode.
    pub transitions: u64,
}
