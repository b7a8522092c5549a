//! A thread that owns disks: their logs, and the connections of their agents.
//!
//! A disk belongs to one thread for the receiver's life, and everything that changes its log runs
//! there, one step at a time: so the way of a record takes no lock. Others send [`Task`]s.

use std::{
    cell::{Cell, RefCell},
    collections::{BTreeMap, BTreeSet},
    io,
    rc::Rc,
    sync::mpsc::SyncSender,
    thread::JoinHandle,
    time::Duration,
};

use backtide_control::build_lasting;
use backtide_protocol::{CloseCode, Closed};
use backtide_recovery::{Attached, Base, Rebased, Snapshot};
use backtide_segment::Seq;
use backtide_units::{ByteCount, ByteRange, CaptureTime, DiskId};
use bytes::Bytes;
use tokio::{
    runtime::Builder,
    sync::{Notify, mpsc, oneshot},
    task::LocalSet,
};

use crate::{
    Limits,
    accept::Arrival,
    clock::{self, Came},
    committer::Committer,
    connection,
    disk::{DamagedLog, Disk, Failure, Rebasing},
    disks::{Disks, Shelf, closed},
    facts::DiskFacts,
    past::{EndedLog, Leave},
    pool::Pool,
    reopening::{Settling, Unread},
    session::ConnectionId,
    shortfalls::Shortfalls,
};

/// Tasks waiting for a thread; who sends more waits.
const TASKS_MAX: usize = 256;

/// Logs that a thread opens at once when it starts: each waits for a few syncs, which the file system does together.
const OPENING_THREADS: usize = 8;

/// What others ask of the thread.
pub(crate) enum Task {
    /// Take over a connection whose first message has come.
    Connect(Box<Arrival>),
    /// Tell about all disks.
    Facts(oneshot::Sender<Vec<DiskFacts>>),
    /// Tell about one; none for an unknown disk.
    FactsOf(DiskId, oneshot::Sender<Option<Box<DiskFacts>>>),
    /// Give what is noted of what the store had less of; none for an unknown disk.
    Shortfalls(DiskId, oneshot::Sender<Option<Shortfalls>>),
    /// Give what can be read of a disk, or the reason why nothing can; none for an unknown disk.
    Read(DiskId, oneshot::Sender<Option<Result<Readable, Failure>>>),
    /// Ask the agent of a disk what that has now; dropped when nobody can be asked.
    AskDisk(AskDisk),
    /// Begin a disk's log later; none when it cannot be.
    Rebase { disk: DiskId, base: Box<Base>, answer: oneshot::Sender<Option<Rebasing>> },
    /// That is durable now.
    Rebased { disk: DiskId, life: u64, rebased: Box<Rebased>, answer: oneshot::Sender<()> },
    /// Give what is left of the logs that a disk had before, the oldest first.
    Ended(DiskId, oneshot::Sender<Vec<EndedLog>>),
    /// Give a disk's newest log; none when it is out of use and not damaged, or nobody knows all that is left of it.
    Newest(DiskId, oneshot::Sender<Option<Newest>>),
    /// Give leave to work on a log that has ended, or is the newest and damaged; none when there is no such log that can be read.
    LeaveToFold { disk: DiskId, log: u32, answer: oneshot::Sender<Option<Leave>> },
    /// What could not be read of logs that failed may be by now.
    LookAgain,
    /// Make durable where a log of a disk begins.
    Settle { disk: DiskId, log: u32, answer: oneshot::Sender<Settling> },
    /// Whether a disk may go; none for an unknown disk. No agent gets it from then on.
    Leave(DiskId, oneshot::Sender<Option<Result<Leaving, String>>>),
    /// Give up a disk that goes.
    Take(DiskId, oneshot::Sender<Option<Disk>>),
    /// Close all connections, make everything durable, end.
    Shutdown,
}

/// A disk's points as they were when somebody asked, all of them durable.
pub(crate) struct Readable {
    pub(crate) snapshot: Snapshot,
    pub(crate) attached: Option<Attached>,
    /// What is wrong, when acknowledged bytes are not there any more.
    pub(crate) damage: Option<String>,
    /// Since when its agent is connected, if it is.
    pub(crate) came: Option<Came>,
}

/// The newest log of a disk, as retention sees it.
pub(crate) enum Newest {
    /// As it is, alone, durable.
    InUse(Box<Snapshot>),
    Damaged(DamagedLog),
}

impl Newest {
    pub(crate) fn snapshot(&self) -> &Snapshot {
        match self {
            Self::InUse(snapshot) => snapshot,
            Self::Damaged(log) => &log.snapshot,
        }
    }
}

