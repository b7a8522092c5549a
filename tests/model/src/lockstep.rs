//! Whether the receiver that is walked is the one that is shipped: a long random walk, in which the
//! production sessions and logs get the same frames, have to answer the same, and have to hold the same
//! timeline, durability and contents after each step.
//!
//! The production side leads where it has a choice: how much of its log a crash leaves.

use std::sync::Arc;

use backtide_log_receiver::{
    ConnectionId, Disk, Disks, Effect, Findings, Forgotten, Names, Session, Shelf, StoreWatch,
};
use backtide_protocol::{CloseCode, CompareResult, Hello, Message, Sequenced};
use backtide_recovery::{LogCache, LogOptions};
use backtide_storage::MemoryStorage;
use backtide_units::{BlockRange, ByteCount, DiskId, Epoch, Lsn};
use uuid::Uuid;

use crate::{
    actions::Action,
    agent::DISK,
    config::Config,
    content::{disk_size, value_in},
    receiver::{HISTORY, TIME},
    world::World,
};

/// What a walk in lockstep came by.
#[derive(Clone, Copy, Debug, Default)]
pub struct Steps {
    /// Steps.
    pub steps: u64,
    /// Answers of the receiver that were compared.
    pub answers: u64,
    /// Crashes of the receiver, and how many left less than there was.
    pub crashes: (u64, u64),
    /// Points read back on both sides.
    pub points: u64,
    /// Claims with a stale epoch, or with the epoch of another attach, that were refused.
    pub stale: u64,
    /// Takeovers by another host.
    pub rivals: u64,
}

/// The receiver that is shipped.
struct Production {
    storage: MemoryStorage,
    disks: Disks,
    sessions: Vec<(u64, Session)>,
    said: Vec<Said>,
}

/// Something that the receiver gave a connection.
#[derive(Debug, PartialEq)]
enum Said {
    Message(u64, Message),
    Compared(u64, CompareResult),
}

/// The connection of another host's agent.
const RIVAL: u64 = u64::MAX - 1;

/// Chance: SplitMix64.
struct Random(u64);

impl Random {
    fn below(&mut self, bound: usize) -> usize {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        let bound = u64::try_from(bound).expect("a small number");
        usize::try_from((z ^ (z >> 31)) % bound).expect("a small number")
    }
}

/// One walk until nothing can happen any more.
///
/// # Panics
/// When the two receivers differ, or a promise is broken.
pub fn lockstep(config: &Config, seed: u64) -> Steps {
    let config = Config { received_acks: true, start: crate::config::Start::FirstAttach, ..config.clone() };
    let mut world = World::new(&config);
    let mut production = Production::new();
    let mut random = Random(seed.wrapping_mul(0x2545_f491_4f6c_dd1d));
    let mut steps = Steps::default();
    loop {
        let calm = world.progress(&config);
        let mut possible =
            if calm.is_empty() || random.below(12) == 0 { world.actions(&config) } else { calm };
        if possible.is_empty() {
            return steps;
        }
        let mut action = possible.swap_remove(random.below(possible.len()));
        if let Action::ReceiverCrash(kept) = &mut action {
            let before = world.receiver.log.len();
            *kept = production.crash(&mut random);
            steps.crashes.0 += 1;
            steps.crashes.1 += u64::from(*kept < before);
        } else {
            production.follow(&world, &config, &action);
        }
        let before = counts(&world);
        world.step(&config, &action);
        world.check(&config);
        production.forget_gone(&world);
        steps.steps += 1;
        steps.rivals += u64::from(action == Action::Rival);
        steps.answers += production.compare_said(&world, &before, &action);
        steps.points += production.compare_logs(&world, &config, &action);
        steps.stale += production.refuse_stale(&world);
    }
}

/// By connection: how many messages and answers wait.
fn counts(world: &World) -> Vec<(u64, usize, usize)> {
    let count = |connection: &crate::world::Connection| {
        (connection.number, connection.down.len(), connection.jobs.len())
    };
    world.connections.iter().map(count).collect()
}

impl Production {
    fn new() -> Self {
        let storage = MemoryStorage::new();
        let disks = open(&storage);
        Self { storage, disks, sessions: Vec::new(), said: Vec::new() }
    }

    fn disk(&self) -> Option<&Disk> {
        self.disks.get(DISK)
    }

    fn appended(&self) -> usize {
        self.disk().map_or(0, |disk| usize::try_from(disk.appended().0).expect("a short log"))
    }

    /// Dies, in one of two ways; says how many entries are there afterwards.
    fn crash(&mut self, random: &mut Random) -> usize {
        self.sessions.clear();
        match random.below(2) {
            0 => self.storage.kill_handles(),
            _ => self.storage.crash(random.below(1 << 30) as u64),
        }
        self.disks = open(&self.storage);
        self.appended()
    }

