//! A guest's change, from the request to its place in the history.
//!
//! Invariants: overlapping changes are serialized by the guard; a change gets its LSN when its local
//! I/O has completed and before the guest is answered, in the same step that puts it into the
//! window or into a bitmap; a failed one gets none, and its blocks are dirty.

use std::time::Duration;

use backtide_protocol::{Data, Message, Record, RecordBody};
use backtide_units::{BlockRange, ByteCount, ByteRange, Lsn, Reason};
use bytes::Bytes;

use crate::{
    courtesy::{Request, Watch},
    event::{Change, Effect, IoFailure, IoId, LocalData, LocalOp, Now, RequestId},
    filter::{Filter, Link, Mode},
    give_way::Arrival,
    mutant::Mutant,
    pass::{NewWrites, Pass, Phase},
    recall::Recall,
    verify::VerifyRun,
};

/// A local I/O under way.
#[derive(Clone, Debug)]
pub(crate) enum Ongoing {
    /// A guest's change.
    Change(ChangeOngoing),
    /// A guest's flush, which covers everything up to the LSN.
    Flush(RequestId, Lsn, Watch),
    /// Old content read before a change overwrites it.
    Copy(CopyOngoing),
    /// A copy whose change did not wait for it.
    Abandoned,
    /// A read of the drain, of this run.
    Drain(BlockRange),
    /// A read of a verify.
    Verify(VerifyRun),
    /// A read for the receiver.
    Recall(Recall),
    /// A flush of the filter's own.
    Settle,
}

#[derive(Clone, Debug)]
pub(crate) struct ChangeOngoing {
    request: RequestId,
    change: Change,
    blocks: BlockRange,
    asked: Arrival,
    /// The T of the pass that was frozen while this was under way.
    pub(crate) frozen_into: Option<Lsn>,
}

#[derive(Clone, Debug)]
pub(crate) struct CopyOngoing {
    change: CopyWait,
    /// The blocks being read.
    hull: BlockRange,
    /// The pass that counts them in its buffer.
    counted_by: Lsn,
}

/// A change that waits for its turn at the guard.
#[derive(Clone, Debug)]
pub(crate) enum Queued {
    Change(RequestId, Change, Arrival),
    /// The drain's run.
    Drain(BlockRange),
    /// A verify's run.
    Verify(VerifyRun),
}

/// A change that holds its range and waits for old content to be copied, or told.
#[derive(Clone, Debug)]
pub(crate) struct CopyWait {
    request: RequestId,
    change: Change,
    blocks: BlockRange,
    asked: Arrival,
    /// Since when.
    since: Duration,
    deadline: Duration,
}

/// The longest run of blocks copied before a write: larger ones forfeit the pass.
const COPY_BYTES_MAX: u64 = 4 * 1024 * 1024;

/// Payloads below this size share a read buffer with others, which they would keep in memory.
const SHARED_BYTES_MAX: usize = 64 * 1024;

/// The bytes in memory of their own, where they may be a small part of something large.
pub(crate) fn compact(bytes: Bytes) -> Bytes {
    if bytes.len() < SHARED_BYTES_MAX { Bytes::copy_from_slice(&bytes) } else { bytes }
}

impl ChangeOngoing {
    pub(crate) fn blocks(&self) -> BlockRange {
        self.blocks
    }
}

