//! A storage whose syncs wait or fail for as long as a test wants.

use std::{
    io::{self, IoSlice},
    path::{Path, PathBuf},
    sync::{Arc, Condvar, Mutex},
};

use backtide_storage::{DeviceId, MemoryStorage, SetSync, Sharing, Storage, StorageFile, SyncSet};
use backtide_units::{ByteCount, ByteOffset, ByteRange};

/// What happens to writes and syncs of files.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Fault {
    /// Nothing unusual.
    None,
    /// Syncs wait until something else is set.
    SyncsWait,
    /// Files are not opened until something else is set.
    OpensWait,
    /// Writes of tombstones fail.
    TombstonesUnwritable,
    /// Syncs of the directory of tombstones fail.
    TombstonesFail,
    /// Syncs of the directory where bases are once more fail.
    BasesFail,
    /// Syncs of the directory of a disk's first log fail.
    FirstLogsFail,
    /// Writes fail.
    WritesFail,
    /// Syncs of the files of overlays fail.
    OverlaysFail,
    /// Directories of disks cannot be listed.
    DisksUnlistable,
    /// Directories of segments cannot be listed.
    SegmentsUnlistable,
    /// Reserving space panics.
    ReservationsPanic,
    /// So much room is left from the moment on in which a base is written.
    RoomGoesWithABase(ByteCount),
    /// So little room is left.
    LittleRoom(ByteCount),
}

#[derive(Debug)]
struct State {
    fault: Fault,
    waiting: usize,
    /// Listings that failed.
    unlisted: usize,
}

/// A storage in memory with faults. Clones are the same.
#[derive(Clone)]
pub(crate) struct Faulty {
    pub(crate) memory: MemoryStorage,
    state: Arc<(Mutex<State>, Condvar)>,
}

struct FaultyFile {
    file: Arc<dyn StorageFile>,
    storage: Faulty,
    /// Of an overlay, and no record.
    of_overlay: bool,
    of_tombstone: bool,
}

impl Faulty {
    pub(crate) fn new() -> Self {
        let state = State { fault: Fault::None, waiting: 0, unlisted: 0 };
        Self { memory: MemoryStorage::new(), state: Arc::new((Mutex::new(state), Condvar::new())) }
    }

    pub(crate) fn set(&self, fault: Fault) {
        self.state.0.lock().unwrap().fault = fault;
        self.state.1.notify_all();
    }

    /// How many listings have failed.
    pub(crate) fn unlisted(&self) -> usize {
        self.state.0.lock().unwrap().unlisted
    }

    /// Returns when a sync waits, or an open.
    pub(crate) async fn a_sync_waits(&self) {
        let state = Arc::clone(&self.state);
        let waited = tokio::task::spawn_blocking(move || {
            let guard = state.0.lock().unwrap();
            drop(state.1.wait_while(guard, |state| state.waiting == 0).unwrap());
        });
        waited.await.unwrap();
    }

    fn write_fails(&self, of_tombstone: bool) -> io::Result<()> {
        match self.state.0.lock().unwrap().fault {
            Fault::WritesFail => Err(io::Error::other("injected failure of a write")),
            Fault::TombstonesUnwritable if of_tombstone => {
                Err(io::Error::other("injected failure of a tombstone's write"))
            }
            Fault::None
            | Fault::TombstonesUnwritable
            | Fault::SyncsWait
            | Fault::OpensWait
            | Fault::TombstonesFail
            | Fault::BasesFail
            | Fault::FirstLogsFail
            | Fault::OverlaysFail
            | Fault::DisksUnlistable
            | Fault::SegmentsUnlistable
            | Fault::ReservationsPanic
            | Fault::RoomGoesWithABase(_)
            | Fault::LittleRoom(_) => Ok(()),
        }
    }

    fn waits(&self, fault: Fault) {
        let mut guard = self.state.0.lock().unwrap();
        guard.waiting += 1;
        self.state.1.notify_all();
        guard = self.state.1.wait_while(guard, |state| state.fault == fault).unwrap();
        guard.waiting -= 1;
    }

    fn file(&self, path: &Path, file: Arc<dyn StorageFile>) -> Arc<dyn StorageFile> {
        let of_overlay = path.extension().is_some_and(|end| end == "map" || end == "data");
        let of_tombstone = path.parent() == Some(Path::new("forgotten"));
        Arc::new(FaultyFile { file, storage: self.clone(), of_overlay, of_tombstone })
    }
}

