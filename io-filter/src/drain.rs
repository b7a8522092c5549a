//! The drain: walks the active bitmap and puts the blocks' content at T on its way.
//!
//! A run is read under the range guard, so that no change is under way in it; its bits are cleared
//! in the step that puts its content into the window, never before.

use std::time::Duration;

use backtide_protocol::{Data, Message, message::COMPARE_CHUNK_BYTES_MAX};
use backtide_units::{BlockCount, BlockIndex, BlockRange, ByteCount, ByteRange, Lsn, is_zeroes};
use bytes::Bytes;

use crate::{
    capture::{Ongoing, Queued},
    event::{Effect, IoFailure, IoId, LocalData, LocalOp},
    filter::Filter,
    mutant::Mutant,
    pass::{NewWrites, Pass, Phase},
    unreadable::stretch_around,
};

/// The longest run read at once.
pub(crate) const RUN_BLOCKS_MAX: BlockCount = BlockCount(256);

/// Drain reads under way at once: enough to keep a disk busy, few enough for the guest's own.
const READS_MAX: usize = 4;

/// So often a pass tries to read a block, alone.
const READ_TRIES_MAX: u32 = 5;

/// So often it is looked whether a pass gains on the guest.
const GROUND_LOOK: Duration = Duration::from_secs(1);

impl Filter {
    /// Starts as many reads as the buffer allows.
    pub(crate) fn drain(&mut self) {
        self.ask_about_zeroes();
        self.look_at_ground();
        while let Some(run) = self.next_drain_run() {
            self.start_drain_read(run);
        }
    }

    /// Whether the resync buffer can take the blocks; an empty one takes any.
    pub(crate) fn buffer_has_room(&self, run: BlockRange) -> bool {
        let Some(pass) = &self.pass else { return true };
        let used = self.window.data_bytes().0 + pass.buffered();
        used == 0 || used + run.count().bytes().0 <= self.settings.resync_buffer_bytes.0
    }

    /// The next run that is free, already taken at the guard.
    fn next_drain_run(&mut self) -> Option<BlockRange> {
        let pass = self.pass.as_ref().filter(|pass| pass.phase == Phase::Draining)?;
        if pass.reads.len() >= READS_MAX || pass.queued.is_some() || pass.active.is_empty() {
            return None;
        }
        if !self.window.has_places() || pass.unreadable.pause(self.now.monotonic).is_some() {
            return None;
        }
        if self.next_paced_read().is_some() {
            return None;
        }
        self.forget_changed();
        let pass = self.pass.as_ref()?;
        let in_flight_max = self.pace.in_flight_max();
        if in_flight_max.is_some_and(|max| pass.reading_bytes >= max.0) {
            return None;
        }
        let end = self.all_blocks().end();
        let start = pass.cursor;
        let found = match pass.unreadable.is_full() {
            true => self.free_retry(pass),
            false => self.free_run(pass, start, end).or_else(|| self.free_run(pass, BlockIndex(0), end)),
        };
        let idle = pass.reads.is_empty() && !pass.unreadable.is_full();
        let Some(run) = found else {
            if idle {
                self.queue_for_a_busy_run();
            }
            return None;
        };
        let run = at_most(run, in_flight_max);
        if !self.buffer_has_room(run) {
            return None;
        }
        assert!(self.guard.try_acquire(run), "the run was free");
        let pass = self.pass.as_mut().expect("there is one");
        pass.cursor = run.end();
        Some(run)
    }

    /// When the drain or a verify may read on, if the limit or the guest holds it back and nothing else
    /// does.
    pub(crate) fn next_paced_read(&self) -> Option<Duration> {
        // First what mostly ends it: every event looks here. What waits for a read to end hears of that.
        let due = self.pace.due(self.now.monotonic).filter(|due| *due < Duration::MAX)?;
        let drains =
            |pass: &Pass| pass.phase == Phase::Draining && !pass.active.is_empty() && pass.queued.is_none();
        self.pass.as_ref().map_or_else(|| self.has_to_verify(), drains).then_some(due)
    }

    /// A pass that gathers new writes and does not gain on them is held back by nothing any more.
    fn look_at_ground(&mut self) {
        let now = self.now.monotonic;
        let Some(pass) = self.pass.as_mut().filter(|pass| pass.new_writes == NewWrites::Coalesced) else {
            return;
        };
        let due = |(since, _, _): (Duration, _, _)| now.saturating_sub(since) >= GROUND_LOOK;
        if self.pace.rate().is_none() || pass.ground.is_some_and(|ground| !due(ground)) {
            return;
        }
        let (left, gathered) = (pass.active.count(), self.passive.count());
        if let Some((_, left_then, gathered_then)) = pass.ground.replace((now, left, gathered)) {
            let drained = left_then.0.saturating_sub(left.0);
            self.pace.set_free(gathered.0.saturating_sub(gathered_then.0) >= drained);
        }
    }

