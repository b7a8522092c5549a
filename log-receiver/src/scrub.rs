//! The scrub: everything that is kept is read and checked while the receiver works, one disk after
//! the other, at a bounded rate, on a thread of its own. What can be mended is.
//!
//! A disk's log is taken when its turn comes, so that a scrub of a thousand disks holds one. Who was read longest ago comes
//! first. It begins when somebody asks, or by itself (`schedule.rs`). How far it is stands in a file (`progress.rs`): when the receiver ends, the scrub goes on with the next start.

mod attached;
mod progress;
pub(crate) mod schedule;
mod work;

pub(crate) use progress::{FILE, damage_of, is_damaged};
#[cfg(test)]
pub(crate) use progress::{take, tests::samples};

use std::{
    panic::{AssertUnwindSafe, catch_unwind},
    sync::{
        Arc, Mutex, MutexGuard, PoisonError,
        atomic::{AtomicBool, Ordering},
    },
    thread::JoinHandle,
    time::Duration,
};

use backtide_receiver_api::{ApiError, ErrorCode, ScrubStatus};
use backtide_storage::Storage;
use backtide_units::{ByteCount, CaptureTime, DiskId};
use serde::{Deserialize, Serialize};
use tokio::sync::mpsc;

use self::{
    progress::{Outside, Progress},
    schedule::{Next, Schedule, Seen},
    work::Work,
};
use crate::{
    Shelf, StoreFileError, clock, findings::Findings, ingest::Task, overlays::Overlays, small_files, threads,
};

/// A disk to read.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct Wanted {
    pub(crate) disk: DiskId,
    /// About how much of it there is.
    pub(crate) bytes: ByteCount,
}

/// Where a scrub reads.
#[derive(Clone)]
pub(crate) struct Sources {
    /// The threads that own disks.
    pub(crate) owners: Vec<mpsc::Sender<Task>>,
    pub(crate) overlays: Overlays,
    pub(crate) findings: Findings,
    /// Where the files of disks are.
    pub(crate) shelf: Shelf,
}

/// The scrub of a receiver: at most one runs. Dropped, it ends soon, to go on with the next start.
pub(crate) struct Scrub {
    shared: Arc<Shared>,
    sources: Sources,
    thread: Mutex<Option<JoinHandle<()>>>,
    /// When one begins by itself, if it does.
    schedule: Option<Mutex<Schedule>>,
}

/// What the thread and those who ask share.
struct Shared {
    progress: Progress,
    /// The disk that is read.
    reading: Mutex<Option<DiskId>>,
    /// The receiver ends.
    ending: AtomicBool,
}

impl Scrub {
    /// The scrub of the store on `storage`, with what is known of the last one. None runs yet; one begins by itself, when whoever
    /// drives it asks, so long after the last one as `every` says.
    pub(crate) fn new(storage: Arc<dyn Storage>, sources: Sources, every: Option<Duration>) -> Self {
        let shared = Shared {
            progress: Progress::open(storage),
            reading: Mutex::default(),
            ending: AtomicBool::new(false),
        };
        let schedule = every.map(|every| Mutex::new(Schedule::new(every)));
        Self { shared: Arc::new(shared), sources, thread: Mutex::default(), schedule }
    }

    /// What runs, or ran last.
    pub(crate) fn status(&self) -> Option<ScrubStatus> {
        self.shared.progress.status()
    }

    /// Whether and when one begins by itself, if it ever does; `hindered` is why the store is not to be disturbed.
    pub(crate) fn next(&self, now: CaptureTime, hindered: Option<String>) -> Option<Next> {
        let (runs, ended) = (self.shared.progress.runs(), self.shared.progress.whole_ended());
        let schedule = lock(self.schedule.as_ref()?);
        Some(schedule.next(Seen { now, ended, runs, hindered }))
    }

    /// The one that was to begin by itself did, or why it could not.
    pub(crate) fn came_of_it(&self, now: CaptureTime, failed: Option<String>) {
        let Some(schedule) = &self.schedule else { return };
        match failed {
            None => lock(schedule).begun(),
            Some(why) => lock(schedule).failed(now, why),
        }
    }

    /// What scrubs found damaged outside of the disks, of which findings are remembered, until one that reads everything finds
    /// it whole: sentences.
    pub(crate) fn found_outside(&self) -> Vec<String> {
        let found = self.shared.progress.outside().into_iter();
        let told = found.filter_map(|Outside { overlay, why }| match overlay {
            None => Some(why),
            // One that is gone by now, or is damaged as a whole, is told of by others or by nobody.
            Some(id) => self.sources.overlays.record(&id).is_ok().then(|| format!("overlay {id}: {why}")),
        });
        told.collect()
    }

    /// Whether it has a disk's log in its hands.
    pub(crate) fn reads(&self, disk: DiskId) -> bool {
        *lock(&self.shared.reading) == Some(disk)
    }

