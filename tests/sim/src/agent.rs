//! The agent: what a driver of the filter does, with the simulated disk and link. It can die at any
//! moment; what it wrote down before is [`Persisted`].

use std::collections::BTreeMap;

use backtide_hydration::HydrationFile;
use backtide_io_filter::{Filter, IoId, LocalOp, Mode, Now, Settings, SpillOp, TrackingOp};
use backtide_tracking::{DirtyBitmap, TrackingFile};
use backtide_units::{
    BlockCount, BlockIndex, BlockRange, ByteCount, ByteOffset, ByteRange, CaptureTime, Epoch, HistoryId, Lsn,
};

use crate::{
    hydration::Hydrating,
    lacking::DriverMistake,
    local_io::InFlight,
    rewind::Rewind,
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
    /// No LSN above it has left the agent.
    pub(crate) reserved: Lsn,
    /// Saved now and then.
    pub(crate) acked_durable: Lsn,
    /// No capture time above it was given.
    pub(crate) last_time: CaptureTime,
    /// See `Filter::follows`.
    pub(crate) attaches: Option<Vec<uuid::Uuid>>,
    /// Requests wait to be sent again.
    pub(crate) machine_waits: bool,
}

/// One life of an agent, with one attach of the disk.
pub struct Agent {
    pub(crate) life: u64,
    pub(crate) filter: Filter,
    pub(crate) inflight: BTreeMap<IoId, InFlight>,
    /// What the disk lacks, if anything.
    pub(crate) hydrating: Option<Hydrating>,
    /// Somebody waits for the moment to go back.
    pub(crate) wants_rewind: bool,
    /// It is let go of to be set back.
    pub(crate) rewind: Option<Rewind>,
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
    /// It has seen somebody else write the image, and not yet that they have gone.
    pub(crate) sees_past_agent: bool,
    /// The receiver refused it at the last attempt.
    pub(crate) refused: bool,
    /// Answers of the last call were given with less than the policy promises.
    pub(crate) degraded: bool,
}

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

    /// Whether a read of a single block of the image is under way in these: longer ones give way, and so do those that
    /// wait for the source of missing blocks.
    pub(crate) fn occupies(&self, blocks: BlockRange) -> bool {
        let holds = |read: BlockRange| read.count() == BlockCount(1) && read.overlaps(blocks);
        self.inflight.values().any(|inflight| match &inflight.op {
            LocalOp::Read(range) => inflight.hydrated.is_none() && holds(BlockRange::touched_by(*range)),
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
        let file = self.open_hydration();
        self.attach_image(file.as_ref());
        let resume = self.resume_from();
        let last = Epoch(self.persisted.epoch);
        let forgets = self.lacking.mistake == Some(DriverMistake::NotChanged);
        let resume = match &file {
            Some(file) if file.header().changes_the_disk(last) && !forgets => {
                resume.set_back(&file.missing())
            }
            Some(_) | None => resume,
        };
        let tracking = self.make_tracking(&resume.first_snapshot(self.disk, self.plan.activity), false);
        if file.is_some() && !self.calm && self.random.one_in(8) {
            self.trace.note(self.now, "attach cut off", &[]);
            return self.within(self.plan.outage_us, Event::AgentStart);
        }
        let hydrating = file.map(|file| self.begin_hydrating(file));
        self.persisted.epoch += 1;
        self.persisted.size = Some(self.plan.size);
        let attach = uuid::Uuid::from_u128(self.lives.into());
        if let Some(attaches) = &mut self.persisted.attaches {
            attaches.push(attach);
        }
        self.trace.note(self.now, "agent starts", &[self.lives, self.persisted.epoch]);
        self.agent_knows_less();
        self.trace.say(self.now, || format!("{resume:?}"));
        let settings = Settings {
            disk: self.disk,
            name: "vm1".parse().expect("a name"),
            size: self.plan.size,
            epoch: Epoch(self.persisted.epoch),
            attach,
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
        self.reserve_for_attach(&mut filter);
        filter.limit_resync(self.moment(), self.plan.resync_rate);
        filter.yield_to_guest(self.moment(), self.plan.added_latency);
        filter.not_before(self.persisted.last_time);
        filter.follows(self.persisted.attaches.clone());
        self.recover_spill(&mut filter);
        self.agent = Some(Agent {
            life: self.lives,
            filter,
            inflight: BTreeMap::new(),
            hydrating,
            wants_rewind: false,
            rewind: None,
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
            sees_past_agent: false,
            refused: false,
            degraded: false,
        });
        self.persisted.machine_waits = false;
        self.guest.paused = false;
        self.carry_out();
        self.look_at_start();
        self.hydrate();
        self.send_requests_again();
        self.within(self.plan.outage_us.min(50_000), Event::Connect(self.lives));
    }

    /// What an agent begins with can be flushed, but for what it does not believe the image in; behind a server it is.
    fn attach_image(&mut self, file: Option<&HydrationFile>) {
        let missing = file.map(HydrationFile::missing).unwrap_or_default();
        self.lacking.untold = false;
        self.local.forgive(&missing);
        self.shown.disk.forgive(&DirtyBitmap::new());
        if self.plan.server {
            self.local.flush(self.local.flush_mark());
        }
    }

    /// Facts that the next agent needs are written down before they matter.
    pub(crate) fn persist(&mut self) {
        let Some(agent) = &self.agent else { return };
        self.persisted.history = agent.filter.history();
        self.persisted.last_time = agent.filter.status().last_time;
        // It may die before that is saved.
        if agent.filter.was_welcomed() && (self.calm || self.random.one_in(2)) {
            self.persisted.attaches = agent.filter.attaches().map(<[_]>::to_vec);
        }
        self.keep_reserve();
        self.forget_past_agent();
        let Some(agent) = &self.agent else { return };
        if self.random.one_in(16) {
            self.persisted.acked_durable = agent.filter.hello().acked_durable;
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
        // Before the look at the image, where blocks that come meanwhile are found.
        let missing =
            || agent.hydrating.as_ref().map(|hydrating| hydrating.missing().clone()).unwrap_or_default();
        let found = agent.scans.entry(io).or_insert_with(missing);
        for run in self.local.allocated().runs(part, part.count()) {
            found.insert(run);
        }
    }

    /// The process dies: the page cache stays, what was under way is done in part.
    pub(crate) fn kill_agent(&mut self, power: bool) {
        self.kill_hydration(power);
        let Some(mut agent) = self.agent.take() else {
            if power {
                self.lose_tracking_power();
                self.lose_spill_power();
                self.lose_hydration_power();
            }
            return;
        };
        self.lacking.die();
        if power {
            self.lose_hydration_power();
        }
        let ops = std::mem::take(&mut agent.tracking_ops).into_values().collect();
        self.kill_tracking(ops, &agent.tracking, power);
        let ops = std::mem::take(&mut agent.spill_ops).into_values().collect();
        self.kill_spill(ops, power);
        self.trace.note(self.now, "agent dies", &[agent.life]);
        self.stats.agent_deaths += 1;
        let next = agent.filter.last_lsn().next();
        self.count(&agent.filter);
        self.lose_unsynced(agent.hydrating.as_ref(), next);
        for inflight in agent.inflight.into_values() {
            let LocalOp::Change(change) = &inflight.op else { continue };
            let Some(range) = change.range() else { continue };
            for half in 0..2 {
                if self.random.one_in(2) {
                    self.land(change, half);
                }
            }
            self.model.lose(next, range);
            self.shown.unsure.push(range);
        }
        self.forget_unreserved(&agent.filter);
        if let Some(connection) = agent.connection {
            self.agent_gone(connection);
        }
    }

    fn lose_hydration_power(&mut self) {
        let seed = self.random.number();
        self.lacking.lose_power(seed);
    }

    /// The host loses power: agent, machine and page cache are gone.
    pub(crate) fn lose_host_power(&mut self) {
        let next = self.last_lsn().next();
        // A clean detach has left everything on stable storage, except what that refused.
        let let_go = self.agent.is_none() && self.tracking.is_clean() && self.local.is_stable();
        self.kill_agent(true);
        self.past_agent_leaves();
        self.trace.note(self.now, "host loses power", &[]);
        self.guest.requests.clear();
        self.local.lose_power(&mut self.random);
        self.shown.power_lost = true;
        let next = next.min(self.last_lsn().next());
        if !let_go {
            self.model.lose(next, ByteRange::between(ByteOffset::ZERO, ByteOffset(self.plan.size.0)));
        }
    }

    /// The server behind ends together with the agent, and takes with it what it was not told to flush.
    pub(crate) fn lose_server(&mut self) {
        let next = self.last_lsn().next();
        self.kill_agent(false);
        self.trace.note(self.now, "server ends", &[]);
        self.stats.servers_ended += 1;
        let next = next.min(self.last_lsn().next());
        if !self.local.is_stable() {
            self.local.lose_power(&mut self.random);
            // The journal of what is present is the host's, and keeps what it has not made durable until that dies.
            self.shown.unsynced = true;
            self.model.lose(next, self.whole());
        }
    }

    pub(crate) fn detach_when_quiet(&mut self) {
        let Some(agent) = &self.agent else { return };
        let stores = agent.hydrating.as_ref().is_some_and(Hydrating::is_storing);
        if !agent.detaching || !agent.filter.is_quiet() || stores {
            return;
        }
        if agent.rewind.is_some() && !self.has_caught_up() {
            return;
        }
        self.call(Filter::prepare_detach);
        let Some(agent) = self.agent.as_ref().filter(|agent| agent.filter.is_spill_settled()) else { return };
        assert!(agent.spill_ops.is_empty(), "a settled spill has nothing under way");
        let lacks = agent.hydrating.as_ref().is_some_and(|hydrating| !hydrating.is_complete());
        let flushed = !lacks || self.do_settle().is_ok();
        let believed = flushed && !self.past.wrote;
        let saved = self.call(|filter, now| filter.detach(now)).filter(|_| believed);
        let mut agent = self.agent.take().expect("it was alive");
        assert_eq!(agent.filter.mode(), Mode::Detached);
        self.reserve_all_given(&agent.filter);
        self.trace.note(self.now, "detached", &[agent.life, u64::from(saved.is_some())]);
        self.stats.detaches += 1;
        self.count(&agent.filter);
        if !lacks {
            self.local.flush(self.local.flush_mark());
        }
        if flushed {
            self.shown.disk.flush(self.shown.disk.flush_mark());
        }
        self.lose_unsynced(agent.hydrating.as_ref(), agent.filter.last_lsn().next());
        self.leave_tracking(saved.clone());
        if let Some(connection) = agent.connection {
            self.agent_gone(connection);
        }
        if let Some(rewind) = agent.rewind.take() {
            self.set_back(rewind, saved);
        } else if self.random.one_in(4) {
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
