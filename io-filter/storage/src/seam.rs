//! The traits of the seam, and the two whole-file operations built on them.
//!
//! Durability rules that every implementation keeps and every caller relies on:
//! - what was written is visible to readers at once, and durable only after `sync_data` of that file;
//! - a created, renamed or removed name is durable only after `sync_dir` of its directory;
//! - until then a power cut may keep any part of it, in any order.

use std::{
    io::{self, IoSlice},
    path::{Path, PathBuf},
    sync::Arc,
};

use backtide_units::{ByteCount, ByteOffset, ByteRange};

use crate::{KillPoint, SetSync, Sharing, SyncSet};

/// Tells file systems apart.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct DeviceId(pub u64);

/// A directory tree. Paths are relative to its root.
///
/// All errors are the operating system's; a full file system is [`io::ErrorKind::StorageFull`].
pub trait Storage: Send + Sync + 'static {
    /// Creates an empty file and opens it for reading and writing.
    ///
    /// # Errors
    /// [`io::ErrorKind::AlreadyExists`] when the name is taken.
    fn create_new(&self, path: &Path) -> io::Result<Arc<dyn StorageFile>>;

    /// Opens an existing file for reading and writing.
    ///
    /// # Errors
    /// [`io::ErrorKind::NotFound`] when there is none.
    fn open(&self, path: &Path) -> io::Result<Arc<dyn StorageFile>>;

    /// The names in a directory (files and directories), sorted.
    ///
    /// # Errors
    /// [`io::ErrorKind::NotFound`] when there is no such directory.
    fn list(&self, dir: &Path) -> io::Result<Vec<String>>;

    /// Renames a file, replacing one that has the new name.
    ///
    /// # Errors
    /// [`io::ErrorKind::NotFound`] when there is no such file.
    fn rename(&self, from: &Path, to: &Path) -> io::Result<()>;

    /// Removes a file. Handles that are open stay usable.
    ///
    /// # Errors
    /// [`io::ErrorKind::NotFound`] when there is no such file.
    fn remove(&self, path: &Path) -> io::Result<()>;

    /// Creates a directory and the missing ones above it; one that exists is fine.
    /// Durable after `sync_dir` of each parent.
    ///
    /// # Errors
    /// As the operating system has it.
    fn create_dir(&self, dir: &Path) -> io::Result<()>;

    /// Removes a directory with everything in it; one that is missing is fine. Durable after `sync_dir` of its parent.
    ///
    /// # Errors
    /// As the operating system has it; any part of it may be gone then.
    fn remove_tree(&self, _dir: &Path) -> io::Result<()> {
        Err(io::ErrorKind::Unsupported.into())
    }

    /// Makes the names in a directory durable. The root is `""`.
    ///
    /// # Errors
    /// After one, nobody knows which names are durable: stop and reopen.
    fn sync_dir(&self, dir: &Path) -> io::Result<()>;

    /// Whether [`Storage::sync_sets`] shares flushes now.
    fn shares_syncs(&self) -> Sharing {
        Sharing::Never("this storage syncs each file by itself".to_owned())
    }

    /// Makes everything durable that was written to these sets before this call, at the cost of few flushes instead
    /// of one for each file and directory. What became of each set, in their order.
    fn sync_sets(&self, sets: &[SyncSet<'_>]) -> Vec<SetSync> {
        sets.iter().map(|_| SetSync::Apart).collect()
    }

    /// Bytes that can still be written before the file system is full.
    ///
    /// # Errors
    /// As the operating system has it.
    fn free_space(&self) -> io::Result<ByteCount>;

    /// How an error message names a path: absolute where there is such a thing.
    fn display(&self, path: &Path) -> PathBuf;
}

