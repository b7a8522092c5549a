//! What a person can ask of a disk: pause, resume, force a resync, mark, verify, detach.

use std::collections::BTreeMap;

use backtide_protocol::{Compare, CompareItem, CompareResult, Message, message::LABEL_BYTES_MAX};
use backtide_tracking::{DirtyBitmap, SavedTracking};
use backtide_units::{BlockCount, BlockIndex, BlockRange, ByteCount, ByteRange, Lsn, Reason};
use serde::{Deserialize, Serialize};

use crate::{
    capture::{Ongoing, Queued},
    compare::chunk_items,
    event::{Effect, IoFailure, LocalData, LocalOp, Now},
    filter::{Filter, Link, Mode},
    freeze::PassPlan,
};

/// Which resync to force.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum ResyncKind {
    /// Of the blocks known to be dirty.
    Changed,
    /// Of the blocks that differ, found by comparing the whole disk.
    Compare,
    /// Of every block that may hold data.
    Full,
}

/// Why a mark cannot be set.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum MarkError {
    /// The state now is not going to be a recovery point.
    #[error("disk {disk} is not in sync ({mode:?}: {reason}): this moment will not be recoverable")]
    NotForwarding {
        /// The disk.
        disk: String,
        /// Its mode.
        mode: Mode,
        /// Why it is in that mode.
        reason: String,
    },
    /// Several disks could not be held at one instant for as long as it took.
    #[error("disk {disk} could not be held until every disk was: nothing is marked at one instant")]
    HeldTooLong {
        /// The disk.
        disk: String,
    },
    /// The label is empty or too long.
    #[error("a label has 1 to {LABEL_BYTES_MAX} bytes, found {found}")]
    Label {
        /// Its length in bytes.
        found: usize,
    },
}

/// Why a verify did not come to a result.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum VerifyError {
    /// Only a disk in sync can be compared.
    #[error("only a disk in sync and connected can be verified")]
    NotInSync,
    /// One is running.
    #[error("a verify of this disk is running")]
    Running,
    /// The disk left sync mode on the way.
    #[error("the disk left sync mode during the verify")]
    Interrupted,
    /// Somebody asked for its end.
    #[error("the verify was cancelled")]
    Cancelled,
    /// The local disk could not be read.
    #[error("cannot read bytes {range} of the local disk: errno {errno}")]
    Read {
        /// Where.
        range: String,
        /// What the operating system said.
        errno: i32,
    },
}

/// What a verify found.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct VerifyReport {
    /// Bytes compared so far.
    pub compared: ByteCount,
    /// Bytes to compare in all.
    pub total: ByteCount,
    /// Every run was compared at a point in `from..=to`.
    pub from: Lsn,
    /// See `from`.
    pub to: Lsn,
    /// The blocks of the chunks, of at most 64 KiB, in which disk and receiver differ.
    pub differing: DirtyBitmap,
}

impl VerifyReport {
    /// The stretches that differ, in order; of a disk of `size`.
    pub fn differing_ranges(&self, size: ByteCount) -> impl Iterator<Item = ByteRange> {
        let all = BlockRange::whole_disk(size);
        self.differing.runs(all, all.count()).map(move |run| run.bytes(size))
    }
}

/// A run that a verify reads or waits to read; of an interrupted one, it is let go.
#[derive(Clone, Copy, Debug)]
pub(crate) struct VerifyRun {
    job: u64,
    blocks: BlockRange,
}

/// A verify under way, or its result.
#[derive(Clone, Debug)]
pub(crate) struct VerifyJob {
    number: u64,
    report: VerifyReport,
    cursor: BlockIndex,
    /// Reads and turns at the guard under way.
    busy: usize,
    pending: BTreeMap<u64, Vec<ByteRange>>,
    /// Whether what differs is sent anew at the end.
    repair: bool,
    result: Option<Result<(), VerifyError>>,
}

