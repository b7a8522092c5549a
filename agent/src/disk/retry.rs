//! The pauses between attempts to reach the receiver.
//!
//! Invariant: they grow until the receiver has had the disk for a while. How long an attempt took says nothing: one that
//! nobody answers, or whose packets are thrown away, takes longest of all.

use std::time::Duration;

/// The first pause, and the last; they double in between.
pub(super) const RETRY_FIRST: Duration = Duration::from_millis(100);
const RETRY_LAST: Duration = Duration::from_secs(5);

/// The pause that is next.
#[derive(Debug)]
pub(super) struct Retry {
    next: Duration,
}

impl Retry {
    pub(super) fn new() -> Self {
        Self { next: RETRY_FIRST }
    }

    /// The pause after an attempt; with one that was welcomed, how long the receiver had the disk then.
    pub(super) fn after(&mut self, connected: Option<Duration>) -> Duration {
        // A receiver that takes the disk and lets go of it at once is not asked all the time either.
        if connected.is_some_and(|time| time > RETRY_LAST) {
            self.next = RETRY_FIRST;
        }
        let pause = self.next;
        self.next = (pause * 2).min(RETRY_LAST);
        pause
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pauses_grow_until_the_receiver_has_had_the_disk_for_a_while() {
        let mut retry = Retry::new();
        let growing: Vec<u128> = (0..8).map(|_| retry.after(None).as_millis()).collect();
        assert_eq!(growing, [100, 200, 400, 800, 1600, 3200, 5000, 5000]);
        assert_eq!(retry.after(Some(Duration::from_millis(3))), RETRY_LAST, "it was let go of at once");
        assert_eq!(retry.after(Some(Duration::from_secs(60))), RETRY_FIRST);
        assert_eq!(retry.after(None), 2 * RETRY_FIRST);
    }
}
