//! The agent's side: what a driver of the filter does, what the guest hears, and crashes.

use std::time::Duration;

use backtide_io_filter::{
    AckPolicy, Change, Effect, Filter, IoFailure, IoId, LocalData, LocalOp, Mode, Now, OnOutage, RequestId,
    Resume, Settings,
};
use backtide_tracking::{ActivityLimits, DirtyBitmap};
use backtide_units::{BlockRange, ByteCount, DiskId, Epoch, Lsn, Reason};
use bytes::Bytes;
use uuid::Uuid;

use crate::{
    actions::Crash,
    config::{Config, Op},
    content::{block_of, blocks_in, byte_of, bytes_of, disk_size},
    tracking::{EXTENT, TrackingFile},
    world::{InFlight, Waiting, World},
};

pub(crate) const DISK: DiskId = DiskId(Uuid::from_u128(9));

/// The id of the attach with this epoch.
fn attach_of(epoch: u64) -> Uuid {
    Uuid::from_u128(epoch.into())
}

pub(crate) fn settings(config: &Config, epoch: u64) -> Settings {
    Settings {
        disk: DISK,
        name: "vm1".parse().expect("a name"),
        size: disk_size(config.blocks),
        epoch: Epoch(epoch),
        attach: attach_of(epoch),
        ack: AckPolicy::Local,
        on_outage: OnOutage::Continue,
        outage_after: Duration::from_secs(5),
        read_retry: Duration::from_secs(1),
        unchanged_every: Duration::MAX,
        window_bytes: ByteCount(config.window_bytes),
        bitmap_bytes: ByteCount(1 << 20),
        resync_buffer_bytes: ByteCount(config.buffer_bytes),
        guest_delay_max: config.delay_max,
        activity: ActivityLimits {
            extent: EXTENT,
            hot: config.hot,
            sectors: 8,
            idle: Duration::from_secs(60),
            ..ActivityLimits::default()
        },
    }
}

pub(crate) fn new_filter(config: &Config, epoch: u64, resume: Resume, now: Now) -> Filter {
    let mut filter = Filter::new(settings(config, epoch), resume, now);
    if let Some(mutant) = config.mutant {
        filter.mutate(mutant);
    }
    filter
}

/// The tracking file of an agent that begins with this.
pub(crate) fn first_file(config: &Config, resume: &Resume, old: Option<&TrackingFile>) -> TrackingFile {
    let snapshot = resume.first_snapshot(DISK, settings(config, 1).activity);
    let (history, reserved) = old.map_or((None, Lsn::ZERO), |old| (old.history, old.reserved));
    TrackingFile::new(snapshot, history, reserved)
}

impl World {
    /// Tells the filter something, and does what it wants done.
    pub(crate) fn call(&mut self, config: &Config, event: impl FnOnce(&mut Filter, Now)) {
        let now = self.moment();
        event(&mut self.filter, now);
        self.carry_out(config);
    }

    pub(crate) fn carry_out(&mut self, config: &Config) {
        loop {
            match self.filter.next_effect() {
                Some(effect) => self.carry_out_one(effect),
                None if self.send_one(config) => {}
                None => break,
            }
        }
        self.file.history = self.filter.history();
        self.file.attaches = self.filter.attaches().map(<[_]>::to_vec);
        self.file.reserved = self.file.reserved.max(self.filter.last_lsn());
        self.forget_past_agent();
        self.watch_pass();
    }

