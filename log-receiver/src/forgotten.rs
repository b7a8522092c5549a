//! Disks that were forgotten: a tombstone each, `STORE/forgotten/<uuid>.json`, which `FORMAT.md` beside this crate describes.
//!
//! A disk goes in steps, and its tombstone says how far it is: *asked*, in memory only, while somebody looks whether it
//! may go; *going*, durable before the first file is removed; *gone*, durable when the last one is. Whatever ends
//! the receiver between, the disk is whole or it is not there: one that is going is not listed, and the next start
//! removes the rest ([`crate::removal`]).
//!
//! A tombstone of a disk that is gone stays, for the agent that comes back: its attach, and every one before, is told that
//! the disk was forgotten; a later one begins anew, be it that somebody asked for it or that the agent started again. Invariants:
//! no agent has a disk that is asked for or going; no attach that the store has seen begins a disk again that is gone;
//! a disk whose tombstone could not be noted has none that a start could find, or it is going.

use std::{
    collections::BTreeMap,
    io::{self, ErrorKind},
    path::{Path, PathBuf},
    sync::{Arc, Mutex, MutexGuard, PoisonError},
};

use backtide_protocol::{CloseCode, Closed, Hello};
use backtide_recovery::time_text;
use backtide_storage::Storage;
use backtide_units::{ByteCount, CaptureTime, DiskId, DiskName, Epoch};
use serde::{Deserialize, Serialize};

use crate::sealed_json::SealedJson;

/// The directory of tombstones.
pub(crate) const DIR: &str = "forgotten";
const KIND: SealedJson =
    SealedJson { magic: "backtide-forgotten", version: 1, bytes_max: ByteCount(16 * 1024) };

/// Tombstones of disks that are gone; the oldest makes room for one more.
const GONE_MAX: usize = 4096;

/// What is remembered of a disk that was forgotten.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Tombstone {
    /// None when nothing told its name.
    pub(crate) name: Option<DiskName>,
    /// The highest epoch that had attached it.
    pub(crate) epoch: Epoch,
    /// When it was forgotten, by the receiver's clock.
    pub(crate) time: CaptureTime,
    /// Whether nothing of it is left.
    pub(crate) gone: bool,
}

#[derive(Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct TombstoneFile {
    disk: DiskId,
    name: Option<DiskName>,
    epoch: Epoch,
    time: CaptureTime,
    gone: bool,
}

/// The disks of a store that were forgotten, or are being so. Clones share them.
#[derive(Clone)]
pub struct Forgotten {
    storage: Arc<dyn Storage>,
    table: Arc<Mutex<Table>>,
}

#[derive(Default)]
struct Table {
    /// Somebody looks whether these may go.
    asked: Vec<DiskId>,
    stones: BTreeMap<DiskId, Tombstone>,
    /// Why a disk is still going.
    problems: BTreeMap<DiskId, String>,
}

impl Forgotten {
    /// The tombstones of a store. One that cannot be read is told, and counts for nothing.
    ///
    /// # Errors
    /// The file system's.
    pub fn load(storage: Arc<dyn Storage>) -> io::Result<Self> {
        let mut table = Table::default();
        for read in read_all(&*storage)? {
            match read {
                Ok((disk, stone)) => _ = table.stones.insert(disk, stone),
                Err(why) => {
                    tracing::error!(why, "nobody knows which disk was forgotten")
                }
            }
        }
        Ok(Self { storage, table: Arc::new(Mutex::new(table)) })
    }

    /// Begins to look whether a disk may go, or to remove one that is going: no agent gets it meanwhile. None when
    /// somebody does already.
    pub(crate) fn ask(&self, disk: DiskId) -> Option<Asked> {
        let mut table = self.table();
        let free = !table.asked.contains(&disk);
        free.then(|| {
            table.asked.push(disk);
            Asked { forgotten: self.clone(), disk }
        })
    }

