//! Opening a log again that failed, for an agent whose hello may have its disk.
//!
//! It reads the end of the log, or all that is left of one that is damaged: on a slow device that takes as long as it takes, so a
//! receiver has it done where blocking is fine ([`Ingest::prepare`]) before the claim, which then finds it done. A simulation
//! has it done within the claim. In the same way what is left of such a log is read for whoever asks for its points, and a disk
//! whose directory could not be listed is opened as at a start for an agent or whoever asks for its points. To read what is left can
//! fail after all of a log was read but its end, so who asks next has it read again only when something has changed: a hello
//! has tried to open the log, or a round of retention has come, and more time has gone than it took, many times over.
//!
//! Invariants: at most one is under way of a disk, and nobody reads the log's files or gives up the disk meanwhile; what it
//! came to is used by the next claim or by none, for nothing else writes to a log that failed but what makes durable where it
//! begins, which is as an opening does it.

use std::time::{Duration, Instant};

use backtide_protocol::Hello;
use backtide_recovery::{DiskLog, LogError, Salvage, SettleTicket};
use backtide_units::DiskId;

use crate::{
    Shelf,
    disk::{Disk, Wanted},
    disks::{Disks, check_attached},
    ingest::Ingest,
    log_mark::LogMark,
    memo::Memo,
    past::EndedLog,
};

/// What is left of a log is not read again sooner than so many times what it took to find that it cannot be.
const SELDOM: u32 = 8;

/// That nothing could be read of a log that failed.
pub(crate) struct Unread {
    /// Of this opening of it.
    life: u64,
    took: Duration,
    found: Instant,
}

impl Unread {
    /// Whether it may be tried again at `now`.
    fn is_long_ago(&self, now: Instant) -> bool {
        now.duration_since(self.found) >= self.took.saturating_mul(SELDOM)
    }
}

/// A log that failed, to be opened again.
pub(crate) struct Reopening {
    shelf: Shelf,
    disk: DiskId,
    number: u32,
    /// What is left of it, when nobody has read that yet.
    wanted: Option<Wanted>,
}

/// What that came to.
pub(crate) enum Reopened {
    /// It can be used again.
    Open(Box<DiskLog>, LogMark),
    /// It never can be.
    Damaged {
        error: LogError,
        /// What can still be read of it, when nobody had read that yet and it can be.
        left: Option<Box<(Salvage, Option<Memo>)>>,
        /// What stands before a new one of it.
        ended: EndedLog,
    },
    /// Not now.
    Failed(LogError),
}

impl Reopening {
    pub(crate) fn of(shelf: &Shelf, disk: &Disk) -> Self {
        Self {
            shelf: shelf.clone(),
            disk: disk.id(),
            number: disk.log_number(),
            wanted: disk.wants_salvage(),
        }
    }

    /// Does it; blocks.
    pub(crate) fn run(self) -> Reopened {
        let Self { shelf, disk, number, wanted } = self;
        let opened = shelf.open(disk, number).and_then(|log| {
            let mark = shelf.mark(disk, number, &log)?;
            Ok((log, mark))
        });
        match opened {
            Ok((log, mark)) => Reopened::Open(Box::new(log), mark),
            Err(error @ LogError::Damaged { .. }) => {
                let left = wanted.and_then(|wanted| shelf.left_of(disk, number, &wanted));
                let ended = shelf.ended(disk, number);
                Reopened::Damaged { error, left: left.map(Box::new), ended }
            }
            Err(error) => Reopened::Failed(error),
        }
    }
}

impl Disks {
    /// Whether the log of this hello's disk is to be opened again before the claim. A hello that may not have the disk changes
    /// nothing.
    fn may_reopen(&self, hello: &Hello) -> bool {
        let shelf = self.shelf();
        self.get(hello.disk).is_some_and(|disk| {
            disk.failure().is_some()
                && !disk.is_unlisted()
                && check_attached(disk.attached(), hello).is_ok()
                && shelf.forgotten.admit(hello, true).is_ok()
                && shelf.watch.check().is_ok()
        })
    }

    /// Begins that; none when it is done already, or cannot be yet.
    fn begin_reopening(&mut self, disk: DiskId) -> Option<Reopening> {
        let shelf = self.shelf().clone();
        let disk = self.get_mut(disk)?;
        disk.begin_reopening().then(|| Reopening::of(&shelf, disk))
    }
}

/// Where a log begins is being made durable.
pub(crate) enum Settling {
    /// By this, for the log is in use.
    InUse(Box<SettleTicket>),
    /// It is, or cannot be now.
    Closed(Result<(), String>),
}