    fn carry_out_one(&mut self, effect: Effect) {
        match effect {
            Effect::Local(io, op) => {
                let mark = match &op {
                    LocalOp::Settle | LocalOp::Change(Change::Flush) => self.disk.flush_mark(),
                    LocalOp::Change(_) | LocalOp::Read(_) => Vec::new(),
                };
                self.inflight.insert(io, InFlight { op, landed: false, frozen: None, mark });
            }
            Effect::Tracking(io, op) => {
                self.tracking_ops.insert(io, op);
            }
            Effect::Spill(io, op) => {
                self.spill_ops.insert(io, op);
            }
            Effect::Scan(io) => {
                self.scans.insert(io, self.allocated());
            }
            Effect::Complete { request, result } => {
                self.answered(request, result.expect("no local I/O fails here"));
            }
            Effect::Transition { to: Mode::Resync, .. } => self.freeze(),
            Effect::Transition { from: Mode::Resync, .. } => self.pass = None,
            Effect::Transition { .. } => {}
            Effect::Disconnect { why } => panic!("honest peers do not part: {why}"),
            Effect::Alarm(_) if self.spill_failed || self.file_failed => {}
            Effect::Alarm(why) => panic!("nothing happened that an alarm is right for: {why}"),
            Effect::ReadFailed { range, .. } => panic!("no read fails here: {range}"),
        }
    }

    /// A pass begins: what the disk holds now, and what is under way, belongs to its T.
    fn freeze(&mut self) {
        let pass = self.filter.status().pass.expect("a resync is a pass");
        self.pass = Some((pass.at, u64::MAX));
        for inflight in self.inflight.values_mut().filter(|inflight| inflight.change().is_some()) {
            inflight.frozen = Some(pass.at);
        }
        self.history.resolve(pass.at, &self.disk.values());
    }

    /// A pass only ever shrinks. (Promise 7.)
    fn watch_pass(&mut self) {
        match (&mut self.pass, self.filter.status().pass) {
            (Some((at, left)), Some(pass)) => {
                assert_eq!(*at, pass.at, "one pass follows the other unseen");
                assert!(pass.left.0 <= *left, "the pass at {at} grew from {left} to {} blocks", pass.left.0);
                *left = pass.left.0;
            }
            (None, None) => {}
            (known, found) => panic!("the running pass is {known:?} by its effects and is {found:?}"),
        }
    }

    /// Which blocks may hold data, by bit.
    pub(crate) fn allocated(&self) -> u8 {
        (0..self.disk.count()).filter(|block| self.disk.value(*block) != 0).map(|block| 1 << block).sum()
    }

    pub(crate) fn submit_next(&mut self, config: &Config, writer: u8) {
        let state = &mut self.writers[usize::from(writer)];
        state.waiting = Some(Waiting { floor: self.told, lsn: None, done: false });
        self.send_request(config, writer);
    }

    fn send_request(&mut self, config: &Config, writer: u8) {
        let number = self.writers[usize::from(writer)].next;
        let change = match config.writers[usize::from(writer)][usize::from(number)] {
            Op::Write(block) => {
                let data = Bytes::from(vec![config.value(writer, number)]);
                Change::Write { range: byte_of(block), data, fua: false }
            }
            Op::Trim(block) => Change::Zero { range: block_of(block, config.blocks), trim: true, fua: false },
            Op::Flush => Change::Flush,
        };
        self.call(config, |filter, now| filter.submit(now, RequestId(writer.into()), change));
    }

    /// The guest hears of its request's end.
    fn answered(&mut self, request: RequestId, lsn: Lsn) {
        let writer = &mut self.writers[usize::try_from(request.0).expect("a writer's number")];
        let waiting = writer.waiting.take().expect("a request is answered once");
        writer.next += 1;
        assert!(waiting.done, "nothing is answered before the local disk has it");
        if let Some(given) = waiting.lsn {
            assert_eq!(given, lsn, "the answer names another LSN than the change got");
            assert!(lsn > waiting.floor, "{lsn} is given to a request sent after {}", waiting.floor);
            self.told = self.told.max(lsn);
        }
    }

    pub(crate) fn land(&mut self, io: IoId) {
        let inflight = self.inflight.get_mut(&io).expect("it is under way");
        if !std::mem::replace(&mut inflight.landed, true)
            && let Some((block, value)) = inflight.change()
        {
            self.disk.write(block, value);
        }
    }

