//! A storage in memory that counts what is read from it, and notes what it may let go.

use std::{
    io::{self, IoSlice},
    path::{Path, PathBuf},
    sync::{
        Arc, Mutex,
        atomic::{AtomicU64, Ordering},
    },
};

use backtide_storage::{MemoryStorage, Storage, StorageFile};
use backtide_units::{ByteCount, ByteOffset, ByteRange};

/// Counts reads, and passes everything on.
#[derive(Clone, Default)]
pub struct CountingStorage {
    inner: MemoryStorage,
    reads: Arc<AtomicU64>,
    bytes: Arc<AtomicU64>,
    let_go: Arc<Mutex<Vec<ByteRange>>>,
}

/// What was read.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Reads {
    pub reads: u64,
    pub bytes: u64,
}

struct CountingFile {
    inner: Arc<dyn StorageFile>,
    counts: CountingStorage,
}

impl CountingStorage {
    /// What `act` reads.
    pub fn during<T>(&self, act: impl FnOnce() -> T) -> (T, Reads) {
        let now = || (self.reads.load(Ordering::Relaxed), self.bytes.load(Ordering::Relaxed));
        let before = now();
        let result = act();
        let after = now();
        (result, Reads { reads: after.0 - before.0, bytes: after.1 - before.1 })
    }

    /// What it was told to let go since it was last asked.
    pub fn let_go(&self) -> Vec<ByteRange> {
        std::mem::take(&mut *self.let_go.lock().unwrap())
    }

    /// The next sync fails.
    pub fn fail_a_sync(&self) {
        self.inner.fail_sync_after(0);
    }

    fn file(&self, inner: Arc<dyn StorageFile>) -> Arc<dyn StorageFile> {
        Arc::new(CountingFile { inner, counts: self.clone() })
    }
}

impl Storage for CountingStorage {
    fn create_new(&self, path: &Path) -> io::Result<Arc<dyn StorageFile>> {
        Ok(self.file(self.inner.create_new(path)?))
    }

    fn open(&self, path: &Path) -> io::Result<Arc<dyn StorageFile>> {
        Ok(self.file(self.inner.open(path)?))
    }

    fn list(&self, dir: &Path) -> io::Result<Vec<String>> {
        self.inner.list(dir)
    }

    fn rename(&self, from: &Path, to: &Path) -> io::Result<()> {
        self.inner.rename(from, to)
    }

    fn remove(&self, path: &Path) -> io::Result<()> {
        self.inner.remove(path)
    }

    fn create_dir(&self, dir: &Path) -> io::Result<()> {
        self.inner.create_dir(dir)
    }

    fn sync_dir(&self, dir: &Path) -> io::Result<()> {
        self.inner.sync_dir(dir)
    }

    fn free_space(&self) -> io::Result<ByteCount> {
        self.inner.free_space()
    }

    fn display(&self, path: &Path) -> PathBuf {
        self.inner.display(path)
    }
}

impl StorageFile for CountingFile {
    fn read_at(&self, offset: ByteOffset, buffer: &mut [u8]) -> io::Result<usize> {
        let read = self.inner.read_at(offset, buffer)?;
        self.counts.reads.fetch_add(1, Ordering::Relaxed);
        self.counts.bytes.fetch_add(read as u64, Ordering::Relaxed);
        Ok(read)
    }

    fn write_vectored_at(&self, offset: ByteOffset, buffers: &[IoSlice<'_>]) -> io::Result<()> {
        self.inner.write_vectored_at(offset, buffers)
    }

    fn sync_data(&self) -> io::Result<()> {
        self.inner.sync_data()
    }

    fn len(&self) -> io::Result<ByteCount> {
        self.inner.len()
    }

    fn set_len(&self, len: ByteCount) -> io::Result<()> {
        self.inner.set_len(len)
    }

    fn allocate(&self, range: ByteRange) -> io::Result<()> {
        self.inner.allocate(range)
    }

    fn let_go(&self, range: ByteRange) {
        self.counts.let_go.lock().unwrap().push(range);
    }
}
