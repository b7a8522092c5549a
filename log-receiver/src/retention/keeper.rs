//! The thread that sees to retention: makes images of history that grows old, lets logs begin later, gives room back.
//!
//! It is alone in that, for all disks of the store, so no image is made while another thread collects. It reads snapshots as
//! everybody does, at a bounded rate, and asks the threads that own the logs only for the moment in which a log begins later.
//! What it does is whole whenever it ends: it can be stopped at any time.

mod begin;
mod damaged;
mod ended;
mod low;
mod room;
mod thin;

use std::{
    collections::{BTreeMap, BTreeSet},
    sync::{
        Arc, Condvar, Mutex, MutexGuard, PoisonError,
        atomic::{AtomicBool, Ordering},
    },
    thread::JoinHandle,
    time::{Duration, Instant},
};

use backtide_recovery::{LogError, Snapshot};
use backtide_units::{ByteCount, CaptureTime, DiskId};
use tokio::sync::{mpsc, oneshot};

use super::{Growth, PlanError, Policies, Pressure, forecast::Forecast};
use crate::{
    Shelf,
    accept::Door,
    config::Retention,
    disk::chain,
    facts::DiskFacts,
    ingest::{Readable, Task},
    overlays::Overlays,
};

/// After so many rounds the store is looked through for what nobody has, even if nothing seems to have changed.
const COLLECT_ROUNDS: u64 = 60;

/// It waits no longer at once for its rate, so as to be stopped soon.
const WAIT_MAX: Duration = Duration::from_millis(100);

/// What it does and did.
#[derive(Clone, Debug, Default)]
pub(crate) struct KeeperStatus {
    /// Why history of a disk could not be thinned.
    pub(crate) errors: BTreeMap<DiskId, String>,
    /// Why room could not be given back.
    pub(crate) error: Option<String>,
    /// What is kept of logs whose directories are away, a sentence each.
    pub(crate) apart: Vec<String>,
    /// Disks whose oldest history went although it was promised, since the receiver started.
    pub(crate) shrunk: BTreeMap<DiskId, u64>,
    /// Bytes of segments and packs that were removed since the receiver started.
    pub(crate) freed: ByteCount,
    /// The store has little room left.
    pub(crate) low: Option<String>,
    /// No disk could give any of it the last time.
    pub(crate) stuck: bool,
    /// How the store filled; none when it is too early to say.
    pub(crate) growth: Option<Growth>,
    /// Rounds that have ended.
    pub(crate) rounds: u64,
}

/// The keeper, from outside. Dropped, it ends soon.
pub(crate) struct Keeper {
    shared: Arc<Shared>,
    thread: Option<JoinHandle<()>>,
}

#[derive(Default)]
struct Shared {
    status: Mutex<KeeperStatus>,
    /// Somebody wants a round now.
    wanted: Mutex<bool>,
    changed: Condvar,
    /// A disk was forgotten: room may be given back.
    collect: AtomicBool,
    stop: AtomicBool,
}

struct Work {
    shelf: Shelf,
    threads: Vec<mpsc::Sender<Task>>,
    policies: Policies,
    overlays: Overlays,
    settings: Retention,
    shared: Arc<Shared>,
    /// Room may be given back.
    collect: bool,
    /// The disk whose history went last for want of room.
    shrunk_last: Option<DiskId>,
    /// The newest of the single points that went last, of whatever disk.
    dropped_last: Option<CaptureTime>,
    /// Bytes of history given up that are still there; none before the first look.
    left: Option<BTreeMap<DiskId, ByteCount>>,
    /// What was free when a log's images did not fit.
    no_room: BTreeMap<LogKey, ByteCount>,
    /// What of a log's history could not be read when it was to be folded.
    unreadable: BTreeMap<LogKey, thin::Unreadable>,
    /// Logs that have ended, of which it is known that what they begin with is durable everywhere.
    settled: BTreeSet<(DiskId, u32)>,
    started: Instant,
    forecast: Forecast,
}

/// A log of a disk: the one in use, or by its number one that has ended.
type LogKey = (DiskId, Option<u32>);

/// The receiver is shutting down.
struct Ending;

/// Why a log was not thinned.
enum Undone {
    Ending,
    /// It may be in another round; others tell why, if it is worth telling.
    Later,
    Why(String),
}

/// What came of a look at the logs of a disk.
#[derive(Default)]
struct Thinned {
    /// Something went, whatever else stays.
    done: bool,
    /// Something stays that should go.
    stays: bool,
    /// Why, of the first of which it is told.
    why: Option<String>,
}