impl Ingest {
    /// Makes durable where a log of a disk begins: at once when it is not in use, where that holds up no other disk.
    pub(crate) async fn settle(&self, disk: DiskId, log: u32) -> Settling {
        self.until_reopened(disk).await;
        let shelf = {
            let disks = self.disks.borrow();
            let Some(state) = disks.get(disk) else {
                return Settling::Closed(Err("the disk is being forgotten".to_owned()));
            };
            if let Some(ticket) = state.settle(log) {
                return Settling::InUse(Box::new(ticket));
            }
            if state.is_worked_on() {
                return Settling::Closed(Err("work on the log's files has not ended".to_owned()));
            }
            disks.shelf().clone()
        };
        self.reopening.borrow_mut().insert(disk);
        let settled = self.readers.run(move || shelf.settle_closed(disk, log)).await;
        self.reopening.borrow_mut().remove(&disk);
        self.synced.notify_waiters();
        Settling::Closed(settled.unwrap_or_else(|given_up| Err(given_up.to_string())))
    }

    /// Lists the logs of a disk again, if that failed, and opens the newest, where that holds up no other disk.
    pub(crate) async fn list_again(&self, disk: DiskId) {
        let is_unlisted = || self.disks.borrow().get(disk).is_some_and(Disk::is_unlisted);
        if is_unlisted() {
            self.until_reopened(disk).await;
        }
        if !is_unlisted() {
            return;
        }
        let shelf = self.disks.borrow().shelf().clone();
        self.reopening.borrow_mut().insert(disk);
        let look = move || {
            let found = shelf.open_disk(disk);
            // Of a store that is not there nothing is found either.
            shelf.watch.check().is_ok().then_some(found)
        };
        if let Ok(Some(found)) = self.readers.run(look).await {
            self.disks.borrow_mut().listed(disk, found);
        }
        self.reopening.borrow_mut().remove(&disk);
        self.synced.notify_waiters();
    }

    /// Opens the log of a hello's disk again, if it failed, where that holds up no other disk.
    pub(crate) async fn prepare(&self, hello: &Hello) {
        let disk = hello.disk;
        while self.disks.borrow().may_reopen(hello) {
            // Registered before the look, so that no end is missed between.
            let ended = self.synced.notified();
            if self.reopening.borrow().contains(&disk) {
                ended.await;
                continue;
            }
            let Some(work) = self.disks.borrow_mut().begin_reopening(disk) else { break };
            self.reopening.borrow_mut().insert(disk);
            let reopened = self.readers.run(move || work.run()).await;
            self.unread.borrow_mut().remove(&disk);
            if let Some(state) = self.disks.borrow_mut().get_mut(disk) {
                state.end_reopening(reopened.ok());
            }
            self.reopening.borrow_mut().remove(&disk);
            self.synced.notify_waiters();
            break;
        }
    }

    /// What could not be read may be by now: it is tried again when somebody asks.
    pub(crate) fn look_again(&self) {
        let now = Instant::now();
        self.unread.borrow_mut().retain(|_, unread| !unread.is_long_ago(now));
    }

    /// Has what is left of a log that is out of use read, where that holds up no other disk; once, if it can be, and if not,
    /// not again before something has changed.
    pub(crate) async fn make_readable(&self, disk: DiskId) {
        self.list_again(disk).await;
        self.until_reopened(disk).await;
        let wanted = {
            let disks = self.disks.borrow();
            disks.get(disk).and_then(|state| {
                Some((state.life(), state.log_number(), disks.shelf().clone(), state.wants_salvage()?))
            })
        };
        let Some((life, number, shelf, wanted)) = wanted else { return };
        if self.unread.borrow().get(&disk).is_some_and(|unread| unread.life == life) {
            return;
        }
        self.reopening.borrow_mut().insert(disk);
        let begun = Instant::now();
        let left = self.readers.run(move || shelf.left_of(disk, number, &wanted)).await;
        match (self.disks.borrow_mut().get_mut(disk), left) {
            (Some(state), Ok(Some((salvaged, memo)))) if state.life() == life => {
                state.salvaged(salvaged, memo);
            }
            (Some(state), Ok(None)) if state.life() == life => {
                let found = Instant::now();
                let unread = Unread { life, took: found.duration_since(begun), found };
                self.unread.borrow_mut().insert(disk, unread);
            }
            _ => {}
        }
        self.reopening.borrow_mut().remove(&disk);
        self.synced.notify_waiters();
    }

    /// Waits until nobody opens the disk's log again, or reads what is left of it.
    pub(crate) async fn until_reopened(&self, disk: DiskId) {
        loop {
            // Registered before the look, so that no end is missed between.
            let ended = self.synced.notified();
            if !self.reopening.borrow().contains(&disk) {
                break;
            }
            ended.await;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_took_long_and_failed_is_tried_again_later_than_what_did_not() {
        let found = Instant::now();
        let after = |took: u64| Unread { life: 1, took: Duration::from_secs(took), found };
        let seconds = |seconds| found + Duration::from_secs(seconds);
        assert!(after(0).is_long_ago(seconds(0)));
        assert!(!after(60).is_long_ago(seconds(60 * 8 - 1)));
        assert!(after(60).is_long_ago(seconds(60 * 8)));
    }
}
