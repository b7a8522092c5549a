//! What a person can ask of a disk: pause, resume, force a resync, mark, detach.

use backtide_protocol::{Message, message::LABEL_BYTES_MAX};
use backtide_tracking::{DirtyBitmap, SavedTracking};
use backtide_units::{CaptureTime, Lsn, Reason};
use serde::{Deserialize, Serialize};

use crate::{
    capture::{Ongoing, Queued},
    event::Now,
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

/// Where a mark stands in the log.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Marked {
    /// The last change before it.
    pub lsn: Lsn,
    /// Its time as the log has it: later than the clock's when that was set back.
    pub time: CaptureTime,
}

/// So many of the marks that the receiver has are known: who waits for one hears of it at once.
pub const MARKS_KNOWN: usize = 64;

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

impl Filter {
    /// Stops sending; changes are tracked.
    pub fn pause(&mut self, now: Now) {
        self.observe(now);
        if matches!(self.mode, Mode::Paused | Mode::Detached) {
            return;
        }
        self.stop_forwarding();
        self.before_pause = self.reason;
        self.enter(Mode::Paused, Some(Reason::Paused));
        self.retry_copies();
        self.release_answers_after_outage();
    }

    /// Ends a pause.
    pub fn resume(&mut self, now: Now) {
        self.observe(now);
        if self.mode == Mode::Paused {
            let why = self.lost.as_ref().map_or(Reason::Paused, |plan| plan.reason);
            let reason = self.before_pause.take().unwrap_or(why);
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
                    self.begin_pass_when_possible(Reason::Forced);
                }
            }
            ResyncKind::Changed => {}
            ResyncKind::Compare => self.lost = Some(self.merge_plan(PassPlan::compare(Reason::Forced))),
            ResyncKind::Full => self.lost = Some(self.merge_plan(PassPlan::full(Reason::Forced))),
        }
        self.pump();
    }

    /// Somebody else writes the local disk: as long as that is so nothing is forwarded and no pass reads, and then everything
    /// is compared. The receiver hears of the hole at once. To be said again while they are there. Whether the driver has to
    /// end the stream.
    pub fn is_written_past(&mut self, now: Now) -> bool {
        self.observe(now);
        if self.mode == Mode::Detached {
            return false;
        }
        let (mode, was_connected) = (self.mode, self.is_connected());
        let reason = Reason::WrittenPastAgent;
        // What it knows of where data is may be so no more.
        self.interrupt_verify();
        // What a scan or a pass has seen so far may have been written since.
        let restarts = mode == Mode::Resync || self.scanning.is_some();
        if restarts {
            self.stop_forwarding();
        }
        let mut plan = self.merge_plan(PassPlan::compare(reason));
        match mode {
            Mode::Sync => {
                // The hole begins here, whatever was to be compared anyway.
                plan.reason = reason;
                self.window.abandon_unsent_records(&mut self.passive);
                self.enter(Mode::Tracking, Some(reason));
            }
            Mode::Resync => self.enter(Mode::Tracking, self.reason),
            Mode::Tracking | Mode::Paused | Mode::Detached => {}
        }
        self.lost = Some(plan);
        if !std::mem::replace(&mut self.written_past, true) {
            // What is written past stands for a change that the receiver lacks: without one there is no hole.
            let _ = (self.take_lsn(), self.stamp());
        }
        if mode != self.mode || restarts {
            self.retry_copies();
            self.release_answers_after_outage();
        }
        self.pump();
        restarts && was_connected
    }

    /// Nobody else writes the local disk any more: everything is compared.
    pub fn was_written_past(&mut self, now: Now) {
        self.observe(now);
        (self.written_past, self.hole_is_open) = (false, false);
        // Also when it was compared: the power may take it.
        self.activity.unflushed.insert(self.all_blocks());
        self.lost = Some(self.merge_plan(PassPlan::compare(Reason::WrittenPastAgent)));
        self.pump();
    }

    /// Whether the receiver was there at the last attempt and refused the disk, or what was sent of it.
    pub fn receiver_refuses(&mut self, now: Now, refuses: bool) {
        self.observe(now);
        self.refused = refuses;
    }

    /// Whether the receiver is there and takes nothing.
    pub fn is_refused(&self) -> bool {
        self.refused
    }

    /// A hole begins, for this reason: whatever was asked for before and has not begun is part of what closes it.
    pub(crate) fn name_hole(&mut self, reason: Option<Reason>) {
        let Some(reason) = reason else { return };
        let scanning = self.scanning.as_mut().map(|scanning| &mut scanning.plan);
        for plan in self.lost.as_mut().into_iter().chain(scanning) {
            plan.reason = reason;
        }
        // Its blocks are among those that the receiver lacks.
        self.spill.pass_wanted = None;
        // Should the agent die in it, the next one has to know.
        self.activity.want_snapshot();
    }

    /// Why what the receiver lacks is a hole, also while the disk is paused.
    pub(crate) fn why_hole(&self) -> Option<Reason> {
        self.before_pause.or(self.reason)
    }

    /// Changes of these blocks that were answered are not on the local disk any more, or in part: what is there is sent
    /// again, as after a change that has failed.
    pub fn forgotten(&mut self, now: Now, blocks: &DirtyBitmap) {
        self.observe(now);
        let whole = self.all_blocks();
        for run in blocks.runs(whole, whole.count()) {
            // What a pass still has to send of them is not as it was at its T.
            if self.pass.as_ref().is_some_and(|pass| pass.active.touches(run)) {
                self.forfeit();
            }
            if let Some(job) = &mut self.verify {
                job.note_change(run);
            }
            if let Some(scanning) = &mut self.scanning {
                scanning.touched.insert(run);
            }
            self.passive.insert(run);
        }
        self.pump();
    }

    /// A plan that is due anyway keeps its reason: the first protection stays the first protection.
    pub(crate) fn merge_plan(&self, plan: PassPlan) -> PassPlan {
        match &self.lost {
            Some(due) => due.clone().joined(plan),
            // A hole tells why it began.
            None if matches!(self.mode, Mode::Tracking | Mode::Paused) => {
                PassPlan { reason: self.why_hole().unwrap_or(plan.reason), ..plan }
            }
            None => plan,
        }
    }

    /// Names the state as of now. The mark is kept with the log; returns where it stands there.
    ///
    /// # Errors
    /// When the state is not going to be a recovery point, or the label is no label.
    pub fn mark(&mut self, now: Now, label: &str) -> Result<Marked, MarkError> {
        self.observe(now);
        if label.is_empty() || label.len() > LABEL_BYTES_MAX {
            return Err(MarkError::Label { found: label.len() });
        }
        if !self.can_mark() {
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
        Ok(Marked { lsn, time })
    }

    /// Whether the receiver has that mark durable, as far as the last [`MARKS_KNOWN`] tell.
    pub fn has_durable_mark(&self, lsn: Lsn, label: &str) -> bool {
        self.durable_marks.iter().any(|(at, known)| *at == lsn && known == label)
    }

    /// Whether that mark is on its way to the receiver still, or may be: what is in the spill only is not known by name.
    pub fn retains_mark(&self, lsn: Lsn, label: &str) -> bool {
        self.window.holds_spill() || self.window.has_mark(lsn, label)
    }

    pub(crate) fn mark_is_durable(&mut self, lsn: Lsn, label: String) {
        if self.durable_marks.len() >= MARKS_KNOWN {
            self.durable_marks.pop_front();
        }
        self.durable_marks.push_back((lsn, label));
    }

    /// Whether nothing is under way of which a guest has to hear: [`detach`](Self::detach) is
    /// possible, and [`untold_failure`](Self::untold_failure) is the last word. Nor is the tracking file being removed or
    /// made, which would go on with the one that a detach leaves.
    pub fn is_quiet(&self) -> bool {
        let settles = self.ongoing.values().any(|ongoing| matches!(ongoing, Ongoing::Settle));
        !settles && !self.activity.replaces_file() && self.is_unchanging()
    }

    fn is_unchanging(&self) -> bool {
        let reads_or_settles = |ongoing: &Ongoing| {
            matches!(ongoing, Ongoing::Drain(_) | Ongoing::Verify(_) | Ongoing::Recall(_) | Ongoing::Settle)
        };
        self.ongoing.values().all(reads_or_settles)
            && self.queued.values().all(|queued| !matches!(queued, Queued::Change(..)))
            && self.waiting_for_buffer.is_empty()
            && !self.activity.has_parked()
    }

    /// Whether a detach now would leave nothing to resynchronize.
    pub fn is_drained(&self) -> bool {
        self.mode == Mode::Sync && self.window.is_empty() && self.passive.is_empty()
    }

    /// Whether every resync that was due or asked for has ended: none is under way or waits for the receiver, and no
    /// block is known to differ but those of changes that are on their way.
    pub fn owes_no_resync(&self) -> bool {
        self.mode == Mode::Sync
            && self.lost.is_none()
            && self.scanning.is_none()
            && self.spill.pass_wanted.is_none()
            && self.passive.is_empty()
            && self.passive_zeroes.is_empty()
    }

    /// Gives the disk up. Returns what the next attach has to know, to be saved durably; nothing
    /// when everything has to be found out anew.
    ///
    /// # Panics
    /// When a change is under way, see [`is_quiet`](Self::is_quiet).
    pub fn detach(&mut self, now: Now) -> Option<SavedTracking> {
        self.observe(now);
        assert!(self.is_unchanging(), "a disk is detached when no change is under way");
        if self.mode == Mode::Detached {
            return None;
        }
        let clean = self.is_drained();
        let spilled_to = self.complete_in_spill();
        let reason = self.why_hole();
        self.stop_forwarding();
        self.release_answers_after_outage();
        // Only where something is known of the differences is there something to save.
        let within = match &self.lost {
            None => Some(DirtyBitmap::new()),
            Some(plan) => plan.within.clone(),
        };
        self.enter(Mode::Detached, Some(Reason::Detached));
        let mut dirty = self.passive.unbounded();
        // As long as nobody can say that the spill's records reach the receiver.
        self.window.mark_all_dirty(&mut dirty);
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
            gap_from: if self.window.is_empty() { self.window.log_end() } else { self.window.base() },
            acked_durable: self.acked_durable,
            acked_position: self.acked_position,
            spilled_to,
            reason: if clean { None } else { Some(reason.unwrap_or(Reason::Detached)) },
            compare: self.passive_compare || candidates,
            dirty,
            zeroes: self.passive_zeroes.clone(),
        })
    }

    /// Blocks that the local disk may have lost, since a flush of theirs failed: what can be read there need not be what it
    /// keeps.
    pub fn doubtful(&self) -> DirtyBitmap {
        let mut blocks = DirtyBitmap::new();
        blocks.union_with(self.activity.doubtful());
        blocks.keep_only(self.all_blocks());
        blocks
    }

    /// Another agent has the disk from now on: what is retained, in memory and in the spill, would be for nobody. Its blocks
    /// are dirty, and changes are tracked.
    pub fn fenced(&mut self, now: Now) {
        self.observe(now);
        self.stop_forwarding();
        self.window.abandon(&mut self.passive);
        if matches!(self.mode, Mode::Sync | Mode::Resync) {
            self.enter(Mode::Tracking, Some(Reason::ForeignHistory));
        }
        self.retry_copies();
        self.release_answers_after_outage();
        self.keep_spilling();
    }

    /// Whatever is not durable becomes dirty, and the link is no longer used.
    fn stop_forwarding(&mut self) {
        self.interrupt_verify();
        self.link = Link::Down;
        self.hole_is_open = false;
        self.forget_recalls();
        self.acked_in_pass = false;
        self.give_up_scan();
        match self.mode {
            Mode::Resync => self.abort_pass(),
            Mode::Sync | Mode::Tracking | Mode::Paused | Mode::Detached => {
                self.window.abandon_unspilled(&mut self.passive)
            }
        }
    }
}
