//! A disk's timeline as text: intervals and holes in their order, then marks.

use backtide_receiver_api::{Hole, Interval, Lock, MarkPoint, PointsReport};
use backtide_units::{CaptureTime, Lsn};

use crate::quantity::{count_text, size_both, time_text};

/// A lock that lasts so much longer than was asked is not told of: starts of the receiver take some time.
const LONGER_US: u64 = 60_000_000;

/// One stretch of the timeline.
enum Stretch<'a> {
    Interval(&'a Interval),
    Hole(&'a Hole),
}

/// The whole timeline.
pub(crate) fn timeline_text(report: &PointsReport) -> String {
    let mut lines = vec![format!(
        "disk {} ({}), {}",
        report.disk.name.as_str(),
        report.disk.uuid.0,
        size_both(report.disk.size)
    )];
    let stretches = stretches(report);
    if stretches.is_empty() {
        lines.push("no points yet: nothing of this disk has arrived".to_owned());
    }
    lines.extend(stretches.iter().map(stretch_text));
    if !report.marks.is_empty() {
        lines.push("marks".to_owned());
        lines.extend(report.marks.iter().map(mark_text));
    }
    lines.extend(report.locks.iter().map(lock_text));
    if let Some(last) = report.flush_points.last {
        let points = count_text(report.flush_points.count, "flush point");
        lines.push(format!("{points}, the last at lsn:{} ({})", last.lsn, time_text(last.time)));
    }
    lines.join("\n")
}

/// A lock, and why it lasts longer than was asked, if it does.
pub(crate) fn lock_text(lock: &Lock) -> String {
    let what = match lock.point {
        Some(point) => format!("lsn:{} ({})", point.lsn, time_text(point.time)),
        None => "every point".to_owned(),
    };
    let ends = if lock.ends.0 > lock.until.0 + LONGER_US {
        format!(", in fact until {}: locks go by the time that the receiver has run", time_text(lock.ends))
    } else {
        String::new()
    };
    format!("  locked until {}: {what}{ends}", time_text(lock.until))
}

/// Intervals and holes, oldest first.
fn stretches(report: &PointsReport) -> Vec<Stretch<'_>> {
    let mut stretches: Vec<Stretch<'_>> = report.intervals.iter().map(Stretch::Interval).collect();
    stretches.extend(report.holes.iter().map(Stretch::Hole));
    // A hole begins at the last LSN of the interval before it, which began at or below that.
    stretches.sort_by_key(|stretch| match stretch {
        Stretch::Interval(interval) => (interval.from_lsn, 0),
        Stretch::Hole(hole) => (hole.after_lsn, 1),
    });
    stretches
}

fn stretch_text(stretch: &Stretch<'_>) -> String {
    match stretch {
        Stretch::Interval(interval) => {
            let now = if interval.open { ", growing" } else { "" };
            format!(
                "  points  lsn:{} to lsn:{}  {} to {}{now}",
                interval.from_lsn,
                interval.to_lsn,
                time_text(interval.from_time),
                time_text(interval.to_time)
            )
        }
        Stretch::Hole(hole) => {
            let end = |lsn: Option<Lsn>, time: Option<CaptureTime>| match (lsn, time) {
                (Some(lsn), Some(time)) => (format!("lsn:{lsn}"), time_text(time)),
                (Some(lsn), None) => (format!("lsn:{lsn}"), "now".to_owned()),
                (None, _) => ("now".to_owned(), "now, until the resync is complete".to_owned()),
            };
            let (before_lsn, to_time) = end(hole.before_lsn, hole.to_time);
            format!(
                "  HOLE    above lsn:{} and below {before_lsn}  {} to {to_time}: {}",
                hole.after_lsn,
                time_text(hole.from_time),
                hole.reason
            )
        }
    }
}

fn mark_text(mark: &MarkPoint) -> String {
    let lost = if mark.recoverable { "" } else { "  in a hole: cannot be gone back to" };
    format!("  mark:{}  lsn:{}  {}{lost}", mark.label, mark.lsn, time_text(mark.time))
}

#[cfg(test)]
mod tests {
    use backtide_receiver_api::{DiskRef, FlushPoints, Point};
    use backtide_units::{ByteCount, DiskId};

    use super::*;

    fn time(second: u64) -> CaptureTime {
        CaptureTime(1_772_366_400_000_000 + second * 1_000_000)
    }

    fn interrupted() -> PointsReport {
        PointsReport {
            disk: DiskRef { name: "vm1".parse().unwrap(), uuid: DiskId::random(), size: ByteCount(1 << 20) },
            intervals: vec![
                Interval {
                    from_lsn: Lsn(1),
                    to_lsn: Lsn(40),
                    from_time: time(0),
                    to_time: time(4),
                    open: false,
                },
                Interval {
                    from_lsn: Lsn(60),
                    to_lsn: Lsn(75),
                    from_time: time(6),
                    to_time: time(8),
                    open: true,
                },
            ],
            holes: vec![Hole {
                after_lsn: Lsn(40),
                before_lsn: Some(Lsn(60)),
                from_time: time(4),
                to_time: Some(time(6)),
                reason: "the receiver was away".to_owned(),
                reason_code: "receiver-away".to_owned(),
                open: false,
            }],
            marks: vec![MarkPoint { label: "m".to_owned(), lsn: Lsn(50), time: time(5), recoverable: false }],
            flush_points: FlushPoints { count: 2, last: Some(Point { lsn: Lsn(70), time: time(7) }) },
            first: Some(Point { lsn: Lsn(1), time: time(0) }),
            last: Some(Point { lsn: Lsn(75), time: time(8) }),
            locks: Vec::new(),
            damage: None,
        }
    }

    #[test]
    fn the_hole_stands_between_the_intervals_with_its_reason() {
        let text = timeline_text(&interrupted());
        let lines: Vec<&str> = text.lines().collect();
        assert!(lines[1].contains("lsn:1 to lsn:40") && !lines[1].contains("growing"), "{text}");
        assert!(lines[2].contains("HOLE    above lsn:40 and below lsn:60"), "{text}");
        assert!(lines[2].ends_with(": the receiver was away"), "{text}");
        assert!(lines[3].contains("lsn:60 to lsn:75") && lines[3].ends_with(", growing"), "{text}");
        assert!(lines[5].contains("mark:m  lsn:50") && lines[5].contains("in a hole"), "{text}");
        assert!(lines[6].starts_with("2 flush points, the last at lsn:70"), "{text}");
    }

    #[test]
    fn an_open_hole_has_no_end_and_an_empty_timeline_says_so() {
        let mut report = interrupted();
        report.holes[0] = Hole { before_lsn: None, to_time: None, open: true, ..report.holes[0].clone() };
        report.intervals.pop();
        let text = timeline_text(&report);
        assert!(text.contains("below now") && text.contains("until the resync is complete"), "{text}");
        report.intervals.clear();
        report.holes.clear();
        assert!(timeline_text(&report).contains("no points yet"));
    }
}
