//! The moment in which a log begins later, and what is left of one that failed.
//!
//! While it is not known durably where a log begins nobody is promised what it may begin without (`policy.rs`), so it does not
//! matter which it is. The log itself goes on with what it began with; that is made durable first, before anything else goes.

use std::collections::BTreeMap;

use backtide_recovery::Rebased;
use backtide_units::DiskId;

use super::{Ending, Undone, Work, ask, lock};
use crate::{
    disk::{Rebasing, chain},
    ingest::Task,
    reopening::Settling,
    retention::doubts::Doubts,
};

impl Work {
    /// Lets a log begin later; false when it was closed meanwhile.
    pub(super) fn begin_later(
        &self,
        disk: DiskId,
        rebasing: Rebasing,
        doubts: &mut Doubts,
    ) -> Result<bool, Undone> {
        let Rebasing { life, number, ticket } = rebasing;
        let rebased: Box<Rebased> = match ticket.write() {
            Ok(Some(rebased)) => Box::new(rebased),
            Ok(None) => return Ok(false),
            Err(error) => {
                if let Some(doubt) = error.doubt {
                    doubts.begin(disk, number, doubt);
                }
                return Err(error.source.into());
            }
        };
        ask(self.thread_of(disk), |answer| Task::Rebased { disk, life, rebased, answer })?;
        Ok(true)
    }

    /// Makes durable what logs begin with of which that is in doubt, whether or not they are in use; says which disks stay in
    /// doubt, and of which of them the log in use.
    pub(super) fn settle_all(&self) -> Result<BTreeMap<DiskId, bool>, Ending> {
        let mut doubtful = BTreeMap::new();
        for (disk, log) in self.policies.in_doubt() {
            let settling = ask(self.thread_of(disk), |answer| Task::Settle { disk, log, answer })?;
            let in_use = matches!(settling, Settling::InUse(_));
            let settled = match settling {
                Settling::InUse(ticket) => match ticket.write() {
                    Ok(true) => Ok(()),
                    Ok(false) => Err("the log is closed".to_owned()),
                    Err(error) => Err(chain(&error)),
                },
                Settling::Closed(settled) => settled,
            };
            match settled {
                Ok(()) => self.policies.end_doubt(disk, log),
                Err(why) => {
                    let why = format!(
                        "it is not known durably where a log of the disk begins, so nobody is promised older points: {why}"
                    );
                    tracing::warn!(%disk, log, why, "a log is in doubt");
                    lock(&self.shared.status).errors.insert(disk, why);
                    *doubtful.entry(disk).or_default() |= in_use;
                }
            }
        }
        Ok(doubtful)
    }
}
