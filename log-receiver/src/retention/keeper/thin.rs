//! What the ladder wants of one disk: the images of what is kept, then a log that begins later.
//!
//! Images may take hours, in which people and agents go on asking for points. Invariant: a log begins later only while every
//! point that must stay at that moment is at its new floor or above, or among the points that are left below.

use std::{collections::BTreeMap, time::Instant};

use backtide_recovery::{Base, FoldError, KeptPoint, Snapshot};
use backtide_units::{ByteCount, ByteOffset, ByteRange, DiskId, Lsn};

use super::{Undone, Work, ask};
use crate::{
    clock,
    disk::{Rebasing, chain},
    ingest::Task,
    retention::{Moment, Plan, Policy, Pressure, SLOTS_MAX, doubts::Doubts, plan},
};

/// Why history stays that does not fit; it is tried again when more is free, and now and then.
const NO_ROOM: &str = "there is no room for the image that history is folded into";

/// What could not be read when images were made of it.
pub(super) struct Unreadable {
    /// Of the disk.
    range: ByteRange,
    why: String,
}

/// What is said of history that cannot be folded, and what helps.
fn cannot_be_read(why: &str) -> String {
    format!(
        "it is not folded, for a part of it cannot be read: {why}; each round reads that part again, and folds when it is whole \
         (`backtide scrub` mends it where it can)"
    )
}

impl Work {
    /// Does what the ladder wants of a disk; whether that was anything.
    pub(super) fn thin(&mut self, disk: DiskId, pressure: Pressure) -> Result<bool, Undone> {
        let policy = self.policies.of(disk);
        let ladder = self.policies.ladder(disk);
        let now = self.policies.moment();
        if self.policies.damage().is_some() || policy.all_locked(now).is_some() {
            return Ok(false);
        }
        if ladder.any.is_none() && pressure == Pressure::None {
            return Ok(false);
        }
        let Some(snapshot) = self.snapshot(disk)? else { return Ok(false) };
        if let Some(why) = self.overlays.unreadable() {
            return Err(Undone::Why(why));
        }
        // What was written to a mounted point is worth nothing without the point.
        let mut pins = policy.staying(now);
        pins.extend(self.overlays.points(disk));
        let Some(plan) = plan(&snapshot, &ladder, &pins, clock::now(), pressure, Some(SLOTS_MAX))? else {
            return Ok(false);
        };
        self.refuse_unreadable(disk, &snapshot, &plan)?;
        let base = self.base(disk, &snapshot, &plan)?;
        let (floor, left): (_, Vec<Lsn>) =
            (base.floor().at.lsn, base.kept().iter().map(|kept| kept.at.lsn).collect());
        let asked = |answer| Task::Rebase { disk, base: Box::new(base), answer };
        let Some(rebasing): Option<Rebasing> = ask(self.thread_of(disk), asked)? else {
            return Err(Undone::Why("the log changed while its images were made".to_owned()));
        };
        self.collect = true;
        // Whoever wants a point kept meanwhile waits for this, and sees what is left then. What came and went since the plan
        // was made counts only where the base does without it.
        let allows = |wanted: &Policy, moment: Moment| {
            let mut staying = wanted.staying(moment);
            staying.extend(self.overlays.points(disk));
            let goes = |lsn: &&Lsn| **lsn < floor && left.binary_search(lsn).is_err();
            let mut going = staying.keys().filter(goes).filter(|lsn| snapshot.timeline().offers(**lsn));
            let going = going.next();
            if let Some(lsn) = going {
                tracing::info!(%disk, %lsn, "old history stays until the next round: a point of it is needed since");
            }
            going.is_none() && wanted.ladder == policy.ladder && wanted.all_locked(moment).is_none()
        };
        let begin = |doubts: &mut Doubts| self.begin_later(disk, rebasing, doubts);
        if !self.policies.while_allowed(disk, allows, begin).transpose()?.unwrap_or(false) {
            return Ok(false);
        }
        let (segments, bytes) = plan.fold.map_or((0, 0), |(fold, _)| (fold.segments, fold.bytes.0));
        tracing::info!(%disk, segments, bytes, kept = plan.kept.len(), dropped = plan.dropped.len(), "old history thinned");
        Ok(true)
    }

