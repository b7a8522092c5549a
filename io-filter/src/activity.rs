//! The tracking file's part of the write path: a change of a cold extent waits for a record of the
//! activity log, and snapshots say what may differ, so that a crash costs a compare of little.
//!
//! A snapshot lists every block of [`Filter::unsettled_blocks`] and every block that the local disk
//! may still lose: after a power loss the receiver may have writes that the disk has not. So
//! neither the receiver nor a flush has to be waited for before an extent goes cold.

mod standing;

use std::{collections::BTreeMap, time::Duration};

use backtide_tracking::{ActivityLimits, ActivityLog, DirtyBitmap, SavedTracking, Sequence, Snapshot};
use backtide_units::{BlockRange, ByteCount, DiskId, Reason};

use crate::{
    capture::Ongoing,
    event::{Change, Effect, IoFailure, IoId, LocalOp, Now, RequestId, Resume, Settings, TrackingOp},
    filter::{Filter, Mode},
    freeze::PassPlan,
    give_way::Arrival,
    mutant::Mutant,
    window::Window,
};

use standing::Standing;
pub use standing::Untracked;

/// Copies of a snapshot by which everything may differ: as many as the file has places.
const COPIES: u8 = 2;

/// A change that holds its range and waits for its extents to be hot.
#[derive(Clone, Debug)]
pub(crate) struct Parked {
    request: RequestId,
    change: Change,
    blocks: BlockRange,
    asked: Arrival,
    since: Duration,
}

/// See the module's description.
#[derive(Clone, Debug)]
pub(crate) struct Activity {
    /// None when none is wanted: a crash means a compare of everything then.
    log: Option<ActivityLog>,
    /// By the record they wait for.
    parked: BTreeMap<Sequence, Vec<Parked>>,
    record: Option<IoId>,
    snapshot: Option<IoId>,
    /// Whether the file can be written.
    standing: Standing,
    /// A snapshot is due, whatever the log says.
    wanted: bool,
    /// How many snapshots in a row said that everything may differ, the durable one the last.
    everything_copies: u8,
    /// Whether the one under way says so.
    everything_coming: bool,
    /// Changed since the last flush began.
    pub(crate) unflushed: DirtyBitmap,
    /// Changed before the flush that is under way.
    flushing: Option<(IoId, DirtyBitmap)>,
    /// Of these a flush failed: nobody knows what the disk is going to hold.
    doubtful: DirtyBitmap,
    /// When idle extents are let go next.
    idle_at: Option<Duration>,
    /// A flush of the filter's own failed, and no guest was told.
    untold: Option<IoFailure>,
}

impl Activity {
    /// Of a disk whose tracking file was just made.
    pub(crate) fn new(settings: &Settings, resume: &Resume) -> Self {
        let Settings { activity: limits, size, bitmap_bytes, .. } = *settings;
        let bounded = || DirtyBitmap::bounded(bitmap_bytes, BlockRange::whole_disk(size).end());
        let everything = resume.is_everything();
        // What an agent wrote that died may be in the page cache still, and go with the power.
        let mut unflushed = bounded();
        match resume {
            Resume::Clean(_) => {}
            Resume::Crashed { candidates, .. } => unflushed.union_with(candidates),
            Resume::New | Resume::Lost { .. } => drop(unflushed.insert(BlockRange::whole_disk(size))),
        }
        Self {
            log: (limits.hot > 0).then(|| ActivityLog::new(limits, size, everything)),
            parked: BTreeMap::new(),
            record: None,
            snapshot: None,
            standing: Standing::new(limits.anew),
            wanted: false,
            everything_copies: if everything { COPIES } else { 0 },
            everything_coming: false,
            unflushed,
            flushing: None,
            doubtful: bounded(),
            idle_at: None,
            untold: None,
        }
    }

    pub(crate) fn has_parked(&self) -> bool {
        !self.parked.is_empty()
    }

    /// Extents that are hot; none when no activity log is kept.
    pub(crate) fn hot_extents(&self) -> Option<u64> {
        self.log.as_ref().filter(|_| self.untracked().is_none()).map(ActivityLog::hot_count)
    }

    /// Blocks of which a flush failed.
    pub(crate) fn doubtful(&self) -> &DirtyBitmap {
        &self.doubtful
    }

