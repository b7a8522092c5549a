//! `mounts.json` in a store: the last number that a mount of each disk was given. `FORMAT.md` beside this crate describes it.
//!
//! Whoever wrote an id down, in a script or a ticket, must not meet somebody else's mount under it, also
//! after the receiver was started anew. So a number is in the file before it is used. A store that is full
//! or failing still gives its points back: then the number is remembered until the receiver ends, and that
//! is logged. A damaged file costs no more than small numbers: they go on above the clock's seconds, which
//! no number was.

use std::{
    collections::BTreeMap,
    path::Path,
    sync::{Arc, Mutex, PoisonError},
};

use backtide_storage::Storage;
use backtide_units::{ByteCount, CaptureTime, DiskName};
use serde::{Deserialize, Serialize};

use crate::sealed_json::SealedJson;

pub(crate) const FILE: &str = "mounts.json";
const KIND: SealedJson = SealedJson { magic: "backtide-mounts", version: 1, bytes_max: ByteCount(16 << 20) };

/// The numbers of a store's mounts. Shared by threads; a call blocks on the file system.
#[derive(Clone)]
pub(crate) struct MountNumbers {
    storage: Arc<dyn Storage>,
    given: Arc<Mutex<Given>>,
}

#[derive(Default, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct Given {
    /// Of disks that are not listed.
    before: u64,
    last: BTreeMap<DiskName, u64>,
}

impl MountNumbers {
    /// Of the store that `storage` is, opened at `now`.
    pub(crate) fn open(storage: Arc<dyn Storage>, now: CaptureTime) -> Self {
        let given = match KIND.read::<Given>(&*storage, Path::new(FILE)) {
            Ok(given) => given.unwrap_or_default(),
            Err(why) => {
                tracing::warn!("{FILE} cannot be read, so mounts get large numbers from now on: {why}");
                Given { last: BTreeMap::new(), before: now.0 / 1_000_000 }
            }
        };
        Self { storage, given: Arc::new(Mutex::new(given)) }
    }

    /// A number that no mount of a disk of this name had.
    pub(crate) fn next(&self, name: &DiskName) -> u64 {
        let mut given = self.given.lock().unwrap_or_else(PoisonError::into_inner);
        let before = given.before;
        let last = given.last.entry(name.clone()).or_insert(before);
        // None was ever so large, but a file can say so.
        *last = last.saturating_add(1);
        let number = *last;
        if let Err(error) = KIND.write(&*self.storage, Path::new(FILE), &*given) {
            tracing::warn!("the number of a mount could not be noted in {FILE}: {error}");
        }
        number
    }
}

/// What is wrong with the file of a store.
pub(crate) fn damage_of(storage: &dyn Storage) -> Option<String> {
    KIND.read::<Given>(storage, Path::new(FILE)).err().map(|error| error.to_string())
}

#[cfg(test)]
mod tests {
    use backtide_storage::MemoryStorage;
    use backtide_units::ByteOffset;

    use super::*;

    #[test]
    fn no_number_is_given_twice_whoever_opens_the_store() {
        let storage = Arc::new(MemoryStorage::new());
        let (vm1, vm2): (DiskName, DiskName) = ("vm1".parse().unwrap(), "vm2".parse().unwrap());
        for life in 0..3 {
            let numbers = MountNumbers::open(storage.clone(), CaptureTime(0));
            assert_eq!((numbers.next(&vm1), numbers.next(&vm1)), (life * 2 + 1, life * 2 + 2));
            assert_eq!(numbers.next(&vm2), life + 1);
        }
    }

    #[test]
    fn after_damage_numbers_are_larger_than_any_before() {
        let storage = Arc::new(MemoryStorage::new());
        let vm1: DiskName = "vm1".parse().unwrap();
        let noon = CaptureTime(1_772_366_400_000_000);
        let length = |storage: &MemoryStorage| storage.open(Path::new(FILE)).unwrap().len().unwrap().0;
        MountNumbers::open(storage.clone(), noon).next(&vm1);
        for byte in 0..length(&storage) {
            storage.flip_bit(Path::new(FILE), ByteOffset(byte), 1);
            let given = MountNumbers::open(storage.clone(), noon);
            assert!(given.given.lock().unwrap().before >= 1_772_366_400, "byte {byte}");
            storage.flip_bit(Path::new(FILE), ByteOffset(byte), 1);
        }
        storage.flip_bit(Path::new(FILE), ByteOffset(3), 1);
        assert_eq!(MountNumbers::open(storage.clone(), noon).next(&vm1), 1_772_366_401);
        assert_eq!(MountNumbers::open(storage, noon).next(&vm1), 1_772_366_402);
    }
}
