//! When a scrub begins by itself: no I/O, no clock, no thread. Whoever drives it says what there is to see, and does what it says.
//!
//! It is due so long after the last whole one has ended, whoever wanted that, and however it ended: one that a person has called
//! off is not begun again at once, nor is one that fell; one that could not begin is. A store in which none has ended yet is read at once. What is due
//! waits while something else runs or is in the way, and begins when that is over.

use std::time::Duration;

use backtide_units::CaptureTime;

/// One that could not begin is tried again after this.
const TRY_AGAIN: Duration = Duration::from_secs(60 * 60);

/// When the last one ended further in the future than this, the clock was ahead then, and nobody knows when that was.
const AHEAD_MAX: Duration = Duration::from_secs(60 * 60);

/// See the module's description.
#[derive(Debug)]
pub(crate) struct Schedule {
    every: Duration,
    /// When one could not begin, and why, unless one did since.
    failed: Option<(CaptureTime, String)>,
}

/// Which scrub runs.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Runs {
    Nothing,
    /// One of a disk.
    Part,
    /// One of everything.
    Whole,
}

/// What there is to see.
#[derive(Clone, Debug)]
pub(crate) struct Seen {
    pub(crate) now: CaptureTime,
    /// When the last whole scrub ended, if any has.
    pub(crate) ended: Option<CaptureTime>,
    pub(crate) runs: Runs,
    /// Why the store is not to be disturbed, a sentence.
    pub(crate) hindered: Option<String>,
}

/// What comes next.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Next {
    /// One runs that is as good.
    Runs,
    /// It is to begin now.
    Begin,
    /// It begins then at the earliest; why it has not yet, where it is due.
    Later { at: CaptureTime, waits: Option<String> },
}

impl Schedule {
    /// One scrub `every` so long.
    pub(crate) fn new(every: Duration) -> Self {
        Self { every, failed: None }
    }

    /// What comes next.
    pub(crate) fn next(&self, seen: Seen) -> Next {
        let Seen { now, ended, runs, hindered } = seen;
        // A time that lies further ahead was stamped by a clock that was wrong.
        let ended = ended.filter(|ended| *ended <= after(now, AHEAD_MAX));
        let due = ended.map_or(now, |ended| after(ended, self.every));
        match runs {
            Runs::Whole => return Next::Runs,
            Runs::Nothing | Runs::Part if due > now => return Next::Later { at: due, waits: None },
            Runs::Part => return Next::Later { at: due, waits: Some("a scrub of one disk runs".to_owned()) },
            Runs::Nothing => {}
        }
        if hindered.is_some() {
            return Next::Later { at: due, waits: hindered };
        }
        match &self.failed {
            // Not where the clock was set back since: nobody knows how long it would wait.
            Some((at, why)) if *at <= now && now < after(*at, TRY_AGAIN) => {
                Next::Later { at: after(*at, TRY_AGAIN), waits: Some(why.clone()) }
            }
            Some(_) | None => Next::Begin,
        }
    }

    /// One has begun.
    pub(crate) fn begun(&mut self) {
        self.failed = None;
    }

    /// One could not begin.
    pub(crate) fn failed(&mut self, now: CaptureTime, why: String) {
        self.failed = Some((now, why));
    }
}

fn after(time: CaptureTime, duration: Duration) -> CaptureTime {
    CaptureTime(time.0.saturating_add(u64::try_from(duration.as_micros()).unwrap_or(u64::MAX)))
}

#[cfg(test)]
mod tests {
    use super::*;

    const HOUR: u64 = 60 * 60;
    const WEEK: u64 = 7 * 24 * HOUR;

    fn at(seconds: u64) -> CaptureTime {
        CaptureTime(seconds * 1_000_000)
    }

    fn weekly() -> Schedule {
        Schedule::new(Duration::from_secs(WEEK))
    }

    fn seen(now: u64, ended: Option<u64>) -> Seen {
        Seen { now: at(now), ended: ended.map(at), runs: Runs::Nothing, hindered: None }
    }

    fn later(seconds: u64, waits: Option<&str>) -> Next {
        Next::Later { at: at(seconds), waits: waits.map(str::to_owned) }
    }

    #[test]
    fn one_begins_so_long_after_the_last_has_ended_and_not_before() {
        let (schedule, last) = (weekly(), 10 * WEEK);
        for now in [last, last + 1, last + WEEK - 1] {
            assert_eq!(schedule.next(seen(now, Some(last))), later(last + WEEK, None), "{now}");
        }
        for now in [last + WEEK, last + WEEK + 1, last + 50 * WEEK] {
            assert_eq!(schedule.next(seen(now, Some(last))), Next::Begin, "{now}");
        }
        assert_eq!(schedule.next(seen(last, None)), Next::Begin, "nobody has ever read that store");
    }

    #[test]
    fn there_are_never_two_at_once() {
        let (schedule, last) = (weekly(), 10 * WEEK);
        for (now, ended) in [(last + 1, Some(last)), (last + WEEK, Some(last)), (last, None)] {
            let whole = Seen { runs: Runs::Whole, ..seen(now, ended) };
            assert_eq!(schedule.next(whole), Next::Runs, "{now}");
        }
        let part = |now| Seen { runs: Runs::Part, ..seen(now, Some(last)) };
        assert_eq!(schedule.next(part(last + 1)), later(last + WEEK, None));
        assert_eq!(
            schedule.next(part(last + WEEK + 5)),
            later(last + WEEK, Some("a scrub of one disk runs")),
            "it has not read the others"
        );
    }

    #[test]
    fn a_store_that_is_not_to_be_disturbed_is_scrubbed_when_that_is_over() {
        let (schedule, last) = (weekly(), 10 * WEEK);
        let full = |now| Seen { hindered: Some("the store is full".to_owned()), ..seen(now, Some(last)) };
        assert_eq!(schedule.next(full(last + 1)), later(last + WEEK, None), "it is not due");
        let due = last + WEEK + 9;
        assert_eq!(schedule.next(full(due)), later(last + WEEK, Some("the store is full")));
        assert_eq!(schedule.next(seen(due, Some(last))), Next::Begin);
        let none = Seen { ended: None, ..full(due) };
        assert_eq!(schedule.next(none), later(due, Some("the store is full")));
    }

    #[test]
    fn one_that_could_not_begin_is_tried_again_after_an_hour() {
        let (mut schedule, last) = (weekly(), 10 * WEEK);
        let due = last + WEEK + 5;
        schedule.failed(at(due), "no thread".to_owned());
        for now in [due, due + HOUR - 1] {
            assert_eq!(schedule.next(seen(now, Some(last))), later(due + HOUR, Some("no thread")), "{now}");
        }
        assert_eq!(schedule.next(seen(due + HOUR, Some(last))), Next::Begin);
        assert_eq!(schedule.next(seen(due - 1, Some(last))), Next::Begin, "the clock was set back");
        schedule.begun();
        assert_eq!(schedule.next(seen(due, Some(last))), Next::Begin);
    }

    #[test]
    fn a_clock_that_was_ahead_puts_it_off_by_no_more_than_an_hour() {
        let (schedule, now) = (weekly(), 10 * WEEK);
        let ahead = now + HOUR;
        assert_eq!(schedule.next(seen(now, Some(ahead))), later(ahead + WEEK, None));
        assert_eq!(schedule.next(seen(now, Some(ahead + 1))), Next::Begin);
        let never = Schedule::new(Duration::from_secs(u64::MAX));
        assert_eq!(never.next(seen(now, Some(now))), Next::Later { at: CaptureTime(u64::MAX), waits: None });
    }
}
