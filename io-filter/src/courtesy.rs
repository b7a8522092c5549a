//! How far a resync gives way to the guest: as far as keeps what it adds to the guest's latency near a
//! target.
//!
//! The guest's requests are watched, in classes that cost alike: how long the local disk takes for
//! them while nothing is read for a resync or a verify, and how much longer while something is. Above
//! the target the reads get slower, by a part for each tenth of a second; below it faster, until
//! they are as fast as they go. The latency without them is learnt before they begin and, while they
//! go on, in short hushes: now and then the reads wait until some requests were seen alone.
//!
//! Invariants: a guest that asks for nothing holds nothing back; the reads never come to a stop; the same
//! events at the same moments give the same rates.

use std::{fmt, time::Duration};

use backtide_units::ByteCount;

/// Between two decisions.
const WINDOW: Duration = Duration::from_millis(100);

/// So many requests make a decision, or an idea of the latency without reads.
const SAMPLES: u32 = 8;

/// For so long that idea holds while reads go on.
const QUIET_AGE: Duration = Duration::from_secs(2);

/// The longest the reads wait for requests to be seen alone.
const HUSH: Duration = Duration::from_millis(50);

/// A resync goes on, however slow the disk.
const RATE_MIN: u64 = 1 << 20;

/// As much is under way as the rate brings in this time: what a request waits for behind the reads.
const IN_FLIGHT: Duration = Duration::from_millis(5);
const IN_FLIGHT_MIN: u64 = 64 << 10;

/// What a guest's request costs depends on what it is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Request {
    Read(ByteCount),
    Change(ByteCount),
    Flush,
}

/// Whether something was read beside a request, told by looking at both of its ends.
#[derive(Clone, Copy)]
pub struct Watch {
    since: Duration,
    reads_started: u64,
    alone: bool,
}

/// A mean that forgets: each new value counts an eighth.
#[derive(Clone, Copy, Debug, Default)]
struct Mean {
    nanos: u64,
    samples: u32,
}

/// See the module's description.
#[derive(Clone, Default)]
pub(crate) struct Courtesy {
    /// What the reads may add; zero to give way to nobody.
    target: Duration,
    /// Reads under way, and all that ever began.
    reading: u32,
    reads_started: u64,
    /// Latencies without reads, by class.
    quiet: [Mean; 7],
    /// When a request was last seen without.
    quiet_at: Duration,
    window: Window,
    /// What the reads may bring a second; none: as fast as it goes.
    rate: Option<u64>,
    hush: Option<Hush>,
}

#[derive(Clone, Copy, Debug, Default)]
struct Window {
    began: Duration,
    read_bytes: u64,
    /// Requests beside reads, with what they took longer than without, and all beside reads.
    compared: u32,
    added_nanos: i64,
    beside: u32,
}

/// The reads wait.
#[derive(Clone, Copy, Debug)]
struct Hush {
    /// Known when the last of those under way has ended.
    until: Option<Duration>,
    seen: u32,
}

/// The model tells states apart by what they print. Without a target nothing depends on this.
impl fmt::Debug for Courtesy {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { target, rate, hush, quiet, quiet_at, window, .. } = self;
        match target.is_zero() {
            true => f.write_str("Courtesy"),
            false => {
                write!(f, "Courtesy {{ {target:?} {rate:?} {hush:?} {quiet:?} {quiet_at:?} {window:?} }}")
            }
        }
    }
}

impl fmt::Debug for Watch {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Watch")
    }
}

impl Watch {
    /// As if the request had begun so much later.
    pub(crate) fn later_by(self, waited: Duration) -> Self {
        Self { since: self.since + waited, ..self }
    }
}

impl Request {
    fn class(self) -> usize {
        let size = |bytes: ByteCount| match bytes.0 {
            0..=16_384 => 0,
            16_385..=131_072 => 1,
            _ => 2,
        };
        match self {
            Self::Read(bytes) => size(bytes),
            Self::Change(bytes) => 3 + size(bytes),
            Self::Flush => 6,
        }
    }
}

impl Mean {
    fn add(&mut self, value: u64) {
        self.samples = (self.samples + 1).min(SAMPLES);
        let weight = u64::from(self.samples);
        self.nanos =
            self.nanos / weight * (weight - 1) + self.nanos % weight * (weight - 1) / weight + value / weight;
    }

    fn known(&self) -> Option<u64> {
        (self.samples >= SAMPLES / 2).then_some(self.nanos)
    }
}

impl Courtesy {
    /// From now on the reads may add this much to the guest's latency.
    pub(crate) fn aim(&mut self, target: Duration) {
        self.target = target;
        self.rate = None;
        self.hush = None;
    }

