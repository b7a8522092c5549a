//! A storage with something else going on: before each change of one piece of work a step of another is done.

use std::{
    io::{self, IoSlice},
    path::{Path, PathBuf},
    sync::{Arc, Mutex},
};

use backtide_storage::{MemoryStorage, Storage, StorageFile};
use backtide_units::{ByteCount, ByteOffset, ByteRange};

/// What is done before a change.
type Step = Box<dyn FnMut() + Send>;

/// A storage in memory. Clones are the same.
#[derive(Clone, Default)]
pub(crate) struct Beside {
    inner: MemoryStorage,
    step: Arc<Mutex<Option<Step>>>,
}

struct BesideFile {
    inner: Arc<dyn StorageFile>,
    storage: Beside,
}

impl Beside {
    pub(crate) fn new(inner: MemoryStorage) -> Self {
        Self { inner, step: Arc::default() }
    }

    /// Does some work, and `step` before each of its changes.
    pub(crate) fn during<T>(&self, step: impl FnMut() + Send + 'static, work: impl FnOnce() -> T) -> T {
        *self.step.lock().expect("no panic") = Some(Box::new(step));
        let done = work();
        *self.step.lock().expect("no panic") = None;
        done
    }

    /// A step's own changes have none before them.
    fn step(&self) {
        let Some(mut step) = self.step.lock().expect("no panic").take() else { return };
        step();
        *self.step.lock().expect("no panic") = Some(step);
    }

    fn file(&self, inner: Arc<dyn StorageFile>) -> Arc<dyn StorageFile> {
        Arc::new(BesideFile { inner, storage: self.clone() })
    }
}

impl Storage for Beside {
    fn create_new(&self, path: &Path) -> io::Result<Arc<dyn StorageFile>> {
        self.step();
        self.inner.create_new(path).map(|file| self.file(file))
    }

    fn open(&self, path: &Path) -> io::Result<Arc<dyn StorageFile>> {
        self.inner.open(path).map(|file| self.file(file))
    }

    fn list(&self, dir: &Path) -> io::Result<Vec<String>> {
        self.inner.list(dir)
    }

    fn rename(&self, from: &Path, to: &Path) -> io::Result<()> {
        self.step();
        self.inner.rename(from, to)
    }

    fn remove(&self, path: &Path) -> io::Result<()> {
        self.step();
        self.inner.remove(path)
    }

    fn create_dir(&self, dir: &Path) -> io::Result<()> {
        self.inner.create_dir(dir)
    }

    fn sync_dir(&self, dir: &Path) -> io::Result<()> {
        self.step();
        self.inner.sync_dir(dir)
    }

    fn free_space(&self) -> io::Result<ByteCount> {
        self.inner.free_space()
    }

    fn display(&self, path: &Path) -> PathBuf {
        self.inner.display(path)
    }
}

impl StorageFile for BesideFile {
    fn read_at(&self, offset: ByteOffset, buffer: &mut [u8]) -> io::Result<usize> {
        self.inner.read_at(offset, buffer)
    }

    fn write_vectored_at(&self, offset: ByteOffset, buffers: &[IoSlice<'_>]) -> io::Result<()> {
        self.storage.step();
        self.inner.write_vectored_at(offset, buffers)
    }

    fn sync_data(&self) -> io::Result<()> {
        self.storage.step();
        self.inner.sync_data()
    }

    fn len(&self) -> io::Result<ByteCount> {
        self.inner.len()
    }

    fn set_len(&self, len: ByteCount) -> io::Result<()> {
        self.storage.step();
        self.inner.set_len(len)
    }

    fn allocate(&self, range: ByteRange) -> io::Result<()> {
        self.storage.step();
        self.inner.allocate(range)
    }
}
