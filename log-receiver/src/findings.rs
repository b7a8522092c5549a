//! Damage that was found in logs that are in use: by a scrub, by a read of a mounted point, or when a log was opened.
//!
//! A log tells nothing of a payload that has rotten in it before somebody reads it. What was found is kept in
//! `findings.json`, which `FORMAT.md` beside this crate describes, so that every later answer about the disk says it, also after
//! the receiver was started again; a complete scrub of the disk says anew what there is, and what it has mended is no finding any
//! more. Bounded: of each disk so many places are kept. A file that is damaged costs what it would tell until the next scrub; one
//! that cannot be written is written when an agent comes; one of a newer version stays as it is.
//!
//! A store may be moved, or mounted elsewhere: so in the file names of the store's files begin at its root.
//!
//! Whoever reads a log asks for its disk's findings before it begins ([`Findings::of_life`]). When the disk is forgotten
//! meanwhile nothing is noted any more: files that went with it are no damage of one that has its identity afterwards.
//! Whoever asks what is known never waits for the file: it is written outside of the lock of what it says.

use std::{
    collections::BTreeMap,
    path::Path,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
};

use backtide_images::PACKS_DIR;
use backtide_receiver_api::Touched;
use backtide_recovery::{View, damaged_place};
use backtide_storage::Storage;
use backtide_units::{ByteCount, ByteRange, DiskId};
use serde::{Deserialize, Serialize};

use crate::{
    disks::DISKS,
    sealed_json::{SealedError, SealedJson},
    touched::{told, touched},
};

/// Its name.
pub(crate) const FILE: &str = "findings.json";
const KIND: SealedJson =
    SealedJson { magic: "backtide-findings", version: 1, bytes_max: ByteCount(256 << 20) };

/// So many places of a disk are kept.
const PLACES_MAX: usize = 100;

/// A damaged place.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(from = "Noted", into = "Noted")]
pub(crate) struct Finding {
    /// A sentence with file and place.
    pub(crate) damage: String,
    /// Which points it touches; none when nobody could tell.
    pub(crate) touched: Option<Touched>,
}

impl Finding {
    /// With its sentences as the file has them.
    fn within(mut self, root: &str) -> Self {
        self.change(|sentence| sentence.strip_prefix(root).map(str::to_owned));
        self
    }

    /// As [`Finding::within`] gave it, or an older program has noted it of a store that stood elsewhere, with names as they are.
    fn named(mut self, root: &str, disk: DiskId) -> Self {
        let beginnings = [format!("{DISKS}/{disk}/"), format!("{PACKS_DIR}/"), "images/bases/".to_owned()];
        let begins = |sentence: &str| beginnings.iter().any(|beginning| sentence.starts_with(beginning));
        self.change(|sentence| {
            if begins(sentence) {
                return Some(format!("{root}{sentence}"));
            }
            if !sentence.starts_with('/') || sentence.strip_prefix(root).is_some_and(begins) {
                return None;
            }
            let mut names = sentence.match_indices('/').map(|(at, _)| &sentence[at + 1..]);
            names.find(|name| begins(name)).map(|name| format!("{root}{name}"))
        });
        self
    }

    /// Changes each sentence that begins with the name of a file, as `to` says.
    fn change(&mut self, to: impl Fn(&str) -> Option<String>) {
        let places = self.touched.iter_mut().map(|touched| &mut touched.place);
        for sentence in places.chain([&mut self.damage]) {
            if let Some(changed) = to(sentence) {
                *sentence = changed;
            }
        }
    }
}

/// A place in the file: older programs know it as a sentence alone.
#[derive(Clone, Serialize, Deserialize)]
#[serde(untagged)]
enum Noted {
    Damage(String),
    Touching { damage: String, touched: Touched },
}

impl From<Noted> for Finding {
    fn from(noted: Noted) -> Self {
        match noted {
            Noted::Damage(damage) => Self { damage, touched: None },
            Noted::Touching { damage, touched } => Self { damage, touched: Some(touched) },
        }
    }
}

impl From<Finding> for Noted {
    fn from(Finding { damage, touched }: Finding) -> Self {
        match touched {
            Some(touched) => Self::Touching { damage, touched },
            None => Self::Damage(damage),
        }
    }
}

/// What was found, by disk: sentences with file and place. Clones share it.
#[derive(Clone)]
pub struct Findings(Arc<Shared>);

struct Shared {
    storage: Arc<dyn Storage>,
    /// How the names of its files begin in sentences.
    root: String,
    known: Mutex<Known>,
    /// Held while the file is written, and taken before the lock of what is known, so that the newest is written last. Whether
    /// it is of a newer version, and stays.
    file: Mutex<bool>,
}

/// Places by disk, the oldest first.
type Places = BTreeMap<DiskId, Vec<Finding>>;

fn each(places: Places) -> impl Iterator<Item = (DiskId, Finding)> {
    places.into_iter().flat_map(|(disk, all)| all.into_iter().map(move |finding| (disk, finding)))
}

#[derive(Default)]
struct Known {
    places: Places,
    /// Disks that were forgotten since the receiver started.
    forgets: u64,
    /// Which of them each was, the last time.
    forgotten: BTreeMap<DiskId, u64>,
    /// The file could not be written.
    unwritten: bool,
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
    pub fn open(storage: Arc<dyn Storage>) -> Self {
        let read = KIND.read::<Places>(&*storage, Path::new(FILE));
        let stays = matches!(read, Err(SealedError::Version { .. }));
        let places = read.unwrap_or_else(|error| {
            let why = error.to_string();
            tracing::error!(why, "what was found damaged is not known any more: a scrub finds it again");
            None
        });
        let root = storage.display(Path::new("")).display().to_string();
        let mut known = Known::default();
        for (disk, finding) in each(places.unwrap_or_default()) {
            // The same place may be noted by several names, from several roots.
            known.add(disk, finding.named(&root, disk), false);
        }
        Self(Arc::new(Shared { storage, root, known: Mutex::new(known), file: Mutex::new(stays) }))
    }

