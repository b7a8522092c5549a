//! The timeline: which points a log gives back.
//!
//! Invariants: intervals are ordered and do not touch; a hole lies between two of them, or after the
//! last and is open; while `in_sync`, the last interval ends at `covered` and no hole is open.
//!
//! Bounded: of marks, and of holes with the intervals between them, the newest are kept and the others counted.
//! Points before the oldest hole that is kept are not offered; a mark that is not kept is a point like any other.

use std::{fmt, sync::Arc};

use backtide_segment::{AttachOrigin, PassReason, Seq};
use backtide_units::{ByteCount, CaptureTime, DiskName, Epoch, Lsn, Reason};
use uuid::Uuid;

use crate::{Nearest, PointError, TimedLsn, point::time_text};

/// A hole's sentence is cut here.
const HOLE_TEXT_MAX: usize = 1024;

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
    /// The reason given by the pass that opened it, or by a later one of it that found acknowledged changes gone.
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

/// An attach by which another agent took the disk over.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Takeover {
    /// The epoch of the attach before it.
    pub before: Epoch,
    /// Its own.
    pub epoch: Epoch,
    /// Where the log had got to: what the agent before had acknowledged as durable lies at or below, or was lost here.
    pub covered: Lsn,
    /// How many entries the log had: the blocks of a pass have no LSN of their own.
    pub entries: Seq,
}

/// Takeovers that a timeline keeps.
const TAKEOVERS_MAX: usize = 1024;

/// Marks that a timeline keeps.
pub const MARKS_MAX: usize = 16_384;

/// Intervals that a timeline keeps.
pub const INTERVALS_MAX: usize = 65_536;

/// Sizes of the disk that a timeline keeps.
const SIZES_MAX: usize = 1024;

/// Lists are cut when they are longer than their limit by one part in so many, so that it costs little.
const SLACK: usize = 16;

/// What there was too much of to keep it.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Forgotten {
    /// How many marks; their points can still be had by LSN or time.
    pub marks: u64,
    /// How many intervals; their points cannot be had.
    pub intervals: u64,
}

