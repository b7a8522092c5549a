//! The agent: what a driver of the filter does, with the simulated disk and link. It can die at any
//! moment; what it wrote down before is [`Persisted`].

use std::collections::BTreeMap;

use backtide_io_filter::{
    Change, Filter, IoFailure, IoId, LocalData, LocalOp, Mode, Now, Prepared, Settings, SpillOp, TrackingOp,
};
use backtide_tracking::{DirtyBitmap, TrackingFile};
use backtide_units::{
    BlockCount, BlockIndex, BlockRange, ByteCount, ByteOffset, ByteRange, CaptureTime, Epoch, HistoryId, Lsn,
};
use bytes::Bytes;

use crate::{
    model::What,
    world::{Event, World},
};

/// What an agent leaves to the next one.
#[derive(Clone, Debug, Default)]
pub struct Persisted {
    /// The last attach.
    pub(crate) epoch: u64,
    /// The disk's size at it.
    pub(crate) size: Option<ByteCount>,
    /// Saved as soon as it is known.
    pub(crate) history: Option<HistoryId>,
    /// No LSN above it was given.
    pub(crate) reserved: Lsn,
    /// Saved now and then.
    pub(crate) acked_durable: Lsn,
    /// No capture time above it was given.
    pub(crate) last_time: CaptureTime,
    /// Requests wait to be sent again.
    pub(crate) machine_waits: bool,
}

/// One life of an agent, with one attach of the disk.
pub struct Agent {
    pub(crate) life: u64,
    pub(crate) filter: Filter,
    pub(crate) inflight: BTreeMap<IoId, InFlight>,
    pub(crate) tracking: TrackingFile,
    pub(crate) tracking_ops: BTreeMap<IoId, TrackingOp>,
    pub(crate) spill_ops: BTreeMap<IoId, SpillOp>,
    pub(crate) connection: Option<u64>,
    /// T of the running pass, and how many blocks it has left.
    pub(crate) pass: Option<(Lsn, u64)>,
    /// When the next tick is due.
    pub(crate) timer: Option<u64>,
    /// What the scans under way have found.
    pub(crate) scans: BTreeMap<IoId, DirtyBitmap>,
    /// It waits for a quiet moment to detach.
    pub(crate) detaching: bool,
    /// Answers are held.
    pub(crate) holding: bool,
    /// A verify was started and its end not yet seen.
    pub(crate) verifying: bool,
    /// Until then a verify that ended may still have runs in the queue of the guard.
    pub(crate) verify_shadow: u64,
    /// Answers of the last call were given with less than the policy promises.
    pub(crate) degraded: bool,
}

/// A local I/O under way.
#[derive(Clone, Debug)]
pub struct InFlight {
    pub(crate) op: LocalOp,
    pub(crate) request: Option<u64>,
    /// T of the freeze that this was under way at.
    pub(crate) frozen: Option<Lsn>,
    fails: bool,
    content: Option<Bytes>,
    flush_mark: u64,
}

/// LSNs are reserved in steps of this.
const RESERVE: u64 = 1000;

impl Agent {
    /// Whether a verify may wait to read something.
    pub(crate) fn may_verify(&self, now: u64) -> bool {
        let running = self.filter.verify_state().is_some_and(|(_, result)| result.is_none());
        running || self.verifying || now < self.verify_shadow
    }

    /// Whether a local read is under way in these blocks.
    pub(crate) fn reads(&self, blocks: BlockRange) -> bool {
        self.inflight.values().any(|inflight| match &inflight.op {
            LocalOp::Read(range) => BlockRange::touched_by(*range).overlaps(blocks),
            LocalOp::Change(_) | LocalOp::Settle => false,
        })
    }

    /// Whether a local read of a single block is under way in these: longer ones give way.
    pub(crate) fn occupies(&self, blocks: BlockRange) -> bool {
        let holds = |read: BlockRange| read.count() == BlockCount(1) && read.overlaps(blocks);
        self.inflight.values().any(|inflight| match &inflight.op {
            LocalOp::Read(range) => holds(BlockRange::touched_by(*range)),
            LocalOp::Change(_) | LocalOp::Settle => false,
        })
    }
}