    /// Notes durably that a disk goes, or is gone; blocks.
    ///
    /// # Errors
    /// A sentence. A disk that was not going is as it was: nothing of the note is left that a start could find. Where
    /// nobody can make sure of that it is going, see [`Forgotten::going_stone`].
    pub(crate) fn note(&self, disk: DiskId, stone: Tombstone) -> Result<(), String> {
        if let Err(error) = write(&*self.storage, disk, &stone) {
            let why = format!("write {}: {error}", self.storage.display(&path(disk)).display());
            return Err(self.take_back(disk, stone, why));
        }
        let mut table = self.table();
        table.problems.remove(&disk);
        table.stones.insert(disk, stone);
        let too_many = table.stones.values().filter(|stone| stone.gone).count().saturating_sub(GONE_MAX);
        let mut gone: Vec<_> = table.stones.iter().filter(|(_, stone)| stone.gone).collect();
        gone.sort_by_key(|(_, stone)| stone.time);
        let oldest: Vec<DiskId> = gone.into_iter().take(too_many).map(|(disk, _)| *disk).collect();
        for disk in oldest {
            table.stones.remove(&disk);
            // One that stays is only read once more.
            let _ = self.storage.remove(&path(disk));
        }
        Ok(())
    }

    /// A note that failed may be in place all the same, and the next start would remove what the disk's agent has been
    /// acknowledged since.
    fn take_back(&self, disk: DiskId, stone: Tombstone, why: String) -> String {
        let before = self.table().stones.get(&disk).cloned();
        let undone = match before {
            // It goes, whichever of both a start finds.
            Some(Tombstone { gone: false, .. }) => return why,
            Some(before) => write(&*self.storage, disk, &before),
            None => remove(&*self.storage, disk),
        };
        let Err(error) = undone else { return why };
        let why = format!("{why}; a start may find it all the same, for it cannot be taken back: {error}");
        let mut table = self.table();
        table.stones.insert(disk, stone);
        table.problems.insert(disk, why.clone());
        why
    }

    /// Notes why some of a disk is still there.
    pub(crate) fn note_problem(&self, disk: DiskId, why: String) {
        self.table().problems.insert(disk, why);
    }

    /// What a person should look at.
    pub(crate) fn alarms(&self) -> Vec<String> {
        let table = self.table();
        let alarm = |(disk, why): (&DiskId, &String)| {
            format!("disk {} was forgotten, and not all of it could be removed: {why}", table.called(*disk))
        };
        table.problems.iter().map(alarm).collect()
    }

    /// Whether a disk is asked for or going.
    pub(crate) fn is_leaving(&self, disk: DiskId) -> bool {
        let table = self.table();
        table.asked.contains(&disk) || table.is_going(disk)
    }

    /// Whether a disk is going: what is there of it counts for nothing.
    pub(crate) fn is_going(&self, disk: DiskId) -> bool {
        self.table().is_going(disk)
    }

    /// What is noted of a disk that is going.
    pub(crate) fn going_stone(&self, disk: DiskId) -> Option<Tombstone> {
        self.table().stones.get(&disk).filter(|stone| !stone.gone).cloned()
    }

    /// The disks that are going.
    pub(crate) fn going(&self) -> Vec<(DiskId, Tombstone)> {
        let table = self.table();
        let going = table.stones.iter().filter(|(_, stone)| !stone.gone);
        going.map(|(disk, stone)| (*disk, stone.clone())).collect()
    }

    /// Lets an agent have a disk, which the store knows or not.
    ///
    /// # Errors
    /// What it is told.
    pub(crate) fn admit(&self, hello: &Hello, is_known: bool) -> Result<(), Closed> {
        let table = self.table();
        let name = &hello.name;
        if table.asked.contains(&hello.disk) || table.is_going(hello.disk) {
            let why = format!("disk {name} is being forgotten at this receiver");
            return Err(Closed::new(CloseCode::Busy, why));
        }
        match table.stones.get(&hello.disk) {
            Some(stone) if !is_known && hello.epoch <= stone.epoch => {
                let why = format!(
                    "disk {name} was forgotten at this receiver at {}, with all its history: detach it, or attach it again \
                     to protect it anew",
                    time_text(stone.time)
                );
                Err(Closed::new(CloseCode::Refused, why))
            }
            Some(_) | None => Ok(()),
        }
    }