    /// A snapshot is going to say more than the last one.
    pub(crate) fn want_snapshot(&mut self) {
        self.wanted = true;
    }

    /// Whether the file says that everything may differ, in a way that survives damage to one copy.
    pub(crate) fn everything_is_saved(&self) -> bool {
        self.log.is_none() || self.everything_copies >= COPIES
    }

    pub(crate) fn says_everything(&self) -> bool {
        self.everything_copies > 0 || self.everything_coming
    }

    /// A flush covers what was changed before it began.
    pub(crate) fn flush_begins(&mut self, io: IoId) {
        if self.flushing.is_none() && !self.unflushed.is_empty() {
            self.flushing = Some((io, self.unflushed.take()));
        }
    }

    fn flush_ended(&mut self, io: IoId) {
        self.flushing.take_if(|(covering, _)| *covering == io);
    }

    /// A flush or a stable write failed. Which of several is told of lost pages is chance, and it is
    /// told once.
    fn stability_failed(&mut self) {
        if let Some((_, flushing)) = &self.flushing {
            self.doubtful.union_with(flushing);
        }
        self.doubtful.union_with(&self.unflushed);
    }

    /// What the next guest that flushes has to be told instead of success.
    pub(crate) fn take_untold(&mut self) -> Option<IoFailure> {
        self.untold.take()
    }

    /// Blocks that the local disk may lose, or may have lost.
    fn unstable(&self, blocks: &mut DirtyBitmap) {
        blocks.union_with(&self.unflushed);
        blocks.union_with(&self.doubtful);
        if let Some((_, flushing)) = &self.flushing {
            blocks.union_with(flushing);
        }
    }
}

impl Resume {
    /// Whether nothing is known of the differences.
    pub(crate) fn is_everything(&self) -> bool {
        match self {
            Self::New | Self::Lost { .. } => true,
            Self::Clean(saved) => saved.history.is_none(),
            Self::Crashed { .. } => false,
        }
    }

    /// What the tracking file has to say, durably, before the filter that begins with this sees its
    /// first event.
    pub fn first_snapshot(&self, disk: DiskId, limits: ActivityLimits) -> Snapshot {
        let unknown = SavedTracking::unknown(disk);
        let saved = match self {
            Self::New => unknown,
            Self::Clean(saved) => SavedTracking { compare: true, ..saved.clone() },
            Self::Lost { reason, history, last_lsn, acked_durable } => SavedTracking {
                reason: Some(*reason),
                history: *history,
                last_lsn: *last_lsn,
                gap_from: *acked_durable,
                acked_durable: *acked_durable,
                ..unknown
            },
            Self::Crashed { reason, history, last_lsn, acked_durable, acked_position, candidates } => {
                SavedTracking {
                    reason: Some(*reason),
                    history: *history,
                    last_lsn: *last_lsn,
                    gap_from: *acked_durable,
                    acked_durable: *acked_durable,
                    acked_position: *acked_position,
                    dirty: candidates.clone(),
                    ..unknown
                }
            }
        };
        // Without an activity log nothing else can be promised.
        Snapshot::first(saved, false, self.is_everything() || limits.hot == 0)
    }
}

impl Filter {
    /// A flush has ended, well or not.
    pub(crate) fn flush_ended(&mut self, io: IoId, done: bool) {
        if !done {
            self.stability_failed();
        }
        self.activity.flush_ended(io);
    }

    /// A flush or a stable write failed: what was not stable may be lost, also of changes under way, of which the disk
    /// may have a part.
    pub(crate) fn stability_failed(&mut self) {
        self.activity.stability_failed();
        for ongoing in self.ongoing.values() {
            if let Ongoing::Change(change) = ongoing {
                self.activity.doubtful.insert(change.blocks());
            }
        }
    }

    /// The range is held. A change goes on when its extents are hot, durably.
    pub(crate) fn begin_change(&mut self, request: RequestId, change: Change, asked: Arrival) {
        let blocks = BlockRange::touched_by(change.range().expect("flushes take no range"));
        let waits_for = self.activity.log.as_mut().and_then(|log| log.enter(blocks));
        let skips = self.is_mutant(Mutant::NoWaitForHot);
        match waits_for.filter(|_| !skips) {
            None => self.begin_hot_change(request, change, asked),
            Some(sequence) => {
                self.counters.cold_changes += 1;
                let parked = Parked { request, change, blocks, asked, since: self.now.monotonic };
                self.activity.parked.entry(sequence).or_default().push(parked);
            }
        }
        self.keep_tracking();
    }

