//! What of a disk's history goes now: decided from its log as it is, its ladder and the clock, without changing anything.
//!
//! A slot is a multiple of a rung's period since 1970. What stands for a slot is the newest point at or before it, so a point
//! stands for every slot until the next point that is kept. The log is folded up to the point of a slot that is older than
//! `any`, and only when whole segments go with it: until then all points stay, at no cost.

use std::collections::{BTreeMap, BTreeSet};

use backtide_recovery::{Base, Foldable, LogError, Snapshot, TimedLsn};
use backtide_units::{CaptureTime, Lsn};

mod damaged;
mod ended;
mod shrink;

pub(crate) use damaged::before_damage;
pub(crate) use ended::{first_point, plan_all, plan_ended, plan_readable};
use shrink::fewer;
pub(crate) use shrink::oldest_that_goes;

use super::ladder::{Ladder, Span};

/// Slots of a rung that are looked for in one round, the oldest: a log with more is folded in several.
const SLOTS_MAX: u64 = 4096;

/// Single points of a disk: each is an interval of its timeline, which has a few more than that, and an image.
pub(crate) const KEPT_MAX: usize = 50_000;

/// Why there is no plan.
#[derive(Debug, thiserror::Error)]
pub(crate) enum PlanError {
    /// The log cannot be read.
    #[error(transparent)]
    Log(#[from] LogError),
    /// Nothing of it is cut without a word, while there is room.
    #[error(
        "the ladder `{ladder}` keeps more than {KEPT_MAX} single points of this disk, which is the most: it needs rungs that are \
         further apart, or shorter"
    )]
    TooMany {
        /// As it is written.
        ladder: String,
    },
}

/// What is to be done.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Plan {
    /// The oldest segments that go, and the point from which on every change is kept then.
    pub(crate) fold: Option<(Foldable, TimedLsn)>,
    /// The log has ended and is old as a whole: all of its segments go, and single points alone stay.
    pub(crate) ends: bool,
    /// Single points below that, ascending.
    pub(crate) kept: Vec<TimedLsn>,
    /// Points of the log that go although they are single ones now.
    pub(crate) dropped: Vec<TimedLsn>,
}

impl Plan {
    /// The point of the last image that is to be made for it, of a log whose newest point is `latest`; none when it does with
    /// those that are there.
    pub(crate) fn images_until(&self, latest: Option<TimedLsn>) -> Option<Lsn> {
        let last = self.fold.map(|(_, floor)| floor).or(latest.filter(|_| self.ends));
        last.map(|last| last.lsn)
    }
}

/// Whether the store has room.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Pressure {
    /// It has.
    None,
    /// It has not: half of the single points go, the oldest, whatever the ladder says; where there are none, half of the time of
    /// which everything is kept, and with that the oldest single points beyond the most that there can be.
    Shrink,
}

/// How much of what is wanted is planned at once.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct Reach {
    /// As much as has about so many slots of a rung; none is all of it.
    pub(crate) slots_max: Option<u64>,
    /// Nothing is folded beyond the last point captured by then.
    pub(crate) until: Option<CaptureTime>,
}

impl Reach {
    /// Of one round of retention.
    pub(crate) const ROUND: Self = Self { slots_max: Some(SLOTS_MAX), until: None };

    /// The same of a log that is not to go as a whole.
    pub(crate) fn in_part(self) -> Self {
        Self { until: self.until.or(Some(CaptureTime(u64::MAX))), ..self }
    }
}

/// What the ladder wants done at `now` to a log that stands alone, as far as `reach`; none when nothing is to be done.
///
/// # Errors
/// See [`PlanError`].
pub(crate) fn plan(
    snapshot: &Snapshot,
    ladder: &Ladder,
    pins: &BTreeMap<Lsn, CaptureTime>,
    now: CaptureTime,
    pressure: Pressure,
    reach: Reach,
) -> Result<Option<Plan>, PlanError> {
    plan_within(snapshot, ladder, pins, (now, pressure), reach, KEPT_MAX)
}