    /// Refuses a plan one of whose images cannot be made, for what could not be read before cannot be read still: to find that out
    /// costs a read, and to make the images up to there all of theirs, each round.
    fn refuse_unreadable(&mut self, disk: DiskId, snapshot: &Snapshot, plan: &Plan) -> Result<(), Undone> {
        let Some(known) = self.unreadable.get_mut(&disk) else { return Ok(()) };
        let Some((_, floor)) = plan.fold else { return Ok(()) };
        let old = snapshot.base().map_or(Lsn::ZERO, |base| base.floor().at.lsn);
        for at in plan.kept.iter().chain([&floor]).filter(|at| at.lsn > old) {
            let Ok(view) = snapshot.view(at.lsn) else { continue };
            let end = known.range.end().min(ByteOffset(view.disk_size().0));
            if known.range.start() >= end {
                continue;
            }
            let read = view.read(ByteRange::between(known.range.start(), end));
            if let Err(error) = read {
                known.why = chain(&error);
                return Err(Undone::Why(cannot_be_read(&known.why)));
            }
        }
        // A scrub has mended it, or no image has it any more.
        self.unreadable.remove(&disk);
        Ok(())
    }

    /// Makes the images of a plan; gives what the log begins with then.
    fn base(&mut self, disk: DiskId, snapshot: &Snapshot, plan: &Plan) -> Result<Base, Undone> {
        let old = snapshot.base();
        let mut known: BTreeMap<_, KeptPoint> = BTreeMap::new();
        for kept in old.iter().flat_map(|base| base.kept().iter().copied().chain([base.floor()])) {
            known.insert(kept.at.lsn, kept);
        }
        let Some((foldable, floor)) = plan.fold else {
            let kept = plan.kept.iter().filter_map(|point| known.get(&point.lsn).copied()).collect();
            return snapshot
                .rebase_kept(kept)
                .ok_or_else(|| Undone::Why("there is nothing to thin".to_owned()));
        };
        let free = self.shelf.storage.free_space().unwrap_or(ByteCount(u64::MAX));
        if self.no_room.get(&disk).is_some_and(|then| free.0 <= then.0.saturating_add(then.0 / 16)) {
            return Err(Undone::Why(NO_ROOM.to_owned()));
        }
        let leave = self.room_to_leave(free);
        // What is made is of no use to anybody if this ends early.
        self.collect = true;
        let images = self.shelf.cache.images(&self.shelf.storage);
        let mut writer = images.write().map_err(|error| Undone::Why(chain(&error)))?;
        let mut last = old.map(Base::floor);
        let (begun, mut done) = (Instant::now(), 0);
        let mut full = false;
        let mut kept = Vec::new();
        for at in plan.kept.iter().chain([&floor]) {
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
                    self.no_room.insert(disk, free);
                    return Err(Undone::Why(NO_ROOM.to_owned()));
                }
                Err(FoldError::CalledOff) => return Err(Undone::Ending),
                Err(FoldError::Unreadable { range, source }) => {
                    let why = chain(&source);
                    self.unreadable.insert(disk, Unreadable { range, why: why.clone() });
                    return Err(Undone::Why(cannot_be_read(&why)));
                }
                Err(FoldError::Log(error)) => return Err(Undone::Why(chain(&error))),
            };
            last = Some(KeptPoint { at: *at, root });
            kept.extend(last);
        }
        writer.finish().map_err(|error| Undone::Why(chain(&error)))?;
        self.no_room.remove(&disk);
        let floor = kept.pop().expect("the floor was the last");
        Ok(snapshot.rebase(&foldable, floor, kept)?)
    }
}
