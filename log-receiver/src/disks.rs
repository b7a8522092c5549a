//! The disks that one thread owns: found, created, claimed by agents, opened again after a failure.
//!
//! This is the handshake's half that knows the store; the half that knows the stream is
//! [`crate::session`]. No sockets and no clock: a simulation runs it over a storage in memory.
//!
//! Invariants of a claim:
//! - an epoch lower than any this store has seen changes nothing, nor does an equal one of another
//!   attach: two agents with copies of one state never both have the disk (fencing);
//! - a higher epoch, a new name or a new size is an entry of the log itself, so it is durable with
//!   the log, before the agent hears of it;
//! - after a claim only the claiming connection may append.

use std::{
    collections::BTreeMap,
    io,
    panic::resume_unwind,
    path::{Path, PathBuf},
    sync::{
        Arc,
        atomic::{AtomicUsize, Ordering},
    },
};

use backtide_protocol::{CloseCode, Closed, Hello, ReceiverState};
use backtide_recovery::{Attached, DiskLog, LogCache, LogError, LogOptions, Snapshot};
use backtide_segment::Seq;
use backtide_storage::{KillPoint, Storage};
use backtide_units::{ByteCount, CaptureTime, DiskId, DiskName, HistoryId};
use uuid::Uuid;

use crate::{
    Forgotten, Names, StoreWatch,
    clock::Came,
    disk::{Disk, DiskError, Failure, chain},
    entries,
    findings::Findings,
    log_mark::LogMark,
    logs::{LOGS_MAX, NUMBER_MAX},
    past::{EndedLog, Past},
    reopening::{Reopened, Reopening},
    session::ConnectionId,
    space::Space,
};

/// The directory of the disks' logs.
pub(crate) const DISKS: &str = "disks";

/// What the disks of a store have in common. Clones share it.
#[derive(Clone)]
pub struct Shelf {
    /// The store's files.
    pub storage: Arc<dyn Storage>,
    /// Limits of each log.
    pub log: LogOptions,
    /// Index blocks and open files of all readers.
    pub cache: LogCache,
    /// Names in use.
    pub names: Arc<Names>,
    /// Disks that are not the store's any more.
    pub forgotten: Forgotten,
    /// New data is refused when less than this is free, so that logs can always be closed cleanly.
    pub space_floor: ByteCount,
    /// The most disks the store takes.
    pub disks_max: usize,
    /// Whether the store is still where it was.
    pub watch: StoreWatch,
    /// What was found damaged.
    pub findings: Findings,
    /// Makes the history ids of new disks; random but in a simulation.
    pub new_history: Arc<dyn Fn() -> HistoryId + Send + Sync>,
}

/// The disks that one thread owns.
pub struct Disks {
    shelf: Shelf,
    space: Space,
    disks: BTreeMap<DiskId, Disk>,
}

/// A disk claimed by a connection.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Claim {
    /// The disk.
    pub disk: DiskId,
    /// The history this receiver keeps of it.
    pub history: HistoryId,
    /// Whether that is what the agent expected.
    pub state: ReceiverState,
    /// The attach that had the disk before, or the claim's own.
    pub last_attach: Option<Uuid>,
    /// The newest entry before the claim's own.
    pub before: Seq,
    /// The claim holds when the log is durable up to here.
    pub through: Seq,
    /// The connection that had the disk before, and what to tell it.
    pub replaced: Option<(ConnectionId, Closed)>,
}

/// A disk with an open log.
struct Found {
    /// Nothing was known of it.
    fresh: bool,
    /// The connection that had it when its log failed.
    displaced: Option<ConnectionId>,
}

/// The store's directory of disks cannot be read.
#[derive(Debug, thiserror::Error)]
#[error("cannot list the disks in {}", path.display())]
pub struct ListError {
    path: PathBuf,
    source: io::Error,
}

