//! The spill: when memory is not enough for what the receiver has not got, records go to files and
//! come back from there, in order.
//!
//! It is used in sync mode only, from the moment the receiver is away, or slow enough for the window
//! to fill up; then everything in the window goes there, the oldest first, written behind the
//! guest: no change waits for it. So a crash during an outage loses of the log what was written last,
//! and no more. When the receiver has caught up, new records are not written any more.
//!
//! A pass waits until the spill is empty: its T lies above everything in there, and what a pass sends
//! never goes to files - an interrupted one is begun anew. In tracking the spill keeps what it has: the
//! log's continuation up to where the hole begins.
//!
//! The shares of the window's memory, in eighths:
//! ```text
//!   0        1        2        3        4                 8
//!   │ read ahead so far        │        │ answers are     │ overflow: tracking
//!   │        │ sent, or kept   │ spill  │ delayed more    │
//!   │        │ beside the files│ begins │ and more        │
//! ```

use std::time::Duration;

use backtide_protocol::Message;
use backtide_spill::{FileHeader, Place, Recovered};
use backtide_units::{ByteCount, Lsn, Reason};

use crate::{
    event::{Effect, IoId, Now, SpillDone, SpillOp},
    filter::{Filter, Mode},
    mutant::Mutant,
    status::SpillStatus,
};

/// How long a spill that failed is left alone.
const TRY_AGAIN: Duration = Duration::from_secs(5);

/// What is under way and what is known of the spill, beside what the window knows.
#[derive(Clone, Debug, Default)]
pub(crate) struct SpillState {
    append: Option<(IoId, Vec<Message>)>,
    remove: Option<(IoId, Vec<u64>)>,
    read: Option<(IoId, Place)>,
    /// New records are written.
    active: bool,
    /// The disk is about to be detached: what is retained goes there, if it can.
    leaving: bool,
    /// There was no room.
    full: bool,
    failure: Option<String>,
    /// The same was said already.
    alarmed: bool,
    /// Not before this moment is tried again what failed.
    again_at: Option<Duration>,
    /// A pass waits for its end.
    pub(crate) pass_wanted: Option<Reason>,
    /// The last attach left the log complete up to here.
    pub(crate) complete_to: Option<Lsn>,
}

impl Filter {
    /// Gives the filter a spill, and what the last attach left in it. To be called before the first
    /// event. What does not continue this disk's history is removed.
    pub fn use_spill(&mut self, recovered: Recovered) {
        let Recovered { mut ring, left, .. } = recovered;
        let complete_to = self.spill.complete_to.take();
        let ours = left.filter(|left| {
            self.history == Some(left.history)
                && left.epoch < self.settings.epoch
                && ring.end() <= self.last_lsn
                && self.mode == Mode::Tracking
        });
        let Some(left) = ours else {
            ring.trim(ring.next());
            self.window.use_ring(ring);
            return self.keep_spilling();
        };
        self.not_before(left.last_time);
        // From where the window was to where the log ended: a first file may be missing as well.
        let is_whole = complete_to == Some(ring.end()) && ring.base() <= self.window.base();
        if is_whole && self.lost.is_none() {
            // Every block that is dirty without it is one of a record in it.
            let _ = self.passive.take();
            self.mode = Mode::Sync;
            self.reason = None;
        }
        self.window.use_ring(ring);
        self.keep_spilling();
    }

    /// An operation of [`Effect::Spill`] has ended.
    ///
    /// # Panics
    /// When no such operation is under way, or it cannot have ended like this.
    pub fn spill_done(&mut self, now: Now, io: IoId, done: SpillDone) {
        self.observe(now);
        if let Some((_, place)) = self.spill.read.take_if(|(id, _)| *id == io) {
            let SpillDone::Read(messages, failure) = done else { panic!("a read brings what it can") };
            self.read_back(&place, messages, failure);
        } else if let Some((_, messages)) = self.spill.append.take_if(|(id, _)| *id == io) {
            let failure = failure_of(done);
            self.window.batch_done(&messages, failure.is_none());
            match failure {
                None => {
                    self.spill.alarmed = false;
                    self.window.shed(self.window_share(2));
                }
                Some(why) => self.spill_failed(&why),
            }
        } else {
            let (_, files) = self.spill.remove.take_if(|(id, _)| *id == io).expect("an operation ends once");
            match failure_of(done) {
                None => self.window.ring_mut().expect("it has files").removed(&files),
                Some(why) => self.spill_failed(&why),
            }
        }
        self.release_answers();
        self.pump();
    }

