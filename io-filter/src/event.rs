//! What goes into the filter and what comes out.

use std::time::Duration;

use backtide_protocol::Message;
use backtide_spill::{Place, Slot};
use backtide_tracking::{ActivityLimits, DirtyBitmap, LogRecord, SavedTracking, Snapshot};
use backtide_units::{
    ByteCount, ByteRange, CaptureTime, DiskId, DiskName, Epoch, HistoryId, LogPosition, Lsn, Reason,
};
use bytes::Bytes;
use serde::{Deserialize, Serialize};
use uuid::Uuid;

use crate::{filter::Mode, prepared::Prepared};

/// A moment, by both clocks.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Now {
    /// Since some fixed moment; never goes back. All delays are measured by it.
    pub monotonic: Duration,
    /// What records are stamped with.
    pub wall: CaptureTime,
}

/// The driver's name for a guest request; unique among those in flight.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct RequestId(pub u64);

/// The filter's name for a local I/O; unique.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct IoId(pub u64);

/// A guest request that concerns the filter. Reads do not: the driver serves them directly.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Change {
    /// Write these bytes; `fua`: on stable storage before the answer.
    Write {
        /// Where.
        range: ByteRange,
        /// What; as long as the range.
        data: Bytes,
        /// Force unit access.
        fua: bool,
    },
    /// Make the range read as zeroes. `trim`: the space may be given back.
    Zero {
        /// Where.
        range: ByteRange,
        /// Whether the space may be given back.
        trim: bool,
        /// Force unit access.
        fua: bool,
    },
    /// Everything completed before goes to stable storage.
    Flush,
}

/// Something the driver does on the local disk, answered by [`crate::Filter::local_done`].
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum LocalOp {
    /// Carry out a guest's change.
    Change(Change),
    /// Read a range of at most 1 MiB for the resync.
    Read(ByteRange),
    /// Everything completed before goes to stable storage, for the filter's own sake.
    Settle,
}

/// Something the driver does to the disk's tracking file, durably, answered by
/// [`crate::Filter::tracking_done`]. At most one of each kind is under way.
#[derive(Clone, Debug, PartialEq)]
pub enum TrackingOp {
    /// Append to the activity log. Guest changes wait for it.
    Record(LogRecord),
    /// Put a snapshot in the place of the older one.
    Snapshot(Box<Snapshot>),
    /// Remove the file: it cannot be written and must not be believed.
    Discard,
    /// Put a new file with this snapshot in place, where the last one was removed. What comes later is written to
    /// it; the last one is written no more.
    Begin(Box<Snapshot>),
}

/// Something the driver does to the disk's spill, answered by [`crate::Filter::spill_done`]. At most one
/// read is under way, and one of the others.
#[derive(Clone, Debug, PartialEq)]
pub enum SpillOp {
    /// Make these frames durable in their slot.
    Append(Slot, Vec<Message>),
    /// Read the frames of a place back.
    Read(Place),
    /// Remove these files, durably.
    Remove(Vec<u64>),
}

/// How an operation of the spill ended.
#[derive(Clone, Debug, PartialEq)]
pub enum SpillDone {
    /// An append or a removal is durable.
    Durable,
    /// What was read, from the beginning of the place on; with the reason when it is not all of it.
    Read(Vec<Message>, Option<String>),
    /// An append or a removal failed, for this reason.
    Failed(String),
}

/// What a local I/O brought.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum LocalData {
    /// A change is done.
    Changed,
    /// The bytes read.
    Read(Bytes),
    /// The same, and what was made of them: see [`Filter::read_use`](crate::Filter::read_use).
    Prepared(Prepared),
}

/// A local I/O failed; the number is the operating system's `errno`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("local I/O failed with errno {errno}")]
pub struct IoFailure {
    /// What the operating system said.
    pub errno: i32,
}

/// What the driver has to do.
#[derive(Clone, Debug, PartialEq)]
pub enum Effect {
    /// Do this on the local disk.
    Local(IoId, LocalOp),
    /// Answer the guest. `lsn` is the change's place in the history, for records of the caller's own.
    Complete {
        /// Which request.
        request: RequestId,
        /// How it went.
        result: Result<Lsn, IoFailure>,
    },
    /// Do this to the tracking file.
    Tracking(IoId, TrackingOp),
    /// Do this to the spill.
    Spill(IoId, SpillOp),
    /// Find out which blocks may hold data and call [`crate::Filter::scanned`].
    Scan(IoId),
    /// The mode changed: log it.
    Transition {
        /// Before.
        from: Mode,
        /// Now.
        to: Mode,
        /// Why.
        reason: Option<Reason>,
    },
    /// Close the connection to the receiver: what it says makes going on impossible.
    Disconnect {
        /// What was wrong, for people.
        why: String,
    },
    /// A local read for the resync failed; it will be tried again.
    ReadFailed {
        /// Where.
        range: ByteRange,
        /// How.
        failure: IoFailure,
    },
    /// Something an operator must know.
    Alarm(String),
}