    /// The first readable run in `[from, end)` that nobody changes or reads.
    fn free_run(&self, pass: &Pass, from: BlockIndex, end: BlockIndex) -> Option<BlockRange> {
        let mut from = from;
        while let Some(run) = self.readable_run(pass, from, end) {
            if self.guard.is_free(run) {
                return Some(run);
            }
            // A part of it may be free: try its first block alone before going on behind it.
            let first = alone(run.start());
            if self.guard.is_free(first) {
                return Some(first);
            }
            from = self.guard.busy_until(first);
        }
        None
    }

    /// A block to be tried again that nobody changes or reads.
    fn free_retry(&self, pass: &Pass) -> Option<BlockRange> {
        pass.unreadable.due(self.now.monotonic).map(alone).find(|run| self.guard.is_free(*run))
    }

    /// Blocks that could not be read and have been changed since, where that took them out of the pass, are not waited for.
    fn forget_changed(&mut self) {
        let now = self.now.monotonic;
        let Some(pass) = self.pass.as_mut().filter(|pass| pass.unreadable.is_full()) else { return };
        let is_gone = |block: &BlockIndex| !pass.active.touches(alone(*block));
        let gone: Vec<BlockIndex> = pass.unreadable.due(now).filter(is_gone).collect();
        for block in gone {
            pass.unreadable.forget(block);
        }
    }

    /// The first run of active blocks that may be tried now.
    fn readable_run(&self, pass: &Pass, from: BlockIndex, end: BlockIndex) -> Option<BlockRange> {
        let mut from = from;
        loop {
            let run = pass.active.next_run(from, end, RUN_BLOCKS_MAX)?;
            if let Some(readable) = pass.unreadable.readable(run, self.now.monotonic) {
                return Some(readable);
            }
            from = BlockIndex(run.start().0 + 1);
        }
    }

    /// Everything left is being changed all the time: wait for a turn like any change.
    fn queue_for_a_busy_run(&mut self) {
        let end = self.all_blocks().end();
        let pass = self.pass.as_ref().expect("the caller has one");
        let Some(run) = self.readable_run(pass, BlockIndex(0), end) else { return };
        let first = alone(run.start());
        let ticket = self.take_ticket();
        if self.guard.acquire(ticket, first) {
            return self.start_drain_read(first);
        }
        self.queued.insert(ticket, Queued::Drain(first));
        self.pass.as_mut().expect("the caller has one").queued = Some(first);
    }

    /// The run's turn has come; the pass may be another one by now, or none.
    pub(crate) fn queued_drain_admitted(&mut self, run: BlockRange) {
        let wanted = match &mut self.pass {
            Some(pass) if pass.queued == Some(run) => {
                pass.queued = None;
                pass.phase == Phase::Draining && pass.active.touches(run)
            }
            Some(_) | None => false,
        };
        if wanted { self.start_drain_read(run) } else { self.release(run) }
    }

    fn start_drain_read(&mut self, run: BlockRange) {
        let io = self.take_io_id();
        let pass = self.pass.as_mut().expect("only a pass drains");
        pass.reads.insert(io, run);
        pass.reading_bytes += run.count().bytes().0;
        self.hold_for_read(io, run);
        if self.is_mutant(Mutant::ClearBeforeRead)
            && let Some(pass) = &mut self.pass
        {
            pass.active.remove(run);
        }
        self.ongoing.insert(io, Ongoing::Drain(run));
        self.effects.push_back(Effect::Local(io, LocalOp::Read(run.bytes(self.settings.size))));
    }

    /// A read was given up for the guest's sake: its blocks are as active as before.
    pub(crate) fn drain_gave_way(&mut self, io: IoId, run: BlockRange) {
        if let Some(pass) = &mut self.pass
            && pass.reads.remove(&io).is_some()
        {
            pass.reading_bytes -= run.count().bytes().0;
            pass.unreadable.gave_way(run);
        }
    }

    pub(crate) fn drain_read_done(
        &mut self,
        io: IoId,
        run: BlockRange,
        result: Result<LocalData, IoFailure>,
    ) {
        let ours = self.pass.as_mut().and_then(|pass| pass.reads.remove(&io).map(|_| pass));
        if let Some(pass) = ours {
            pass.reading_bytes -= run.count().bytes().0;
            match result {
                Ok(read) => {
                    let stretch = stretch_around(run.start());
                    let others = [(stretch.start(), run.start()), (run.end(), stretch.end())];
                    let more = others.map(|(from, to)| pass.active.touches(BlockRange::between(from, to)));
                    pass.unreadable.succeeded(run, more.contains(&true));
                    self.drained(run, read);
                }
                Err(failure) => self.note_unreadable(run, failure),
            }
        }
        self.release(run);
        self.retry_copies();
    }

