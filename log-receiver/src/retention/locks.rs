//! Locks: points that nobody lets go before a time, whoever asks for it.
//!
//! A lock ends when two clocks have passed it: the machine's, and one that counts how long receivers have had the store
//! open. The machine's alone could be set forward. The other runs with a clock that nobody can set, is noted in the store
//! every round, and stands still while no receiver runs: then locks last longer than was asked, never shorter.
//!
//! What this cannot do: somebody who may write the store's files can remove them, locks and all.

use std::{
    collections::BTreeMap,
    sync::Arc,
    time::{Duration, Instant},
};

use backtide_units::{CaptureTime, Lsn};
use serde::{Deserialize, Serialize};

use super::ladder::Span;
use crate::clock;

/// Locks of one disk.
pub(crate) const LOCKS_MAX: usize = 4096;

/// The machine's clock may be ahead of the time that has passed by so much before that is told.
const JUMP: Duration = Duration::from_secs(120);

/// Both clocks at one moment.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Moment {
    /// The machine's.
    pub(crate) wall: CaptureTime,
    /// How long receivers have had the store open.
    pub(crate) open: Span,
}

/// Until when.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct Lock {
    /// As was asked, by the machine's clock.
    pub(crate) until: CaptureTime,
    /// Microseconds that receivers must have had the store open.
    open_us: u64,
}

/// A point that is locked.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct LockedPoint {
    pub(crate) time: CaptureTime,
    pub(crate) lock: Lock,
}

/// The locks of a disk.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(crate) struct Locks {
    /// Of every point: those that are there and those that come.
    pub(crate) all: Option<Lock>,
    /// Of single points.
    pub(crate) points: BTreeMap<Lsn, LockedPoint>,
}

impl Lock {
    /// One that ends at `until` by the machine's clock; none when that has been.
    pub(crate) fn new(until: CaptureTime, now: Moment) -> Option<Self> {
        let left = until.0.checked_sub(now.wall.0).filter(|left| *left > 0)?;
        Some(Self { until, open_us: now.open.0.saturating_add(left) })
    }

    /// Whether it holds.
    pub(crate) fn holds(&self, now: Moment) -> bool {
        now.wall < self.until || now.open.0 < self.open_us
    }

    /// When it ends by the machine's clock, if a receiver has the store open until then.
    pub(crate) fn ends(&self, now: Moment) -> CaptureTime {
        let left = self.open_us.saturating_sub(now.open.0);
        self.until.max(CaptureTime(now.wall.0.saturating_add(left)))
    }

    /// The one that holds longer, by each clock.
    fn later(self, other: Self) -> Self {
        Self { until: self.until.max(other.until), open_us: self.open_us.max(other.open_us) }
    }
}

impl Locks {
    /// The lock of a point, or of all points.
    pub(crate) fn of(&self, point: Option<Lsn>) -> Option<Lock> {
        match point {
            Some(lsn) => self.points.get(&lsn).map(|locked| locked.lock),
            None => self.all,
        }
    }

    /// Adds a lock to a point, or to all points: it never becomes shorter.
    pub(crate) fn add(&mut self, point: Option<(Lsn, CaptureTime)>, lock: Lock) {
        let known = self.of(point.map(|(lsn, _)| lsn));
        let lock = known.map_or(lock, |known| known.later(lock));
        match point {
            Some((lsn, time)) => drop(self.points.insert(lsn, LockedPoint { time, lock })),
            None => self.all = Some(lock),
        }
    }

    /// Takes a lock back that was added to a point, where that is locked as it was locked then: it is locked as `before`.
    pub(crate) fn take_back(&mut self, lsn: Lsn, added: LockedPoint, before: Option<LockedPoint>) {
        if self.points.get(&lsn) != Some(&added) {
            return;
        }
        match before {
            Some(before) => drop(self.points.insert(lsn, before)),
            None => drop(self.points.remove(&lsn)),
        }
    }

    /// The same of a lock that was added to all points.
    pub(crate) fn take_all_back(&mut self, added: Lock, before: Option<Lock>) {
        if self.all == Some(added) {
            self.all = before;
        }
    }

    /// Forgets those that have ended.
    pub(crate) fn prune(&mut self, now: Moment) {
        self.all = self.all.filter(|lock| lock.holds(now));
        self.points.retain(|_, locked| locked.lock.holds(now));
    }

    /// Whether there are none.
    pub(crate) fn is_empty(&self) -> bool {
        self.all.is_none() && self.points.is_empty()
    }
}

/// The clocks that locks go by. Clones share them.
#[derive(Clone)]
pub(crate) struct LockClock {
    wall: Arc<dyn Fn() -> CaptureTime + Send + Sync>,
    /// Since the store was opened.
    running: Arc<dyn Fn() -> Duration + Send + Sync>,
}

impl Default for LockClock {
    fn default() -> Self {
        let opened = Instant::now();
        Self { wall: Arc::new(clock::now), running: Arc::new(move || opened.elapsed()) }
    }
}

