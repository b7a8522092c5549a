//! The receiver: what a driver of its sessions and disks does, over a storage in memory. Its process
//! can be killed, and its host can lose power.

use std::{
    collections::VecDeque,
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
    },
};

use backtide_log_receiver::{
    CommitOutcome, CommitTicket, CompareJob, ConnectionId, Disk, Disks, Effect, Findings, Forgotten, Names,
    Session, Shelf, StoreWatch,
};
use backtide_protocol::{CloseCode, Message, Sequenced};
use backtide_recovery::{Compression, LogCache, LogOptions, Seq};
use backtide_storage::MemoryStorage;
use backtide_units::{ByteCount, HistoryId, Lsn};
use uuid::Uuid;

use crate::{
    plan::Plan,
    points::Promises,
    world::{Event, World},
};

/// See the module's description.
pub struct Receiver {
    pub(crate) storage: MemoryStorage,
    /// None while the process is not running.
    pub(crate) disks: Option<Disks>,
    life: u64,
    pub(crate) connections: u64,
    options: LogOptions,
    histories: Arc<AtomicU64>,
    syncing: Option<Syncing>,
    compares: VecDeque<(u64, CompareJob)>,
    /// What a copy of the store's directory holds, and the points it had.
    copy: Option<(MemoryStorage, Vec<(Lsn, Lsn)>)>,
    /// The store was put back from a copy; connections above this number are to what it holds. An agent that
    /// has not heard from it yet believes in what it was told before.
    put_back: Option<u64>,
    /// And no agent has been in sync with that yet: one that dies may know less than it saw.
    put_back_open: bool,
    /// Acknowledges as durable what is not: a deliberate mistake.
    pub(crate) acks_before_sync: bool,
}

/// The sync under way, and what it makes a promise of.
struct Syncing {
    step: SyncStep,
    through: Seq,
    offered: Vec<(Lsn, Lsn)>,
}

enum SyncStep {
    Taken(Box<CommitTicket>),
    Ran(CommitOutcome),
}

impl Receiver {
    pub(crate) fn new(plan: &Plan) -> Self {
        let options = LogOptions {
            segment_bytes_max: plan.segment,
            buffer_bytes_max: plan.log_buffer,
            allocation_step: ByteCount(64 * 1024),
            compression: match plan.segment.0 >> 10 {
                64 => Compression::Lz4,
                256 => Compression::Zstd,
                _ => Compression::None,
            },
            ..LogOptions::default()
        };
        Self {
            storage: MemoryStorage::new(),
            disks: None,
            life: 0,
            connections: 0,
            options,
            histories: Arc::new(AtomicU64::new(1)),
            syncing: None,
            compares: VecDeque::new(),
            copy: None,
            put_back: None,
            put_back_open: false,
            acks_before_sync: false,
        }
    }

    /// Copies the store's directory, as it is at this moment.
    pub(crate) fn take_copy(&mut self, points: Vec<(Lsn, Lsn)>) {
        self.copy = Some((self.storage.copy(), points));
    }

    /// Whether there is a copy, and it has the point, if one is named.
    pub(crate) fn has_copy_of(&self, point: Option<Lsn>) -> bool {
        let Some((_, points)) = &self.copy else { return false };
        point.is_none_or(|point| points.iter().any(|(from, to)| (*from..=*to).contains(&point)))
    }

    /// Whether the store was put back from a copy and no agent has been told by it what it holds.
    pub(crate) fn is_put_back_unseen(&self) -> bool {
        self.put_back.is_some()
    }

    fn shelf(&self) -> Shelf {
        let histories = Arc::clone(&self.histories);
        Shelf {
            storage: Arc::new(self.storage.clone()),
            log: self.options,
            cache: LogCache::new(Default::default()),
            names: Arc::new(Names::new()),
            forgotten: Forgotten::load(Arc::new(self.storage.clone())).expect("the store can be listed"),
            space_floor: ByteCount(64 * 1024),
            disks_max: 3,
            watch: StoreWatch::default(),
            findings: Findings::open(Arc::new(self.storage.clone())),
            new_history: Arc::new(move || {
                HistoryId(Uuid::from_u128(histories.fetch_add(1, Ordering::Relaxed).into()))
            }),
        }
    }
}

/// The intervals a disk offers.
pub(crate) fn offered(disk: &Disk) -> Vec<(Lsn, Lsn)> {
    let intervals = disk.timeline().map_or(&[][..], |timeline| timeline.intervals());
    intervals.iter().map(|interval| (interval.from.lsn, interval.to.lsn)).collect()
}