fn plan_within(
    snapshot: &Snapshot,
    ladder: &Ladder,
    pins: &BTreeMap<Lsn, CaptureTime>,
    (now, pressure): (CaptureTime, Pressure),
    reach: Reach,
    kept_max: usize,
) -> Result<Option<Plan>, PlanError> {
    let base = snapshot.base();
    let old: Vec<TimedLsn> = base.iter().flat_map(|base| base.kept()).map(|kept| kept.at).collect();
    if let Some(plan) = fewer(&old, pins).filter(|_| pressure == Pressure::Shrink) {
        return Ok(Some(plan));
    }
    let old_floor = base.and_then(Base::floor).map(|floor| floor.at);
    let fold = match horizon(snapshot, ladder, now, pressure) {
        Some(horizon) => {
            let horizon = reach.until.map_or(horizon, |until| until.min(horizon));
            step(snapshot, ladder, now, horizon, reach.slots_max, old_floor)?
        }
        None => None,
    };
    let mut points: BTreeSet<TimedLsn> = old.iter().copied().chain(old_floor).collect();
    if let Some((_, floor)) = fold {
        points.extend(new_points(snapshot, ladder, pins, (now, pressure), (old_floor, floor), kept_max)?);
        points.insert(floor);
    }
    let points: Vec<TimedLsn> = points.into_iter().collect();
    let kept = standing(&points, ladder, pins, (now, pressure), kept_max)?;
    let gone = old.iter().chain(old_floor.iter().filter(|_| fold.is_some()));
    let dropped: Vec<TimedLsn> = gone.filter(|point| !kept.contains(point)).copied().collect();
    if fold.is_none() && kept == old {
        return Ok(None);
    }
    Ok(Some(Plan { fold, ends: false, kept, dropped }))
}

/// Those of ascending points that stand for something, or are pinned; the last one is none of them, but what comes next.
fn standing(
    points: &[TimedLsn],
    ladder: &Ladder,
    pins: &BTreeMap<Lsn, CaptureTime>,
    (now, pressure): (CaptureTime, Pressure),
    kept_max: usize,
) -> Result<Vec<TimedLsn>, PlanError> {
    let stands = |two: &&[TimedLsn]| {
        pins.contains_key(&two[0].lsn)
            || (ladder.any.is_none() && pressure == Pressure::None)
            || is_wanted(ladder, two[0].time, two[1].time, now)
    };
    let mut kept: Vec<TimedLsn> = points.windows(2).filter(stands).map(|two| two[0]).collect();
    if pressure == Pressure::Shrink {
        drop_oldest(&mut kept, pins, kept_max);
    }
    if kept.len() > kept_max {
        return Err(PlanError::TooMany { ladder: ladder.to_string() });
    }
    Ok(kept)
}

/// Leaves the newest of these points, and those that are pinned.
fn drop_oldest(kept: &mut Vec<TimedLsn>, pins: &BTreeMap<Lsn, CaptureTime>, kept_max: usize) {
    let mut beyond = kept.len().saturating_sub(kept_max);
    kept.retain(|point| {
        let goes = beyond > 0 && !pins.contains_key(&point.lsn);
        beyond -= usize::from(goes);
        !goes
    });
}

/// The time before which not every point is kept any more.
fn horizon(
    snapshot: &Snapshot,
    ladder: &Ladder,
    now: CaptureTime,
    pressure: Pressure,
) -> Option<CaptureTime> {
    match pressure {
        Pressure::None => {
            let (any, step) = (ladder.any?, ladder.step()?);
            let horizon = now.0.checked_sub(any.0)?;
            Some(CaptureTime(horizon / step.0 * step.0))
        }
        Pressure::Shrink => {
            let begins = every_change_from(snapshot)?.time;
            Some(CaptureTime(begins.0 + now.0.checked_sub(begins.0)? / 2))
        }
    }
}

/// The first point of those of which every one is kept, holes aside: of the oldest log that has such.
pub(crate) fn every_change_from(snapshot: &Snapshot) -> Option<TimedLsn> {
    snapshot.logs().iter().find_map(|log| match log.base() {
        Some(base) => base.floor().map(|floor| floor.at),
        None => log.timeline().intervals().first().map(|interval| interval.from),
    })
}

/// What can be folded below the horizon, in steps of so many slots: as many steps as it takes for a segment to go.
fn step(
    snapshot: &Snapshot,
    ladder: &Ladder,
    now: CaptureTime,
    horizon: CaptureTime,
    slots_max: Option<u64>,
    old_floor: Option<TimedLsn>,
) -> Result<Option<(Foldable, TimedLsn)>, LogError> {
    let begins = every_change_from(snapshot).map_or(horizon, |begins| begins.time);
    let mut slots = slots_max.unwrap_or(u64::MAX);
    loop {
        let near = nearer(ladder, begins, now, slots).min(horizon);
        let fold = foldable(snapshot, near, old_floor)?;
        if fold.is_some() || near == horizon {
            return Ok(fold);
        }
        slots = slots.saturating_mul(2);
    }
}

/// The time up to which no rung has more than so many slots in a log that begins at `begins`.
fn nearer(ladder: &Ladder, begins: CaptureTime, now: CaptureTime, slots: u64) -> CaptureTime {
    let limit = |every: Span, keep: Span| {
        let oldest = begins.0.max(now.0.saturating_sub(keep.0)).div_ceil(every.0);
        oldest.saturating_add(slots).saturating_mul(every.0)
    };
    let limits = ladder.rungs.iter().map(|rung| limit(rung.every, rung.keep));
    CaptureTime(limits.min().unwrap_or(u64::MAX))
}