impl World {
    /// Tells the filter something, and does what it wants done.
    pub(crate) fn call<R>(&mut self, event: impl FnOnce(&mut Filter, Now) -> R) -> R {
        let now = self.moment();
        let agent = self.agent.as_mut().expect("only a living agent is called");
        let before = agent.filter.status();
        let result = event(&mut agent.filter, now);
        let status = agent.filter.status();
        if status.last_lsn > before.last_lsn {
            self.captured.insert(status.last_lsn, status.last_time);
        }
        let (before, after) = (before.counters, status.counters);
        agent.degraded = after.degraded_answers > before.degraded_answers;
        if status.connected && status.mode == Mode::Sync {
            self.agent_in_sync();
        }
        if after.cold_changes > before.cold_changes {
            self.more_are_cold();
        }
        self.carry_out();
        result
    }

    pub(crate) fn start_agent(&mut self) {
        if self.agent.is_some() {
            return;
        }
        self.lives += 1;
        let resume = self.resume_from();
        let tracking = self.make_tracking(&resume.first_snapshot(self.disk, self.plan.activity), false);
        self.persisted.epoch += 1;
        self.persisted.size = Some(self.plan.size);
        self.trace.note(self.now, "agent starts", &[self.lives, self.persisted.epoch]);
        self.agent_knows_less();
        self.trace.say(self.now, || format!("{resume:?}"));
        let settings = Settings {
            disk: self.disk,
            name: "vm1".parse().expect("a name"),
            size: self.plan.size,
            epoch: Epoch(self.persisted.epoch),
            attach: uuid::Uuid::from_u128(self.lives.into()),
            ack: self.plan.ack,
            on_outage: self.plan.on_outage,
            window_bytes: self.plan.window,
            resync_buffer_bytes: self.plan.resync_buffer,
            guest_delay_max: self.plan.guest_delay_max,
            outage_after: self.plan.outage_after,
            bitmap_bytes: self.plan.bitmap,
            read_retry: self.plan.read_retry,
            unchanged_every: self.plan.unchanged_every,
            activity: self.plan.activity,
        };
        let mut filter = Filter::new(settings, resume, self.moment());
        if let Some(mutant) = self.mutant {
            filter.mutate(mutant);
        }
        filter.limit_resync(self.moment(), self.plan.resync_rate);
        filter.yield_to_guest(self.moment(), self.plan.added_latency);
        filter.not_before(self.persisted.last_time);
        self.recover_spill(&mut filter);
        self.agent = Some(Agent {
            life: self.lives,
            filter,
            inflight: BTreeMap::new(),
            tracking,
            tracking_ops: BTreeMap::new(),
            spill_ops: BTreeMap::new(),
            connection: None,
            pass: None,
            timer: None,
            scans: BTreeMap::new(),
            detaching: false,
            holding: false,
            verifying: false,
            verify_shadow: 0,
            degraded: false,
        });
        self.persisted.machine_waits = false;
        self.carry_out();
        self.send_requests_again();
        self.within(self.plan.outage_us.min(50_000), Event::Connect(self.lives));
    }

    /// Facts that the next agent needs are written down before they matter.
    pub(crate) fn persist(&mut self) {
        let Some(agent) = &self.agent else { return };
        self.persisted.history = agent.filter.history();
        self.persisted.last_time = agent.filter.status().last_time;
        let last = agent.filter.last_lsn();
        if last > self.persisted.reserved {
            self.persisted.reserved = last.plus(RESERVE);
        }
        if self.random.one_in(16) {
            self.persisted.acked_durable = agent.filter.hello().acked_durable;
        }
    }

    /// A local I/O the filter asked for begins.
    pub(crate) fn begin_local(&mut self, io: IoId, op: LocalOp) {
        let write = matches!(&op, LocalOp::Change(change) if *change != Change::Flush);
        let permille = match &op {
            _ if self.calm => 0,
            LocalOp::Read(_) => self.plan.read_errors_permille,
            LocalOp::Change(_) | LocalOp::Settle => self.plan.write_errors_permille,
        };
        let bad = matches!(&op, LocalOp::Read(range) if self.local.is_bad(*range));
        let fails = bad || (permille > 0 && self.random.permille(permille));
        let request = match &op {
            LocalOp::Change(change) => Some(self.start_request(change)),
            LocalOp::Read(_) | LocalOp::Settle => None,
        };
        self.trace.note(self.now, "local begins", &[io.0, u64::from(write), u64::from(fails)]);
        self.trace.say(self.now, || match &op {
            LocalOp::Change(change) => format!("request {request:?} {:?}", change.range()),
            LocalOp::Read(range) => format!("read {range}"),
            LocalOp::Settle => "settle".to_owned(),
        });
        let flush_mark = self.local.flush_mark();
        let inflight = InFlight { op, request, frozen: None, fails, content: None, flush_mark };
        let agent = self.agent.as_mut().expect("the filter asked");
        agent.inflight.insert(io, inflight);
        let life = agent.life;
        let mut at: Vec<u64> = (0..3).map(|_| self.random.below(self.plan.local_us + 1)).collect();
        at.sort_unstable();
        for (stage, us) in (0..).zip(at) {
            self.after(us, Event::Local { life, io, stage });
        }
    }

