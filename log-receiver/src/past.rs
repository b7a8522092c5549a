//! What is left of the logs that a disk had before the one in use.
//!
//! They have ended: nobody appends to them. What retention does to one of them, that is that it begins later or keeps single
//! points alone, it does with leave of the disk's owner, which keeps everybody else from the disk's files meanwhile and takes what
//! is left of the log then ([`Leave`]). So it is with the newest log when that is damaged and its agent has not come again: that
//! one begins later only, and its damage stays in it unless all of it lay in what was folded.

use backtide_recovery::{Attached, Base, LogIdentity, RebaseError, Salvage, Snapshot, rebase_closed};
use backtide_units::{ByteCount, DiskId, Lsn};
use tokio::sync::oneshot;

use crate::{
    Shelf,
    disk::{DamagedLog, Disk, Wanted, chain},
    ingest::Ingest,
    logs::LeftOver,
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
    /// Of that what keeps points from being read that may be there again the next time.
    pub(crate) away: Option<String>,
    attached: Option<Attached>,
    /// Bytes of it that can be read.
    bytes: ByteCount,
}

impl EndedLog {
    fn of(number: u32, salvaged: Salvage, memo: Option<Memo>) -> Self {
        let Salvage { identity, snapshot, damage, size: bytes, away, .. } = salvaged;
        let identity = identity.or(memo.as_ref().map(|memo| memo.identity));
        let own = snapshot.timeline().attached().cloned();
        let attached = newest(own, memo.map(|memo| memo.attached));
        Self { number, identity, snapshot: Some(snapshot), damage, away, attached, bytes }
    }

    /// Whether it is more than the images that retention has left of it, or than nothing.
    pub(crate) fn has_segments(&self) -> bool {
        !self.snapshot.as_ref().and_then(Snapshot::base).is_some_and(Base::is_ended)
    }

    /// It keeps the disk's name, and its fence.
    fn unreadable(number: u32, why: String, memo: Option<Memo>) -> Self {
        let (snapshot, bytes) = (None, ByteCount::ZERO);
        let attached = memo.map(|memo| memo.attached);
        Self { number, identity: None, snapshot, damage: vec![why], away: None, attached, bytes }
    }
}

/// Of equal epochs the first: a memo knows no more than its log.
pub(crate) fn newest(first: Option<Attached>, second: Option<Attached>) -> Option<Attached> {
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
                EndedLog::unreadable(number, why, self.memo(disk, number))
            }
        }
    }

    /// Lets a log begin with `base` that has ended, durably, and reads what is left of it; blocks. Who reads it already goes on
    /// as before. Whoever calls this has [`Leave`].
    ///
    /// # Errors
    /// See [`rebase_closed`].
    pub(crate) fn rebase_ended(
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

    /// The same of the newest log, which is damaged.
    ///
    /// # Errors
    /// See [`rebase_closed`].
    pub(crate) fn rebase_damaged(
        &self,
        disk: DiskId,
        log: &DamagedLog,
        base: &Base,
        before: Option<&Base>,
    ) -> Result<LeftOver, RebaseError> {
        let images = self.cache.images(&self.storage);
        rebase_closed(base, before, &*self.storage, &Self::dir(disk, log.number), &images)?;
        Ok(self.left_of(disk, log.number, &Wanted { through: log.through }))
    }
}

/// What is left of a log that begins later.
pub(crate) enum Remains {
    /// It has ended.
    Ended(EndedLog),
    /// It is the newest, and damaged.
    Damaged(Box<LeftOver>),
}

/// Leave to work on a log that nobody has open, until this is dropped: nobody opens, settles or removes a log of the disk
/// meanwhile.
pub(crate) struct Leave {
    /// What the log begins with now, if it begins with anything.
    pub(crate) before: Option<Base>,
    /// It is the disk's newest.
    pub(crate) is_newest: bool,
    done: oneshot::Sender<Remains>,
    over: oneshot::Receiver<()>,
}

