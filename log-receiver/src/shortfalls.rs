//! What of a disk had been acknowledged as durable, and was not in the store any more when its agent came back: noted beside the
//! disk's logs, in `shortfalls.json` (`FORMAT.md` beside this crate), and told for a week by the receiver's own clock.
//!
//! Only the agent knows how much was acknowledged of a store that was put back to an older copy. It says so with the reason of the
//! pass that follows, and the hole of this pass says it too; but a ladder removes that, and there is none where marks are gone and
//! no point. Of a log that has lost its end it is noted too, for that is told as damage only until everything was compared.
//!
//! A note says whether the disk's agent is still bringing everything anew, for a log that is out of use does not: that is told as open,
//! and nobody can dismiss it.
//!
//! The note is written before the sync that makes the begin of the pass durable, and again before that of its end. Where a crash
//! comes between, there is a note of a pass that is not in the log, and it is true: the agent had found so. Where the receiver ends
//! in the moment before that, neither is there, and only the agent's own log tells. One that cannot be written is tried again
//! with each sync, and told as long as the receiver runs: the disk is served all the same. A file that is damaged costs
//! what it told, and is removed; one that cannot be read, or is of a newer version, costs that for as long as it is so.

use std::{
    io,
    path::{Path, PathBuf},
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::Duration,
};

use backtide_recovery::{Hole, TimedLsn, time_text};
use backtide_segment::Entry;
use backtide_storage::Storage;
use backtide_units::{ByteCount, CaptureTime, DiskId, Lsn, Reason};
use serde::{Deserialize, Serialize};

use crate::{
    Shelf,
    disk::{Disk, DiskError},
    sealed_json::{SealedError, SealedJson},
};

/// Its name.
pub(crate) const FILE: &str = "shortfalls.json";
const KIND: SealedJson =
    SealedJson { magic: "backtide-shortfalls", version: 1, bytes_max: ByteCount(64 * 1024) };

/// So long one is told.
const TOLD_FOR: Duration = Duration::from_secs(7 * 24 * 60 * 60);

/// So many of a disk are kept, the newest.
const KEPT_MAX: usize = 4;

/// What was not there any more.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct Shortfall {
    /// [`Reason::ReceiverRolledBack`] or [`Reason::Damaged`].
    reason: Reason,
    /// The last point that was left; none when there was none.
    from: Option<Place>,
    /// When it was found, or everything had been brought anew, by the receiver's clock.
    at: CaptureTime,
    /// Its agent has not brought everything anew yet. Not in the file where it has: programs that do not know of it read that.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    is_open: bool,
}

/// A point in the file.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct Place {
    lsn: Lsn,
    time: CaptureTime,
}

/// What the file says, the oldest first.
type Notes = Vec<Shortfall>;

/// Those of one disk. Clones share them.
#[derive(Clone)]
pub(crate) struct Shortfalls(Arc<Shared>);

struct Shared {
    storage: Arc<dyn Storage>,
    /// The directory of the disk.
    dir: PathBuf,
    known: Mutex<Known>,
    /// Held while the file is written, and taken before the lock of what is known, so that the newest is written last.
    file: Mutex<()>,
}

struct Known {
    notes: Notes,
    /// The file says something else.
    changed: bool,
    /// It is of a newer version.
    stays: bool,
    /// That it cannot be written was said.
    warned: bool,
}

impl Shortfall {
    /// What the hole of an open pass tells, if it tells of any.
    fn of(hole: &Hole, before: Option<TimedLsn>, at: CaptureTime) -> Option<Self> {
        let reason = Reason::from_code(hole.reason.code);
        let reason =
            reason.filter(|reason| matches!(reason, Reason::ReceiverRolledBack | Reason::Damaged))?;
        let from = hole.from.or(before).map(|TimedLsn { lsn, time }| Place { lsn, time });
        Some(Self { reason, from, at, is_open: true })
    }

    /// Whether any point was left.
    pub(crate) fn has_left_some(&self) -> bool {
        self.from.is_some()
    }

    fn is_of(&self, other: &Self) -> bool {
        (self.reason, self.from) == (other.reason, other.from)
    }

    /// It in words.
    fn told(&self) -> String {
        let what = match (self.reason, self.from) {
            (Reason::Damaged, _) => {
                "the end of its log was lost after it had been acknowledged as durable".to_owned()
            }
            (_, Some(_)) => "the store had less of it than had been acknowledged as durable, as one has that was put back to an \
                             older copy"
                .to_owned(),
            (_, None) => {
                "its agent knows of a history of it that is not in this store: this is another store than it had, or one that has \
                 lost it"
                    .to_owned()
            }
        };
        let gone = self.from.map_or_else(String::new, |Place { lsn, time }| {
            format!(": points and marks after lsn:{lsn} ({}) that it had are gone", time_text(time))
        });
        let since = match self.is_open {
            true => "its agent has not brought everything anew yet".to_owned(),
            false => {
                let until = CaptureTime(self.at.0.saturating_add(TOLD_FOR.as_micros() as u64));
                format!(
                    "its agent has brought everything anew since; this is told until {}, or `backtide receiver dismiss` ends it",
                    time_text(until)
                )
            }
        };
        format!("{what}{gone}; {since}")
    }
}