    /// What is known of a disk, the oldest first.
    pub(crate) fn of(&self, disk: DiskId) -> Vec<Finding> {
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

    /// Notes what could not be noted when it was found; blocks.
    pub(crate) fn write_what_failed(&self) {
        let failed = self.lock().unwritten;
        if failed {
            self.write();
        }
    }

    fn write(&self) {
        let stays = self.0.file.lock().unwrap_or_else(PoisonError::into_inner);
        if *stays {
            return;
        }
        let places = self.lock().places.clone();
        let root = &self.0.root;
        let within = |all: Vec<Finding>| all.into_iter().map(|finding| finding.within(root)).collect();
        let places: Places = places.into_iter().map(|(disk, all)| (disk, within(all))).collect();
        let written = KIND.write(&*self.0.storage, Path::new(FILE), &places);
        let before = std::mem::replace(&mut self.lock().unwritten, written.is_err());
        if let (Err(error), false) = (written, before) {
            tracing::warn!(%error, "cannot note what was found damaged: the next start does not know it");
        }
    }

    /// Nothing that could panic runs under the lock.
    fn lock(&self) -> MutexGuard<'_, Known> {
        self.0.known.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl DiskFindings {
    /// Notes a damaged place that a read met, once, with the points that it touches; blocks.
    pub(crate) fn note(&self, why: &str, touched: Option<Touched>) {
        self.add(Finding { damage: why.to_owned(), touched }, false);
    }

    /// Notes a damaged place that a read of a range met, with the points that it touches, unless both is known; gives what is
    /// known of it. Blocks.
    pub(crate) fn note_of_read(&self, why: &str, view: &View, range: ByteRange) -> String {
        let known = |all: Vec<Finding>| {
            let mut of_it = all.into_iter().filter(|finding| damaged_place(&finding.damage) == why);
            of_it.find_map(|finding| finding.touched)
        };
        let touched = known(self.all()).or_else(|| {
            let found = view.touched(range).get(why).map(|found| touched(why, found));
            self.note(why, found.clone());
            found
        });
        told(why, &touched)
    }

    /// Notes a damaged place that a scrub found, with what that says of it now; blocks.
    pub(crate) fn note_anew(&self, why: &str, touched: Option<Touched>) {
        self.add(Finding { damage: why.to_owned(), touched }, true);
    }

    /// Notes a damaged place that was met when the log was opened. One that the newest point needs is noted whatever else is: what
    /// is not known puts the log in doubt. Blocks.
    pub(crate) fn note_opening(&self, why: &str, touched: Option<Touched>) {
        let is_past = touched.as_ref().is_some_and(Touched::is_past);
        if !is_past && self.is_new(why) && self.is_current() {
            self.all.lock().make_room(self.disk);
        }
        self.note(why, touched);
    }

    /// Whether nothing is known of a damaged place.
    pub(crate) fn is_new(&self, why: &str) -> bool {
        self.all().iter().all(|known| damaged_place(&known.damage) != damaged_place(why))
    }

    /// What is known of the disk, the oldest first: a sentence each.
    pub(crate) fn known(&self) -> Vec<String> {
        self.all().into_iter().map(|finding| finding.damage).collect()
    }

    /// The same with the points that are touched.
    pub(crate) fn all(&self) -> Vec<Finding> {
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

    fn add(&self, found: Finding, anew: bool) {
        let changed = {
            let mut known = self.all.lock();
            known.has(self) && known.add(self.disk, found, anew)
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

    /// Adds a place that is not known, or with `anew` says of one that is what is so now; whether that changed anything. Which
    /// points it touches is taken whenever nobody knew.
    fn add(&mut self, disk: DiskId, found: Finding, anew: bool) -> bool {
        let places = self.places.entry(disk).or_default();
        let of_it =
            places.iter_mut().find(|place| damaged_place(&place.damage) == damaged_place(&found.damage));
        let Some(place) = of_it else {
            let room = places.len() < PLACES_MAX;
            if room {
                places.push(found);
            }
            return room;
        };
        let before = place.clone();
        if anew {
            place.damage = found.damage;
        }
        if place.touched.is_none() || (anew && found.touched.is_some()) {
            place.touched = found.touched;
        }
        *place != before
    }

    /// Forgets a place where no more can be kept: one of the past, or else the oldest. A scrub finds it again.
    fn make_room(&mut self, disk: DiskId) {
        let full = self.places.get_mut(&disk).filter(|places| places.len() >= PLACES_MAX);
        if let Some(places) = full {
            let is_past = |place: &Finding| place.touched.as_ref().is_some_and(Touched::is_past);
            places.remove(places.iter().position(is_past).unwrap_or(0));
        }
    }

    fn forget(&mut self, disk: DiskId, gone: &[String]) -> bool {
        let Some(places) = self.places.get_mut(&disk) else { return false };
        let before = places.len();
        places.retain(|place| !gone.iter().any(|gone| damaged_place(gone) == damaged_place(&place.damage)));
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

/// Whether it is damaged, and no other program's.
pub(crate) fn is_damaged(storage: &dyn Storage) -> bool {
    KIND.damage_of::<Places>(storage, Path::new(FILE)).is_some()
}

#[cfg(test)]
mod tests;