/// A question to the agent of a disk.
pub(crate) struct AskDisk {
    pub(crate) disk: DiskId,
    pub(crate) range: ByteRange,
    pub(crate) answer: SyncSender<Bytes>,
}

/// A disk that may go.
pub(crate) struct Leaving {
    pub(crate) attached: Option<Attached>,
    pub(crate) log_bytes: ByteCount,
}

/// What the thread's tasks share. Borrows never last across an await.
pub(crate) struct Ingest {
    pub(crate) disks: RefCell<Disks>,
    pub(crate) syncing: RefCell<BTreeSet<DiskId>>,
    /// The logs of these are being opened again.
    pub(crate) reopening: RefCell<BTreeSet<DiskId>>,
    /// Of these nothing can be read of a log that failed.
    pub(crate) unread: RefCell<BTreeMap<DiskId, Unread>>,
    /// Of these the next sync begins when the one under way ends.
    pub(crate) hastened: RefCell<BTreeSet<DiskId>>,
    /// These are synced when the commit interval ends.
    pub(crate) gathering: RefCell<BTreeSet<DiskId>>,
    /// Whether it has begun.
    pub(crate) ticking: Cell<bool>,
    pub(crate) commit_interval: Duration,
    pub(crate) commit_bytes: ByteCount,
    pub(crate) commits: Committer,
    pub(crate) readers: Pool,
    pub(crate) undurable_bytes_max: ByteCount,
    pub(crate) ping_interval: Duration,
    connections: RefCell<BTreeMap<ConnectionId, Rc<Wakeup>>>,
    /// A connection has ended.
    ended: Notify,
    /// A sync has ended, or a log was opened again.
    pub(crate) synced: Notify,
}

/// How a connection's task is reached.
#[derive(Default)]
pub(crate) struct Wakeup {
    pub(crate) notify: Notify,
    /// To be told to the agent before the end.
    pub(crate) close: RefCell<Option<Closed>>,
    /// To be asked.
    pub(crate) questions: RefCell<Vec<AskDisk>>,
}

/// The thread, from outside.
pub(crate) struct IngestThread {
    pub(crate) tasks: mpsc::Sender<Task>,
    pub(crate) thread: JoinHandle<()>,
}

/// Starts a thread that opens and owns `disks`; something comes when all are open, or nothing ever will.
pub(crate) fn start(
    number: usize,
    shelf: Shelf,
    disks: Vec<DiskId>,
    commits: Committer,
    readers: Pool,
    limits: &Limits,
) -> io::Result<(IngestThread, oneshot::Receiver<()>)> {
    let (tasks, inbox) = mpsc::channel(TASKS_MAX);
    let (ready, opened) = oneshot::channel();
    let runtime = build_lasting(&mut Builder::new_current_thread())?;
    let limits = limits.clone();
    let body = move || {
        let ingest = Rc::new(Ingest {
            disks: RefCell::new(Disks::open_side_by_side(shelf, &disks, OPENING_THREADS)),
            syncing: RefCell::default(),
            reopening: RefCell::default(),
            unread: RefCell::default(),
            hastened: RefCell::default(),
            gathering: RefCell::default(),
            ticking: Cell::default(),
            commit_interval: limits.commit_interval(),
            commit_bytes: limits.commit_bytes(),
            commits,
            readers,
            undurable_bytes_max: limits.undurable_bytes,
            ping_interval: Duration::from_millis(limits.ping_interval_ms.max(1)),
            connections: RefCell::default(),
            ended: Notify::new(),
            synced: Notify::new(),
        });
        // Whoever started us may have given up; the closed inbox then ends us.
        let _ = ready.send(());
        LocalSet::new().block_on(&runtime, serve(ingest, inbox));
    };
    let thread = std::thread::Builder::new().name(format!("ingest-{number}")).spawn(body)?;
    Ok((IngestThread { tasks, thread }, opened))
}