impl Shortfalls {
    fn open(storage: Arc<dyn Storage>, dir: PathBuf) -> Self {
        let read = KIND.read::<Notes>(&*storage, &dir.join(FILE));
        let changed = matches!(read, Err(SealedError::Damaged { .. }));
        let stays = matches!(read, Err(SealedError::Version { .. }));
        let notes = read.unwrap_or_else(|error| {
            tracing::error!(
                why = error.to_string(),
                "what the store had less of than acknowledged is not known any more"
            );
            None
        });
        let notes = notes.unwrap_or_default();
        let known = Mutex::new(Known { notes, changed, stays, warned: false });
        Self(Arc::new(Shared { storage, dir, known, file: Mutex::default() }))
    }

    /// Notes one, in memory until [`Shortfalls::write`].
    fn note(&self, found: Shortfall) {
        let mut known = self.lock();
        known.notes.retain(|note| !note.is_of(&found));
        known.notes.push(found);
        let too_many = known.notes.len().saturating_sub(KEPT_MAX);
        known.notes.drain(..too_many);
        known.changed = true;
    }

    /// Notes that the disk's agent has brought everything anew: all that was found is past, whether or not its pass got into the log.
    fn end(&self) {
        let mut known = self.lock();
        known.changed |= known.notes.iter().any(|note| note.is_open);
        known.notes.iter_mut().for_each(|note| note.is_open = false);
    }

    /// Those that are told at `now`. The others are forgotten.
    fn told(&self, now: CaptureTime) -> Notes {
        let mut known = self.lock();
        let before = known.notes.len();
        known.notes.retain(|note| now.0.saturating_sub(note.at.0) <= TOLD_FOR.as_micros() as u64);
        known.changed |= known.notes.len() < before;
        let ahead = known.notes.iter().any(|note| note.at > now);
        known.changed |= ahead;
        for note in &mut known.notes {
            // The receiver's clock was ahead then: nobody knows for how long it is told already.
            note.at = note.at.min(now);
        }
        known.notes.clone()
    }

    /// Whether the file does not say what is known.
    pub(crate) fn wants_writing(&self) -> bool {
        let known = self.lock();
        known.changed && !known.stays
    }

    /// Makes the file say what is known, durably, if it does not; blocks.
    pub(crate) fn write(&self) {
        let _alone = self.0.file.lock().unwrap_or_else(PoisonError::into_inner);
        if !self.wants_writing() {
            return;
        }
        let notes = {
            let mut known = self.lock();
            known.changed = false;
            known.notes.clone()
        };
        let Err(error) = self.put(&notes) else { return };
        let mut known = self.lock();
        known.changed = true;
        if !std::mem::replace(&mut known.warned, true) {
            let path = self.0.storage.display(&self.0.dir.join(FILE));
            tracing::warn!(path = %path.display(), %error, "cannot note what the store had less of than acknowledged: the next start does not know it");
        }
    }

    /// Makes the file say this, durably.
    fn put(&self, notes: &[Shortfall]) -> io::Result<()> {
        let (storage, path) = (&*self.0.storage, self.0.dir.join(FILE));
        if notes.is_empty() {
            remove(storage, &path, &self.0.dir)
        } else {
            KIND.write(storage, &path, &notes)
        }
    }

    /// Forgets durably what is told at `now` of the past; blocks. What is not past, or was found since, is told nevertheless.
    ///
    /// # Errors
    /// When the file cannot be written or removed: all is told as before.
    pub(crate) fn dismiss(&self, now: CaptureTime) -> io::Result<Vec<String>> {
        let _alone = self.0.file.lock().unwrap_or_else(PoisonError::into_inner);
        let (stay, told): (Notes, Notes) = self.told(now).into_iter().partition(|note| note.is_open);
        if told.is_empty() {
            return Ok(Vec::new());
        }
        if self.lock().stays {
            let why = format!("{FILE} is of a newer version of Backtide, which alone can change it");
            return Err(io::Error::new(io::ErrorKind::Unsupported, why));
        }
        let written = self.put(&stay);
        let mut known = self.lock();
        if let Err(error) = written {
            // It may be written nevertheless.
            known.changed = true;
            return Err(error);
        }
        known.notes.retain(|note| !told.contains(note));
        known.changed = known.notes != stay;
        Ok(told.iter().map(Shortfall::told).collect())
    }

