//! A disk whose log is out of use: what can still be read of it, and its way back into use.

use backtide_receiver_api::Touched;
use backtide_recovery::{Attached, DiskLog, LastWork, LogError, Salvage};
use backtide_units::DiskId;

use super::{Disk, Failed, Failure, Left, Log, Wanted};
use crate::{
    commit_ticket::next_life,
    log_mark::LogMark,
    memo::Memo,
    past::{EndedLog, Past},
    reopening::Reopened,
    session::ConnectionId,
    touched::touched,
};

impl Disk {
    /// A disk whose directory cannot be listed, with the newest attach that something else tells of: until it is listed
    /// nothing of it is opened or read, for an older log may look like the newest.
    pub(crate) fn unlisted(id: DiskId, error: &LogError, attached: Option<Attached>) -> Self {
        let failed = Failed { failure: Failure::from(error), attached, unlisted: true, ..Failed::default() };
        Self {
            log: Log::Failed(Box::new(failed)),
            ..Self::new(id, 1, Err(Failure::default()), Past::default())
        }
    }

    /// Whether it is such a disk.
    pub(crate) fn is_unlisted(&self) -> bool {
        match &self.log {
            Log::Failed(failed) => failed.unlisted,
            Log::Open(..) => false,
        }
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

    /// Whether the log is out of use and nobody has read yet what is left of it.
    pub(crate) fn wants_salvage(&self) -> Option<Wanted> {
        match &self.log {
            Log::Failed(failed) if failed.left.is_none() && !failed.unlisted => {
                Some(Wanted { through: failed.through })
            }
            Log::Failed(_) | Log::Open(..) => None,
        }
    }

    /// Takes what is left of a log that is out of use.
    pub(crate) fn salvaged(&mut self, salvaged: Salvage, memo: Option<Memo>) {
        let Log::Failed(failed) = &mut self.log else { return };
        let Salvage { snapshot, damage, .. } = salvaged;
        let own = snapshot.timeline().attached().cloned();
        let attached = match (own, memo.map(|memo| memo.attached)) {
            (Some(own), Some(memo)) if memo.epoch > own.epoch => Some(memo),
            (Some(own), _) => Some(own),
            (None, memo) => memo,
        };
        failed.left = Some(Left { snapshot, damage, attached });
    }

    /// Puts a recovered log into use and gives the connection that had the failed one. That one loses
    /// the disk: entry numbers it waits for may be those of other entries now.
    pub(crate) fn reopened(&mut self, log: DiskLog, mark: LogMark) -> Option<ConnectionId> {
        self.log = Log::Open(Box::new(log), mark);
        self.life = next_life();
        self.owner.take()
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

    /// Takes what that came to.
    pub(crate) fn take_reopened(&mut self) -> Option<Reopened> {
        match &mut self.log {
            Log::Open(..) => None,
            Log::Failed(failed) => failed.reopened.take(),
        }
    }
}