    /// Nothing more is written to it until everything in it is gone: nobody knows what its files hold.
    fn spill_failed(&mut self, why: &str) {
        self.spill.again_at = Some(self.now.monotonic + TRY_AGAIN);
        if !std::mem::replace(&mut self.spill.alarmed, true) {
            let name = &self.settings.name;
            self.effects.push_back(Effect::Alarm(format!(
                "disk {name}: the spill cannot be used ({why}): what the receiver lacks is retained in memory only, and tracked when that is full"
            )));
        }
        self.spill.failure = Some(why.to_owned());
    }

    fn read_back(&mut self, place: &Place, messages: Vec<Message>, failure: Option<String>) {
        let bytes = place.bytes.0;
        if !self.window.loaded(place, messages) {
            return;
        }
        self.counters.unspilled_bytes += bytes;
        let Some(why) = failure else { return };
        self.spill_failed(&why);
        self.window.cut_spill(&mut self.passive);
        if self.mode == Mode::Sync {
            self.enter(Mode::Tracking, Some(Reason::SpillFailed));
            self.release_answers_after_outage();
        }
    }

    /// So many eighths of the window's memory.
    fn window_share(&self, eighths: u64) -> ByteCount {
        ByteCount((self.settings.window_bytes.0 / 8 * eighths).max(1))
    }

    /// Whether something is being written to the spill, or will be when files of it are removed.
    pub(crate) fn is_spilling(&self) -> bool {
        self.spill.append.is_some() || (self.spill.active && self.spill.remove.is_some())
    }

    /// Whether nothing of the log is in the spill or on its way there.
    pub(crate) fn is_spill_idle(&self) -> bool {
        !self.spill.active && self.spill.append.is_none() && !self.window.holds_spill()
    }

    /// Why the window overflowed, if not for the link alone.
    pub(crate) fn why_window_was_not_enough(&self) -> Option<Reason> {
        if self.spill.failure.is_some() {
            return Some(Reason::SpillFailed);
        }
        self.spill.full.then_some(Reason::SpillFull).or(self.refused.then_some(Reason::ReceiverRefuses))
    }

    /// Does whatever the spill needs.
    pub(crate) fn keep_spilling(&mut self) {
        if self.window.ring().is_none() || self.mode == Mode::Detached {
            return;
        }
        self.window.spill.forgets_blocks = self.is_mutant(Mutant::SpillForgetsBlocks);
        self.forgive_spill();
        self.spill.active = self.should_spill();
        let bounded = self.spill.active || self.window.has_gap();
        self.window.limit_in_flight(bounded.then(|| self.window_share(2)));
        if !self.is_connected() {
            self.window.shed(self.window_share(2));
        }
        if self.spill.append.is_none() && self.spill.remove.is_none() {
            self.change_spill();
        }
        let wanted = self.is_connected() && self.window.front_bytes() < self.window_share(1);
        if self.spill.read.is_none()
            && wanted
            && let Some(place) = self.window.read_next()
        {
            let io = self.take_io_id();
            self.spill.read = Some((io, place));
            self.effects.push_back(Effect::Spill(io, SpillOp::Read(place)));
        }
    }

    /// When a spill that failed is tried again, if that lies ahead.
    pub(crate) fn next_spill_try(&self) -> Option<Duration> {
        self.spill.again_at
    }

    /// When nothing is left of what it failed with, it is as good as new.
    fn forgive_spill(&mut self) {
        self.spill.again_at.take_if(|at| *at <= self.now.monotonic);
        let gone = self.window.ring().is_some_and(|ring| ring.bytes().is_zero());
        if gone && self.spill.again_at.is_none() {
            self.spill.failure = None;
        }
    }