impl Thinned {
    /// Adds what came of one of them.
    fn add(&mut self, log: Result<bool, Undone>) -> Result<(), Ending> {
        match log {
            Ok(done) => self.done |= done,
            Err(Undone::Ending) => return Err(Ending),
            Err(Undone::Later) => self.stays = true,
            Err(Undone::Why(why)) => {
                self.stays = true;
                self.why.get_or_insert(why);
            }
        }
        Ok(())
    }

    /// Whether newer logs are not looked at. For want of room the oldest history goes, and no more of a disk in a round; where it
    /// cannot go, newer history must not pay for it.
    fn is_all(&self, pressure: Pressure) -> bool {
        pressure == Pressure::Shrink && (self.done || self.stays)
    }
}

impl Keeper {
    /// Starts it.
    pub(crate) fn start(
        shelf: Shelf,
        threads: Vec<mpsc::Sender<Task>>,
        policies: Policies,
        overlays: Overlays,
        settings: Retention,
    ) -> std::io::Result<Self> {
        let shared = Arc::<Shared>::default();
        let work = Work {
            shelf,
            threads,
            policies,
            overlays,
            settings,
            shared: Arc::clone(&shared),
            collect: true,
            shrunk_last: None,
            dropped_last: None,
            left: None,
            no_room: BTreeMap::new(),
            unreadable: BTreeMap::new(),
            settled: BTreeSet::new(),
            started: Instant::now(),
            forecast: Forecast::default(),
        };
        let thread = std::thread::Builder::new().name("retention".to_owned()).spawn(move || work.run())?;
        Ok(Self { shared, thread: Some(thread) })
    }

    /// What others see of it.
    pub(crate) fn watch(&self) -> KeeperWatch {
        KeeperWatch(Arc::clone(&self.shared))
    }

    /// Ends it and waits for that; blocks.
    pub(crate) fn end(mut self) {
        self.stop();
        if self.thread.take().is_some_and(|thread| thread.join().is_err()) {
            tracing::error!("the thread of retention panicked");
        }
    }

    fn stop(&self) {
        self.shared.stop.store(true, Ordering::Relaxed);
        self.shared.changed.notify_all();
    }
}

impl Drop for Keeper {
    fn drop(&mut self) {
        self.stop();
    }
}

/// What others see of the keeper. Clones see the same.
#[derive(Clone)]
pub(crate) struct KeeperWatch(Arc<Shared>);

impl KeeperWatch {
    /// What it does and did.
    pub(crate) fn status(&self) -> KeeperStatus {
        lock(&self.0.status).clone()
    }

    /// Wants the room of what is gone back, now.
    pub(crate) fn collect(&self) {
        self.0.collect.store(true, Ordering::Relaxed);
        self.wake();
    }

    /// Wants a round now.
    pub(crate) fn wake(&self) {
        *lock(&self.0.wanted) = true;
        self.0.changed.notify_all();
    }
}

impl Shared {
    fn is_ending(&self) -> bool {
        self.stop.load(Ordering::Relaxed)
    }

    /// Waits for the next round; false when there is none.
    fn wait(&self, interval: Duration) -> bool {
        let begun = Instant::now();
        let mut wanted = lock(&self.wanted);
        while !self.is_ending() && !*wanted && begun.elapsed() < interval {
            let left = interval.saturating_sub(begun.elapsed()).min(Duration::from_secs(1));
            wanted = self.changed.wait_timeout(wanted, left).unwrap_or_else(PoisonError::into_inner).0;
        }
        *wanted = false;
        !self.is_ending()
    }
}

impl Work {
    fn run(mut self) {
        let interval = Duration::from_millis(self.settings.interval_ms.max(1));
        while self.shared.wait(interval) {
            if self.round().is_err() {
                return;
            }
            lock(&self.shared.status).rounds += 1;
        }
    }

    fn round(&mut self) -> Result<(), Ending> {
        self.note_time();
        for thread in &self.threads {
            thread.blocking_send(Task::LookAgain).map_err(|_| Ending)?;
        }
        let pressure = self.look_at_the_room();
        let mut disks = self.disks()?;
        self.collect |= self.shared.collect.swap(false, Ordering::Relaxed);
        lock(&self.shared.status).errors.retain(|disk, _| disks.contains(disk));
        self.unreadable.retain(|(disk, _), _| disks.contains(disk));
        self.settled.retain(|(disk, _)| disks.contains(disk));
        // Before anything else goes.
        let doubtful = self.settle_all()?;
        disks.retain(|disk| doubtful.get(disk) != Some(&true));
        match pressure {
            Pressure::None => self.thin_each(&disks, &doubtful)?,
            Pressure::Shrink => self.shrink(disks, &doubtful)?,
        }
        let rounds = lock(&self.shared.status).rounds;
        if rounds.is_multiple_of(COLLECT_ROUNDS) {
            self.collect = true;
            self.no_room.clear();
        }
        let given = self.give_room_back();
        if let Err(why) = &given {
            tracing::warn!(why, "room cannot be given back");
        }
        lock(&self.shared.status).error = given.err();
        Ok(())
    }