impl Shelf {
    /// The disks that have a directory in the store, sorted; none of those that are being forgotten.
    ///
    /// # Errors
    /// The file system's.
    pub fn list(&self) -> Result<Vec<DiskId>, ListError> {
        let fail = |source| ListError { path: self.storage.display(Path::new(DISKS)), source };
        self.storage.create_dir(Path::new(DISKS)).map_err(fail)?;
        self.storage.sync_dir(Path::new("")).map_err(fail)?;
        let names = self.storage.list(Path::new(DISKS)).map_err(fail)?;
        let mut disks: Vec<_> = names.iter().filter_map(|name| name.parse().ok()).map(DiskId).collect();
        disks.retain(|disk| !self.forgotten.is_going(*disk));
        disks.sort();
        Ok(disks)
    }
}

impl Disks {
    /// Opens the logs of `disks` (recovering them). One that cannot be opened is kept with the
    /// reason; the others are served.
    pub fn open(shelf: Shelf, disks: impl IntoIterator<Item = DiskId>) -> Self {
        let opened: Vec<_> = disks.into_iter().map(|id| shelf.open_disk(id)).collect();
        Self::of(shelf, opened)
    }

    /// The same on several threads: what takes long is to wait for the device.
    pub(crate) fn open_side_by_side(shelf: Shelf, disks: &[DiskId], threads: usize) -> Self {
        let next = AtomicUsize::new(0);
        let open = || {
            let next = || disks.get(next.fetch_add(1, Ordering::Relaxed));
            std::iter::from_fn(next).map(|id| shelf.open_disk(*id)).collect::<Vec<_>>()
        };
        let opened = std::thread::scope(|scope| {
            let start = |_| std::thread::Builder::new().name("open".to_owned()).spawn_scoped(scope, open);
            // A system without threads to spare lets fewer do it, or this one alone.
            let threads: Vec<_> =
                (0..threads.min(disks.len())).map_while(|number| start(number).ok()).collect();
            let mut opened = if threads.is_empty() { open() } else { Vec::new() };
            for thread in threads {
                opened.extend(thread.join().unwrap_or_else(|panic| resume_unwind(panic)));
            }
            opened
        });
        Self::of(shelf, opened)
    }

    fn of(shelf: Shelf, opened: Vec<Option<Disk>>) -> Self {
        let space = Space::new(Arc::clone(&shelf.storage), shelf.space_floor, shelf.watch.refusals.clone());
        let disks = opened.into_iter().flatten().map(|disk| (disk.id(), disk)).collect();
        let this = Self { shelf, space, disks };
        for disk in this.disks.values() {
            if let Some(failure) = disk.failure() {
                tracing::error!(disk = %disk.id(), why = failure.why, "the disk's log cannot be opened");
            }
            this.take_recorded_name(disk);
        }
        this
    }

    /// What they have in common.
    pub(crate) fn shelf(&self) -> &Shelf {
        &self.shelf
    }

    /// A disk.
    pub fn get(&self, disk: DiskId) -> Option<&Disk> {
        self.disks.get(&disk)
    }

    /// Gives up a disk that goes: nobody finds it any more.
    pub(crate) fn take(&mut self, disk: DiskId) -> Option<Disk> {
        self.disks.remove(&disk)
    }

    /// A disk, to commit or read its log.
    pub fn get_mut(&mut self, disk: DiskId) -> Option<&mut Disk> {
        self.disks.get_mut(&disk)
    }

    /// A disk's points as they are now, for readers on other threads: of a log that is out of use, what
    /// can still be read of it. None for an unknown disk.
    ///
    /// # Errors
    /// Why nothing can be read.
    pub fn snapshot(&mut self, disk: DiskId) -> Option<Result<Snapshot, Failure>> {
        let disk = self.disks.get_mut(&disk)?;
        self.shelf.make_readable(disk);
        let snapshot = disk.snapshot();
        // Taking it may have failed the log just now.
        self.shelf.make_readable(disk);
        Some(if snapshot.is_err() { disk.snapshot() } else { snapshot })
    }

