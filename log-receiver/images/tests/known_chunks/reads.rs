//! A storage that counts what is read of it.

use std::{
    io::{self, IoSlice},
    path::{Path, PathBuf},
    sync::{Arc, Mutex},
};

use backtide_storage::{MemoryStorage, Storage, StorageFile};
use backtide_units::{ByteCount, ByteOffset, ByteRange};

/// Clones are the same.
#[derive(Clone, Default)]
pub(crate) struct Reads {
    memory: MemoryStorage,
    pub(crate) bytes: Arc<Mutex<u64>>,
}

struct CountedFile(Arc<dyn StorageFile>, Reads);

impl Storage for Reads {
    fn create_new(&self, path: &Path) -> io::Result<Arc<dyn StorageFile>> {
        self.memory.create_new(path)
    }

    fn open(&self, path: &Path) -> io::Result<Arc<dyn StorageFile>> {
        Ok(Arc::new(CountedFile(self.memory.open(path)?, self.clone())))
    }

    fn list(&self, dir: &Path) -> io::Result<Vec<String>> {
        self.memory.list(dir)
    }

    fn rename(&self, from: &Path, to: &Path) -> io::Result<()> {
        self.memory.rename(from, to)
    }

    fn remove(&self, path: &Path) -> io::Result<()> {
        self.memory.remove(path)
    }

    fn create_dir(&self, dir: &Path) -> io::Result<()> {
        self.memory.create_dir(dir)
    }

    fn sync_dir(&self, dir: &Path) -> io::Result<()> {
        self.memory.sync_dir(dir)
    }

    fn free_space(&self) -> io::Result<ByteCount> {
        self.memory.free_space()
    }

    fn display(&self, path: &Path) -> PathBuf {
        self.memory.display(path)
    }
}

impl StorageFile for CountedFile {
    fn read_at(&self, offset: ByteOffset, buffer: &mut [u8]) -> io::Result<usize> {
        let read = self.0.read_at(offset, buffer)?;
        *self.1.bytes.lock().unwrap() += read as u64;
        Ok(read)
    }

    fn write_vectored_at(&self, offset: ByteOffset, buffers: &[IoSlice<'_>]) -> io::Result<()> {
        self.0.write_vectored_at(offset, buffers)
    }

    fn sync_data(&self) -> io::Result<()> {
        self.0.sync_data()
    }

    fn len(&self) -> io::Result<ByteCount> {
        self.0.len()
    }

    fn set_len(&self, len: ByteCount) -> io::Result<()> {
        self.0.set_len(len)
    }

    fn allocate(&self, range: ByteRange) -> io::Result<()> {
        self.0.allocate(range)
    }
}