    /// What the action means to the receiver.
    fn follow(&mut self, world: &World, config: &Config, action: &Action) {
        match action {
            Action::Connect => {
                let number = world.connected + 1;
                self.sessions.push((number, Session::new(ConnectionId(number))));
            }
            Action::Arrive(index) => {
                let connection = &world.connections[*index];
                let (seq, message) = connection.up.front().expect("a frame is on its way").clone();
                let number = connection.number;
                self.act(number, |session, disks| session.handle(disks, Sequenced { seq, message }, TIME));
                self.act(number, Session::settle);
            }
            Action::Sync => {
                let disk = self.disks.get_mut(DISK).expect("a log has entries");
                let ticket = disk.ticket().expect("something is not durable");
                disk.synced(ticket.sync());
                for number in self.sessions.iter().map(|(number, _)| *number).collect::<Vec<_>>() {
                    self.act(number, Session::settle);
                }
            }
            Action::Rival => self.rival_takes_over(world, config),
            Action::Submit(_)
            | Action::Land(_)
            | Action::Local(_)
            | Action::Tracking(_)
            | Action::TrackingFails(..)
            | Action::Spill(_)
            | Action::SpillFails(..)
            | Action::Detach
            | Action::Scan(..)
            | Action::Answer(_)
            | Action::Deliver
            | Action::Tick
            | Action::Cut
            | Action::Pause
            | Action::Resume
            | Action::Force(_)
            | Action::PastAgent
            | Action::PastAgentWrites(_)
            | Action::PastAgentLeaves
            | Action::ReceiverCrash(_)
            | Action::AgentCrash(_) => {}
        }
    }

    /// Another agent claims the disk, writes and leaves.
    fn rival_takes_over(&mut self, world: &World, config: &Config) {
        let (hello, frames) = world.rival_says(config);
        let mut session = Session::new(ConnectionId(RIVAL));
        for (seq, message) in (1..).zip(std::iter::once(Message::Hello(hello)).chain(frames)) {
            let effects = session.handle(&mut self.disks, Sequenced { seq, message }, TIME);
            self.carry_out(RIVAL, effects);
            let disk = self.disks.get_mut(DISK).expect("a log has entries");
            if let Some(ticket) = disk.ticket() {
                disk.synced(ticket.sync());
            }
            let effects = session.settle(&mut self.disks);
            self.carry_out(RIVAL, effects);
        }
        session.lost(&mut self.disks);
    }

    fn act(&mut self, number: u64, act: impl FnOnce(&mut Session, &mut Disks) -> Vec<Effect>) {
        let Some((_, session)) = self.sessions.iter_mut().find(|(known, _)| *known == number) else { return };
        let effects = act(session, &mut self.disks);
        self.carry_out(number, effects);
    }

    fn carry_out(&mut self, number: u64, effects: Vec<Effect>) {
        for effect in effects {
            match effect {
                Effect::Send(message) => self.said.push(Said::Message(number, message)),
                Effect::Compare(job) => {
                    let result = job.run().expect("the log can be read");
                    self.said.push(Said::Compared(number, result));
                }
                Effect::CloseOther(other, closed) => {
                    let session = self.sessions.iter_mut().find(|(known, _)| *known == other.0);
                    let (_, session) = session.expect("who has the disk is known");
                    let effects = session.close(&mut self.disks, closed);
                    self.carry_out(other.0, effects);
                }
                Effect::Recalled(_) => unreachable!("nobody asks the agent here"),
                Effect::End => {}
            }
        }
    }

    /// An agent of an earlier attach turns up, and one with a copy of this agent's state: both are
    /// refused, and nothing changes. (Promise 8.)
    fn refuse_stale(&mut self, world: &World) -> u64 {
        let attached = self.disk().and_then(Disk::attached).cloned();
        let Some(attached) = attached.filter(|attached| attached.epoch > Epoch(1)) else { return 0 };
        let hello = world.filter.hello();
        let before = Epoch(attached.epoch.0 - 1);
        let earlier = Hello { epoch: before, attach: Uuid::from_u128(before.0.into()), ..hello.clone() };
        let copied = Hello { epoch: attached.epoch, attach: Uuid::from_u128(u128::MAX), ..hello };
        for hello in [earlier, copied] {
            let state = |this: &Self| this.disk().map(|disk| (disk.appended(), disk.owner()));
            let before = state(self);
            let refused = world.receiver.clone().claim(&hello, 1).err();
            assert_eq!(refused, Some(CloseCode::Fenced), "a stale claim is refused here too");
            let mut session = Session::new(ConnectionId(u64::MAX));
            let first = Sequenced { seq: 1, message: Message::Hello(hello) };
            let effects = session.handle(&mut self.disks, first, TIME);
            let is_refusal = |effect: &Effect| match effect {
                Effect::Send(Message::Close(closed)) => closed.code == CloseCode::Fenced,
                Effect::Send(_)
                | Effect::Compare(_)
                | Effect::Recalled(_)
                | Effect::CloseOther(..)
                | Effect::End => false,
            };
            assert!(effects.iter().any(is_refusal), "a stale claim is refused");
            assert_eq!(state(self), before, "a stale claim changed something");
        }
        2
    }

