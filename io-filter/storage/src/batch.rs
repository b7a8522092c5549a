//! One flush for many files, and why it is as good as a sync of each of them.
//!
//! A sync of one file commits the file system's journal and flushes the device, so a thousand disks that write a
//! little each cost a thousand of both, when one would do for all of them. A sync of the whole file system does that,
//! but tells less than each file's own: not which file's blocks could not be written, sometimes (a journal that was
//! given up, a file system that became read-only) nothing at all. So four steps stand for it:
//! 1. every file is written out and waited for through its own handle: what could not be written is told there, to
//!    whoever waits for that file and to nobody else;
//! 2. the file system is synced, once: names, lengths and places;
//! 3. it must still be one that can be written;
//! 4. one of the files is synced the usual way, which flushes the device, and fails where the journal has ended.
//!
//! Invariant: a set is durable only when all of that succeeded for it. A set with a file on another file system than
//! the tree is left to its own syncs; so are all sets that nothing is known of after a failure of steps 2 to 4. What a
//! file told in step 1 is that set's outcome, for it is told once.

use std::{io, path::Path, sync::Arc};

use crate::{DeviceId, StorageFile};

/// What belongs together: files with bytes that are not durable, and a directory with names that are not.
#[derive(Clone, Copy)]
pub struct SyncSet<'a> {
    /// The files.
    pub files: &'a [Arc<dyn StorageFile>],
    /// The directory, relative to the tree's root.
    pub directory: Option<&'a Path>,
}

/// What became of one set.
#[derive(Debug)]
#[must_use = "a set that is apart has to be synced"]
pub enum SetSync {
    /// All of it is durable.
    Durable,
    /// One of its files failed, and may not tell of it again.
    Failed(io::Error),
    /// Nothing is known yet, and nothing lost: each file and the directory have to be synced by themselves.
    Apart,
}

/// Whether flushes can be shared now.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Sharing {
    /// Yes, and it costs less than syncs of several files.
    Cheap,
    /// Not now, for this reason.
    NotNow(&'static str),
    /// Not on this storage any more, for this reason.
    Never(String),
}

/// The file system that a tree is on.
pub(crate) trait FileSystem {
    /// Its device.
    fn device(&self) -> DeviceId;
    /// That of a directory of the tree.
    fn device_of(&self, directory: &Path) -> io::Result<DeviceId>;
    /// Syncs all of it.
    fn sync(&self) -> io::Result<()>;
    /// Whether it cannot be written any more.
    fn is_read_only(&self) -> io::Result<bool>;
}

/// How a batch went, and why there must not be another one if so.
pub(crate) struct Batch {
    pub(crate) sets: Vec<SetSync>,
    pub(crate) unsound: Option<String>,
}

impl Batch {
    /// Nothing was done.
    pub(crate) fn apart(sets: &[SyncSet<'_>]) -> Self {
        Self { sets: sets.iter().map(|_| SetSync::Apart).collect(), unsound: None }
    }
}

/// Does all four steps.
pub(crate) fn sync(file_system: &dyn FileSystem, sets: &[SyncSet<'_>]) -> Batch {
    let mut batch = Batch::apart(sets);
    let shared: Vec<usize> = (0..sets.len()).filter(|&set| covers(file_system, &sets[set])).collect();
    let told = write_out(sets, &shared);
    let whole: Vec<usize> = shared.into_iter().filter(|&set| told.failures[set].is_none()).collect();
    for (set, failure) in told.failures.into_iter().enumerate() {
        if let Some(error) = failure {
            batch.sets[set] = SetSync::Failed(error);
        }
    }
    if let Some(error) = told.unsupported {
        batch.unsound = Some(format!("files cannot be written out one by one: {error}"));
        return batch;
    }
    let Some((first, flushed)) = whole.iter().find_map(|&set| Some((set, sets[set].files.first()?))) else {
        return batch;
    };
    if let Err(why) = commit(file_system) {
        batch.unsound = Some(why);
        return batch;
    }
    if let Err(error) = flushed.sync_data() {
        batch.unsound = Some(format!("the flush after a sync of the file system failed: {error}"));
        batch.sets[first] = SetSync::Failed(error);
        return batch;
    }
    for set in whole {
        let named = sets[set].files.iter().try_for_each(|file| file.require_name());
        batch.sets[set] = named.map_or_else(SetSync::Failed, |()| SetSync::Durable);
    }
    batch
}

/// What files told when they were written out.
struct Told {
    /// The first failure of each set.
    failures: Vec<Option<io::Error>>,
    unsupported: Option<io::Error>,
}

fn write_out(sets: &[SyncSet<'_>], shared: &[usize]) -> Told {
    let mut told = Told { failures: sets.iter().map(|_| None).collect(), unsupported: None };
    // All are begun before one is waited for: the device has them side by side.
    for wait in [false, true] {
        for &set in shared {
            for file in sets[set].files {
                match file.write_out(wait) {
                    Ok(()) => {}
                    Err(error) if error.kind() == io::ErrorKind::Unsupported => {
                        told.unsupported = Some(error);
                        return told;
                    }
                    // The others as well: what a file has to tell would be told to whoever opens it next.
                    Err(error) => {
                        told.failures[set].get_or_insert(error);
                    }
                }
            }
        }
    }
    told
}

/// Whether a sync of the file system reaches all of the set.
fn covers(file_system: &dyn FileSystem, set: &SyncSet<'_>) -> bool {
    let device = file_system.device();
    let is_here = |found: io::Result<DeviceId>| found.is_ok_and(|found| found == device);
    !set.files.is_empty()
        && set.files.iter().all(|file| is_here(file.device()))
        && set.directory.is_none_or(|directory| is_here(file_system.device_of(directory)))
}

fn commit(file_system: &dyn FileSystem) -> Result<(), String> {
    file_system.sync().map_err(|error| format!("a sync of the file system failed: {error}"))?;
    match file_system.is_read_only() {
        Ok(false) => Ok(()),
        Ok(true) => Err("the file system became read-only".to_owned()),
        Err(error) => Err(format!("nobody tells whether the file system can be written: {error}")),
    }
}

#[cfg(test)]
mod tests;