    /// A change has ended: its blocks are as they are until the next flush.
    pub(crate) fn activity_changed(&mut self, blocks: BlockRange) {
        if let Some(log) = &mut self.activity.log {
            log.leave(blocks);
        }
        // Also without a log: what a failed flush leaves is not to be trusted at a detach.
        self.activity.unflushed.insert(blocks);
    }

    /// Writes what has to be written of the tracking.
    pub(crate) fn keep_tracking(&mut self) {
        if !self.activity.is_kept() && self.mode != Mode::Detached {
            return self.see_to_the_file();
        }
        let Some(log) = self.activity.log.as_mut().filter(|_| self.mode != Mode::Detached) else { return };
        if self.activity.idle_at.is_none() && log.has_hot() {
            self.activity.idle_at = Some(self.now.monotonic + self.settings.activity.idle);
        }
        if self.activity.record.is_none()
            && let Some(record) = log.next_record()
        {
            let io = self.take_io_id();
            self.activity.record = Some(io);
            self.effects.push_back(Effect::Tracking(io, TrackingOp::Record(record)));
        }
        self.activity.wanted |= self.is_saving_everything();
        let due = self.activity.wanted || self.activity.log.as_ref().is_some_and(ActivityLog::wants_snapshot);
        if due {
            self.begin_snapshot(false);
        }
    }

    fn unsettled_in_memory(&self) -> Option<DirtyBitmap> {
        if !self.is_mutant(Mutant::SnapshotForgetsWindow) {
            return self.unsettled_blocks();
        }
        let mut forgetful = self.clone();
        forgetful.window = Window::new(self.window.base());
        forgetful.unsettled_blocks()
    }

    fn begin_snapshot(&mut self, idle: bool) {
        if self.activity.snapshot.is_some() || !self.activity.is_kept() || self.mode == Mode::Detached {
            return;
        }
        let unsettled = self.unsettled_in_memory();
        let everything = unsettled.is_none();
        let mut dirty = unsettled.unwrap_or_default();
        if !everything && !self.is_mutant(Mutant::SnapshotForgetsUnflushed) {
            self.activity.unstable(&mut dirty);
        }
        let Some(log) = &mut self.activity.log else { return };
        let captured = log.capture(everything, idle);
        let saved = self.tracked(dirty);
        let io = self.take_io_id();
        self.activity.wanted = false;
        self.activity.snapshot = Some(io);
        self.activity.everything_coming = everything;
        self.counters.snapshots += 1;
        let snapshot = Snapshot::of(captured, everything, saved);
        self.effects.push_back(Effect::Tracking(io, TrackingOp::Snapshot(Box::new(snapshot))));
    }

    /// What the file says of the disk, with these blocks.
    fn tracked(&self, dirty: DirtyBitmap) -> SavedTracking {
        SavedTracking {
            history: self.history,
            last_lsn: self.last_lsn,
            gap_from: self.acked_durable,
            acked_durable: self.acked_durable,
            acked_position: self.acked_position,
            reason: self.why_hole(),
            dirty,
            ..SavedTracking::unknown(self.settings.disk)
        }
    }

    /// An operation of [`Effect::Tracking`] has ended: durable, or failed. With what a snapshot took.
    ///
    /// # Panics
    /// When no such operation is under way.
    pub fn tracking_done(&mut self, now: Now, io: IoId, result: Result<ByteCount, IoFailure>) {
        self.observe(now);
        if self.activity.standing.is_of_the_file(io) {
            self.file_done(result.map(|_| ()));
        } else if self.activity.record.take_if(|record| *record == io).is_some() {
            match result {
                Ok(_) => self.record_is_durable(),
                Err(failure) => self.tracking_failed(failure),
            }
        } else {
            assert_eq!(self.activity.snapshot.take(), Some(io), "an operation ends once");
            match result {
                Ok(bytes) => self.snapshot_is_durable(bytes),
                Err(failure) => self.tracking_failed(failure),
            }
        }
        self.pump();
    }

