//! The receiver's clock: the only place that reads it, and that compares it with those of the agents.

use std::time::{Duration, SystemTime};

use backtide_recovery::Timeline;
use backtide_units::{CaptureTime, DiskName};

/// So far may the newest point be ahead before that is told.
const AHEAD_MAX: Duration = Duration::from_secs(3);

/// So old may the newest point be of a disk that is connected and in sync: an idle one gives a sign of life every 30 s, and
/// what a busy one sends may wait for a moment.
const BEHIND_MAX: Duration = Duration::from_secs(90);

/// From an agent that has come again nothing new is expected sooner.
const FIRST_SIGN: Duration = Duration::from_secs(45);

/// Now; 1970 when the machine's clock stands before it.
pub(crate) fn now() -> CaptureTime {
    SystemTime::now().into()
}

/// When the agent of a disk came.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Came {
    /// By the receiver's clock.
    pub(crate) at: CaptureTime,
    /// The time of the newest point then.
    pub(crate) latest: Option<CaptureTime>,
}

/// How the clock that stamped a disk's newest point differs from this machine's.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Difference {
    /// The newest point lies so far in the future.
    Ahead(Duration),
    /// The newest point of a disk that is connected and in sync is so old.
    Behind(Duration),
}

impl Difference {
    /// What shows of it. `came` is none when the disk's agent is not connected.
    pub(crate) fn seen(timeline: &Timeline, came: Option<Came>, now: CaptureTime) -> Option<Self> {
        let latest = timeline.latest()?.time;
        Self::of(latest, came.filter(|_| timeline.in_sync()), now)
    }

    /// The same of the newest point's time. `came` is none when the disk's agent has not to give a sign of life.
    fn of(latest: CaptureTime, came: Option<Came>, now: CaptureTime) -> Option<Self> {
        let since = |from: CaptureTime| Duration::from_micros(now.0.saturating_sub(from.0));
        let ahead = Duration::from_micros(latest.0.saturating_sub(now.0));
        if ahead > AHEAD_MAX {
            return Some(Self::Ahead(ahead));
        }
        let came = came?;
        let has_said_something = came.latest != Some(latest) || since(came.at) > FIRST_SIGN;
        let behind = since(latest);
        (has_said_something && behind > BEHIND_MAX).then_some(Self::Behind(behind))
    }

    /// It in words.
    pub(crate) fn sentence(self, disk: &DiskName) -> String {
        match self {
            Self::Ahead(by) => format!(
                "the newest point of disk {disk} is stamped {} ahead of the receiver's clock: the clock of its agent is, or was, \
                 ahead, or the receiver's is behind",
                text(by)
            ),
            Self::Behind(by) => format!(
                "the newest point of disk {disk} is stamped {} behind the receiver's clock, though it is connected and in sync: \
                 the clock of its agent is behind or the receiver's ahead, or what it sends comes so late",
                text(by)
            ),
        }
    }
}

/// A duration as people read it.
fn text(time: Duration) -> String {
    let seconds = time.as_secs();
    let (hours, minutes) = (seconds / 3600, seconds / 60 % 60);
    match (hours, minutes) {
        (0, 0) => format!("{seconds}s"),
        (0, _) => format!("{minutes}m {}s", seconds % 60),
        (1..48, _) => format!("{hours}h {minutes}m"),
        (48.., _) => format!("{} days", hours / 24),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn at(seconds: u64) -> CaptureTime {
        CaptureTime(seconds * 1_000_000)
    }

    #[test]
    fn a_newest_point_in_the_future_tells_of_another_clock() {
        let now = at(10_000);
        assert_eq!(Difference::of(at(10_003), None, now), None);
        let ahead = Difference::of(at(13_600), None, now).unwrap();
        assert_eq!(ahead, Difference::Ahead(Duration::from_secs(3600)));
        assert!(ahead.sentence(&"vm1".parse().unwrap()).contains("vm1 is stamped 1h 0m ahead"));
    }

    #[test]
    fn an_old_newest_point_does_where_the_agent_has_to_give_signs_of_life() {
        let now = at(10_000);
        let came = |came, latest| Some(Came { at: at(came), latest });
        let behind = Some(Difference::Behind(Duration::from_secs(3600)));
        assert_eq!(Difference::of(at(6400), came(9999, None), now), behind, "it stamps what is new");
        assert_eq!(Difference::of(at(6400), came(9000, Some(at(6400))), now), behind, "a sign is overdue");
        assert_eq!(Difference::of(at(6400), came(9990, Some(at(6400))), now), None, "none is due yet");
        assert_eq!(Difference::of(at(9911), came(9000, None), now), None, "the next sign comes in time");
        assert_eq!(Difference::of(at(6400), None, now), None, "nobody is there who would give one");
    }
}
