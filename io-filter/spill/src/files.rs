//! The spill's files: writes, reads and removes them through the storage seam. Keeps nothing open,
//! so that a value can be cloned to wherever blocking is fine.

use std::{
    io,
    path::{Path, PathBuf},
    sync::Arc,
};

use backtide_protocol::{Decoder, Message, ProtocolError, encode};
use backtide_storage::{Storage, StorageFile};
use backtide_units::{ByteCount, ByteOffset, DiskId};

use crate::{
    header::{FileHeader, HEADER_BYTES, HeaderError},
    ring::{Place, Slot},
};

/// So much of the file system is left to others.
const FREE_BYTES_MIN: u64 = 64 * 1024 * 1024;

/// How files are named.
const SUFFIX: &str = ".spill";

/// Why something could not be written to the spill or read back.
#[derive(Debug, thiserror::Error)]
pub enum SpillError {
    /// The file system has too little room.
    #[error("{free} bytes are free in {}, and {floor} of them are left to others", directory.display())]
    NoRoom {
        /// Where.
        directory: PathBuf,
        /// What is free.
        free: ByteCount,
        /// What is not used.
        floor: ByteCount,
    },
    /// The storage failed.
    #[error("{}: {source}", path.display())]
    Io {
        /// Which file or directory.
        path: PathBuf,
        /// How.
        source: io::Error,
    },
    /// A header that cannot be, or not of this file.
    #[error("{}: {source}", path.display())]
    Header {
        /// Which file.
        path: PathBuf,
        /// What is wrong.
        source: HeaderError,
    },
    /// A frame that is damaged, or another one than should be there.
    #[error("{} at byte {at}: {source}", path.display())]
    Frame {
        /// Which file.
        path: PathBuf,
        /// Behind this place.
        at: ByteOffset,
        /// What is wrong.
        source: ProtocolError,
    },
    /// The file ends too early.
    #[error("{} ends before the {expected} bytes that were written", path.display())]
    Short {
        /// Which file.
        path: PathBuf,
        /// What it should have.
        expected: ByteCount,
    },
}

/// What was read back: frames in order, and why there are not more if there should be.
#[derive(Debug)]
pub struct ReadBack {
    /// The frames' messages.
    pub messages: Vec<Message>,
    /// Why some are missing at the end.
    pub failure: Option<SpillError>,
}

/// One disk's files.
#[derive(Clone)]
pub struct SpillFiles {
    pub(crate) storage: Arc<dyn Storage>,
    pub(crate) disk: DiskId,
    floor: u64,
}

impl SpillFiles {
    /// The files of `disk`, in a directory of their own that is made when something is written.
    /// They may grow to `limit` in all.
    pub fn new(storage: Arc<dyn Storage>, disk: DiskId, limit: ByteCount) -> Self {
        Self { storage, disk, floor: FREE_BYTES_MIN.min(limit.0) }
    }

    /// Where they are, for people.
    pub fn directory(&self) -> PathBuf {
        self.storage.display(&self.dir())
    }

    /// Bytes that are free there and not left to others.
    ///
    /// # Errors
    /// When that cannot be told.
    pub fn room(&self) -> Result<ByteCount, SpillError> {
        let free = self.storage.free_space().map_err(|source| self.failed(Path::new(""), source))?;
        Ok(ByteCount(free.0.saturating_sub(self.floor)))
    }

    pub(crate) fn dir(&self) -> PathBuf {
        PathBuf::from(self.disk.to_string())
    }

    pub(crate) fn path(&self, number: u64) -> PathBuf {
        self.dir().join(format!("{number:016}{SUFFIX}"))
    }

    pub(crate) fn failed(&self, path: &Path, source: io::Error) -> SpillError {
        SpillError::Io { path: self.storage.display(path), source }
    }

