//! Reading what an attach before has left in a hydration file.
//!
//! In the same boot everything that was written is there, so every entry counts. In another, only what an entry
//! calls durable does: the rest is missing again, and a new file says so before anything else happens.

use std::{
    io,
    path::{Path, PathBuf},
    sync::{Arc, Mutex},
};

use backtide_storage::{Storage, StorageFile};
use backtide_units::{BlockRange, ByteOffset};
use uuid::Uuid;

use super::{
    HydrationFile, SECTOR_BYTES,
    state::{Room, State},
};
use crate::{
    Header, HeaderError,
    header::{self, PREFIX_BYTES},
    journal::{self, ENTRY_BYTES, Entry, Slot},
};

/// Entries are read in pieces of this size.
const PIECE_BYTES: usize = 1 << 20;

/// Why a disk that lacks blocks cannot be used: nobody knows which.
#[derive(Debug, thiserror::Error)]
pub enum HydrationError {
    /// The storage failed.
    #[error("{}: {source}", path.display())]
    Io {
        /// The file.
        path: PathBuf,
        /// How.
        source: io::Error,
    },
    /// It does not begin with a header that can be used.
    #[error("{}: {source}", path.display())]
    Header {
        /// The file.
        path: PathBuf,
        /// What is wrong.
        source: HeaderError,
    },
    /// What it says of blocks that have become present is damaged.
    #[error("{} is damaged at byte {at}: {what}", path.display())]
    Journal {
        /// The file.
        path: PathBuf,
        /// Where.
        at: ByteOffset,
        /// What is wrong.
        what: &'static str,
    },
}

/// The entries of a journal.
#[derive(Default)]
struct Entries {
    /// One after the other, from the first on.
    present: Vec<(u64, BlockRange)>,
    /// How many there are of both kinds.
    count: u64,
    /// Up to which one blocks are durable.
    durable: u64,
    /// Entries follow behind a place without one.
    gap: Option<ByteOffset>,
}

impl HydrationFile {
    /// Opens the file at `path`, in the boot `boot` of the host; none when there is none.
    ///
    /// # Errors
    /// When the file cannot be read, or is damaged: the disk cannot be used then.
    pub fn open(storage: Arc<dyn Storage>, path: &Path, boot: Uuid) -> Result<Option<Self>, HydrationError> {
        let named = || storage.display(path);
        let io = |source| HydrationError::Io { path: named(), source };
        let file = match storage.open(path) {
            Ok(file) => file,
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
            Err(source) => return Err(io(source)),
        };
        let bytes = read_header(&*file).map_err(io)?;
        let read = bytes.and_then(|bytes| Ok((header::decode(&bytes)?, bytes.len() as u64)));
        let ((head, id, mut missing), length) =
            read.map_err(|source| HydrationError::Header { path: named(), source })?;
        let journal_at = length.next_multiple_of(SECTOR_BYTES);
        let journal = |(at, what)| HydrationError::Journal { path: named(), at, what };
        let entries = read_entries(&*file, id, journal_at).map_err(io)?.map_err(journal)?;
        let same_boot = head.boot == boot && !boot.is_nil();
        if let Some(at) = entries.gap.filter(|_| same_boot) {
            return Err(journal((at, "entries are missing")));
        }
        let disk = BlockRange::whole_disk(head.source.size);
        for (number, run) in &entries.present {
            if run.end() > disk.end() {
                let at = ByteOffset(journal_at + (number - 1) * ENTRY_BYTES);
                return Err(journal((at, "blocks beyond the end of the disk")));
            }
            if same_boot || *number <= entries.durable {
                missing.remove(*run);
            }
        }
        let header = Header { boot, ..head };
        let state = if same_boot {
            // Whoever wrote it may have been killed before the sync: what it calls durable has to be that. Where it
            // cannot be made so, the next flush begins a new file.
            let broken = file.sync_data().is_err();
            let pending = entries.present.into_iter().filter(|(number, _)| *number > entries.durable);
            let pending = pending.collect();
            let length = file.len().map_err(io)?.0;
            let next = entries.count + 1;
            let placed = (length.saturating_sub(journal_at) / ENTRY_BYTES + 1).max(next);
            State { placed, broken, pending, ..State::of(file, id, journal_at, next, &header, missing) }
        } else {
            State::write(&*storage, path, &header, missing, &[], Room::IfThereIs).map_err(io)?
        };
        let (path, settling) = (path.to_owned(), Mutex::default());
        Ok(Some(Self { storage, path, header, settling, state: Mutex::new(state) }))
    }
}

fn read_header(file: &dyn StorageFile) -> io::Result<Result<Vec<u8>, HeaderError>> {
    let mut prefix = vec![0; PREFIX_BYTES];
    let found = file.read_at(ByteOffset::ZERO, &mut prefix)?;
    prefix.truncate(found);
    let expected = match header::length(&prefix) {
        Ok(expected) => expected,
        Err(error) => return Ok(Err(error)),
    };
    let found = file.len()?.0;
    if found < expected {
        return Ok(Err(HeaderError::Length { expected, found }));
    }
    let mut bytes = vec![0; expected as usize];
    file.read_exact_at(ByteOffset::ZERO, &mut bytes)?;
    Ok(Ok(bytes))
}

type BadJournal = (ByteOffset, &'static str);

fn read_entries(
    file: &dyn StorageFile,
    id: Uuid,
    journal_at: u64,
) -> io::Result<Result<Entries, BadJournal>> {
    let mut entries = Entries::default();
    let mut piece = vec![0; PIECE_BYTES];
    let mut at = journal_at;
    let mut number = 1;
    let mut hole = None;
    loop {
        let found = file.read_at(ByteOffset(at), &mut piece)?;
        for bytes in piece[..found].chunks(ENTRY_BYTES as usize) {
            let here = ByteOffset(journal_at + (number - 1) * ENTRY_BYTES);
            match journal::decode(id, number, bytes) {
                Slot::Damaged => return Ok(Err((here, "that is no entry"))),
                Slot::Empty => drop(hole.get_or_insert(here)),
                Slot::Whole(_) if hole.is_some() => entries.gap = hole,
                Slot::Whole(entry) => {
                    entries.count = number;
                    match entry {
                        Entry::Present(run) => entries.present.push((number, run)),
                        Entry::Durable(until) => entries.durable = entries.durable.max(until),
                    }
                }
            }
            number += 1;
        }
        at += found as u64;
        if found < PIECE_BYTES {
            return Ok(Ok(entries));
        }
    }
}
