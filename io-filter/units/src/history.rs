//! Places in a disk's history.

use std::{
    fmt,
    str::FromStr,
    time::{SystemTime, UNIX_EPOCH},
};

use serde::{Deserialize, Serialize};

/// Position of a write in one disk's log: strictly increasing over the disk's whole life.
///
/// Not dense: numbers can be skipped, never used twice. `Lsn::ZERO` comes before every write.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(transparent)]
pub struct Lsn(pub u64);

/// How often a disk was attached. A receiver refuses an epoch lower than one it has seen.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(transparent)]
pub struct Epoch(pub u64);

/// How many entries a receiver's log of a disk has. It grows with everything that is appended, with the blocks of
/// a pass too, which have no LSN of their own: of two states of one history the older has the lower one.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(transparent)]
pub struct LogPosition(pub u64);

/// When a write was captured: microseconds since the Unix epoch, by the agent's clock made
/// monotonic per disk.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(transparent)]
pub struct CaptureTime(pub u64);

/// Text that is no LSN.
#[derive(Debug, thiserror::Error)]
#[error("expected an LSN as a decimal number, found {found:?}")]
pub struct ParseLsnError {
    found: String,
}

impl Lsn {
    /// Before every write.
    pub const ZERO: Self = Self(0);
    /// At or after every write.
    pub const MAX: Self = Self(u64::MAX);

    /// The highest that is believed of a log. No disk lives to see it: a receiver that names a higher one is broken or means
    /// no good, and would leave no position for what is written next.
    pub const PLAUSIBLE_MAX: Self = Self(1 << 62);

    /// The next position.
    ///
    /// # Panics
    /// After 2^64 - 1 writes.
    pub fn next(self) -> Self {
        self.plus(1)
    }

    /// The position `count` further on.
    ///
    /// # Panics
    /// Beyond 2^64 - 1.
    pub fn plus(self, count: u64) -> Self {
        Self(self.0.checked_add(count).expect("a disk's LSNs are used up"))
    }
}

impl Epoch {
    /// How much an agent that takes a disk over from another one adds to the epoch that its receiver knows: more attaches
    /// than a host begins while it is cut off from the receiver.
    pub const TAKE_OVER_STEP: u64 = 1 << 20;

    /// The highest that is believed of an attach. Nobody attaches a disk so often: what says more is broken or means no
    /// good, and would leave no epoch for whoever attaches it next.
    pub const PLAUSIBLE_MAX: Self = Self(1 << 62);

    /// The highest that somebody else is believed to have attached a disk with: what follows it is believed too.
    pub const OTHERS_MAX: Self = Self(1 << 61);

    /// The epoch of whoever takes the disk over from an agent that had this one.
    pub fn taken_over(self) -> Self {
        Self(self.0.saturating_add(Self::TAKE_OVER_STEP))
    }

    /// Whether an attach of this epoch, after one of `before`, was that of an agent that took the disk over; the one it was
    /// taken from may have begun some attaches in between.
    pub fn takes_over_from(self, before: Self) -> bool {
        self.0.saturating_sub(before.0) >= Self::TAKE_OVER_STEP / 2
    }

    /// The next attach; the highest there is stays as it is.
    pub fn next(self) -> Self {
        Self(self.0.saturating_add(1))
    }
}

impl CaptureTime {
    /// The latest that is believed, the end of the year 9999: what a clock or a peer says beyond is nonsense.
    pub const PLAUSIBLE_MAX: Self = Self(253_402_300_799_999_999);

    /// This moment or, when the clock did not move on or went back, the one just after `previous`. So no
    /// two have the same time, and each can be named by it.
    pub fn after(self, previous: Self) -> Self {
        self.max(Self(previous.0.saturating_add(1)))
    }
}

/// What a clock shows, to the microsecond: 1970 for one that stands before it.
impl From<SystemTime> for CaptureTime {
    fn from(time: SystemTime) -> Self {
        let since = time.duration_since(UNIX_EPOCH).unwrap_or_default();
        Self(u64::try_from(since.as_micros()).unwrap_or(u64::MAX))
    }
}

impl fmt::Display for Lsn {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.fmt(f)
    }
}

impl FromStr for Lsn {
    type Err = ParseLsnError;

    fn from_str(text: &str) -> Result<Self, ParseLsnError> {
        text.parse().map(Self).map_err(|_| ParseLsnError { found: text.to_owned() })
    }
}

impl fmt::Display for Epoch {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.fmt(f)
    }
}