impl Filter {
    /// A guest's change. Its range lies within the disk (the export checks that); it is answered
    /// by [`Effect::Complete`].
    ///
    /// # Panics
    /// When the range is beyond the disk, or data and range differ in length.
    pub fn submit(&mut self, now: Now, request: RequestId, change: Change) {
        self.observe(now);
        let Some(range) = change.range() else {
            // What a flush covers has an LSN the log reaches, or none is waited for.
            let covers = if self.is_forwarding() { self.window.log_end() } else { self.last_lsn };
            let io = self.take_io_id();
            self.activity.flush_begins(io);
            self.hasten_for_flush(covers);
            self.ongoing.insert(io, Ongoing::Flush(request, covers, self.pace.watch(now.monotonic)));
            self.effects.push_back(Effect::Local(io, LocalOp::Change(Change::Flush)));
            return;
        };
        assert!(range.end().0 <= self.settings.size.0, "{range} is beyond the disk");
        if let Change::Write { data, .. } = &change {
            assert_eq!(data.len() as u64, range.count().0, "a write as long as its range");
        }
        if range.is_empty() {
            self.effects.push_back(Effect::Complete { request, result: Ok(self.last_lsn) });
            return;
        }
        let blocks = BlockRange::touched_by(range);
        let ticket = self.take_ticket();
        let at = self.now.monotonic;
        let mut asked = Arrival::now(at, self.pace.watch(at));
        if self.guard.acquire(ticket, blocks) {
            self.begin_change(request, change, asked);
        } else {
            asked.behind_read = self.is_behind_read(blocks);
            self.queued.insert(ticket, Queued::Change(request, change, asked));
            self.give_way_to_overdue();
        }
    }

    /// A local I/O of [`Effect::Local`] has ended.
    ///
    /// # Panics
    /// When no such I/O is under way.
    pub fn local_done(&mut self, now: Now, io: IoId, result: Result<LocalData, IoFailure>) {
        self.observe(now);
        let ongoing = self.ongoing.remove(&io).expect("a local I/O ends once");
        match ongoing {
            Ongoing::Change(change) => self.change_done(change, result.map(|_| ())),
            Ongoing::Flush(request, covers, watch) => {
                self.pace.guest_took(self.now.monotonic, watch, Request::Flush);
                self.flush_ended(io, result.is_ok());
                self.flush_done(request, covers, result.map(|_| ()));
            }
            Ongoing::Copy(copy) => self.copy_done(copy, result),
            Ongoing::Abandoned => {}
            Ongoing::Drain(run) => {
                self.read_ended(io);
                self.drain_read_done(io, run, result);
            }
            Ongoing::Verify(run) => {
                self.read_ended(io);
                self.verify_read_done(run, result);
            }
            Ongoing::Recall(recall) => self.recall_done(recall, result),
            Ongoing::Settle => {
                self.flush_ended(io, result.is_ok());
                self.settled(result.map(|_| ()));
            }
        }
        self.pump();
    }

    /// The range is held and hot. Copy what a running pass still needs of it, then change it.
    pub(crate) fn begin_hot_change(&mut self, request: RequestId, change: Change, asked: Arrival) {
        let range = change.range().expect("flushes take no range");
        let blocks = BlockRange::touched_by(range);
        let deadline = asked.at + self.settings.guest_delay_max;
        let wait = CopyWait { request, change, blocks, asked, since: self.now.monotonic, deadline };
        if !self.tell_zeroes_before_change(blocks, deadline) {
            return self.waiting_for_buffer.push_back(wait);
        }
        match self.copy_needed(blocks) {
            None => self.start_change(wait),
            Some(_) if deadline <= self.now.monotonic => self.forfeit_and_start(wait),
            // Every block taken out of its middle makes it larger, and a copy would take one out.
            Some(_) if self.active_exceeds_bound() => self.forfeit_and_start(wait),
            Some(hull) if hull.count().bytes().0 > COPY_BYTES_MAX => self.forfeit_and_start(wait),
            Some(hull) if self.buffer_has_room(hull) => self.start_copy(wait, hull),
            Some(_) => self.waiting_for_buffer.push_back(wait),
        }
    }

    /// The blocks, from the first to the last of `blocks`, whose content at T would be lost.
    fn copy_needed(&self, blocks: BlockRange) -> Option<BlockRange> {
        let pass = self.pass.as_ref().filter(|pass| pass.phase == Phase::Draining && !pass.forfeited)?;
        if self.is_mutant(Mutant::NoCopyBeforeWrite) {
            return None;
        }
        let mut runs = pass.active.runs(blocks, blocks.count());
        let first = runs.next()?;
        let last = runs.last().unwrap_or(first);
        Some(BlockRange::between(first.start(), last.end()))
    }

