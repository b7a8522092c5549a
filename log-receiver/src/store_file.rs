//! `store.json` and the store's lock: what makes a directory a store, and one receiver's at a time.
//!
//! `FORMAT.md` beside this crate has the files of a store and describes this one.
//!
//! Invariants: `store.json` is written whole (temporary file, sync, rename, sync of the directory), before the first disk, and
//! once more when `retention.json` is there for the first time: from then on a store without that file has lost it, with all
//! that it kept and locked. A version this build does not know is refused before anything else is read; a directory with other
//! things in it is never turned into a store.

use std::{
    fs::{File, OpenOptions},
    io::{self, Read, Write},
    os::unix::fs::OpenOptionsExt,
    path::{Path, PathBuf},
    sync::Arc,
};

use backtide_storage::{Storage, read_file, replace_file};
use backtide_units::ByteCount;
use rustix::fs::FlockOperation;
use serde::{Deserialize, Serialize};
use uuid::Uuid;

use crate::{StoreWatch, disks::DISKS, retention};

/// The version of the store's layout that this build reads and writes.
pub const STORE_VERSION: u32 = 1;

pub(crate) const FILE: &str = "store.json";
const LOCK: &str = "lock";
pub(crate) const MAGIC: &str = "backtide-store";
const FILE_BYTES_MAX: ByteCount = ByteCount(64 * 1024);

/// A store's identity: random, made once.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(transparent)]
pub struct StoreId(pub Uuid);

/// Why a directory cannot be used as a store.
#[derive(Debug, thiserror::Error)]
pub enum StoreFileError {
    /// The operating system said no.
    #[error("{what} {}", path.display())]
    Io {
        /// What was tried.
        what: &'static str,
        /// On which file or directory.
        path: PathBuf,
        /// The cause.
        source: io::Error,
    },
    /// Another receiver has the store open.
    #[error("the store {} is open in another receiver{by}: stop that one or use another directory", path.display())]
    Locked {
        /// The store.
        path: PathBuf,
        /// ` (process N)` when it is known.
        by: String,
    },
    /// There are files in the directory, but no `store.json`.
    #[error(
        "{} is not empty and has no {FILE}: expected a backtide store or an empty directory, found {found:?}{}",
        path.display(),
        lost(found, path)
    )]
    NotAStore {
        /// The directory.
        path: PathBuf,
        /// A name found there: that of a store's disks, if it is there.
        found: String,
    },
    /// There is no `store.json`.
    #[error(
        "{} is no store of a receiver: it has no {FILE}; name the directory that `receiver run --store` was given{}",
        path.display(),
        lost(if *has_disks { DISKS } else { "" }, path)
    )]
    NoStore {
        /// The directory.
        path: PathBuf,
        /// Whether it has the directory of a store's disks.
        has_disks: bool,
    },
    /// `store.json` does not hold what it should.
    #[error("{} is damaged: {why}; put that file back from a copy of this store, or let `backtide fsck --rebuild` write it anew: it says whose store it is, and the logs do not depend on it", path.display())]
    Damaged {
        /// The file.
        path: PathBuf,
        /// What was expected and what was found.
        why: String,
    },
    /// The store was written by another version.
    #[error(
        "{} has store version {found}, this build reads version {STORE_VERSION}: use the backtide that wrote it, or a newer one",
        path.display()
    )]
    Version {
        /// The file.
        path: PathBuf,
        /// As the file says.
        found: u64,
    },
}

/// The exclusive right to a store, given up when dropped (or when the process ends, however).
#[derive(Debug)]
pub(crate) struct StoreLock {
    _file: File,
    /// Sees whether the store is still where it was locked.
    pub(crate) watch: StoreWatch,
}

#[derive(Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct StoreFile {
    magic: String,
    version: u32,
    store: StoreId,
    /// Whether `retention.json` was written.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    retention: bool,
    /// CRC32C of `MAGIC VERSION STORE` as text, with ` retention` behind it when that was written, in hexadecimal.
    checksum: String,
}

impl StoreFile {
    fn new(store: StoreId, retention: bool) -> Self {
        let (magic, version, checksum) = (MAGIC.to_owned(), STORE_VERSION, String::new());
        let file = Self { magic, version, store, retention, checksum };
        Self { checksum: file.expected(), ..file }
    }

    /// The checksum that it should have.
    fn expected(&self) -> String {
        let Self { magic, version, store, retention, .. } = self;
        let retention = if *retention { " retention" } else { "" };
        format!("{:08x}", crc32c::crc32c(format!("{magic} {version} {}{retention}", store.0).as_bytes()))
    }
}

