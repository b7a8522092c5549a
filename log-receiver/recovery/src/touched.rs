//! Which points of a disk a damaged place touches: those at which some byte cannot be read because of it.
//!
//! Versions decide: a version that cannot be read is needed from its own point up to the last one before newer versions
//! cover all of it, and it is never needed again above that. So the last point is found by halving, with a few look-ups in
//! the indexes each time; a chunk of an image is needed by the images that have it, and above the floor up to where the
//! log covers it. Nothing of this is looked at before something is found damaged.
//!
//! Invariant: what is told is never less than what cannot be read, unless it is [`Known::AtLeast`].

mod images;

use std::collections::BTreeMap;

use backtide_segment::{Extent, Position, SegmentId};
use backtide_units::{ByteCount, ByteRange, Lsn, Reason};

use crate::{
    Hole, LogError, Snapshot, TimedLsn, View, check::entry_places, merge::Content, segment::Segment,
    timeline::damage_reason,
};

/// So many stretches of a place are told apart; from then on they are told as one that holds all of them.
const SPANS_MAX: usize = 64;

/// The points of a longer range are not looked for.
const LOOKED_FOR_BYTES_MAX: ByteCount = ByteCount(64 << 20);

/// So much is looked at before what was found ends the look.
const LOOK_BYTES: ByteCount = ByteCount(1 << 20);

/// How well it is known which points a place touches.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Known {
    /// Those, and no others: at each of them some byte of the range cannot be read.
    #[default]
    Exact,
    /// No others, and perhaps not all of those: looking closer would cost a walk over the log.
    AtMost,
    /// Those, and perhaps others: a read met it, and a scrub looks for all of them.
    AtLeast,
}

/// The points that a damaged place touches.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Touched {
    /// The points, and the bytes at them; empty when every point reads as before.
    pub spans: Vec<TouchedSpan>,
    /// How well that is known.
    pub known: Known,
}

/// Points one after the other, and bytes at them.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct TouchedSpan {
    /// The bytes of the disk; none when it may be any.
    pub range: Option<ByteRange>,
    /// The first point; none when the first is still to come. Of lost points the last one before them, none when they
    /// began the timeline.
    pub from: Option<TimedLsn>,
    /// The last point so far. Of lost points the first one behind them, none when there is none.
    pub to: Option<TimedLsn>,
    /// Whether those to come need it too, until the bytes are written again.
    pub open: bool,
    /// Whether the points between `from` and `to`, without those two, are lost rather than damaged.
    pub lost: bool,
}

impl Touched {
    /// No point.
    pub(crate) fn nothing() -> Self {
        Self::default()
    }

    /// The points behind a place where a log ends before its time.
    pub(crate) fn lost(from: Option<TimedLsn>, to: Option<TimedLsn>) -> Self {
        let span = TouchedSpan { range: None, from, to, open: false, lost: true };
        Self { spans: vec![span], known: Known::Exact }
    }

    /// Whether it is points of the past only: the newest one, and those to come, read as if nothing were damaged.
    pub fn is_past(&self) -> bool {
        self.known == Known::Exact && self.spans.iter().all(|span| !span.open && !span.lost)
    }

    pub(crate) fn of(spans: impl IntoIterator<Item = TouchedSpan>, known: Known) -> Self {
        let mut touched = Self { spans: Vec::new(), known };
        spans.into_iter().for_each(|span| touched.add(span));
        touched
    }

    /// Adds what else the same place touches.
    pub(crate) fn merge(&mut self, other: Self) {
        self.known = match (self.known, other.known) {
            (Known::Exact, known) | (known, Known::Exact) => known,
            (Known::AtLeast, _) | (_, Known::AtLeast) => Known::AtLeast,
            (Known::AtMost, Known::AtMost) => Known::AtMost,
        };
        other.spans.into_iter().for_each(|span| self.add(span));
    }

    pub(crate) fn add(&mut self, span: TouchedSpan) {
        if self.spans.contains(&span) {
            return;
        }
        let full = self.spans.len() >= SPANS_MAX;
        match self.spans.last_mut() {
            Some(last) if full => {
                *last = last.with(span);
                if self.known == Known::Exact {
                    self.known = Known::AtMost;
                }
            }
            Some(_) | None => self.spans.push(span),
        }
    }
}

