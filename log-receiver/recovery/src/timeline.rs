//! The timeline: which points a log gives back.
//!
//! Invariants: intervals are ordered and do not touch; a hole lies between two of them, or after the
//! last and is open; while `in_sync`, the last interval ends at `covered` and no hole is open.

use std::fmt;

use backtide_segment::PassReason;
use backtide_units::{ByteCount, CaptureTime, DiskName, Epoch, Lsn};
use uuid::Uuid;

use crate::{Nearest, PointError, TimedLsn, point::time_text};

/// LSNs of which every one is a recovery point, both ends included.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Interval {
    /// The first point.
    pub from: TimedLsn,
    /// The last point.
    pub to: TimedLsn,
}

/// LSNs that are no points: after `from` and before `to`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Hole {
    /// The last point before it; `None` before the first interval ever.
    pub from: Option<TimedLsn>,
    /// The first point after it; `None` while it is open.
    pub to: Option<TimedLsn>,
    /// The reason given by the pass that opened it.
    pub reason: PassReason,
    /// How many passes it has taken so far.
    pub passes: u64,
}

/// A pass that is being received.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct OpenPass {
    /// T.
    pub at: Lsn,
    /// When T was frozen.
    pub time: CaptureTime,
}

/// A named point.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Mark {
    /// Its label.
    pub label: String,
    /// Where and when.
    pub at: TimedLsn,
}

/// The newest attach.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Attached {
    /// Which attach.
    pub epoch: Epoch,
    /// Which of several attaches that claim this epoch.
    pub attach: Uuid,
    /// The disk's name then.
    pub name: DiskName,
    /// The disk's size then.
    pub size: ByteCount,
    /// When.
    pub time: CaptureTime,
}

/// What a log can give back.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Timeline {
    pub(crate) intervals: Vec<Interval>,
    pub(crate) holes: Vec<Hole>,
    pub(crate) marks: Vec<Mark>,
    pub(crate) open_pass: Option<OpenPass>,
    pub(crate) in_interval: bool,
    pub(crate) last: TimedLsn,
    pub(crate) attached: Option<Attached>,
    pub(crate) highest: Lsn,
    pub(crate) records: u64,
    pub(crate) flushes: u64,
    pub(crate) last_flush: Option<TimedLsn>,
}

impl Timeline {
    /// The recoverable intervals, oldest first. The last one grows while `in_sync`.
    pub fn intervals(&self) -> &[Interval] {
        &self.intervals
    }

    /// The holes, oldest first; one without `to` is open.
    pub fn holes(&self) -> &[Hole] {
        &self.holes
    }

    /// The marks in log order.
    pub fn marks(&self) -> &[Mark] {
        &self.marks
    }

    /// The pass being received.
    pub fn open_pass(&self) -> Option<OpenPass> {
        self.open_pass
    }

    /// Where the log has got to: the newest record, or T of the newest pass when that is higher.
    pub fn covered(&self) -> Lsn {
        self.last.lsn
    }

    /// Whether each further record becomes a point.
    pub fn in_sync(&self) -> bool {
        self.in_interval
    }

    /// The newest attach.
    pub fn attached(&self) -> Option<&Attached> {
        self.attached.as_ref()
    }

    /// The highest LSN that any entry names: new LSNs must lie above it.
    pub fn highest_lsn(&self) -> Lsn {
        self.highest
    }

    /// How many write records the log has.
    pub fn records(&self) -> u64 {
        self.records
    }

    /// How many flushes, and the newest.
    pub fn flushes(&self) -> (u64, Option<TimedLsn>) {
        (self.flushes, self.last_flush)
    }

    /// The newest point.
    pub fn latest(&self) -> Option<TimedLsn> {
        self.intervals.last().map(|interval| interval.to)
    }

    /// Whether `lsn` is a point.
    pub fn offers(&self, lsn: Lsn) -> bool {
        let after = self.intervals.partition_point(|interval| interval.to.lsn < lsn);
        self.intervals.get(after).is_some_and(|interval| interval.from.lsn <= lsn)
    }

    /// The hole that `lsn` lies in.
    pub fn hole_at(&self, lsn: Lsn) -> Option<&Hole> {
        let after = self.holes.partition_point(|hole| hole.to.is_some_and(|to| to.lsn <= lsn));
        let hole = self.holes.get(after)?;
        let begun = hole.from.is_none_or(|from| from.lsn < lsn);
        (begun && (hole.to.is_some() || lsn <= self.covered())).then_some(hole)
    }

    /// The points around `lsn`.
    pub fn nearest(&self, lsn: Lsn) -> Nearest {
        let before = self.intervals.iter().rev().find(|interval| interval.to.lsn < lsn);
        let after = self.intervals.iter().find(|interval| interval.from.lsn > lsn);
        Nearest { before: before.map(|interval| interval.to), after: after.map(|interval| interval.from) }
    }

    /// Why `lsn` is no point. `asked` is how the person named it.
    pub fn refusal(&self, lsn: Lsn, asked: String) -> PointError {
        if self.intervals.is_empty() {
            let why = match (self.open_pass, self.holes.last()) {
                (Some(pass), _) => format!("the {pass} is not complete"),
                (None, Some(hole)) => format!("no resync pass has completed, {}", hole.reason.text),
                (None, None) => "no resync pass has begun".to_owned(),
            };
            return PointError::NoPoints { why };
        }
        let nearest = self.nearest(lsn);
        match self.hole_at(lsn) {
            Some(hole) => PointError::InHole { asked, hole: Box::new(hole.clone()), nearest },
            None => PointError::Outside { asked, nearest },
        }
    }
}

impl fmt::Display for Hole {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.from {
            Some(from) => write!(f, "after {from}")?,
            None => write!(f, "from the beginning")?,
        }
        match self.to {
            Some(to) => write!(f, " until {to}")?,
            None => write!(f, ", still open")?,
        }
        if !self.reason.text.is_empty() {
            write!(f, ", because {}", self.reason.text)?;
        }
        Ok(())
    }
}

impl fmt::Display for OpenPass {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "resync pass at lsn:{} since {}", self.at, time_text(self.time))
    }
}
