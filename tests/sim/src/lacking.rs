//! What lies around the image while blocks are missing, and outlives an agent: the hydration file, and the note beside
//! the image; over storages that lose power and fail.

use std::{io, path::Path, sync::Arc};

use backtide_hydration::{HydrationFile, Mutant};
use backtide_storage::{MemoryStorage, Storage, replace_file};
use backtide_units::{Epoch, Lsn};
use bytes::Bytes;
use uuid::Uuid;

use crate::{hydration::Hydrating, world::World};

/// In the agent's state directory.
pub(crate) const FILE: &str = "vm1.hydration";
/// Beside the image.
const NOTE: &str = "vm1.img.backtide-incomplete";

/// What lies around the image that outlives an agent.
#[derive(Default)]
pub(crate) struct Lacking {
    /// The state directory.
    pub(crate) storage: MemoryStorage,
    /// The image's directory.
    pub(crate) beside: MemoryStorage,
    /// How often the host has started.
    boot: u64,
    /// The point that blocks are missing of, and what the disk was there.
    pub(crate) point: Option<Lsn>,
    pub(crate) content: Bytes,
    /// The newest LSN before the last rewind.
    pub(crate) before: Option<Lsn>,
    /// What the disk holds without an LSN was there before this one.
    pub(crate) begins: Lsn,
    /// The server behind refused a flush that nobody of those who flush was told of.
    pub(crate) untold: bool,
    /// How often the image refused a flush.
    pub(crate) refusals: u64,
    /// A guest's change has ended since.
    pub(crate) written: bool,
    /// The storage was told to fail.
    pub(crate) faulty: bool,
    /// A deliberate mistake of the driver's.
    pub(crate) mistake: Option<DriverMistake>,
    pub(crate) mutant: Option<Mutant>,
}

/// What a driver must not do.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum DriverMistake {
    /// Blocks are called durable before the image was synced.
    DurableBeforeSync,
    /// What is missing is written down after the first change was served.
    NotedLate,
    /// The first attach after a rewind does not take what is missing for changed.
    NotChanged,
    /// That the image has refused a flush is not written down for the next attach.
    ComparesNextTime,
}

impl Lacking {
    pub(crate) fn boot(&self) -> Uuid {
        Uuid::from_u128(u128::from(self.boot) + 1)
    }

    pub(crate) fn open(&self) -> Option<HydrationFile> {
        let storage = Arc::new(self.storage.clone());
        HydrationFile::open(storage, Path::new(FILE), self.boot()).expect("the hydration file is whole")
    }

    /// Whether the image lacks blocks, or may.
    pub(crate) fn is_there(&self) -> bool {
        self.storage.open(Path::new(FILE)).is_ok()
    }

    fn has_note(&self) -> bool {
        self.beside.open(Path::new(NOTE)).is_ok()
    }

    fn have_note(&self) {
        replace_file(&self.beside, Path::new(NOTE), b"incomplete").expect("no fault is planned for it");
    }

    pub(crate) fn heal(&self) {
        self.storage.fail_write_after(u64::MAX / 2);
        self.storage.fail_sync_after(u64::MAX / 2);
    }

    /// The agent's process dies.
    pub(crate) fn die(&self) {
        self.storage.kill_handles();
        if self.mistake == Some(DriverMistake::NotedLate) && !self.written && self.is_there() {
            self.storage.remove(Path::new(FILE)).expect("it is there");
        }
    }

    pub(crate) fn lose_power(&mut self, seed: u64) {
        self.storage.crash(seed);
        self.beside.crash(seed ^ 1);
        self.boot += 1;
    }
}

/// Removes the note beside the image, durably.
pub(crate) fn remove_note(beside: &MemoryStorage) -> io::Result<()> {
    match beside.remove(Path::new(NOTE)) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(error),
        Ok(()) | Err(_) => {}
    }
    beside.sync_dir(Path::new(""))
}

impl World {
    /// What an attach finds missing.
    pub(crate) fn open_hydration(&mut self) -> Option<HydrationFile> {
        let file = self.lacking.open();
        self.check_shown_at_start(file.as_ref());
        match &file {
            Some(file) => {
                let used = file.header().epoch != Epoch(self.persisted.epoch);
                let says = self.lacking.has_note() || !used || file.missing().is_empty();
                assert!(says, "an image in use lacks blocks, and nothing beside it says so");
                self.lacking.have_note();
            }
            None => assert!(!self.lacking.has_note(), "nothing is missing, and a note says otherwise"),
        }
        file
    }

    /// The note is there as long as something may be missing.
    pub(crate) fn check_note(&self) {
        let Some(agent) = &self.agent else { return };
        let lacks = agent.hydrating.as_ref().is_some_and(|hydrating| !hydrating.missing().is_empty());
        assert!(
            !lacks || self.lacking.has_note(),
            "blocks are missing, and nothing beside the image says so"
        );
        let whole = agent.hydrating.as_ref().is_none_or(Hydrating::is_complete);
        assert!(!whole || !self.lacking.has_note(), "nothing is missing, and a note says otherwise");
        assert!(!whole || !self.lacking.is_there(), "nothing is missing, and the file says otherwise");
    }

    /// The storage of the hydration file fails once.
    pub(crate) fn hydration_fault(&mut self) {
        if !self.plan.store_faults {
            return;
        }
        self.lacking.faulty = true;
        match self.random.one_in(2) {
            true => self.lacking.storage.fail_write_after(self.random.below(3)),
            false => self.lacking.storage.fail_sync_after(self.random.below(3)),
        }
    }
}