    fn record_is_durable(&mut self) {
        // Of a file that is to go nothing is believed.
        let kept = self.activity.is_kept();
        let Some(log) = self.activity.log.as_mut().filter(|_| kept) else { return };
        let durable = log.record_done();
        while let Some(waiting) = self.activity.parked.first_entry().filter(|entry| *entry.key() <= durable) {
            for parked in waiting.remove() {
                self.begin_parked(parked);
            }
        }
    }

    fn snapshot_is_durable(&mut self, bytes: ByteCount) {
        let kept = self.activity.is_kept();
        let Some(log) = self.activity.log.as_mut().filter(|_| kept) else { return };
        log.snapshot_done(bytes);
        self.activity.standing.is_tracked_again();
        let everything = std::mem::take(&mut self.activity.everything_coming);
        let copies = if everything { self.activity.everything_copies + 1 } else { 0 };
        self.activity.everything_copies = copies.min(COPIES);
    }

    /// Waiting for the activity log is not waiting for the receiver.
    fn begin_parked(&mut self, parked: Parked) {
        let asked = parked.asked.later_by(self.now.monotonic.saturating_sub(parked.since));
        self.begin_hot_change(parked.request, parked.change, asked);
    }

    /// When idle extents have to be let go, if there are any, or something is to be done about the file.
    pub(crate) fn next_tracking(&self) -> Option<Duration> {
        let due = if self.activity.is_kept() { self.activity.idle_at } else { self.activity.next_for_file() };
        due.filter(|_| self.mode != Mode::Detached)
    }

    /// Lets idle extents go: after a flush, so that what it covers need not be compared either.
    pub(crate) fn let_idle_extents_go(&mut self) {
        let busy = self.activity.log.as_ref().is_some_and(ActivityLog::has_hot) && self.activity.is_kept();
        if !busy || self.mode == Mode::Detached {
            self.activity.idle_at = None;
            return;
        }
        let now = self.now.monotonic;
        if self.activity.idle_at.is_none_or(|due| due > now) {
            return;
        }
        self.activity.idle_at = Some(now + self.settings.activity.idle);
        let io = self.take_io_id();
        self.ongoing.insert(io, Ongoing::Settle);
        self.activity.flush_begins(io);
        self.effects.push_back(Effect::Local(io, LocalOp::Settle));
    }

    pub(crate) fn settled(&mut self, result: Result<(), IoFailure>) {
        if let Err(failure) = result {
            let name = &self.settings.name;
            let text = format!(
                "disk {name}: flushing the local disk failed ({failure}): what was written last may be lost"
            );
            self.activity.untold = Some(failure);
            self.effects.push_back(Effect::Alarm(text));
        }
        self.begin_snapshot(true);
    }

    /// A flush that the filter did not ask for, and no guest, has failed. The system told of lost
    /// pages there, and tells nobody twice: the next guest that flushes is told.
    pub fn flush_failed(&mut self, now: Now, failure: IoFailure) {
        self.observe(now);
        self.stability_failed();
        self.settled(Err(failure));
        self.pump();
    }

    /// Before the last detach a flush failed, and no guest was told: the next that flushes is.
    pub fn owes_failure(&mut self, failure: IoFailure) {
        self.activity.untold = Some(failure);
    }

    /// The failure of a flush that no guest was told of yet.
    pub fn untold_failure(&self) -> Option<IoFailure> {
        self.activity.untold
    }

    /// Whether a pass that begins knowing nothing has to wait for the file to say so: should the
    /// agent die in the middle, the handshake would find nothing wrong.
    pub(crate) fn must_save_everything(&mut self, plan: &PassPlan) -> bool {
        let must = plan.within.is_none() && !self.activity.everything_is_saved();
        self.activity.wanted |= must;
        must
    }

    /// Whether everything is to be compared and the file does not say so yet. Until it does, that would be forgotten if the
    /// agent died, also while there is no receiver. Not while the file cannot be written: then it goes.
    pub fn is_saving_everything(&self) -> bool {
        let due = self.lost.as_ref().is_some_and(|plan| plan.within.is_none());
        due && !self.activity.everything_is_saved() && self.activity.is_kept()
    }

    /// Why a disk is not in sync when the agent that had it died.
    pub(crate) fn crash_plan(reason: Reason, candidates: DirtyBitmap) -> PassPlan {
        PassPlan { within: Some(candidates), ..PassPlan::compare(reason) }
    }
}

#[cfg(test)]
mod tests;