fn foldable(
    snapshot: &Snapshot,
    horizon: CaptureTime,
    old_floor: Option<TimedLsn>,
) -> Result<Option<(Foldable, TimedLsn)>, LogError> {
    let floor = snapshot.newest_point_by(horizon)?;
    let floor = floor.filter(|floor| old_floor.is_none_or(|old| old.lsn < floor.lsn));
    Ok(floor.and_then(|floor| Some((snapshot.foldable(floor.lsn)?, floor))))
}

/// The points between two floors that stand for slots, or are pinned.
fn new_points(
    snapshot: &Snapshot,
    ladder: &Ladder,
    pins: &BTreeMap<Lsn, CaptureTime>,
    (now, pressure): (CaptureTime, Pressure),
    (old_floor, floor): (Option<TimedLsn>, TimedLsn),
    kept_max: usize,
) -> Result<Vec<TimedLsn>, PlanError> {
    let begins = every_change_from(snapshot).map_or(CaptureTime(0), |begins| begins.time);
    let mut points = Vec::new();
    for rung in &ladder.rungs {
        let every = rung.every.0;
        let oldest = begins.0.max(now.0.saturating_sub(rung.keep.0)).div_ceil(every);
        let mut next = Some(floor.time.0 / every);
        let mut of_rung = 0;
        while let Some(slot) = next.filter(|slot| *slot >= oldest) {
            let Some(point) = snapshot.newest_point_by(CaptureTime(slot * every))? else { break };
            points.push(point);
            of_rung += 1;
            if of_rung > kept_max.saturating_add(1) {
                match pressure {
                    Pressure::None => return Err(PlanError::TooMany { ladder: ladder.to_string() }),
                    // The newest come first: no older one of this rung would stay.
                    Pressure::Shrink => break,
                }
            }
            // It stands for all slots down to its own.
            next = point.time.0.div_ceil(every).min(slot).checked_sub(1);
        }
    }
    let pinned = pins.iter().map(|(lsn, time)| TimedLsn { lsn: *lsn, time: *time });
    points.extend(pinned.filter(|point| snapshot.timeline().offers(point.lsn)));
    points.retain(|point| point.lsn < floor.lsn && old_floor.is_none_or(|old| old.lsn < point.lsn));
    // A pin and a record may name one point with two times.
    points.sort();
    points.dedup_by_key(|point| point.lsn);
    Ok(points)
}

/// Whether a point at `time` stands for a slot that is kept at `now`, when the next one is at `next`.
fn is_wanted(ladder: &Ladder, time: CaptureTime, next: CaptureTime, now: CaptureTime) -> bool {
    let stands = |every: Span, keep: Span| {
        let Some(last) = next.0.checked_sub(1) else { return false };
        let slot = last / every.0 * every.0;
        slot >= time.0 && slot.saturating_add(keep.0) >= now.0
    };
    ladder.rungs.iter().any(|rung| stands(rung.every, rung.keep))
}

#[cfg(test)]
mod tests {
    use std::{path::Path, sync::Arc};

    use backtide_recovery::{CacheLimits, DiskLog, Entry, LogCache, LogIdentity, LogOptions, PassReason};
    use backtide_storage::MemoryStorage;
    use backtide_units::{ByteCount, ByteOffset, ByteRange, DiskId, Epoch, HistoryId};

    use super::*;

    #[test]
    fn a_round_has_a_bounded_number_of_slots_and_the_next_goes_on_from_there() {
        let ladder: Ladder = "any=1h per-1m=3d hourly=1y".parse().unwrap();
        let hours = |hours: u64| CaptureTime(hours * 3_600_000_000);
        let at = |begins, slots| nearer(&ladder, hours(begins), hours(10_000), slots);
        assert_eq!(at(0, 100), hours(10_000 - 8760 + 100), "older hours than a year are not wanted");
        assert_eq!(at(9000, 100), hours(9100));
        assert_eq!(at(9990, 120), hours(9992), "minutes are closer");
        assert!(at(9000, u64::MAX) > hours(10_000));
    }

