//! Whether what may have to wait for a device is done at once, on the disk's own thread.
//!
//! Most writes to the page cache, and most flushes of little on a fast device, cost less than handing them over would: a
//! thread that does them has to be woken, and this one again when they are done. But the system makes a writer wait that fills the page
//! cache faster than the device empties it, and a flush waits for whatever the device does; a thread that waits serves nobody: neither reads nor
//! the stream. So after one that took long they are handed over for a while. One takes long as well when
//! the thread had to wait for a processor, which nothing tells apart: so the first while is short, and
//! only what is slow again and again makes it long.

use std::{
    cell::{Cell, RefCell},
    time::{Duration, Instant},
};

use super::rest::Rests;

/// A write to the page cache that takes longer has waited for a device, or for a processor.
pub(super) const SLOW_WRITE: Duration = Duration::from_millis(10);

/// A flush that takes longer does so on a device that had better be waited for elsewhere: a disk that turns, or one that
/// others keep busy.
pub(super) const SLOW_FLUSH: Duration = Duration::from_millis(2);

/// For how long they are handed over then: one after that time finds out whether they still wait.
const REST_MIN: Duration = Duration::from_millis(20);

/// How requests of one kind went lately.
#[derive(Debug)]
pub(super) struct AtOnce {
    slow: Duration,
    rests: RefCell<Rests>,
    /// One was slow, and none has been done at once since.
    rests_now: Cell<bool>,
}

impl AtOnce {
    /// What takes as long as `slow` is handed over for a while.
    pub(super) fn new(slow: Duration) -> Self {
        Self { slow, rests: RefCell::new(Rests::new(REST_MIN)), rests_now: Cell::new(false) }
    }

    /// Whether the next one is done on the disk's own thread; `stuck` says whether others are under way that were
    /// handed over and do not end.
    pub(super) fn is_allowed(
        &self,
        now: impl FnOnce() -> Instant,
        stuck: impl FnOnce(Instant) -> bool,
    ) -> bool {
        if self.rests_now.get() {
            let now = now();
            let over = self.rests.borrow().is_over(now) && !stuck(now);
            self.rests_now.set(!over);
        }
        !self.rests_now.get()
    }

    /// One that was done so took from `began` to `ended`.
    pub(super) fn took(&self, began: Instant, ended: Instant) {
        if ended.saturating_duration_since(began) >= self.slow {
            self.rests.borrow_mut().begin(ended);
            self.rests_now.set(true);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const FREE: fn(Instant) -> bool = |_| false;

    #[test]
    fn a_slow_one_has_the_next_ones_handed_over_for_a_while() {
        let writes = AtOnce::new(SLOW_WRITE);
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
        writes.took(at(41), at(51));
        assert!(!writes.is_allowed(|| at(90), FREE), "slow again: for twice as long");
        assert!(writes.is_allowed(|| at(91), FREE));
    }
}
