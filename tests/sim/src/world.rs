//! The world of one run: everything that has state, the queue of what is going to happen, and the
//! step that takes the next thing from it.

use std::collections::BTreeMap;

use backtide_io_filter::{IoId, Mutant, Now};
use backtide_units::{CaptureTime, DiskId, Lsn};
use uuid::Uuid;

use crate::{
    agent::{Agent, Persisted},
    guest::Guest,
    lacking::Lacking,
    link::{Connection, Link},
    local::LocalDisk,
    model::Model,
    past_agent::PastAgent,
    plan::Plan,
    points::Promises,
    random::Random,
    receiver::Receiver,
    reserve::Reserving,
    shown::Shown,
    spill::Spill,
    trace::Trace,
    tracking::Tracking,
};

/// Something that is going to happen. `life` names the incarnation it concerns: what a dead
/// process had planned does not happen.
#[derive(Clone, Debug)]
pub enum Event {
    /// The guest may send a request.
    Guest,
    /// A local I/O goes on.
    Local {
        /// The agent's incarnation.
        life: u64,
        /// Which.
        io: IoId,
        /// 0 and 1: half of it has an effect; 2: it ends.
        stage: u8,
    },
    /// Something is done to the tracking file.
    Tracking {
        /// The agent's incarnation.
        life: u64,
        /// Which.
        io: IoId,
    },
    /// Something is done to the spill.
    Spill {
        /// The agent's incarnation.
        life: u64,
        /// Which.
        io: IoId,
    },
    /// The agent of this incarnation has saved up to where LSNs are its own to give, or could not.
    Reserved(u64),
    /// Something that missing blocks need is done.
    Hydration {
        /// The agent's incarnation.
        life: u64,
        /// Which.
        job: u64,
    },
    /// Somebody looks whether the disk can be set back by now.
    Rewind {
        /// The agent's incarnation.
        life: u64,
        /// How often more.
        polls: u64,
    },
    /// A scan for allocated blocks goes on: half of the disk is looked at, then the other, then it ends.
    Scan {
        /// The agent's incarnation.
        life: u64,
        /// Which.
        io: IoId,
        /// As for local I/O.
        stage: u8,
    },
    /// The filter's deadline.
    Tick(u64),
    /// The link can take another frame of this connection.
    Room(u64),
    /// The agent of this incarnation tries to connect.
    Connect(u64),
    /// A chunk of this connection reaches the receiver.
    Up(u64),
    /// A chunk of this connection reaches the agent.
    Down(u64),
    /// The agent notices that this connection is gone.
    LostAtAgent(u64),
    /// The receiver notices that this connection is gone.
    LostAtReceiver(u64),
    /// The receiver of this incarnation syncs its log.
    SyncRun(u64),
    /// It learns that it did.
    SyncDone(u64),
    /// It has answered a comparison.
    Compared(u64),
    /// The agent starts.
    AgentStart,
    /// The receiver starts.
    ReceiverStart,
    /// The link is there again.
    LinkHeal,
    /// A pause ends.
    Resume,
    /// Held answers are given.
    GiveAnswers(u64),
    /// The local disk can be read again.
    DiskHeal,
    /// The store has room again.
    StoreHeal,
    /// The agent's own storage has room again.
    TrackingHeal,
    /// The spill's storage has room again.
    SpillHeal,
    /// Somebody else comes, writes the image past the agent, or goes.
    PastAgent,
    /// Something goes wrong just after the disk was set back.
    Strike,
    /// Something goes wrong, or somebody asks for something.
    Chaos,
}

