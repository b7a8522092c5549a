//! What the ladder wants of one disk: the images of what is kept, then a log that begins later.
//!
//! Images may take hours, in which people and agents go on asking for points. Invariant: a log begins later only while every
//! point that must stay at that moment is at its new floor or above, or among the points that are left below.

use std::{collections::BTreeMap, time::Instant};

use backtide_recovery::{Base, FoldError, KeptPoint, LogError, LogIdentity, Snapshot};
use backtide_units::{ByteCount, ByteOffset, ByteRange, CaptureTime, DiskId, Lsn};

use super::{Ending, LogKey, Thinned, Undone, Work, ask};
use crate::{
    clock,
    disk::{Rebasing, chain},
    ingest::{Newest, Task},
    past::EndedLog,
    retention::{
        Ladder, Moment, Plan, PlanError, Policy, Pressure, Reach, before_damage, doubts::Doubts, plan,
    },
};

/// Why history stays that does not fit; it is tried again when more is free, and now and then.
const NO_ROOM: &str = "there is no room for the image that history is folded into";

/// What could not be read when images were made of it.
pub(super) struct Unreadable {
    /// Of the disk.
    range: ByteRange,
    /// What leads there in the image that the log begins with, and not what the disk had there at a point.
    is_node: bool,
    why: String,
}

/// What is said of history that cannot be folded, and what helps.
pub(super) fn cannot_be_read(why: &str) -> String {
    format!(
        "it is not folded, for a part of it cannot be read: {why}; each round reads that part again, and folds when it is whole \
         (`backtide scrub` mends it where it can)"
    )
}

/// What is wanted of a disk.
pub(super) struct Wanted {
    pub(super) policy: Policy,
    pub(super) ladder: Ladder,
    /// The points that stay whatever the ladder says.
    pub(super) pins: BTreeMap<Lsn, CaptureTime>,
}

/// A log that is folded.
#[derive(Clone, Copy)]
pub(super) struct Folded<'a> {
    pub(super) disk: DiskId,
    /// Its number and whose it is, when it has ended.
    pub(super) ended: Option<(u32, LogIdentity)>,
    /// It, alone.
    pub(super) snapshot: &'a Snapshot,
}

impl Folded<'_> {
    fn key(&self) -> LogKey {
        (self.disk, self.ended.map(|(number, _)| number))
    }
}

impl Work {
    /// Does what the ladder wants of a disk. For want of room its oldest history goes, which is that of logs that have ended.
    pub(super) fn thin_all(&mut self, disk: DiskId, pressure: Pressure) -> Result<Thinned, Ending> {
        let ended: Vec<EndedLog> = ask(self.thread_of(disk), |answer| Task::Ended(disk, answer))?;
        let mut thinned = Thinned::default();
        let newest = self.thin_ended_and_newest(disk, &ended, pressure, &mut thinned);
        thinned.add(newest)?;
        Ok(thinned)
    }

    /// The same; gives what came of the newest log.
    fn thin_ended_and_newest(
        &mut self,
        disk: DiskId,
        ended: &[EndedLog],
        pressure: Pressure,
        thinned: &mut Thinned,
    ) -> Result<bool, Undone> {
        // To look at the newest log makes durable what has come: not where nobody wants anything of it.
        if ended.is_empty() && self.wanted(disk, pressure)?.is_none() {
            return Ok(false);
        }
        let Some(newest): Option<Newest> = ask(self.thread_of(disk), |answer| Task::Newest(disk, answer))?
        else {
            return Ok(false);
        };
        self.thin_ended(disk, ended, newest.snapshot(), pressure, thinned)?;
        if thinned.is_all(pressure) {
            return Ok(false);
        }
        // While there is room, what keeps an older log keeps this one not.
        match newest {
            Newest::InUse(_) => self.thin(disk, pressure),
            Newest::Damaged(log) => self.thin_damaged(disk, &log, pressure),
        }
    }

    /// What is wanted of a disk now; none when nothing of it may go.
    pub(super) fn wanted(&self, disk: DiskId, pressure: Pressure) -> Result<Option<Wanted>, Undone> {
        let (policy, ladder) = (self.policies.of(disk), self.policies.ladder(disk));
        let now = self.policies.moment();
        let nothing_goes = ladder.any.is_none() && pressure == Pressure::None;
        if self.policies.damage().is_some() || policy.all_locked(now).is_some() || nothing_goes {
            return Ok(None);
        }
        if let Some(why) = self.overlays.unreadable() {
            return Err(Undone::Why(why));
        }
        // What was written to a mounted point is worth nothing without the point.
        let mut pins = policy.staying(now);
        pins.extend(self.overlays.points(disk));
        Ok(Some(Wanted { policy, ladder, pins }))
    }

