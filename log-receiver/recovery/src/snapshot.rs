//! A log as it was at one moment, shared with any number of threads.
//!
//! A snapshot names the segments and the last entry it knows; what comes later is not seen, though
//! segments are shared with the log that grows on, and are sealed under it.

use std::sync::Arc;

use backtide_images::{Image, Images};
use backtide_segment::{Extent, Seq};
use backtide_units::{BlockRange, CaptureTime, HistoryId, Lsn};
use roaring::RoaringTreemap;

use crate::{
    Base, LogError, Mark, Point, PointError, TimedLsn, Timeline, View,
    merge::Merge,
    origin::Origin,
    point::{ago, time_text},
    segment::Segment,
    segments::Segments,
};

/// So far may a time be ahead of the clock here, in microseconds.
const SKEW_US: u64 = 2_000_000;

/// A log as it was at one moment. Cheap to clone; reads block on the file system.
#[derive(Clone)]
pub struct Snapshot {
    timeline: Arc<Timeline>,
    pub(crate) segments: Arc<Segments>,
    through: Seq,
    origin: Arc<Origin>,
    /// The log that ended before this one began, whose points are in the timeline too, and the timeline without them.
    before: Option<(Arc<Snapshot>, Arc<Timeline>)>,
}

impl Snapshot {
    pub(crate) fn new(
        timeline: Arc<Timeline>,
        segments: Arc<Segments>,
        through: Seq,
        origin: Arc<Origin>,
    ) -> Self {
        Self { timeline, segments, through, origin, before: None }
    }

    /// Whose log it is.
    pub(crate) fn history(&self) -> Option<HistoryId> {
        let based = self.base().map(|base| base.identity.history);
        based.or_else(|| self.segments.iter().next().map(|segment| segment.header().history))
    }

    /// The images of its store; none of a log of which nothing is left.
    pub(crate) fn images(&self) -> Images {
        self.origin.images_store().clone()
    }

    pub(crate) fn origin(&self) -> &Origin {
        &self.origin
    }

    /// Where the log begins, when its oldest part is folded into images.
    pub fn base(&self) -> Option<&Base> {
        self.origin.base()
    }

    /// What of the log counts lies above this.
    pub(crate) fn floor(&self) -> Lsn {
        self.origin.floor()
    }

    /// The images of points up to `at`, the oldest first.
    pub(crate) fn images_until(&self, at: Lsn) -> &[(TimedLsn, Image)] {
        let images = self.origin.images();
        &images[..images.partition_point(|(point, _)| point.lsn <= at)]
    }

    /// What stands for everything that the log has nothing of at `at`.
    pub(crate) fn image_at(&self, at: Lsn) -> Option<&Image> {
        self.origin.image_at(at)
    }

    /// The same with the points of a log of this disk that ended before this one began. What was
    /// damaged there is a hole until the first point here.
    #[must_use]
    pub fn following(self, before: Self) -> Self {
        let timeline = Arc::new(Timeline::joined(&before.timeline, &self.timeline));
        let own = self.timeline;
        Self { timeline, before: Some((Arc::new(before), own)), ..self }
    }

    /// The same with an open hole behind the last point: `damage` says that what followed is lost.
    #[must_use]
    pub fn ending(self, damage: &str) -> Self {
        let mut timeline = Timeline::clone(&self.timeline);
        timeline.end(Some(damage));
        Self { timeline: Arc::new(timeline), ..self }
    }

    /// The same of a log that is known to have reached `lsn`.
    pub(crate) fn reaching(self, lsn: Lsn) -> Self {
        let mut timeline = Timeline::clone(&self.timeline);
        timeline.see(lsn);
        Self { timeline: Arc::new(timeline), ..self }
    }

    /// The same, with a hole at its end that damage has made.
    pub(crate) fn cut_because(self, why: &str) -> Self {
        let mut timeline = Timeline::clone(&self.timeline);
        timeline.end(Some(why));
        Self { timeline: Arc::new(timeline), ..self }
    }

    /// The log that ended before this one began.
    pub(crate) fn before(&self) -> Option<&Self> {
        self.before.as_ref().map(|(before, _)| &**before)
    }

    /// The same without the logs that ended before this one began.
    #[must_use]
    pub fn alone(&self) -> Self {
        let timeline = self.before.as_ref().map_or(&self.timeline, |(_, own)| own);
        Self { timeline: Arc::clone(timeline), before: None, ..self.clone() }
    }

