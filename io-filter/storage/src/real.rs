//! The seam on a real directory.
//!
//! Creating is exclusive and syncing a directory opens it anew, so nothing here keeps state between
//! calls except the root, when asked for the lock on it, and what [`together`] has to know.
//!
//! Invariant: what lies here is a guest's data or tells of it, so files and directories made here are
//! for their owner only, whatever the process's umask.

mod together;

use std::{
    fs::{self, DirBuilder, File, OpenOptions},
    io::{self, IoSlice},
    num::NonZeroU64,
    os::{
        fd::AsFd,
        unix::fs::{DirBuilderExt, FileExt, MetadataExt, OpenOptionsExt},
    },
    path::{Path, PathBuf},
    sync::Arc,
};

use backtide_units::{ByteCount, ByteOffset, ByteRange};
use rustix::fs::{Advice, FallocateFlags, FlockOperation, fadvise, fallocate, fdatasync, flock, statvfs};

use crate::{DeviceId, SetSync, Sharing, Storage, StorageFile, SyncSet, ring};
use together::Together;

/// Most buffers in one vectored write; the kernel's own limit is 1024.
const VECTORS_MAX: usize = 512;

/// A directory tree of the operating system.
pub struct RealStorage {
    root: PathBuf,
    together: Together,
    _lock: Option<File>,
}

struct RealFile(File);

impl RealStorage {
    /// The tree below `root`, which is created when it is missing.
    ///
    /// # Errors
    /// When it can neither be found nor created.
    pub fn open(root: &Path) -> io::Result<Self> {
        let missing: Vec<_> =
            root.ancestors().take_while(|dir| !dir.as_os_str().is_empty() && !dir.exists()).collect();
        // The way to it may be that of others too.
        if let Some(way) = root.parent() {
            fs::create_dir_all(way)?;
        }
        private_dir(root)?;
        // What is made durable in the tree is only there when the way to it is.
        for made in missing {
            File::open(made.canonicalize()?.parent().unwrap_or(made))?.sync_all()?;
        }
        let root = root.canonicalize()?;
        Ok(Self { together: Together::of(&root), root, _lock: None })
    }

    /// As [`RealStorage::open`], and nobody else has it open this way at the same time: a lock on
    /// `root/lock` that goes when this value (or the process) does.
    ///
    /// # Errors
    /// [`io::ErrorKind::WouldBlock`] when another process has the lock.
    pub fn open_locked(root: &Path) -> io::Result<Self> {
        let unlocked = Self::open(root)?;
        let mut options = OpenOptions::new();
        // Whoever may open it may lock it, and so keep this out.
        options.create(true).truncate(false).write(true).mode(0o600);
        let lock = options.open(unlocked.root.join("lock"))?;
        flock(&lock, FlockOperation::NonBlockingLockExclusive)?;
        Ok(Self { _lock: Some(lock), ..unlocked })
    }

    fn path(&self, path: &Path) -> io::Result<PathBuf> {
        if path.is_absolute() {
            return Err(io::Error::new(
                io::ErrorKind::InvalidInput,
                format!("{} is not relative to the storage's root", path.display()),
            ));
        }
        Ok(self.root.join(path))
    }
}

impl Storage for RealStorage {
    fn create_new(&self, path: &Path) -> io::Result<Arc<dyn StorageFile>> {
        let mut options = OpenOptions::new();
        options.read(true).write(true).create_new(true).mode(0o600);
        let file = options.open(self.path(path)?)?;
        Ok(Arc::new(RealFile(file)))
    }

    fn open(&self, path: &Path) -> io::Result<Arc<dyn StorageFile>> {
        let file = OpenOptions::new().read(true).write(true).open(self.path(path)?)?;
        Ok(Arc::new(RealFile(file)))
    }

    fn list(&self, dir: &Path) -> io::Result<Vec<String>> {
        let mut names = Vec::new();
        for entry in fs::read_dir(self.path(dir)?)? {
            // A name that is no UTF-8 is none of ours.
            if let Ok(name) = entry?.file_name().into_string() {
                names.push(name);
            }
        }
        names.sort();
        Ok(names)
    }

    fn rename(&self, from: &Path, to: &Path) -> io::Result<()> {
        fs::rename(self.path(from)?, self.path(to)?)
    }

    fn remove(&self, path: &Path) -> io::Result<()> {
        fs::remove_file(self.path(path)?)
    }

    fn create_dir(&self, dir: &Path) -> io::Result<()> {
        private_dir(&self.path(dir)?)
    }