/// Takes the lock of the store at `path`, an existing directory.
///
/// # Errors
/// [`StoreFileError::Locked`] when another process has it.
pub(crate) fn lock_store(path: &Path) -> Result<StoreLock, StoreFileError> {
    let lock_path = path.join(LOCK);
    let io = |what| {
        let path = lock_path.clone();
        move |source| StoreFileError::Io { what, path, source }
    };
    let mut file = OpenOptions::new()
        .read(true)
        .write(true)
        .create(true)
        .truncate(false)
        // Whoever may open it may lock it, and so keep every receiver out.
        .mode(0o600)
        .open(&lock_path)
        .map_err(io("open"))?;
    match rustix::fs::flock(&file, FlockOperation::NonBlockingLockExclusive) {
        Ok(()) => {}
        Err(rustix::io::Errno::WOULDBLOCK) => {
            return Err(StoreFileError::Locked { path: path.to_owned(), by: holder(&mut file) });
        }
        Err(error) => return Err(io("lock")(error.into())),
    }
    file.set_len(0).map_err(io("write"))?;
    file.write_all(format!("{}\n", std::process::id()).as_bytes()).map_err(io("write"))?;
    let watch = StoreWatch::new(path, &lock_path, &file).map_err(io("look at"))?;
    Ok(StoreLock { _file: file, watch })
}

/// Keeps receivers out of the store while it is only read: nothing is written.
///
/// # Errors
/// [`StoreFileError::Locked`] when a receiver has it.
pub(crate) fn hold_store(path: &Path) -> Result<Option<File>, StoreFileError> {
    let lock_path = path.join(LOCK);
    let io = |what, source| StoreFileError::Io { what, path: lock_path.clone(), source };
    let mut file = match File::open(&lock_path) {
        Ok(file) => file,
        // No receiver ever had it, or it was copied without.
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
        Err(error) => return Err(io("open", error)),
    };
    match rustix::fs::flock(&file, FlockOperation::NonBlockingLockShared) {
        Ok(()) => Ok(Some(file)),
        Err(rustix::io::Errno::WOULDBLOCK) => {
            Err(StoreFileError::Locked { path: path.to_owned(), by: holder(&mut file) })
        }
        Err(error) => Err(io("lock", error.into())),
    }
}

/// ` (process N)`, when the lock file tells.
fn holder(file: &mut File) -> String {
    let mut text = String::new();
    let read = file.read_to_string(&mut text).is_ok();
    match text.trim().parse::<u32>() {
        Ok(process) if read => format!(" (process {process})"),
        Ok(_) | Err(_) => String::new(),
    }
}

/// Reads `store.json`.
///
/// # Errors
/// Also when there is none.
pub(crate) fn read_store(storage: &Arc<dyn Storage>) -> Result<StoreId, StoreFileError> {
    let path = storage.display(Path::new(FILE));
    let content = read_file(storage.as_ref(), Path::new(FILE), FILE_BYTES_MAX);
    let content = content.map_err(|source| match source.kind() {
        io::ErrorKind::NotFound => {
            let has_disks = storage.list(Path::new(DISKS)).is_ok();
            StoreFileError::NoStore { path: storage.display(Path::new("")), has_disks }
        }
        _ => StoreFileError::Io { what: "read", path: path.clone(), source },
    })?;
    parse(&path, &content)
}

/// Reads `store.json`, or makes an empty directory a store.
///
/// # Errors
/// Whatever makes the directory unusable as a store.
pub(crate) fn open_store(storage: &Arc<dyn Storage>) -> Result<StoreId, StoreFileError> {
    let path = storage.display(Path::new(FILE));
    let io = |what, source| StoreFileError::Io { what, path: path.clone(), source };
    match read_file(storage.as_ref(), Path::new(FILE), FILE_BYTES_MAX) {
        Ok(content) => parse(&path, &content),
        Err(error) if error.kind() == io::ErrorKind::NotFound => {
            check_unused(storage)?;
            write_store(storage)
        }
        Err(error) => Err(io("read", error)),
    }
}

/// Whether a directory without a `store.json` may become a store.
///
/// # Errors
/// When there is something in it.
pub(crate) fn check_unused(storage: &Arc<dyn Storage>) -> Result<(), StoreFileError> {
    let path = storage.display(Path::new(FILE));
    let names = storage.list(Path::new(""));
    let names = names.map_err(|source| StoreFileError::Io { what: "list the directory of", path, source })?;
    // The lock is a receiver's; a leftover temporary file is from a crash while this was written.
    let disks = names.iter().find(|name| *name == DISKS).cloned();
    match disks.or_else(|| names.into_iter().find(|name| !name.starts_with(FILE) && name != LOCK)) {
        Some(found) => Err(StoreFileError::NotAStore { path: storage.display(Path::new("")), found }),
        None => Ok(()),
    }
}

