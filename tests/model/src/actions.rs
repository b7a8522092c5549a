//! What can happen next in a state, and the step that makes it happen.

use backtide_io_filter::{Change, IoId, LocalOp, ResyncKind, TrackingOp};

use crate::{config::Config, world::World};

/// Something that happens.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Action {
    /// A writer sends its next request.
    Submit(u8),
    /// A change reaches the page cache.
    Land(IoId),
    /// A local I/O ends.
    Local(IoId),
    /// A write of the tracking file is durable.
    Tracking(IoId),
    /// It fails, and has happened or not.
    TrackingFails(IoId, bool),
    /// A scan ends; it saw what was allocated when it began, or now.
    Scan(IoId, bool),
    /// The agent connects.
    Connect,
    /// The next frame of a connection reaches the receiver.
    Arrive(usize),
    /// The receiver has answered a comparison.
    Answer(usize),
    /// The receiver's log becomes durable.
    Sync,
    /// The next message reaches the agent.
    Deliver,
    /// The filter's next deadline.
    Tick,
    /// The stream is lost.
    Cut,
    /// The disk is paused.
    Pause,
    /// The pause ends.
    Resume,
    /// A resync is forced.
    Force(ResyncKind),
    /// Another host takes the disk over.
    Rival,
    /// An operation of the spill ends.
    Spill(IoId),
    /// It fails, so far.
    SpillFails(IoId, Part),
    /// The disk is detached as soon as that is possible, and attached again.
    Detach,
    /// Somebody else opens the image, to write it past the agent, which sees that.
    PastAgent,
    /// They write this block.
    PastAgentWrites(u8),
    /// They have gone.
    PastAgentLeaves,
    /// The receiver dies; so many entries of its log are there afterwards.
    ReceiverCrash(usize),
    /// The agent dies, and starts again.
    AgentCrash(Box<Crash>),
}

/// What a crash of the agent leaves.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Crash {
    /// Which changes under way are on the disk, by bit.
    pub landed: u8,
    /// Which operations of the tracking file under way are in it, by bit.
    pub tracked: u8,
    /// How much of what changes the spill is there.
    pub spilled: Part,
    /// The power was lost: what the blocks hold.
    pub content: Option<Vec<u8>>,
}

/// How much of an operation has happened.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Part {
    /// None of it.
    Nothing,
    /// Its beginning.
    Some,
    /// All of it.
    All,
}

impl Part {
    const EACH: [Self; 3] = [Self::Nothing, Self::Some, Self::All];
}

impl World {
    /// Everything that can happen.
    pub(crate) fn actions(&self, config: &Config) -> Vec<Action> {
        let mut actions = self.progress(config);
        self.add_trouble(config, &mut actions);
        actions
    }

    /// What happens in a world in which nothing goes wrong.
    pub(crate) fn progress(&self, config: &Config) -> Vec<Action> {
        let mut actions = Vec::new();
        for (io, inflight) in &self.inflight {
            let lands = config.slow_landing && inflight.changes_the_disk() && !inflight.landed;
            actions.push(if lands { Action::Land(*io) } else { Action::Local(*io) });
        }
        actions.extend(self.tracking_ops.keys().map(|io| Action::Tracking(*io)));
        actions.extend(self.spill_ops.keys().map(|io| Action::Spill(*io)));
        for (io, early) in &self.scans {
            actions.push(Action::Scan(*io, false));
            if *early != self.allocated() {
                actions.push(Action::Scan(*io, true));
            }
        }
        if self.paused {
            actions.push(Action::Resume);
        }
        if self.past.there {
            actions.push(Action::PastAgentLeaves);
        }
        if !self.has_connection() && !self.fenced && self.filter.wants_connection() {
            actions.push(Action::Connect);
        }
        for (index, connection) in self.connections.iter().enumerate() {
            if !connection.up.is_empty() {
                actions.push(Action::Arrive(index));
            }
            if !connection.jobs.is_empty() {
                actions.push(Action::Answer(index));
            }
            if connection.agent_side && !connection.down.is_empty() {
                actions.push(Action::Deliver);
            }
        }
        if self.receiver.durable < self.receiver.log.len() {
            actions.push(Action::Sync);
        }
        for (index, (writer, ops)) in (0u8..).zip(self.writers.iter().zip(config.writers)) {
            if writer.waiting.is_none() && !self.detaching && usize::from(writer.next) < ops.len() {
                actions.push(Action::Submit(index));
            }
        }
        actions
    }