    /// What a disk is called, by its log or by the name that was kept for it; none for an unknown one.
    pub(crate) fn name_of(&self, disk: DiskId) -> Option<DiskName> {
        let attached = self.disks.get(&disk).and_then(Disk::attached).map(|attached| attached.name.clone());
        attached.or_else(|| self.shelf.names.name_of(disk))
    }

    /// All disks, by id.
    pub fn iter(&self) -> impl Iterator<Item = &Disk> {
        self.disks.values()
    }

    /// Claims the disk of `hello` for `connection`, creating it when it is unknown.
    ///
    /// # Errors
    /// Why not, as it is told to the agent; nothing was changed.
    pub fn claim(
        &mut self,
        connection: ConnectionId,
        hello: &Hello,
        now: CaptureTime,
    ) -> Result<Claim, Closed> {
        self.shelf.watch.check().map_err(|why| closed(CloseCode::Store, why))?;
        self.space.look(ByteCount::ZERO).map_err(|why| closed(CloseCode::Store, why))?;
        self.shelf.findings.write_what_failed();
        self.shelf.forgotten.admit(hello, self.disks.contains_key(&hello.disk))?;
        let Found { fresh, displaced } = self.find_or_create(hello)?;
        let disk = self.disks.get_mut(&hello.disk).expect("the disk was found or created");
        // A log that began behind a damaged one may have no attach yet: those before it fence as well.
        let attached = disk.attached().cloned();
        check_attached(attached.as_ref(), hello)?;
        let acknowledged = hello.acked_durable.min(hello.next_lsn);
        let learned = self.shelf.learn_acknowledged(disk, acknowledged);
        learned.map_err(|error| closed(CloseCode::Store, chain(&error)))?;
        take_name(&self.shelf.names, hello)?;
        let own = disk.timeline().and_then(|timeline| timeline.attached());
        let unchanged = own.is_some_and(|attached| {
            attached.epoch == hello.epoch && attached.size == hello.size && attached.name == hello.name
        });
        let before = disk.appended();
        let through = if unchanged {
            before
        } else {
            let entry = entries::attach(hello, before, now);
            let appended = disk.append(entry, ByteCount::ZERO);
            KillPoint::ClaimAppended.reached();
            appended.map_err(|error| {
                // The log does not know the new name: it keeps the old one.
                if let Some(attached) = &attached {
                    let _ = self.shelf.names.take(&attached.name, hello.disk);
                }
                refusal(error)
            })?
        };
        if !unchanged {
            self.shelf.remember(disk);
        }
        let history = disk.history().expect("the log is open: it took the claim");
        let loss = disk.uncompared_loss();
        if let Some(why) = loss {
            tracing::warn!(disk = %hello.disk, why, "the agent is told to compare everything");
        }
        let state = match hello.history {
            _ if fresh => ReceiverState::New,
            // The agent's bitmap knows nothing of what was lost after it had been acknowledged.
            Some(_) if loss.is_some() => ReceiverState::Foreign,
            Some(named) if named == history => ReceiverState::Known,
            Some(_) | None => ReceiverState::Foreign,
        };
        let last_attach = attached.as_ref().map(|attached| attached.attach);
        let replaced = disk.set_owner(connection, Came::new(hello.next_lsn)).or(displaced).map(|old| {
            let higher = attached.is_some_and(|attached| hello.epoch > attached.epoch);
            (old, replaced_by(hello, higher))
        });
        Ok(Claim { disk: hello.disk, history, state, last_attach, before, through, replaced })
    }

    /// Refuses new data when the store has too little room for it.
    pub(crate) fn check_space(&self, wanted: ByteCount) -> Result<(), String> {
        // A store that has gone has no room either: what is wrong is said first.
        self.space.take(wanted).map_err(|why| self.shelf.watch.check().err().unwrap_or(why))
    }

