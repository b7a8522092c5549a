//! What is left of the logs that a disk had before the one in use.
//!
//! They have ended: nobody appends to them. What retention does to one of them, that is that it begins later or keeps single
//! points alone, goes by its disk's owner, which sees to it that nobody else works on the disk's files meanwhile, and
//! reads it anew then ([`Ingest::rebase_ended`]).

use std::io;

use backtide_recovery::{
    Attached, Base, LogError, LogIdentity, RebaseError, Salvage, Snapshot, rebase_closed,
};
use backtide_units::{ByteCount, DiskId, Lsn};

use crate::{
    Shelf,
    disk::{Disk, chain},
    ingest::Ingest,
    memo::Memo,
};

/// What is left of them, the oldest first.
#[derive(Clone, Default)]
pub(crate) struct Past {
    logs: Vec<EndedLog>,
    /// All of it; none when no log has ended.
    pub(crate) snapshot: Option<Snapshot>,
    /// The newest attach that is known of it.
    pub(crate) attached: Option<Attached>,
}

/// A log that has ended.
#[derive(Clone)]
pub(crate) struct EndedLog {
    /// Which of the disk's logs.
    pub(crate) number: u32,
    /// None when nothing says it.
    pub(crate) identity: Option<LogIdentity>,
    /// What can be read of it, alone; none when nothing can.
    pub(crate) snapshot: Option<Snapshot>,
    /// What is wrong with it: sentences with file and place.
    damage: Vec<String>,
    attached: Option<Attached>,
    /// Bytes of it that can be read.
    bytes: ByteCount,
}

impl EndedLog {
    fn of(number: u32, salvaged: Salvage, memo: Option<Memo>) -> Self {
        let Salvage { identity, snapshot, damage, size: bytes, .. } = salvaged;
        let identity = identity.or(memo.as_ref().map(|memo| memo.identity));
        let own = snapshot.timeline().attached().cloned();
        let attached = newest(own, memo.map(|memo| memo.attached));
        Self { number, identity, snapshot: Some(snapshot), damage, attached, bytes }
    }

    fn unreadable(number: u32, why: String) -> Self {
        let (snapshot, attached, bytes) = (None, None, ByteCount::ZERO);
        Self { number, identity: None, snapshot, damage: vec![why], attached, bytes }
    }
}

/// Of equal epochs the first: a memo knows no more than its log.
fn newest(first: Option<Attached>, second: Option<Attached>) -> Option<Attached> {
    [first, second].into_iter().flatten().reduce(|a, b| if b.epoch > a.epoch { b } else { a })
}

impl Past {
    /// Puts a log behind those before it, or what is left of one now in the place of what was.
    pub(crate) fn put(&mut self, ended: EndedLog) {
        match self.logs.iter_mut().find(|log| log.number == ended.number) {
            Some(log) => *log = ended,
            None => self.logs.push(ended),
        }
        self.attached = self.logs.iter().fold(None, |known, log| newest(known, log.attached.clone()));
        let snapshots = self.logs.iter().filter_map(|log| log.snapshot.clone());
        self.snapshot = snapshots.reduce(|before, snapshot| snapshot.following(before));
    }

    /// The logs.
    pub(crate) fn logs(&self) -> &[EndedLog] {
        &self.logs
    }

    /// What is wrong with them: sentences with file and place.
    pub(crate) fn damage(&self) -> impl Iterator<Item = &String> {
        self.logs.iter().flat_map(|log| &log.damage)
    }

    /// Bytes of them that can be read.
    pub(crate) fn bytes(&self) -> ByteCount {
        ByteCount(self.logs.iter().map(|log| log.bytes.0).sum())
    }

    /// The highest LSN of it: new ones lie above.
    pub(crate) fn highest(&self) -> Lsn {
        self.snapshot.as_ref().map_or(Lsn::ZERO, |snapshot| snapshot.timeline().highest_lsn())
    }

    /// `snapshot` of the log in use, with the points of those before it.
    pub(crate) fn followed_by(&self, snapshot: Snapshot) -> Snapshot {
        match &self.snapshot {
            Some(before) => snapshot.following(before.clone()),
            None => snapshot,
        }
    }
}

impl Shelf {
    /// What is left of a log that has ended; blocks.
    pub(crate) fn ended(&self, disk: DiskId, number: u32) -> EndedLog {
        match self.salvage(disk, number, None) {
            Ok(salvaged) => EndedLog::of(number, salvaged, self.memo(disk, number)),
            Err(error) => {
                let why = format!("what is left of an older log cannot be read: {}", chain(&error));
                tracing::error!(%disk, log = number, why);
                EndedLog::unreadable(number, why)
            }
        }
    }

    /// Lets a log begin with `base` that has ended, durably, and reads what is left of it; blocks. Who reads it already goes on
    /// as before.
    ///
    /// # Errors
    /// See [`rebase_closed`].
    fn rebase_ended(
        &self,
        disk: DiskId,
        number: u32,
        base: &Base,
        before: Option<&Base>,
    ) -> Result<EndedLog, RebaseError> {
        let images = self.cache.images(&self.storage);
        rebase_closed(base, before, &*self.storage, &Self::dir(disk, number), &images)?;
        Ok(self.ended(disk, number))
    }
}

impl Ingest {
    /// Lets a log of a disk begin with `base` that has ended, where that holds up no other disk; false when it is not as it was
    /// any more, or the disk goes.
    ///
    /// # Errors
    /// See [`rebase_closed`].
    pub(crate) async fn rebase_ended(
        &self,
        disk: DiskId,
        number: u32,
        base: Base,
    ) -> Result<bool, RebaseError> {
        self.until_reopened(disk).await;
        let (shelf, before) = {
            let disks = self.disks.borrow();
            let Some(before) = disks.get(disk).and_then(|state| state.ended_base(number)) else {
                return Ok(false);
            };
            (disks.shelf().clone(), before)
        };
        if !base.follows(before.as_ref()) {
            return Ok(false);
        }
        self.reopening.borrow_mut().insert(disk);
        let rebased =
            self.readers.run(move || shelf.rebase_ended(disk, number, &base, before.as_ref())).await;
        let done = rebased.unwrap_or_else(|given_up| {
            let step = "fold what is left of an older log".to_owned();
            Err(RebaseError {
                source: LogError::Io { step, source: io::Error::other(given_up) },
                doubt: None,
            })
        });
        let done = done.map(|ended| {
            if let Some(state) = self.disks.borrow_mut().get_mut(disk) {
                state.put_ended(ended);
            }
            true
        });
        self.reopening.borrow_mut().remove(&disk);
        self.synced.notify_waiters();
        done
    }
}

impl Disk {
    /// What a log begins with that has ended, if it begins with anything; none when there is no such log that can be read.
    fn ended_base(&self, number: u32) -> Option<Option<Base>> {
        let log = self.past().logs().iter().find(|log| log.number == number)?;
        Some(log.snapshot.as_ref()?.base().cloned())
    }
}
