//! What the ladder wants of the logs of a disk that ended before the one in use began: they grow old too.
//!
//! Nobody appends to them, and their disk's owner writes where they begin. Invariant: as for the log in use, nothing goes but
//! what may go at the moment in which it does; nor is a log folded as a whole while a point of it is to stay that cannot be
//! read now, for the next look may read it. Which points the ladder wants of a part that is away nobody knows: such a log is
//! folded up to there, until that part is there again or somebody has the log cut. Only for want of room it goes all the same.

use std::collections::BTreeMap;

use backtide_recovery::{Base, FoundBase, LogIdentity, Snapshot, TimedLsn};
use backtide_units::{CaptureTime, DiskId, Lsn};

use super::{
    Ending, Thinned, Undone, Work, ask,
    thin::{Folded, Wanted},
};
use crate::{
    Shelf, clock,
    ingest::Task,
    past::{EndedLog, Leave, Remains},
    reopening::Settling,
    retention::{Moment, Policy, Pressure, Reach, doubts::Doubts, first_point, plan_ended},
};

/// One of them, with what lies around it.
struct Ended<'a> {
    disk: DiskId,
    number: u32,
    identity: LogIdentity,
    snapshot: &'a Snapshot,
    /// The highest LSN of those before it.
    above: Lsn,
    /// The first point behind it.
    next: TimedLsn,
    /// What of it is away.
    away: Option<&'a str>,
}

impl Work {
    /// Does what the ladder wants of them. For want of room no more than the oldest of them that gives any, and none behind one
    /// that stays although it should go.
    pub(super) fn thin_ended(
        &mut self,
        disk: DiskId,
        logs: &[EndedLog],
        newest: &Snapshot,
        pressure: Pressure,
        thinned: &mut Thinned,
    ) -> Result<(), Ending> {
        // Of each the first point behind it; as long as there is none it stays.
        let mut next = first_point(newest);
        let mut behind = Vec::new();
        for log in logs.iter().rev() {
            behind.push(next);
            next = log.snapshot.as_ref().and_then(first_point).or(next);
        }
        let mut above = Lsn::ZERO;
        for (log, next) in logs.iter().zip(behind.into_iter().rev()) {
            let EndedLog { number, identity: Some(identity), snapshot: Some(snapshot), .. } = log else {
                continue;
            };
            let (number, identity) = (*number, *identity);
            if let Some(next) = next {
                let away = log.away.as_deref();
                let one = Ended { disk, number, identity, snapshot, above, next, away };
                let one = self.thin_one(&one, pressure);
                thinned.add(one)?;
            }
            if thinned.is_all(pressure) {
                break;
            }
            above = above.max(snapshot.timeline().highest_lsn());
        }
        Ok(())
    }

    fn thin_one(&mut self, log: &Ended<'_>, pressure: Pressure) -> Result<bool, Undone> {
        let &Ended { disk, number, identity, snapshot, next, .. } = log;
        if self.policies.in_doubt().iter().any(|(of, _)| *of == disk) {
            return Err(Undone::Later);
        }
        self.settle_once(disk, number)?;
        let Some(Wanted { policy, ladder, pins }) = self.wanted(disk, pressure)? else { return Ok(false) };
        let at = (clock::now(), pressure);
        let folded = Folded { disk, ended: Some((number, identity)), snapshot };
        let planning = |reach: Reach| plan_ended(snapshot, next, &ladder, &pins, at, reach);
        let planned = match log.away.filter(|_| pressure == Pressure::None) {
            None => self.planned(folded, &planning)?,
            Some(away) => match self.planned(folded, &|reach| planning(reach.in_part()))? {
                None if planning(Reach::ROUND)?.is_some_and(|plan| plan.ends) => {
                    log.refuse_unread(&pins)?;
                    return Err(Undone::Why(stays_for(away)));
                }
                planned => planned,
            },
        };
        let Some(plan) = planned else { return Ok(false) };
        if plan.ends {
            log.refuse_unread(&pins)?;
        }
        let base = self.base(folded, &plan)?;
        self.collect = true;
        let (goes_below, left) = (base.floor().map_or(Lsn::MAX, |floor| floor.at.lsn), images_of(&base));
        let allows = |wanted: &Policy, moment: Moment| {
            self.allows(folded, (&policy, wanted), moment, (goes_below, &left))
        };
        // Before anybody waits for what is decided here, and who gives it may wait for them.
        let asked = |answer| Task::LeaveToFold { disk, log: number, answer };
        let leave: Option<Leave> = ask(self.thread_of(disk), asked)?;
        let leave = leave.filter(|leave| base.follows(leave.before.as_ref())).ok_or(Undone::Later)?;
        let begin = |doubts: &mut Doubts| -> Result<EndedLog, Undone> {
            self.shelf.rebase_ended(disk, number, &base, leave.before.as_ref()).map_err(|error| {
                if let Some(doubt) = error.doubt {
                    doubts.begin(disk, number, doubt);
                }
                error.source.into()
            })
        };
        let ended = self.policies.while_allowed(disk, allows, begin).transpose()?.ok_or(Undone::Later)?;
        leave.end(Remains::Ended(ended));
        self.told(folded, &plan);
        Ok(true)
    }

    /// Makes what such a log begins with durable everywhere, once since the receiver started: the one before may have ended
    /// while it was written, or a copy of it is damaged.
    fn settle_once(&mut self, disk: DiskId, number: u32) -> Result<(), Undone> {
        if self.settled.contains(&(disk, number)) {
            return Ok(());
        }
        self.settle_now(disk, number)?;
        self.settled.insert((disk, number));
        Ok(())
    }

    /// The same of a log that may be in use again later.
    pub(super) fn settle_now(&self, disk: DiskId, number: u32) -> Result<(), Undone> {
        let found = FoundBase::read(&*self.shelf.storage, &Shelf::dir(disk, number))?;
        if !found.is_settled() {
            let log = number;
            let settling = ask(self.thread_of(disk), |answer| Task::Settle { disk, log, answer })?;
            if let Settling::Closed(Err(why)) = settling {
                return Err(Undone::Why(format!("it is not known where a log of the disk begins: {why}")));
            }
        }
        Ok(())
    }
}

impl Ended<'_> {
    /// Refuses to fold the log as a whole while it may have a point that is to stay and cannot be read.
    fn refuse_unread(&self, pins: &BTreeMap<Lsn, CaptureTime>) -> Result<(), Undone> {
        let timeline = self.snapshot.timeline();
        let own = |lsn: &&Lsn| self.above < **lsn && **lsn <= timeline.highest_lsn();
        let unread = pins.keys().filter(own).find(|lsn| !timeline.offers(**lsn));
        unread.map_or(Ok(()), |lsn| {
            Err(Undone::Why(format!(
                "what is left of an older log of the disk stays, for lsn:{lsn} is to be kept and cannot be read there (`backtide \
                 retention show` tells who keeps it, `backtide retention release` lets it go)"
            )))
        })
    }
}

/// Why a log stays that would go as a whole.
fn stays_for(away: &str) -> String {
    format!(
        "what is left of an older log of the disk stays, for a part of it with points that may be wanted is away: {away}; put it \
         back and start the receiver again, or let go of what is behind it: `backtide fsck --repair` cuts the log there, once \
         no file of it is left that the device cannot read"
    )
}

fn images_of(base: &Base) -> Vec<Lsn> {
    base.images().map(|kept| kept.at.lsn).collect()
}