    /// Does what the ladders want, disk by disk. Each gives its room back before the next needs some; where little is left all the
    /// same, the next round begins at once, and history goes for it.
    fn thin_each(&mut self, disks: &[DiskId], doubtful: &BTreeMap<DiskId, bool>) -> Result<(), Ending> {
        for disk in disks {
            if self.is_short() {
                *lock(&self.shared.wanted) = true;
                break;
            }
            let Thinned { done, why, .. } = self.thin_all(*disk, Pressure::None)?;
            self.tell(*disk, why, doubtful);
            if done {
                self.remove_segments_of(*disk);
            }
        }
        Ok(())
    }

    /// Tells why history of a disk stays, if it does.
    fn tell(&self, disk: DiskId, why: Option<String>, doubtful: &BTreeMap<DiskId, bool>) {
        match why {
            None if doubtful.contains_key(&disk) => {}
            None => {
                lock(&self.shared.status).errors.remove(&disk);
            }
            Some(why) => {
                let before = lock(&self.shared.status).errors.insert(disk, why.clone());
                if before.as_ref() != Some(&why) {
                    tracing::warn!(%disk, why, "old history stays");
                }
            }
        }
    }

    /// Locks go by how long the store has been open.
    fn note_time(&self) {
        match self.policies.note_time() {
            Ok(None) => {}
            Ok(Some(jump)) => tracing::warn!(jump, "locks last longer"),
            Err(why) => tracing::warn!(why, "locks last longer, their time cannot be noted"),
        }
    }

    /// The disks whose logs are in use, or damaged: those wait for their agents, and grow old meanwhile.
    fn disks(&self) -> Result<Vec<DiskId>, Ending> {
        let mut disks = Vec::new();
        for thread in &self.threads {
            let facts: Vec<DiskFacts> = ask(thread, Task::Facts)?;
            disks.extend(
                facts
                    .into_iter()
                    .filter(|facts| facts.error.is_none() || facts.is_damaged)
                    .map(|facts| facts.id),
            );
        }
        Ok(disks)
    }

    fn thread_of(&self, disk: DiskId) -> &mpsc::Sender<Task> {
        &self.threads[Door::owner(disk, self.threads.len())]
    }

    /// The log in use of a disk, durable; none when it has failed since.
    fn snapshot(&self, disk: DiskId) -> Result<Option<Snapshot>, Ending> {
        Ok(self.all_logs(disk)?.map(|snapshot| snapshot.alone()))
    }

    /// The same with those before it.
    fn all_logs(&self, disk: DiskId) -> Result<Option<Snapshot>, Ending> {
        let readable = ask(self.thread_of(disk), |answer| Task::Read(disk, answer))?;
        Ok(match readable {
            Some(Ok(Readable { snapshot, .. })) => Some(snapshot),
            Some(Err(_)) | None => None,
        })
    }

    /// Waits when more was read than the rate allows; false when the receiver ends.
    fn pace(&self, begun: Instant, done: u64) -> bool {
        let rate = self.settings.bytes_per_second_max.0;
        let due = if rate == 0 { Duration::ZERO } else { Duration::from_secs_f64(done as f64 / rate as f64) };
        while !self.shared.is_ending() {
            let early = due.saturating_sub(begun.elapsed());
            if early.is_zero() {
                return true;
            }
            std::thread::sleep(early.min(WAIT_MAX));
        }
        false
    }
}

impl From<Ending> for Undone {
    fn from(Ending: Ending) -> Self {
        Self::Ending
    }
}

impl From<LogError> for Undone {
    fn from(error: LogError) -> Self {
        Self::Why(chain(&error))
    }
}

impl From<PlanError> for Undone {
    fn from(error: PlanError) -> Self {
        Self::Why(match &error {
            PlanError::Log(LogError::Damaged { .. }) => thin::cannot_be_read(&chain(&error)),
            PlanError::Log(_) | PlanError::TooMany { .. } => chain(&error),
        })
    }
}

/// Asks a thread that owns disks, and waits.
fn ask<T>(thread: &mpsc::Sender<Task>, task: impl FnOnce(oneshot::Sender<T>) -> Task) -> Result<T, Ending> {
    let (answer, answered) = oneshot::channel();
    thread.blocking_send(task(answer)).map_err(|_| Ending)?;
    answered.blocking_recv().map_err(|_| Ending)
}

/// Nothing that could panic runs under these locks.
fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}