impl TouchedSpan {
    /// One that holds both.
    fn with(self, other: Self) -> Self {
        let hull =
            |a: ByteRange, b: ByteRange| ByteRange::between(a.start().min(b.start()), a.end().max(b.end()));
        Self {
            range: self.range.zip(other.range).map(|(a, b)| hull(a, b)),
            from: self.from.min(other.from).or(self.from).or(other.from),
            to: self.to.max(other.to),
            open: self.open || other.open,
            lost: self.lost || other.lost,
        }
    }
}

impl Snapshot {
    /// The points that need bytes of the entry at `position`: those at which its version of `range` is the newest.
    pub(crate) fn touched_by_entry(
        &self,
        segment: &Segment,
        position: Position,
        range: ByteRange,
        version: Lsn,
    ) -> Touched {
        if version <= self.floor() {
            return Touched::nothing();
        }
        let entry = (segment.header().id, position);
        let at_most = || self.touched_at_most(Some(range), version);
        if range.count() > LOOKED_FOR_BYTES_MAX {
            return at_most();
        }
        let needed = |at| self.is_needed(range, at, &|content| is_of(content, entry));
        match self.visible(range, version, entry) {
            Ok(Some(range)) => {
                let span = self.needed_from(range, version, &needed);
                span.map_or_else(|_| at_most(), |span| Touched::of(span, Known::Exact))
            }
            // A newer version came within the same instant.
            Ok(None) => Touched::nothing(),
            Err(_) => at_most(),
        }
    }

    /// A bound: all points from `version` on, of which nobody has looked which need what is damaged.
    pub(crate) fn touched_at_most(&self, range: Option<ByteRange>, version: Lsn) -> Touched {
        let from = version.max(self.floor());
        Touched::of(self.span(range, from, Lsn::MAX, true), Known::AtMost)
    }

    /// The points that went with what the log has lost: the hole that its timeline has because of `damage`, a sentence of
    /// those that are told of the log.
    pub fn lost_with(&self, damage: &str) -> Touched {
        let reason = damage_reason(damage);
        // The hole that a pass has left which compared everything, after an end was lost, is that of no other damage.
        let of_pass = Reason::Damaged.to_string();
        let is_damage = |hole: &&Hole| {
            let is_compared = hole.to.is_some() && hole.reason.text == of_pass;
            hole.reason.code == Reason::Damaged.code() && !is_compared
        };
        let holes = self.timeline().holes().iter().filter(is_damage);
        let told = |hole: &Hole| Touched::lost(hole.from, hole.to);
        if let Some(hole) = holes.clone().find(|hole| hole.reason == reason) {
            return told(hole);
        }
        let mut touched = Touched { spans: Vec::new(), known: Known::AtMost };
        holes.for_each(|hole| touched.merge(told(hole)));
        touched
    }

    /// The part of the range that has the entry's version at a point.
    fn visible(
        &self,
        range: ByteRange,
        at: Lsn,
        entry: (SegmentId, Position),
    ) -> Result<Option<ByteRange>, LogError> {
        let mut visible: Option<ByteRange> = None;
        self.merge(at).pieces(range, &mut |piece| {
            if is_of(&piece.content, entry) {
                let start = visible.map_or(piece.range.start(), |before| before.start());
                visible = Some(ByteRange::between(start, piece.range.end()));
            }
        })?;
        Ok(visible)
    }