/// The longest run a verify reads: changes of it wait as long as that takes, and as long as the
/// run waits for its turn.
const VERIFY_RUN_BLOCKS_MAX: BlockCount = BlockCount(16);

/// Verify reads under way at once, those that wait for their turn included.
const VERIFY_READS_MAX: usize = 4;

/// Questions of a verify under way at once.
const VERIFY_PENDING_MAX: usize = 64;

impl Filter {
    /// Stops sending; changes are tracked.
    pub fn pause(&mut self, now: Now) {
        self.observe(now);
        if matches!(self.mode, Mode::Paused | Mode::Detached) {
            return;
        }
        self.stop_forwarding();
        self.enter(Mode::Paused, Some(Reason::Paused));
        self.interrupt_verify();
        self.retry_copies();
        self.release_answers_after_outage();
    }

    /// Ends a pause.
    pub fn resume(&mut self, now: Now) {
        self.observe(now);
        if self.mode == Mode::Paused {
            let reason = self.lost.as_ref().map_or(Reason::Paused, |plan| plan.reason);
            self.enter(Mode::Tracking, Some(reason));
        }
    }

    /// Forces a resync; it begins when the receiver is connected and no pass is running.
    pub fn force_resync(&mut self, now: Now, kind: ResyncKind) {
        self.observe(now);
        self.next_pass = None;
        match kind {
            ResyncKind::Changed if self.mode == Mode::Sync && self.is_connected() => {
                if self.scanning.is_none() && self.lost.is_none() {
                    self.begin_pass(Reason::Forced);
                }
            }
            ResyncKind::Changed => {}
            ResyncKind::Compare => self.lost = Some(self.merge_plan(PassPlan::compare(Reason::Forced))),
            ResyncKind::Full => self.lost = Some(self.merge_plan(PassPlan::full(Reason::Forced))),
        }
        self.pump();
    }

    /// A plan that is due anyway keeps its reason: the first protection stays the first protection.
    fn merge_plan(&self, plan: PassPlan) -> PassPlan {
        match &self.lost {
            Some(due) if !due.tell_zeroes => due.clone(),
            Some(due) => PassPlan { reason: due.reason, ..plan },
            None => plan,
        }
    }

    /// Names the state as of now. The mark is kept with the log; returns its LSN.
    ///
    /// # Errors
    /// When the state is not going to be a recovery point, or the label is no label.
    pub fn mark(&mut self, now: Now, label: &str) -> Result<Lsn, MarkError> {
        self.observe(now);
        if label.is_empty() || label.len() > LABEL_BYTES_MAX {
            return Err(MarkError::Label { found: label.len() });
        }
        if !self.is_forwarding() {
            let reason = self.reason.map_or_else(String::new, |reason| reason.to_string());
            return Err(MarkError::NotForwarding {
                disk: self.settings.name.to_string(),
                mode: self.mode,
                reason,
            });
        }
        let lsn = self.window.log_end();
        let time = self.stamp();
        self.window.push(Message::Mark { lsn, time, label: label.to_owned() });
        Ok(lsn)
    }

    /// Whether no change is under way: [`detach`](Self::detach) is possible.
    pub fn is_quiet(&self) -> bool {
        self.ongoing
            .values()
            .all(|ongoing| matches!(ongoing, Ongoing::Drain(_) | Ongoing::Verify(_) | Ongoing::Settle))
            && self.queued.values().all(|queued| !matches!(queued, Queued::Change(..)))
            && self.waiting_for_buffer.is_empty()
            && !self.activity.has_parked()
    }

    /// Whether a detach now would leave nothing to resynchronize.
    pub fn is_drained(&self) -> bool {
        self.mode == Mode::Sync && self.window.is_empty() && self.passive.is_empty()
    }