/// The way out of a store that has lost the file.
fn lost(found: &str, path: &Path) -> String {
    if found != DISKS {
        return String::new();
    }
    format!(
        "; a store that has lost the file has it again after `backtide fsck {} --rebuild`",
        path.display()
    )
}

/// Writes a `store.json` with a new id. Nothing in the store depends on the one before.
///
/// # Errors
/// The file system's.
pub(crate) fn write_store(storage: &Arc<dyn Storage>) -> Result<StoreId, StoreFileError> {
    let store = StoreId(Uuid::new_v4());
    // The file before may have been all that told, but for the other one itself.
    let retention = storage.open(Path::new(retention::FILE)).is_ok();
    let written = replace(&**storage, &StoreFile::new(store, retention));
    let path = || storage.display(Path::new(FILE));
    written.map_err(|source| StoreFileError::Io { what: "write", path: path(), source })?;
    Ok(store)
}

fn replace(storage: &dyn Storage, file: &StoreFile) -> io::Result<()> {
    let content = serde_json::to_vec_pretty(file).expect("plain data becomes JSON");
    replace_file(storage, Path::new(FILE), &content)
}

/// Whether the store has had a `retention.json`: one that has none now has lost it. One without a good `store.json` does not tell.
pub(crate) fn has_had_retention(storage: &dyn Storage) -> bool {
    read_parsed(storage).is_some_and(|file| file.retention)
}

/// Notes durably that `retention.json` is there, once.
///
/// # Errors
/// The file system's.
pub(crate) fn note_retention(storage: &dyn Storage) -> io::Result<()> {
    match read_parsed(storage) {
        Some(file) if !file.retention => replace(storage, &StoreFile::new(file.store, true)),
        // What is wrong with a `store.json` is told where it is read for itself.
        Some(_) | None => Ok(()),
    }
}

fn read_parsed(storage: &dyn Storage) -> Option<StoreFile> {
    let content = read_file(storage, Path::new(FILE), FILE_BYTES_MAX).ok()?;
    parse_file(Path::new(FILE), &content).ok()
}

/// What a `store.json` says.
///
/// # Errors
/// When it is damaged, or of another version.
pub(crate) fn parse(path: &Path, content: &[u8]) -> Result<StoreId, StoreFileError> {
    parse_file(path, content).map(|file| file.store)
}

fn parse_file(path: &Path, content: &[u8]) -> Result<StoreFile, StoreFileError> {
    let damaged = |why: String| StoreFileError::Damaged { path: path.to_owned(), why };
    // Magic and version first and alone: another version may have other fields.
    let value: serde_json::Value = serde_json::from_slice(content).map_err(|e| damaged(e.to_string()))?;
    let magic = value.get("magic").and_then(serde_json::Value::as_str);
    if magic != Some(MAGIC) {
        return Err(damaged(format!("expected magic {MAGIC:?}, found {:?}", magic.unwrap_or_default())));
    }
    let version = value.get("version").and_then(serde_json::Value::as_u64);
    let version = version.ok_or_else(|| damaged("expected a version, found none".to_owned()))?;
    if version != u64::from(STORE_VERSION) {
        return Err(StoreFileError::Version { path: path.to_owned(), found: version });
    }
    let file: StoreFile = serde_json::from_value(value).map_err(|e| damaged(e.to_string()))?;
    let expected = file.expected();
    if file.checksum != expected {
        return Err(damaged(format!("checksum expected {expected}, found {}", file.checksum)));
    }
    Ok(file)
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::PermissionsExt;

    use super::*;

    #[test]
    fn nobody_else_can_lock_receivers_out_of_a_store() {
        let directory = tempfile::tempdir().unwrap();
        let _lock = lock_store(directory.path()).unwrap();
        let mode = std::fs::metadata(directory.path().join(LOCK)).unwrap().permissions().mode();
        assert_eq!(mode & 0o777, 0o600);
    }

    #[test]
    fn the_golden_file_is_what_is_written_and_is_read() {
        let (storage, store) = (backtide_storage::MemoryStorage::new(), StoreId(Uuid::from_u128(3)));
        replace(&storage, &StoreFile::new(store, false)).unwrap();
        note_retention(&storage).unwrap();
        let golden = crate::golden::check(&storage, Path::new(FILE));
        assert!(has_had_retention(&golden));
        let shared: Arc<dyn Storage> = Arc::new(golden);
        assert_eq!(read_store(&shared).unwrap(), store);
    }
}