/// What a log can give back.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Timeline {
    pub(crate) intervals: Vec<Interval>,
    pub(crate) holes: Vec<Hole>,
    /// The points within intervals at which a pass has joined two that have no point missing between them. What a
    /// pass delivers there has no record: only its T says when.
    pub(crate) seams: Vec<TimedLsn>,
    pub(crate) marks: Arc<Vec<Mark>>,
    /// Sizes of the disk in log order, with the first LSN that each counts for.
    pub(crate) sizes: Vec<(Lsn, ByteCount)>,
    pub(crate) forgotten: Forgotten,
    pub(crate) open_pass: Option<OpenPass>,
    pub(crate) in_interval: bool,
    pub(crate) last: TimedLsn,
    pub(crate) attached: Option<Attached>,
    /// When its guest is answered, by the newest attach that said so, as the stream's code.
    pub(crate) ack: u8,
    /// The point of another disk that it began as, by any attach: the agent that has it today need not know.
    pub(crate) origin: Option<Box<AttachOrigin>>,
    /// In log order.
    pub(crate) takeovers: Vec<Takeover>,
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

    /// What there was too much of to keep it.
    pub fn forgotten(&self) -> Forgotten {
        self.forgotten
    }

    /// The size that the disk had at a point.
    pub fn size_at(&self, lsn: Lsn) -> ByteCount {
        let then = self.sizes.iter().rev().find(|(from, _)| *from <= lsn).or(self.sizes.first());
        then.map_or(ByteCount::ZERO, |(_, size)| *size)
    }

    /// When the newest record was captured, or the newest pass frozen, whichever came last.
    pub fn last_time(&self) -> Option<CaptureTime> {
        (self.last.lsn > Lsn::ZERO).then_some(self.last.time)
    }

    /// Notes the size of a disk whose agent gives LSNs from `from` on.
    pub(crate) fn note_size(&mut self, from: Lsn, size: ByteCount) {
        if self.sizes.last().is_none_or(|(_, last)| *last != size) {
            self.sizes.push((from, size));
        }
        // The oldest becomes that of the time before it too.
        drop_oldest(&mut self.sizes, SIZES_MAX);
    }

    /// Notes an attach of `epoch`, before anything else of it is.
    pub(crate) fn note_epoch(&mut self, epoch: Epoch, entries: Seq) {
        let before = self.attached.as_ref().map(|attached| attached.epoch);
        if let Some(before) = before.filter(|before| epoch.takes_over_from(*before)) {
            self.takeovers.push(Takeover { before, epoch, covered: self.covered(), entries });
            drop_oldest(&mut self.takeovers, TAKEOVERS_MAX);
        }
    }

    pub(crate) fn note_mark(&mut self, mark: Mark) {
        let marks = Arc::make_mut(&mut self.marks);
        marks.push(mark);
        self.forgotten.marks += drop_oldest(marks, MARKS_MAX) as u64;
    }

    /// Drops the oldest intervals beyond the limit, with the holes before those that are left.
    pub(crate) fn keep_intervals(&mut self) {
        let dropped = drop_oldest(&mut self.intervals, INTERVALS_MAX);
        self.forgotten.intervals += dropped as u64;
        if let Some(first) = self.intervals.first().filter(|_| dropped > 0) {
            let first = first.from.lsn;
            self.holes.retain(|hole| hole.to.is_none_or(|to| to.lsn > first));
        }
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

    /// When the disk's guest was answered last, as the stream's code; 0 when no agent said.
    pub fn ack(&self) -> u8 {
        self.ack
    }

    /// The point of another disk that this one began as.
    pub fn origin(&self) -> Option<&AttachOrigin> {
        self.origin.as_deref()
    }

    /// How the disk was taken from an agent whose attach of `epoch` was its last: by the first attach with a higher one, if
    /// that was a takeover that is kept.
    pub fn takeover_from(&self, epoch: Epoch) -> Option<Takeover> {
        let first = self.takeovers.iter().find(|takeover| takeover.epoch > epoch);
        first.copied().filter(|takeover| takeover.before <= epoch)
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
        (begun && (hole.to.is_some() || lsn <= self.highest)).then_some(hole)
    }

    /// The points around `lsn`.
    pub fn nearest(&self, lsn: Lsn) -> Nearest {
        let before = self.intervals.iter().rev().find(|interval| interval.to.lsn < lsn);
        let after = self.intervals.iter().find(|interval| interval.from.lsn > lsn);
        Nearest { before: before.map(|interval| interval.to), after: after.map(|interval| interval.from) }
    }

    /// Ends the timeline: nothing that comes later in this log becomes a point. With `damage` an open
    /// hole says so.
    pub(crate) fn end(&mut self, damage: Option<&str>) {
        self.in_interval = false;
        self.open_pass = None;
        let Some(damage) = damage else { return };
        let reason = damage_reason(damage);
        match self.holes.last_mut().filter(|hole| hole.to.is_none()) {
            // What would have closed it is not there any more.
            Some(hole) => hole.reason = reason,
            None => self.holes.push(Hole { from: self.latest(), to: None, reason, passes: 0 }),
        }
    }

    /// Leaves of everything below `floor` only the points in `kept`. The floor is an image, so it is a point, whatever the
    /// log has left of the pass that made it one.
    pub(crate) fn thin(&mut self, floor: TimedLsn, kept: &[TimedLsn]) {
        self.intervals.retain(|interval| interval.to.lsn >= floor.lsn);
        self.holes.retain(|hole| hole.to.is_none_or(|to| to.lsn > floor.lsn));
        self.seams.retain(|seam| seam.lsn > floor.lsn);
        match self.intervals.first_mut() {
            Some(first) if first.from.lsn <= floor.lsn => first.from = floor,
            first => {
                let to = first.map(|first| first.from);
                self.intervals.insert(0, Interval { from: floor, to: floor });
                match self.holes.first_mut() {
                    Some(hole) if hole.from.is_none_or(|from| from.lsn < floor.lsn) => {
                        hole.from = Some(floor)
                    }
                    Some(_) | None if to.is_some() => {
                        self.holes.insert(0, Hole { from: Some(floor), to, ..thinned() });
                    }
                    Some(_) | None => {}
                }
            }
        }
        let behind = kept.iter().skip(1).chain([&floor]);
        let hole =
            |(from, to): (&TimedLsn, &TimedLsn)| Hole { from: Some(*from), to: Some(*to), ..thinned() };
        self.holes.splice(..0, kept.iter().zip(behind).map(hole));
        self.intervals.splice(..0, kept.iter().map(|point| Interval { from: *point, to: *point }));
    }

    /// The timeline of a disk whose log ended and was followed by a new one: an open hole of the older
    /// one lasts until the first point of the newer one. Of one that is folded away there is none.
    pub(crate) fn joined(before: &Self, after: &Self) -> Self {
        let mut joined = before.clone();
        let is_gone = before.intervals.is_empty() && before.holes.is_empty();
        if !is_gone && joined.holes.last().is_none_or(|hole| hole.to.is_some()) {
            joined.end(Some("the log ended before its time"));
        }
        let first = after.intervals.first().map(|interval| interval.from);
        if let Some(hole) = joined.holes.last_mut().filter(|hole| hole.to.is_none()) {
            hole.to = first;
        }
        joined.intervals.extend_from_slice(&after.intervals);
        joined.seams.extend_from_slice(&after.seams);
        // One without a beginning is the time before the newer log's first point: the hole above.
        joined.holes.extend(after.holes.iter().filter(|hole| is_gone || hole.from.is_some()).cloned());
        Arc::make_mut(&mut joined.marks).extend_from_slice(&after.marks);
        joined.sizes.extend_from_slice(&after.sizes);
        joined.forgotten.marks += after.forgotten.marks;
        joined.forgotten.intervals += after.forgotten.intervals;
        joined.open_pass = after.open_pass;
        joined.in_interval = after.in_interval;
        joined.last = joined.last.max(after.last);
        joined.attached = after.attached.clone().or(joined.attached);
        joined.ack = if after.ack == 0 { joined.ack } else { after.ack };
        joined.origin = after.origin.clone().or(joined.origin);
        joined.takeovers.extend_from_slice(&after.takeovers);
        joined.highest = joined.highest.max(after.highest);
        joined.records += after.records;
        joined.flushes += after.flushes;
        joined.last_flush = after.last_flush.or(joined.last_flush);
        joined
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

/// A hole between two points of which those between were not to be kept.
pub(crate) fn thinned() -> Hole {
    let reason = PassReason { code: Reason::Thinned.code(), text: Reason::Thinned.to_string() };
    Hole { from: None, to: None, reason, passes: 0 }
}

/// The reason of a hole that damage has made.
pub(crate) fn damage_reason(damage: &str) -> PassReason {
    let mut text = format!("{}: {damage}", Reason::Damaged);
    text.truncate(text.floor_char_boundary(HOLE_TEXT_MAX));
    PassReason { code: Reason::Damaged.code(), text }
}

/// Cuts a list that is longer than `limit` and its slack; gives how many were dropped.
pub(crate) fn drop_oldest<T>(list: &mut Vec<T>, limit: usize) -> usize {
    if list.len() <= limit + limit / SLACK {
        return 0;
    }
    list.drain(..list.len() - limit).count()
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
