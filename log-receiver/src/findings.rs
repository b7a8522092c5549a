//! Damage that was found in logs that are in use: by a scrub, or by a read of a mounted point.
//!
//! A log tells nothing of a payload that has rotten in it before somebody reads it. What was found is
//! kept as long as the receiver runs, so that every later answer about the disk says it; a complete
//! scrub of the disk says anew what there is. Bounded: of each disk so many places are kept.

use std::{
    collections::BTreeMap,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
};

use backtide_units::DiskId;

/// So many places of a disk are kept.
const PLACES_MAX: usize = 100;

/// What was found, by disk: sentences with file and place. Clones share it.
#[derive(Clone, Debug, Default)]
pub(crate) struct Findings(Arc<Mutex<BTreeMap<DiskId, Vec<String>>>>);

impl Findings {
    /// What is known of a disk, the oldest first.
    pub(crate) fn of(&self, disk: DiskId) -> Vec<String> {
        self.lock().get(&disk).cloned().unwrap_or_default()
    }

    /// Notes a damaged place, once.
    pub(crate) fn note(&self, disk: DiskId, why: &str) {
        let mut all = self.lock();
        let places = all.entry(disk).or_default();
        if places.len() < PLACES_MAX && !places.iter().any(|place| place == why) {
            places.push(why.to_owned());
        }
    }

    /// Forgets places, after all of the disk was read again.
    pub(crate) fn forget(&self, disk: DiskId, places: &[String]) {
        let mut all = self.lock();
        if let Some(known) = all.get_mut(&disk) {
            known.retain(|place| !places.contains(place));
        }
        all.retain(|_, known| !known.is_empty());
    }

    /// Nothing that could panic runs under the lock.
    fn lock(&self) -> MutexGuard<'_, BTreeMap<DiskId, Vec<String>>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_place_is_kept_once_until_it_is_forgotten_and_their_number_is_bounded() {
        let (findings, disk) = (Findings::default(), DiskId::random());
        findings.note(disk, "a");
        let before = findings.of(disk);
        findings.note(disk, "b");
        findings.note(disk, "a");
        assert_eq!(findings.of(disk), ["a", "b"]);
        findings.forget(disk, &before);
        assert_eq!(findings.of(disk), ["b"], "what was found since stays");
        assert!(findings.of(DiskId::random()).is_empty());
        for number in 0..2 * PLACES_MAX {
            findings.note(disk, &number.to_string());
        }
        assert_eq!(findings.of(disk).len(), PLACES_MAX);
    }
}
