//! The receiver's clock: the only place that reads it, and that compares it with those of the agents.

use std::time::{Duration, SystemTime};

use backtide_recovery::Timeline;
use backtide_units::{CaptureTime, DiskName, Lsn};

/// So far may the newest point be ahead before that is told.
const AHEAD_MAX: Duration = Duration::from_secs(3);

/// So far behind may something be stamped before that is told: a hello may wait as long for its disk.
const BEHIND_MAX: Duration = Duration::from_secs(90);

/// Now; 1970 when the machine's clock stands before it.
pub(crate) fn now() -> CaptureTime {
    SystemTime::now().into()
}

/// What the agent of a disk has shown of its clock since it came.
///
/// What it sends may be old and stamped right: after an outage it sends what it has retained, for hours where it has a spill, and
/// with a slow link all comes late. So a stamp counts only where it is known when at the earliest it was made: an agent gives LSNs
/// from the one in its hello on after that hello, and gives a sign of life when all that it has sent before is
/// acknowledged.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Came {
    /// When, by the receiver's clock; 0 when that was set back since and nobody knows.
    at: CaptureTime,
    /// The first LSN that it had not given then.
    next_lsn: Lsn,
    /// When something was heard of it last.
    heard: CaptureTime,
    /// So far behind, at the least, it has stamped something since.
    behind: Option<Duration>,
}

impl Came {
    pub(crate) fn new(at: CaptureTime, next_lsn: Lsn) -> Self {
        Self { at, next_lsn, heard: at, behind: None }
    }

    /// Whether it had given LSNs when it came that have not reached a log that ends here: what it has retained is on its way, or it is
    /// finding out what changed. The change with the last of them ends that, or a pass, whose T lies above them all.
    pub(crate) fn has_more_than(&self, end: Lsn) -> bool {
        self.next_lsn > end.next()
    }

    /// A change or the begin of a pass with this LSN and stamp has come.
    pub(crate) fn saw_change(&mut self, lsn: Lsn, stamp: CaptureTime, now: CaptureTime) {
        self.mind_own_clock(now);
        if lsn >= self.next_lsn {
            self.see(self.at, stamp, now);
        }
        self.heard = now;
    }

    /// A sign of life with this stamp has come.
    pub(crate) fn saw_sign(&mut self, stamp: CaptureTime, now: CaptureTime) {
        self.mind_own_clock(now);
        self.see(self.heard, stamp, now);
        self.heard = now;
    }

    /// A receiver's clock that was set back has shown nothing of the agent's. By less than what is no difference it may be.
    fn mind_own_clock(&mut self, now: CaptureTime) {
        if self.heard.0.saturating_sub(now.0) > BEHIND_MAX.as_micros() as u64 {
            (self.at, self.heard, self.behind) = (CaptureTime(0), CaptureTime(0), None);
        }
    }

    /// What was stamped so was so at `from` at the earliest.
    fn see(&mut self, from: CaptureTime, stamp: CaptureTime, now: CaptureTime) {
        let since = |time: CaptureTime| Duration::from_micros(time.0.saturating_sub(stamp.0));
        if since(from) > BEHIND_MAX {
            self.behind = Some(since(from));
        } else if since(now) <= BEHIND_MAX {
            self.behind = None;
        }
    }
}

/// How the clock that stamped a disk's newest point differs from this machine's.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Difference {
    /// The newest point lies so far in the future.
    Ahead(Duration),
    /// What the agent that is connected has stamped was so much older than it can have been, or more.
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
        if ahead > AHEAD_MAX {
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
                "what the agent of disk {disk} has sent is stamped {} behind the receiver's clock or more, late as it may \
                 have come: the clock of the agent is behind, or the receiver's ahead",
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

    /// An agent that came at second 10 000 with LSN 50 as its next one.
    fn came() -> Came {
        Came::new(at(10_000), Lsn(50))
    }

    fn behind(came: Came, now: u64) -> Option<u64> {
        match Difference::of(at(5000), Some(came), at(now))? {
            Difference::Behind(by) => Some(by.as_secs()),
            Difference::Ahead(_) => None,
        }
    }

    #[test]
    fn what_was_stamped_right_and_comes_late_tells_of_no_other_clock() {
        let mut came = came();
        assert_eq!(behind(came, 10_000), None);
        assert_eq!(
            behind(came, 10_080),
            None,
            "it looks for what has changed, and says nothing until it knows"
        );
        // It sends what it has retained for an hour, and behind that what is new.
        came.saw_change(Lsn(7), at(6400), at(10_001));
        came.saw_change(Lsn(49), at(9999), at(11_000));
        assert_eq!(behind(came, 11_000), None);
        came.saw_change(Lsn(50), at(10_001), at(12_000));
        came.saw_change(Lsn(51), at(10_500), at(13_000));
        assert_eq!(behind(came, 13_000), None);
        // A device that stands still holds up this side, too.
        came.saw_sign(at(13_030), at(13_500));
        assert_eq!(behind(came, 13_500), None);
    }

    #[test]
    fn a_stamp_from_before_the_agent_came_does_on_what_is_new_until_one_is_right() {
        let mut came = came();
        came.saw_change(Lsn(50), at(6500), at(10_100));
        assert_eq!(behind(came, 10_100), Some(3500));
        came.saw_change(Lsn(51), at(10_500), at(14_100));
        assert_eq!(
            behind(came, 14_100),
            Some(3500),
            "it may come late, and does not show that the clock is right"
        );
        came.saw_change(Lsn(52), at(14_150), at(14_200));
        assert_eq!(behind(came, 14_200), None, "it was set right");
        assert_eq!(Difference::of(at(5000), None, at(14_200)), None, "nobody is there whose clock it is");
    }

    #[test]
    fn a_receiver_whose_clock_is_set_back_blames_no_agent_for_it() {
        // It was two hours ahead.
        let mut came = Came::new(at(17_200), Lsn(50));
        came.saw_change(Lsn(50), at(10_000), at(10_000));
        assert_eq!(behind(came, 10_000), None);
        came.saw_change(Lsn(51), at(10_100), at(10_300));
        assert_eq!(behind(came, 10_300), None, "it comes late");
        came.saw_change(Lsn(52), at(17_000), at(17_250));
        assert_eq!(behind(came, 17_250), None, "also when the time is what it was then");
        let mut came = Came::new(at(17_200), Lsn(50));
        came.saw_change(Lsn(50), at(10_000), at(17_210));
        assert_eq!(behind(came, 17_210), Some(7200), "it is ahead, or the agent behind");
        came.saw_sign(at(10_030), at(10_200));
        assert_eq!(behind(came, 10_200), None, "nobody knows how late that comes");
        came.saw_sign(at(10_030), at(10_230));
        assert_eq!(behind(came, 10_230), Some(170), "what its clock shows since counts");
    }

    #[test]
    fn a_sign_of_life_does_that_is_older_than_what_was_heard_before_it() {
        let mut came = came();
        came.saw_change(Lsn(50), at(16_000), at(20_000));
        assert_eq!(behind(came, 20_000), None, "nobody knows how late that came");
        came.saw_sign(at(16_030), at(20_030));
        assert_eq!(behind(came, 20_030), Some(3970));
        came.saw_sign(at(20_060), at(20_060));
        assert_eq!(behind(came, 20_060), None);
    }
}