impl World {
    pub(crate) fn start_receiver(&mut self) {
        if self.receiver.disks.is_some() {
            return;
        }
        self.receiver.life += 1;
        self.trace.note(self.now, "receiver starts", &[self.receiver.life]);
        let shelf = self.receiver.shelf();
        let known = match shelf.list() {
            Ok(known) => known,
            Err(error) => {
                assert!(self.plan.store_faults, "the store cannot be listed: {error}");
                return self.after(1000, Event::ReceiverStart);
            }
        };
        let disks = Disks::open(shelf, known);
        for disk in disks.iter() {
            let failure = disk.failure().map(|failure| format!("{failure:?}")).unwrap_or_default();
            let injected = failure.is_empty() || (self.plan.store_faults && failure.contains("injected"));
            assert!(injected, "the log cannot be opened: {failure}");
        }
        self.receiver.disks = Some(disks);
        self.note_durable_points();
        self.check_promises();
    }

    /// The process ends, or the host loses power.
    pub(crate) fn stop_receiver(&mut self, power: bool) {
        if self.receiver.disks.take().is_none() {
            return;
        }
        self.trace.note(self.now, "receiver dies", &[self.receiver.life, u64::from(power)]);
        self.stats.receiver_deaths += 1;
        self.receiver.syncing = None;
        self.receiver.compares.clear();
        if power {
            let seed = self.random.number();
            self.receiver.storage.crash(seed);
        } else {
            self.receiver.storage.kill_handles();
        }
        self.receiver_sides_gone();
    }

    /// The store is what the copy holds. The promises are those of the copy from here on: whoever puts it back
    /// takes back the others.
    pub(crate) fn put_copy_back(&mut self) {
        let Some((copy, _)) = &self.receiver.copy else { return };
        self.receiver.storage = copy.copy();
        self.receiver.put_back = Some(self.receiver.connections);
        self.receiver.put_back_open = true;
        self.promises = Promises::default();
        self.stats.stores_put_back += 1;
        self.trace.note(self.now, "store put back", &[self.stats.stores_put_back]);
    }

    /// A welcome reaches the agent: if it is of a store that was put back, everything is known again.
    pub(crate) fn welcome_seen(&mut self, id: u64) {
        if self.receiver.put_back.is_some_and(|before| id > before) {
            self.receiver.put_back = None;
        }
    }

    /// An agent that begins may not know yet what the one before it saw: it hears of it from the next welcome.
    pub(crate) fn agent_knows_less(&mut self) {
        if self.receiver.put_back_open {
            self.receiver.put_back = Some(self.receiver.connections);
        }
    }

    /// An agent is in sync: with what it was told of last.
    pub(crate) fn agent_in_sync(&mut self) {
        self.receiver.put_back_open &= self.receiver.put_back.is_some();
    }

    pub(crate) fn receiver_disk(&self) -> Option<&Disk> {
        self.receiver.disks.as_ref()?.get(self.disk)
    }

    pub(crate) fn handle_at_receiver(&mut self, id: u64, message: Sequenced) {
        let (now, owner) = (self.receiver_wall(), self.receiver_disk().and_then(Disk::owner));
        let replaced = owner.is_some_and(|owner| owner != ConnectionId(id)) && message.seq > 1;
        let before = self.receiver_disk().map(Disk::appended);
        self.trace.note(self.now, "receive", &[id, message.seq]);
        let effects = self.with_session(id, |session, disks| session.handle(disks, message, now));
        let after = self.receiver_disk().map(Disk::appended);
        assert!(!replaced || before == after, "a connection that lost the disk appended to its log");
        self.carry_out_at_receiver(id, effects);
    }

    pub(crate) fn settle(&mut self, id: u64) {
        let effects = self.with_session(id, |session, disks| session.settle(disks));
        self.carry_out_at_receiver(id, effects);
    }

    fn with_session(
        &mut self,
        id: u64,
        act: impl FnOnce(&mut Session, &mut Disks) -> Vec<Effect>,
    ) -> Vec<Effect> {
        let session = self.connections.get_mut(&id).and_then(|connection| connection.session.as_mut());
        match (session, &mut self.receiver.disks) {
            (Some(session), Some(disks)) => act(session, disks),
            _ => Vec::new(),
        }
    }

    fn carry_out_at_receiver(&mut self, id: u64, effects: Vec<Effect>) {
        for effect in effects {
            match effect {
                Effect::Send(message) => self.receiver_sends(id, message),
                Effect::Compare(job) => {
                    self.receiver.compares.push_back((id, job));
                    if self.receiver.compares.len() == 1 {
                        self.within(self.plan.compare_us, Event::Compared(self.receiver.life));
                    }
                }
                Effect::Recalled(_) => unreachable!("nobody asks the agent here"),
                Effect::CloseOther(other, closed) => {
                    let effects = self.with_session(other.0, |session, disks| session.close(disks, closed));
                    self.carry_out_at_receiver(other.0, effects);
                }
                Effect::End => {
                    self.transmit(id, None, false);
                    self.connections.get_mut(&id).expect("it ends now").session = None;
                }
            }
        }
    }