async fn serve(ingest: Rc<Ingest>, mut inbox: mpsc::Receiver<Task>) {
    while let Some(task) = inbox.recv().await {
        match task {
            Task::Connect(arrival) => {
                let wakeup = Rc::<Wakeup>::default();
                ingest.connections.borrow_mut().insert(arrival.id, Rc::clone(&wakeup));
                tokio::task::spawn_local(connection::run(Rc::clone(&ingest), *arrival, wakeup));
            }
            // Whoever asked may have gone: nobody misses the answer.
            Task::Facts(answer) => drop(answer.send(ingest.facts())),
            Task::FactsOf(disk, answer) => {
                let facts = ingest.disks.borrow().get(disk).map(DiskFacts::of).map(Box::new);
                drop(answer.send(facts));
            }
            Task::Shortfalls(disk, answer) => {
                let shortfalls = ingest.disks.borrow().get(disk).map(|disk| disk.shortfalls().clone());
                drop(answer.send(shortfalls));
            }
            Task::Read(disk, answer) => {
                let ingest = Rc::clone(&ingest);
                tokio::task::spawn_local(async move { drop(answer.send(ingest.read(disk).await)) });
            }
            Task::AskDisk(question) => ingest.ask_disk(question),
            Task::Rebase { disk, base, answer } => {
                let state = ingest.disks.borrow();
                drop(answer.send(state.get(disk).and_then(|disk| disk.rebase(*base))));
            }
            Task::Rebased { disk, life, rebased, answer } => {
                if let Some(disk) = ingest.disks.borrow_mut().get_mut(disk) {
                    disk.rebased(life, *rebased);
                }
                let _ = answer.send(());
            }
            Task::Ended(disk, answer) => {
                let disks = ingest.disks.borrow();
                drop(answer.send(disks.get(disk).map_or(Vec::new(), |disk| disk.past().logs().to_vec())));
            }
            Task::Newest(disk, answer) => {
                let ingest = Rc::clone(&ingest);
                tokio::task::spawn_local(async move { drop(answer.send(ingest.newest(disk).await)) });
            }
            Task::LeaveToFold { disk, log, answer } => {
                let ingest = Rc::clone(&ingest);
                tokio::task::spawn_local(async move { ingest.give_leave(disk, log, answer).await });
            }
            Task::LookAgain => ingest.look_again(),
            Task::Settle { disk, log, answer } => {
                let ingest = Rc::clone(&ingest);
                tokio::task::spawn_local(async move { drop(answer.send(ingest.settle(disk, log).await)) });
            }
            Task::Leave(disk, answer) => {
                let ingest = Rc::clone(&ingest);
                tokio::task::spawn_local(async move {
                    ingest.until_synced(disk).await;
                    drop(answer.send(ingest.leave(disk)));
                });
            }
            Task::Take(disk, answer) => {
                let ingest = Rc::clone(&ingest);
                tokio::task::spawn_local(async move {
                    // Its outcome must not reach what has the same name later.
                    ingest.until_synced(disk).await;
                    drop(answer.send(ingest.take_away(disk)));
                });
            }
            Task::Shutdown => break,
        }
    }
    ingest.shut_down().await;
}

impl Ingest {
    /// The receiver's clock.
    pub(crate) fn now(&self) -> CaptureTime {
        clock::now()
    }

    /// Wakes the connection that owns a disk.
    pub(crate) fn wake_owner(&self, disk: DiskId) {
        let owner = self.disks.borrow().get(disk).and_then(Disk::owner);
        if let Some(wakeup) = owner.and_then(|owner| self.connections.borrow().get(&owner).cloned()) {
            wakeup.notify.notify_one();
        }
    }

    fn ask_disk(&self, question: AskDisk) {
        let owner = self.disks.borrow().get(question.disk).and_then(Disk::owner);
        if let Some(wakeup) = owner.and_then(|owner| self.connections.borrow().get(&owner).cloned()) {
            wakeup.questions.borrow_mut().push(question);
            wakeup.notify.notify_one();
        }
    }

    /// Has a connection closed.
    pub(crate) fn close(&self, connection: ConnectionId, closed: Closed) {
        if let Some(wakeup) = self.connections.borrow().get(&connection) {
            wakeup.close.borrow_mut().get_or_insert(closed);
            wakeup.notify.notify_one();
        }
    }

    /// A connection's task has ended.
    pub(crate) fn forget(&self, connection: ConnectionId) {
        self.connections.borrow_mut().remove(&connection);
        self.ended.notify_waiters();
    }

    fn facts(&self) -> Vec<DiskFacts> {
        self.disks.borrow().iter().map(DiskFacts::of).collect()
    }

    /// Waits until no sync of the disk is under way, and nobody opens its log again.
    async fn until_synced(&self, disk: DiskId) {
        loop {
            // Registered before the look, so that no end is missed between.
            let synced = self.synced.notified();
            if !self.syncing.borrow().contains(&disk) && !self.reopening.borrow().contains(&disk) {
                break;
            }
            synced.await;
        }
    }

