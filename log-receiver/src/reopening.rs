//! Opening a log again that failed, for an agent whose hello may have its disk.
//!
//! It reads the end of the log, or all that is left of one that is damaged: on a slow device that takes as long as it takes, so a
//! receiver has it done where blocking is fine ([`Ingest::prepare`]) before the claim, which then finds it done. A simulation
//! has it done within the claim. In the same way such a log is opened again for whoever asks for its points, or what is left of it
//! is read when it cannot be, and a disk whose directory could not be listed is opened as at a start for an agent or whoever
//! asks for its points. That can fail after all of a log was read but its end, so who asks next has it done again only when
//! something has changed: a hello has tried to open the log, or a round of retention has come, and more time has gone than it
//! took, many times over.
//!
//! Invariants: at most one is under way of a disk, and nobody reads the log's files or gives up the disk meanwhile; what it
//! came to is used by the next claim or the next reader, or by none, for nothing else writes to a log that failed but what makes
//! durable where it begins, which is as an opening does it. A reader has it done for a log that could not be opened
//! or read in full, for a device that cannot read a place may be able to later.

use std::time::{Duration, Instant};

use backtide_protocol::{CloseCode, Hello};
use backtide_recovery::{DiskLog, LogError, SettleTicket};
use backtide_units::DiskId;

use crate::{
    Shelf,
    disk::{Disk, Failure, Wanted, WantedLook},
    disks::{Disks, check_attached, closed},
    ingest::Ingest,
    log_mark::LogMark,
    logs::LeftOver,
    past::EndedLog,
};

/// What is left of a log is not read again sooner than so many times what it took to find that it cannot be.
const SELDOM: u32 = 8;

/// That a log that failed could not be opened or read in full.
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
        left: Option<Box<LeftOver>>,
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
        match shelf.open_marked(disk, number) {
            Ok((log, mark)) => Reopened::Open(Box::new(log), mark),
            Err(error @ LogError::Damaged { .. }) => {
                let left = wanted.map(|wanted| shelf.left_of(disk, number, &wanted));
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

/// A look at a log that is out of use, for whoever reads.
struct LookToDo {
    shelf: Shelf,
    disk: DiskId,
    number: u32,
    /// It may be whole again.
    opens: bool,
    wanted: Option<Wanted>,
}

/// What it came to.
enum Look {
    Open(Box<DiskLog>, LogMark),
    Left {
        /// Why it cannot be opened.
        error: Option<LogError>,
        left: Option<Box<LeftOver>>,
    },
}

impl LookToDo {
    /// Has it; blocks.
    fn run(self) -> Look {
        let Self { shelf, disk, number, opens, wanted } = self;
        let error = match opens.then(|| shelf.open_marked(disk, number)) {
            Some(Ok((log, mark))) => return Look::Open(Box::new(log), mark),
            Some(Err(error)) => Some(error),
            None => None,
        };
        let left = wanted.map(|wanted| Box::new(shelf.left_of(disk, number, &wanted)));
        Look::Left { error, left }
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
        // What was found for a claim that did not come says nothing any more.
        self.disks.borrow_mut().drop_failed_reopenings();
    }

    /// Has what is left of a log that is out of use read, where that holds up no other disk; once, if it can be, and if not,
    /// not again before something has changed.
    pub(crate) async fn make_readable(&self, disk: DiskId) {
        self.list_again(disk).await;
        self.until_reopened(disk).await;
        let (found, life, took) = match self.begin_look(disk) {
            None => return,
            // A claim that did not come.
            Some((Ok(found), life)) => (Some(found), life, None),
            Some((Err(look), life)) => {
                self.reopening.borrow_mut().insert(disk);
                let begun = Instant::now();
                let found = self.readers.run(move || look.run()).await;
                self.reopening.borrow_mut().remove(&disk);
                (found.ok(), life, Some(begun.elapsed()))
            }
        };
        let took = took.unwrap_or_default();
        let is_open = matches!(found, Some(Look::Open(..)));
        self.end_look(disk, found, life);
        if is_open {
            self.unread.borrow_mut().remove(&disk);
        } else {
            self.unread.borrow_mut().insert(disk, Unread { life, took, found: Instant::now() });
        }
        self.synced.notify_waiters();
    }

    /// What is to be done about the log, or what was found already; none when it is in use or nothing can be done now. And
    /// which opening of the log that is about.
    fn begin_look(&self, disk: DiskId) -> Option<(Result<Look, LookToDo>, u64)> {
        let mut disks = self.disks.borrow_mut();
        let shelf = disks.shelf().clone();
        let state = disks.get_mut(disk)?;
        let life = state.life();
        if let Some((log, mark)) = state.take_opened() {
            return Some((Ok(Look::Open(log, mark)), life));
        }
        let WantedLook { opens, wanted } = state.wants_look()?;
        if self.unread.borrow().get(&disk).is_some_and(|unread| unread.life == life) {
            return None;
        }
        // Of a store that is not there nothing is opened, nor of one that a claim is about to.
        let opens = opens && shelf.watch.check().is_ok() && state.begin_reopening();
        let number = state.log_number();
        (opens || wanted.is_some()).then_some((Err(LookToDo { shelf, disk, number, opens, wanted }), life))
    }

    fn end_look(&self, disk: DiskId, found: Option<Look>, life: u64) {
        let mut disks = self.disks.borrow_mut();
        let Some(state) = disks.get_mut(disk).filter(|state| state.life() == life) else { return };
        state.end_reopening(None);
        match found {
            None => {}
            Some(Look::Open(log, mark)) => {
                tracing::info!(%disk, "a log that failed is open again");
                let displaced = disks.opened_to_read(disk, *log, mark);
                drop(disks);
                if let Some(displaced) = displaced {
                    let why = "the disk's log failed and was opened again: connect again";
                    self.close(displaced, closed(CloseCode::Store, why));
                }
            }
            Some(Look::Left { error, left }) => {
                if let Some(error) = error {
                    state.not_opened(Failure::from(&error));
                }
                if let Some(left) = left {
                    state.salvaged(*left);
                }
            }
        }
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
