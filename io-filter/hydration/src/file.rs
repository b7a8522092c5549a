//! The hydration file of a disk: its header, and the journal behind it. `FORMAT.md` beside this crate
//! describes the bytes and has the argument.
//!
//! Invariants: an entry says that blocks are present only when they are on the image; one says that they are
//! durable only when the image was synced after they were written. A header names every block that is not
//! durably present at the moment it is made. After a sync that failed nobody knows what is durable, so nothing
//! is said any more; and no header says again that the image may hold what is missing.

mod load;

use std::{
    io::{self, IoSlice},
    path::{Path, PathBuf},
    sync::{Arc, Mutex, MutexGuard, PoisonError},
};

use backtide_storage::{Storage, StorageFile, replace_with};
use backtide_tracking::DirtyBitmap;
use backtide_units::{BlockRange, ByteOffset};
use uuid::Uuid;

use crate::{
    header::{self, Header},
    journal::{self, ENTRY_BYTES, Entry},
};

pub use load::HydrationError;

/// The journal begins at a multiple, so that no entry lies across a sector.
const SECTOR_BYTES: u64 = 512;

/// A journal that is longer than this, and than eight times its header, is begun anew, in bytes.
const JOURNAL_BYTES_MAX: u64 = 1 << 20;

/// What is missing of a disk, durably. Shared by whoever changes the disk; calls may overlap.
pub struct HydrationFile {
    storage: Arc<dyn Storage>,
    path: PathBuf,
    /// As it was found or made.
    header: Header,
    /// Held from the sync of the image to what is said of it; whether the file is gone, since nothing is missing.
    settling: Mutex<bool>,
    state: Mutex<State>,
}

struct State {
    file: Arc<dyn StorageFile>,
    id: Uuid,
    /// Where the journal begins.
    journal_at: u64,
    /// The next entry's number.
    next: u64,
    /// The header says that the image may hold what is missing.
    compare: bool,
    /// As the entries say.
    missing: DirtyBitmap,
    /// What has become present since the last entry that says it is durable.
    pending: Vec<(u64, BlockRange)>,
    /// A sync of the journal failed: it has to be begun anew.
    broken: bool,
    /// Why nothing is said any more.
    failed: Option<String>,
}

impl HydrationFile {
    /// Puts a file at `path`: from when it is there, durably, `missing` is missing.
    ///
    /// # Errors
    /// The storage's. After one the file may be there or not.
    pub fn create(
        storage: Arc<dyn Storage>,
        path: &Path,
        header: Header,
        missing: DirtyBitmap,
    ) -> io::Result<Self> {
        let state = State::write(&*storage, path, &header, missing, &[])?;
        let path = path.to_owned();
        Ok(Self { storage, path, header, settling: Mutex::default(), state: Mutex::new(state) })
    }

    /// What it says of the disk.
    pub fn header(&self) -> &Header {
        &self.header
    }

    /// Where it is, for people.
    pub fn place(&self) -> PathBuf {
        self.storage.display(&self.path)
    }

    /// What is missing.
    pub fn missing(&self) -> DirtyBitmap {
        self.state().missing.clone()
    }

    /// Whether something is present that a power loss would take.
    pub fn is_settled(&self) -> bool {
        let state = self.state();
        state.pending.is_empty() && !state.broken && state.failed.is_none()
    }

    /// Remembers that the image holds these blocks now, as far as processes can end.
    ///
    /// # Errors
    /// The storage's: then they are still missing.
    pub fn present(&self, blocks: &[BlockRange]) -> io::Result<()> {
        let mut state = self.state();
        state.is_sound()?;
        let entries: Vec<Entry> = blocks.iter().map(|run| Entry::Present(*run)).collect();
        let first = state.append(&entries)?;
        for (number, run) in (first..).zip(blocks) {
            state.missing.remove(*run);
            state.pending.push((number, *run));
        }
        Ok(())
    }