    /// The log that has the point, which the timeline offers.
    fn log_of(&self, at: Lsn) -> &Self {
        match self.before() {
            Some(before) if before.timeline.offers(at) => before.log_of(at),
            Some(_) | None => self,
        }
    }

    /// What the log gave back then.
    pub fn timeline(&self) -> &Timeline {
        &self.timeline
    }

    /// The same without what logs gave back that ended before this one began.
    pub(crate) fn own_timeline(&self) -> &Timeline {
        self.before.as_ref().map_or(&self.timeline, |(_, own)| own)
    }

    /// The last entry it knows.
    pub fn through(&self) -> Seq {
        self.through
    }

    pub(crate) fn merge(&self, at: Lsn) -> Merge<'_> {
        Merge { segments: &self.segments, at, floor: self.floor(), through: self.through }
    }

    /// The disk at a point.
    ///
    /// # Errors
    /// When `at` is not a point: which hole, why, and the nearest points.
    pub fn view(&self, at: Lsn) -> Result<View, PointError> {
        self.require(at, &format!("lsn:{at}"))?;
        Ok(self.view_of(at))
    }

    /// The disk at a point that is offered.
    pub(crate) fn view_of(&self, at: Lsn) -> View {
        View::new(self.log_of(at).clone(), at)
    }

    /// The newest version of everything, whatever is offered.
    pub fn latest_view(&self) -> View {
        View::new(self.clone(), Lsn::MAX)
    }

    /// The newest version at or below `at` of everything, whatever is offered: what a compare at
    /// `at` asks for, with passes that are still open.
    pub fn newest_view(&self, at: Lsn) -> View {
        View::new(self.clone(), at)
    }

    /// The LSN that a person's point stands for, seen at `now`. Of several marks with one label the
    /// newest counts.
    ///
    /// # Errors
    /// When it is no point.
    pub fn resolve(&self, point: &Point, now: CaptureTime) -> Result<Lsn, PointError> {
        match point {
            Point::Latest => match self.timeline.latest() {
                Some(latest) => Ok(latest.lsn),
                None => Err(self.timeline.refusal(Lsn::ZERO, point.to_string())),
            },
            Point::Lsn(lsn) => self.require(*lsn, &point.to_string()),
            Point::Time(time) => {
                self.refuse_future(*time, now)?;
                self.point_at(*time)
            }
            Point::Ago(duration) => self.point_at(ago(now, *duration)),
            Point::Mark(label) => {
                let newest =
                    |marks: &[Mark]| marks.iter().rev().find(|mark| mark.label == *label).map(|mark| mark.at);
                let at = newest(self.timeline.marks())
                    .ok_or_else(|| PointError::UnknownMark { label: label.clone() })?;
                self.require(at.lsn, &point.to_string())
            }
        }
    }

    /// Whether `time` has come at `now`. Clocks may differ a little, and that of the disk's host may be far ahead:
    /// then its own times count.
    ///
    /// # Errors
    /// When it has not.
    pub fn refuse_future(&self, time: CaptureTime, now: CaptureTime) -> Result<(), PointError> {
        let latest = self.timeline.latest();
        let known = latest.map_or(now, |latest| now.max(latest.time));
        if time.0 <= known.0.saturating_add(SKEW_US) {
            return Ok(());
        }
        Err(PointError::Future { asked: time_text(time), now, latest })
    }

    fn require(&self, lsn: Lsn, asked: &str) -> Result<Lsn, PointError> {
        if self.timeline.offers(lsn) { Ok(lsn) } else { Err(self.timeline.refusal(lsn, asked.to_owned())) }
    }

    /// The last point captured at or before `time`.
    ///
    /// A time between the last record before a hole and the hole's end is in the hole: nobody knows
    /// whether the disk had changed by then.
    ///
    /// # Errors
    /// When there is none, or the time lies in a hole.
    pub fn point_at(&self, time: CaptureTime) -> Result<Lsn, PointError> {
        let asked = || time_text(time);
        let record = self.last_record(&|_, captured| captured <= time)?;
        let Some(lsn) = record.max(self.last_end(&|end| end.time <= time)).map(|last| last.lsn) else {
            return Err(self.timeline.refusal(Lsn::ZERO, asked()));
        };
        let inside = |from: TimedLsn, to: Option<TimedLsn>| {
            from.lsn == lsn && from.time < time && to.is_none_or(|to| time < to.time)
        };
        let hole =
            self.timeline.holes().iter().find(|hole| hole.from.is_some_and(|from| inside(from, hole.to)));
        match hole {
            Some(hole) => {
                let nearest = crate::Nearest { before: hole.from, after: hole.to };
                Err(PointError::InHole { asked: asked(), hole: Box::new(hole.clone()), nearest })
            }
            None => self.require(lsn, &asked()),
        }
    }

    /// The newest point captured at or before `time`, whatever lies between them.
    ///
    /// # Errors
    /// When the log cannot be read.
    pub fn newest_point_by(&self, time: CaptureTime) -> Result<Option<TimedLsn>, LogError> {
        let record = self.last_record(&|_, captured| captured <= time)?;
        let record = record.filter(|record| self.timeline.offers(record.lsn));
        Ok(record.max(self.last_end(&|end| end.time <= time)))
    }

    /// The newest point at or below `lsn`. Reads nothing of the segments that hold only what is above it.
    ///
    /// # Errors
    /// When the log cannot be read.
    pub fn newest_point_at(&self, lsn: Lsn) -> Result<Option<TimedLsn>, LogError> {
        let record = self.last_record(&|record, _| record <= lsn)?;
        let record = record.filter(|record| self.timeline.offers(record.lsn));
        Ok(record.max(self.last_end(&|end| end.lsn <= lsn)))
    }

    /// The last begin or end of an interval, or seam within one, that `wanted` takes: it may be the T of a pass,
    /// which no record has.
    fn last_end(&self, wanted: &dyn Fn(TimedLsn) -> bool) -> Option<TimedLsn> {
        self.ends().filter(|end| wanted(*end)).max()
    }

    fn ends(&self) -> impl Iterator<Item = TimedLsn> {
        let ends = self.timeline.intervals().iter().flat_map(|interval| [interval.from, interval.to]);
        ends.chain(self.timeline.seams.iter().copied())
    }

    /// When the newest record at or below `lsn` was captured, or the pass frozen whose T it is: not until when it
    /// was known to be the newest, which the end of an interval tells.
    ///
    /// # Errors
    /// When the log cannot be read.
    pub fn time_of(&self, lsn: Lsn) -> Result<Option<CaptureTime>, LogError> {
        let record = self.last_record(&|record, _| record <= lsn)?;
        let newest = record.max(self.last_end(&|end| end.lsn <= lsn)).map(|last| last.lsn);
        let Some(newest) = newest else { return Ok(None) };
        let ends = self.ends().filter(|end| end.lsn == newest);
        Ok(ends.chain(record.filter(|record| record.lsn == newest)).map(|end| end.time).min())
    }

    /// The record with this LSN, when there is one: an LSN can be that of a pass as well.
    ///
    /// # Errors
    /// When the log cannot be read.
    pub fn record_at(&self, lsn: Lsn) -> Result<Option<TimedLsn>, LogError> {
        Ok(self.last_record(&|record, _| record <= lsn)?.filter(|record| record.lsn == lsn))
    }

    /// The last record that `wanted` takes. It looks from the newest segment back, and reads headers only
    /// of the stretches that can have it.
    fn last_record(&self, wanted: &dyn Fn(Lsn, CaptureTime) -> bool) -> Result<Option<TimedLsn>, LogError> {
        for segment in self.segments.iter().rev() {
            let stats = segment.stats();
            // The earliest time and the lowest version need not belong to one record; together they are
            // a lower bound for both, so no segment is left out wrongly. The same holds for stretches.
            if stats.records == 0 || !wanted(stats.version_min, stats.time_min) {
                continue;
            }
            let stretches = segment.stretches()?;
            for (place, stretch) in stretches.iter().enumerate().rev() {
                if stretch.records == 0 || !wanted(stretch.lsn_min, stretch.time_min) {
                    continue;
                }
                let mut last = None;
                segment.each_header(stretch, stretches.get(place + 1), |header| {
                    let known = header.seq <= self.through;
                    let counts = known && header.lsn >= self.floor();
                    if counts && header.kind.is_record() && wanted(header.lsn, header.time) {
                        last = Some(TimedLsn { lsn: header.lsn, time: header.time });
                    }
                    known
                })?;
                if last.is_some() {
                    return Ok(last);
                }
            }
        }
        match self.before() {
            Some(before) => before.last_record(wanted),
            None => Ok(None),
        }
    }

    /// Whether [`changed_blocks`](Self::changed_blocks) can tell what changed since `lsn` or until then: it is a
    /// point, or every change from there on is kept, whatever of that is a point. Not what lies beyond all that the log names:
    /// whoever knows of it has had a log that went further.
    pub fn knows_changes_at(&self, lsn: Lsn) -> bool {
        let is_named = self.floor() <= lsn && lsn <= self.timeline.highest_lsn();
        self.timeline.offers(lsn) || (is_named && self.before.is_none())
    }

    /// The blocks (of 4 KiB) with a version in `(after, through]`: those whose content may differ
    /// between the two points, in either direction.
    ///
    /// It is exactly these, as far as they lie above the floor, and may be more than what differs: a write of equal bytes
    /// counts, and so does a block that a resync delivered unchanged. Below the floor only images are left to compare: there
    /// it is every block of the chunks of 64 KiB that the two images do not have in common, and no other. When `after` is of
    /// a log that ended before this one began, it is every block of which that log had a version up to `after`, and every
    /// one of which this log has one up to `through`.
    ///
    /// # Errors
    /// When the log cannot be read.
    pub fn changed_blocks(&self, after: Lsn, through: Lsn) -> Result<RoaringTreemap, LogError> {
        let mut changed = RoaringTreemap::new();
        let mut after = after;
        if let Some(before) = self.before().filter(|before| before.timeline.offers(after)) {
            if before.timeline.offers(through) {
                return before.changed_blocks(after, through);
            }
            // The newer log begins with an empty disk: all of both may differ. The older may be any before it.
            changed |= before.log_of(after).changed_blocks(Lsn::ZERO, after)?;
            after = Lsn::ZERO;
        }
        let floor = self.floor();
        if after < floor {
            changed |= self.origin.differing(after, through.min(floor))?;
            if through <= floor {
                return Ok(changed);
            }
            after = floor;
        }
        let between = |extent: &Extent| {
            after < extent.version && extent.version <= through && extent.seq <= self.through
        };
        for segment in self.segments.iter() {
            let stats = segment.stats();
            if stats.version_max <= after || stats.version_min > through {
                continue;
            }
            let all_between = stats.version_min > after
                && stats.version_max <= through
                && stats.next_seq <= self.through.next();
            if all_between
                && let Some(blocks) = segment.disk_blocks(&mut |extent| insert(&mut changed, extent))?
            {
                changed |= blocks;
                continue;
            }
            segment.each_extent(&mut |extent| {
                if between(extent) {
                    insert(&mut changed, extent);
                }
            })?;
        }
        Ok(changed)
    }

    /// The newest `limit` flush points at or below `through`, newest first.
    ///
    /// # Errors
    /// When the log cannot be read.
    pub fn flush_points(&self, through: Lsn, limit: usize) -> Result<Vec<TimedLsn>, LogError> {
        let mut points = Vec::new();
        for segment in self.segments.iter().rev() {
            if points.len() >= limit {
                break;
            }
            if segment.stats().flushes > 0 {
                self.flush_points_of(segment, through, limit, &mut points)?;
            }
        }
        points.truncate(limit);
        if let Some(before) = self.before().filter(|_| points.len() < limit) {
            points.extend(before.flush_points(through, limit - points.len())?);
        }
        Ok(points)
    }

    fn flush_points_of(
        &self,
        segment: &Segment,
        through: Lsn,
        limit: usize,
        points: &mut Vec<TimedLsn>,
    ) -> Result<(), LogError> {
        let stretches = segment.stretches()?;
        for (place, stretch) in stretches.iter().enumerate().rev() {
            if stretch.flushes == 0 || points.len() >= limit {
                continue;
            }
            let mut here = Vec::new();
            segment.each_header(stretch, stretches.get(place + 1), |header| {
                let known = header.seq <= self.through;
                let wanted = header.kind.is_flush() && header.lsn <= through;
                if known && wanted && self.timeline.offers(header.lsn) {
                    here.push(TimedLsn { lsn: header.lsn, time: header.time });
                }
                known
            })?;
            points.extend(here.into_iter().rev());
        }
        Ok(())
    }
}

fn insert(blocks: &mut RoaringTreemap, extent: &Extent) {
    blocks.insert_range(BlockRange::touched_by(extent.range).indices());
}