    /// Does what the ladder wants of the log in use of a disk; whether that was anything.
    fn thin(&mut self, disk: DiskId, pressure: Pressure) -> Result<bool, Undone> {
        let Some(Wanted { policy, ladder, pins }) = self.wanted(disk, pressure)? else { return Ok(false) };
        let Some(snapshot) = self.snapshot(disk)? else { return Ok(false) };
        let folded = Folded { disk, ended: None, snapshot: &snapshot };
        let now = clock::now();
        let planning = |reach: Reach| plan(&snapshot, &ladder, &pins, now, pressure, reach);
        let Some(plan) = self.planned(folded, &planning)? else { return Ok(false) };
        let base = self.base(folded, &plan)?;
        let floor = base.floor().expect("a log in use has a floor").at.lsn;
        let left: Vec<Lsn> = base.kept().iter().map(|kept| kept.at.lsn).collect();
        let asked = |answer| Task::Rebase { disk, base: Box::new(base), answer };
        let Some(rebasing): Option<Rebasing> = ask(self.thread_of(disk), asked)? else {
            return Err(Undone::Why("the log changed while its images were made".to_owned()));
        };
        self.collect = true;
        let allows =
            |wanted: &Policy, moment: Moment| self.allows(folded, (&policy, wanted), moment, (floor, &left));
        let begin = |doubts: &mut Doubts| self.begin_later(disk, rebasing, doubts);
        if !self.policies.while_allowed(disk, allows, begin).transpose()?.unwrap_or(false) {
            return Ok(false);
        }
        self.told(folded, &plan);
        Ok(true)
    }

    /// Whether a log may begin later: nobody wants a point of it that it would do without, which are those below the floor
    /// that are not left. Whoever wants a point kept meanwhile waits for this, and sees what is left then. What came and went
    /// since the plan was made for `policy` counts only where the base does without it.
    pub(super) fn allows(
        &self,
        log: Folded<'_>,
        (policy, wanted): (&Policy, &Policy),
        moment: Moment,
        (floor, left): (Lsn, &[Lsn]),
    ) -> bool {
        let disk = log.disk;
        let mut staying = wanted.staying(moment);
        staying.extend(self.overlays.points(disk));
        let goes = |lsn: &&Lsn| **lsn < floor && left.binary_search(lsn).is_err();
        let going = staying.keys().filter(goes).find(|lsn| log.snapshot.timeline().offers(**lsn));
        if let Some(lsn) = going {
            tracing::info!(%disk, %lsn, "old history stays until the next round: a point of it is needed since");
        }
        going.is_none() && wanted.ladder == policy.ladder && wanted.all_locked(moment).is_none()
    }

    /// Says what has gone.
    pub(super) fn told(&mut self, log: Folded<'_>, plan: &Plan) {
        let (segments, bytes) = match plan.fold {
            Some((fold, _)) => (fold.segments, fold.bytes.0),
            None if plan.ends => (log.snapshot.segment_count(), log.snapshot.segment_bytes().0),
            None => (0, 0),
        };
        let (disk, older) = (log.disk, log.ended.map(|(number, _)| number));
        tracing::info!(%disk, older, segments, bytes, kept = plan.kept.len(), dropped = plan.dropped.len(), "old history thinned");
        self.dropped_last = self.dropped_last.max(plan.dropped.last().map(|point| point.time));
    }

    /// The plan for a log, as far as its images can be made: of one of which an index is damaged, what lies before that. To find
    /// that while they are made would cost all of them, each round.
    pub(super) fn planned(
        &mut self,
        log: Folded<'_>,
        planning: &dyn Fn(Reach) -> Result<Option<Plan>, PlanError>,
    ) -> Result<Option<Plan>, Undone> {
        let damage = match planning(Reach::ROUND) {
            Ok(None) => return Ok(None),
            Ok(Some(plan)) => {
                let Some(until) = plan.images_until(log.snapshot.timeline().latest()) else {
                    return Ok(Some(plan));
                };
                self.refuse_unreadable(log, &plan)?;
                self.refuse_without_room(log)?;
                match log.snapshot.index_damage(until) {
                    None => return Ok(Some(plan)),
                    Some(damage) => damage,
                }
            }
            Err(PlanError::Log(error @ LogError::Damaged { .. })) => {
                self.refuse_without_room(log)?;
                log.snapshot.index_damage(Lsn::MAX).unwrap_or((Lsn::ZERO, error))
            }
            Err(error) => return Err(error.into()),
        };
        let plan = before_damage(log.snapshot, damage, Reach::ROUND, planning)?;
        self.refuse_unreadable(log, &plan)?;
        Ok(Some(plan))
    }

    /// Refuses to make images of a log that had no room for them, until there is more.
    fn refuse_without_room(&self, log: Folded<'_>) -> Result<(), Undone> {
        let free = self.shelf.storage.free_space().unwrap_or(ByteCount(u64::MAX));
        let had_none = |then: &ByteCount| free.0 <= then.0.saturating_add(then.0 / 16);
        if self.no_room.get(&log.key()).is_some_and(had_none) {
            return Err(Undone::Why(NO_ROOM.to_owned()));
        }
        Ok(())
    }

