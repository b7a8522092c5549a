//! A hydration file as it lies on the storage: what is written where, and how much of the journal has a place there.
//!
//! Invariants: what is present can be noted without room on the file system as long as the journal has a place ahead of its
//! end, and where something was noted there is a place for the entry by which it becomes durable: a flush never fails for want
//! of room.

use std::{
    io::{self, IoSlice},
    path::Path,
    sync::Arc,
};

use backtide_storage::{Storage, StorageFile, replace_with};
use backtide_tracking::DirtyBitmap;
use backtide_units::{BlockCount, BlockRange, ByteCount, ByteOffset};
use uuid::Uuid;

use super::SECTOR_BYTES;
use crate::{
    header::{self, Header},
    journal::{self, ENTRY_BYTES, Entry},
};

/// A journal that is longer than this, and than eight times its header, is begun anew, in bytes.
const JOURNAL_BYTES_MAX: u64 = 1 << 20;

/// So many entries at most have a place ahead of the journal's end: 4 MiB.
const AHEAD_MAX: u64 = (4 << 20) / ENTRY_BYTES;

/// Where that cannot be had so many at a time: 64 KiB.
const AHEAD_LEAST: u64 = (64 << 10) / ENTRY_BYTES;

/// Behind what is present so many are kept for entries that say it is durable: one for a flush that has begun and is not
/// about all of it, and one for the next. When nothing can be noted any more, nothing follows that one.
const KEPT: u64 = 2;

/// After so many more entries it is tried again to begin a journal anew, or to find a place ahead, for which there was no room.
const TRIED_EVERY: u64 = 4096;

pub(super) struct State {
    pub(super) file: Arc<dyn StorageFile>,
    pub(super) id: Uuid,
    /// Where the journal begins.
    pub(super) journal_at: u64,
    /// The next entry's number.
    pub(super) next: u64,
    /// The first entry that has no place on the file system.
    pub(super) placed: u64,
    /// Ahead of this entry there was no room for more places.
    pub(super) full_until: u64,
    /// A longer journal is begun anew at a flush, in entries.
    pub(super) long: u64,
    /// The header says that the image may hold what is missing.
    pub(super) compare: bool,
    /// It should not, and that could not be written.
    pub(super) distrusted: bool,
    /// As the entries say.
    pub(super) missing: DirtyBitmap,
    /// What has become present since the last entry that says it is durable.
    pub(super) pending: Vec<(u64, BlockRange)>,
    /// A sync of the journal failed: it has to be begun anew.
    pub(super) broken: bool,
    /// Why nothing is said any more.
    pub(super) failed: Option<String>,
    /// And why not even that was written, as long as it is not.
    pub(super) unsaid: Option<String>,
}

/// Whether a new file may do with less room than it will want.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(super) enum Room {
    Needed,
    IfThereIs,
}

/// For so many entries ahead there is to be a place: all that can follow, unless they are many.
fn wanted(missing: BlockCount) -> u64 {
    // Each block becomes present once, and durable at most as often.
    missing.0.saturating_mul(2).saturating_add(KEPT).min(AHEAD_MAX)
}

/// What a new file takes beside its header for so many missing blocks.
pub(super) fn journal_bytes(missing: BlockCount) -> ByteCount {
    ByteCount(wanted(missing) * ENTRY_BYTES)
}

impl State {
    /// Puts a new file in place, in which `present` is no longer missing, though not durably.
    pub(super) fn write(
        storage: &dyn Storage,
        path: &Path,
        header: &Header,
        mut missing: DirtyBitmap,
        present: &[BlockRange],
        room: Room,
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
        let ahead = wanted(missing.count());
        let put = |ahead: u64| {
            replace_with(storage, path, |file| {
                let padding = vec![0; (journal_at - head.len() as u64) as usize];
                let room = vec![0; (ahead * ENTRY_BYTES) as usize];
                let parts = [&head, &padding, &entries, &room].map(|part| IoSlice::new(part));
                file.write_vectored_at(ByteOffset::ZERO, &parts)
            })
        };
        let (file, ahead) = match put(ahead) {
            Ok(file) => (file, ahead),
            Err(error) if room == Room::Needed => return Err(error),
            Err(_) => (put(0)?, 0),
        };
        let next = present.len() as u64 + 1;
        Ok(Self { pending, placed: next + ahead, ..Self::of(file, id, journal_at, next, header, missing) })
    }