/// What a run has seen, to be sure that it saw something.
#[derive(Clone, Copy, Debug, Default)]
pub struct Stats {
    /// Changes given an LSN.
    pub changes: u64,
    /// Passes begun.
    pub freezes: u64,
    /// Of these, passes that do not forward new writes.
    pub coalescing: u64,
    /// Passes that the receiver completed.
    pub completed: u64,
    /// Points read back and compared.
    pub points_checked: u64,
    /// Points in holes that were refused.
    pub holes_refused: u64,
    /// Comparisons of all differences with all unsettled blocks.
    pub differences_checked: u64,
    /// Agents that died.
    pub agent_deaths: u64,
    /// Receivers that died.
    pub receiver_deaths: u64,
    /// Receivers whose store was put back from an old copy.
    pub stores_put_back: u64,
    /// Of these, those that an agent noticed to be behind what they had acknowledged.
    pub put_back_noticed: u64,
    /// Times of points that were asked for.
    pub times_asked: u64,
    /// Clean detaches.
    pub detaches: u64,
    /// Times the disk became larger.
    pub grown: u64,
    /// Verifies that came to a result.
    pub verifies: u64,
    /// Window overflows.
    pub overflows: u64,
    /// Passes that lost their T.
    pub forfeited: u64,
    /// Old content copied before a write.
    pub copies: u64,
    /// Reads that gave way to the guest.
    pub gave_way: u64,
    /// Passes that were held to a rate.
    pub held: u64,
    /// Marks that are points in the end.
    pub marks: u64,
    /// Stale claims that were refused.
    pub stale_refused: u64,
    /// Snapshots of the tracking.
    pub snapshots: u64,
    /// Agents that began with what the tracking file of a dead one said.
    pub crashes_tracked: u64,
    /// Of these, those of one that was begun anew.
    pub crashes_anew: u64,
    /// Agents that found it torn.
    pub tracking_torn: u64,
    /// Passes that ended without blocks they could not read.
    pub unreadable: u64,
    /// Tracking files that were given up because their storage failed.
    pub tracking_lost: u64,
    /// Of these, those that were begun anew.
    pub tracking_anew: u64,
    /// Spills that a new agent found something in.
    pub spills_found: u64,
    /// Of these, those with which nothing was missing.
    pub spills_complete: u64,
    /// Bytes written to spills.
    pub spilled_bytes: u64,
    /// Bytes read back from them.
    pub unspilled_bytes: u64,
    /// Gaps because a spill was full.
    pub spills_full: u64,
    /// Because it failed.
    pub spills_failed: u64,
    /// Because it was slower than the guest.
    pub spills_slow: u64,
    /// Rewinds asked for.
    pub rewinds_wanted: u64,
    /// Looks at a disk to be set back that was in sync.
    pub polls_settled: u64,
    /// Disks set back to a point.
    pub rewinds: u64,
    /// Of these, to the moment before the one before.
    pub undone: u64,
    /// Rewinds that left the disk as it was.
    pub rewinds_refused: u64,
    /// Attaches of a disk that lacked blocks.
    pub hydrations: u64,
    /// Of these, those that brought everything.
    pub hydrated: u64,
    /// Fetches that nobody asked for.
    pub fetched_ahead: u64,
    /// What was fetched was on the image, and the journal could not be told.
    pub stored_unnoted: u64,
    /// Fetches that the receiver was not there for.
    pub fetches_waited: u64,
    /// Reads of a guest that touched missing blocks.
    pub reads_of_missing: u64,
    /// Deaths of an agent whose disk lacked blocks.
    pub deaths_lacking: u64,
    /// Flushes that an image refused.
    pub flushes_refused: u64,
    /// Chunks of missing blocks that the image was found to hold.
    pub compared_equal: u64,
    /// Servers that ended together with the agent.
    pub servers_ended: u64,
    /// Agents that died with LSNs given that no other attach knows of.
    pub unreserved_deaths: u64,
    /// Looks at what can be sent, and may not because of that.
    pub unreserved_held: u64,
    /// Times that somebody else was seen to write the image past the agent.
    pub past_agents: u64,
    /// Of these, those that ended a pass or the scan for one.
    pub past_in_pass: u64,
    /// What was written past the agent.
    pub past_writes: u64,
    /// Of these, writes while no agent was there.
    pub past_without_agent: u64,
    /// Times that everything was compared after that.
    pub past_compared: u64,
}

/// See the module's description.
pub struct World {
    pub(crate) plan: Plan,
    pub(crate) random: Random,
    pub(crate) trace: Trace,
    pub(crate) now: u64,
    pub(crate) wall_ahead: u64,
    /// How far the clock of the receiver's host is ahead of the agent's.
    pub(crate) receiver_ahead: i64,
    queue: BTreeMap<(u64, u64), Event>,
    queued: u64,
    pub(crate) steps: u64,
    pub(crate) disk: DiskId,
    /// The image.
    pub(crate) local: LocalDisk,
    pub(crate) shown: Shown,
    pub(crate) lacking: Lacking,
    pub(crate) model: Model,
    pub(crate) guest: Guest,
    pub(crate) agent: Option<Agent>,
    pub(crate) persisted: Persisted,
    pub(crate) reserving: Reserving,
    pub(crate) tracking: Tracking,
    pub(crate) spill: Spill,
    pub(crate) past: PastAgent,
    pub(crate) lives: u64,
    pub(crate) link: Link,
    pub(crate) connections: BTreeMap<u64, Connection>,
    pub(crate) receiver: Receiver,
    pub(crate) promises: Promises,
    /// When changes and passes were captured, by what the agents say of the newest after each event.
    pub(crate) captured: BTreeMap<Lsn, CaptureTime>,
    pub(crate) mutant: Option<Mutant>,
    /// A disk that has grown is attached like any other: a deliberate mistake.
    pub(crate) forgets_growth: bool,
    /// Nothing goes wrong any more.
    pub(crate) calm: bool,
    pub(crate) stats: Stats,
}

impl World {
    /// The world of a seed, before anything happens.
    pub fn new(seed: u64, steps: u64, printing: bool) -> Self {
        let mut random = Random::new(seed);
        let plan = Plan::draw(&mut random, steps);
        Self::of(plan, random, printing)
    }

