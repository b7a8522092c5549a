//! Whether writes to the page cache are done at once, on the disk's own thread.
//!
//! Most cost less than handing them over would. But the system makes a writer wait that fills the page
//! cache faster than the device empties it, and a thread that waits serves nobody: neither reads nor
//! the stream. So after a write that took long, writes are handed over for a while.

use std::{
    cell::Cell,
    time::{Duration, Instant},
};

/// A write to the page cache that takes longer has waited for a device.
const SLOW: Duration = Duration::from_millis(10);

/// For how long writes are handed over then: one in that time finds out whether they still wait.
const REST: Duration = Duration::from_secs(1);

/// How writes went lately.
#[derive(Debug, Default)]
pub(super) struct Pace {
    rests_until: Cell<Option<Instant>>,
}

impl Pace {
    /// Whether the next write is done at once; `others` are under way that were handed over.
    pub(super) fn is_at_once(&self, others: bool, now: impl FnOnce() -> Instant) -> bool {
        let Some(until) = self.rests_until.get() else { return true };
        let over = !others && now() >= until;
        if over {
            self.rests_until.set(None);
        }
        over
    }

    /// A write that was done at once took from `began` to `ended`.
    pub(super) fn took(&self, began: Instant, ended: Instant) {
        if ended.saturating_duration_since(began) >= SLOW {
            self.rests_until.set(Some(ended + REST));
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_slow_write_has_the_next_ones_handed_over_for_a_while() {
        let pace = Pace::default();
        let start = Instant::now();
        let at = |ms: u64| start + Duration::from_millis(ms);
        pace.took(at(0), at(9));
        assert!(pace.is_at_once(true, || at(9)), "fast ones change nothing");
        pace.took(at(10), at(20));
        assert!(!pace.is_at_once(false, || at(21)));
        assert!(!pace.is_at_once(false, || at(1019)));
        assert!(!pace.is_at_once(true, || at(1020)), "while one is under way nothing is known");
        assert!(pace.is_at_once(false, || at(1020)));
        assert!(pace.is_at_once(true, || at(0)), "and so until the next slow one");
    }
}
