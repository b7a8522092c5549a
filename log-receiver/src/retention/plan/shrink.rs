//! What goes first for want of room: single points, for they are older than what lies behind them.

use std::collections::BTreeMap;

use backtide_recovery::{Snapshot, TimedLsn};
use backtide_units::{CaptureTime, Lsn};

use super::{Plan, every_change_from};

/// Half of these single points of a log go, the oldest, but for those that are pinned; none when all are.
pub(super) fn fewer(old: &[TimedLsn], pins: &BTreeMap<Lsn, CaptureTime>) -> Option<Plan> {
    let may_go = || old.iter().filter(|point| !pins.contains_key(&point.lsn));
    let last = may_go().count().div_ceil(2).checked_sub(1)?;
    let last = may_go().nth(last)?.lsn;
    let stays = |point: &TimedLsn| pins.contains_key(&point.lsn) || point.lsn > last;
    let (kept, dropped) = old.iter().partition(|point| stays(point));
    Some(Plan { fold: None, ends: false, kept, dropped })
}

/// The oldest that goes of a disk for want of room: a single point, or else the time from which on every point is kept.
pub(crate) fn oldest_that_goes(
    snapshot: &Snapshot,
    pins: &BTreeMap<Lsn, CaptureTime>,
) -> Option<CaptureTime> {
    let logs = snapshot.logs();
    let single = logs.iter().filter_map(Snapshot::base).flat_map(|base| base.kept());
    let single = single.map(|kept| kept.at).filter(|point| !pins.contains_key(&point.lsn));
    single.chain(every_change_from(snapshot)).map(|point| point.time).min()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn points(lsns: impl IntoIterator<Item = u64>) -> Vec<TimedLsn> {
        lsns.into_iter().map(|lsn| TimedLsn { lsn: Lsn(lsn), time: CaptureTime(lsn) }).collect()
    }

    #[test]
    fn the_oldest_half_goes_and_no_pinned_one_until_none_is_left() {
        let pins = [2, 9].map(|lsn| (Lsn(lsn), CaptureTime(lsn))).into_iter().collect();
        let mut left = points(1..=9);
        for (kept, dropped) in
            [(vec![2, 6, 7, 8, 9], vec![1, 3, 4, 5]), (vec![2, 8, 9], vec![6, 7]), (vec![2, 9], vec![8])]
        {
            let plan = fewer(&left, &pins).expect("some may go");
            assert_eq!((&plan.kept, &plan.dropped), (&points(kept), &points(dropped)));
            assert!(plan.fold.is_none() && !plan.ends);
            left = plan.kept;
        }
        assert_eq!(fewer(&left, &pins), None);
        assert_eq!(fewer(&[], &pins), None);
    }
}
