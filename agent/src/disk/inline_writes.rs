//! Whether writes to the page cache are done at once, on the disk's own thread.
//!
//! Most cost less than handing them over would. But the system makes a writer wait that fills the page
//! cache faster than the device empties it, and a thread that waits serves nobody: neither reads nor
//! the stream. So after a write that took long, writes are handed over for a while. A write takes long as well when
//! the thread had to wait for a processor, which nothing tells apart: so the first while is short, and
//! only writes that are slow again and again make it long.

use std::{
    cell::Cell,
    time::{Duration, Instant},
};

/// A write to the page cache that takes longer has waited for a device, or for a processor.
pub(super) const SLOW: Duration = Duration::from_millis(10);

/// For how long writes are handed over then: one in that time finds out whether they still wait.
const REST_MIN: Duration = Duration::from_millis(20);

/// The longest, after one that was slow again and again. Writes that were done at once for as long are well again.
const REST_MAX: Duration = Duration::from_secs(1);

/// How writes went lately.
#[derive(Debug, Default)]
pub(super) struct InlineWrites {
    rest: Cell<Option<Rest>>,
}

/// After a slow write.
#[derive(Clone, Copy, Debug)]
struct Rest {
    until: Instant,
    lasts: Duration,
    over: bool,
}

impl InlineWrites {
    /// Whether the next write is done on the disk's own thread; `stuck` says whether others are under way that were
    /// handed over and do not end.
    pub(super) fn is_allowed(
        &self,
        now: impl FnOnce() -> Instant,
        stuck: impl FnOnce(Instant) -> bool,
    ) -> bool {
        let Some(mut rest) = self.rest.get().filter(|rest| !rest.over) else { return true };
        let now = now();
        rest.over = now >= rest.until && !stuck(now);
        self.rest.set(Some(rest));
        rest.over
    }

    /// A write that was done so took from `began` to `ended`.
    pub(super) fn took(&self, began: Instant, ended: Instant) {
        if ended.saturating_duration_since(began) < SLOW {
            return;
        }
        let last = self.rest.get().filter(|last| ended < last.until + REST_MAX);
        let lasts = last.map_or(REST_MIN, |last| (last.lasts * 2).min(REST_MAX));
        self.rest.set(Some(Rest { until: ended + lasts, lasts, over: false }));
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const FREE: fn(Instant) -> bool = |_| false;

    #[test]
    fn a_slow_write_has_the_next_ones_handed_over_for_a_while() {
        let writes = InlineWrites::default();
        let start = Instant::now();
        let at = |ms: u64| start + Duration::from_millis(ms);
        writes.took(at(0), at(9));
        assert!(writes.is_allowed(|| at(9), |_| true), "fast ones change nothing");
        writes.took(at(10), at(20));
        assert!(!writes.is_allowed(|| at(21), FREE));
        assert!(!writes.is_allowed(|| at(39), FREE));
        assert!(!writes.is_allowed(|| at(40), |_| true), "while others do not end they would not either");
        assert!(writes.is_allowed(|| at(40), FREE));
        assert!(writes.is_allowed(|| at(40), |_| true), "and so until the next slow one");
    }

    #[test]
    fn slow_again_and_again_makes_the_while_longer() {
        let writes = InlineWrites::default();
        let start = Instant::now();
        let mut now = start;
        let mut rests = Vec::new();
        for _ in 0..8 {
            writes.took(now, now + SLOW);
            now += SLOW;
            let slow = now;
            while !writes.is_allowed(|| now, FREE) {
                now += Duration::from_millis(1);
                assert!(now < slow + 2 * REST_MAX, "the while does not end");
            }
            rests.push((now - slow).as_millis());
        }
        assert_eq!(rests, [20, 40, 80, 160, 320, 640, 1000, 1000]);
        now += REST_MAX;
        writes.took(now, now + SLOW);
        assert!(writes.is_allowed(|| now + SLOW + REST_MIN, FREE), "a second without one is the end of it");
    }
}