    /// The filter names no request: the oldest with this change that has not begun is meant.
    fn start_request(&mut self, change: &Change) -> u64 {
        let mut waiting = self.guest.requests.iter_mut().filter(|(_, request)| request.started.is_none());
        let (number, request) =
            waiting.find(|(_, request)| request.change == *change).expect("somebody asked for this change");
        request.started = Some(self.now);
        *number
    }

    pub(crate) fn local_goes_on(&mut self, life: u64, io: IoId, stage: u8) {
        let Some(agent) = self.agent.as_mut().filter(|agent| agent.life == life) else { return };
        if stage < 2 {
            let mut inflight = agent.inflight[&io].clone();
            self.half_of(&mut inflight, stage);
            let agent = self.agent.as_mut().expect("it is alive");
            agent.inflight.insert(io, inflight);
            return;
        }
        let inflight = agent.inflight.remove(&io).expect("an I/O ends once");
        self.trace.note(self.now, "local ends", &[io.0]);
        let failure = IoFailure { errno: 5 };
        let result = match &inflight.op {
            LocalOp::Change(change) => {
                self.change_ends(change, &inflight);
                if inflight.fails { Err(failure) } else { Ok(LocalData::Changed) }
            }
            LocalOp::Read(_) | LocalOp::Settle if inflight.fails => Err(failure),
            LocalOp::Settle => {
                self.local.flush(inflight.flush_mark);
                Ok(LocalData::Changed)
            }
            LocalOp::Read(_) => {
                let bytes = inflight.content.expect("it was read before the end");
                let agent = self.agent.as_ref().expect("it is alive");
                // As some disks behind do, and not all.
                let prepares = io.0.is_multiple_of(2) && agent.filter.sends_what_it_reads();
                Ok(if prepares { LocalData::Prepared(Prepared::new(bytes)) } else { LocalData::Read(bytes) })
            }
        };
        self.call(|filter, now| filter.local_done(now, io, result));
        self.detach_when_quiet();
    }

    /// Half of a write lands; a read sees what is there.
    fn half_of(&mut self, inflight: &mut InFlight, stage: u8) {
        match &inflight.op {
            LocalOp::Change(Change::Flush) | LocalOp::Settle => {}
            LocalOp::Change(change) => {
                if !inflight.fails || self.random.one_in(2) {
                    self.land(&change.clone(), stage);
                }
            }
            LocalOp::Read(range) if stage == 0 => inflight.content = Some(self.local.read(*range)),
            LocalOp::Read(_) => {}
        }
    }

    /// One half of a change is on the disk.
    fn land(&mut self, change: &Change, half: u8) {
        let range = change.range().expect("a flush has no halves");
        let middle = (range.start().0 + range.count().0 / 2).next_multiple_of(512).min(range.end().0);
        let (start, end) = if half == 0 { (range.start().0, middle) } else { (middle, range.end().0) };
        let part = ByteRange::between(ByteOffset(start), ByteOffset(end));
        let skip = (start - range.start().0) as usize;
        match change {
            Change::Write { data, .. } => {
                self.local.write(part, Some(&data[skip..skip + part.count().0 as usize]), false);
            }
            Change::Zero { trim, .. } => self.local.write(part, None, *trim),
            Change::Flush => {}
        }
    }

    /// A change ends: the model learns of it, with the LSN that the filter is about to give it.
    fn change_ends(&mut self, change: &Change, inflight: &InFlight) {
        let agent = self.agent.as_ref().expect("it is alive");
        let last = agent.filter.last_lsn();
        let in_pass = agent.pass.map(|(at, _)| at).filter(|at| inflight.frozen == Some(*at));
        let number = inflight.request.expect("a change is of a request");
        let request = self.guest.requests.get_mut(&number).expect("it was not answered yet");
        request.done = Some(self.now);
        let Some(range) = change.range() else {
            if !inflight.fails {
                self.local.flush(inflight.flush_mark);
            }
            return;
        };
        if inflight.fails {
            match in_pass {
                Some(at) => self.model.settle(at, range, self.local.read(range)),
                None => self.model.lose(last, range),
            }
            return;
        }
        let lsn = in_pass.unwrap_or(last.next());
        request.lsn = Some(lsn);
        self.stats.changes += 1;
        let what = match change {
            Change::Write { data, .. } => What::Bytes(data.clone()),
            Change::Zero { .. } => What::Zeroes,
            Change::Flush => unreachable!("a flush has no range"),
        };
        self.model.change(lsn, range, what);
        self.trace.note(self.now, "change", &[lsn.0, range.start().0, range.count().0]);
        if change.wants_stable() {
            self.local.flush_range(range);
        }
    }