    /// The world of a plan.
    pub(crate) fn of(plan: Plan, mut random: Random, printing: bool) -> Self {
        let mut local = LocalDisk::new(plan.size);
        if plan.prefilled {
            crate::guest::prefill(&mut local, &mut random);
        }
        let mut world = Self {
            link: Link::new(&plan),
            trace: Trace::new(printing),
            now: 0,
            wall_ahead: 1_700_000_000_000_000,
            receiver_ahead: 0,
            queue: BTreeMap::new(),
            queued: 0,
            steps: 0,
            disk: DiskId(Uuid::from_u128(7)),
            model: Model::new(local.content()),
            shown: Shown::new(&local),
            lacking: Lacking::default(),
            local,
            guest: Guest::default(),
            agent: None,
            persisted: Persisted::default(),
            reserving: Reserving::of(&plan),
            tracking: Tracking::default(),
            spill: Spill::default(),
            past: PastAgent::of(&plan),
            lives: 0,
            connections: BTreeMap::new(),
            receiver: Receiver::new(&plan),
            promises: Promises::default(),
            captured: BTreeMap::new(),
            mutant: None,
            forgets_growth: false,
            calm: false,
            stats: Stats::default(),
            plan,
            random,
        };
        world.trace.say(0, || format!("{:#?}", world.plan));
        world.after(0, Event::AgentStart);
        world.after(0, Event::ReceiverStart);
        world.after(10, Event::Guest);
        let first = world.plan.chaos_us;
        world.after(first, Event::Chaos);
        world.plan_past_agent();
        world
    }

    /// What the filter is told of the time.
    pub(crate) fn moment(&self) -> Now {
        Now { monotonic: std::time::Duration::from_micros(self.now), wall: self.wall() }
    }

    pub(crate) fn wall(&self) -> CaptureTime {
        CaptureTime(self.wall_ahead + self.now)
    }

    /// The clock of the receiver's host.
    pub(crate) fn receiver_wall(&self) -> CaptureTime {
        CaptureTime((self.wall_ahead + self.now).saturating_add_signed(self.receiver_ahead))
    }

    /// Lets something happen so many microseconds from now, after everything due then already.
    pub(crate) fn after(&mut self, us: u64, event: Event) {
        self.queued += 1;
        self.queue.insert((self.now + us, self.queued), event);
    }

    /// Lets something happen within so many microseconds.
    pub(crate) fn within(&mut self, us: u64, event: Event) {
        let after = self.random.below(us + 1);
        self.after(after, event);
    }

    /// The next thing happens.
    pub(crate) fn step(&mut self) {
        let Some(((at, _), event)) = self.queue.pop_first() else { unreachable!("the guest never ends") };
        self.now = at;
        self.steps += 1;
        match event {
            Event::Guest => self.guest_turn(),
            Event::Local { life, io, stage } => self.local_goes_on(life, io, stage),
            Event::Tracking { life, io } => self.tracking_goes_on(life, io),
            Event::Spill { life, io } => self.spill_goes_on(life, io),
            Event::Reserved(life) => self.reserved(life),
            Event::Scan { life, io, stage } => self.scan_goes_on(life, io, stage),
            Event::Hydration { life, job } => self.hydration_goes_on(life, job),
            Event::Rewind { life, polls } => self.rewind_goes_on(life, polls),
            Event::Tick(life) => self.tick(life),
            Event::Room(connection) => self.room(connection),
            Event::Connect(life) => self.try_to_connect(life),
            Event::Up(connection) => self.reaches_receiver(connection),
            Event::Down(connection) => self.reaches_agent(connection),
            Event::LostAtAgent(connection) => self.lost_at_agent(connection),
            Event::LostAtReceiver(connection) => self.lost_at_receiver(connection),
            Event::SyncRun(life) => self.run_sync(life),
            Event::SyncDone(life) => self.sync_done(life),
            Event::Compared(life) => self.compared(life),
            Event::AgentStart => self.start_agent(),
            Event::ReceiverStart => self.start_receiver(),
            Event::LinkHeal => self.link.up = true,
            Event::Resume => self.resume(),
            Event::GiveAnswers(life) => self.give_answers(life),
            Event::DiskHeal => self.local.heal(),
            Event::StoreHeal => self.receiver.storage.set_capacity(None),
            Event::TrackingHeal => self.tracking.storage.set_capacity(None),
            Event::SpillHeal => self.spill.storage.set_capacity(None),
            Event::PastAgent => self.past_agent_turn(),
            Event::Strike => self.strike(),
            Event::Chaos => self.chaos(),
        }
    }

    /// The last LSN anybody gave.
    pub(crate) fn last_lsn(&self) -> Lsn {
        self.agent.as_ref().map_or(self.persisted.reserved, |agent| agent.filter.last_lsn())
    }
}
