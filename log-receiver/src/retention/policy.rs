//! What people want kept, durable in the store: `retention.json`, written whole, which `FORMAT.md` beside this crate describes.
//!
//! A file that cannot be understood says nothing of what may go: then nothing goes, and it stays as it is, for it may hold
//! what others want kept. So it is with one that was there once, as `store.json` tells, and is not any more. Changes are refused
//! until somebody restores it, or has it made anew.

use std::{
    collections::BTreeMap,
    io,
    path::Path,
    sync::{
        Arc, Mutex, MutexGuard, PoisonError,
        atomic::{AtomicBool, Ordering},
    },
};

use backtide_recovery::Doubt;
use backtide_storage::{Storage, replace_file};
use backtide_units::{ByteCount, CaptureTime, DiskId, Lsn};
use serde::{Deserialize, Serialize};

use super::{
    Ladder,
    doubts::Doubts,
    ladder::{LadderError, Span},
    locks::{LOCKS_MAX, Lock, LockClock, LockedPoint, Locks, Moment},
};
use crate::{sealed_json::SealedJson, store_file};

/// Its name.
pub(crate) const FILE: &str = "retention.json";
const KIND: SealedJson =
    SealedJson { magic: "backtide-retention", version: 1, bytes_max: ByteCount(64 << 20) };

/// Pins and holds of one disk.
const PINS_MAX: usize = 4096;

/// A point that stays until somebody releases it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct Pin {
    pub(crate) lsn: Lsn,
    pub(crate) time: CaptureTime,
}

/// What is wanted of one disk.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(crate) struct Policy {
    /// None: the receiver's default.
    pub(crate) ladder: Option<Ladder>,
    pub(crate) pins: BTreeMap<Lsn, CaptureTime>,
    pub(crate) locks: Locks,
    /// Points that agents need until they say that they do not, by who needs them.
    pub(crate) holds: BTreeMap<String, Pin>,
    /// From when on every change was left when older history went for want of room, the last time.
    pub(crate) shrunk: Option<CaptureTime>,
    /// The newest single point that went for want of room.
    pub(crate) dropped: Option<CaptureTime>,
}

impl Policy {
    /// The points that stay whatever the ladder says: pinned, held, or locked.
    pub(crate) fn staying(&self, now: Moment) -> BTreeMap<Lsn, CaptureTime> {
        let locked = self.locks.points.iter().filter(|(_, locked)| locked.lock.holds(now));
        let mut staying = self.pins.clone();
        staying.extend(self.holds.values().map(|held| (held.lsn, held.time)));
        staying.extend(locked.map(|(lsn, locked)| (*lsn, locked.time)));
        staying
    }

    /// The lock of all points, while it holds.
    pub(crate) fn all_locked(&self, now: Moment) -> Option<Lock> {
        self.locks.all.filter(|lock| lock.holds(now))
    }
}

/// A lock of a point.
#[derive(Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct PointLockFile {
    lsn: Lsn,
    time: CaptureTime,
    lock: Lock,
}

#[derive(Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct DiskFile {
    #[serde(default, skip_serializing_if = "Option::is_none")]
    ladder: Option<String>,
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    keep: Vec<Pin>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    all_locked: Option<Lock>,
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    locked: Vec<PointLockFile>,
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    held: BTreeMap<String, Pin>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    shrunk: Option<CaptureTime>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    dropped: Option<CaptureTime>,
}

impl DiskFile {
    fn of(policy: &Policy) -> Self {
        let keep = policy.pins.iter().map(|(lsn, time)| Pin { lsn: *lsn, time: *time }).collect();
        let locked = |(lsn, locked): (&Lsn, &LockedPoint)| PointLockFile {
            lsn: *lsn,
            time: locked.time,
            lock: locked.lock,
        };
        Self {
            ladder: policy.ladder.as_ref().map(ToString::to_string),
            keep,
            all_locked: policy.locks.all,
            locked: policy.locks.points.iter().map(locked).collect(),
            held: policy.holds.clone(),
            shrunk: policy.shrunk,
            dropped: policy.dropped,
        }
    }

    fn policy(self) -> Result<Policy, LadderError> {
        let ladder = self.ladder.map(|ladder| ladder.parse()).transpose()?;
        let locked = self.locked.into_iter();
        let points =
            locked.map(|file| (file.lsn, LockedPoint { time: file.time, lock: file.lock })).collect();
        let pins = self.keep.into_iter().map(|pin| (pin.lsn, pin.time)).collect();
        let locks = Locks { all: self.all_locked, points };
        Ok(Policy { ladder, pins, locks, holds: self.held, shrunk: self.shrunk, dropped: self.dropped })
    }
}

