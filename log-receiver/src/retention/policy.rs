//! What people want kept, durable in the store: `retention.json`, written whole.
//!
//! A file that cannot be understood says nothing of what may go: then nothing goes, and it stays as it is, for it may hold
//! what others want kept. Changes are refused until somebody restores it or removes it.

use std::{
    collections::BTreeMap,
    io,
    path::Path,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
};

use backtide_storage::{Storage, read_file, replace_file};
use backtide_units::{ByteCount, CaptureTime, DiskId, Lsn};
use serde::{Deserialize, Serialize};

use super::Ladder;

/// Its name.
pub(crate) const FILE: &str = "retention.json";
const MAGIC: &str = "backtide-retention";
const VERSION: u32 = 1;
const FILE_BYTES_MAX: ByteCount = ByteCount(64 << 20);

/// Pins of one disk.
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
}

#[derive(Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct DiskFile {
    #[serde(default, skip_serializing_if = "Option::is_none")]
    ladder: Option<String>,
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    keep: Vec<Pin>,
}

#[derive(Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct PolicyFile {
    magic: String,
    version: u32,
    disks: BTreeMap<DiskId, DiskFile>,
    /// CRC32C of the JSON of this with an empty checksum, in hexadecimal.
    checksum: String,
}

/// What a file of any version has.
#[derive(Deserialize)]
struct Version {
    magic: String,
    version: u32,
}

/// The policies of a store. Clones share them.
#[derive(Clone)]
pub(crate) struct Policies {
    storage: Arc<dyn Storage>,
    default: Ladder,
    state: Arc<Mutex<State>>,
}

struct State {
    disks: BTreeMap<DiskId, Policy>,
    /// Why nobody knows what is wanted.
    damage: Option<String>,
}

impl PolicyFile {
    fn sum(&mut self) -> String {
        self.checksum.clear();
        let text = serde_json::to_vec(self).expect("plain data becomes JSON");
        format!("{:08x}", crc32c::crc32c(&text))
    }
}

impl Policies {
    /// Reads the file of a store; disks that it does not name have the default.
    pub(crate) fn open(storage: Arc<dyn Storage>, default: Ladder) -> Self {
        let (disks, damage) = match read(&*storage) {
            Ok(disks) => (disks, None),
            Err(why) => {
                let name = storage.display(Path::new(FILE));
                let why = format!("{} {why}; no history goes", name.display());
                tracing::error!(why);
                (BTreeMap::new(), Some(why))
            }
        };
        Self { storage, default, state: Arc::new(Mutex::new(State { disks, damage })) }
    }

    /// The ladder of disks that have none of their own.
    pub(crate) fn default_ladder(&self) -> &Ladder {
        &self.default
    }

    /// Why nothing goes, whatever the ladders say.
    pub(crate) fn damage(&self) -> Option<String> {
        self.lock().damage.clone()
    }

    /// What is wanted of a disk.
    pub(crate) fn of(&self, disk: DiskId) -> Policy {
        self.lock().disks.get(&disk).cloned().unwrap_or_default()
    }

    /// The ladder that counts for a disk.
    pub(crate) fn ladder(&self, disk: DiskId) -> Ladder {
        let state = self.lock();
        if state.damage.is_some() {
            return Ladder::default();
        }
        let own = state.disks.get(&disk).and_then(|policy| policy.ladder.clone());
        own.unwrap_or_else(|| self.default.clone())
    }

    /// Changes what is wanted of a disk, durably; blocks.
    ///
    /// # Errors
    /// A sentence: then nothing has changed that anybody goes by.
    pub(crate) fn change(&self, disk: DiskId, change: impl FnOnce(&mut Policy)) -> Result<(), String> {
        let mut state = self.lock();
        if let Some(why) = &state.damage {
            return Err(format!(
                "{why}, and no retention is changed, for that would forget what it says: stop the receiver and restore \
                 the file, or remove it to forget every ladder and kept point"
            ));
        }
        let mut disks = state.disks.clone();
        let policy = disks.entry(disk).or_default();
        change(policy);
        if policy.pins.len() > PINS_MAX {
            return Err(format!("{PINS_MAX} points of a disk can be kept, and are: release some"));
        }
        disks.retain(|_, policy| *policy != Policy::default());
        let of = |(disk, policy): (&DiskId, &Policy)| {
            let keep = policy.pins.iter().map(|(lsn, time)| Pin { lsn: *lsn, time: *time }).collect();
            (*disk, DiskFile { ladder: policy.ladder.as_ref().map(ToString::to_string), keep })
        };
        let disks_file = disks.iter().map(of).collect();
        let mut file = PolicyFile {
            magic: MAGIC.to_owned(),
            version: VERSION,
            disks: disks_file,
            checksum: String::new(),
        };
        file.checksum = file.sum();
        let content = serde_json::to_vec_pretty(&file).expect("plain data becomes JSON");
        let written = replace_file(&*self.storage, Path::new(FILE), &content);
        written
            .map_err(|error| format!("write {}: {error}", self.storage.display(Path::new(FILE)).display()))?;
        state.disks = disks;
        Ok(())
    }