/// When the guest hears that a change is done.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum AckPolicy {
    /// When the local disk has it.
    #[default]
    Local,
    /// When the receiver has it in memory too.
    Received,
    /// Writes at once; FLUSH and FUA when everything before them is durable at the receiver.
    Durable,
    /// Every write when it is durable at the receiver.
    DurableEveryWrite,
}

/// What an [`AckPolicy`] other than `Local` does while the receiver is away.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum OnOutage {
    /// Acknowledge as `Local` does, and count it.
    #[default]
    Continue,
    /// Hold the guest until the receiver is back and in sync.
    Block,
}

/// A filter's identity and limits.
#[derive(Clone, Debug, PartialEq)]
pub struct Settings {
    /// The disk.
    pub disk: DiskId,
    /// Its name.
    pub name: DiskName,
    /// Its size.
    pub size: ByteCount,
    /// The attach.
    pub epoch: Epoch,
    /// Made with the epoch, at random: tells it from the same epoch of a copied agent.
    pub attach: Uuid,
    /// When the guest is answered.
    pub ack: AckPolicy,
    /// What that means while the receiver is away.
    pub on_outage: OnOutage,
    /// Limit of the retained window.
    pub window_bytes: ByteCount,
    /// Limit of the resync buffer.
    pub resync_buffer_bytes: ByteCount,
    /// What the passive bitmap may take; above it, it becomes coarser.
    pub bitmap_bytes: ByteCount,
    /// The longest the receiver may delay a guest write; zero for never.
    pub guest_delay_max: Duration,
    /// How long an answer waits for a receiver that is connected and silent, before that counts as
    /// away; with [`OnOutage::Continue`] only.
    pub outage_after: Duration,
    /// How long a block that could not be read for a pass is left alone; a pass that had to do without
    /// some is followed by the next after ten times that, doubling.
    pub read_retry: Duration,
    /// How often a disk in sync that is idle says that it has not changed; the longest time for never.
    pub unchanged_every: Duration,
    /// The activity log.
    pub activity: ActivityLimits,
}

/// What the filter begins with.
#[derive(Clone, Debug, PartialEq)]
pub enum Resume {
    /// The disk was never protected.
    New,
    /// The last attach ended cleanly.
    Clean(SavedTracking),
    /// It did not, and the tracking file says which blocks may differ.
    Crashed {
        /// Why they have to be compared.
        reason: Reason,
        /// The history, if it is known.
        history: Option<HistoryId>,
        /// No LSN above it was given before.
        last_lsn: Lsn,
        /// The highest LSN known to be durable at the receiver.
        acked_durable: Lsn,
        /// How much of its log is known to be.
        acked_position: LogPosition,
        /// The blocks: no other differs.
        candidates: DirtyBitmap,
    },
    /// It did not, or what it left cannot be trusted: everything has to be compared.
    Lost {
        /// Why.
        reason: Reason,
        /// The history, if it is known.
        history: Option<HistoryId>,
        /// No LSN above it was given before.
        last_lsn: Lsn,
        /// The highest LSN known to be durable at the receiver.
        acked_durable: Lsn,
    },
}

impl Resume {
    /// The same of a disk that was set back since, and whose `missing` blocks have another content than they had: they
    /// are changed, whatever was known of them.
    #[must_use]
    pub fn set_back(self, missing: &DirtyBitmap) -> Self {
        let reason = Reason::Rewind;
        match self {
            Self::Clean(mut saved) => {
                saved.dirty.union_with(missing);
                saved.zeroes.subtract(missing);
                // They are of no record, so the spill does not make up for them.
                saved.spilled_to = None;
                saved.reason = Some(reason);
                Self::Clean(saved)
            }
            Self::Crashed { mut candidates, history, last_lsn, acked_durable, acked_position, reason: _ } => {
                candidates.union_with(missing);
                Self::Crashed { reason, history, last_lsn, acked_durable, acked_position, candidates }
            }
            // Everything is compared.
            Self::New | Self::Lost { .. } => self,
        }
    }
}

impl Change {
    /// The bytes it changes; none for a flush.
    pub fn range(&self) -> Option<ByteRange> {
        match self {
            Self::Write { range, .. } | Self::Zero { range, .. } => Some(*range),
            Self::Flush => None,
        }
    }

    /// Whether the guest wants it on stable storage.
    pub fn wants_stable(&self) -> bool {
        match self {
            Self::Write { fua, .. } | Self::Zero { fua, .. } => *fua,
            Self::Flush => true,
        }
    }
}