#[derive(Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct PolicyFile {
    /// How long receivers have had the store open, in microseconds, as long as there are locks.
    #[serde(default)]
    open_us: u64,
    disks: BTreeMap<DiskId, DiskFile>,
}

/// The policies of a store. Clones share them.
#[derive(Clone)]
pub(crate) struct Policies {
    storage: Arc<dyn Storage>,
    default: Ladder,
    clock: LockClock,
    /// Held by whoever changes something, for as long as the device takes.
    state: Arc<Mutex<State>>,
    /// What the last of them left, for whoever asks meanwhile.
    seen: Arc<Mutex<Arc<Disks>>>,
    /// How long receivers had had the store open when this one opened it.
    open_before: Span,
    /// Why nobody knows what is wanted.
    damage: Option<Arc<str>>,
    /// This receiver has noted in `store.json` that there is a file.
    is_noted: Arc<AtomicBool>,
}

type Disks = BTreeMap<DiskId, Policy>;

/// Why what is wanted was not changed: a sentence.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub(crate) enum NotChanged {
    /// It would promise what a log may begin without.
    #[error("{0}")]
    InDoubt(String),
    /// The store has no room for it.
    #[error("{0}")]
    Full(String),
    /// The store cannot keep it, or what it keeps is not known.
    #[error("{0}")]
    Failed(String),
}

impl NotChanged {
    fn unwritten(kind: io::ErrorKind, why: String) -> Self {
        let is_full = matches!(kind, io::ErrorKind::StorageFull | io::ErrorKind::QuotaExceeded);
        if is_full { Self::Full(why) } else { Self::Failed(why) }
    }
}

struct State {
    disks: Arc<Disks>,
    /// When the time that the store has been open was noted last.
    noted: Moment,
    doubts: Doubts,
}

impl Policies {
    /// Reads the file of a store; disks that it does not name have the default.
    pub(crate) fn open(storage: Arc<dyn Storage>, default: Ladder) -> Self {
        Self::open_with(storage, default, LockClock::default())
    }

    fn open_with(storage: Arc<dyn Storage>, default: Ladder, clock: LockClock) -> Self {
        let ((disks, open_before), damage) = match read(&*storage) {
            Ok(read) => {
                let read = read.inspect(|_| note_it(&*storage));
                (read.unwrap_or_default(), None)
            }
            Err(why) => {
                let why = format!("{why}; no history goes");
                tracing::error!(why);
                (Default::default(), Some(why))
            }
        };
        let noted = clock.moment(open_before);
        let disks = Arc::new(disks);
        let seen = Arc::new(Mutex::new(Arc::clone(&disks)));
        let state = Arc::new(Mutex::new(State { disks, noted, doubts: Doubts::default() }));
        let (damage, is_noted) = (damage.map(Arc::from), Arc::default());
        Self { storage, default, clock, state, seen, open_before, damage, is_noted }
    }

    /// The ladder of disks that have none of their own.
    pub(crate) fn default_ladder(&self) -> &Ladder {
        &self.default
    }

    /// Why nothing goes, whatever the ladders say.
    pub(crate) fn damage(&self) -> Option<String> {
        self.damage.as_deref().map(str::to_owned)
    }

    /// What is wanted of a disk.
    pub(crate) fn of(&self, disk: DiskId) -> Policy {
        self.seen().get(&disk).cloned().unwrap_or_default()
    }

    /// The ladder that counts for a disk.
    pub(crate) fn ladder(&self, disk: DiskId) -> Ladder {
        if self.damage.is_some() {
            return Ladder::default();
        }
        let own = self.seen().get(&disk).and_then(|policy| policy.ladder.clone());
        own.unwrap_or_else(|| self.default.clone())
    }