    /// Of a file in which nothing is pending, and nothing has a place ahead.
    pub(super) fn of(
        file: Arc<dyn StorageFile>,
        id: Uuid,
        journal_at: u64,
        next: u64,
        header: &Header,
        missing: DirtyBitmap,
    ) -> Self {
        Self {
            file,
            id,
            journal_at,
            next,
            placed: next,
            full_until: 0,
            long: JOURNAL_BYTES_MAX.max(8 * journal_at) / ENTRY_BYTES,
            compare: header.compare,
            distrusted: false,
            missing,
            pending: Vec::new(),
            broken: false,
            failed: None,
            unsaid: None,
        }
    }

    /// Writes entries of what is present, and sees before that the one that makes them durable has a place.
    pub(super) fn append_present(&mut self, entries: &[Entry]) -> io::Result<u64> {
        let least = entries.len() as u64 + KEPT;
        if self.ahead() < least && self.place(least.max(AHEAD_LEAST)).is_err() {
            self.place(least)?;
        }
        self.append(entries)
    }

    /// Sees that there is a place for what follows, if there is room for it: before it is needed.
    pub(super) fn place_ahead(&mut self) {
        if self.ahead() > AHEAD_MAX / 2 || self.next < self.full_until {
            return;
        }
        let wanted = wanted(self.missing.count());
        // Who needs it is told.
        if self.ahead() < wanted && self.place(wanted).is_err() {
            self.full_until = self.next + TRIED_EVERY;
        }
    }

    fn ahead(&self) -> u64 {
        self.placed.saturating_sub(self.next)
    }

    /// Whether it is not long before something present cannot be noted for want of room.
    pub(super) fn is_short(&self) -> bool {
        self.ahead() < AHEAD_LEAST
    }

    /// Gives so many entries ahead a place on the file system, with zeroes: no entries.
    fn place(&mut self, ahead: u64) -> io::Result<()> {
        let from = self.placed.max(self.next);
        let until = self.next + ahead;
        if from < until {
            let at = self.place_of(from);
            if let Err(error) = self.file.write_at(at, &vec![0; ((until - from) * ENTRY_BYTES) as usize]) {
                // A part of them may have taken the last room there is, which others need more: this is for later.
                let _ = self.file.set_len(ByteCount(at.0));
                return Err(error);
            }
            self.placed = until;
        }
        Ok(())
    }

    fn place_of(&self, number: u64) -> ByteOffset {
        ByteOffset(self.journal_at + (number - 1) * ENTRY_BYTES)
    }

    /// Writes entries behind the last; the number of the first. Those that are not all written leave no part of
    /// themselves, and their place to the next.
    pub(super) fn append(&mut self, entries: &[Entry]) -> io::Result<u64> {
        let first = self.next;
        let mut bytes = Vec::with_capacity(entries.len() * ENTRY_BYTES as usize);
        for (number, entry) in (first..).zip(entries) {
            bytes.extend_from_slice(&journal::encode(self.id, number, *entry));
        }
        let at = self.place_of(first);
        if let Err(error) = self.file.write_at(at, &bytes) {
            // A part of it may be there, which whoever opens the file would take for damage. What cannot be taken back
            // either is the next append's to write over.
            let _ = self.file.write_at(at, &vec![0; bytes.len()]);
            return Err(error);
        }
        self.next += entries.len() as u64;
        Ok(first)
    }

    /// Has no entry say any more that what is pending is present, as far as they can be written over: that takes no room.
    pub(super) fn take_back(&mut self) {
        let entries = std::mem::take(&mut self.pending);
        for (number, run) in entries {
            // It makes nothing durable, and the entries around it stay where they are.
            let nothing = journal::encode(self.id, number, Entry::Durable(0));
            match self.file.write_at(self.place_of(number), &nothing) {
                Ok(()) => drop(self.missing.insert(run)),
                Err(_) => self.pending.push((number, run)),
            }
        }
    }

    pub(super) fn missing_with(&self, others: &[BlockRange]) -> DirtyBitmap {
        let mut missing = self.missing.clone();
        for run in others {
            missing.insert(*run);
        }
        missing
    }

    /// Whether it is to be begun anew at a flush, for which it is not needed.
    pub(super) fn is_due(&self) -> bool {
        self.next > self.long || self.distrusted
    }

    /// There was no room for that.
    pub(super) fn put_off(&mut self) {
        self.long = self.long.max(self.next + TRIED_EVERY);
    }

    pub(super) fn is_sound(&self) -> io::Result<()> {
        match (&self.failed, &self.unsaid) {
            (None, _) => Ok(()),
            (Some(why), None) => Err(io::Error::other(why.clone())),
            (Some(why), Some(unsaid)) => {
                Err(io::Error::other(format!("{why}; and that could not be noted: {unsaid}")))
            }
        }
    }
}