    fn add_trouble(&self, config: &Config, actions: &mut Vec<Action>) {
        let left = &self.left;
        if left.ticks > 0 && self.filter.next_deadline().is_some() {
            actions.push(Action::Tick);
        }
        if left.cuts > 0 && self.has_connection() {
            actions.push(Action::Cut);
        }
        if left.pauses > 0 && !self.paused {
            actions.push(Action::Pause);
        }
        if left.forces > 0 {
            let kinds = [ResyncKind::Changed, ResyncKind::Compare, ResyncKind::Full];
            actions.extend(kinds.map(Action::Force));
        }
        if left.rivals > 0 && self.receiver.timeline.attached().is_some() {
            actions.push(Action::Rival);
        }
        if left.detaches > 0 && !self.detaching {
            actions.push(Action::Detach);
        }
        if left.past_agents > 0 && !self.past.there {
            actions.push(Action::PastAgent);
        }
        if left.past_writes > 0 && self.past.there {
            actions.extend(self.free_blocks().map(Action::PastAgentWrites));
        }
        if left.spill_failures > 0 {
            let parts = |io: &IoId| Part::EACH.map(|part| Action::SpillFails(*io, part));
            actions.extend(self.spill_ops.keys().flat_map(parts));
        }
        if left.tracking_failures > 0 {
            let fail = |(io, op): (&IoId, &TrackingOp)| {
                let ends = [false, true].map(|happened| Action::TrackingFails(*io, happened));
                ends.into_iter().filter(move |_| may_fail(op)).collect::<Vec<_>>()
            };
            actions.extend(self.tracking_ops.iter().flat_map(fail));
        }
        if left.receiver_crashes > 0 {
            actions.extend((self.receiver.durable..=self.receiver.log.len()).map(Action::ReceiverCrash));
        }
        if left.agent_crashes > 0 {
            actions.extend(self.crashes(vec![None]));
        }
        if left.power_losses > 0 {
            actions.extend(self.crashes(self.contents_after_power_loss(config)));
        }
    }

    fn crashes(&self, contents: Vec<Option<Vec<u8>>>) -> impl Iterator<Item = Action> {
        let under_way = self.landing().count();
        let tracking = self.tracking_ops.len();
        let spilling = if self.changes_spill() { &Part::EACH[..] } else { &Part::EACH[..1] };
        contents.into_iter().flat_map(move |content| {
            // After a power loss the content says what has landed.
            let landed = if content.is_some() { 1 } else { 1 << under_way };
            (0..landed).flat_map(move |landed| {
                let content = content.clone();
                (0..1 << tracking).flat_map(move |tracked| {
                    let content = content.clone();
                    spilling.iter().map(move |spilled| {
                        let (spilled, content) = (*spilled, content.clone());
                        Action::AgentCrash(Box::new(Crash { landed, tracked, spilled, content }))
                    })
                })
            })
        })
    }

    /// Changes under way that have not reached the page cache: block and value.
    pub(crate) fn landing(&self) -> impl Iterator<Item = (u8, u8)> {
        let waiting = self.inflight.values().filter(|inflight| !inflight.landed);
        waiting.filter_map(|inflight| inflight.change())
    }

    /// What each block may hold after a power loss.
    pub(crate) fn possible_values(&self, block: u8) -> Vec<u8> {
        let mut values = self.disk.possible(block).to_vec();
        values.extend(self.landing().filter(|(changed, _)| *changed == block).map(|(_, value)| value));
        values.sort_unstable();
        values.dedup();
        values
    }

    fn contents_after_power_loss(&self, config: &Config) -> Vec<Option<Vec<u8>>> {
        let mut contents = vec![Vec::new()];
        for block in 0..config.blocks {
            let values = self.possible_values(block);
            let longer = |content: &Vec<u8>, value: &u8| [&content[..], &[*value]].concat();
            let extended =
                contents.iter().flat_map(|content| values.iter().map(move |value| longer(content, value)));
            contents = extended.collect();
        }
        contents.into_iter().map(Some).collect()
    }