    /// Changes what is wanted of a disk, durably; blocks.
    ///
    /// # Errors
    /// Then nothing has changed that anybody goes by.
    pub(crate) fn change(&self, disk: DiskId, change: impl FnOnce(&mut Policy)) -> Result<(), NotChanged> {
        let mut state = self.lock();
        if let Some(why) = &self.damage {
            return Err(NotChanged::Failed(format!(
                "{why}, and no retention is changed, for that would forget what it says: stop the receiver and restore \
                 the file, or have every ladder, kept point and lock forgotten with `backtide fsck STORE \
                 --forget-retention`"
            )));
        }
        let mut disks = Disks::clone(&state.disks);
        let policy = disks.entry(disk).or_default();
        let before = policy.clone();
        change(policy);
        let now = self.moment();
        if state.doubts.is_about(disk) {
            check_in_doubt(|lsn| state.doubts.keep(disk, lsn), &before, policy, now)?;
        }
        if policy.pins.len() + policy.holds.len() > PINS_MAX {
            let why = format!("{PINS_MAX} points of a disk can be kept, and are: release some");
            return Err(NotChanged::Failed(why));
        }
        if policy.locks.points.len() > LOCKS_MAX {
            let why = format!("{LOCKS_MAX} points of a disk can be locked, and are: lock all points instead");
            return Err(NotChanged::Failed(why));
        }
        disks.values_mut().for_each(|policy| policy.locks.prune(now));
        disks.retain(|_, policy| *policy != Policy::default());
        self.write(&disks, now)?;
        state.noted = now;
        state.disks = Arc::new(disks);
        *self.seen.lock().unwrap_or_else(PoisonError::into_inner) = Arc::clone(&state.disks);
        Ok(())
    }

    fn write(&self, disks: &BTreeMap<DiskId, Policy>, now: Moment) -> Result<(), NotChanged> {
        let file = PolicyFile {
            open_us: now.open.0,
            disks: disks.iter().map(|(disk, policy)| (*disk, DiskFile::of(policy))).collect(),
        };
        let content = KIND.encode(&file);
        if ByteCount::of(&content) > KIND.bytes_max {
            return Err(NotChanged::Failed(format!(
                "{} would be larger than {}, and could not be read again: release points that are kept",
                self.storage.display(Path::new(FILE)).display(),
                KIND.bytes_max
            )));
        }
        let written = replace_file(&*self.storage, Path::new(FILE), &content);
        written.map_err(|error| {
            let why = format!("write {}: {error}", self.storage.display(Path::new(FILE)).display());
            NotChanged::unwritten(error.kind(), why)
        })?;
        // Only one that is there, so that a power cut between the two leaves none that seems lost.
        if !self.is_noted.swap(true, Ordering::Relaxed) {
            note_it(&*self.storage);
        }
        Ok(())
    }

    /// Both clocks of locks, now.
    pub(crate) fn moment(&self) -> Moment {
        self.clock.moment(self.open_before)
    }

    /// How many disks have every point locked.
    pub(crate) fn locked_disks(&self) -> usize {
        let now = self.moment();
        self.seen().values().filter(|policy| policy.all_locked(now).is_some()).count()
    }

    /// Notes durably how long the store has been open, as long as there are locks; blocks. What is not noted counts for
    /// nothing at the next start. Says when the machine's clock went ahead.
    ///
    /// # Errors
    /// A sentence.
    pub(crate) fn note_time(&self) -> Result<Option<String>, String> {
        let mut state = self.lock();
        let now = self.moment();
        if self.damage.is_some() || state.disks.values().all(|policy| policy.locks.is_empty()) {
            state.noted = now;
            return Ok(None);
        }
        let jump = LockClock::jump(state.noted, now);
        self.write(&state.disks, now).map_err(|error| error.to_string())?;
        state.noted = now;
        Ok(jump)
    }

    /// Locks a point, or all points, until a lock ends that has begun; blocks. It never becomes shorter.
    ///
    /// # Errors
    /// As [`Policies::change`].
    #[cfg(test)]
    pub(crate) fn add_lock(
        &self,
        disk: DiskId,
        point: Option<(Lsn, CaptureTime)>,
        lock: Lock,
    ) -> Result<(), NotChanged> {
        self.change(disk, |policy| policy.locks.add(point, lock))
    }

    /// Does something while what is wanted of a disk is still that, and stays that; none when it has changed. It may leave a
    /// doubt.
    pub(crate) fn while_wanted<R>(
        &self,
        disk: DiskId,
        policy: &Policy,
        act: impl FnOnce(&mut Doubts) -> R,
    ) -> Option<R> {
        self.while_allowed(disk, |wanted, _| wanted == policy, act)
    }

    /// Does something while what is wanted of a disk at this moment `allows` it, and stays that; none when it does not. It may
    /// leave a doubt.
    pub(crate) fn while_allowed<R>(
        &self,
        disk: DiskId,
        allows: impl FnOnce(&Policy, Moment) -> bool,
        act: impl FnOnce(&mut Doubts) -> R,
    ) -> Option<R> {
        let mut state = self.lock();
        let wanted = state.disks.get(&disk).cloned().unwrap_or_default();
        (self.damage.is_none() && allows(&wanted, self.moment())).then(|| act(&mut state.doubts))
    }