    fn start_copy(&mut self, wait: CopyWait, hull: BlockRange) {
        let io = self.take_io_id();
        let pass = self.pass.as_mut().expect("only a pass needs copies");
        pass.reading_bytes += hull.count().bytes().0;
        let counted_by = pass.at;
        self.effects.push_back(Effect::Local(io, LocalOp::Read(hull.bytes(self.settings.size))));
        self.ongoing.insert(io, Ongoing::Copy(CopyOngoing { change: wait, hull, counted_by }));
    }

    fn uncount_copy(&mut self, hull: BlockRange, counted_by: Lsn) {
        if let Some(pass) = &mut self.pass
            && pass.at == counted_by
        {
            pass.reading_bytes -= hull.count().bytes().0;
        }
    }

    fn copy_done(&mut self, copy: CopyOngoing, result: Result<LocalData, IoFailure>) {
        let CopyOngoing { change, hull, counted_by } = copy;
        self.uncount_copy(hull, counted_by);
        // Asked anew: the pass may have ended, been lost or forfeited meanwhile.
        let Some(needed) = self.copy_needed(change.blocks) else { return self.start_change(change) };
        match result {
            Ok(read) if needed == hull => {
                self.counters.copies_before_write += 1;
                self.deliver_content(hull, read.read());
                self.start_change(change);
            }
            Ok(_) => self.forfeit_and_start(change),
            Err(failure) => {
                self.effects.push_back(Effect::ReadFailed { range: hull.bytes(self.settings.size), failure });
                self.forfeit_and_start(change);
            }
        }
    }

    pub(crate) fn next_copy_deadline(&self) -> Option<Duration> {
        let reading = self.ongoing.values().filter_map(|ongoing| match ongoing {
            Ongoing::Copy(copy) => Some(copy.change.deadline),
            Ongoing::Change(_)
            | Ongoing::Flush(..)
            | Ongoing::Abandoned
            | Ongoing::Drain(_)
            | Ongoing::Verify(_)
            | Ongoing::Recall(_)
            | Ongoing::Settle => None,
        });
        // Only a pass has copies; without one nothing is searched.
        if self.pass.is_none() && self.waiting_for_buffer.is_empty() {
            return None;
        }
        reading.chain(self.waiting_for_buffer.iter().map(|wait| wait.deadline)).min()
    }

    /// The guest comes first: a change that has waited its time goes ahead, and the pass loses its T.
    pub(crate) fn give_up_overdue_copies(&mut self) {
        let now = self.now.monotonic;
        let overdue = self.abandon_copies(|copy| copy.change.deadline <= now);
        for change in overdue {
            self.forfeit_and_start(change);
        }
        if self.waiting_for_buffer.iter().any(|wait| wait.deadline <= now) {
            self.forfeit();
        }
        self.retry_copies();
    }

    /// Nobody waits for these copies any more; their changes have to be started.
    fn abandon_copies(&mut self, which: impl Fn(&CopyOngoing) -> bool) -> Vec<CopyWait> {
        let mut abandoned = Vec::new();
        for ongoing in self.ongoing.values_mut() {
            if matches!(ongoing, Ongoing::Copy(copy) if which(copy))
                && let Ongoing::Copy(copy) = std::mem::replace(ongoing, Ongoing::Abandoned)
            {
                abandoned.push(copy);
            }
        }
        for copy in &abandoned {
            self.uncount_copy(copy.hull, copy.counted_by);
        }
        abandoned.into_iter().map(|copy| copy.change).collect()
    }

