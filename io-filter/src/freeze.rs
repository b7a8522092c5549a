//! The begin and the end of a resync pass: which blocks, at which T, and where new writes go.

use std::{collections::BTreeMap, time::Duration};

use backtide_protocol::Message;
use backtide_tracking::DirtyBitmap;
use backtide_units::{BlockIndex, BlockRange, ByteCount, Reason};

use crate::{
    capture::Ongoing,
    event::{Change, Effect, IoId, Now},
    filter::{Filter, Mode},
    mutant::Mutant,
    pass::{NewWrites, Pass, Phase},
    unreadable::Unreadable,
};

/// How to resync when nothing is known: after a scan for the blocks that may hold data.
#[derive(Clone, Debug, PartialEq)]
pub(crate) struct PassPlan {
    /// Ask the receiver which blocks differ, instead of sending all.
    pub(crate) compare: bool,
    /// Tell the receiver of blocks that hold no data here: it may have some there.
    pub(crate) tell_zeroes: bool,
    /// The only blocks that may differ, when they are known; otherwise all.
    pub(crate) within: Option<DirtyBitmap>,
    pub(crate) reason: Reason,
}

/// A scan under way.
#[derive(Clone, Debug)]
pub(crate) struct Scanning {
    /// Which: an older one, of a connection that was lost, has not seen what changed since.
    pub(crate) io: IoId,
    pub(crate) plan: PassPlan,
    /// Blocks changed since it began: it may have seen them before.
    pub(crate) touched: DirtyBitmap,
}

impl PassPlan {
    /// To a receiver that has nothing.
    pub(crate) fn everything(reason: Reason) -> Self {
        Self { compare: false, tell_zeroes: false, within: None, reason }
    }

    /// To a receiver that has something.
    pub(crate) fn compare(reason: Reason) -> Self {
        Self { compare: true, tell_zeroes: true, within: None, reason }
    }

    /// To a receiver that has something, without asking what.
    pub(crate) fn full(reason: Reason) -> Self {
        Self { compare: false, tell_zeroes: true, within: None, reason }
    }

    /// What does this and another that was asked for later, for the reason of this one: of all blocks that either is about, and
    /// without asking which differ where either does not ask.
    pub(crate) fn joined(self, later: Self) -> Self {
        let within = self.within.zip(later.within).map(|(mut blocks, others)| {
            blocks.union_with(&others);
            blocks
        });
        Self { compare: self.compare && later.compare, tell_zeroes: true, within, reason: self.reason }
    }

    /// The plan as it must be when the receiver turns out to have something.
    pub(crate) fn comparing(self) -> Self {
        Self { tell_zeroes: true, ..self }
    }
}

/// The pauses between passes that could not read some block, in times of its retries, doubling.
const PAUSE_FIRST: u32 = 10;
const PAUSE_LAST: u32 = 300;

/// A pass that should take less than this leaves the hole in the timeline closed at once.
const SHORT_PASS: Duration = Duration::from_secs(2);

impl Filter {
    /// The driver found the blocks that may hold data, since it was told to [`Effect::Scan`].
    pub fn scanned(&mut self, now: Now, io: IoId, allocated: &DirtyBitmap) {
        self.observe(now);
        if self.take_verify_scan(io, allocated) {
            return self.pump();
        }
        // The connection was lost meanwhile: the next one scans again.
        let Some(Scanning { plan, touched, .. }) = self.scanning.take_if(|scanning| scanning.io == io) else {
            return;
        };
        // Within its bound: blocks that are read although they hold nothing cost time only.
        let mut holding_data = self.bounded_bitmap();
        holding_data.union_with(allocated);
        let mut zeroes = DirtyBitmap::of(self.all_blocks());
        if let Some(within) = &plan.within {
            // Extents may reach beyond the disk's end.
            zeroes.intersect_with(within);
            holding_data.intersect_with(&zeroes);
        }
        self.passive.union_with(&holding_data);
        self.passive.union_with(&touched);
        if plan.tell_zeroes {
            zeroes.subtract(&self.passive);
            zeroes.compact();
            self.passive_zeroes.union_with(&zeroes);
        }
        self.passive_compare = plan.compare;
        self.begin_pass_when_possible(plan.reason);
        self.pump();
    }

    /// A scan is given up: what it was for is due again, with what was asked for since.
    pub(crate) fn give_up_scan(&mut self) {
        if let Some(Scanning { plan, .. }) = self.scanning.take() {
            self.lost = Some(match self.lost.take() {
                Some(later) => plan.joined(later),
                None => plan,
            });
        }
    }