    /// Makes sure that the disk is there with an open log. A failed one is opened again only for a
    /// hello that may have it: a refused hello changes nothing.
    fn find_or_create(&mut self, hello: &Hello) -> Result<Found, Closed> {
        let store = |error: LogError| closed(CloseCode::Store, chain(&error));
        if let Some(disk) = self.disks.get_mut(&hello.disk) {
            let mut displaced = None;
            if let Some(failure) = disk.failure() {
                check_attached(disk.attached(), hello)?;
                if disk.is_unlisted() {
                    return Err(closed(CloseCode::Store, &failure.why));
                }
                if disk.is_worked_on() {
                    let why =
                        "the disk's log failed, and work on its files has not ended: the device may be slow";
                    return Err(closed(CloseCode::Store, why));
                }
                let prepared = disk.take_reopened();
                match prepared.unwrap_or_else(|| Reopening::of(&self.shelf, disk).run()) {
                    Reopened::Open(log, mark) => {
                        check_attached(log.timeline().attached(), hello)?;
                        take_name(&self.shelf.names, hello)?;
                        displaced = disk.reopened(*log, mark);
                    }
                    Reopened::Damaged { error, left, ended } => {
                        // What is left of it may know an attach that nothing else does.
                        if let Some(left) = left {
                            disk.salvaged(*left);
                        }
                        check_attached(disk.attached(), hello)?;
                        take_name(&self.shelf.names, hello)?;
                        displaced = begin_new_log(&self.shelf, disk, &error, ended)?;
                    }
                    Reopened::Failed(error) => {
                        disk.fail(Failure::from(&error));
                        return Err(store(error));
                    }
                }
            }
            // A log without an attach was created by a claim that failed: as good as new.
            let fresh = disk.timeline().and_then(|timeline| timeline.attached()).is_none();
            return Ok(Found { fresh, displaced });
        }
        take_name(&self.shelf.names, hello)?;
        if self.shelf.names.all().len() > self.shelf.disks_max {
            self.shelf.names.release(hello.disk);
            let why = format!("the store has its limit of {} disks", self.shelf.disks_max);
            return Err(closed(CloseCode::Refused, why));
        }
        let created = self.shelf.create(hello.disk, 1).and_then(|log| {
            let mark = self.shelf.mark(hello.disk, 1, &log)?;
            Ok((log, mark))
        });
        let (log, mark) = created.map_err(|error| {
            self.shelf.names.release(hello.disk);
            store(error)
        })?;
        let fresh = log.timeline().attached().is_none();
        let shortfalls = self.shelf.shortfalls(hello.disk);
        let disk = Disk::new(hello.disk, 1, Ok((log, mark)), Past::default(), shortfalls);
        self.disks.insert(hello.disk, disk);
        Ok(Found { fresh, displaced: None })
    }

    /// Puts what a directory that could not be listed has in the place of the disk that stood for it.
    pub(crate) fn listed(&mut self, disk: DiskId, found: Option<Disk>) {
        if !self.disks.get(&disk).is_some_and(Disk::is_unlisted) {
            return;
        }
        match found {
            Some(found) => {
                tracing::info!(%disk, why = found.failure().map(|failure| &failure.why), "the disk's logs were looked for again");
                self.take_recorded_name(&found);
                self.disks.insert(disk, found);
            }
            None => {
                self.shelf.names.release(disk);
                self.disks.remove(&disk);
            }
        }
    }

    /// Forgets what opening logs again in vain came to, of claims that did not come.
    pub(crate) fn drop_failed_reopenings(&mut self) {
        self.disks.values_mut().for_each(Disk::drop_failed_reopening);
    }

    /// Puts a log into use that was opened again for whoever reads. Gives the connection that had the failed one.
    pub(crate) fn opened_to_read(
        &mut self,
        disk: DiskId,
        log: DiskLog,
        mark: LogMark,
    ) -> Option<ConnectionId> {
        let displaced = self.disks.get_mut(&disk)?.reopened(log, mark);
        self.take_recorded_name(&self.disks[&disk]);
        displaced
    }

