//! Making a log durable in two halves: the log says which files to sync, a thread that may block does
//! it, and the log takes the outcome. So the thread that owns the log never waits for a device.
//!
//! A ticket holds every file with entries that are not known durable, oldest first, and the directory
//! when it has names that are not. Its outcome is a success only when all of them were synced; only
//! then are its entries durable, for a segment is of no use without the ones before it. It also takes
//! along what else may block ([`crate::chores`]).

use std::{io, path::PathBuf, sync::Arc};

use backtide_segment::Seq;
use backtide_storage::{KillPoint, Storage, StorageFile};
use backtide_units::Lsn;

use crate::chores::{Chores, Done, Owned};

/// How far the log is durable.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Durable {
    /// Every entry up to this one survives a power loss.
    pub seq: Seq,
    /// `Timeline::covered` at that entry.
    pub lsn: Lsn,
}

/// Files to sync for everything appended so far to be durable. Give it to a thread that may
/// block, then its outcome to [`crate::DiskLog::synced`].
#[must_use = "nothing is durable before the ticket is synced"]
pub struct SyncTicket {
    pub(crate) through: Durable,
    /// The newest change of the log's files that this ticket covers.
    pub(crate) change: u64,
    pub(crate) files: Vec<Arc<dyn StorageFile>>,
    pub(crate) directory: Option<DirectorySync>,
    pub(crate) chores: Option<Chores>,
    pub(crate) owned: Arc<Owned>,
}

/// A directory whose names are not durable.
pub(crate) struct DirectorySync {
    pub(crate) storage: Arc<dyn Storage>,
    pub(crate) path: PathBuf,
}

/// A ticket that was synced, or failed to.
#[must_use = "the log learns what is durable from the outcome"]
pub struct SyncOutcome {
    pub(crate) through: Durable,
    pub(crate) change: u64,
    pub(crate) result: io::Result<()>,
    pub(crate) done: Option<Done>,
    owned: Arc<Owned>,
}

impl SyncTicket {
    /// What is durable once this has succeeded.
    pub fn through(&self) -> Durable {
        self.through
    }

    /// Syncs; blocks as long as the device takes.
    pub fn sync(self) -> SyncOutcome {
        let Self { through, change, files, directory, chores, owned } = self;
        let mut done = None;
        let mut result = match chores.map(Chores::run).transpose() {
            Ok(chores) => {
                done = chores;
                Ok(())
            }
            Err(error) => Err(error),
        };
        for file in &files {
            result = result.and_then(|()| file.sync_data());
        }
        if let Some(directory) = &directory {
            result = result.and_then(|()| directory.storage.sync_dir(&directory.path));
        }
        KillPoint::LogSynced.reached();
        if let (Ok(()), Some(done)) = (&result, &done) {
            done.publish();
        }
        SyncOutcome { through, change, result, done, owned }
    }
}

impl SyncOutcome {
    /// What is durable when it succeeded.
    ///
    /// # Errors
    /// Why it did not.
    pub fn result(&self) -> Result<Durable, &io::Error> {
        self.result.as_ref().map(|()| self.through)
    }

    /// Does something to what belongs to the log, while it does: none when the log was dropped or abandoned
    /// since, and somebody else may have it.
    pub fn while_owned<R>(&self, act: impl FnOnce() -> R) -> Option<R> {
        self.owned.work().map(|_working| act())
    }
}