    pub(crate) fn local_ends(&mut self, config: &Config, io: IoId) {
        self.land(io);
        let inflight = self.inflight.remove(&io).expect("it is under way");
        let data = match &inflight.op {
            LocalOp::Read(range) => LocalData::Read(bytes_of(*range, |block| self.disk.value(block))),
            LocalOp::Change(_) | LocalOp::Settle => LocalData::Changed,
        };
        match inflight.change() {
            Some((block, value)) => self.change_ends(config, &inflight, block, value),
            None if !inflight.mark.is_empty() => self.flush_ends(config, &inflight),
            None => {}
        }
        self.call(config, |filter, now| filter.local_done(now, io, Ok(data)));
    }

    /// The model learns of a change with the LSN that the filter is about to give it.
    fn change_ends(&mut self, config: &Config, inflight: &InFlight, block: u8, value: u8) {
        let frozen = self.pass.map(|(at, _)| at).filter(|at| inflight.frozen == Some(*at));
        let lsn = frozen.unwrap_or(self.filter.last_lsn().next());
        assert!(frozen.is_some() || lsn > self.history.highest(), "LSN {lsn} is given a second time");
        self.history.change(lsn, block, Some(value));
        let is_this = |writer: usize, number: u8| match config.writers[writer].get(usize::from(number)) {
            Some(Op::Write(_)) => config.value(u8::try_from(writer).expect("few"), number) == value,
            Some(Op::Trim(trimmed)) => value == 0 && *trimmed == block,
            Some(Op::Flush) | None => false,
        };
        let mut writers = self.writers.iter_mut().enumerate();
        let waiting = writers.find_map(|(index, writer)| {
            let number = writer.next;
            writer.waiting.as_mut().filter(|waiting| !waiting.done && is_this(index, number))
        });
        let waiting = waiting.expect("somebody asked for this change");
        (waiting.lsn, waiting.done) = (Some(lsn), true);
    }

    fn flush_ends(&mut self, config: &Config, inflight: &InFlight) {
        let dropped = self.disk.flush(&inflight.mark);
        for other in self.inflight.values_mut() {
            for (mark, dropped) in other.mark.iter_mut().zip(&dropped) {
                *mark = mark.saturating_sub(*dropped);
            }
        }
        if inflight.op != LocalOp::Change(Change::Flush) {
            return;
        }
        for (writer, ops) in self.writers.iter_mut().zip(config.writers) {
            let flushes = ops.get(usize::from(writer.next)) == Some(&Op::Flush);
            if let Some(waiting) = writer.waiting.as_mut().filter(|_| flushes) {
                waiting.done = true;
            }
        }
    }

    pub(crate) fn tracking_ends(&mut self, config: &Config, io: IoId) {
        let op = self.tracking_ops.remove(&io).expect("it is under way");
        self.file.apply(&op);
        self.call(config, |filter, now| filter.tracking_done(now, io, Ok(ByteCount(4096))));
    }

    pub(crate) fn tracking_fails(&mut self, config: &Config, io: IoId, happened: bool) {
        let op = self.tracking_ops.remove(&io).expect("it is under way");
        if happened {
            self.file.apply(&op);
        }
        self.file_failed = true;
        let failure = IoFailure { errno: 28 };
        self.call(config, |filter, now| filter.tracking_done(now, io, Err(failure)));
    }

    pub(crate) fn scan_ends(&mut self, config: &Config, io: IoId, early: bool) {
        let begun = self.scans.remove(&io).expect("it is under way");
        let found = if early { begun } else { self.allocated() };
        let mut allocated = DirtyBitmap::new();
        for block in
            blocks_in(BlockRange::whole_disk(disk_size(config.blocks)).bytes(disk_size(config.blocks)))
        {
            if found & 1 << block != 0 {
                allocated.insert((u64::from(block)..u64::from(block) + 1).into());
            }
        }
        self.call(config, |filter, now| filter.scanned(now, io, &allocated));
    }

