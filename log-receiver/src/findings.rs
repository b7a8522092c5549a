//! Damage that was found in logs that are in use: by a scrub, or by a read of a mounted point.
//!
//! A log tells nothing of a payload that has rotten in it before somebody reads it. What was found is kept in
//! `findings.json`, so that every later answer about the disk says it, also after the receiver was started again; a complete
//! scrub of the disk says anew what there is, and what it has mended is no finding any more. Bounded: of each disk so many
//! places are kept. A file that is damaged, or cannot be written, costs what it would tell until the next scrub.

use std::{
    collections::BTreeMap,
    io,
    path::Path,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
};

use backtide_storage::{Storage, read_file, replace_file};
use backtide_units::{ByteCount, DiskId};
use serde::{Deserialize, Serialize};

/// Its name.
const FILE: &str = "findings.json";
const MAGIC: &str = "backtide-findings";
const VERSION: u32 = 1;
const FILE_BYTES_MAX: ByteCount = ByteCount(256 << 20);

/// So many places of a disk are kept.
const PLACES_MAX: usize = 100;

/// What was found, by disk: sentences with file and place. Clones share it.
#[derive(Clone)]
pub(crate) struct Findings {
    storage: Arc<dyn Storage>,
    places: Arc<Mutex<Places>>,
}

type Places = BTreeMap<DiskId, Vec<String>>;

#[derive(Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct FindingsFile {
    magic: String,
    version: u32,
    disks: Places,
    /// CRC32C of the JSON of this with an empty checksum, in hexadecimal.
    checksum: String,
}

impl FindingsFile {
    fn sum(&mut self) -> String {
        self.checksum.clear();
        let text = serde_json::to_vec(self).expect("plain data becomes JSON");
        format!("{:08x}", crc32c::crc32c(&text))
    }
}

impl Findings {
    /// What is noted in a store.
    pub(crate) fn open(storage: Arc<dyn Storage>) -> Self {
        let places = read(&*storage).unwrap_or_else(|why| {
            tracing::error!(why, "what was found damaged is not known any more: a scrub finds it again");
            Places::new()
        });
        Self { storage, places: Arc::new(Mutex::new(places)) }
    }

    /// What is known of a disk, the oldest first.
    pub(crate) fn of(&self, disk: DiskId) -> Vec<String> {
        self.lock().get(&disk).cloned().unwrap_or_default()
    }

    /// Notes a damaged place, once; blocks.
    pub(crate) fn note(&self, disk: DiskId, why: &str) {
        let mut all = self.lock();
        let places = all.entry(disk).or_default();
        if places.len() < PLACES_MAX && !places.iter().any(|place| place == why) {
            places.push(why.to_owned());
            self.write(&all);
        }
    }

    /// Forgets everything of a disk that is gone; blocks.
    pub(crate) fn forget_all(&self, disk: DiskId) {
        let mut all = self.lock();
        if all.remove(&disk).is_some() {
            self.write(&all);
        }
    }

    /// Forgets places, after all of the disk was read again; blocks.
    pub(crate) fn forget(&self, disk: DiskId, places: &[String]) {
        let mut all = self.lock();
        let Some(known) = all.get_mut(&disk) else { return };
        let before = known.len();
        known.retain(|place| !places.contains(place));
        let changed = known.len() < before;
        all.retain(|_, known| !known.is_empty());
        if changed {
            self.write(&all);
        }
    }

    /// Under the lock, so that the newest is written last.
    fn write(&self, places: &Places) {
        let mut file = FindingsFile {
            magic: MAGIC.to_owned(),
            version: VERSION,
            disks: places.clone(),
            checksum: String::new(),
        };
        file.checksum = file.sum();
        let content = serde_json::to_vec_pretty(&file).expect("plain data becomes JSON");
        if let Err(error) = replace_file(&*self.storage, Path::new(FILE), &content) {
            tracing::warn!(%error, "cannot note what was found damaged: the next start does not know it");
        }
    }

    /// Nothing that could panic runs under the lock.
    fn lock(&self) -> MutexGuard<'_, Places> {
        self.places.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

fn read(storage: &dyn Storage) -> Result<Places, String> {
    let name = storage.display(Path::new(FILE));
    let content = match read_file(storage, Path::new(FILE), FILE_BYTES_MAX) {
        Ok(content) => content,
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(Places::new()),
        Err(error) => return Err(format!("{} cannot be read: {error}", name.display())),
    };
    let damaged = |why: String| format!("{} is damaged: {why}", name.display());
    let mut file: FindingsFile =
        serde_json::from_slice(&content).map_err(|error| damaged(error.to_string()))?;
    let found = std::mem::take(&mut file.checksum);
    let expected = file.sum();
    if (file.magic.as_str(), file.version, &found) != (MAGIC, VERSION, &expected) {
        return Err(damaged(format!("expected magic {MAGIC}, version {VERSION} and checksum {expected}")));
    }
    Ok(file.disks)
}

/// What is wrong with the file of a store that nobody uses.
pub(crate) fn damage_of(storage: &dyn Storage) -> Option<String> {
    read(storage).err()
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
        findings.note(disk, "a");
        let before = findings.of(disk);
        findings.note(disk, "b");
        findings.note(disk, "a");
        assert_eq!(findings.of(disk), ["a", "b"]);
        storage.crash(1);
        let findings = open(&storage);
        assert_eq!(findings.of(disk), ["a", "b"], "after a power cut too");
        findings.forget(disk, &before);
        assert_eq!(findings.of(disk), ["b"], "what was found since stays");
        storage.crash(2);
        let findings = open(&storage);
        assert_eq!(findings.of(disk), ["b"]);
        assert!(findings.of(DiskId::random()).is_empty());
        for number in 0..2 * PLACES_MAX {
            findings.note(disk, &number.to_string());
        }
        assert_eq!(findings.of(disk).len(), PLACES_MAX);
    }

    #[test]
    fn a_damaged_file_is_told_and_replaced_by_what_is_found_next() {
        let (storage, disk) = (MemoryStorage::new(), DiskId::random());
        open(&storage).note(disk, "a");
        assert_eq!(damage_of(&storage), None);
        storage.flip_bit(Path::new(FILE), ByteOffset(60), 1);
        assert!(damage_of(&storage).unwrap().contains("findings.json is damaged"));
        let findings = open(&storage);
        assert!(findings.of(disk).is_empty());
        findings.note(disk, "b");
        assert_eq!(open(&storage).of(disk), ["b"]);
    }
}
