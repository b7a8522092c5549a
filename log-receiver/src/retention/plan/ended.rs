//! What of a log goes that ended before another one of the disk began.
//!
//! Its segments go as those of a log in use, and the last of them too once nothing of it has to be kept as it is: when its last
//! point is older than `any`, and so is the first point behind it, so that a disk has all of the time of which every point is
//! promised in the logs behind. What stands for slots then are single points; the last of them stands for every slot until the
//! first point behind it. As long as no log behind it has a point it stays, whatever its age.

use std::collections::{BTreeMap, BTreeSet};

use backtide_recovery::{Base, LogError, Snapshot, TimedLsn};
use backtide_units::{CaptureTime, Lsn};

use super::{
    KEPT_MAX, Ladder, Plan, PlanError, Pressure, Reach, before_damage, every_change_from, fewer, horizon,
    nearer, new_points, plan, standing,
};

/// What the ladder wants done at `now` to a log that stands alone and has ended, `next` being the first point behind it; none
/// when nothing is to be done. With a time until which it reaches it does not go as a whole.
///
/// # Errors
/// See [`PlanError`].
pub(crate) fn plan_ended(
    snapshot: &Snapshot,
    next: TimedLsn,
    ladder: &Ladder,
    pins: &BTreeMap<Lsn, CaptureTime>,
    (now, pressure): (CaptureTime, Pressure),
    reach: Reach,
) -> Result<Option<Plan>, PlanError> {
    let base = snapshot.base();
    let old: Vec<TimedLsn> = base.iter().flat_map(|base| base.images()).map(|kept| kept.at).collect();
    let single: Vec<TimedLsn> = base.iter().flat_map(|base| base.kept()).map(|kept| kept.at).collect();
    if let Some(plan) = fewer(&single, pins).filter(|_| pressure == Pressure::Shrink) {
        return Ok(Some(plan));
    }
    if base.is_some_and(Base::is_ended) {
        return ending(&old, old.clone(), next, (ladder, pins), (now, pressure));
    }
    let latest = snapshot.timeline().latest();
    let is_old =
        |horizon: CaptureTime| next.time <= horizon && latest.is_none_or(|latest| latest.time <= horizon);
    let goes_as_a_whole =
        reach.until.is_none() && horizon(snapshot, ladder, now, pressure).is_some_and(is_old);
    if !goes_as_a_whole {
        return plan(snapshot, ladder, pins, now, pressure, reach);
    }
    let Some(latest) = latest else {
        return Ok(Some(Plan { fold: None, ends: true, kept: Vec::new(), dropped: Vec::new() }));
    };
    // A long history goes in several rounds, as that of a log in use does.
    let begins = every_change_from(snapshot).map_or(latest.time, |begins| begins.time);
    let at_once = reach.slots_max.is_none_or(|slots| nearer(ladder, begins, now, slots) > latest.time);
    if !at_once && let Some(plan) = plan(snapshot, ladder, pins, now, pressure, reach)? {
        return Ok(Some(plan));
    }
    let old_floor = base.and_then(Base::floor).map(|floor| floor.at);
    let mut points: BTreeSet<TimedLsn> = old.iter().copied().collect();
    points.extend(new_points(snapshot, ladder, pins, (now, pressure), (old_floor, latest), KEPT_MAX)?);
    if old_floor.is_none_or(|floor| floor.lsn < latest.lsn) {
        points.insert(latest);
    }
    let points = points.into_iter().collect();
    let plan = ending(&old, points, next, (ladder, pins), (now, pressure))?;
    let all = Plan { fold: None, ends: false, kept: old, dropped: Vec::new() };
    Ok(Some(Plan { ends: true, ..plan.unwrap_or(all) }))
}

/// Which of these points stay of a log that is old as a whole, `old` being the images that it has; none when those do.
fn ending(
    old: &[TimedLsn],
    mut points: Vec<TimedLsn>,
    next: TimedLsn,
    (ladder, pins): (&Ladder, &BTreeMap<Lsn, CaptureTime>),
    at: (CaptureTime, Pressure),
) -> Result<Option<Plan>, PlanError> {
    points.push(next);
    let kept = standing(&points, ladder, pins, at, KEPT_MAX)?;
    let dropped = old.iter().filter(|point| !kept.contains(point)).copied().collect();
    Ok((kept != old).then_some(Plan { fold: None, ends: false, kept, dropped }))
}

/// What the ladder wants done to all logs of a disk, the oldest first: each alone, with its plan, if there is one.
///
/// # Errors
/// See [`PlanError`].
pub(crate) fn plan_all(
    snapshot: &Snapshot,
    ladder: &Ladder,
    pins: &BTreeMap<Lsn, CaptureTime>,
    now: CaptureTime,
) -> Result<Vec<(Snapshot, Option<Plan>)>, PlanError> {
    plan_each(snapshot, ladder, pins, now, &|_, _, plan| plan(Reach::default()))
}

/// The same as far as it can be done now: of a log of which an index is damaged, what lies before that; and none goes as a whole
/// of which a part is away, as `away` says of those that have ended, the oldest first.
///
/// # Errors
/// See [`PlanError`].
pub(crate) fn plan_readable(
    snapshot: &Snapshot,
    ladder: &Ladder,
    pins: &BTreeMap<Lsn, CaptureTime>,
    now: CaptureTime,
    away: &[bool],
) -> Result<Vec<(Snapshot, Option<Plan>)>, PlanError> {
    let readable = |nth: usize, log: &Snapshot, plan: Planning<'_>| {
        let all = Reach::default();
        let reach = if away.get(nth) == Some(&true) { all.in_part() } else { all };
        match plan(reach) {
            Err(PlanError::Log(LogError::Damaged { .. })) => {
                let Some(damage) = log.index_damage(Lsn::MAX) else { return Ok(None) };
                match before_damage(log, damage, reach, plan) {
                    Err(PlanError::Log(LogError::Damaged { .. })) => Ok(None),
                    found => found.map(Some),
                }
            }
            found => found,
        }
    };
    plan_each(snapshot, ladder, pins, now, &readable)
}

/// Plans for one log, as far as it is told to.
type Planning<'a> = &'a dyn Fn(Reach) -> Result<Option<Plan>, PlanError>;

/// Looks at one log, the oldest being the first, with what plans for it.
type Look<'a> = &'a dyn Fn(usize, &Snapshot, Planning<'_>) -> Result<Option<Plan>, PlanError>;

fn plan_each(
    snapshot: &Snapshot,
    ladder: &Ladder,
    pins: &BTreeMap<Lsn, CaptureTime>,
    now: CaptureTime,
    look: Look<'_>,
) -> Result<Vec<(Snapshot, Option<Plan>)>, PlanError> {
    let mut logs = snapshot.logs();
    let in_use = logs.pop().expect("a snapshot has a log");
    let mut next = first_point(&in_use);
    let of_in_use =
        look(logs.len(), &in_use, &|reach| plan(&in_use, ladder, pins, now, Pressure::None, reach))?;
    let mut plans = vec![(in_use, of_in_use)];
    for (nth, log) in logs.into_iter().enumerate().rev() {
        let planned = match next {
            Some(next) => {
                look(nth, &log, &|reach| plan_ended(&log, next, ladder, pins, (now, Pressure::None), reach))?
            }
            None => None,
        };
        next = first_point(&log).or(next);
        plans.push((log, planned));
    }
    plans.reverse();
    Ok(plans)
}

/// The first point of a log that stands alone.
pub(crate) fn first_point(log: &Snapshot) -> Option<TimedLsn> {
    log.timeline().intervals().first().map(|interval| interval.from)
}