/// One file. Handles are shared; positions are explicit, so no handle has a cursor.
pub trait StorageFile: Send + Sync + 'static {
    /// Reads up to `buffer.len()` bytes and returns how many: fewer only at the end of the file.
    ///
    /// # Errors
    /// As the operating system has it.
    fn read_at(&self, offset: ByteOffset, buffer: &mut [u8]) -> io::Result<usize>;

    /// Writes all of `buffers`, one after the other, from `offset` on.
    ///
    /// # Errors
    /// After one, any part may be written.
    fn write_vectored_at(&self, offset: ByteOffset, buffers: &[IoSlice<'_>]) -> io::Result<()>;

    /// Makes what was written before this call durable, and the length.
    ///
    /// # Errors
    /// After one, nobody knows what is durable, and a second call may succeed without having
    /// written anything: stop writing, reopen, recover.
    fn sync_data(&self) -> io::Result<()>;

    /// Has what was written before this call written out, without making it durable: begins that, and with `wait`
    /// waits for its end.
    ///
    /// # Errors
    /// As those of [`StorageFile::sync_data`], which may not tell of the same again;
    /// [`io::ErrorKind::Unsupported`] where there is no such thing.
    fn write_out(&self, _wait: bool) -> io::Result<()> {
        Err(io::ErrorKind::Unsupported.into())
    }

    /// The device of its file system.
    ///
    /// # Errors
    /// As the operating system has it; [`io::ErrorKind::Unsupported`] where there is no such thing.
    fn device(&self) -> io::Result<DeviceId> {
        Err(io::ErrorKind::Unsupported.into())
    }

    /// Looks whether the file still has a name, as `sync_data` does: without one its bytes are safe, and nobody
    /// will ever find them.
    ///
    /// # Errors
    /// When it has none, or as the operating system has it.
    fn require_name(&self) -> io::Result<()> {
        Ok(())
    }

    /// The length.
    ///
    /// # Errors
    /// As the operating system has it.
    fn len(&self) -> io::Result<ByteCount>;

    /// Cuts or extends (with zeros) to `len`.
    ///
    /// # Errors
    /// As the operating system has it.
    fn set_len(&self, len: ByteCount) -> io::Result<()>;

    /// Reserves space for `range`, so that writing there cannot run out of it, and extends the
    /// length to its end. New bytes read as zeros.
    ///
    /// # Errors
    /// [`io::ErrorKind::StorageFull`], or [`io::ErrorKind::Unsupported`] on file systems without it.
    fn allocate(&self, range: ByteRange) -> io::Result<()>;

    /// Advice: the range is durable, and nobody is going to read it soon, so the system need not keep it in
    /// memory. Nothing else changes; what is not durable stays.
    fn let_go(&self, _range: ByteRange) {}

    /// Whether the file is empty.
    ///
    /// # Errors
    /// As the operating system has it.
    fn is_empty(&self) -> io::Result<bool> {
        Ok(self.len()?.is_zero())
    }

    /// Writes all of `buffer` at `offset`.
    ///
    /// # Errors
    /// After one, any part may be written.
    fn write_at(&self, offset: ByteOffset, buffer: &[u8]) -> io::Result<()> {
        self.write_vectored_at(offset, &[IoSlice::new(buffer)])
    }

    /// Fills `buffer`.
    ///
    /// # Errors
    /// [`io::ErrorKind::UnexpectedEof`] when the file ends before.
    fn read_exact_at(&self, offset: ByteOffset, buffer: &mut [u8]) -> io::Result<()> {
        let read = self.read_at(offset, buffer)?;
        if read == buffer.len() {
            return Ok(());
        }
        Err(io::Error::new(
            io::ErrorKind::UnexpectedEof,
            format!("expected {} bytes at {offset}, the file has {read} of them", buffer.len()),
        ))
    }
}

/// The whole content of a small file.
///
/// # Errors
/// The file's, or [`io::ErrorKind::FileTooLarge`] above `limit`.
pub fn read_file(storage: &dyn Storage, path: &Path, limit: ByteCount) -> io::Result<Vec<u8>> {
    let file = storage.open(path)?;
    let len = file.len()?;
    if len > limit {
        return Err(io::Error::new(
            io::ErrorKind::FileTooLarge,
            format!("{} has {len} bytes, expected at most {limit}", storage.display(path).display()),
        ));
    }
    let mut content = vec![0; len.as_usize().unwrap_or(usize::MAX)];
    file.read_exact_at(ByteOffset::ZERO, &mut content)?;
    Ok(content)
}

/// Replaces a small file so that a power cut leaves the old content or the new, never a mixture.
///
/// # Errors
/// As [`replace_with`].
pub fn replace_file(storage: &dyn Storage, path: &Path, content: &[u8]) -> io::Result<()> {
    replace_with(storage, path, |file| file.write_at(ByteOffset::ZERO, content)).map(|_| ())
}

/// Replaces a file with one that `fill` writes, and gives that one: written beside it, synced, renamed over it,
/// the directory synced. A power cut leaves the old file or the new one.
///
/// # Errors
/// After one, the old or the new file is in place, and none beside it as far as the storage allows; a leftover
/// `PATH.new` does no harm.
pub fn replace_with(
    storage: &dyn Storage,
    path: &Path,
    fill: impl FnOnce(&dyn StorageFile) -> io::Result<()>,
) -> io::Result<Arc<dyn StorageFile>> {
    let mut beside = path.as_os_str().to_owned();
    beside.push(".new");
    let beside = PathBuf::from(beside);
    match storage.remove(&beside) {
        Ok(()) => {}
        Err(error) if error.kind() == io::ErrorKind::NotFound => {}
        Err(error) => return Err(error),
    }
    let replace = || {
        let file = storage.create_new(&beside)?;
        fill(&*file)?;
        file.sync_data()?;
        KillPoint::FileBeside.reached();
        storage.rename(&beside, path)?;
        KillPoint::FileRenamed.reached();
        storage.sync_dir(path.parent().unwrap_or(Path::new("")))?;
        Ok(file)
    };
    let replaced = replace();
    if replaced.is_err() {
        // Half a file takes room that may be what is missing. The next attempt removes it too.
        let _ = storage.remove(&beside);
    }
    replaced
}