    pub(crate) fn begin_pass_if_due(&mut self) {
        if self.mode == Mode::Tracking && self.lost.is_none() && self.pause_between_passes().is_some() {
            return;
        }
        let foreign = self.written_past && !self.is_mutant(Mutant::PassWhileWrittenPast);
        if foreign {
            self.open_hole();
        }
        let may = self.is_connected() && self.pass.is_none() && self.scanning.is_none() && !foreign;
        if !may || !matches!(self.mode, Mode::Tracking | Mode::Sync) || !self.can_begin_pass() {
            return;
        }
        if let Some(reason) = self.spill.pass_wanted.take().filter(|_| self.lost.is_none()) {
            self.begin_pass(reason);
        } else if let Some(plan) = self.lost.take() {
            if self.must_save_everything(&plan) {
                self.lost = Some(plan);
                return;
            }
            let io = self.take_io_id();
            self.scanning = Some(Scanning { io, plan, touched: self.bounded_bitmap() });
            self.effects.push_back(Effect::Scan(io));
        } else if self.mode == Mode::Tracking {
            self.begin_pass(self.reason.unwrap_or(Reason::ReceiverAway));
        } else if !self.passive.is_empty() {
            self.begin_pass(Reason::LocalWriteFailed);
        }
    }

    /// The receiver hears at once that it lacks something: as long as it does not, it has the newest point it has for the
    /// disk's. What it hears is a pass that nothing came of; the one that compares everything follows.
    fn open_hole(&mut self) {
        let due = self.is_connected() && !self.hole_is_open && self.mode == Mode::Tracking;
        let Some(plan) = self.lost.clone().filter(|_| due) else { return };
        // What is in the spill comes before, and what this pass says must be known to an agent that comes after this one.
        if !self.can_begin_pass() || self.must_save_everything(&plan) {
            return;
        }
        let reason = plan.reason;
        let gap_from = self.window.log_end();
        let (at, time) = (self.take_lsn(), self.stamp());
        self.window.push(Message::PassBegin { at, gap_from, time, reason });
        self.window.push(Message::PassEnd { at, valid_from: None, time });
        self.hole_is_open = true;
    }

    /// Its T lies above everything in the spill, and has to leave at once: what is drained waits behind it.
    fn can_begin_pass(&self) -> bool {
        self.is_spill_idle() && !self.window.is_reserve_used(self.last_lsn)
    }

    /// Begins a pass, or has it begin when the spill is empty and there is an LSN for it.
    pub(crate) fn begin_pass_when_possible(&mut self, reason: Reason) {
        if self.can_begin_pass() { self.begin_pass(reason) } else { self.spill.pass_wanted = Some(reason) }
    }

    /// Freezes: T is now. Changes whose local I/O is under way belong to T, later ones do not.
    pub(crate) fn begin_pass(&mut self, reason: Reason) {
        assert!(self.pass.is_none(), "one pass at a time");
        let gap_from = self.window.log_end();
        let at = self.take_lsn();
        let time = self.stamp();
        let mut active = self.passive.take();
        let freezes_ongoing = !self.is_mutant(Mutant::FreezeForgetsOngoing);
        for ongoing in self.ongoing.values_mut().filter(|_| freezes_ongoing) {
            if let Ongoing::Change(change) = ongoing {
                change.frozen_into = Some(at);
                active.insert(change.blocks());
            }
        }
        let mut zeroes = std::mem::take(&mut self.passive_zeroes);
        zeroes.subtract(&active);
        let new_writes = self.new_writes_for(&active);
        let total = ByteCount(active.count().bytes().0);
        // A pass that is not smaller than the one before it loses ground.
        let smaller = self.gathering_total.is_none_or(|last| total.0 < last.0 / 10 * 9);
        self.pace.set_free(new_writes == NewWrites::Coalesced && !smaller);
        self.window.push(Message::PassBegin { at, gap_from, time, reason });
        self.pass = Some(Pass {
            at,
            reason,
            new_writes,
            phase: Phase::Draining,
            compare: std::mem::take(&mut self.passive_compare),
            forfeited: false,
            active,
            zeroes,
            cursor: BlockIndex(0),
            reads: BTreeMap::new(),
            queued: None,
            unreadable: Unreadable::default(),
            given_up: DirtyBitmap::new(),
            compares: BTreeMap::new(),
            compare_bytes: 0,
            hole_bytes: 0,
            reading_bytes: 0,
            started: self.now.monotonic,
            total,
            moving: 0,
            ground: None,
        });
        self.restart_progress();
        self.counters.passes += 1;
        if self.activity.says_everything() {
            // The pass knows better now.
            self.activity.want_snapshot();
        }
        self.enter(Mode::Resync, Some(reason));
        // Answers that wait for the receiver would wait for the whole pass now.
        self.release_answers_after_outage();
    }

