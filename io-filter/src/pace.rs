//! How fast the drain and a verify may read: an operator's limit on what they take from disk and link,
//! and as fast as the guest bears, see [`Courtesy`].
//!
//! Reads are spaced so that their bytes keep to the rate; idle time earns nothing, so a pause is
//! not followed by a burst. A resync that loses ground is held back by neither.

use std::time::Duration;

use backtide_units::ByteCount;

use crate::courtesy::{Courtesy, Request, Watch};

/// A read brings at most this part of what a second may.
const SMOOTH_PARTS: u64 = 20;

/// But for that no read is smaller.
const READ_MIN: u64 = 64 << 10;

/// The spacing of reads.
#[derive(Clone, Debug, Default)]
pub(crate) struct Pace {
    /// Zero: no limit.
    limit: u64,
    courtesy: Courtesy,
    /// No read before this moment.
    next: Duration,
    /// The resync loses ground: nothing holds it back.
    free: bool,
}

impl Pace {
    /// An operator's limit, in bytes a second; zero for none.
    pub(crate) fn limit(&mut self, bytes_per_second: ByteCount) {
        self.limit = bytes_per_second.0;
        self.next = Duration::ZERO;
    }

    /// What reads may add to the guest's latency; zero to give way to nobody.
    pub(crate) fn aim(&mut self, target: Duration) {
        self.courtesy.aim(target);
        self.next = Duration::ZERO;
    }

    /// Whether nothing holds the reads back.
    pub(crate) fn set_free(&mut self, free: bool) {
        self.free = free;
    }

    /// What holds the reads back now, in bytes a second.
    pub(crate) fn rate(&self) -> Option<ByteCount> {
        let limit = (self.limit > 0).then_some(ByteCount(self.limit));
        let rates = [limit, self.courtesy.rate()];
        rates.into_iter().flatten().min().filter(|_| !self.free)
    }

    /// When the next read may start, if that lies ahead.
    pub(crate) fn due(&self, now: Duration) -> Option<Duration> {
        if self.free {
            return None;
        }
        let spaced = self.rate().map(|_| self.next);
        spaced.max(self.courtesy.hushed_until()).filter(|due| *due > now)
    }

    /// The most that may be under way: a slow resync makes many small reads instead of a large one now
    /// and then.
    pub(crate) fn in_flight_max(&self) -> Option<ByteCount> {
        let limit = (self.limit > 0).then_some(ByteCount((self.limit / SMOOTH_PARTS).max(READ_MIN)));
        let most = [limit, self.courtesy.in_flight_max()];
        most.into_iter().flatten().min().filter(|_| !self.free)
    }

    pub(crate) fn observe(&mut self, now: Duration) {
        self.courtesy.observe(now);
    }

    /// A read begins.
    pub(crate) fn read_begins(&mut self, now: Duration, bytes: ByteCount) {
        self.courtesy.read_begins(now, bytes);
        if let Some(rate) = self.rate() {
            let nanos = u128::from(bytes.0) * 1_000_000_000 / u128::from(rate.0);
            self.next = self.next.max(now) + Duration::from_nanos(u64::try_from(nanos).unwrap_or(u64::MAX));
        }
    }

    /// One has ended.
    pub(crate) fn read_ended(&mut self, now: Duration) {
        self.courtesy.read_ended(now);
    }

    /// A request of the guest begins.
    pub(crate) fn watch(&self, now: Duration) -> Watch {
        self.courtesy.watch(now)
    }

    /// It has ended. Whether reads that waited for it may go on.
    pub(crate) fn guest_took(&mut self, now: Duration, watch: Watch, request: Request) -> bool {
        self.courtesy.took(now, watch, request)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn reads_keep_to_the_limit_and_a_pause_earns_nothing() {
        let mut pace = Pace::default();
        pace.limit(ByteCount(1000));
        let second = Duration::from_secs;
        assert_eq!(pace.due(second(10)), None);
        pace.read_begins(second(10), ByteCount(2000));
        assert_eq!(pace.due(second(11)), Some(second(12)));
        assert_eq!(pace.due(second(60)), None);
        pace.read_begins(second(60), ByteCount(1000));
        assert_eq!(pace.due(second(60)), Some(second(61)));
    }

    #[test]
    fn without_a_limit_nothing_waits() {
        let mut pace = Pace::default();
        pace.read_begins(Duration::ZERO, ByteCount(1 << 40));
        assert_eq!(pace.due(Duration::ZERO), None);
    }

    #[test]
    fn what_loses_ground_is_not_held_back() {
        let mut pace = Pace::default();
        pace.limit(ByteCount(1000));
        pace.read_begins(Duration::ZERO, ByteCount(2000));
        pace.set_free(true);
        assert_eq!(pace.due(Duration::ZERO), None);
        pace.set_free(false);
        assert_eq!(pace.due(Duration::ZERO), Some(Duration::from_secs(2)));
    }
}