    fn remove_tree(&self, dir: &Path) -> io::Result<()> {
        let path = self.path(dir)?;
        let found = |result: io::Result<()>| match result {
            Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(()),
            result => result,
        };
        // It may be a link, or have something mounted on it: what it leads to is what it has.
        let entries = match fs::read_dir(&path) {
            Ok(entries) => entries,
            Err(error) => return found(Err(error)),
        };
        for entry in entries {
            let entry = entry?;
            let is_dir = entry.file_type()?.is_dir();
            found(if is_dir { fs::remove_dir_all(entry.path()) } else { fs::remove_file(entry.path()) })?;
        }
        let is_link = fs::symlink_metadata(&path)?.is_symlink();
        match if is_link { fs::remove_file(&path) } else { fs::remove_dir(&path) } {
            // Empty it is as good.
            Err(error) if error.kind() == io::ErrorKind::ResourceBusy => File::open(&path)?.sync_all(),
            result => found(result),
        }
    }

    fn sync_dir(&self, dir: &Path) -> io::Result<()> {
        File::open(self.path(dir)?)?.sync_all()
    }

    fn shares_syncs(&self) -> Sharing {
        self.together.sharing()
    }

    fn sync_sets(&self, sets: &[SyncSet<'_>]) -> Vec<SetSync> {
        self.together.sync(sets)
    }

    fn free_space(&self) -> io::Result<ByteCount> {
        let stat = statvfs(&self.root)?;
        Ok(ByteCount(stat.f_bavail.saturating_mul(stat.f_frsize)))
    }

    fn display(&self, path: &Path) -> PathBuf {
        self.root.join(path)
    }
}

/// Makes it and what is missing on the way, for the owner only; one that is there stays as it is.
fn private_dir(dir: &Path) -> io::Result<()> {
    DirBuilder::new().recursive(true).mode(0o700).create(dir)
}

impl StorageFile for RealFile {
    fn read_at(&self, offset: ByteOffset, buffer: &mut [u8]) -> io::Result<usize> {
        let mut done = 0;
        while done < buffer.len() {
            match self.0.read_at(&mut buffer[done..], offset.0 + done as u64) {
                Ok(0) => break,
                Ok(count) => done += count,
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) => return Err(error),
            }
        }
        Ok(done)
    }

    fn write_vectored_at(&self, offset: ByteOffset, buffers: &[IoSlice<'_>]) -> io::Result<()> {
        let mut at = offset.0;
        for group in buffers.chunks(VECTORS_MAX) {
            let mut group = group.to_vec();
            let mut rest = &mut group[..];
            // Skips empty leading buffers, so that a count of 0 can only mean "nothing written".
            IoSlice::advance_slices(&mut rest, 0);
            while !rest.is_empty() {
                match rustix::io::pwritev(&self.0, rest, at) {
                    Ok(0) => return Err(io::ErrorKind::WriteZero.into()),
                    Ok(count) => {
                        at += count as u64;
                        IoSlice::advance_slices(&mut rest, count);
                    }
                    Err(rustix::io::Errno::INTR) => {}
                    Err(error) => return Err(error.into()),
                }
            }
        }
        Ok(())
    }

    fn sync_data(&self) -> io::Result<()> {
        fdatasync(&self.0)?;
        self.require_name()
    }

    fn write_out(&self, wait: bool) -> io::Result<()> {
        ring::write_out(self.0.as_fd(), wait)
    }

    fn device(&self) -> io::Result<DeviceId> {
        Ok(DeviceId(self.0.metadata()?.dev()))
    }

    fn require_name(&self) -> io::Result<()> {
        if self.0.metadata()?.nlink() == 0 {
            return Err(io::Error::other("the file was removed while it was in use"));
        }
        Ok(())
    }

    fn len(&self) -> io::Result<ByteCount> {
        self.0.metadata().map(|metadata| ByteCount(metadata.len()))
    }

    fn set_len(&self, len: ByteCount) -> io::Result<()> {
        self.0.set_len(len.0)
    }

    fn allocate(&self, range: ByteRange) -> io::Result<()> {
        if range.is_empty() {
            return Ok(());
        }
        loop {
            match fallocate(&self.0, FallocateFlags::empty(), range.start().0, range.count().0) {
                Err(rustix::io::Errno::INTR) => {}
                result => return Ok(result?),
            }
        }
    }

    fn let_go(&self, range: ByteRange) {
        let Some(length) = NonZeroU64::new(range.count().0) else { return };
        // Only advice: a file system that cannot take it changes nothing.
        let _ = fadvise(&self.0, range.start().0, Some(length), Advice::DontNeed);
    }
}

#[cfg(test)]
mod tests;