    pub(crate) fn tick(&mut self, config: &Config) {
        self.now = self.now.max(self.filter.next_deadline().expect("a tick is due"));
        self.call(config, |filter, now| filter.tick(now));
        let next = self.filter.next_deadline();
        assert!(next.is_none_or(|next| next > self.now), "a tick leaves the deadline where it is");
    }

    pub(crate) fn pause(&mut self, config: &Config) {
        if self.has_connection() {
            self.end_agent_side(config);
        }
        self.paused = true;
        self.call(config, |filter, now| filter.pause(now));
    }

    /// The process dies, perhaps with the whole host, and starts again.
    pub(crate) fn agent_crashes(&mut self, config: &Config, crash: &Crash) {
        let next = self.filter.last_lsn().next();
        let landing: Vec<(u8, u8)> = self.landing().collect();
        let under_way = self.inflight.values().filter_map(InFlight::change);
        for (block, _) in under_way.collect::<Vec<_>>() {
            self.history.lose(next, block);
        }
        for (bit, (block, value)) in landing.into_iter().enumerate() {
            if crash.landed & 1 << bit != 0 {
                self.disk.write(block, value);
            }
        }
        for (bit, op) in std::mem::take(&mut self.tracking_ops).values().enumerate() {
            if crash.tracked & 1 << bit != 0 {
                self.file.apply(op);
            }
        }
        self.crash_spill(config, crash.spilled);
        self.inflight.clear();
        self.scans.clear();
        self.detaching = false;
        if self.has_connection() {
            self.end_agent_side(config);
        }
        if let Some(content) = &crash.content {
            self.disk.settle(content);
            (0..config.blocks).for_each(|block| self.history.lose(next, block));
            for writer in &mut self.writers {
                writer.next += u8::from(writer.waiting.take().is_some());
            }
        }
        let resume = self.file.resume();
        self.start_again(config, resume);
    }

    /// Detaches the disk as soon as that is possible, and attaches it again.
    pub(crate) fn detach_when_quiet(&mut self, config: &Config) {
        if !self.detaching || !self.filter.is_quiet() {
            return;
        }
        self.call(config, Filter::prepare_detach);
        if !self.filter.is_spill_settled() {
            return;
        }
        assert!(self.spill_ops.is_empty(), "a settled spill has nothing under way");
        self.disk.flush(&self.disk.flush_mark());
        let now = self.moment();
        let saved = self.filter.detach(now).filter(|_| !self.past.wrote);
        self.carry_out(config);
        let (history, last_lsn) = (self.filter.history(), self.filter.last_lsn());
        assert!(self.writers.iter().all(|writer| writer.waiting.is_none()), "somebody waits for an answer");
        self.inflight.clear();
        self.tracking_ops.clear();
        self.scans.clear();
        self.detaching = false;
        if self.has_connection() {
            self.end_agent_side(config);
        }
        let resume = match saved {
            Some(saved) => Resume::Clean(saved),
            None => {
                Resume::Lost { reason: Reason::AgentCrashed, history, last_lsn, acked_durable: Lsn::ZERO }
            }
        };
        self.start_again(config, resume);
    }

    fn start_again(&mut self, config: &Config, resume: Resume) {
        let resume = self.distrusting(resume);
        self.pass = None;
        self.paused = false;
        let mut attaches = self.file.attaches.take();
        self.file = first_file(config, &resume, Some(&self.file));
        self.epoch += 1;
        self.filter = new_filter(config, self.epoch, resume, self.moment());
        attaches.iter_mut().for_each(|attaches| attaches.push(attach_of(self.epoch)));
        self.filter.follows(attaches);
        self.use_spill(config);
        self.carry_out(config);
        self.look_at_start(config);
        // The machine sends again what was not answered.
        for writer in 0..u8::try_from(self.writers.len()).expect("few writers") {
            if let Some(waiting) = &mut self.writers[usize::from(writer)].waiting {
                *waiting = Waiting { floor: self.told, lsn: None, done: false };
                self.send_request(config, writer);
            }
        }
    }
}
