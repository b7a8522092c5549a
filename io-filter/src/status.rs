//! What can be said of a disk at any moment.

use std::time::Duration;

use backtide_units::{BlockCount, BlockIndex, ByteCount, ByteRange, CaptureTime, HistoryId, Lsn, Reason};

use crate::{
    activity::Untracked,
    event::Now,
    filter::{Filter, Mode},
    pass::NewWrites,
    progress::Speed,
};

/// What has happened since the attach. All only grow, maxima included.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Counters {
    /// Changes that got an LSN of their own.
    pub records: u64,
    /// Changes the local disk refused.
    pub failed_changes: u64,
    /// Resync reads the local disk refused.
    pub failed_reads: u64,
    /// Flushes completed.
    pub flushes: u64,
    /// Mode changes.
    pub transitions: u64,
    /// Handshakes accepted.
    pub connections: u64,
    /// Window overflows.
    pub overflows: u64,
    /// Bytes written to the spill.
    pub spilled_bytes: u64,
    /// Bytes read back from it.
    pub unspilled_bytes: u64,
    /// Passes begun.
    pub passes: u64,
    /// Passes made durable at the receiver.
    pub passes_completed: u64,
    /// Passes given up because the stream was lost.
    pub passes_aborted: u64,
    /// Passes that lost their point T for the guest's sake.
    pub forfeited: u64,
    /// Guest writes that had old content copied first.
    pub copies_before_write: u64,
    /// Answers delayed because the window filled up.
    pub delayed_answers: u64,
    /// The longest a change was held up for the receiver's sake, by such a delay or by a pass, as
    /// measured, in microseconds.
    pub guest_delay_us_max: u64,
    /// The longest that it took from the moment at which a change was to be held up no more until this was
    /// noticed, in microseconds: the thread that owns the disk had no processor, or was busy.
    pub guest_late_us_max: u64,
    /// Answers given with less than the acknowledgement policy promises, the receiver being away.
    pub degraded_answers: u64,
    /// Record payload made durable at the receiver.
    pub bytes_durable: u64,
    /// Resync payload made durable at the receiver.
    pub resync_bytes_durable: u64,
    /// Resync payload that was compared and found equal.
    pub resync_bytes_equal: u64,
    /// Reads of passes and verifies given up because a change had waited its time for them.
    pub reads_abandoned: u64,
    /// Changes that waited for their extents to become hot.
    pub cold_changes: u64,
    /// Snapshots of the tracking.
    pub snapshots: u64,
}

/// A running pass.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct PassStatus {
    /// The resync point T.
    pub at: Lsn,
    /// Why it runs.
    pub reason: Reason,
    /// Whether new writes are forwarded; otherwise they wait for the next pass.
    pub forwarding: bool,
    /// Whether blocks are compared before they are sent.
    pub compare: bool,
    /// Whether T is lost as a recovery point, to a change that could not wait.
    pub forfeited: bool,
    /// Whether it goes without blocks that could not be read, and ends without any point.
    pub incomplete: bool,
    /// Blocks that are still to be read: only ever fewer.
    pub left: BlockCount,
    /// Bytes delivered or found equal.
    pub done: ByteCount,
    /// Bytes of the pass in all.
    pub total: ByteCount,
    /// Since it began.
    pub running: Duration,
    /// How fast it gets on, and what follows.
    pub speed: Speed,
    /// What holds its reads back to so many bytes a second, if anything does: the limit, or the guest.
    pub held_to: Option<ByteCount>,
}

/// The window's part on disk.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct SpillStatus {
    /// What its files take.
    pub bytes: ByteCount,
    /// What they may take.
    pub limit: ByteCount,
    /// What is in them and not in memory.
    pub unread: ByteCount,
    /// Where the log stands before the first record in it.
    pub from: Lsn,
    /// Records in it that the receiver has not made durable.
    pub records: u64,
    /// Whether it had no room for what came last.
    pub full: bool,
    /// Why it is not used any more, until it is empty.
    pub failure: Option<String>,
}