    /// Has `write` put these blocks on the image, then remembers that it holds them.
    ///
    /// # Errors
    /// The image's or the storage's: then they are still missing.
    pub fn store(&self, blocks: &[BlockRange], write: impl FnOnce() -> io::Result<()>) -> io::Result<()> {
        write()?;
        self.present(blocks)
    }

    /// Remembers that what the image shows of missing blocks need not be what it keeps: whoever opens this file next does
    /// not compare them.
    ///
    /// # Errors
    /// The storage's: then nobody will know.
    pub fn stop_comparing(&self) -> io::Result<()> {
        let finished = self.settling.lock().unwrap_or_else(PoisonError::into_inner);
        let mut state = self.state();
        if *finished || !state.compare {
            return Ok(());
        }
        state.is_sound()?;
        // Nothing becomes durable by it.
        self.begin_anew(&mut state, 0, false)
    }

    /// Makes what is present durable, which it is when this has succeeded: by `sync_image` on the image, then
    /// here.
    ///
    /// # Errors
    /// The image's or the storage's. After one of the image's, nothing is said to be present any more.
    pub fn settle(&self, sync_image: impl FnOnce() -> io::Result<()>) -> io::Result<()> {
        let finished = self.settling.lock().unwrap_or_else(PoisonError::into_inner);
        if *finished {
            return sync_image();
        }
        self.settle_held(sync_image)
    }

    fn settle_held(&self, sync_image: impl FnOnce() -> io::Result<()>) -> io::Result<()> {
        let until = {
            let state = self.state();
            state.is_sound()?;
            state.next - 1
        };
        if let Err(error) = sync_image() {
            self.give_up(&error);
            return Err(error);
        }
        let mut state = self.state();
        if state.pending.is_empty() && !state.broken {
            return Ok(());
        }
        if state.broken {
            let compare = state.compare;
            return self.begin_anew(&mut state, until, compare);
        }
        // Where there is no room for a second file the first goes on.
        let compare = state.compare;
        if state.is_long() && (self.begin_anew(&mut state, until, compare).is_ok() || state.failed.is_some())
        {
            return state.is_sound();
        }
        state.append(&[Entry::Durable(until)])?;
        let file = Arc::clone(&state.file);
        // Others may append meanwhile.
        drop(state);
        let synced = file.sync_data();
        let mut state = self.state();
        if synced.is_err() {
            state.broken = true;
            return self.begin_anew(&mut state, until, compare);
        }
        state.pending.retain(|(number, _)| *number > until);
        Ok(())
    }