    /// Room in the buffer, or a pass that needs no copies any more.
    pub(crate) fn retry_copies(&mut self) {
        let needs = |pass: &Pass| pass.phase == Phase::Draining && !pass.forfeited;
        if !self.pass.as_ref().is_some_and(needs) {
            let pointless = self.abandon_copies(|_| true);
            for change in pointless {
                self.start_change(change);
            }
        }
        while let Some(wait) = self.waiting_for_buffer.front() {
            let (blocks, deadline) = (wait.blocks, wait.deadline);
            if !self.tell_zeroes_before_change(blocks, deadline) {
                return;
            }
            let needed = self.copy_needed(blocks);
            if needed.is_some_and(|hull| !self.buffer_has_room(hull)) {
                return;
            }
            let wait = self.waiting_for_buffer.pop_front().expect("seen just now");
            match needed {
                Some(hull) => self.start_copy(wait, hull),
                None => self.start_change(wait),
            }
        }
    }

    fn forfeit_and_start(&mut self, change: CopyWait) {
        self.forfeit();
        self.start_change(change);
    }

    pub(crate) fn forfeit(&mut self) {
        if let Some(pass) = &mut self.pass
            && pass.phase == Phase::Draining
            && !pass.forfeited
        {
            pass.forfeited = true;
            self.counters.forfeited += 1;
        }
    }

    fn start_change(&mut self, wait: CopyWait) {
        let exceeds = self.active_exceeds_bound();
        let CopyWait { request, change, blocks, mut asked, since, .. } = wait;
        asked.delayed += self.now.monotonic.saturating_sub(since);
        if let Some(job) = &mut self.verify {
            job.note_change(blocks);
        }
        // Dirty before the write: the block leaves this pass and is the next one's.
        if let Some(pass) = &mut self.pass
            && pass.forfeited
            && pass.new_writes == NewWrites::Coalesced
        {
            if !exceeds {
                pass.active.remove(blocks);
            }
            self.passive.insert(blocks);
        }
        let io = self.take_io_id();
        self.effects.push_back(Effect::Local(io, LocalOp::Change(change.clone())));
        let ongoing = ChangeOngoing { request, change, blocks, asked, frozen_into: None };
        self.ongoing.insert(io, Ongoing::Change(ongoing));
    }

    fn change_done(&mut self, done: ChangeOngoing, result: Result<(), IoFailure>) {
        let ChangeOngoing { request, change, blocks, asked, frozen_into } = done;
        let stable = change.wants_stable();
        let bytes = change.range().map_or(ByteCount::ZERO, ByteRange::count);
        self.pace.guest_took(self.now.monotonic, asked.watch, Request::Change(bytes));
        self.activity_changed(blocks);
        if let Some(scanning) = &mut self.scanning {
            scanning.touched.insert(blocks);
        }
        // A pass frozen while this was under way has its blocks, and cannot drain them before now.
        let in_pass = self.pass.as_ref().is_some_and(|pass| Some(pass.at) == frozen_into);
        match result {
            Ok(()) => {
                let lsn = match frozen_into.filter(|_| in_pass) {
                    Some(at) => at,
                    None => self.record(change, blocks),
                };
                self.release(blocks);
                self.answer(request, lsn, stable, asked.delayed);
            }
            Err(failure) => {
                self.counters.failed_changes += 1;
                if stable {
                    self.stability_failed();
                }
                if !in_pass {
                    self.passive.insert(blocks);
                }
                self.release(blocks);
                self.effects.push_back(Effect::Complete { request, result: Err(failure) });
            }
        }
    }

