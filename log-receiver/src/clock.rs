//! The receiver's clock: the only place that reads it, and that compares it with those of the agents.

use std::time::{Duration, SystemTime};

use backtide_recovery::Timeline;
use backtide_units::{CaptureTime, DiskName, Lsn};

/// So far may clocks be apart before that is told.
const APART_MAX: Duration = Duration::from_secs(3);

/// Now; 1970 when the machine's clock stands before it.
pub(crate) fn now() -> CaptureTime {
    SystemTime::now().into()
}

/// What the agent of a disk has shown of itself since it came.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Came {
    /// The first LSN that it had not given then.
    next_lsn: Lsn,
    /// So far behind, at the least, it stamps what happens.
    behind: Option<Duration>,
}

impl Came {
    pub(crate) fn new(next_lsn: Lsn) -> Self {
        Self { next_lsn, behind: None }
    }

    /// Whether it had given LSNs when it came that have not reached a log that ends here: what it has retained is on its way, or it is
    /// finding out what changed. The change with the last of them ends that, or a pass, whose T lies above them all.
    pub(crate) fn has_more_than(&self, end: Lsn) -> bool {
        // No sum: any LSN may stand in a log, and this is asked of its last.
        self.next_lsn.0.saturating_sub(end.0) > 1
    }

    /// It has answered what this side's clock had shown with how it stamps what happens. However late that comes, it was stamped
    /// between the two. What it sends else may be old and stamped right: after an outage it sends what it has
    /// retained, for hours where it has a spill, and with a slow link all comes late.
    pub(crate) fn saw_clock(&mut self, heard: CaptureTime, stamp: CaptureTime, now: CaptureTime) {
        let since = |time: CaptureTime| Duration::from_micros(time.0.saturating_sub(stamp.0));
        if heard > now || since(now) <= APART_MAX {
            // This side's clock was set back and shows nothing, or both agree.
            self.behind = None;
        } else if since(heard) > APART_MAX {
            self.behind = Some(since(heard));
        }
    }
}

/// How the clock that stamped a disk's newest point differs from this machine's.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Difference {
    /// The newest point lies so far in the future.
    Ahead(Duration),
    /// The agent that is connected stamps what happens so much too early, or more.
    Behind(Duration),
}

impl Difference {
    /// What shows of it. `came` is none when the disk's agent is not connected.
    pub(crate) fn seen(timeline: &Timeline, came: Option<Came>, now: CaptureTime) -> Option<Self> {
        Self::of(timeline.latest()?.time, came, now)
    }

    /// The same of the newest point's time.
    fn of(latest: CaptureTime, came: Option<Came>, now: CaptureTime) -> Option<Self> {
        let ahead = Duration::from_micros(latest.0.saturating_sub(now.0));
        if ahead > APART_MAX {
            return Some(Self::Ahead(ahead));
        }
        came?.behind.map(Self::Behind)
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
                "what happens to disk {disk} is stamped {} behind the receiver's clock or more: the clock of its agent is \
                 behind, or the receiver's ahead",
                text(by + Duration::from_millis(500))
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

    fn behind(came: Came, now: u64) -> Option<u64> {
        match Difference::of(at(5000), Some(came), at(now))? {
            Difference::Behind(by) => Some(by.as_secs()),
            Difference::Ahead(_) => None,
        }
    }

    #[test]
    fn an_answer_that_was_stamped_before_the_question_tells_of_another_clock_until_one_is_right() {
        let mut came = Came::new(Lsn(50));
        assert_eq!(behind(came, 10_000), None, "it has shown nothing yet");
        came.saw_clock(at(10_000), at(9_997), at(10_000));
        assert_eq!(behind(came, 10_000), None, "no clock is right to the second");
        came.saw_clock(at(10_005), at(10_001), at(10_005));
        assert_eq!(behind(came, 10_005), Some(4));
        came.saw_clock(at(10_010), at(10_008), at(10_090));
        assert_eq!(behind(came, 10_090), Some(4), "it comes late, and does not show that the clock is right");
        came.saw_clock(at(10_100), at(10_100), at(10_102));
        assert_eq!(behind(came, 10_102), None, "it was set right");
        assert_eq!(Difference::of(at(5000), None, at(14_200)), None, "nobody is there whose clock it is");
    }

    #[test]
    fn what_an_agent_had_when_it_came_is_more_than_a_log_or_not_whatever_lsns_they_name() {
        let had = |next, end| Came::new(Lsn(next)).has_more_than(Lsn(end));
        assert!(had(50, 48) && !had(50, 49) && !had(50, 50) && !had(50, u64::MAX) && had(u64::MAX, 0));
    }

    #[test]
    fn an_answer_that_is_long_under_way_tells_of_no_other_clock() {
        let mut came = Came::new(Lsn(50));
        for stamped in [10_000, 10_300, 10_600] {
            came.saw_clock(at(10_000), at(stamped), at(10_600));
            assert_eq!(behind(came, 10_600), None, "{stamped}");
        }
    }

    #[test]
    fn a_receiver_whose_clock_is_set_back_blames_no_agent_for_it() {
        // It was two hours ahead.
        let mut came = Came::new(Lsn(50));
        came.saw_clock(at(17_200), at(10_000), at(17_200));
        assert_eq!(behind(came, 17_200), Some(7200), "it is ahead, or the agent behind");
        came.saw_clock(at(17_205), at(10_005), at(10_005));
        assert_eq!(behind(came, 10_005), None);
        came.saw_clock(at(17_210), at(10_010), at(10_100));
        assert_eq!(behind(came, 10_100), None);
    }
}