    /// Connections that are no more.
    fn forget_gone(&mut self, world: &World) {
        let is_there = |number: u64| world.connections.iter().any(|known| known.number == number);
        for (number, session) in &mut self.sessions {
            if !is_there(*number) {
                session.lost(&mut self.disks);
            }
        }
        self.sessions.retain(|(number, _)| is_there(*number));
    }

    /// Both have said the same to the connections that the agent has; gives how many answers.
    fn compare_said(&mut self, world: &World, before: &[(u64, usize, usize)], action: &Action) -> u64 {
        let said = std::mem::take(&mut self.said);
        if matches!(action, Action::Deliver | Action::Answer(_)) {
            // What the receiver had said goes on its way.
            return 0;
        }
        let mut expected = Vec::new();
        for connection in world.connections.iter().filter(|connection| connection.agent_side) {
            let number = connection.number;
            let old = before.iter().find(|(known, ..)| *known == number);
            let (messages, jobs) = old.map_or((0, 0), |(_, messages, jobs)| (*messages, *jobs));
            let answers = connection.jobs.iter().skip(jobs).cloned();
            expected.extend(answers.map(|answer| Said::Compared(number, answer)));
            let sent = connection.down.iter().skip(messages).cloned();
            expected.extend(sent.map(|message| Said::Message(number, message)));
        }
        let to_agent = |said: &Said| match said {
            Said::Message(number, _) | Said::Compared(number, _) => {
                world.connections.iter().any(|known| known.number == *number && known.agent_side)
            }
        };
        let found: Vec<Said> = said.into_iter().filter(to_agent).map(Said::without_words).collect();
        let expected: Vec<Said> = expected.into_iter().map(Said::without_words).collect();
        assert_eq!(found, expected, "the production receiver (left) answers otherwise, after {action:?}");
        u64::try_from(found.len()).expect("a few")
    }

    /// Both hold the same; gives how many points were read.
    fn compare_logs(&mut self, world: &World, config: &Config, action: &Action) -> u64 {
        let receiver = &world.receiver;
        assert_eq!(self.appended(), receiver.log.len(), "entries, after {action:?}");
        let Some(disk) = self.disks.get_mut(DISK) else { return 0 };
        assert!(disk.failure().is_none(), "the log failed: {:?}", disk.failure());
        let durable = usize::try_from(disk.durable().seq.0).expect("a short log");
        assert_eq!(durable, receiver.durable, "durable entries, after {action:?}");
        assert_eq!(disk.timeline(), Some(&receiver.timeline), "the timeline, after {action:?}");
        if !matches!(action, Action::Arrive(_) | Action::ReceiverCrash(_)) {
            return 0;
        }
        let snapshot = disk.snapshot().expect("the log can be read");
        let size = disk_size(config.blocks);
        let whole = BlockRange::whole_disk(size).bytes(size);
        let mut views = vec![(Lsn::MAX, snapshot.latest_view())];
        let newest = receiver.offers().last().copied();
        for lsn in newest.into_iter().flat_map(|(from, to)| [from, to]) {
            views.push((lsn, snapshot.view(lsn).expect("an offered point has a view")));
        }
        let points = views.len();
        for (lsn, view) in views {
            let bytes = view.read(whole).expect("an offered point can be read");
            for block in 0..config.blocks {
                let expected = receiver.value(block, lsn, receiver.log.len());
                assert_eq!(
                    value_in(whole, &bytes, block),
                    expected,
                    "block {block} at {lsn}, after {action:?}"
                );
            }
        }
        u64::try_from(points).expect("a few")
    }
}

impl Said {
    /// Of the end of a connection only the code counts.
    fn without_words(self) -> Self {
        match self {
            Self::Message(number, Message::Close(closed)) => {
                Self::Message(number, crate::receiver::close(closed.code, ""))
            }
            other @ (Self::Message(..) | Self::Compared(..)) => other,
        }
    }
}

fn open(storage: &MemoryStorage) -> Disks {
    let shelf = Shelf {
        storage: Arc::new(storage.clone()),
        // Several segments, and entries that are held back.
        log: LogOptions {
            segment_bytes_max: ByteCount(16 * 1024),
            buffer_bytes_max: ByteCount(4096),
            allocation_step: ByteCount(4096),
            ..LogOptions::default()
        },
        cache: LogCache::new(Default::default()),
        names: Arc::new(Names::new()),
        forgotten: Forgotten::load(Arc::new(storage.clone())).expect("the store can be listed"),
        space_floor: ByteCount::ZERO,
        disks_max: 1,
        watch: StoreWatch::default(),
        findings: Findings::open(Arc::new(storage.clone())),
        new_history: Arc::new(|| HISTORY),
    };
    let known: Vec<DiskId> = shelf.list().expect("the store can be listed");
    Disks::open(shelf, known)
}
