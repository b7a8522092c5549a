//! A disk whose log is out of use: what can still be read of it, and its way back into use.

use std::collections::BTreeMap;

use backtide_receiver_api::Touched;
use backtide_recovery::{Attached, DiskLog, LastWork, LogError, Salvage, Seq, Snapshot};
use backtide_units::{DiskId, Lsn};

use super::{Disk, Failed, Failure, Left, Log, Wanted};
use crate::{
    commit_ticket::next_life,
    log_mark::LogMark,
    logs::LeftOver,
    past::{EndedLog, Past, newest},
    reopening::Reopened,
    session::ConnectionId,
    shortfalls::Shortfalls,
    touched::touched,
};

/// A disk's newest log when that is damaged: another one begins behind it once its agent comes again. Nobody writes to it, and
/// nobody opens it but for that agent.
pub(crate) struct DamagedLog {
    /// Which of the disk's logs.
    pub(crate) number: u32,
    /// What can be read of it, alone.
    pub(crate) snapshot: Snapshot,
    /// How far it was durable when it failed; none when it was never open.
    pub(crate) through: Option<Seq>,
}

/// What a reader may have done about a log that is out of use.
pub(crate) struct WantedLook {
    /// Open it again: it is not known to be damaged.
    pub(crate) opens: bool,
    /// Read what is left of it.
    pub(crate) wanted: Option<Wanted>,
}

impl Failed {
    /// Whether it was never open, so that nobody knows all of it, or what was durable of it cannot all be read.
    fn may_lack_something(&self) -> bool {
        let whole = self.left.as_ref().is_some_and(|left| !left.unread && left.damage.is_empty());
        self.through.is_none() || !whole
    }
}

impl Disk {
    /// A disk whose directory cannot be listed, with the newest attach that something else tells of: until it is listed
    /// nothing of it is opened or read, for an older log may look like the newest.
    pub(crate) fn unlisted(
        id: DiskId,
        error: &LogError,
        attached: Option<Attached>,
        shortfalls: Shortfalls,
    ) -> Self {
        let failed = Failed { failure: Failure::from(error), attached, unlisted: true, ..Failed::default() };
        Self {
            log: Log::Failed(Box::new(failed)),
            ..Self::new(id, 1, Err(Failure::default()), Past::default(), shortfalls)
        }
    }

    /// Whether it is such a disk.
    pub(crate) fn is_unlisted(&self) -> bool {
        match &self.log {
            Log::Failed(failed) => failed.unlisted,
            Log::Open(..) => false,
        }
    }

    /// The first point of each of the disk's logs that has one, by number.
    pub(crate) fn begins(&self) -> BTreeMap<u32, Lsn> {
        let left = match &self.log {
            Log::Failed(failed) => failed.left.as_ref().map(|left| left.snapshot.timeline()),
            Log::Open(..) => None,
        };
        let first = self.timeline().or(left).and_then(|timeline| timeline.intervals().first());
        let newest = first.map(|first| (self.number, first.from.lsn));
        let before = self.past.logs().iter().filter_map(|log| {
            Some((log.number, log.snapshot.as_ref()?.timeline().intervals().first()?.from.lsn))
        });
        before.chain(newest).collect()
    }

    /// The points that went with what its logs have lost.
    pub(crate) fn lost_points(&self) -> Vec<Touched> {
        let mut lost = Vec::new();
        if let Some(past) = &self.past.snapshot {
            // The log in use goes on behind them.
            let next = self.timeline().and_then(|timeline| timeline.intervals().first());
            for why in self.past.damage() {
                let mut found = past.lost_with(why);
                let open = found.spans.iter_mut().filter(|span| span.to.is_none());
                open.for_each(|span| span.to = next.map(|interval| interval.from));
                lost.push(touched(why, &found));
            }
        }
        if let Log::Failed(failed) = &self.log
            && let Some(left) = &failed.left
        {
            lost.extend(left.damage.iter().map(|why| touched(why, &left.snapshot.lost_with(why))));
        }
        lost
    }

    /// What is to be read of a log that is out of use: nobody has read yet what is left of it, or the device could not read
    /// all of it.
    pub(crate) fn wants_salvage(&self) -> Option<Wanted> {
        match &self.log {
            Log::Failed(failed)
                if !failed.unlisted && failed.left.as_ref().is_none_or(|left| left.unread) =>
            {
                Some(Wanted { through: failed.through })
            }
            Log::Failed(_) | Log::Open(..) => None,
        }
    }

    /// What a reader may have done about a log that is out of use, if anything: it may be whole again, or more of it may be
    /// readable.
    pub(crate) fn wants_look(&self) -> Option<WantedLook> {
        let Log::Failed(failed) = &self.log else { return None };
        // One that failed in use is its agent's, unless what was durable of it was found not to be all there.
        let looked_at = failed.through.is_none() || failed.left.is_some();
        let lacks = looked_at && failed.may_lack_something();
        let opens = lacks && !failed.failure.damaged && !self.is_worked_on();
        let wanted = self.wants_salvage();
        let any = !failed.unlisted && (opens || wanted.is_some());
        any.then_some(WantedLook { opens, wanted })
    }