    /// A request of the guest begins.
    pub(crate) fn watch(&self, now: Duration) -> Watch {
        Watch { since: now, reads_started: self.reads_started, alone: self.reading == 0 }
    }

    /// It has ended. Whether reads that waited for it may go on.
    pub(crate) fn took(&mut self, now: Duration, watch: Watch, request: Request) -> bool {
        if self.target.is_zero() {
            return false;
        }
        let nanos = u64::try_from(now.saturating_sub(watch.since).as_nanos()).unwrap_or(u64::MAX);
        let quiet = &mut self.quiet[request.class()];
        if watch.alone && watch.reads_started == self.reads_started {
            quiet.add(nanos);
            self.quiet_at = now;
            let Some(hush) = &mut self.hush else { return false };
            hush.seen += 1;
            let enough = hush.seen >= SAMPLES;
            self.hush.take_if(|_| enough).is_some()
        } else {
            self.window.beside += 1;
            if let Some(alone) = quiet.known() {
                self.window.compared += 1;
                let added =
                    i64::try_from(nanos).unwrap_or(i64::MAX) - i64::try_from(alone).unwrap_or(i64::MAX);
                self.window.added_nanos = self.window.added_nanos.saturating_add(added);
            }
            false
        }
    }

    /// A read begins.
    pub(crate) fn read_begins(&mut self, now: Duration, bytes: ByteCount) {
        self.reading += 1;
        self.reads_started += 1;
        self.window.read_bytes += bytes.0;
        if !self.target.is_zero() {
            self.decide(now);
        }
    }

    /// One has ended.
    pub(crate) fn read_ended(&mut self, now: Duration) {
        self.reading -= 1;
        if let Some(hush) = &mut self.hush
            && self.reading == 0
        {
            hush.until = Some(now + HUSH);
        }
    }

    /// No read may begin before this moment; for ever: before one of those under way has ended.
    pub(crate) fn hushed_until(&self) -> Option<Duration> {
        self.hush.map(|hush| hush.until.unwrap_or(Duration::MAX))
    }

    /// Time passes: a hush does not last.
    pub(crate) fn observe(&mut self, now: Duration) {
        if self.hush.is_some_and(|hush| hush.until.is_some_and(|until| until <= now)) {
            self.hush = None;
            // Nobody was seen, or enough for now: not again at once.
            self.quiet_at = now;
        }
    }

    /// What the reads may bring a second.
    pub(crate) fn rate(&self) -> Option<ByteCount> {
        self.rate.map(ByteCount)
    }

    /// What may be under way at once, at this rate.
    pub(crate) fn in_flight_max(&self) -> Option<ByteCount> {
        let part = |rate: u64| u128::from(rate) * IN_FLIGHT.as_nanos() / 1_000_000_000;
        self.rate.map(|rate| ByteCount(u64::try_from(part(rate)).unwrap_or(u64::MAX).max(IN_FLIGHT_MIN)))
    }

    fn decide(&mut self, now: Duration) {
        let elapsed = now.saturating_sub(self.window.began);
        if elapsed < WINDOW {
            return;
        }
        let Window { read_bytes, compared, added_nanos, beside, .. } = self.window;
        self.window = Window { began: now, ..Window::default() };
        if elapsed > WINDOW * 10 {
            // Nothing was read for a while: what was counted is of another time.
            return;
        }
        let brought = u128::from(read_bytes) * 1_000_000_000 / elapsed.as_nanos().max(1);
        let brought = u64::try_from(brought).unwrap_or(u64::MAX);
        let added = (compared >= SAMPLES).then(|| added_nanos.max(0).unsigned_abs() / u64::from(compared));
        let target = u64::try_from(self.target.as_nanos()).unwrap_or(u64::MAX);
        match added {
            Some(added) if added > target => {
                let from = self.rate.unwrap_or(brought).min(brought.max(RATE_MIN));
                // At most halved, for one bad moment is no reason to stop.
                let slower = u128::from(from) * u128::from(target) / u128::from(added.max(1));
                let slower = u64::try_from(slower).unwrap_or(from).clamp(from / 2, from / 10 * 9);
                self.rate = Some(slower.max(RATE_MIN));
            }
            Some(_) | None => {
                self.rate = self.rate.filter(|rate| brought.saturating_mul(3) > rate.saturating_mul(2));
                self.rate = self.rate.map(|rate| rate.saturating_add(rate / 8 + RATE_MIN));
            }
        }
        // Somebody is there, of whom little is known.
        let stale = now.saturating_sub(self.quiet_at) > QUIET_AGE;
        if beside >= SAMPLES && (stale || compared < SAMPLES) && self.hush.is_none() {
            self.hush = Some(Hush { until: None, seen: 0 });
        }
    }
}

#[cfg(test)]
mod tests;
