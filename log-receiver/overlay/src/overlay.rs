//! An overlay in use: its two files, what is where, and what is durable.
//!
//! Three locks, always taken in this order: `syncing` (one sync at a time), `writer` (one write at a
//! time, and the map's end), `blocks` (readers hold it while they read slots, so that none is given out
//! again under them). Nothing is held while the disk below is read for a reader.

use std::{
    io::ErrorKind,
    path::{Path, PathBuf},
    sync::{Arc, Mutex, MutexGuard, PoisonError, RwLock, TryLockError},
};

use backtide_storage::{Storage, StorageFile};
use backtide_units::{BLOCK_SIZE, BlockCount, ByteCount, ByteOffset};
use uuid::Uuid;

use crate::{
    OverlayError, OverlayOptions,
    blocks::Blocks,
    format::{self, FileKind, MARK_AT, RECORDS_AT, RecordNumber, SLOTS_AT},
    recover,
    slots::Slots,
};

/// An overlay's identity: its files name it, so that no file is taken for one of another overlay.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct OverlayId(pub Uuid);

/// Where an overlay's files are.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct OverlayFiles {
    /// What became of which block.
    pub map: PathBuf,
    /// The blocks' bytes.
    pub data: PathBuf,
}

/// An overlay in use. Shared by all connections of a mount; calls block on the file system.
pub struct Overlay {
    pub(crate) storage: Arc<dyn Storage>,
    pub(crate) files: OverlayFiles,
    pub(crate) id: OverlayId,
    pub(crate) size: ByteCount,
    pub(crate) options: OverlayOptions,
    pub(crate) data: Arc<dyn StorageFile>,
    pub(crate) syncing: Mutex<()>,
    pub(crate) writer: Mutex<Writer>,
    pub(crate) blocks: RwLock<Blocks>,
}

/// What only whoever writes may touch.
pub(crate) struct Writer {
    pub(crate) map: Arc<dyn StorageFile>,
    /// Where the next record goes.
    pub(crate) end: ByteOffset,
    /// How long the map was when it was last written anew.
    pub(crate) compact: ByteCount,
    /// The last record written.
    pub(crate) last: RecordNumber,
    pub(crate) durable: RecordNumber,
    /// Bytes of data written that are not durable.
    pub(crate) undurable: ByteCount,
    pub(crate) slots: Slots,
    /// What the budget was charged.
    pub(crate) charged: u64,
    /// Why nothing may be written any more.
    pub(crate) poisoned: Option<String>,
}

/// What an overlay takes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct OverlayUse {
    /// Bytes of blocks that were written, and not zeroed or discarded since.
    pub bytes: ByteCount,
    /// The most it may hold.
    pub limit: ByteCount,
    /// What its files take in the store, at most.
    pub file_bytes: ByteCount,
}

/// An overlay that exists is opened, or a new one is made.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Existing {
    /// There is none: make it.
    Create,
    /// Open it, as a power cut may have left it.
    Open,
}

impl OverlayFiles {
    /// The files called `name` in `dir`.
    pub fn named(dir: &Path, name: &str) -> Self {
        Self { map: dir.join(format!("{name}.map")), data: dir.join(format!("{name}.data")) }
    }

    /// Whether a client may have written something to it: its files are longer than those of an overlay that was only
    /// made, or cannot be looked at. A file that is missing holds nothing.
    pub fn may_hold_something(&self, storage: &dyn Storage) -> bool {
        let longer = |path: &Path, than: ByteOffset| match storage.open(path).and_then(|file| file.len()) {
            Ok(length) => length.0 > than.0,
            Err(error) => error.kind() != ErrorKind::NotFound,
        };
        longer(&self.map, RECORDS_AT) || longer(&self.data, SLOTS_AT)
    }

    /// The map's next version while it is written.
    pub(crate) fn map_beside(&self) -> PathBuf {
        let mut name = self.map.as_os_str().to_owned();
        name.push(".new");
        name.into()
    }
}

