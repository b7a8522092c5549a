//! Leaving off for a while what went badly: for longer when it does so again and again.

use std::time::{Duration, Instant};

/// The longest while. What went well for as long begins with the shortest again.
pub(super) const REST_MAX: Duration = Duration::from_secs(1);

/// The whiles of one thing that is left off at times.
#[derive(Debug)]
pub(super) struct Rests {
    shortest: Duration,
    /// Until when the last one lasts, and how long it is.
    last: Option<(Instant, Duration)>,
}

impl Rests {
    /// None yet; the first is the shortest.
    pub(super) const fn new(shortest: Duration) -> Self {
        Self { shortest, last: None }
    }

    /// It went badly just now.
    pub(super) fn begin(&mut self, now: Instant) {
        let last = self.last.filter(|(until, _)| now < *until + REST_MAX);
        let lasts = last.map_or(self.shortest, |(_, lasts)| (lasts * 2).min(REST_MAX));
        self.last = Some((now + lasts, lasts));
    }

    /// Whether it may be tried.
    pub(super) fn is_over(&self, now: Instant) -> bool {
        self.last.is_none_or(|(until, _)| now >= until)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn badly_again_and_again_makes_the_while_longer() {
        let mut rests = Rests::new(Duration::from_millis(20));
        let start = Instant::now();
        assert!(rests.is_over(start));
        let mut now = start;
        let mut lasted = Vec::new();
        for _ in 0..8 {
            rests.begin(now);
            let began = now;
            while !rests.is_over(now) {
                now += Duration::from_millis(1);
                assert!(now < began + 2 * REST_MAX, "the while does not end");
            }
            lasted.push((now - began).as_millis());
        }
        assert_eq!(lasted, [20, 40, 80, 160, 320, 640, 1000, 1000]);
        now += REST_MAX;
        rests.begin(now);
        assert!(rests.is_over(now + Duration::from_millis(20)), "a second of going well is the end of it");
    }
}