impl LockClock {
    /// Now, in a store that was open for `before` when this receiver opened it.
    pub(crate) fn moment(&self, before: Span) -> Moment {
        let running = u64::try_from((self.running)().as_micros()).unwrap_or(u64::MAX);
        Moment { wall: (self.wall)(), open: Span(before.0.saturating_add(running)) }
    }

    /// A sentence when the machine's clock has gone ahead of the time that has passed.
    pub(crate) fn jump(then: Moment, now: Moment) -> Option<String> {
        let passed = now.open.0.saturating_sub(then.open.0);
        let ahead = Duration::from_micros(now.wall.0.saturating_sub(then.wall.0).saturating_sub(passed));
        (ahead > JUMP).then(|| {
            format!(
                "the machine's clock went ahead by {} s more than has passed: locks of points last that much longer than \
                 they say",
                ahead.as_secs()
            )
        })
    }

    /// Clocks for tests.
    #[cfg(test)]
    pub(crate) fn of(
        wall: impl Fn() -> CaptureTime + Send + Sync + 'static,
        running: impl Fn() -> Duration + Send + Sync + 'static,
    ) -> Self {
        Self { wall: Arc::new(wall), running: Arc::new(running) }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn moment(wall: u64, open: u64) -> Moment {
        Moment { wall: CaptureTime(wall), open: Span(open) }
    }

    #[test]
    fn a_lock_ends_when_both_clocks_have_passed_it() {
        let lock = Lock::new(CaptureTime(1500), moment(1000, 70)).unwrap();
        assert!(lock.holds(moment(1499, 569)));
        assert!(lock.holds(moment(999_999, 569)), "the machine's clock was set forward");
        assert!(lock.holds(moment(3, 999_999)), "the machine's clock was set back");
        assert!(!lock.holds(moment(1500, 570)));
        assert_eq!(lock.ends(moment(1200, 270)), CaptureTime(1500));
        assert_eq!(lock.ends(moment(9000, 270)), CaptureTime(9300), "what was asked has not passed yet");
        assert_eq!(Lock::new(CaptureTime(1000), moment(1000, 0)), None);
    }

    #[test]
    fn a_lock_never_becomes_shorter_and_is_forgotten_when_it_has_ended() {
        let now = moment(1000, 0);
        let lock = |until| Lock::new(CaptureTime(until), now).unwrap();
        let (mut locks, point) = (Locks::default(), Some((Lsn(7), CaptureTime(5))));
        locks.add(point, lock(3000));
        locks.add(point, lock(2000));
        locks.add(None, lock(1500));
        assert_eq!(locks.of(Some(Lsn(7))), Some(lock(3000)));
        locks.add(point, lock(4000));
        assert_eq!(locks.of(Some(Lsn(7))), Some(lock(4000)));
        locks.prune(moment(1600, 600));
        assert_eq!((locks.all, locks.points.len()), (None, 1));
        locks.prune(moment(4000, 3000));
        assert!(locks.is_empty());
    }

    #[test]
    fn a_clock_that_was_set_forward_is_told_of() {
        assert_eq!(LockClock::jump(moment(0, 0), moment(60_000_000, 60_000_000)), None);
        assert_eq!(LockClock::jump(moment(900, 0), moment(5, 60_000_000)), None, "back is not forward");
        let told = LockClock::jump(moment(0, 0), moment(4_000_000_000, 60_000_000)).unwrap();
        assert!(told.contains("3940 s"), "{told}");
    }

    #[test]
    fn only_a_lock_that_nobody_has_touched_since_is_taken_back() {
        let at = |until| Lock { until: CaptureTime(until), open_us: 9 };
        let (lsn, time) = (Lsn(7), CaptureTime(5));
        let locked = |until| LockedPoint { time, lock: at(until) };
        let mut locks = Locks::default();
        locks.add(Some((lsn, time)), at(100));
        let (first, mut longer) = (locks.clone(), locks.clone());
        longer.add(Some((lsn, time)), at(200));
        locks.take_back(lsn, locked(100), None);
        assert!(locks.is_empty());
        let extended = longer.clone();
        longer.take_back(lsn, locked(200), Some(locked(100)));
        assert_eq!(longer, first);
        let mut others = extended.clone();
        others.take_back(lsn, locked(100), None);
        assert_eq!(others, extended, "somebody else has locked it for longer");
    }

    #[test]
    fn only_a_lock_of_all_points_that_nobody_has_touched_since_is_taken_back() {
        let at = |until| Lock { until: CaptureTime(until), open_us: 9 };
        for before in [None, Some(at(50))] {
            let mut locks = Locks { all: before, ..Locks::default() };
            locks.add(None, at(100));
            let mut longer = locks.clone();
            locks.take_all_back(at(100), before);
            assert_eq!(locks.all, before);
            longer.add(None, at(200));
            longer.take_all_back(at(100), before);
            assert_eq!(longer.all, Some(at(200)), "somebody else has locked them for longer");
        }
    }
}
