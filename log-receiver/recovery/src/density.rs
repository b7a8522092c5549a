//! How much was written when: the log's time in equal parts, and what of the log fell into each.
//!
//! Of a segment that lies in one part its counts are enough, of a stretch the guide's; headers are read
//! only where a part ends in the middle of a stretch, so of about one stretch for each part.

use backtide_segment::Stretch;
use backtide_units::{ByteCount, CaptureTime};

use crate::{LogError, Snapshot, TimedLsn, segment::Segment};

/// What a log's time holds, part by part.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Density {
    /// When its first record was captured: the first part begins.
    pub from: CaptureTime,
    /// When its last record was: the last part ends.
    pub to: CaptureTime,
    /// The parts, all of one length.
    pub parts: Vec<DensityPart>,
}

/// What was captured within one part of a log's time.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct DensityPart {
    /// Guest writes and zeroes.
    pub changes: u64,
    /// About what the log took for that time, what resyncs brought included.
    pub bytes: ByteCount,
}

impl Density {
    fn place(&self, time: CaptureTime) -> usize {
        let since = time.0.clamp(self.from.0, self.to.0) - self.from.0;
        let span = u128::from(self.to.0 - self.from.0) + 1;
        let place = u128::from(since) * self.parts.len() as u128 / span;
        usize::try_from(place).expect("a place is below the number of parts")
    }

    fn add(&mut self, place: usize, changes: u64, bytes: u64) {
        self.parts[place].changes += changes;
        self.parts[place].bytes.0 += bytes;
    }

    fn add_segment(&mut self, segment: &Segment) -> Result<(), LogError> {
        let stats = segment.stats();
        let (first, last) = (self.place(stats.time_min), self.place(stats.time_max));
        if first == last {
            self.add(first, stats.records, segment.entries_end().0);
            return Ok(());
        }
        let stretches = segment.stretches()?;
        let mut now = first;
        for (nth, stretch) in stretches.iter().enumerate() {
            let next = stretches.get(nth + 1);
            let timed = |stretch: &&Stretch| stretch.records > 0;
            if timed(&stretch) {
                now = self.place(stretch.time_min);
            }
            // Records are in the order of their time: those here are not later than the next one's first.
            let until = stretches[nth + 1..].iter().find(timed).map_or(stats.time_max, |next| next.time_min);
            if self.place(until) == now || stretch.records == 0 {
                let end = next.map_or(segment.entries_end(), |next| next.position.offset());
                self.add(now, stretch.records.into(), end.0.saturating_sub(stretch.position.offset().0));
                continue;
            }
            segment.each_header(stretch, next, |header| {
                if header.kind.is_record() {
                    now = self.place(header.time);
                }
                self.add(now, header.kind.is_record().into(), header.payload_length.into());
                true
            })?;
        }
        Ok(())
    }
}

impl Snapshot {
    /// The time of the log's records in so many parts; none without records.
    ///
    /// # Errors
    /// When the log cannot be read.
    ///
    /// # Panics
    /// When it is to be no part.
    pub fn density(&self, parts: usize) -> Result<Option<Density>, LogError> {
        assert!(parts > 0, "time has at least one part");
        let logs = std::iter::successors(Some(self), |log| log.before());
        let segments: Vec<_> =
            logs.flat_map(|log| log.segments.iter()).filter(|segment| segment.stats().records > 0).collect();
        let from = segments.iter().map(|segment| segment.stats().time_min).min();
        let to = segments.iter().map(|segment| segment.stats().time_max).max();
        let (Some(from), Some(to)) = (from, to) else { return Ok(None) };
        let mut density = Density { from, to, parts: vec![DensityPart::default(); parts] };
        for segment in segments {
            density.add_segment(segment)?;
        }
        Ok(Some(density))
    }

    /// The first point captured after `time`, whatever lies between them.
    ///
    /// # Errors
    /// When the log cannot be read.
    pub fn first_point_after(&self, time: CaptureTime) -> Result<Option<TimedLsn>, LogError> {
        let ends = self.timeline().intervals().iter().flat_map(|interval| [interval.from, interval.to]);
        let end = ends.filter(|end| end.time > time).min();
        let inside = |interval: &crate::Interval| interval.from.time <= time && time < interval.to.time;
        if !self.timeline().intervals().iter().any(inside) {
            return Ok(end);
        }
        let record = self.first_record_after(time)?;
        Ok(record.into_iter().chain(end).min())
    }

    fn first_record_after(&self, time: CaptureTime) -> Result<Option<TimedLsn>, LogError> {
        if let Some(before) = self.before()
            && let Some(found) = before.first_record_after(time)?
        {
            return Ok(Some(found));
        }
        for segment in self.segments.iter() {
            let stats = segment.stats();
            if stats.records == 0 || stats.time_max <= time {
                continue;
            }
            let stretches = segment.stretches()?;
            for (nth, stretch) in stretches.iter().enumerate() {
                let next = stretches.get(nth + 1);
                // Records are in the order of their time.
                let all_before = next.is_some_and(|next| next.records > 0 && next.time_min <= time);
                if stretch.records == 0 || all_before {
                    continue;
                }
                let mut first = None;
                segment.each_header(stretch, next, |header| {
                    let known = header.seq <= self.through();
                    let wanted = header.kind.is_record() && header.time > time;
                    if known && wanted && self.timeline().offers(header.lsn) {
                        first = Some(TimedLsn { lsn: header.lsn, time: header.time });
                    }
                    known && first.is_none()
                })?;
                if first.is_some() {
                    return Ok(first);
                }
            }
        }
        Ok(None)
    }
}