/// Everything about a disk's protection at one moment.
#[derive(Clone, Debug, PartialEq)]
pub struct Status {
    /// The mode.
    pub mode: Mode,
    /// Why it is not sync.
    pub reason: Option<Reason>,
    /// Whether somebody else writes the local disk: nothing is forwarded or resynchronized.
    pub written_past: bool,
    /// Whether the receiver is connected.
    pub connected: bool,
    /// The history at the receiver.
    pub history: Option<HistoryId>,
    /// The last LSN given.
    pub last_lsn: Lsn,
    /// The receiver has it in memory up to here.
    pub received_lsn: Lsn,
    /// The disk is recoverable up to here.
    pub durable_lsn: Lsn,
    /// When the last change was captured.
    pub last_time: CaptureTime,
    /// Records not durable at the receiver.
    pub lag_records: u64,
    /// When the oldest of them was captured.
    pub oldest_time: Option<CaptureTime>,
    /// What the window holds in memory.
    pub window: ByteCount,
    /// What it holds on disk; none without a spill.
    pub spill: Option<SpillStatus>,
    /// What resync data waits to be sent.
    pub resync_buffer: ByteCount,
    /// Dirty blocks, of a running pass and beside it.
    pub dirty: BlockCount,
    /// Extents that are hot; none when no activity log is kept.
    pub hot_extents: Option<u64>,
    /// Why no activity log is kept, although one should be.
    pub untracked: Option<Untracked>,
    /// Blocks that the last pass could not read, and where the first are.
    pub unreadable: Option<(BlockCount, ByteRange)>,
    /// Whether the dirty blocks are being found out.
    pub scanning: bool,
    /// Answers the guest is waiting for because of the receiver.
    pub waiting_answers: u64,
    /// The running pass.
    pub pass: Option<PassStatus>,
    /// What happened so far.
    pub counters: Counters,
}

impl Filter {
    /// The disk's state at the last event.
    pub fn status(&self) -> Status {
        self.status_at(self.now)
    }

    /// The disk's state now.
    pub fn status_at(&self, now: Now) -> Status {
        let active = self.pass.as_ref().map_or(0, |pass| pass.active.count().0);
        Status {
            mode: self.mode,
            reason: self.reason,
            written_past: self.written_past,
            connected: self.is_connected(),
            history: self.history,
            last_lsn: self.last_lsn,
            received_lsn: self.received_lsn.max(self.durable_lsn),
            durable_lsn: self.durable_lsn,
            last_time: self.last_time,
            lag_records: self.window.records(),
            oldest_time: self.window.oldest_time(),
            window: self.window.retained_bytes(),
            spill: self.spill_status(),
            resync_buffer: self.window.data_bytes(),
            dirty: BlockCount(self.passive.count().0 + active),
            hot_extents: self.activity.hot_extents(),
            untracked: self.activity.untracked(),
            unreadable: self.first_unreadable(),
            scanning: self.scanning.is_some() || self.lost.is_some(),
            waiting_answers: self.acknowledgements.waiting() as u64,
            pass: self.pass_status(now.monotonic.max(self.now.monotonic)),
            counters: self.counters,
        }
    }

    fn first_unreadable(&self) -> Option<(BlockCount, ByteRange)> {
        let count = self.unreadable.count();
        let first = self.unreadable.next_run(BlockIndex(0), self.all_blocks().end(), count)?;
        Some((count, first.bytes(self.settings.size)))
    }

    fn pass_status(&self, now: Duration) -> Option<PassStatus> {
        let pass = self.pass.as_ref()?;
        Some(PassStatus {
            at: pass.at,
            reason: pass.reason,
            forwarding: pass.new_writes == NewWrites::Forwarded,
            compare: pass.compare,
            forfeited: pass.forfeited,
            incomplete: !pass.given_up.is_empty(),
            left: pass.active.count(),
            done: pass.settled(),
            total: pass.total,
            running: now.saturating_sub(pass.started),
            speed: self.speed_of(pass, now),
            held_to: self.pace.rate(),
        })
    }
}