    fn take_recorded_name(&self, disk: &Disk) {
        let Some(attached) = disk.attached() else { return };
        if let Err(owner) = self.shelf.names.take(&attached.name, disk.id()) {
            tracing::warn!(disk = %disk.id(), name = %attached.name, %owner, "another disk has this disk's name: only its id finds it");
        }
    }
}

/// Puts a damaged log aside for good and begins a new one. Gives the connection that had the old one.
fn begin_new_log(
    shelf: &Shelf,
    disk: &mut Disk,
    error: &LogError,
    ended: EndedLog,
) -> Result<Option<ConnectionId>, Closed> {
    let number = disk.log_number() + 1;
    // The one that is damaged now is one of them.
    let damaged = disk.past().logs().iter().filter(|log| log.has_segments()).count() + 1;
    if damaged >= LOGS_MAX || number > NUMBER_MAX {
        let why = format!(
            "{}; {damaged} logs of this disk are damaged, the last is number {}: the store needs to be mended or replaced (those \
             whose history is old to the ladder of `backtide retention set` do not count)",
            chain(error),
            disk.log_number()
        );
        return Err(closed(CloseCode::Store, why));
    }
    let refused = |error| closed(CloseCode::Store, chain(&error));
    let log = shelf.create(disk.id(), number).map_err(refused)?;
    tracing::error!(disk = %disk.id(), why = chain(error), "the log is damaged: a new one begins, points before the damage stay");
    let mark = shelf.mark(disk.id(), number, &log).map_err(refused)?;
    Ok(disk.begun_anew(log, mark, number, ended))
}

/// Whether the newest attach leaves room for this one.
pub(crate) fn check_attached(attached: Option<&Attached>, hello: &Hello) -> Result<(), Closed> {
    let Some(attached) = attached else { return Ok(()) };
    if hello.epoch < attached.epoch {
        let why = format!(
            "epoch {} of disk {} is fenced: epoch {} has attached it since",
            hello.epoch, attached.name, attached.epoch
        );
        return Err(fenced(attached, why));
    }
    if hello.epoch == attached.epoch && hello.attach != attached.attach {
        let why = format!(
            "epoch {} of disk {} is fenced: another agent with a copy of this agent's state has attached it with the same epoch; attach it again to take it over",
            hello.epoch, attached.name
        );
        return Err(fenced(attached, why));
    }
    if hello.size < attached.size {
        let why = format!(
            "disk {} cannot shrink from {} to {} bytes: attach the smaller image as a new disk",
            attached.name, attached.size, hello.size
        );
        return Err(closed(CloseCode::Refused, why));
    }
    Ok(())
}

fn fenced(attached: &Attached, why: String) -> Closed {
    Closed { epoch: Some(attached.epoch), ..closed(CloseCode::Fenced, why) }
}

fn take_name(names: &Names, hello: &Hello) -> Result<(), Closed> {
    names.take(&hello.name, hello.disk).map_err(|owner| {
        let why = format!(
            "another disk ({owner}) is called {name} at this receiver: attach this one ({}) under another name",
            hello.disk,
            name = hello.name
        );
        closed(CloseCode::Refused, why)
    })
}

fn replaced_by(hello: &Hello, higher: bool) -> Closed {
    if higher {
        let why = format!("epoch {} has attached disk {}", hello.epoch, hello.name);
        Closed { epoch: Some(hello.epoch), ..closed(CloseCode::Fenced, why) }
    } else {
        let why = format!("disk {} was connected again with the same epoch {}", hello.name, hello.epoch);
        closed(CloseCode::Busy, why)
    }
}

/// What an entry that the log did not take means to the agent.
pub(crate) fn refusal(error: DiskError) -> Closed {
    match error {
        DiskError::Invalid(why) => closed(CloseCode::Invalid, why),
        DiskError::Store(why) => closed(CloseCode::Store, why),
    }
}

pub(crate) fn closed(code: CloseCode, message: impl Into<String>) -> Closed {
    Closed::new(code, message)
}