    /// Whether any byte of the range comes from what `wanted` says at a point.
    fn is_needed(
        &self,
        range: ByteRange,
        at: Lsn,
        wanted: &dyn Fn(&Content<'_>) -> bool,
    ) -> Result<bool, LogError> {
        let merge = self.merge(at);
        for part in range.split_at_multiples(LOOK_BYTES) {
            let mut found = false;
            merge.pieces(part, &mut |piece| found |= wanted(&piece.content))?;
            if found {
                return Ok(true);
            }
        }
        Ok(false)
    }

    /// The points from `first` on, at which something is needed, to the last at which it is; none when those are no points.
    fn needed_from(
        &self,
        range: ByteRange,
        first: Lsn,
        needed: &dyn Fn(Lsn) -> Result<bool, LogError>,
    ) -> Result<Option<TouchedSpan>, LogError> {
        if needed(Lsn::MAX)? {
            return Ok(self.span(Some(range), first, Lsn::MAX, true));
        }
        // It is needed at the lower one, and not at the higher one.
        let mut low = first;
        let mut high = self.own_timeline().highest_lsn().max(first).next();
        while low.next() < high {
            let middle = Lsn(low.0 + (high.0 - low.0) / 2);
            if needed(middle)? { low = middle } else { high = middle }
        }
        Ok(self.span(Some(range), first, low, false))
    }

    /// The points of this log alone from `first` to `last`; none when there are none, and none can come.
    fn span(&self, range: Option<ByteRange>, first: Lsn, last: Lsn, open: bool) -> Option<TouchedSpan> {
        let intervals = self.own_timeline().intervals();
        let from = intervals.iter().find(|interval| interval.to.lsn >= first);
        let to = intervals.iter().rev().find(|interval| interval.from.lsn <= last);
        let from = from.map(|interval| (first.max(interval.from.lsn), interval.from));
        let to = to.map(|interval| (last.min(interval.to.lsn), interval.to));
        let between = from.zip(to).filter(|((from, _), (to, _))| from <= to);
        let point = |(lsn, end): (Lsn, TimedLsn)| match self.time_of(lsn) {
            _ if lsn == end.lsn => end,
            Ok(Some(time)) => TimedLsn { lsn, time },
            // The interval's own is not later, or not earlier.
            Ok(None) | Err(_) => TimedLsn { lsn, time: end.time },
        };
        let Some((from, to)) = between else {
            return open.then_some(TouchedSpan { range, from: None, to: None, open, lost: false });
        };
        Some(TouchedSpan { range, from: Some(point(from)), to: Some(point(to)), open, lost: false })
    }
}

impl View {
    /// What a read of `range` meets that is damaged, by its sentence, and which points need it; others may too. What an index
    /// would have told is not there when that is what is damaged.
    pub fn touched(&self, range: ByteRange) -> BTreeMap<String, Touched> {
        let mut found = BTreeMap::new();
        // An error is what the read has met already.
        let _ = self.look_for_damage(range, &mut found);
        found
    }

    fn look_for_damage(
        &self,
        range: ByteRange,
        found: &mut BTreeMap<String, Touched>,
    ) -> Result<(), LogError> {
        let snapshot = self.snapshot();
        let (mut entries, mut below) = (BTreeMap::new(), Vec::new());
        if self.at() < snapshot.floor() {
            below.push(range);
        } else {
            snapshot.merge(self.at()).pieces(range, &mut |piece| match piece.content {
                Content::Payload(source) => {
                    let entry = (source.segment.header().id, source.extent.position.0);
                    let extent = Extent { range: piece.range, ..source.extent };
                    entries.entry(entry).or_insert((source.segment, Vec::new())).1.push(extent);
                }
                Content::Zeroes => {}
                Content::Below => below.push(piece.range),
            })?;
        }
        for (segment, extents) in entries.into_values() {
            let file = segment.file()?;
            for extent in extents {
                let (places, together) = entry_places(segment, &file, &extent)?;
                for (what, part) in places.into_iter().filter(|(_, part)| part.intersection(range).is_some())
                {
                    let mut touched =
                        snapshot.touched_by_entry(segment, extent.position, part, extent.version);
                    // Other entries of the batch are damaged with it.
                    if together {
                        touched.known = Known::AtLeast;
                    }
                    found.entry(what).or_insert_with(Touched::nothing).merge(touched);
                }
            }
        }
        for part in below {
            snapshot.look_for_damaged_chunks(self.at(), part, found)?;
        }
        Ok(())
    }
}

fn is_of(content: &Content<'_>, (segment, position): (SegmentId, Position)) -> bool {
    match content {
        Content::Payload(source) => {
            source.segment.header().id == segment && source.extent.position == position
        }
        Content::Zeroes | Content::Below => false,
    }
}