    fn drained(&mut self, run: BlockRange, read: LocalData) {
        let pass = self.pass.as_ref().expect("the caller has one");
        if pass.compare {
            let (bytes, items) = read.read_to_compare(run.bytes(self.settings.size));
            self.ask_about(run, &bytes, items);
        } else {
            let (bytes, prepared) = read.read_to_send();
            self.deliver_prepared(run, bytes, prepared);
        }
    }

    fn note_unreadable(&mut self, run: BlockRange, failure: IoFailure) {
        let (now, retry) = (self.now.monotonic, self.settings.read_retry);
        let pass = self.pass.as_mut().expect("the caller has one");
        pass.unreadable.failed(run, now, retry);
        // What lies elsewhere comes first: the next block is likely to be as bad.
        let stretch = stretch_around(run.start());
        if pass.cursor > stretch.start() && pass.cursor < stretch.end() {
            pass.cursor = stretch.end();
        }
        if run.count() == BlockCount(1) {
            let tries = pass.unreadable.try_again(run.start(), now + retry);
            let is_wanted = pass.active.touches(run);
            if tries >= READ_TRIES_MAX || !is_wanted {
                pass.unreadable.forget(run.start());
            }
            if tries >= READ_TRIES_MAX && is_wanted {
                // The pass ends without it, and without a point.
                pass.active.remove(run);
                pass.given_up.insert(run);
                self.passive.insert(run);
                // The disk is not in sync before it can be read.
                self.verify_cannot_read(run.bytes(self.settings.size), failure);
            }
        }
        self.counters.failed_reads += 1;
        self.effects.push_back(Effect::ReadFailed { range: run.bytes(self.settings.size), failure });
    }

    /// `bytes` is what the hull's active blocks held at T: sends those, and clears their bits.
    pub(crate) fn deliver_content(&mut self, hull: BlockRange, bytes: Bytes) {
        self.deliver_prepared(hull, bytes, None);
    }

    /// The same; `prepared` is of good use when all of the hull is still active.
    fn deliver_prepared(&mut self, hull: BlockRange, bytes: Bytes, mut prepared: Option<Data>) {
        let size = self.settings.size;
        let pass = self.pass.as_mut().expect("only a pass delivers");
        let at = pass.at;
        let runs: Vec<BlockRange> = pass.active.runs(hull, RUN_BLOCKS_MAX).collect();
        for run in runs {
            let range = run.bytes(size);
            let skip = usize::try_from(range.start().0 - hull.start().start().0).expect("a hull is small");
            let length = usize::try_from(range.count().0).expect("a run is small");
            pass.active.remove(run);
            let part = bytes.slice(skip..skip + length);
            // A small part must not keep the whole read in memory.
            let part = if length < bytes.len() / 2 { Bytes::copy_from_slice(&part) } else { part };
            let message = match prepared.take_if(|_| run == hull) {
                Some(data) => Message::PassData { at, range, data },
                None => pass_data(at, range, part),
            };
            pass.moving += moved_bytes(&message);
            self.window.push(message);
        }
    }
}

fn alone(block: BlockIndex) -> BlockRange {
    BlockRange::between(block, BlockIndex(block.0 + 1))
}

/// The first blocks of a run, as many as may be under way at once; to the end of a chunk of a comparison.
fn at_most(run: BlockRange, in_flight_max: Option<ByteCount>) -> BlockRange {
    let Some(max) = in_flight_max else { return run };
    let chunk = COMPARE_CHUNK_BYTES_MAX / BlockCount(1).bytes().0;
    let chunks = (max.0 / COMPARE_CHUNK_BYTES_MAX).max(1);
    let end = (run.start().0 / chunk + chunks) * chunk;
    BlockRange::between(run.start(), BlockIndex(run.end().0.min(end)))
}

/// What a frame of pass data carries: zeroes are as good as there.
pub(crate) fn moved_bytes(message: &Message) -> u64 {
    match message {
        Message::PassData { data, .. } => data.bytes().len() as u64,
        _ => 0,
    }
}

/// A frame of pass data; zeroes travel without a payload.
pub(crate) fn pass_data(at: Lsn, range: ByteRange, bytes: Bytes) -> Message {
    debug_assert_eq!(ByteCount::of(&bytes), range.count());
    let bytes = if is_zeroes(&bytes) { Bytes::new() } else { bytes };
    Message::PassData { at, range, data: Data::capture(bytes) }
}
