//! Logs of which it is not known durably where they begin: what one may begin without is not promised to anybody.
//!
//! Each ends when its own log is settled, in use or not. A receiver that starts has none of the logs that it opens, for that
//! makes durable what they begin with, and of the others makes sure that what is seen of it is durable ([`begin_doubts`]).

use std::{
    collections::{BTreeMap, BTreeSet},
    io,
};

use backtide_recovery::{Doubt, settle_closed, sync_names};
use backtide_units::{DiskId, Lsn};
use tokio::sync::{mpsc, oneshot};

use super::Policies;
use crate::{Shelf, disk::chain, ingest::Task, pool::Pool};

/// Stands for all logs of a disk that could not be listed.
const ALL: u32 = 0;

/// By disk and number of the log.
#[derive(Default)]
pub(crate) struct Doubts(BTreeMap<(DiskId, u32), Doubt>);

impl Doubts {
    pub(crate) fn begin(&mut self, disk: DiskId, log: u32, doubt: Doubt) {
        self.0.insert((disk, log), doubt);
    }

    pub(crate) fn end(&mut self, disk: DiskId, log: u32) {
        self.0.remove(&(disk, log));
    }

    /// The disk goes.
    pub(crate) fn forget(&mut self, disk: DiskId) {
        self.0.retain(|(of, _), _| *of != disk);
    }

    pub(crate) fn is_about(&self, disk: DiskId) -> bool {
        self.of(disk).next().is_some()
    }

    /// Whether a point of the disk is there whatever is found.
    pub(crate) fn keep(&self, disk: DiskId, lsn: Lsn) -> bool {
        self.of(disk).all(|doubt| doubt.keeps(lsn))
    }

    pub(crate) fn logs(&self) -> Vec<(DiskId, u32)> {
        self.0.keys().copied().collect()
    }

    fn of(&self, disk: DiskId) -> impl Iterator<Item = &Doubt> {
        self.0.range((disk, 0)..=(disk, u32::MAX)).map(|(_, doubt)| doubt)
    }
}

/// Makes durable what is seen of where logs begin that are not open, and doubts those where that fails, before anybody can ask
/// for a promise.
///
/// # Errors
/// When a thread has ended.
pub(crate) async fn begin_doubts(
    shelf: &Shelf,
    policies: &Policies,
    owners: &[mpsc::Sender<Task>],
    readers: &Pool,
) -> io::Result<()> {
    let ended = || io::Error::other("a thread that owns disks has ended");
    let (mut disks, mut open) = (Vec::new(), BTreeSet::new());
    for owner in owners {
        let (answer, answered) = oneshot::channel();
        owner.send(Task::Facts(answer)).await.map_err(|_| ended())?;
        for facts in answered.await.map_err(|_| ended())? {
            open.extend(facts.error.is_none().then_some(facts.id));
            disks.push((facts.id, facts.begins));
        }
    }
    let (shelf, policies) = (shelf.clone(), policies.clone());
    readers.run(move || begin_where_needed(&shelf, &policies, disks, &open)).await.map_err(io::Error::other)
}

/// A disk, and where each of its logs begins of which that is known.
type Begins = (DiskId, BTreeMap<u32, Lsn>);

fn begin_where_needed(shelf: &Shelf, policies: &Policies, disks: Vec<Begins>, open: &BTreeSet<DiskId>) {
    for (disk, begins) in disks {
        let doubtful = match shelf.numbers(disk) {
            Ok(numbers) => {
                // The open one is the last that is a log at all.
                let single = numbers.len() == 1 && open.contains(&disk);
                let numbers = if single { Vec::new() } else { numbers };
                let synced = |log: &u32| sync_names(&*shelf.storage, &Shelf::dir(disk, *log));
                numbers.into_iter().filter(|log| synced(log).is_err()).collect()
            }
            Err(_) => vec![ALL],
        };
        for log in doubtful {
            tracing::warn!(%disk, log, "it is not known durably where a log begins, so nobody is promised older points");
            // What newer logs have is not in doubt with it.
            let newer = begins.range(log.saturating_add(1)..).map(|(_, first)| *first);
            let next = newer.filter(|_| log != ALL).min();
            policies.begin_doubt(disk, log, Doubt::about_all_before(next.unwrap_or(Lsn(u64::MAX))));
        }
    }
}

impl Shelf {
    /// Makes durable where a log begins that nobody has open; blocks.
    ///
    /// # Errors
    /// A sentence: the doubt remains.
    pub(crate) fn settle_closed(&self, disk: DiskId, log: u32) -> Result<(), String> {
        let settled = match log {
            ALL => self.numbers(disk).and_then(|numbers| {
                let mut dirs = numbers.into_iter().map(|log| Self::dir(disk, log));
                dirs.try_for_each(|dir| sync_names(&*self.storage, &dir))
            }),
            log => settle_closed(&*self.storage, &Self::dir(disk, log)),
        };
        settled.map_err(|error| chain(&error))
    }
}
