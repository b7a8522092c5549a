//! How fast the store fills, and when it is full at that rate: what its file system has free, looked at every round.
//!
//! It tells what was, of the last hour: what other programs take on the same file system counts too, and so does room that
//! retention has given back.

use std::{collections::VecDeque, time::Duration};

use backtide_units::ByteCount;

/// So far it looks back.
const WINDOW: Duration = Duration::from_secs(3600);

/// Below it nothing is said.
const WINDOW_MIN: Duration = Duration::from_secs(60);

/// Looks that are kept; with shorter rounds some are left out.
const LOOKS_MAX: u32 = 120;

/// How the store filled.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Growth {
    /// Bytes a second; none when it did not grow.
    pub(crate) bytes_per_second: ByteCount,
    /// In so much time.
    pub(crate) over: Duration,
    /// New data is refused after so long, at that rate.
    pub(crate) full_in: Option<Duration>,
}

/// What was free when.
#[derive(Debug, Default)]
pub(crate) struct Forecast(VecDeque<(Duration, ByteCount)>);

impl Forecast {
    /// Takes what is free at a time since the start, of which `reserve` is not to be had; none before there is enough to go by.
    pub(crate) fn look(&mut self, at: Duration, free: ByteCount, reserve: ByteCount) -> Option<Growth> {
        let looks = &mut self.0;
        while looks.front().is_some_and(|(then, _)| at.saturating_sub(*then) > WINDOW) {
            looks.pop_front();
        }
        if looks.back().is_none_or(|(then, _)| at.saturating_sub(*then) >= WINDOW / LOOKS_MAX) {
            looks.push_back((at, free));
        }
        let (then, before) = *looks.front()?;
        let over = at.saturating_sub(then);
        if over < WINDOW_MIN {
            return None;
        }
        let grown = u128::from(before.0.saturating_sub(free.0));
        let rate = u64::try_from(grown * 1000 / over.as_millis()).unwrap_or(u64::MAX);
        let left = free.0.saturating_sub(reserve.0);
        let full_in = left.checked_div(rate).map(Duration::from_secs);
        Some(Growth { bytes_per_second: ByteCount(rate), over, full_in })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn seconds(seconds: u64) -> Duration {
        Duration::from_secs(seconds)
    }

    #[test]
    fn it_goes_by_the_last_hour_and_says_nothing_too_early() {
        let (mut forecast, reserve) = (Forecast::default(), ByteCount(1000));
        assert_eq!(forecast.look(seconds(0), ByteCount(1_001_000), reserve), None);
        assert_eq!(forecast.look(seconds(59), ByteCount(900_000), reserve), None);
        let growth = forecast.look(seconds(100), ByteCount(901_000), reserve).unwrap();
        let expected =
            Growth { bytes_per_second: ByteCount(1000), over: seconds(100), full_in: Some(seconds(900)) };
        assert_eq!(growth, expected);
        // Two hours later the beginning is forgotten.
        forecast.look(seconds(7000), ByteCount(901_000), reserve);
        let quiet = forecast.look(seconds(7200), ByteCount(901_000), reserve).unwrap();
        assert_eq!((quiet.bytes_per_second, quiet.full_in), (ByteCount(0), None));
        assert_eq!(quiet.over, seconds(200));
    }

    #[test]
    fn room_that_came_back_is_no_growth_and_a_full_store_is_full_now() {
        let mut forecast = Forecast::default();
        forecast.look(seconds(0), ByteCount(5000), ByteCount(1000));
        let more = forecast.look(seconds(60), ByteCount(9000), ByteCount(1000)).unwrap();
        assert_eq!(more.full_in, None);
        let full = forecast.look(seconds(120), ByteCount(900), ByteCount(1000)).unwrap();
        assert_eq!(full.full_in, Some(seconds(0)));
    }

    #[test]
    fn many_short_rounds_are_few_looks() {
        let mut forecast = Forecast::default();
        for at in 0..100_000 {
            forecast.look(Duration::from_millis(at * 100), ByteCount(1 << 40), ByteCount(0));
        }
        assert!(forecast.0.len() <= LOOKS_MAX as usize + 1, "{}", forecast.0.len());
    }
}
