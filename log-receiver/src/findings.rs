//! Damage that was found in logs that are in use: by a scrub, or by a read of a mounted point.
//!
//! A log tells nothing of a payload that has rotten in it before somebody reads it. What was found is kept in
//! `findings.json`, so that every later answer about the disk says it, also after the receiver was started again; a complete
//! scrub of the disk says anew what there is, and what it has mended is no finding any more. Bounded: of each disk so many
//! places are kept. A file that is damaged, or cannot be written, costs what it would tell until the next scrub; one of a newer
//! version stays as it is.
//!
//! Whoever reads a log asks for its disk's findings before it begins ([`Findings::of_life`]). When the disk is forgotten
//! meanwhile nothing is noted any more: files that went with it are no damage of one that has its identity afterwards.
//! Whoever asks what is known never waits for the file: it is written outside of the lock of what it says.

use std::{
    collections::BTreeMap,
    path::Path,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
};

use backtide_recovery::damaged_place;
use backtide_storage::Storage;
use backtide_units::{ByteCount, DiskId};

use crate::sealed_json::{SealedError, SealedJson};

/// Its name.
const FILE: &str = "findings.json";
const KIND: SealedJson =
    SealedJson { magic: "backtide-findings", version: 1, bytes_max: ByteCount(256 << 20) };

/// So many places of a disk are kept.
const PLACES_MAX: usize = 100;

/// What was found, by disk: sentences with file and place. Clones share it.
#[derive(Clone)]
pub(crate) struct Findings(Arc<Shared>);

struct Shared {
    storage: Arc<dyn Storage>,
    known: Mutex<Known>,
    /// Held while the file is written, and taken before the lock of what is known, so that the newest is written last. Whether
    /// it is of a newer version, and stays.
    file: Mutex<bool>,
}

/// Sentences by disk, the oldest first.
type Places = BTreeMap<DiskId, Vec<String>>;

#[derive(Default)]
struct Known {
    places: Places,
    /// Disks that were forgotten since the receiver started.
    forgets: u64,
    /// Which of them each was, the last time.
    forgotten: BTreeMap<DiskId, u64>,
}

/// What is found of a disk from now on, until it is forgotten. Clones are the same.
#[derive(Clone)]
pub(crate) struct DiskFindings {
    all: Findings,
    disk: DiskId,
    /// How many disks had been forgotten.
    since: u64,
}

impl Findings {
    /// What is noted in a store.
    pub(crate) fn open(storage: Arc<dyn Storage>) -> Self {
        let read = KIND.read::<Places>(&*storage, Path::new(FILE));
        let stays = matches!(read, Err(SealedError::Version { .. }));
        let places = read.unwrap_or_else(|error| {
            let why = error.to_string();
            tracing::error!(why, "what was found damaged is not known any more: a scrub finds it again");
            None
        });
        let known = Known { places: places.unwrap_or_default(), ..Known::default() };
        Self(Arc::new(Shared { storage, known: Mutex::new(known), file: Mutex::new(stays) }))
    }

    /// What is known of a disk, the oldest first.
    pub(crate) fn of(&self, disk: DiskId) -> Vec<String> {
        self.lock().places.get(&disk).cloned().unwrap_or_default()
    }

    /// Where whoever reads the disk as it is from now on notes what is damaged.
    pub(crate) fn of_life(&self, disk: DiskId) -> DiskFindings {
        DiskFindings { all: self.clone(), disk, since: self.lock().forgets }
    }

    /// Forgets everything of a disk that is gone; blocks.
    pub(crate) fn forget_all(&self, disk: DiskId) {
        let had = {
            let mut known = self.lock();
            known.forgets += 1;
            let number = known.forgets;
            known.forgotten.insert(disk, number);
            known.places.remove(&disk).is_some()
        };
        if had {
            self.write();
        }
    }

    /// Forgets places of a disk that are whole again; blocks.
    pub(crate) fn forget(&self, disk: DiskId, places: &[String]) {
        let changed = self.lock().forget(disk, places);
        if changed {
            self.write();
        }
    }

    fn write(&self) {
        let stays = self.0.file.lock().unwrap_or_else(PoisonError::into_inner);
        if *stays {
            return;
        }
        let places = self.lock().places.clone();
        if let Err(error) = KIND.write(&*self.0.storage, Path::new(FILE), &places) {
            tracing::warn!(%error, "cannot note what was found damaged: the next start does not know it");
        }
    }

    /// Nothing that could panic runs under the lock.
    fn lock(&self) -> MutexGuard<'_, Known> {
        self.0.known.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl DiskFindings {
    /// Notes a damaged place that a read met, once; blocks.
    pub(crate) fn note(&self, why: &str) {
        self.add(why, false);
    }

    /// Notes a damaged place that a scrub found, with what that says of it now; blocks.
    pub(crate) fn note_anew(&self, why: &str) {
        self.add(why, true);
    }

    /// What is known of the disk, the oldest first.
    pub(crate) fn known(&self) -> Vec<String> {
        self.all.of(self.disk)
    }

    /// Forgets places, after all of the disk was read again; blocks.
    pub(crate) fn forget(&self, places: &[String]) {
        if self.is_current() {
            self.all.forget(self.disk, places);
        }
    }

    /// Whether the disk was not forgotten meanwhile.
    pub(crate) fn is_current(&self) -> bool {
        self.all.lock().has(self)
    }

    fn add(&self, why: &str, anew: bool) {
        let changed = {
            let mut known = self.all.lock();
            known.has(self) && known.add(self.disk, why, anew)
        };
        if changed {
            self.all.write();
        }
    }
}

impl Known {
    /// Whether that disk is still the one whose findings these are.
    fn has(&self, findings: &DiskFindings) -> bool {
        self.forgotten.get(&findings.disk).is_none_or(|forgotten| *forgotten <= findings.since)
    }

