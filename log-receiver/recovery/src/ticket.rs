//! Making a log durable in two halves: the log says which files to sync, a thread that may block does
//! it, and the log takes the outcome. So the thread that owns the log never waits for a device.
//!
//! A ticket holds every file with entries that are not known durable, oldest first, and the directory
//! when it has names that are not. Its outcome is a success only when all of them were synced; only
//! then are its entries durable, for a segment is of no use without the ones before it. It also takes
//! along what else may block ([`crate::chores`]), and what the page cache may forget then ([`crate::resident`]).
//!
//! Tickets of several logs of one storage can be synced together, which may cost one flush for all of them. What
//! cannot be had that way is synced file by file. A ticket with chores is never synced together with others: they may
//! take long, or fail.

use std::{io, path::PathBuf, sync::Arc};

use backtide_segment::Seq;
use backtide_storage::{KillPoint, SetSync, Storage, StorageFile, SyncSet};
use backtide_units::Lsn;

use crate::{
    chores::{Chores, Done, Owned},
    resident::LetGo,
};

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
    /// What need not stay in memory once it is durable.
    pub(crate) let_go: Vec<LetGo>,
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
    flushes: u32,
}

/// A ticket whose chores are done, or have failed.
struct Prepared {
    ticket: SyncTicket,
    done: io::Result<Option<Done>>,
}

impl SyncTicket {
    /// What is durable once this has succeeded.
    pub fn through(&self) -> Durable {
        self.through
    }

    /// Syncs; blocks as long as the device takes.
    pub fn sync(self) -> SyncOutcome {
        self.prepare().sync()
    }

    /// Whether there is something to do before it is synced.
    pub fn has_chores(&self) -> bool {
        self.chores.is_some()
    }

    /// Syncs tickets of logs on one storage with a shared flush where the storage can, and one by one otherwise; blocks.
    /// Outcomes come in the order of the tickets.
    pub fn sync_together(storage: &dyn Storage, tickets: Vec<Self>) -> Vec<SyncOutcome> {
        let (mut sets, mut shares) = (Vec::new(), Vec::new());
        for ticket in &tickets {
            shares.push(!ticket.has_chores());
            if !ticket.has_chores() {
                sets.push(ticket.set());
            }
        }
        let mut synced = storage.sync_sets(&sets).into_iter();
        // The file system's and the device's: the first ticket that they made durable tells.
        let mut flushes = 2;
        let outcomes = tickets.into_iter().zip(shares).map(|(ticket, shared)| {
            match if shared { synced.next() } else { None } {
                Some(SetSync::Durable) => ticket.prepare().outcome(Ok(()), std::mem::take(&mut flushes)),
                Some(SetSync::Failed(error)) => ticket.prepare().outcome(Err(error), 0),
                Some(SetSync::Apart) | None => ticket.sync(),
            }
        });
        outcomes.collect()
    }

    fn set(&self) -> SyncSet<'_> {
        SyncSet {
            files: &self.files,
            directory: self.directory.as_ref().map(|directory| directory.path.as_path()),
        }
    }

    fn prepare(mut self) -> Prepared {
        let done = self.chores.take().map(Chores::run).transpose();
        Prepared { ticket: self, done }
    }
}

impl Prepared {
    /// Syncs file by file.
    fn sync(self) -> SyncOutcome {
        let mut flushes = 0;
        let mut result = Ok(());
        if self.done.is_ok() {
            for file in &self.ticket.files {
                flushes += 1;
                // After a failure as well: what a file has to tell would be told to whoever opens it next.
                let synced = file.sync_data();
                result = result.and(synced);
            }
            if let Some(directory) = &self.ticket.directory {
                flushes += 1;
                result = result.and_then(|()| directory.storage.sync_dir(&directory.path));
            }
        }
        self.outcome(result, flushes)
    }

    fn outcome(self, synced: io::Result<()>, flushes: u32) -> SyncOutcome {
        let Self { ticket: SyncTicket { through, change, let_go, owned, .. }, done } = self;
        KillPoint::LogSynced.reached();
        let (result, done) = match done {
            Ok(done) => (synced, done),
            Err(error) => (Err(error), None),
        };
        if let (Ok(()), Some(done)) = (&result, &done) {
            done.publish();
        }
        if result.is_ok() {
            let_go.iter().for_each(LetGo::advise);
        }
        SyncOutcome { through, change, result, done, owned, flushes }
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

    /// How many flushes of the device it took; of tickets that were synced together the first one tells.
    pub fn flushes(&self) -> u32 {
        self.flushes
    }

    /// Does something to what belongs to the log, while it does: none when the log was dropped or abandoned
    /// since, and somebody else may have it.
    pub fn while_owned<R>(&self, act: impl FnOnce() -> R) -> Option<R> {
        self.owned.work().map(|_working| act())
    }
}