impl Leave {
    /// Ends it with what is left of the log now, and waits until whoever asks is told of that; blocks.
    pub(crate) fn end(self, remains: Remains) {
        let Self { done, over, .. } = self;
        // The receiver may be ending.
        let _ = done.send(remains);
        let _ = over.blocking_recv();
    }
}

impl Ingest {
    /// Gives leave to work on a log of a disk that has ended, or is the newest and damaged, and waits until it is over; none when
    /// there is no such log that can be read.
    pub(crate) async fn give_leave(&self, disk: DiskId, number: u32, answer: oneshot::Sender<Option<Leave>>) {
        self.until_reopened(disk).await;
        let begun = self.disks.borrow_mut().get_mut(disk).and_then(|state| state.begin_fold(number));
        let Some((before, is_newest)) = begun else { return drop(answer.send(None)) };
        let ((done, remains), (told, over)) = (oneshot::channel(), oneshot::channel());
        self.reopening.borrow_mut().insert(disk);
        // Whoever asked may have gone: then nothing comes.
        drop(answer.send(Some(Leave { before, is_newest, done, over })));
        let remains = remains.await.ok();
        if let Some(state) = self.disks.borrow_mut().get_mut(disk) {
            state.end_fold(is_newest, remains);
        }
        self.reopening.borrow_mut().remove(&disk);
        self.synced.notify_waiters();
        let _ = told.send(());
    }
}

impl Disk {
    /// What a log begins with that is to begin later, if it begins with anything, and whether it is the newest; none when there is
    /// none that has ended or is damaged and can be read.
    fn begin_fold(&mut self, number: u32) -> Option<(Option<Base>, bool)> {
        if let Some(before) = self.ended_base(number) {
            return Some((before, false));
        }
        let damaged = self.damaged_log().filter(|log| log.number == number)?;
        let before = damaged.snapshot.base().cloned();
        self.begin_reopening().then_some((before, true))
    }

    fn end_fold(&mut self, is_newest: bool, remains: Option<Remains>) {
        if is_newest {
            self.end_reopening(None);
        }
        match remains {
            Some(Remains::Ended(ended)) => self.put_ended(ended),
            Some(Remains::Damaged(left)) => self.salvaged(*left),
            None => {}
        }
    }

    /// What a log begins with that has ended, if it begins with anything; none when there is no such log that can be read.
    fn ended_base(&self, number: u32) -> Option<Option<Base>> {
        let log = self.past().logs().iter().find(|log| log.number == number)?;
        Some(log.snapshot.as_ref()?.base().cloned())
    }
}

#[cfg(test)]
mod tests {
    use backtide_units::{ByteCount, CaptureTime, Epoch, HistoryId};
    use uuid::Uuid;

    use super::*;

    #[test]
    fn a_log_of_which_nothing_can_be_read_keeps_its_name_and_its_fence_and_the_newest_attach_counts() {
        let identity =
            LogIdentity { disk: DiskId(Uuid::from_u128(1)), history: HistoryId(Uuid::from_u128(2)) };
        let memo = |epoch| {
            let (name, size) = ("vm1".parse().unwrap(), ByteCount(1 << 20));
            let (attach, time) = (Uuid::from_u128(epoch), CaptureTime(0));
            let epoch = Epoch(epoch as u64);
            Some(Memo { identity, attached: Attached { epoch, attach, name, size, time } })
        };
        let mut past = Past::default();
        for (number, epoch, newest) in [(1, 4, 4), (2, 9, 9), (3, 6, 9)] {
            past.put(EndedLog::unreadable(number, "the device failed".to_owned(), memo(epoch)));
            assert_eq!(past.attached.as_ref().map(|attached| attached.epoch), Some(Epoch(newest)));
        }
        past.put(EndedLog::unreadable(2, "nothing tells".to_owned(), None));
        assert_eq!(past.attached.map(|attached| attached.epoch), Some(Epoch(6)));
    }
}