impl Storage for Faulty {
    fn create_new(&self, path: &Path) -> io::Result<Arc<dyn StorageFile>> {
        Ok(self.file(path, self.memory.create_new(path)?))
    }

    fn open(&self, path: &Path) -> io::Result<Arc<dyn StorageFile>> {
        self.waits(Fault::OpensWait);
        Ok(self.file(path, self.memory.open(path)?))
    }

    fn list(&self, dir: &Path) -> io::Result<Vec<String>> {
        let mut state = self.state.0.lock().unwrap();
        let fails = (state.fault == Fault::DisksUnlistable && dir.parent() == Some(Path::new("disks")))
            || (state.fault == Fault::SegmentsUnlistable && dir.ends_with("segments"));
        if fails {
            state.unlisted += 1;
            return Err(io::Error::other("injected failure of a listing"));
        }
        drop(state);
        self.memory.list(dir)
    }

    fn rename(&self, from: &Path, to: &Path) -> io::Result<()> {
        let mut state = self.state.0.lock().unwrap();
        if let (Fault::RoomGoesWithABase(left), Some("base")) =
            (state.fault, to.extension().and_then(|end| end.to_str()))
        {
            state.fault = Fault::LittleRoom(left);
        }
        drop(state);
        self.memory.rename(from, to)
    }

    fn remove(&self, path: &Path) -> io::Result<()> {
        self.memory.remove(path)
    }

    fn create_dir(&self, dir: &Path) -> io::Result<()> {
        self.memory.create_dir(dir)
    }

    fn remove_tree(&self, dir: &Path) -> io::Result<()> {
        self.memory.remove_tree(dir)
    }

    fn sync_dir(&self, dir: &Path) -> io::Result<()> {
        let fails = match self.state.0.lock().unwrap().fault {
            Fault::TombstonesFail => dir == Path::new("forgotten"),
            Fault::BasesFail => dir == Path::new("images/bases"),
            Fault::FirstLogsFail => dir.parent() == Some(Path::new("disks")),
            Fault::None
            | Fault::SyncsWait
            | Fault::OpensWait
            | Fault::TombstonesUnwritable
            | Fault::WritesFail
            | Fault::OverlaysFail
            | Fault::DisksUnlistable
            | Fault::SegmentsUnlistable
            | Fault::ReservationsPanic
            | Fault::RoomGoesWithABase(_)
            | Fault::LittleRoom(_) => false,
        };
        if fails {
            return Err(io::Error::other("injected failure of a directory sync"));
        }
        self.memory.sync_dir(dir)
    }

    fn shares_syncs(&self) -> Sharing {
        self.memory.shares_syncs()
    }

    fn sync_sets(&self, sets: &[SyncSet<'_>]) -> Vec<SetSync> {
        self.memory.sync_sets(sets)
    }

    fn free_space(&self) -> io::Result<ByteCount> {
        if let Fault::LittleRoom(left) = self.state.0.lock().unwrap().fault {
            return Ok(left);
        }
        self.memory.free_space()
    }

    fn display(&self, path: &Path) -> PathBuf {
        self.memory.display(path)
    }
}

impl StorageFile for FaultyFile {
    fn write_out(&self, wait: bool) -> io::Result<()> {
        self.file.write_out(wait)
    }

    fn device(&self) -> io::Result<DeviceId> {
        self.file.device()
    }

    fn read_at(&self, offset: ByteOffset, buffer: &mut [u8]) -> io::Result<usize> {
        self.file.read_at(offset, buffer)
    }

    fn write_vectored_at(&self, offset: ByteOffset, buffers: &[IoSlice<'_>]) -> io::Result<()> {
        self.storage.write_fails(self.of_tombstone)?;
        self.file.write_vectored_at(offset, buffers)
    }

    fn sync_data(&self) -> io::Result<()> {
        self.storage.waits(Fault::SyncsWait);
        let fails = self.storage.state.0.lock().unwrap().fault == Fault::OverlaysFail;
        if fails && self.of_overlay {
            return Err(io::Error::other("injected failure of an overlay's sync"));
        }
        self.file.sync_data()
    }

    fn len(&self) -> io::Result<ByteCount> {
        self.file.len()
    }

    fn set_len(&self, len: ByteCount) -> io::Result<()> {
        self.file.set_len(len)
    }

    fn allocate(&self, range: ByteRange) -> io::Result<()> {
        let panics = self.storage.state.0.lock().unwrap().fault == Fault::ReservationsPanic;
        assert!(!panics, "injected panic of a reservation");
        self.file.allocate(range)
    }
}