    /// Nothing that could panic runs under the lock.
    fn lock(&self) -> MutexGuard<'_, Known> {
        self.0.known.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Shelf {
    /// Those of a disk.
    pub(crate) fn shortfalls(&self, disk: DiskId) -> Shortfalls {
        Shortfalls::open(Arc::clone(&self.storage), Self::dir(disk, 1))
    }
}

impl Disk {
    /// Appends what a pass says at `now`, and takes note of what its agent misses.
    pub(crate) fn append_of_pass(&mut self, entry: Entry, now: CaptureTime) -> Result<(), DiskError> {
        let begins = matches!(entry, Entry::PassBegin { .. });
        let ends = matches!(entry, Entry::PassEnd { valid_from: Some(_), .. });
        let before = if ends { self.open_shortfall(now) } else { None };
        self.append(entry, ByteCount::ZERO)?;
        if ends {
            self.shortfalls().end();
        }
        let past = before.map(|found| Shortfall { is_open: false, ..found });
        let found = if begins { self.open_shortfall(now) } else { past };
        // A store that never had any of it may have lost nothing.
        if let Some(found) = found.filter(|found| found.has_left_some() || found.reason == Reason::Damaged) {
            self.shortfalls().note(found);
        }
        Ok(())
    }

    /// What the agent misses that has not brought everything anew yet. What was lost with a log that was damaged is told with that.
    fn open_shortfall(&self, now: CaptureTime) -> Option<Shortfall> {
        let hole = self.timeline()?.holes().last().filter(|hole| hole.to.is_none())?;
        let before = self.past().snapshot.as_ref().and_then(|past| past.timeline().latest());
        let found = Shortfall::of(hole, before, now)?;
        let is_told = found.reason == Reason::ReceiverRolledBack
            && hole.from.is_none()
            && !self.past().logs().is_empty();
        // Of a log in doubt nothing is missing, as far as its agent has said.
        let is_doubt = found.reason == Reason::Damaged && self.loss().is_some_and(|loss| loss.in_doubt);
        (!is_told && !is_doubt).then_some(found)
    }

    /// What a person should know at `now` of what the store had less of: sentences, each with whether any point was left.
    pub(crate) fn lacked(&self, now: CaptureTime) -> Vec<(bool, String)> {
        let open = self.open_shortfall(now);
        let mut all = self.shortfalls().told(now);
        all.retain(|note| open.is_none_or(|open| !open.is_of(note)));
        // A lost end is damage until everything was compared.
        let is_lost = self.loss().is_some_and(|loss| !loss.in_doubt);
        let told = all.iter().chain(&open).filter(|found| !(is_lost && found.reason == Reason::Damaged));
        told.map(|found| (found.has_left_some(), found.told())).collect()
    }
}

/// How the file beside a log is damaged, a sentence.
pub(crate) fn damage_of(storage: &dyn Storage, dir: &Path) -> Option<String> {
    KIND.read::<Notes>(storage, &dir.join(FILE)).err().map(|error| error.to_string())
}

/// Removes a damaged one, which no start does where no agent comes, durably; gives how it was damaged.
///
/// # Errors
/// The file system's.
pub(crate) fn remove_damaged(storage: &dyn Storage, dir: &Path) -> io::Result<Option<String>> {
    let damage = KIND.damage_of::<Notes>(storage, &dir.join(FILE));
    if damage.is_some() {
        remove(storage, &dir.join(FILE), dir)?;
    }
    Ok(damage)
}

fn remove(storage: &dyn Storage, path: &Path, dir: &Path) -> io::Result<()> {
    match storage.remove(path) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => Err(error),
        Ok(()) | Err(_) => storage.sync_dir(dir),
    }
}

/// A file for tests that read whatever there may be.
#[cfg(test)]
pub(crate) fn sample(storage: &dyn Storage, dir: &Path) {
    let from = Some(Place { lsn: Lsn(5), time: CaptureTime(6) });
    let note = |reason, from, is_open| Shortfall { reason, from, at: CaptureTime(7), is_open };
    let notes: Notes = vec![note(Reason::ReceiverRolledBack, from, true), note(Reason::Damaged, None, false)];
    KIND.write(storage, &dir.join(FILE), &notes).unwrap();
}

/// Takes whatever a file says as a receiver does.
#[cfg(test)]
pub(crate) fn take(storage: Arc<dyn Storage>, dir: &Path) {
    let shortfalls = Shortfalls::open(storage, dir.to_owned());
    let told = shortfalls.told(CaptureTime(8));
    let _: Vec<_> = told.iter().map(Shortfall::told).collect();
    told.into_iter().for_each(|found| shortfalls.note(found));
    shortfalls.write();
}

#[cfg(test)]
mod tests;