    /// Gives the disk up. Returns what the next attach has to know, to be saved durably; nothing
    /// when everything has to be found out anew.
    ///
    /// # Panics
    /// When a change is under way, see [`is_quiet`](Self::is_quiet).
    pub fn detach(&mut self, now: Now) -> Option<SavedTracking> {
        self.observe(now);
        assert!(self.is_quiet(), "a disk is detached when no change is under way");
        if self.mode == Mode::Detached {
            return None;
        }
        let clean = self.is_drained();
        let reason = self.reason;
        self.stop_forwarding();
        self.release_answers_after_outage();
        // Only where something is known of the differences is there something to save.
        let within = match &self.lost {
            None => Some(DirtyBitmap::new()),
            Some(plan) => plan.within.clone(),
        };
        self.enter(Mode::Detached, Some(Reason::Detached));
        let mut dirty = self.passive.unbounded();
        dirty.union_with(self.activity.doubtful());
        let candidates = self.lost.is_some() || !self.activity.doubtful().is_empty();
        if let Some(within) = &within {
            dirty.union_with(within);
            dirty.keep_only(self.all_blocks());
        }
        within.is_some().then(|| SavedTracking {
            disk: self.settings.disk,
            history: self.history,
            last_lsn: self.last_lsn,
            gap_from: self.window.log_end(),
            acked_durable: self.acked_durable,
            reason: if clean { None } else { Some(reason.unwrap_or(Reason::Detached)) },
            compare: self.passive_compare || candidates,
            dirty,
            zeroes: self.passive_zeroes.clone(),
        })
    }

    /// Whatever is not durable becomes dirty, and the link is no longer used.
    fn stop_forwarding(&mut self) {
        self.link = Link::Down;
        self.acked_in_pass = false;
        if let Some(scanning) = self.scanning.take() {
            self.lost = Some(scanning.plan);
        }
        match self.mode {
            Mode::Resync => self.abort_pass(),
            Mode::Sync | Mode::Tracking | Mode::Paused | Mode::Detached => {
                self.window.abandon(&mut self.passive)
            }
        }
    }

    /// Compares the whole disk with the receiver while the guest goes on: each run at the LSN of the
    /// moment it is read, when no change of it is under way. So nothing needs to be copied before a
    /// write, and a change in flight is never a difference. With `repair` what differs is sent anew
    /// when all is compared: the local disk is what the guest has.
    ///
    /// # Errors
    /// When the disk is not in sync, or a verify is running.
    pub fn start_verify(&mut self, now: Now, repair: bool) -> Result<(), VerifyError> {
        self.observe(now);
        if self.verify.as_ref().is_some_and(|job| job.result.is_none()) {
            return Err(VerifyError::Running);
        }
        if self.mode != Mode::Sync || !self.is_connected() {
            return Err(VerifyError::NotInSync);
        }
        let lsn = self.window.log_end();
        let report =
            VerifyReport { total: self.settings.size, from: lsn, to: lsn, ..VerifyReport::default() };
        self.verify = Some(VerifyJob {
            number: self.take_compare_id(),
            report,
            cursor: BlockIndex(0),
            busy: 0,
            pending: BTreeMap::new(),
            repair,
            result: None,
        });
        self.pump();
        Ok(())
    }

    /// The last verify: what it found so far and, when it has ended, how.
    pub fn verify_state(&self) -> Option<(&VerifyReport, Option<&Result<(), VerifyError>>)> {
        self.verify.as_ref().map(|job| (&job.report, job.result.as_ref()))
    }

    /// Ends the verify that is running, if one is; what it found so far stays.
    pub fn cancel_verify(&mut self, now: Now) {
        self.observe(now);
        self.end_verify(VerifyError::Cancelled);
    }

    pub(crate) fn interrupt_verify(&mut self) {
        self.end_verify(VerifyError::Interrupted);
    }

    fn end_verify(&mut self, why: VerifyError) {
        if let Some(job) = &mut self.verify
            && job.result.is_none()
        {
            job.result = Some(Err(why));
            job.pending.clear();
        }
    }