    /// The change has happened: gives it its LSN, and it goes into the window or the passive bitmap.
    fn record(&mut self, change: Change, blocks: BlockRange) -> Lsn {
        let lsn = self.take_lsn();
        let time = self.stamp();
        self.counters.records += 1;
        if !self.is_forwarding() {
            let news = self.passive.insert(blocks);
            self.note_changed(news.bytes());
            self.note_written(&change);
            return lsn;
        }
        if self.pass.is_none() && self.passive_zeroes.touches(blocks) {
            // A pass waits for the spill to be empty, and is going to say that they were zeroes at its T.
            self.passive_zeroes.remove(blocks);
            self.passive.insert(blocks);
        }
        let (range, body) = match change {
            Change::Write { range, data, .. } => (range, RecordBody::Write(Data::capture(compact(data)))),
            Change::Zero { range, trim: true, .. } => (range, RecordBody::Trim),
            Change::Zero { range, trim: false, .. } => (range, RecordBody::Zero),
            Change::Flush => unreachable!("a flush is no record"),
        };
        self.note_changed(range.count());
        let exceeds = self.active_exceeds_bound();
        let previous = self.window.log_end();
        self.window.push(Message::Record(Record { lsn, previous, time, range, body }));
        if let Some(pass) = &mut self.pass
            && pass.forfeited
            && !exceeds
        {
            // Every offered point will be above this record, which says all there is to say.
            pass.active.remove(BlockRange::covered_by(range, self.settings.size));
        }
        if self.window.retained_bytes() > self.settings.window_bytes {
            self.overflow();
        }
        lsn
    }

    /// Whether the active bitmap has no room for more blocks taken out of its middle.
    fn active_exceeds_bound(&self) -> bool {
        self.pass.as_ref().is_some_and(|pass| pass.active.exceeds_bound())
    }

    /// Whether changes become records.
    pub(crate) fn is_forwarding(&self) -> bool {
        match self.mode {
            Mode::Sync => true,
            Mode::Resync => self.pass.as_ref().is_some_and(|pass| pass.new_writes == NewWrites::Forwarded),
            Mode::Tracking | Mode::Paused | Mode::Detached => false,
        }
    }

    /// The window is full: its records become dirty blocks.
    fn overflow(&mut self) {
        self.counters.overflows += 1;
        let why = self.why_window_was_not_enough();
        match (&self.link, self.mode) {
            (Link::Down, _) => {
                self.window.abandon_unspilled(&mut self.passive);
                self.enter(Mode::Tracking, Some(why.unwrap_or(Reason::ReceiverAway)));
            }
            (Link::Up { .. }, Mode::Resync) => {
                self.window.abandon_unsent_records(&mut self.passive);
                self.slow = true;
                let pass = self.pass.as_mut().expect("a resync is a pass");
                pass.new_writes = NewWrites::Coalesced;
            }
            (Link::Up { .. }, _) => {
                self.window.abandon_unsent_records(&mut self.passive);
                self.slow = true;
                self.enter(Mode::Tracking, Some(why.unwrap_or(Reason::LinkTooSlow)));
            }
        }
        self.release_answers_after_outage();
    }

    fn flush_done(&mut self, request: RequestId, covers: Lsn, result: Result<(), IoFailure>) {
        if let Err(failure) = result {
            self.effects.push_back(Effect::Complete { request, result: Err(failure) });
            return;
        }
        if let Some(failure) = self.activity.take_untold() {
            // The system told the filter of lost pages, and tells nobody twice.
            self.effects.push_back(Effect::Complete { request, result: Err(failure) });
            return;
        }
        self.counters.flushes += 1;
        let lsn = covers.min(self.window.log_end());
        if self.is_forwarding() && lsn > self.flushed_to && lsn >= self.window.base() {
            self.flushed_to = lsn;
            let time = self.stamp();
            self.window.push(Message::Flush { lsn, time });
        }
        self.answer(request, covers, true, Duration::ZERO);
    }

    /// Gives a range back; whoever waited for it goes on.
    pub(crate) fn release(&mut self, blocks: BlockRange) {
        for ticket in self.guard.release(blocks) {
            match self.queued.remove(&ticket).expect("who waits is queued") {
                Queued::Change(request, change, mut asked) => {
                    if asked.behind_read {
                        asked.delayed += self.now.monotonic.saturating_sub(asked.at);
                    }
                    self.begin_change(request, change, asked);
                }
                Queued::Drain(run) => self.queued_drain_admitted(run),
                Queued::Verify(run) => self.queued_verify_admitted(run),
            }
        }
    }
}
