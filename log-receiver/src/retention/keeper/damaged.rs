//! What the ladder wants of a disk's newest log when that is damaged: its agent may never come again, and its history grows old
//! all the same.
//!
//! It is folded as a log in use is, from what can be read of it. Invariants: the newest point that can be read stays, and so do
//! the segment that has it and all behind it, and with them every place that tells of damage: whoever opens the log finds that as
//! before, unless all of it lay in segments that could be read and are folded. No image is made of what cannot be read; nothing
//! goes while the device cannot read all that is left, or an agent is about to claim the log.

use backtide_recovery::Base;
use backtide_units::{DiskId, Lsn};

use super::{
    Undone, Work, ask,
    thin::{Folded, Wanted},
};
use crate::{
    clock,
    disk::DamagedLog,
    ingest::Task,
    logs::LeftOver,
    past::{Leave, Remains},
    retention::{Moment, Policy, Pressure, Reach, doubts::Doubts, plan},
};

impl Work {
    /// Does what the ladder wants of it; whether that was anything.
    pub(super) fn thin_damaged(
        &mut self,
        disk: DiskId,
        log: &DamagedLog,
        pressure: Pressure,
    ) -> Result<bool, Undone> {
        let &DamagedLog { number, ref snapshot, .. } = log;
        // Of one of which images alone are left the newest stays too.
        let is_ended = snapshot.base().is_some_and(Base::is_ended);
        if is_ended || self.policies.in_doubt().iter().any(|(of, _)| *of == disk) {
            return Ok(false);
        }
        let Some(Wanted { policy, ladder, pins }) = self.wanted(disk, pressure)? else { return Ok(false) };
        let folded = Folded { disk, ended: None, snapshot };
        let now = clock::now();
        let planning = |reach: Reach| plan(snapshot, &ladder, &pins, now, pressure, reach);
        let Some(plan) = self.planned(folded, &planning)? else { return Ok(false) };
        self.settle_now(disk, number)?;
        let base = self.base(folded, &plan)?;
        self.collect = true;
        let floor = base.floor().expect("only one that has ended has none").at.lsn;
        let left: Vec<Lsn> = base.kept().iter().map(|kept| kept.at.lsn).collect();
        let allows =
            |wanted: &Policy, moment: Moment| self.allows(folded, (&policy, wanted), moment, (floor, &left));
        // Before anybody waits for what is decided here, and who gives it may wait for them.
        let asked = |answer| Task::LeaveToFold { disk, log: number, answer };
        let leave: Option<Leave> = ask(self.thread_of(disk), asked)?;
        // Its agent may have come meanwhile: then it has ended, and the next round sees to it as such.
        let leave = leave.filter(|leave| leave.is_newest && base.follows(leave.before.as_ref()));
        let Some(leave) = leave else { return Ok(false) };
        let begin = |doubts: &mut Doubts| -> Result<LeftOver, Undone> {
            let before: Option<&Base> = leave.before.as_ref();
            self.shelf.rebase_damaged(disk, log, &base, before).map_err(|error| {
                if let Some(doubt) = error.doubt {
                    doubts.begin(disk, number, doubt);
                }
                error.source.into()
            })
        };
        let Some(left) = self.policies.while_allowed(disk, allows, begin).transpose()? else {
            return Ok(false);
        };
        leave.end(Remains::Damaged(Box::new(left)));
        self.told(folded, &plan);
        Ok(true)
    }
}