    /// Why not everything may be there that was acknowledged, of a log that is out of use: none when all that was durable of it
    /// is served.
    pub(crate) fn may_lack_something(&self) -> Option<&Failure> {
        match &self.log {
            Log::Failed(failed) if failed.failure.damaged || failed.may_lack_something() => {
                Some(&failed.failure)
            }
            Log::Failed(_) | Log::Open(..) => None,
        }
    }

    /// The newest log when that is damaged, all that is left of it is known, and nobody works on its files or is about to claim
    /// it. What the device cannot read now is no damage: it may be read later.
    pub(crate) fn damaged_log(&self) -> Option<DamagedLog> {
        let Log::Failed(failed) = &self.log else { return None };
        let left = failed.left.as_ref().filter(|left| !left.unread)?;
        let at_rest = failed.failure.damaged && failed.reopened.is_none() && !self.is_worked_on();
        at_rest.then(|| DamagedLog {
            number: self.number,
            snapshot: left.snapshot.clone(),
            through: failed.through,
        })
    }

    /// Takes what is left of a log that is out of use.
    pub(crate) fn salvaged(&mut self, left: LeftOver) {
        let Log::Failed(failed) = &mut self.log else { return };
        let LeftOver { salvaged, memo, unread } = left;
        let Some(Salvage { snapshot, damage, size, .. }) = salvaged else {
            // It keeps its name, and its fence.
            failed.attached = newest(failed.attached.take(), memo.map(|memo| memo.attached));
            return;
        };
        let attached = newest(snapshot.timeline().attached().cloned(), memo.map(|memo| memo.attached));
        failed.bytes = size;
        failed.left = Some(Left { snapshot, damage, attached, unread });
    }

    /// Puts a recovered log into use and gives the connection that had the failed one. That one loses
    /// the disk: entry numbers it waits for may be those of other entries now.
    pub(crate) fn reopened(&mut self, log: DiskLog, mark: LogMark) -> Option<ConnectionId> {
        self.log = Log::Open(Box::new(log), mark);
        self.life = next_life();
        self.owner.take().map(|(connection, _)| connection)
    }

    /// Puts a new log into use behind a damaged one, of which `ended` is left. Gives the connection that had that one.
    pub(crate) fn begun_anew(
        &mut self,
        log: DiskLog,
        mark: LogMark,
        number: u32,
        ended: EndedLog,
    ) -> Option<ConnectionId> {
        self.number = number;
        self.past.put(ended);
        self.reopened(log, mark)
    }

    /// Whether another thread still works on the files of a log that failed: it cannot be opened before that ends.
    pub(crate) fn is_worked_on(&self) -> bool {
        match &self.log {
            Log::Open(..) => false,
            Log::Failed(failed) => {
                failed.reopening || failed.work.as_ref().is_some_and(LastWork::is_under_way)
            }
        }
    }

    /// Notes that another thread opens the log again; false when it need not, or must not yet.
    pub(crate) fn begin_reopening(&mut self) -> bool {
        if self.is_worked_on() {
            return false;
        }
        match &mut self.log {
            Log::Failed(failed) if failed.reopened.is_none() => {
                failed.reopening = true;
                true
            }
            Log::Failed(_) | Log::Open(..) => false,
        }
    }

    /// That has ended; what it came to is for the next claim.
    pub(crate) fn end_reopening(&mut self, reopened: Option<Reopened>) {
        if let Log::Failed(failed) = &mut self.log {
            failed.reopening = false;
            failed.reopened = reopened;
        }
    }

    /// Takes the log when that has opened it.
    pub(crate) fn take_opened(&mut self) -> Option<(Box<DiskLog>, LogMark)> {
        let Log::Failed(failed) = &mut self.log else { return None };
        match failed.reopened.take() {
            Some(Reopened::Open(log, mark)) => Some((log, mark)),
            other => {
                failed.reopened = other;
                None
            }
        }
    }

    /// Notes why a log that is out of use cannot be opened now.
    pub(crate) fn not_opened(&mut self, failure: Failure) {
        if let Log::Failed(failed) = &mut self.log
            && failed.failure != failure
        {
            tracing::error!(disk = %self.id, why = failure.why, "the disk's log cannot be opened again");
            failed.failure = failure;
        }
    }

    /// Forgets what that came to, unless it has opened the log.
    pub(crate) fn drop_failed_reopening(&mut self) {
        if let Log::Failed(failed) = &mut self.log {
            failed.reopened.take_if(|reopened| !matches!(reopened, Reopened::Open(..)));
        }
    }

    /// Takes what that came to.
    pub(crate) fn take_reopened(&mut self) -> Option<Reopened> {
        match &mut self.log {
            Log::Open(..) => None,
            Log::Failed(failed) => failed.reopened.take(),
        }
    }
}
