//! A disk's timeline as text: intervals and holes in their order, then marks.

use backtide_receiver_api::{
    AroundReport, Density, DiskRef, Hole, Interval, Lock, MarkPoint, Point, PointsReport,
};
use backtide_units::{ByteCount, CaptureTime, Lsn};

use crate::quantity::{count_text, duration_text, size_both, size_text, time_text};

/// A lock that lasts so much longer than was asked is not told of: starts of the receiver take some time.
const LONGER_US: u64 = 60_000_000;

/// One stretch of the timeline.
enum Stretch<'a> {
    Interval(&'a Interval),
    Hole(&'a Hole),
}

/// The whole timeline.
pub(crate) fn timeline_text(report: &PointsReport) -> String {
    let mut lines = vec![disk_text(&report.disk)];
    if let Some(origin) = &report.origin {
        let (disk, lsn, time) = (origin.disk.as_str(), origin.lsn, time_text(origin.time));
        lines.push(format!(
            "  began as {disk}@lsn:{lsn} ({time}), kept by the receiver at {}",
            origin.receiver
        ));
    }
    let stretches = stretches(report);
    if stretches.is_empty() {
        lines.push("no points yet: nothing of this disk has arrived".to_owned());
    }
    lines.extend(stretches.iter().map(|stretch| stretch_text(stretch, report.connected)));
    lines.extend(report.density.iter().map(density_text));
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

fn disk_text(disk: &DiskRef) -> String {
    format!("disk {} ({}), {}", disk.name.as_str(), disk.uuid.0, size_both(disk.size))
}

/// How much was written when, as a line of columns: the highest stands for the most.
fn density_text(density: &Density) -> String {
    const HEIGHTS: [char; 8] = ['▁', '▂', '▃', '▄', '▅', '▆', '▇', '█'];
    let most = density.parts.iter().map(|part| part.bytes.0).max().unwrap_or(0).max(1);
    let column = |bytes: u64| {
        let height = (u128::from(bytes) * HEIGHTS.len() as u128).div_ceil(u128::from(most));
        usize::try_from(height).ok().and_then(|height| height.checked_sub(1)).map_or(' ', |at| HEIGHTS[at])
    };
    let columns: String = density.parts.iter().map(|part| column(part.bytes.0)).collect();
    let seconds = (density.to_time.0 - density.from_time.0) as f64 / 1e6;
    let changes: u64 = density.parts.iter().map(|part| part.changes).sum();
    format!(
        "  written |{columns}|  {} to {}: {}; the highest column is {} in {}",
        time_text(density.from_time),
        time_text(density.to_time),
        count_text(changes, "change"),
        size_text(ByteCount(most)),
        duration_text(seconds / density.parts.len().max(1) as f64)
    )
}

/// The points around a time, and why it is none itself.
pub(crate) fn around_text(report: &AroundReport) -> String {
    let mut lines = vec![disk_text(&report.disk), standing_text(report)];
    let mut row = |what: &str, lsn: Lsn, time: CaptureTime| {
        let (apart, side) = if time <= report.time {
            (report.time.0 - time.0, "before")
        } else {
            (time.0 - report.time.0, "after")
        };
        let apart = duration_text(apart as f64 / 1e6);
        lines.push(format!("  {what}  lsn:{lsn}  {}  ({apart} {side})", time_text(time)));
    };
    let points: [(&str, Option<Point>); 3] = [
        ("last point before ", report.before),
        ("first point after ", report.after),
        ("last flush before ", report.flush_before),
    ];
    for (what, point) in points {
        if let Some(point) = point {
            row(what, point.lsn, point.time);
        }
    }
    for mark in [&report.mark_before, &report.mark_after].into_iter().flatten() {
        row(&format!("mark:{}", mark.label), mark.lsn, mark.time);
    }
    lines.join("\n")
}

/// Whether the time can be gone back to.
fn standing_text(report: &AroundReport) -> String {
    let time = time_text(report.time);
    let damaged = |point: Point| report.touched.iter().any(|touched| touched.touches(point.lsn));
    match (report.point, &report.hole) {
        (Some(point), _) if damaged(point) => {
            format!("{time} is lsn:{}, of which some bytes are DAMAGED", point.lsn)
        }
        (Some(point), _) if point.time < report.time => {
            let written = time_text(point.time);
            format!("{time} can be gone back to: it is lsn:{}, written last at {written}", point.lsn)
        }
        (Some(point), _) => format!("{time} can be gone back to: it is lsn:{}", point.lsn),
        (None, Some(hole)) => {
            format!("{time} cannot be gone back to: {}", stretch_text(&Stretch::Hole(hole), None).trim())
        }
        (None, None) => format!("{time} cannot be gone back to: it lies before the first point"),
    }
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

/// `connected`, as far as that is told, is the disk's agent.
fn stretch_text(stretch: &Stretch<'_>, connected: Option<bool>) -> String {
    match stretch {
        Stretch::Interval(interval) => {
            let now = match (interval.open, connected) {
                (true, Some(false)) => ", and nothing newer: its agent is not connected",
                (true, _) => ", growing",
                (false, _) => "",
            };
            format!(
                "  points  lsn:{} to lsn:{}  {} to {} ({}){now}",
                interval.from_lsn,
                interval.to_lsn,
                time_text(interval.from_time),
                time_text(interval.to_time),
                duration_text((interval.to_time.0 - interval.from_time.0) as f64 / 1e6)
            )
        }
        Stretch::Hole(hole) => {
            let end = |lsn: Option<Lsn>, time: Option<CaptureTime>| match (lsn, time) {
                (Some(lsn), Some(time)) => (format!("lsn:{lsn}"), time_text(time)),
                (Some(lsn), None) => (format!("lsn:{lsn}"), "now".to_owned()),
                (None, _) => ("now".to_owned(), "now, until the resync is complete".to_owned()),
            };
            let (before_lsn, to_time) = end(hole.before_lsn, hole.to_time);
            if hole.after_lsn == Lsn::ZERO && hole.from_time == CaptureTime(0) {
                return format!(
                    "  HOLE    from the beginning and below {before_lsn}  to {to_time}: {}",
                    hole.reason
                );
            }
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
    use backtide_receiver_api::{DensityPart, FlushPoints, Touched, TouchedKnown, TouchedPoints};
    use backtide_units::DiskId;

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
            origin: None,
            locks: Vec::new(),
            density: None,
            damage: None,
            touched: Vec::new(),
            connected: None,
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
        let text = timeline_text(&PointsReport { connected: Some(false), ..interrupted() });
        assert!(
            text.contains("and nothing newer: its agent is not connected") && !text.contains("growing"),
            "{text}"
        );
        assert!(lines[5].contains("mark:m  lsn:50") && lines[5].contains("in a hole"), "{text}");
        assert!(lines[6].starts_with("2 flush points, the last at lsn:70"), "{text}");
    }

    #[test]
    fn the_most_written_is_the_highest_column() {
        let part = |bytes| DensityPart { changes: 2, bytes: ByteCount(bytes) };
        let parts = [0, 1, 50, 100].map(part).to_vec();
        let density = Density { from_time: time(0), to_time: time(240), parts };
        let text = timeline_text(&PointsReport { density: Some(density), ..interrupted() });
        let line = text.lines().find(|line| line.contains("written")).unwrap();
        assert!(line.contains("| ▁▄█|") && line.contains(": 8 changes;"), "{text}");
        assert!(
            line.ends_with(&format!("{} in {}", size_text(ByteCount(100)), duration_text(60.0))),
            "{text}"
        );
    }

    #[test]
    fn a_time_in_a_hole_says_why_not_and_what_else() {
        let timeline = interrupted();
        let point = |lsn, second| Some(Point { lsn: Lsn(lsn), time: time(second) });
        let report = AroundReport {
            disk: timeline.disk.clone(),
            asked: "-5m".to_owned(),
            time: time(5),
            point: None,
            hole: Some(timeline.holes[0].clone()),
            before: point(40, 4),
            after: point(60, 6),
            flush_before: None,
            mark_before: None,
            mark_after: None,
            warning: None,
            damage: None,
            touched: Vec::new(),
        };
        let text = around_text(&report);
        let lines: Vec<&str> = text.lines().collect();
        assert!(lines[1].contains("cannot be gone back to: HOLE    above lsn:40"), "{text}");
        assert!(lines[1].ends_with("the receiver was away"), "{text}");
        assert!(lines[2].contains("lsn:40") && lines[2].ends_with("before)"), "{text}");
        assert!(lines[3].contains("lsn:60") && lines[3].ends_with("after)"), "{text}");
        let there = AroundReport { point: point(40, 4), hole: None, ..report };
        let text = around_text(&there);
        assert!(text.contains("can be gone back to: it is lsn:40, written last at 2026"), "{text}");
        let span = TouchedPoints { bytes: None, from: there.point, to: None, open: true, lost: false };
        let (known, text) = (TouchedKnown::Exact, String::new());
        let touched = vec![Touched { place: "a segment".to_owned(), points: vec![span], known, text }];
        let text = around_text(&AroundReport { touched, ..there });
        assert!(text.contains("is lsn:40, of which some bytes are DAMAGED"), "{text}");
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