impl Overlay {
    /// Opens or makes the overlay `id` over a disk of `size` bytes.
    ///
    /// # Errors
    /// The file system's; damage of an existing one, with file and place.
    pub fn open(
        storage: Arc<dyn Storage>,
        files: OverlayFiles,
        id: OverlayId,
        size: ByteCount,
        options: OverlayOptions,
        existing: Existing,
    ) -> Result<Self, OverlayError> {
        if existing == Existing::Create {
            create(&*storage, &files, id, size)?;
        }
        let found = recover::open(&*storage, &files, id, size)?;
        let charged = found.blocks.stored();
        if !options.budget.take(charged) {
            return Err(OverlayError::Full { limit: options.budget.left() });
        }
        let writer = Writer {
            map: found.map,
            end: found.end,
            compact: ByteCount(charged * 4 + RECORDS_AT.0),
            last: found.last,
            durable: found.last,
            undurable: ByteCount::ZERO,
            slots: found.slots,
            charged,
            poisoned: None,
        };
        Ok(Self {
            storage,
            files,
            id,
            size,
            options,
            data: found.data,
            syncing: Mutex::default(),
            writer: Mutex::new(writer),
            blocks: RwLock::new(found.blocks),
        })
    }

    /// The size of the disk.
    pub fn size(&self) -> ByteCount {
        self.size
    }

    /// What it takes now.
    pub fn usage(&self) -> OverlayUse {
        self.usage_with(&self.writer())
    }

    /// The same for somebody who must not wait for storage; none while something is written.
    pub fn usage_at_once(&self) -> Option<OverlayUse> {
        match self.writer.try_lock() {
            Ok(writer) => Some(self.usage_with(&writer)),
            Err(TryLockError::Poisoned(writer)) => Some(self.usage_with(&writer.into_inner())),
            Err(TryLockError::WouldBlock) => None,
        }
    }

    fn usage_with(&self, writer: &Writer) -> OverlayUse {
        let file_bytes = writer.end.0 + SLOTS_AT.0 + u64::from(writer.slots.total()) * BLOCK_SIZE;
        OverlayUse {
            bytes: BlockCount(writer.charged).bytes(),
            limit: self.options.bytes_max,
            file_bytes: ByteCount(file_bytes),
        }
    }

    pub(crate) fn writer(&self) -> MutexGuard<'_, Writer> {
        self.writer.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub(crate) fn io(&self, what: &'static str, path: &Path, source: std::io::Error) -> OverlayError {
        let path = self.storage.display(path);
        if source.kind() == ErrorKind::StorageFull {
            return OverlayError::NoRoom(format!("cannot {what} {}: {source}", path.display()));
        }
        OverlayError::Io { what, path, source }
    }
}

impl Drop for Overlay {
    fn drop(&mut self) {
        let charged = self.writer().charged;
        self.options.budget.give_back(charged);
    }
}

/// Makes the files of an empty overlay. The map gets its name last: what has one is whole.
fn create(
    storage: &dyn Storage,
    files: &OverlayFiles,
    id: OverlayId,
    size: ByteCount,
) -> Result<(), OverlayError> {
    let io = |what, path: &Path| {
        let path = storage.display(path);
        move |source| OverlayError::Io { what, path, source }
    };
    let data = storage.create_new(&files.data).map_err(io("create", &files.data))?;
    let header = format::encode_header(FileKind::Data, id, size);
    data.write_at(ByteOffset::ZERO, &header).map_err(io("write", &files.data))?;
    data.set_len(ByteCount(SLOTS_AT.0)).map_err(io("write", &files.data))?;
    data.sync_data().map_err(io("sync", &files.data))?;
    let beside = files.map_beside();
    let map = storage.create_new(&beside).map_err(io("create", &beside))?;
    let header = format::encode_header(FileKind::Map, id, size);
    map.write_at(ByteOffset::ZERO, &header).map_err(io("write", &beside))?;
    let mark = format::encode_mark(id, RecordNumber::default());
    map.write_at(MARK_AT, &mark).map_err(io("write", &beside))?;
    map.set_len(ByteCount(RECORDS_AT.0)).map_err(io("write", &beside))?;
    map.sync_data().map_err(io("sync", &beside))?;
    storage.rename(&beside, &files.map).map_err(io("rename", &files.map))?;
    let dir = files.map.parent().unwrap_or(Path::new(""));
    storage.sync_dir(dir).map_err(io("sync", dir))
}

/// Removes an overlay's files; those that are not there are fine.
///
/// # Errors
/// The file system's.
pub fn remove(storage: &dyn Storage, files: &OverlayFiles) -> Result<(), OverlayError> {
    for path in [&files.map, &files.map_beside(), &files.data] {
        match storage.remove(path) {
            Err(source) if source.kind() != ErrorKind::NotFound => {
                return Err(OverlayError::Io { what: "remove", path: storage.display(path), source });
            }
            Ok(()) | Err(_) => {}
        }
    }
    let dir = files.map.parent().unwrap_or(Path::new(""));
    storage.sync_dir(dir).map_err(|source| OverlayError::Io {
        what: "sync",
        path: storage.display(dir),
        source,
    })
}