    fn receiver_sends(&mut self, id: u64, mut message: Message) {
        match &mut message {
            Message::Ack { received, durable, .. } => {
                if self.receiver.acks_before_sync {
                    *durable = *received;
                }
                let in_memory = self.received_lsn(id, *received);
                self.promises.received = self.promises.received.max(in_memory);
                let lsn = self.acknowledged_lsn(id, *durable);
                self.promises.acked = self.promises.acked.max(lsn);
            }
            Message::Welcome(welcome) => {
                self.promises.acked = self.promises.acked.max(welcome.durable);
                self.check_promises();
                self.note_durable_points();
            }
            Message::Close(closed) => {
                let stale = !self.is_of_living_agent(id);
                let right = match closed.code {
                    CloseCode::Store => self.plan.store_faults,
                    CloseCode::Fenced => stale,
                    CloseCode::Busy | CloseCode::Bye => true,
                    CloseCode::Version | CloseCode::Invalid | CloseCode::Refused | CloseCode::Denied => false,
                };
                assert!(right, "the receiver closed the connection: {closed:?}");
            }
            _ => {}
        }
        self.trace.say(self.now, || format!("receiver sends {}", crate::link::brief(&message)));
        self.transmit_down(id, &message);
    }

    /// A log that was just opened is durable as a whole.
    fn note_durable_points(&mut self) {
        let whole = self.receiver_disk().filter(|disk| disk.durable().seq == disk.appended());
        if let Some(offered) = whole.filter(|disk| disk.failure().is_none()).map(offered) {
            self.promises.intervals = offered;
        }
    }

    /// At most one sync is under way; what comes meanwhile is for the next.
    pub(crate) fn commit(&mut self) {
        let (Some(disks), None) = (&mut self.receiver.disks, &self.receiver.syncing) else { return };
        let Some(disk) = disks.get_mut(self.disk) else { return };
        let Some(ticket) = disk.ticket() else {
            // When the log failed just now, its connection has to end.
            let owner = disk.owner().filter(|_| disk.failure().is_some());
            return owner.into_iter().for_each(|owner| self.settle(owner.0));
        };
        let (through, offered) = (disk.appended(), offered(disk));
        self.receiver.syncing = Some(Syncing { step: SyncStep::Taken(Box::new(ticket)), through, offered });
        let us = if self.calm { 200 } else { self.plan.sync_us };
        self.within(us, Event::SyncRun(self.receiver.life));
    }

    pub(crate) fn run_sync(&mut self, life: u64) {
        if self.receiver.life != life || self.receiver.disks.is_none() {
            return;
        }
        let Some(Syncing { step, through, offered }) = self.receiver.syncing.take() else { return };
        let SyncStep::Taken(ticket) = step else { unreachable!("a sync runs once") };
        self.trace.note(self.now, "sync", &[through.0]);
        let step = SyncStep::Ran(ticket.sync());
        self.receiver.syncing = Some(Syncing { step, through, offered });
        let us = if self.calm { 200 } else { self.plan.sync_us / 4 };
        self.within(us, Event::SyncDone(life));
    }

    pub(crate) fn sync_done(&mut self, life: u64) {
        if self.receiver.life != life || self.receiver.disks.is_none() {
            return;
        }
        let Some(Syncing { step, through, offered }) = self.receiver.syncing.take() else { return };
        let SyncStep::Ran(outcome) = step else { unreachable!("it ran before it ended") };
        let disks = self.receiver.disks.as_mut().expect("seen above");
        let disk = disks.get_mut(self.disk).expect("a disk that syncs is there");
        disk.synced(outcome);
        if disk.durable().seq >= through {
            self.promises.intervals = offered;
        }
        self.trace.note(self.now, "synced", &[through.0]);
        if let Some(owner) = disk.owner() {
            self.settle(owner.0);
        }
        self.commit();
    }

    pub(crate) fn compared(&mut self, life: u64) {
        if self.receiver.life != life || self.receiver.disks.is_none() {
            return;
        }
        let Some((id, job)) = self.receiver.compares.pop_front() else { return };
        if !self.receiver.compares.is_empty() {
            self.within(self.plan.compare_us, Event::Compared(life));
        }
        let result = job.run().expect("the log can be read");
        let open = self.connections.get(&id).is_some_and(|connection| connection.session.is_some());
        if open {
            self.trace.note(self.now, "compared", &[result.id, result.differing.len() as u64]);
            self.receiver_sends(id, Message::CompareResult(result));
        }
    }
}