    /// Whether a disk was forgotten, also one that has begun anew since.
    pub(crate) fn is_remembered(&self, disk: DiskId) -> bool {
        self.table().stones.contains_key(&disk)
    }

    /// Nothing that could panic runs under the lock.
    fn table(&self) -> MutexGuard<'_, Table> {
        self.table.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Somebody looks whether a disk may go, or removes it: nobody else does, as long as this is there.
pub(crate) struct Asked {
    forgotten: Forgotten,
    disk: DiskId,
}

impl Drop for Asked {
    fn drop(&mut self) {
        self.forgotten.table().asked.retain(|asked| *asked != self.disk);
    }
}

impl Table {
    fn is_going(&self, disk: DiskId) -> bool {
        self.stones.get(&disk).is_some_and(|stone| !stone.gone)
    }

    fn called(&self, disk: DiskId) -> String {
        let name = self.stones.get(&disk).and_then(|stone| stone.name.as_ref());
        name.map_or_else(|| disk.to_string(), ToString::to_string)
    }
}

fn path(disk: DiskId) -> PathBuf {
    Path::new(DIR).join(format!("{disk}.json"))
}

type Read = Result<(DiskId, Tombstone), String>;

/// Every tombstone of a store, or what is wrong with it.
///
/// # Errors
/// The file system's.
pub(crate) fn read_all(storage: &dyn Storage) -> io::Result<Vec<Read>> {
    let names = match storage.list(Path::new(DIR)) {
        Ok(names) => names,
        Err(error) if error.kind() == ErrorKind::NotFound => return Ok(Vec::new()),
        Err(error) => return Err(error),
    };
    let paths = names.iter().filter(|name| name.ends_with(".json")).map(|name| Path::new(DIR).join(name));
    Ok(paths.map(|path| read(storage, &path)).collect())
}

fn read(storage: &dyn Storage, path: &Path) -> Read {
    let file: Option<TombstoneFile> = KIND.read(storage, path).map_err(|error| error.to_string())?;
    let gone_meanwhile = || format!("{} is missing", storage.display(path).display());
    let TombstoneFile { disk, name, epoch, time, gone } = file.ok_or_else(gone_meanwhile)?;
    if path.file_stem().and_then(|stem| stem.to_str()) != Some(&*disk.to_string()) {
        return Err(format!("{} is damaged: it is of disk {disk}", storage.display(path).display()));
    }
    Ok((disk, Tombstone { name, epoch, time, gone }))
}

/// Makes sure that a start finds none.
fn remove(storage: &dyn Storage, disk: DiskId) -> io::Result<()> {
    let path = path(disk);
    let own = path.file_name().and_then(|name| name.to_str()).expect("a path that is made of text");
    // A store that cannot be changed has most often not taken it either.
    match storage.list(Path::new(DIR)) {
        Ok(names) if names.iter().any(|name| name.as_str() == own) => {}
        Ok(_) => return Ok(()),
        Err(error) if error.kind() == ErrorKind::NotFound => return Ok(()),
        Err(error) => return Err(error),
    }
    storage.remove(&path)?;
    storage.sync_dir(Path::new(DIR))
}

fn write(storage: &dyn Storage, disk: DiskId, stone: &Tombstone) -> io::Result<()> {
    let Tombstone { name, epoch, time, gone } = stone.clone();
    let file = TombstoneFile { disk, name, epoch, time, gone };
    storage.create_dir(Path::new(DIR))?;
    storage.sync_dir(Path::new(""))?;
    KIND.write(storage, &path(disk), &file)
}