    pub(crate) fn go_on_verifying(&mut self) {
        let end = self.all_blocks().end();
        loop {
            let Some(job) = self.verify.as_mut().filter(|job| job.result.is_none()) else { return };
            if job.cursor >= end && job.busy == 0 && job.pending.is_empty() {
                job.result = Some(Ok(()));
                return self.repair_if_asked();
            }
            let busy = job.busy >= VERIFY_READS_MAX || job.pending.len() >= VERIFY_PENDING_MAX;
            if job.cursor >= end || busy {
                return;
            }
            let limit = BlockIndex(job.cursor.0 + VERIFY_RUN_BLOCKS_MAX.0);
            let blocks = BlockRange::between(job.cursor, end.min(limit));
            job.cursor = blocks.end();
            job.busy += 1;
            let run = VerifyRun { job: job.number, blocks };
            let ticket = self.take_ticket();
            if self.guard.acquire(ticket, blocks) {
                self.read_for_verify(run);
            } else {
                self.queued.insert(ticket, Queued::Verify(run));
            }
        }
    }

    fn repair_if_asked(&mut self) {
        let Some(job) = self.verify.as_ref().filter(|job| job.repair && !job.report.differing.is_empty())
        else {
            return;
        };
        self.passive.union_with(&job.report.differing);
        // A scan under way is going to take them along.
        if self.mode == Mode::Sync && self.is_connected() && self.scanning.is_none() && self.lost.is_none() {
            self.begin_pass(Reason::VerifyRepair);
        }
    }

    /// The run's turn has come; its verify may have been interrupted meanwhile.
    pub(crate) fn queued_verify_admitted(&mut self, run: VerifyRun) {
        if self.verify_of(run).is_some() { self.read_for_verify(run) } else { self.release(run.blocks) }
    }

    fn read_for_verify(&mut self, run: VerifyRun) {
        let io = self.take_io_id();
        self.ongoing.insert(io, Ongoing::Verify(run));
        let read = LocalOp::Read(run.blocks.bytes(self.settings.size));
        self.effects.push_back(Effect::Local(io, read));
    }

    fn verify_of(&mut self, run: VerifyRun) -> Option<&mut VerifyJob> {
        self.verify.as_mut().filter(|job| job.number == run.job && job.result.is_none())
    }

    /// The run's content and the log's end belong together: the guard kept changes out.
    pub(crate) fn verify_read_done(&mut self, run: VerifyRun, result: Result<LocalData, IoFailure>) {
        let range = run.blocks.bytes(self.settings.size);
        let at = self.window.log_end();
        let id = self.take_compare_id();
        if let Some(job) = self.verify_of(run) {
            job.busy -= 1;
            match result {
                Ok(LocalData::Read(bytes)) => {
                    let items: Vec<CompareItem> =
                        chunk_items(range, &bytes).into_iter().map(|(item, _)| item).collect();
                    job.pending.insert(id, items.iter().map(|item| item.range).collect());
                    job.report.to = at;
                    self.window.push(Message::Compare(Compare { id, at, items }));
                }
                Ok(LocalData::Changed) => unreachable!("a read brings bytes"),
                Err(IoFailure { errno }) => {
                    job.result = Some(Err(VerifyError::Read { range: range.to_string(), errno }));
                }
            }
        }
        self.release(run.blocks);
    }

    pub(crate) fn verify_compared(&mut self, result: CompareResult) {
        // An answer to a question of before an interruption is of no use.
        let Some(job) = &mut self.verify else { return };
        let Some(ranges) = job.pending.remove(&result.id) else { return };
        job.report.compared.0 += ranges.iter().map(|range| range.count().0).sum::<u64>();
        for range in result.differing.iter().filter_map(|index| ranges.get(*index as usize)) {
            job.report.differing.insert(BlockRange::touched_by(*range));
        }
    }
}