    /// The logs of which it is not known durably where they begin, by disk and number; blocks.
    pub(crate) fn in_doubt(&self) -> Vec<(DiskId, u32)> {
        self.lock().doubts.logs()
    }

    /// It is not known of a log.
    pub(crate) fn begin_doubt(&self, disk: DiskId, log: u32, doubt: Doubt) {
        self.lock().doubts.begin(disk, log, doubt);
    }

    /// It is known again.
    pub(crate) fn end_doubt(&self, disk: DiskId, log: u32) {
        self.lock().doubts.end(disk, log);
    }

    /// Why a point of a disk cannot be promised to anybody now, if that is so; blocks, until nothing is done that goes by what
    /// was wanted before: after it a log shows whether it did.
    pub(crate) fn doubt_of(&self, disk: DiskId, lsn: Lsn) -> Option<String> {
        (!self.lock().doubts.keep(disk, lsn)).then(|| in_doubt(&format!("lsn:{lsn}")))
    }

    /// Forgets what is wanted of a disk that goes, durably; blocks.
    ///
    /// # Errors
    /// As [`Policies::change`].
    pub(crate) fn forget(&self, disk: DiskId) -> Result<(), NotChanged> {
        self.lock().doubts.forget(disk);
        if self.of(disk) == Policy::default() {
            return Ok(());
        }
        self.change(disk, |policy| *policy = Policy::default())
    }

    /// What is wanted of all disks; never waits for a device.
    fn seen(&self) -> Arc<Disks> {
        Arc::clone(&self.seen.lock().unwrap_or_else(PoisonError::into_inner))
    }

    /// Nothing that could panic runs under the lock.
    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Refuses a change by which points would be kept that a log may begin without. A ladder is none: it says what of the history
/// that is there goes from now on, and the log in doubt gives up none before it is settled.
fn check_in_doubt(
    keep: impl Fn(Lsn) -> bool,
    before: &Policy,
    after: &Policy,
    now: Moment,
) -> Result<(), NotChanged> {
    let known = before.staying(now);
    let mut new = after.staying(now).into_keys().filter(|lsn| !known.contains_key(lsn));
    if let Some(lsn) = new.find(|lsn| !keep(*lsn)) {
        return Err(NotChanged::InDoubt(in_doubt(&format!("lsn:{lsn}"))));
    }
    if after.locks.all.is_some() && after.locks.all != before.locks.all {
        return Err(NotChanged::InDoubt(in_doubt("every point")));
    }
    Ok(())
}

fn in_doubt(what: &str) -> String {
    format!(
        "{what} cannot be promised to anybody now: the store has failed to write where the log of this disk begins, and each \
         round of retention tries that again (`backtide retention show` says why it fails)"
    )
}

/// What the file says; none when there was never one.
fn read(storage: &dyn Storage) -> Result<Option<(Disks, Span)>, String> {
    let file = KIND.read::<PolicyFile>(storage, Path::new(FILE)).map_err(|error| error.to_string())?;
    let name = || storage.display(Path::new(FILE)).display().to_string();
    let Some(file) = file else {
        return match store_file::has_had_retention(storage) {
            true => Err(format!("{} is missing, and {} tells that it was there", name(), store_file::FILE)),
            false => Ok(None),
        };
    };
    let policies = file.disks.into_iter().map(|(disk, file)| Ok((disk, file.policy()?)));
    let policies: Result<_, LadderError> = policies.collect();
    let damaged = |error| format!("{} is damaged: {error}", name());
    Ok(Some((policies.map_err(damaged)?, Span(file.open_us))))
}

/// Notes in `store.json` that there is a file.
fn note_it(storage: &dyn Storage) {
    if let Err(error) = store_file::note_retention(storage) {
        tracing::warn!(%error, "cannot note in store.json that there is a retention.json: the next start does");
    }
}

/// Makes a file anew in which nothing is wanted, durably.
///
/// # Errors
/// The file system's.
pub(crate) fn write_anew(storage: &dyn Storage) -> io::Result<()> {
    KIND.write(storage, Path::new(FILE), &PolicyFile { open_us: 0, disks: BTreeMap::new() })
}

/// What is wrong with the file of a store that nobody uses.
pub(crate) fn damage_of(storage: &dyn Storage) -> Option<String> {
    read(storage).err()
}

mod shortened;
#[cfg(test)]
mod tests;
