//! How fast a pass gets on and how fast the guest makes changes, and what follows for its end.
//!
//! Both rates forget: what was counts less and less, over a part of the time the pass has run, so that
//! a change is followed within seconds at the start of a pass and a whim of the link does not turn the
//! prediction of hours upside down.
//!
//! Nothing depends on any of it but what is shown.

use std::{fmt, time::Duration};

use backtide_units::{BlockCount, ByteCount};

use crate::{
    filter::Filter,
    pass::{NewWrites, Pass},
};

/// Between two samples.
const SAMPLE: Duration = Duration::from_millis(200);

/// Over how long a pass's rate is taken: a part of how long it has run, within bounds.
const SPAN_PART: u32 = 5;
const SPAN_MIN: Duration = Duration::from_millis(500);
const SPAN_MAX: Duration = Duration::from_secs(60);

/// Over how long the guest's is.
const GUEST_SPAN: Duration = Duration::from_secs(5);

/// Passes that shrink by less than this, in percent, are not told when they end.
const SHRINKS_MIN: u64 = 5;

/// A rate that forgets.
#[derive(Clone, Copy, Default)]
struct Rate {
    /// When it was sampled, and what the amount was then.
    last: Option<(Duration, u64)>,
    per_second: Option<u64>,
}

/// See the module's description.
#[derive(Clone, Copy, Default)]
pub(crate) struct Progress {
    pass: Rate,
    guest: Rate,
    /// Bytes that changes made the receiver miss, or forwarded.
    changed: u64,
}

/// What can be said of a pass's speed.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Speed {
    /// Bytes of the pass a second, lately.
    pub rate: ByteCount,
    /// Bytes a second of the guest that have to be sent beside it: every write while writes are
    /// forwarded; otherwise blocks that were not dirty before.
    pub guest: ByteCount,
    /// Until the pass ends; none when that cannot be told.
    pub pass_ends_in: Option<Duration>,
    /// Until the disk is in sync; none when that cannot be told, or never at this rate.
    pub sync_in: Option<Duration>,
}

/// The model tells states apart by what they print: this makes no difference to what happens.
impl fmt::Debug for Progress {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Progress")
    }
}

impl Rate {
    fn is_due(&self, now: Duration) -> bool {
        self.last.is_none_or(|(then, _)| now.saturating_sub(then) >= SAMPLE)
    }

    /// The rate as it would be if it were sampled now.
    fn at(&self, now: Duration, amount: u64, span: Duration) -> Option<u64> {
        let (then, before) = self.last?;
        let elapsed = now.saturating_sub(then).as_nanos();
        if elapsed == 0 {
            return self.per_second;
        }
        let gained = u128::from(amount.saturating_sub(before)) * 1_000_000_000;
        let rate = match self.per_second {
            None => gained / elapsed,
            Some(known) => (u128::from(known) * span.as_nanos() + gained) / (span.as_nanos() + elapsed),
        };
        Some(u64::try_from(rate).unwrap_or(u64::MAX))
    }

    fn sample(&mut self, now: Duration, amount: u64, span: Duration) {
        if self.is_due(now) {
            *self = Self { per_second: self.at(now, amount, span), last: Some((now, amount)) };
        }
    }
}

fn span_of(pass: &Pass, now: Duration) -> Duration {
    (now.saturating_sub(pass.started) / SPAN_PART).clamp(SPAN_MIN, SPAN_MAX)
}

fn time_for(bytes: u64, rate: u64) -> Option<Duration> {
    let nanos = u128::from(bytes) * 1_000_000_000 / u128::from(rate).max(1);
    (rate > 0).then(|| Duration::from_nanos(u64::try_from(nanos).unwrap_or(u64::MAX)))
}

impl Filter {
    /// A change made the receiver miss, or has to carry, this much more.
    pub(crate) fn note_changed(&mut self, bytes: ByteCount) {
        self.progress.changed = self.progress.changed.saturating_add(bytes.0);
    }

    pub(crate) fn sample_progress(&mut self) {
        let now = self.now.monotonic;
        self.progress.guest.sample(now, self.progress.changed, GUEST_SPAN);
        match &self.pass {
            // What is settled has to be counted, so not with every event.
            Some(pass) if self.progress.pass.is_due(now) => {
                self.progress.pass.sample(now, pass.settled().0, span_of(pass, now));
            }
            Some(_) => {}
            None => self.progress.pass = Rate::default(),
        }
    }

    /// A pass begins: the last one's speed says nothing about it.
    pub(crate) fn restart_progress(&mut self) {
        self.progress.pass = Rate { last: Some((self.now.monotonic, 0)), per_second: None };
    }

    pub(crate) fn speed_of(&self, pass: &Pass, now: Duration) -> Speed {
        let settled = pass.settled();
        let rate = self.progress.pass.at(now, settled.0, span_of(pass, now)).unwrap_or(0);
        let guest = self.progress.guest.at(now, self.progress.changed, GUEST_SPAN).unwrap_or(0);
        // The first moments are faster than what it is held to.
        let lasting = self.pace.rate().map_or(rate, |held| rate.min(held.0));
        let pass_ends_in = time_for(pass.total.0.saturating_sub(settled.0), lasting);
        let sync_in = match pass.new_writes {
            // Another one follows, of how much is not known, or after a pause.
            _ if self.lost.is_some() || !pass.given_up.is_empty() => None,
            NewWrites::Forwarded => {
                let failed = self.passive.count().bytes().0;
                pass_ends_in.and_then(|ends| match failed {
                    0 => Some(ends),
                    failed => Some(ends + time_for(failed, lasting)?),
                })
            }
            NewWrites::Coalesced => pass_ends_in.and_then(|ends| {
                // Each pass is as much smaller than the one before as the guest is slower than it.
                let shrinks = rate.checked_sub(guest)?;
                let worth_it = u128::from(shrinks) * 100 >= u128::from(rate) * u128::from(SHRINKS_MIN);
                let gathered = BlockCount(self.passive.count().0).bytes().0;
                let meanwhile = u128::from(guest) * ends.as_nanos() / 1_000_000_000;
                let next = gathered.saturating_add(u64::try_from(meanwhile).unwrap_or(u64::MAX));
                Some(ends + time_for(next, shrinks)?).filter(|_| worth_it)
            }),
        };
        Speed { rate: ByteCount(rate), guest: ByteCount(guest), pass_ends_in, sync_in }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const SPAN: Duration = Duration::from_secs(2);

    #[test]
    fn a_rate_follows_what_happens_and_a_standstill() {
        let mut rate = Rate { last: Some((Duration::ZERO, 0)), per_second: None };
        let mut amount = 0;
        for step in 1..=50 {
            amount += 200;
            rate.sample(SAMPLE * step, amount, SPAN);
        }
        assert_eq!(rate.per_second, Some(1000));
        let later = SAMPLE * 50 + Duration::from_secs(2);
        assert_eq!(rate.at(later, amount, SPAN), Some(500), "nothing moved for as long as the span");
        for step in 51..=100 {
            amount += 400;
            rate.sample(SAMPLE * step, amount, SPAN);
        }
        assert!(rate.per_second > Some(1950), "{:?}", rate.per_second);
    }

    #[test]
    fn what_stands_still_has_no_end() {
        assert_eq!(time_for(10, 0), None);
        assert_eq!(time_for(3_000, 1_000), Some(Duration::from_secs(3)));
    }
}