    /// Does something while what is wanted of a disk is still that, and stays that; none when it has changed.
    pub(crate) fn while_wanted<R>(
        &self,
        disk: DiskId,
        policy: &Policy,
        act: impl FnOnce() -> R,
    ) -> Option<R> {
        let state = self.lock();
        let now = state.disks.get(&disk).cloned().unwrap_or_default();
        (state.damage.is_none() && now == *policy).then(act)
    }

    /// Waits until nothing is done that goes by what was wanted before: after it a log shows whether it did.
    pub(crate) fn settle(&self) {
        drop(self.lock());
    }

    /// Nothing that could panic runs under the lock.
    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// What is wrong with the file ends a sentence that begins with its name.
fn read(storage: &dyn Storage) -> Result<BTreeMap<DiskId, Policy>, String> {
    let content = match read_file(storage, Path::new(FILE), FILE_BYTES_MAX) {
        Ok(content) => content,
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(BTreeMap::new()),
        Err(error) => return Err(format!("cannot be read: {error}")),
    };
    // Before all else: another version may have other fields.
    if let Ok(Version { magic, version }) = serde_json::from_slice(&content)
        && magic == MAGIC
        && version > VERSION
    {
        return Err(format!("has format version {version}, this program reads up to {VERSION}"));
    }
    understand(&content).map_err(|why| format!("is damaged: {why}"))
}

fn understand(content: &[u8]) -> Result<BTreeMap<DiskId, Policy>, String> {
    let mut file: PolicyFile = serde_json::from_slice(content).map_err(|error| error.to_string())?;
    let found = std::mem::take(&mut file.checksum);
    let expected = file.sum();
    if file.magic != MAGIC || file.version != VERSION || found != expected {
        return Err(format!("expected magic {MAGIC}, version {VERSION} and checksum {expected}"));
    }
    let policy = |file: DiskFile| -> Result<Policy, String> {
        let ladder = file.ladder.map(|ladder| ladder.parse()).transpose();
        let ladder = ladder.map_err(|error: super::ladder::LadderError| error.to_string())?;
        Ok(Policy { ladder, pins: file.keep.into_iter().map(|pin| (pin.lsn, pin.time)).collect() })
    };
    file.disks.into_iter().map(|(disk, file)| Ok((disk, policy(file)?))).collect()
}

/// What is wrong with the file of a store that nobody uses.
pub(crate) fn damage_of(storage: &dyn Storage) -> Option<String> {
    let name = storage.display(Path::new(FILE));
    read(storage).err().map(|why| format!("{} {why}", name.display()))
}

#[cfg(test)]
mod tests {
    use backtide_storage::MemoryStorage;
    use backtide_units::ByteOffset;

    use super::*;

    #[test]
    fn policies_are_durable_and_a_damaged_file_lets_nothing_go() {
        let storage = MemoryStorage::new();
        let (a, b) = (DiskId::random(), DiskId::random());
        let open = || Policies::open(Arc::new(storage.clone()), "any=9d".parse().unwrap());
        let policies = open();
        assert_eq!(policies.ladder(a).to_string(), "any=9d");
        policies.change(a, |policy| policy.ladder = Some("any=1h daily=7d".parse().unwrap())).unwrap();
        policies.change(b, |policy| policy.pins.extend([(Lsn(7), CaptureTime(8))])).unwrap();
        storage.crash(1);
        let policies = open();
        assert_eq!(
            (policies.ladder(a).to_string(), policies.of(b).pins.len()),
            ("any=1h daily=1w".to_owned(), 1)
        );
        assert!(
            policies
                .change(b, |policy| policy.pins = (0..9999).map(|n| (Lsn(n), CaptureTime(n))).collect())
                .is_err()
        );
        assert_eq!(policies.of(b).pins.len(), 1);
        let length = storage.open(Path::new(FILE)).unwrap().len().unwrap().0;
        for byte in 0..length {
            storage.flip_bit(Path::new(FILE), ByteOffset(byte), 1);
            let found = open();
            // White space may change into other white space.
            assert!(found.damage().is_some() || found.of(a) == policies.of(a), "byte {byte}");
            if found.damage().is_some() {
                assert_eq!(found.ladder(a), Ladder::default());
                let refused = found.change(a, |policy| policy.ladder = None).unwrap_err();
                assert!(refused.contains(FILE) && refused.contains("remove it"), "{refused}");
            }
            storage.flip_bit(Path::new(FILE), ByteOffset(byte), 1);
        }
        policies.change(a, |policy| policy.ladder = None).unwrap();
        assert_eq!(open().ladder(a).to_string(), "any=9d");
        let newer = br#"{"magic": "backtide-retention", "version": 2, "sites": [], "checksum": "0"}"#;
        replace_file(&storage, Path::new(FILE), newer).unwrap();
        let found = open();
        assert!(found.damage().unwrap().contains("has format version 2"), "{:?}", found.damage());
        assert!(found.change(a, |policy| policy.ladder = None).is_err());
        assert_eq!(read_file(&storage, Path::new(FILE), FILE_BYTES_MAX).unwrap(), newer);
    }
}
