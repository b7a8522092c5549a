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
pub(super) struct InlineWrites {
    rests_until: Cell<Option<Instant>>,
}

impl InlineWrites {
    /// Whether the next write is done on the disk's own thread; `others` are under way that were handed over.
    pub(super) fn is_allowed(&self, others: bool, now: impl FnOnce() -> Instant) -> bool {
        let Some(until) = self.rests_until.get() else { return true };
        let over = !others && now() >= until;
        if over {
            self.rests_until.set(None);
        }
        over
    }

    /// A write that was done so took from `began` to `ended`.
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
        let writes = InlineWrites::default();
        let start = Instant::now();
        let at = |ms: u64| start + Duration::from_millis(ms);
        writes.took(at(0), at(9));
        assert!(writes.is_allowed(true, || at(9)), "fast ones change nothing");
        writes.took(at(10), at(20));
        assert!(!writes.is_allowed(false, || at(21)));
        assert!(!writes.is_allowed(false, || at(1019)));
        assert!(!writes.is_allowed(true, || at(1020)), "while one is under way nothing is known");
        assert!(writes.is_allowed(false, || at(1020)));
        assert!(writes.is_allowed(true, || at(0)), "and so until the next slow one");
    }
}