    /// A log with a record each second of 1970 up to `last`, the older ones in a segment that is full.
    fn log(last: u64) -> Snapshot {
        let (storage, dir) = (Arc::new(MemoryStorage::new()), Path::new("disks/d1"));
        let identity = LogIdentity { disk: DiskId::random(), history: HistoryId::random() };
        let cache = LogCache::new(CacheLimits::default());
        let mut log =
            DiskLog::create(storage, dir, identity, LogOptions::default(), &cache).expect("no fault");
        let time = |second: u64| CaptureTime(second * 1_000_000);
        let attach = Entry::Attach {
            epoch: Epoch(1),
            attach: uuid::Uuid::nil(),
            next_lsn: Lsn(1),
            size: ByteCount(1 << 20),
            name: "vm1".parse().expect("a name"),
            time: time(1),
            facts: Default::default(),
        };
        let reason = PassReason { code: 1, text: String::new() };
        log.append(attach).expect("it follows");
        log.append(Entry::PassBegin { at: Lsn(1), gap_from: Lsn(0), time: time(1), reason })
            .expect("it follows");
        log.append(Entry::PassEnd { at: Lsn(1), valid_from: Some(Lsn(1)), time: time(1) })
            .expect("it follows");
        for second in 2..=last {
            let range = ByteRange::between(ByteOffset(0), ByteOffset(4096));
            let zero = Entry::Zero { lsn: Lsn(second), time: time(second), range, trim: false };
            log.append(zero).expect("it follows");
            if second == last - 1 {
                log.seal().expect("no fault");
            }
        }
        let ticket = log.ticket().expect("no fault").expect("there is something to sync");
        log.synced(ticket.sync()).expect("no fault");
        log.snapshot().expect("no fault")
    }

    #[test]
    fn more_single_points_than_there_can_be_are_refused_and_not_cut() {
        let ladder: Ladder = "any=1h per-1s=100y".parse().unwrap();
        let now = (CaptureTime(10_000 * 3_600_000_000), Pressure::None);
        let snapshot = log(60);
        let within =
            |kept_max| plan_within(&snapshot, &ladder, &BTreeMap::new(), now, Reach::default(), kept_max);
        let plan = within(KEPT_MAX).expect("they are few").expect("it is old");
        assert!(plan.kept.len() > 50, "{plan:?}");
        assert_eq!(within(plan.kept.len()).expect("just as many").expect("it is old"), plan);
        for kept_max in [5, plan.kept.len() - 1] {
            let why = within(kept_max).expect_err("too many").to_string();
            assert!(why.contains("`any=1h per-1s=100y` keeps more than"), "{why}");
        }
    }

    #[test]
    fn a_store_without_room_drops_the_oldest_single_points_that_are_too_many_and_no_pinned_one() {
        let ladder: Ladder = "any=1h per-1s=100y".parse().unwrap();
        let snapshot = log(60);
        let now = CaptureTime(10_000 * 3_600_000_000);
        let within = |pins: &BTreeMap<Lsn, CaptureTime>, pressure, kept_max| {
            plan_within(&snapshot, &ladder, pins, (now, pressure), Reach::default(), kept_max)
        };
        let none = BTreeMap::new();
        let all = within(&none, Pressure::Shrink, KEPT_MAX).expect("they are few").expect("it is old").kept;
        for kept_max in [0, 1, 5, all.len() - 1] {
            let plan = within(&none, Pressure::Shrink, kept_max).expect("the rest goes").expect("it is old");
            assert_eq!(plan.kept, all[all.len() - kept_max..], "the newest stay");
            assert!(plan.fold.is_some());
            assert!(within(&none, Pressure::None, kept_max).is_err(), "with room nothing is cut");
        }
        let pinned: Vec<TimedLsn> = all[2..5].to_vec();
        let pins = pinned.iter().map(|point| (point.lsn, point.time)).collect();
        let plan = within(&pins, Pressure::Shrink, 5).expect("the rest goes").expect("it is old");
        assert_eq!(plan.kept, [&pinned[..], &all[all.len() - 2..]].concat());
        let why = within(&pins, Pressure::Shrink, 2).expect_err("pinned ones stay").to_string();
        assert!(why.contains("keeps more than"), "{why}");
    }

    #[test]
    fn a_point_stands_for_every_slot_until_the_next() {
        let ladder: Ladder = "any=1h hourly=10h daily=3d".parse().unwrap();
        let hour = |hours: u64| CaptureTime(hours * 3_600_000_000);
        let just_before = |time: CaptureTime| CaptureTime(time.0 - 1);
        let wanted = |time, next, now| is_wanted(&ladder, time, next, now);
        assert!(wanted(just_before(hour(100)), hour(101), hour(105)), "the hour at 100");
        assert!(!wanted(CaptureTime(hour(100).0 + 1), hour(101), hour(105)), "no hour between them");
        assert!(!wanted(just_before(hour(100)), hour(101), hour(111)), "its hour is too old");
        assert!(wanted(just_before(hour(100)), hour(105), hour(111)), "it stands for 104 as well");
        assert!(wanted(just_before(hour(96)), hour(97), hour(120)), "the day");
        assert!(!wanted(just_before(hour(96)), hour(97), hour(170)));
        assert!(wanted(hour(100), hour(101), hour(105)), "a point at the slot itself");
    }
}