    pub(crate) fn scan_goes_on(&mut self, life: u64, io: IoId, stage: u8) {
        let Some(agent) = self.agent.as_mut().filter(|agent| agent.life == life) else { return };
        let end = BlockRange::whole_disk(self.plan.size).end();
        let middle = BlockIndex(end.0 / 2);
        let part = match stage {
            0 => BlockRange::between(BlockIndex(0), middle),
            1 => BlockRange::between(middle, end),
            _ => {
                let found = agent.scans.remove(&io).unwrap_or_default();
                self.trace.note(self.now, "scanned", &[found.count().0]);
                return self.call(|filter, now| filter.scanned(now, io, &found));
            }
        };
        let found = agent.scans.entry(io).or_default();
        for run in self.local.allocated().runs(part, part.count()) {
            found.insert(run);
        }
    }

    /// The process dies: the page cache stays, what was under way is done in part.
    pub(crate) fn kill_agent(&mut self, power: bool) {
        let Some(mut agent) = self.agent.take() else {
            if power {
                self.lose_tracking_power();
                self.lose_spill_power();
            }
            return;
        };
        let ops = std::mem::take(&mut agent.tracking_ops).into_values().collect();
        self.kill_tracking(ops, &agent.tracking, power);
        let ops = std::mem::take(&mut agent.spill_ops).into_values().collect();
        self.kill_spill(ops, power);
        self.trace.note(self.now, "agent dies", &[agent.life]);
        self.stats.agent_deaths += 1;
        let next = agent.filter.last_lsn().next();
        self.count(&agent.filter);
        for inflight in agent.inflight.into_values() {
            let LocalOp::Change(change) = &inflight.op else { continue };
            let Some(range) = change.range() else { continue };
            for half in 0..2 {
                if self.random.one_in(2) {
                    self.land(change, half);
                }
            }
            self.model.lose(next, range);
        }
        if let Some(connection) = agent.connection {
            self.agent_gone(connection);
        }
    }

    /// The host loses power: agent, machine and page cache are gone.
    pub(crate) fn lose_host_power(&mut self) {
        let next = self.last_lsn().next();
        self.kill_agent(true);
        self.trace.note(self.now, "host loses power", &[]);
        self.guest.requests.clear();
        self.local.lose_power(&mut self.random);
        self.model.lose(next, ByteRange::between(ByteOffset::ZERO, ByteOffset(self.plan.size.0)));
    }

    pub(crate) fn detach_when_quiet(&mut self) {
        let Some(agent) = &self.agent else { return };
        if !agent.detaching || !agent.filter.is_quiet() {
            return;
        }
        self.call(Filter::prepare_detach);
        let Some(agent) = self.agent.as_ref().filter(|agent| agent.filter.is_spill_settled()) else { return };
        assert!(agent.spill_ops.is_empty(), "a settled spill has nothing under way");
        let saved = self.call(|filter, now| filter.detach(now));
        let agent = self.agent.take().expect("it was alive");
        assert_eq!(agent.filter.mode(), Mode::Detached);
        self.trace.note(self.now, "detached", &[agent.life, u64::from(saved.is_some())]);
        self.stats.detaches += 1;
        self.count(&agent.filter);
        self.local.flush(self.local.flush_mark());
        self.leave_tracking(saved);
        if let Some(connection) = agent.connection {
            self.agent_gone(connection);
        }
        if self.random.one_in(4) {
            self.grow(agent.filter.last_lsn());
        }
        let downtime = self.plan.outage_us;
        self.within(downtime, Event::AgentStart);
    }

    pub(crate) fn count(&mut self, filter: &Filter) {
        let counters = filter.status().counters;
        self.stats.overflows += counters.overflows;
        self.stats.spilled_bytes += counters.spilled_bytes;
        self.stats.unspilled_bytes += counters.unspilled_bytes;
        self.stats.forfeited += counters.forfeited;
        self.stats.completed += counters.passes_completed;
        self.stats.copies += counters.copies_before_write;
        self.stats.gave_way += counters.reads_abandoned;
    }
}