    /// What ends a sentence that begins with the disk says why it may not go.
    fn leave(&self, disk: DiskId) -> Option<Result<Leaving, String>> {
        let disks = self.disks.borrow();
        let state = disks.get(disk)?;
        Some(if state.owner().is_some() {
            Err("is connected: detach it at its agent".to_owned())
        } else if state.is_worked_on() {
            Err("has a log that failed, and work on its files has not ended: the device may be slow"
                .to_owned())
        } else {
            Ok(Leaving { attached: state.attached().cloned(), log_bytes: state.log_bytes() })
        })
    }

    fn take_away(&self, disk: DiskId) -> Option<Disk> {
        self.gathering.borrow_mut().remove(&disk);
        self.hastened.borrow_mut().remove(&disk);
        self.disks.borrow_mut().take(disk)
    }

    /// What a disk gives back now. What was received by now is made durable first: no point is
    /// offered that a power cut could take.
    async fn read(self: Rc<Self>, disk: DiskId) -> Option<Result<Readable, Failure>> {
        loop {
            self.make_readable(disk).await;
            let (life, failed) =
                self.disks.borrow().get(disk).map(|disk| (disk.life(), disk.failure().is_some()))?;
            let taken = self.take(disk)?;
            let readable = match &taken {
                Ok(readable) => readable,
                // Taking it has failed the log just now: something is left of it.
                Err(_) if !failed => continue,
                Err(_) => return Some(taken),
            };
            if self.durable(disk, life, readable.snapshot.through()).await? {
                return Some(taken);
            }
        }
    }

    async fn newest(self: Rc<Self>, disk: DiskId) -> Option<Newest> {
        let readable = Rc::clone(&self).read(disk).await?;
        let disks = self.disks.borrow();
        let state = disks.get(disk)?;
        // Of one that is out of use what is read may be that of older logs alone.
        match state.failure() {
            None => Some(Newest::InUse(Box::new(readable.ok()?.snapshot.alone()))),
            Some(_) => state.damaged_log().map(Newest::Damaged),
        }
    }

    fn take(&self, disk: DiskId) -> Option<Result<Readable, Failure>> {
        let mut disks = self.disks.borrow_mut();
        let snapshot = disks.get_mut(disk)?.snapshot();
        let state = disks.get(disk)?;
        let lacking = state.may_lack_something().map(|failure| failure.why.clone());
        let damage = lacking.or_else(|| state.lost_end().map(str::to_owned));
        let snapshot = match state.lost_end() {
            Some(why) => snapshot.map(|snapshot| snapshot.ending(why)),
            None => snapshot,
        };
        let (attached, came) = (state.attached().cloned(), state.came());
        let failed = state.failure().is_some();
        drop(disks);
        if failed {
            // Taking it may have failed the log: its agent must not go on.
            self.wake_owner(disk);
        }
        Some(snapshot.map(|snapshot| Readable { snapshot, attached, damage, came }))
    }

    /// Waits until entry `through` is durable; false when the log was opened again or failed meanwhile.
    /// What can be read of a log that has failed is durable. None for an unknown disk.
    async fn durable(self: &Rc<Self>, disk: DiskId, life: u64, through: Seq) -> Option<bool> {
        let was_failed = self.disks.borrow().get(disk)?.failure().is_some();
        loop {
            // Registered before the look, so that no sync is missed between.
            let synced = self.synced.notified();
            if !was_failed {
                self.commit(disk);
            }
            {
                let disks = self.disks.borrow();
                let state = disks.get(disk)?;
                if state.life() != life || state.failure().is_some() != was_failed {
                    return Some(false);
                }
                if was_failed || state.durable().seq >= through {
                    return Some(true);
                }
            }
            synced.await;
        }
    }

    async fn shut_down(self: Rc<Self>) {
        let connections: Vec<_> = self.connections.borrow().keys().copied().collect();
        for connection in connections {
            self.close(connection, closed(CloseCode::Bye, "the receiver is shutting down"));
        }
        loop {
            // Registered before the check, so that no end is missed between.
            let ended = self.ended.notified();
            if self.connections.borrow().is_empty() {
                break;
            }
            ended.await;
        }
        let tickets: Vec<_> = {
            let mut disks = self.disks.borrow_mut();
            let ids: Vec<_> = disks.iter().map(Disk::id).collect();
            ids.into_iter().filter_map(|id| Some((id, disks.get_mut(id)?.ticket()?))).collect()
        };
        let (ids, tickets): (Vec<_>, Vec<_>) = tickets.into_iter().unzip();
        for (id, submitted) in ids.into_iter().zip(self.commits.submit(tickets)) {
            let outcome = submitted.outcome().await;
            if let (Some(disk), Ok(outcome)) = (self.disks.borrow_mut().get_mut(id), outcome) {
                disk.synced(outcome);
            }
        }
    }
}