    /// Does it.
    ///
    /// # Panics
    /// When a promise is broken, by the production code's own assertions or by the model's.
    pub(crate) fn step(&mut self, config: &Config, action: &Action) {
        match action {
            Action::Submit(writer) => self.submit_next(config, *writer),
            Action::Land(io) => self.land(*io),
            Action::Local(io) => self.local_ends(config, *io),
            Action::Tracking(io) => self.tracking_ends(config, *io),
            Action::TrackingFails(io, happened) => {
                self.left.tracking_failures -= 1;
                self.tracking_fails(config, *io, *happened);
            }
            Action::Scan(io, early) => self.scan_ends(config, *io, *early),
            Action::Connect => self.connect(config),
            Action::Arrive(index) => self.arrive(config, *index),
            Action::Answer(index) => self.answer(*index),
            Action::Sync => self.sync(config),
            Action::Deliver => self.deliver(config),
            Action::Tick => {
                self.left.ticks = self.left.ticks.saturating_sub(1);
                self.tick(config);
            }
            Action::Cut => {
                self.left.cuts -= 1;
                self.lose_connection(config);
            }
            Action::Pause => {
                self.left.pauses -= 1;
                self.pause(config);
            }
            Action::Resume => {
                self.paused = false;
                self.call(config, |filter, now| filter.resume(now));
            }
            Action::Force(kind) => {
                self.left.forces -= 1;
                self.call(config, |filter, now| filter.force_resync(now, *kind));
            }
            Action::Spill(io) => self.spill_ends(config, *io),
            Action::SpillFails(io, part) => {
                self.left.spill_failures -= 1;
                self.spill_fails(config, *io, *part);
            }
            Action::Detach => {
                self.left.detaches -= 1;
                self.detaching = true;
            }
            Action::PastAgent => {
                self.left.past_agents -= 1;
                self.past_agent_is_seen(config);
            }
            Action::PastAgentWrites(block) => {
                self.left.past_writes -= 1;
                self.written_past(*block);
            }
            Action::PastAgentLeaves => self.past_agent_leaves(config),
            Action::Rival => {
                self.left.rivals -= 1;
                self.rival_takes_over(config);
            }
            Action::ReceiverCrash(kept) => {
                self.left.receiver_crashes -= 1;
                self.receiver.crash(*kept);
                let had = self.has_connection();
                self.connections.clear();
                if had {
                    self.call(config, |filter, now| filter.disconnected(now));
                }
            }
            Action::AgentCrash(crash) => {
                match &crash.content {
                    Some(_) => self.left.power_losses -= 1,
                    None => self.left.agent_crashes -= 1,
                }
                self.agent_crashes(config, crash);
            }
        }
        self.detach_when_quiet(config);
    }
}

impl crate::world::InFlight {
    fn changes_the_disk(&self) -> bool {
        self.change().is_some()
    }

    /// The block a change changes, and to what.
    pub(crate) fn change(&self) -> Option<(u8, u8)> {
        match &self.op {
            LocalOp::Change(Change::Write { range, data, .. }) => {
                crate::content::blocks_in(*range).next().map(|block| (block, data[0]))
            }
            LocalOp::Change(Change::Zero { range, .. }) => {
                crate::content::blocks_in(*range).next().map(|block| (block, 0))
            }
            LocalOp::Change(Change::Flush) | LocalOp::Read(_) | LocalOp::Settle => None,
        }
    }
}

impl Config {
    /// The value that the request of this number of this writer writes.
    pub(crate) fn value(&self, writer: u8, number: u8) -> u8 {
        self.first_value + 0x10 * writer + number
    }
}

/// A file that cannot be removed is none of these worlds: the guest's requests would fail.
fn may_fail(op: &TrackingOp) -> bool {
    match op {
        TrackingOp::Record(_) | TrackingOp::Snapshot(_) | TrackingOp::Begin(_) => true,
        TrackingOp::Discard => false,
    }
}
