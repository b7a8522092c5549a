//! How fast the drain may read: an operator's limit on what a resync takes from disk and link.
//!
//! Reads are spaced so that their bytes keep to the limit; idle time earns nothing, so a pause is
//! not followed by a burst.

use std::time::Duration;

use backtide_units::ByteCount;

/// The spacing of the drain's reads.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct Pace {
    /// Zero: no limit.
    bytes_per_second: u64,
    /// No read before this moment.
    next: Duration,
}

impl Pace {
    pub(crate) fn limit(&mut self, bytes_per_second: ByteCount) {
        *self = Self { bytes_per_second: bytes_per_second.0, next: Duration::ZERO };
    }

    /// When the next read may start, if that lies ahead.
    pub(crate) fn due(&self, now: Duration) -> Option<Duration> {
        (self.bytes_per_second > 0 && self.next > now).then_some(self.next)
    }

    /// A read has started.
    pub(crate) fn took(&mut self, now: Duration, bytes: ByteCount) {
        if self.bytes_per_second > 0 {
            let nanos = u128::from(bytes.0) * 1_000_000_000 / u128::from(self.bytes_per_second);
            self.next = self.next.max(now) + Duration::from_nanos(u64::try_from(nanos).unwrap_or(u64::MAX));
        }
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
        pace.took(second(10), ByteCount(2000));
        assert_eq!(pace.due(second(11)), Some(second(12)));
        assert_eq!(pace.due(second(60)), None);
        pace.took(second(60), ByteCount(1000));
        assert_eq!(pace.due(second(60)), Some(second(61)));
    }

    #[test]
    fn without_a_limit_nothing_waits() {
        let mut pace = Pace::default();
        pace.took(Duration::ZERO, ByteCount(1 << 40));
        assert_eq!(pace.due(Duration::ZERO), None);
    }
}