    /// Starts one, of these disks in an order that is fair; with `all` of overlays too.
    pub(crate) fn start(
        &self,
        disks: Vec<Wanted>,
        all: bool,
        rate: ByteCount,
    ) -> Result<ScrubStatus, ApiError> {
        let mut thread = lock(&self.thread);
        if self.status().is_some_and(|status| status.running) {
            let busy = ApiError::new(ErrorCode::Busy, "a scrub is running already");
            return Err(busy.with_hint("wait for it, or call it off: backtide scrub --cancel"));
        }
        let mut total: u64 = disks.iter().map(|disk| disk.bytes.0).sum();
        if all {
            total += self.sources.overlays.all_file_bytes().0;
        }
        // Before anything is written again, this scrub's own file too.
        let damage = if all { small_files(&self.sources.shelf.storage)? } else { Vec::new() };
        for why in &damage {
            tracing::error!(why, "the scrub found damage");
        }
        let begun = ScrubStatus {
            running: true,
            cancelled: false,
            started: clock::now(),
            ended: None,
            done_bytes: ByteCount::ZERO,
            total_bytes: ByteCount(total),
            bytes_per_second_max: rate,
            disks: Vec::new(),
            overlays: Vec::new(),
            sound: damage.is_empty(),
            damage,
        };
        self.shared.progress.begin(begun.clone(), disks, all);
        self.run(&mut thread).map_err(|why| ApiError::new(ErrorCode::Failed, why))?;
        Ok(begun)
    }

    /// Goes on with one that ran when the receiver ended.
    pub(crate) fn resume(&self) {
        let mut thread = lock(&self.thread);
        if self.shared.progress.is_cancelled() {
            return self.shared.progress.end(true);
        }
        if let Some(status) = self.status().filter(|status| status.running) {
            tracing::info!(done = status.disks.len(), "the scrub goes on");
            if let Err(why) = self.run(&mut thread) {
                tracing::error!(why, "the scrub cannot go on");
            }
        }
    }

    fn run(&self, thread: &mut Option<JoinHandle<()>>) -> Result<(), String> {
        // The last one has ended but for its last step.
        if thread.take().is_some_and(|before| before.join().is_err()) {
            tracing::error!("the thread of a scrub panicked");
        }
        let work = Work::new(Arc::clone(&self.shared), self.sources.clone());
        let shared = Arc::clone(&self.shared);
        let body = move || {
            if catch_unwind(AssertUnwindSafe(|| work.run())).is_err() {
                shared.fell();
            }
        };
        match std::thread::Builder::new().name(threads::SCRUB.to_owned()).spawn(body) {
            Ok(spawned) => {
                *thread = Some(spawned);
                Ok(())
            }
            Err(error) => {
                self.shared.progress.end_unread();
                Err(format!("start the scrub's thread: {error}"))
            }
        }
    }

    /// Calls it off, durably; it ends soon. Blocks.
    pub(crate) fn cancel(&self) {
        self.shared.progress.cancel();
    }

    /// Ends it with the receiver, and waits for that; blocks.
    pub(crate) fn end(&self) {
        self.shared.ending.store(true, Ordering::Relaxed);
        if lock(&self.thread).take().is_some_and(|thread| thread.join().is_err()) {
            tracing::error!("the thread of a scrub panicked");
        }
    }
}

impl Drop for Scrub {
    fn drop(&mut self) {
        self.shared.ending.store(true, Ordering::Relaxed);
    }
}

impl Shared {
    fn is_unwanted(&self) -> bool {
        self.ending.load(Ordering::Relaxed) || self.progress.is_cancelled()
    }

    /// The thread panicked: what it had in its hands is nobody's, and no start goes on with what may do so again.
    fn fell(&self) {
        *lock(&self.reading) = None;
        self.progress.end(true);
        tracing::error!("the thread of a scrub panicked: the scrub is called off");
    }
}

/// What is wrong with the files of the store itself.
fn small_files(storage: &Arc<dyn Storage>) -> Result<Vec<String>, ApiError> {
    small_files::of_store(storage).or_else(|error| match error {
        // A receiver has read it when it started, so it is one that somebody has changed since.
        StoreFileError::NoStore { .. } | StoreFileError::Version { .. } => Ok(vec![error.to_string()]),
        StoreFileError::Io { .. }
        | StoreFileError::NotAStore { .. }
        | StoreFileError::Damaged { .. }
        | StoreFileError::Locked { .. } => Err(ApiError::from_error(ErrorCode::Failed, &error)),
    })
}

/// Nothing that could panic runs under these locks.
fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

#[cfg(test)]
mod tests {
    use backtide_overlay::OverlayOptions;
    use backtide_storage::MemoryStorage;

    use super::*;

    #[test]
    fn a_scrub_that_panics_is_over_and_has_nothing_in_its_hands() {
        let storage: Arc<dyn Storage> = Arc::new(MemoryStorage::new());
        let options = OverlayOptions::alone(ByteCount(1 << 20));
        let overlays = Overlays::load(Arc::clone(&storage), options, 1, None).expect("there are none");
        // Where nobody owns disks it cannot ask for one.
        let forgotten = crate::Forgotten::load(Arc::clone(&storage)).expect("none was");
        let shelf = crate::fsck::reading(&storage, forgotten);
        let findings = Findings::open(Arc::clone(&storage));
        let sources = Sources { owners: Vec::new(), overlays, findings, shelf };
        let scrub = Scrub::new(Arc::clone(&storage), sources.clone(), None);
        let disk = DiskId::random();
        let wanted = || vec![Wanted { disk, bytes: ByteCount(1) }];
        scrub.start(wanted(), true, ByteCount::ZERO).expect("none runs");
        let thread = lock(&scrub.thread).take().expect("it has a thread");
        thread.join().expect("it catches what it panics with");
        let status = scrub.status().expect("one ran");
        assert!(!status.running && status.cancelled && status.ended.is_some(), "{status:?}");
        assert!(!scrub.reads(disk), "the disk may be forgotten");
        let next = Scrub::new(storage, sources, None);
        next.resume();
        assert_eq!(next.status(), Some(status), "no start goes on with it");
        next.start(wanted(), true, ByteCount::ZERO).expect("another one may begin");
        next.end();
    }
}
