//! The moment in which a log begins later, and what is left of one that failed.
//!
//! While it is not known durably where a log begins nobody is promised what it may begin without (`policy.rs`), so it does not
//! matter which it is. The log itself goes on with what it began with; that is made durable first, before anything else goes.

use backtide_recovery::{RebaseTicket, Rebased};
use backtide_units::DiskId;

use super::{Undone, Work, ask};
use crate::{disk::chain, ingest::Task, retention::policy::Doubts};

impl Work {
    /// Lets a log begin later; false when it was closed meanwhile.
    pub(super) fn begin_later(
        &self,
        disk: DiskId,
        life: u64,
        ticket: RebaseTicket,
        doubts: &mut Doubts,
    ) -> Result<bool, Undone> {
        let rebased: Box<Rebased> = match ticket.write() {
            Ok(Some(rebased)) => Box::new(rebased),
            Ok(None) => return Ok(false),
            Err(error) => {
                doubts.extend(error.doubt.map(|doubt| (disk, doubt)));
                return Err(error.source.into());
            }
        };
        ask(self.thread_of(disk), |answer| Task::Rebased { disk, life, rebased, answer })?;
        Ok(true)
    }

    /// Makes durable what the log of a disk begins with, where that is in doubt.
    pub(super) fn settle(&self, disk: DiskId) -> Result<(), Undone> {
        if !self.policies.is_in_doubt(disk) {
            return Ok(());
        }
        let still = |why: &str| {
            Undone::Why(format!(
                "it is not known durably where the log begins, so nobody is promised older points: {why}"
            ))
        };
        let ticket = ask(self.thread_of(disk), |answer| Task::Settle(disk, answer))?;
        match ticket.map(|ticket| ticket.write()) {
            Some(Ok(true)) => {
                self.policies.end_doubt(disk);
                Ok(())
            }
            Some(Ok(false)) | None => Err(still("the log is closed")),
            Some(Err(error)) => Err(still(&chain(&error))),
        }
    }
}