    /// Adds a place that is not known, or with `anew` says of one that is what is so now; whether that changed anything.
    fn add(&mut self, disk: DiskId, why: &str, anew: bool) -> bool {
        let places = self.places.entry(disk).or_default();
        let of_it = places.iter().position(|place| damaged_place(place) == damaged_place(why));
        let changes = match of_it {
            Some(at) => anew && places[at] != why,
            None => places.len() < PLACES_MAX,
        };
        match of_it {
            Some(at) if changes => places[at] = why.to_owned(),
            None if changes => places.push(why.to_owned()),
            Some(_) | None => {}
        }
        changes
    }

    fn forget(&mut self, disk: DiskId, gone: &[String]) -> bool {
        let Some(places) = self.places.get_mut(&disk) else { return false };
        let before = places.len();
        places.retain(|place| !gone.iter().any(|gone| damaged_place(gone) == damaged_place(place)));
        let changed = places.len() < before;
        if places.is_empty() {
            self.places.remove(&disk);
        }
        changed
    }
}

/// What is wrong with the file of a store that nobody uses.
pub(crate) fn damage_of(storage: &dyn Storage) -> Option<String> {
    KIND.read::<Places>(storage, Path::new(FILE)).err().map(|error| error.to_string())
}

#[cfg(test)]
mod tests {
    use backtide_storage::MemoryStorage;
    use backtide_units::ByteOffset;

    use super::*;

    fn open(storage: &MemoryStorage) -> Findings {
        Findings::open(Arc::new(storage.clone()))
    }

    #[test]
    fn a_place_is_kept_once_until_it_is_forgotten_and_their_number_is_bounded() {
        let (storage, disk) = (MemoryStorage::new(), DiskId::random());
        let findings = open(&storage);
        let of_disk = findings.of_life(disk);
        of_disk.note("a");
        let before = of_disk.known();
        of_disk.note("b");
        of_disk.note("a");
        assert_eq!(of_disk.known(), ["a", "b"]);
        storage.crash(1);
        let findings = open(&storage);
        assert_eq!(findings.of(disk), ["a", "b"], "after a power cut too");
        findings.of_life(disk).forget(&before);
        assert_eq!(findings.of(disk), ["b"], "what was found since stays");
        storage.crash(2);
        let findings = open(&storage);
        assert_eq!(findings.of(disk), ["b"]);
        assert!(findings.of(DiskId::random()).is_empty());
        for number in 0..2 * PLACES_MAX {
            findings.of_life(disk).note(&number.to_string());
        }
        assert_eq!(findings.of(disk).len(), PLACES_MAX);
    }

    #[test]
    fn why_a_place_could_not_be_mended_is_what_the_last_scrub_says_and_goes_with_the_place() {
        let (storage, disk) = (MemoryStorage::new(), DiskId::random());
        let findings = open(&storage).of_life(disk);
        let (full, slow) = ("a: cannot be mended: no space left", "a: cannot be mended: it was called off");
        findings.note_anew(full);
        findings.note("a");
        assert_eq!(findings.known(), [full], "a read says no more of it");
        findings.note_anew(slow);
        assert_eq!(findings.known(), [slow]);
        findings.note_anew("a");
        assert_eq!(findings.known(), ["a"]);
        findings.note_anew(full);
        // The scrub of another disk has put it back.
        findings.all.forget(disk, &["a".to_owned()]);
        assert!(findings.known().is_empty() && open(&storage).of(disk).is_empty());
    }

    #[test]
    fn what_is_found_of_a_disk_that_was_forgotten_is_not_noted_of_one_that_comes_after_it() {
        let (storage, disk, other) = (MemoryStorage::new(), DiskId::random(), DiskId::random());
        let findings = open(&storage);
        let (before, beside) = (findings.of_life(disk), findings.of_life(other));
        before.note("a");
        findings.forget_all(disk);
        before.note("its file is missing");
        before.note_anew("all its files are");
        assert!(!before.is_current() && findings.of(disk).is_empty());
        let after = findings.of_life(disk);
        after.note("b");
        before.forget(&["b".to_owned()]);
        beside.note("c");
        assert!(after.is_current() && beside.is_current());
        let findings = open(&storage);
        assert_eq!((findings.of(disk), findings.of(other)), (vec!["b".to_owned()], vec!["c".to_owned()]));
    }

    #[test]
    fn a_damaged_file_is_told_and_replaced_by_what_is_found_next() {
        let (storage, disk) = (MemoryStorage::new(), DiskId::random());
        open(&storage).of_life(disk).note("a");
        assert_eq!(damage_of(&storage), None);
        storage.flip_bit(Path::new(FILE), ByteOffset(60), 1);
        assert!(damage_of(&storage).unwrap().contains("findings.json is damaged"));
        let findings = open(&storage);
        assert!(findings.of(disk).is_empty());
        findings.of_life(disk).note("b");
        assert_eq!(open(&storage).of(disk), ["b"]);
    }

    #[test]
    fn a_file_of_a_newer_version_stays_as_it_is() {
        let (storage, disk) = (MemoryStorage::new(), DiskId::random());
        SealedJson { version: 2, ..KIND }.write(&storage, Path::new(FILE), &["more"]).unwrap();
        let before = storage.files();
        let findings = open(&storage).of_life(disk);
        findings.note("a");
        assert_eq!(findings.known(), ["a"]);
        assert!(storage.files() == before);
        assert!(damage_of(&storage).unwrap().contains("has version 2"));
    }
}