    /// Removes the file when nothing is missing: from then on the image is the disk. What else says that it lacks
    /// something is removed by `before`, after the sync and before the file.
    ///
    /// # Errors
    /// As [`settle`](Self::settle); the file may be there then or not, and nothing is missing by it. After one of
    /// `before`, which says nothing of the image, it is there, and this can be tried again.
    ///
    /// # Panics
    /// When something is missing.
    pub fn finish(
        &self,
        sync_image: impl FnOnce() -> io::Result<()>,
        before: impl FnOnce() -> io::Result<()>,
    ) -> io::Result<()> {
        {
            let state = self.state();
            // After an image that could not be synced more is missing than whoever asks knows.
            state.is_sound()?;
            assert!(state.missing.is_empty(), "what is missing has to be remembered");
        }
        let mut finished = self.settling.lock().unwrap_or_else(PoisonError::into_inner);
        self.settle_held(sync_image)?;
        before()?;
        match self.storage.remove(&self.path) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(error),
            Ok(()) | Err(_) => {}
        }
        *finished = true;
        self.storage.sync_dir(self.path.parent().unwrap_or(Path::new("")))
    }

    /// A new file without what is known to be durable up to the entry `until`.
    fn begin_anew(&self, state: &mut State, until: u64, compare: bool) -> io::Result<()> {
        let pending = state.pending.iter().filter(|(number, _)| *number > until);
        let later: Vec<BlockRange> = pending.map(|(_, run)| *run).collect();
        let missing = state.missing_with(&later);
        let header = Header { compare, ..self.header.clone() };
        let error = match State::write(&*self.storage, &self.path, &header, missing, &later) {
            Ok(anew) => {
                *state = anew;
                return Ok(());
            }
            Err(error) => error,
        };
        // Either file is right for what was done so far, and only the one that is in place may be written.
        if !self.is_in_place(state.id) {
            state.failed = Some(format!("{} could not be replaced: {error}", self.place().display()));
        }
        Err(error)
    }

    fn is_in_place(&self, id: Uuid) -> bool {
        let found = self.storage.open(&self.path).and_then(|file| {
            let mut found = [0; 16];
            file.read_exact_at(ByteOffset(header::FILE_ID_AT), &mut found)?;
            Ok(found)
        });
        found.is_ok_and(|found| found == *id.as_bytes())
    }

    /// The image has lost something, and will not say again what: what is not durable does not count, and what it shows
    /// need not be what it keeps.
    fn give_up(&self, error: &io::Error) {
        let mut state = self.state();
        let pending: Vec<BlockRange> = state.pending.iter().map(|(_, run)| *run).collect();
        let missing = state.missing_with(&pending);
        let mut why = format!("the image could not be synced: {error}");
        let header = Header { compare: false, ..self.header.clone() };
        match State::write(&*self.storage, &self.path, &header, missing, &[]) {
            Ok(anew) => *state = anew,
            Err(other) => why.push_str(&format!("; and that could not be noted: {other}")),
        }
        state.failed = Some(why);
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl State {
    /// Puts a new file in place, in which `present` is no longer missing, though not durably.
    fn write(
        storage: &dyn Storage,
        path: &Path,
        header: &Header,
        mut missing: DirtyBitmap,
        present: &[BlockRange],
    ) -> io::Result<Self> {
        let id = Uuid::new_v4();
        let head = header::encode(header, id, &missing);
        let journal_at = (head.len() as u64).next_multiple_of(SECTOR_BYTES);
        let mut pending = Vec::new();
        let mut entries = Vec::new();
        for (number, run) in (1..).zip(present) {
            entries.extend_from_slice(&journal::encode(id, number, Entry::Present(*run)));
            missing.remove(*run);
            pending.push((number, *run));
        }
        let file = replace_with(storage, path, |file| {
            let padding = vec![0; (journal_at - head.len() as u64) as usize];
            let parts = [IoSlice::new(&head), IoSlice::new(&padding), IoSlice::new(&entries)];
            file.write_vectored_at(ByteOffset::ZERO, &parts)
        })?;
        let next = present.len() as u64 + 1;
        let compare = header.compare;
        Ok(Self { file, id, journal_at, next, compare, missing, pending, broken: false, failed: None })
    }

    /// Writes entries behind the last; the number of the first. Those that are not all written leave no part of
    /// themselves, and their place to the next.
    fn append(&mut self, entries: &[Entry]) -> io::Result<u64> {
        let first = self.next;
        let mut bytes = Vec::with_capacity(entries.len() * ENTRY_BYTES as usize);
        for (number, entry) in (first..).zip(entries) {
            bytes.extend_from_slice(&journal::encode(self.id, number, *entry));
        }
        let at = ByteOffset(self.journal_at + (first - 1) * ENTRY_BYTES);
        if let Err(error) = self.file.write_at(at, &bytes) {
            // A part of it may be there, which whoever opens the file would take for damage. What cannot be taken back
            // either is the next append's to write over.
            let _ = self.file.write_at(at, &vec![0; bytes.len()]);
            return Err(error);
        }
        self.next += entries.len() as u64;
        Ok(first)
    }

    fn missing_with(&self, others: &[BlockRange]) -> DirtyBitmap {
        let mut missing = self.missing.clone();
        for run in others {
            missing.insert(*run);
        }
        missing
    }

    fn is_long(&self) -> bool {
        self.next * ENTRY_BYTES > JOURNAL_BYTES_MAX.max(8 * self.journal_at)
    }

    fn is_sound(&self) -> io::Result<()> {
        match &self.failed {
            None => Ok(()),
            Some(why) => Err(io::Error::other(why.clone())),
        }
    }
}

#[cfg(test)]
mod tests;