    /// The mode is no longer one in which records are written to files.
    pub(crate) fn stop_spilling(&mut self) {
        self.spill.active = false;
    }

    fn should_spill(&self) -> bool {
        if self.mode != Mode::Sync || self.spill.failure.is_some() {
            return false;
        }
        let memory = self.window.retained_bytes();
        let behind = self.window.has_gap() || self.spill.append.is_some();
        let goes_on = self.spill.active && (behind || memory > self.window_share(2));
        self.spill.leaving || !self.is_connected() || goes_on || memory > self.window_share(3)
    }

    /// Removes files that nothing is left in; otherwise writes what is next.
    fn change_spill(&mut self) {
        let ring = self.window.ring_mut().expect("the caller saw it");
        if ring.has_removable() && self.spill.again_at.is_none() {
            let files = ring.take_removable();
            let io = self.take_io_id();
            self.effects.push_back(Effect::Spill(io, SpillOp::Remove(files.clone())));
            self.spill.remove = Some((io, files));
            return;
        }
        let unit = ring.limits().unit;
        self.spill.full = false;
        let Some(history) = self.history.filter(|_| self.spill.active) else { return };
        let Some(batch) = self.window.next_batch(unit) else { return };
        let header = FileHeader {
            disk: self.settings.disk,
            history,
            epoch: self.settings.epoch,
            number: 0,
            first: 0,
            base: batch.base,
        };
        let Some(slot) = self.window.ring().and_then(|ring| ring.slot(batch.bytes, header)) else {
            self.spill.full = true;
            return;
        };
        let (messages, asked) = self.window.write_batch(batch, slot);
        if asked {
            self.suspend_verify();
        }
        self.counters.spilled_bytes += batch.bytes.0;
        let io = self.take_io_id();
        self.effects.push_back(Effect::Spill(io, SpillOp::Append(slot, messages.clone())));
        self.spill.append = Some((io, messages));
    }

    /// The disk is about to be detached: what the receiver has not got goes to the spill.
    pub fn prepare_detach(&mut self, now: Now) {
        self.observe(now);
        self.spill.leaving = !self.is_drained();
        self.pump();
    }

    /// Whether a detach need not wait for the spill any more.
    pub fn is_spill_settled(&self) -> bool {
        let under_way =
            self.spill.append.is_some() || self.spill.remove.is_some() || self.spill.read.is_some();
        let wanted = self.mode == Mode::Sync && self.spill.failure.is_none() && !self.spill.full;
        let is_whole = self.window.ring().is_none() || self.window.is_all_spilled();
        !under_way && (is_whole || !wanted || self.window.is_spill_held())
    }

    /// Whether something of the log is in the spill.
    pub fn holds_spill(&self) -> bool {
        self.window.holds_spill()
    }

    /// Where the log ends, if with the spill nothing is missing.
    pub(crate) fn complete_in_spill(&self) -> Option<Lsn> {
        let nothing_dirty = self.owes_no_resync() && self.activity.doubtful().is_empty();
        let complete = nothing_dirty && self.window.is_all_spilled();
        (complete && !self.window.is_empty()).then(|| self.window.log_end())
    }

    pub(crate) fn spill_status(&self) -> Option<SpillStatus> {
        let ring = self.window.ring()?;
        Some(SpillStatus {
            bytes: ring.bytes(),
            limit: ring.limits().bytes,
            unread: self.window.unread_bytes(),
            from: ring.base(),
            records: ring.records_above(self.window.base()),
            full: self.spill.full,
            failure: self.spill.failure.clone(),
        })
    }

    /// Only ever by mistake.
    pub(crate) fn trim_spill_too_early(&mut self) {
        if self.is_mutant(Mutant::SpillTrimsReceived) {
            self.window.trim_received();
        }
    }
}

fn failure_of(done: SpillDone) -> Option<String> {
    match done {
        SpillDone::Durable => None,
        SpillDone::Failed(why) => Some(why),
        SpillDone::Read(..) => panic!("only a read brings something"),
    }
}