    /// Refuses a plan one of whose images cannot be made, for what could not be read before cannot be read still: to find that out
    /// costs a read, and to make the images up to there all of theirs, each round.
    fn refuse_unreadable(&mut self, log: Folded<'_>, plan: &Plan) -> Result<(), Undone> {
        let Some(known) = self.unreadable.get_mut(&log.key()) else { return Ok(()) };
        let floor = plan.fold.map(|(_, floor)| floor);
        if floor.is_none() && !plan.ends {
            return Ok(());
        }
        let old = log.snapshot.base().and_then(Base::floor).map_or(Lsn::ZERO, |floor| floor.at.lsn);
        for at in plan.kept.iter().chain(&floor).filter(|at| at.lsn > old) {
            let Ok(view) = log.snapshot.view(at.lsn) else { continue };
            let end = known.range.end().min(ByteOffset(view.disk_size().0));
            if known.range.start() >= end {
                continue;
            }
            // A node stands for more of the disk than can be read at once.
            let read = match known.is_node {
                true => log.snapshot.leads_to(known.range.start()),
                false => view.read(ByteRange::between(known.range.start(), end)).map(drop),
            };
            if let Err(error) = read {
                known.why = chain(&error);
                return Err(Undone::Why(cannot_be_read(&known.why)));
            }
        }
        // A scrub has mended it, or no image has it any more.
        self.unreadable.remove(&log.key());
        Ok(())
    }

    /// Remembers what could not be read, so that the next round looks there first.
    fn remember(&mut self, key: LogKey, range: ByteRange, is_node: bool, error: &LogError) -> Undone {
        let why = chain(error);
        let said = cannot_be_read(&why);
        self.unreadable.insert(key, Unreadable { range, is_node, why });
        Undone::Why(said)
    }

    /// Makes the images of a plan; gives what the log begins with then.
    pub(super) fn base(&mut self, log: Folded<'_>, plan: &Plan) -> Result<Base, Undone> {
        let (snapshot, key) = (log.snapshot, log.key());
        let old = snapshot.base();
        let known: BTreeMap<_, KeptPoint> =
            old.iter().flat_map(|base| base.images()).map(|kept| (kept.at.lsn, kept)).collect();
        if plan.fold.is_none() && !plan.ends {
            let kept = plan.kept.iter().filter_map(|point| known.get(&point.lsn).copied()).collect();
            return snapshot
                .rebase_kept(kept)
                .ok_or_else(|| Undone::Why("there is nothing to thin".to_owned()));
        }
        let free = self.shelf.storage.free_space().unwrap_or(ByteCount(u64::MAX));
        let leave = self.room_to_leave(free);
        // What is made is of no use to anybody if this ends early.
        self.collect = true;
        let images = self.shelf.cache.images(&self.shelf.storage);
        let mut writer = images.write().map_err(|error| Undone::Why(chain(&error)))?;
        let mut last = old.and_then(Base::floor);
        let (begun, mut done) = (Instant::now(), 0);
        let mut full = false;
        let mut kept = Vec::new();
        let floor = plan.fold.map(|(_, floor)| floor);
        for at in plan.kept.iter().chain(&floor) {
            if let Some(known) = known.get(&at.lsn) {
                kept.push(*known);
                continue;
            }
            let made = snapshot.make_image(&mut writer, at.lsn, last, &mut |bytes| {
                full = self.shelf.storage.free_space().is_ok_and(|free| free < leave);
                done += bytes.0;
                !full && self.pace(begun, done)
            });
            let root = match made {
                Ok(root) => root,
                Err(FoldError::CalledOff) if full => {
                    self.no_room.insert(key, free);
                    return Err(Undone::Why(NO_ROOM.to_owned()));
                }
                Err(FoldError::CalledOff) => return Err(Undone::Ending),
                Err(FoldError::Unreadable { range, source }) => {
                    return Err(self.remember(key, range, false, &source));
                }
                Err(FoldError::Lost { range, source }) => {
                    return Err(self.remember(key, range, true, &source));
                }
                Err(FoldError::Log(error)) => return Err(Undone::Why(chain(&error))),
            };
            last = Some(KeptPoint { at: *at, root });
            kept.extend(last);
        }
        writer.finish().map_err(|error| Undone::Why(chain(&error)))?;
        self.no_room.remove(&key);
        match (plan.fold, log.ended) {
            (Some((foldable, _)), _) => {
                let floor = kept.pop().expect("the floor was the last");
                Ok(snapshot.rebase(&foldable, floor, kept)?)
            }
            (None, Some((_, identity))) => Ok(snapshot.ended(identity, kept)),
            (None, None) => unreachable!("a log in use does not end"),
        }
    }
}