    /// Forwarding closes the hole at T, but asks of the link what the guest writes. After an
    /// overflow, only a pass that will be short tries it again.
    fn new_writes_for(&self, active: &DirtyBitmap) -> NewWrites {
        let crowded = self.window.retained_bytes().0 > self.settings.window_bytes.0 / 2;
        let short = match self.pass_rate {
            _ if active.is_empty() => true,
            Some(rate) => active.count().bytes().0 < rate.saturating_mul(SHORT_PASS.as_secs()),
            None => false,
        };
        if self.slow && (crowded || !short) { NewWrites::Coalesced } else { NewWrites::Forwarded }
    }

    pub(crate) fn end_pass_if_drained(&mut self) {
        let log_end = self.window.log_end();
        let time = self.now.wall.after(self.last_time);
        let offers_t = self.is_mutant(Mutant::ForfeitedOffersT);
        let Some(pass) = &mut self.pass else { return };
        if pass.phase != Phase::Draining || !pass.is_drained() {
            return;
        }
        pass.phase = Phase::Ended;
        let valid_from = match (pass.forfeited && !offers_t, pass.new_writes) {
            _ if !pass.given_up.is_empty() => None,
            (false, _) => Some(pass.at),
            // What was drained late holds changes up to here, and their records are in the log.
            (true, NewWrites::Forwarded) => Some(log_end),
            (true, NewWrites::Coalesced) => None,
        };
        let end = Message::PassEnd { at: pass.at, valid_from, time };
        self.last_time = time;
        self.window.push(end);
        self.retry_copies();
    }

    /// Blocks could not be read: the next pass tries them again, later each time.
    fn note_given_up(&mut self, given_up: &DirtyBitmap) {
        if given_up.is_empty() {
            (self.next_pass, self.unreadable) = (None, DirtyBitmap::new());
            return;
        }
        let (first, last) = (self.settings.read_retry * PAUSE_FIRST, self.settings.read_retry * PAUSE_LAST);
        let longer = self.next_pass.map_or(first, |(_, pause)| (pause * 2).min(last));
        self.next_pass = Some((self.now.monotonic + longer, longer));
        self.unreadable = given_up.clone();
        let size = self.settings.size;
        let first = given_up.next_run(BlockIndex(0), self.all_blocks().end(), given_up.count());
        let place = first.map_or_else(String::new, |run| run.bytes(size).to_string());
        self.effects.push_back(Effect::Alarm(format!(
            "disk {}: {} blocks of the local disk cannot be read, the first at bytes {place}: until they can, or the guest writes them, no point can be given",
            self.settings.name,
            given_up.count()
        )));
    }

    /// A change was made while nothing is forwarded: once all that could not be read was written the next pass need not wait.
    pub(crate) fn note_written(&mut self, change: &Change) {
        let Some(range) = change.range().filter(|_| !self.unreadable.is_empty()) else { return };
        self.unreadable.remove(BlockRange::covered_by(range, self.settings.size));
        if self.unreadable.is_empty() {
            self.next_pass = None;
        }
    }

    /// When the next pass may begin, if that lies ahead.
    pub(crate) fn pause_between_passes(&self) -> Option<Duration> {
        self.next_pass.map(|(at, _)| at).filter(|at| *at > self.now.monotonic)
    }

    /// The pass is durable at the receiver.
    pub(crate) fn finish_pass(&mut self) {
        let pass = self.pass.take().expect("a pass has ended");
        // A pass that had nothing to move says nothing about the link.
        if !pass.total.is_zero() {
            let took = self.now.monotonic.saturating_sub(pass.started);
            let micros = u64::try_from(took.as_micros()).unwrap_or(u64::MAX).max(1);
            let rate = u128::from(pass.total.0) * 1_000_000 / u128::from(micros);
            self.pass_rate = Some(u64::try_from(rate).unwrap_or(u64::MAX));
        }
        self.counters.passes_completed += 1;
        self.pace.set_free(false);
        let gathered = pass.new_writes == NewWrites::Coalesced;
        self.gathering_total = gathered.then_some(pass.total);
        self.activity.want_snapshot();
        self.note_given_up(&pass.given_up);
        // What somebody asked for meanwhile begins in sync, as it does when it is asked for there: nothing is missing.
        let asked_for = self.lost.take_if(|plan| plan.reason == Reason::Forced);
        if pass.new_writes == NewWrites::Forwarded && self.lost.is_none() && self.passive.is_empty() {
            self.slow = false;
            self.received_lsn = self.received_lsn.max(self.durable_lsn);
            self.enter(Mode::Sync, None);
            self.lost = asked_for;
            return;
        }
        self.lost = self.lost.take().or(asked_for);
        let reason = match (&self.lost, pass.new_writes) {
            (Some(plan), _) => plan.reason,
            _ if !pass.given_up.is_empty() => Reason::LocalReadFailed,
            (None, NewWrites::Coalesced) => Reason::LinkTooSlow,
            (None, NewWrites::Forwarded) => Reason::LocalWriteFailed,
        };
        self.enter(Mode::Tracking, Some(reason));
    }
}