    /// Makes the frames of `messages` durable in their slot.
    ///
    /// # Errors
    /// Nothing may be written to that file after one: nobody knows what is in it.
    pub fn append(&self, slot: &Slot, messages: &[Message]) -> Result<(), SpillError> {
        let mut bytes = slot.create.map_or_else(Vec::new, |header| header.encode().to_vec());
        for (seq, message) in (slot.first..).zip(messages) {
            let (header, payload) = encode(seq, message);
            bytes.extend_from_slice(&header);
            bytes.extend_from_slice(&payload);
        }
        let free = self.storage.free_space().map_err(|source| self.failed(Path::new(""), source))?;
        if free.0 < self.floor.saturating_add(bytes.len() as u64) {
            let directory = self.storage.display(Path::new(""));
            return Err(SpillError::NoRoom { directory, free, floor: ByteCount(self.floor) });
        }
        let path = self.path(slot.file);
        self.write(slot, &path, &bytes).map_err(|source| self.failed(&path, source))
    }

    fn write(&self, slot: &Slot, path: &Path, bytes: &[u8]) -> io::Result<()> {
        if slot.create.is_none() {
            let file = self.storage.open(path)?;
            file.write_at(slot.at, bytes)?;
            return file.sync_data();
        }
        self.storage.create_dir(&self.dir())?;
        let file = self.storage.create_new(path)?;
        file.write_at(ByteOffset::ZERO, bytes)?;
        file.sync_data()?;
        self.storage.sync_dir(&self.dir())?;
        // The directory may be new.
        self.storage.sync_dir(Path::new(""))
    }

    /// Reads the frames of a place back, checked.
    pub fn read(&self, place: &Place) -> ReadBack {
        let mut messages = Vec::new();
        let failure = self.read_into(place, &mut messages).err();
        ReadBack { messages, failure }
    }

    fn read_into(&self, place: &Place, messages: &mut Vec<Message>) -> Result<(), SpillError> {
        let path = self.path(place.file);
        let io = |source| self.failed(&path, source);
        let file = self.storage.open(&path).map_err(io)?;
        let length = place.bytes.as_usize().expect("a place fits into memory");
        let mut bytes = vec![0; length];
        let found = file.read_at(place.at, &mut bytes).map_err(io)?;
        bytes.truncate(found);
        let mut decoder = Decoder::starting_at(place.first);
        decoder.buffer().extend_from_slice(&bytes);
        while (messages.len() as u64) < place.frames {
            match decoder.next_message() {
                Ok(Some(sequenced)) => messages.push(sequenced.message),
                Ok(None) => {
                    let expected = ByteCount(place.at.0 + place.bytes.0);
                    return Err(SpillError::Short { path: self.storage.display(&path), expected });
                }
                Err(source) => {
                    return Err(SpillError::Frame {
                        path: self.storage.display(&path),
                        at: place.at,
                        source,
                    });
                }
            }
        }
        Ok(())
    }

    /// Removes files, durably. Those that are gone already are no error.
    ///
    /// # Errors
    /// The storage's; the files may come back after a power loss.
    pub fn remove(&self, numbers: &[u64]) -> Result<(), SpillError> {
        for number in numbers {
            let path = self.path(*number);
            match self.storage.remove(&path) {
                Ok(()) => {}
                Err(error) if error.kind() == io::ErrorKind::NotFound => {}
                Err(source) => return Err(self.failed(&path, source)),
            }
        }
        let dir = self.dir();
        match self.storage.sync_dir(&dir) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => Err(self.failed(&dir, error)),
            Ok(()) | Err(_) => Ok(()),
        }
    }

    /// The numbers of the files that are there, in order.
    ///
    /// # Errors
    /// When the directory cannot be listed.
    pub fn list(&self) -> Result<Vec<u64>, SpillError> {
        let names = match self.storage.list(&self.dir()) {
            Ok(names) => names,
            Err(error) if error.kind() == io::ErrorKind::NotFound => Vec::new(),
            Err(source) => return Err(self.failed(&self.dir(), source)),
        };
        let number = |name: &String| name.strip_suffix(SUFFIX)?.parse().ok();
        let mut numbers: Vec<u64> = names.iter().filter_map(number).collect();
        numbers.sort_unstable();
        Ok(numbers)
    }

    pub(crate) fn header(&self, number: u64, file: &dyn StorageFile) -> Result<FileHeader, SpillError> {
        let path = self.path(number);
        let mut bytes = [0; HEADER_BYTES];
        let found =
            file.read_at(ByteOffset::ZERO, &mut bytes).map_err(|source| self.failed(&path, source))?;
        FileHeader::decode(&bytes[..found])
            .map_err(|source| SpillError::Header { path: self.storage.display(&path), source })
    }
}
