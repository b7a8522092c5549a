//! The hydration file of a disk: its header, and the journal behind it. `FORMAT.md` beside this crate
//! describes the bytes and has the argument.
//!
//! Invariants: an entry says that blocks are present only when they are on the image; one says that they are
//! durable only when the image was synced after they were written. A header names every block that is not
//! durably present at the moment it is made. After a sync that failed nobody knows what is durable, so nothing
//! is said any more; and no header says again that the image may hold what is missing.

mod load;
mod state;

use std::{
    io,
    path::{Path, PathBuf},
    sync::{Arc, Mutex, MutexGuard, PoisonError},
};

use backtide_storage::Storage;
use backtide_tracking::DirtyBitmap;
use backtide_units::{BlockCount, BlockRange, ByteCount, ByteOffset};
use uuid::Uuid;

use self::state::{Room, State};
use crate::{
    header::{self, Header},
    journal::Entry,
};

pub use load::HydrationError;

/// The journal begins at a multiple, so that no entry lies across a sector.
const SECTOR_BYTES: u64 = 512;

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

/// Why blocks are missing still that were to be [stored](HydrationFile::store).
#[derive(Debug, thiserror::Error)]
pub enum StoreError {
    /// The image did not take them, or it has lost something: what it takes since nobody believes.
    #[error(transparent)]
    Image(io::Error),
    /// The image holds them, which could not be remembered.
    #[error("it cannot be noted: {0}")]
    Unnoted(io::Error),
}

impl HydrationFile {
    /// What the file of a disk takes that lacks so many blocks, beside their bitmap.
    pub fn room_for(missing: BlockCount) -> ByteCount {
        state::journal_bytes(missing)
    }

    /// The same however many they are.
    pub fn room_at_most() -> ByteCount {
        state::journal_bytes(BlockCount(u64::MAX))
    }

    /// Puts a file at `path`: from when it is there, durably, `missing` is missing. It has room for what is going to be noted.
    ///
    /// # Errors
    /// The storage's. After one the file may be there or not.
    pub fn create(
        storage: Arc<dyn Storage>,
        path: &Path,
        header: Header,
        missing: DirtyBitmap,
    ) -> io::Result<Self> {
        let state = State::write(&*storage, path, &header, missing, &[], Room::Needed)?;
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
        let first = state.append_present(&entries)?;
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
    pub fn store(
        &self,
        blocks: &[BlockRange],
        write: impl FnOnce() -> io::Result<()>,
    ) -> Result<(), StoreError> {
        write().map_err(StoreError::Image)?;
        self.present(blocks).map_err(|error| match self.state().failed {
            None => StoreError::Unnoted(error),
            Some(_) => StoreError::Image(error),
        })
    }

    /// Remembers that what the image shows of missing blocks need not be what it keeps: whoever opens this file next does
    /// not compare them.
    ///
    /// # Errors
    /// The storage's: then nobody will know, unless a [`settle`](Self::settle) that follows can write it.
    pub fn stop_comparing(&self) -> io::Result<()> {
        let finished = self.settling.lock().unwrap_or_else(PoisonError::into_inner);
        let mut state = self.state();
        if *finished || !state.compare {
            return Ok(());
        }
        self.say_what_is_lost(&mut state);
        if !state.compare {
            return Ok(());
        }
        state.is_sound()?;
        state.distrusted = true;
        // Nothing becomes durable by it.
        self.begin_anew(&mut state, 0, Room::IfThereIs)
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
            let mut state = self.state();
            self.say_what_is_lost(&mut state);
            state.is_sound()?;
            state.next - 1
        };
        if let Err(error) = sync_image() {
            self.give_up(&error);
            return Err(error);
        }
        let mut state = self.state();
        if state.pending.is_empty() && !state.broken && !state.distrusted {
            return Ok(());
        }
        if state.broken {
            return self.begin_anew(&mut state, until, Room::IfThereIs);
        }
        if state.is_due() {
            // As long as the first has room it is not given up for a second that has none.
            let room = if state.is_short() || state.distrusted { Room::IfThereIs } else { Room::Needed };
            match self.begin_anew(&mut state, until, room) {
                Ok(()) => return Ok(()),
                Err(_) if state.failed.is_some() => return state.is_sound(),
                // Where there is no room for a second file the first goes on.
                Err(_) => state.put_off(),
            }
        }
        if !state.pending.iter().any(|(number, _)| *number <= until) {
            return Ok(());
        }
        state.append(&[Entry::Durable(until)])?;
        state.place_ahead();
        let file = Arc::clone(&state.file);
        // Others may append meanwhile.
        drop(state);
        let synced = file.sync_data();
        let mut state = self.state();
        if synced.is_err() {
            state.broken = true;
            return self.begin_anew(&mut state, until, Room::IfThereIs);
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
    fn begin_anew(&self, state: &mut State, until: u64, room: Room) -> io::Result<()> {
        let pending = state.pending.iter().filter(|(number, _)| *number > until);
        let later: Vec<BlockRange> = pending.map(|(_, run)| *run).collect();
        let missing = state.missing_with(&later);
        let header = Header { compare: state.compare && !state.distrusted, ..self.header.clone() };
        let error = match State::write(&*self.storage, &self.path, &header, missing, &later, room) {
            Ok(anew) => {
                *state = anew;
                // What the old one took is free by now.
                state.place_ahead();
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
        state.failed = Some(format!("the image could not be synced: {error}"));
        state.unsaid = Some("it was not tried".to_owned());
        self.say_what_is_lost(&mut state);
    }

    /// Notes that the image has lost something, where that is not noted yet.
    fn say_what_is_lost(&self, state: &mut State) {
        if state.unsaid.is_none() {
            return;
        }
        let pending: Vec<BlockRange> = state.pending.iter().map(|(_, run)| *run).collect();
        let missing = state.missing_with(&pending);
        let header = Header { compare: false, ..self.header.clone() };
        match State::write(&*self.storage, &self.path, &header, missing, &[], Room::IfThereIs) {
            Ok(anew) => *state = State { failed: state.failed.take(), ..anew },
            // Whoever opens this file before that can be written must not take lost blocks for present. (What it shows of missing
            // ones is read from the device then, where the image is a file.)
            Err(error) => {
                state.take_back();
                state.unsaid = Some(error.to_string());
            }
        }
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

#[cfg(test)]
mod tests;
