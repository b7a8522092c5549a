//! The timeline in the control API's words: intervals, holes with their reasons, marks, and why a
//! point cannot be had.

use backtide_receiver_api::{
    ApiError, AroundReport, Density, DensityPart, DiskOrigin, DiskRef, ErrorCode, FlushPoints, Hole,
    Interval, MarkPoint, Point, PointsReport, ResolvedPoint, UnavailablePoint,
};
use backtide_recovery::{self as recovery, LogError, Nearest, PointError, Snapshot, TimedLsn, Timeline};
use backtide_segment::AttachOrigin;
use backtide_units::{CaptureTime, DiskName, Lsn, Reason};

use crate::clock::{self, Came, Difference};

/// Everything a timeline tells.
pub(crate) fn report(disk: DiskRef, timeline: &Timeline, damage: Option<String>) -> PointsReport {
    let intervals: Vec<_> =
        timeline.intervals().iter().map(|interval| self::interval(timeline, interval)).collect();
    let (flushes, last_flush) = timeline.flushes();
    PointsReport {
        disk,
        first: timeline.intervals().first().map(|interval| point(interval.from)),
        last: timeline.latest().map(point),
        intervals,
        holes: timeline.holes().iter().map(hole).collect(),
        marks: marks(timeline),
        flush_points: FlushPoints { count: flushes, last: last_flush.map(point) },
        origin: timeline.origin().map(origin),
        locks: Vec::new(),
        density: None,
        damage,
        touched: Vec::new(),
        connected: None,
    }
}

/// The point of another disk that one began as.
pub(crate) fn origin(origin: &AttachOrigin) -> DiskOrigin {
    let AttachOrigin { receiver, disk, name, lsn, time } = origin.clone();
    DiskOrigin { receiver, disk: name, uuid: disk, lsn, time }
}

/// How much was written when.
pub(crate) fn density(density: recovery::Density) -> Density {
    let part = |part: recovery::DensityPart| DensityPart { changes: part.changes, bytes: part.bytes };
    Density {
        from_time: density.from,
        to_time: density.to,
        parts: density.parts.into_iter().map(part).collect(),
    }
}

/// The points around a time of a disk that has points.
///
/// # Errors
/// When there is no point, or the log cannot be read.
pub(crate) fn around(
    disk: DiskRef,
    asked: String,
    snapshot: &Snapshot,
    time: CaptureTime,
) -> Result<AroundReport, PointError> {
    let timeline = snapshot.timeline();
    let (lsn, hole, nearest) = match snapshot.point_at(time) {
        Ok(lsn) => (Some(lsn), None, Nearest::default()),
        Err(PointError::InHole { hole, nearest, .. }) => (None, Some(hole), nearest),
        Err(PointError::Outside { nearest, .. }) => (None, None, nearest),
        Err(
            error @ (PointError::Future { .. }
            | PointError::NoPoints { .. }
            | PointError::UnknownMark { .. }
            | PointError::Log(_)),
        ) => return Err(error),
    };
    let at = match lsn {
        Some(lsn) => Some(TimedLsn { lsn, time: snapshot.time_of(lsn)?.unwrap_or(time) }),
        None => None,
    };
    let before = at.or(nearest.before);
    let after = match nearest.after {
        Some(after) => Some(after),
        None => snapshot.first_point_after(time)?,
    };
    let flushes = before.map(|before| snapshot.flush_points(before.lsn, 1)).transpose()?;
    let marks: Vec<_> = marks(timeline).into_iter().filter(|mark| mark.recoverable).collect();
    Ok(AroundReport {
        disk,
        asked,
        time,
        point: at.map(point),
        hole: hole.as_deref().map(self::hole),
        before: before.map(point),
        after: after.map(point),
        flush_before: flushes.and_then(|flushes| flushes.first().copied()).map(point),
        mark_before: marks.iter().rev().find(|mark| mark.time <= time).cloned(),
        mark_after: marks.iter().find(|mark| mark.time > time).cloned(),
        warning: None,
        damage: None,
        touched: Vec::new(),
    })
}

/// What a person should know who gets the newest point as `latest`: none when nothing newer was lost.
fn lost_end(asked: &str, timeline: &Timeline) -> Option<String> {
    let open = timeline.holes().last().filter(|hole| hole.to.is_none())?;
    let is_lost = asked.parse().is_ok_and(|point| matches!(point, recovery::Point::Latest))
        && open.reason.code == Reason::Damaged.code();
    let latest = timeline.latest().filter(|_| is_lost)?;
    Some(format!(
        "{asked} is the newest point that is left, {latest}: what was written later cannot be given, because {}",
        open.reason.text
    ))
}

/// Why a time may be another moment than was meant: none where the clocks agree, and of a point that is named otherwise.
fn other_clock(asked: &str, disk: &DiskName, timeline: &Timeline, came: Option<Came>) -> Option<String> {
    let is_time = |point| matches!(point, recovery::Point::Time(_) | recovery::Point::Ago(_));
    let difference = Difference::seen(timeline, came, clock::now())?;
    asked.parse().is_ok_and(is_time).then(|| {
        format!(
            "{asked} may be another moment than is meant: {}; `backtide points {disk}` has the times as they were stamped",
            difference.sentence(disk)
        )
    })
}

/// Why what the guest wrote until then may be missing: the disk's agent is not there and was heard last before, or has not sent yet
/// what it had when it came. None of a point that is named otherwise.
fn unheard(asked: &str, disk: &DiskName, timeline: &Timeline, came: Option<Came>) -> Option<String> {
    let last = timeline.latest()?;
    let why = match came {
        None => {
            "its agent is not connected: what was written since is not in this point, and may become a hole"
        }
        Some(came) if came.has_more_than(last.lsn) => {
            "its agent has not sent everything yet that it had when it came: what was written since is not in this point yet, \
             and may become a hole"
        }
        Some(_) => return None,
    };
    let time = match asked.parse().ok()? {
        recovery::Point::Time(time) => time,
        recovery::Point::Ago(duration) => recovery::ago(clock::now(), duration),
        recovery::Point::Latest | recovery::Point::Lsn(_) | recovery::Point::Mark(_) => return None,
    };
    (time > last.time).then(|| {
        format!(
            "{asked} is later than what the receiver has heard of disk {disk}, the last at {}, and {why}",
            recovery::time_text(last.time)
        )
    })
}

/// What a person should know who asked for a time, if that it was.
pub(crate) fn of_time(
    asked: &str,
    disk: &DiskName,
    timeline: &Timeline,
    came: Option<Came>,
) -> Option<String> {
    unheard(asked, disk, timeline, came).or_else(|| other_clock(asked, disk, timeline, came))
}

/// What a person should know who gets a point for what was asked, if anything.
pub(crate) fn warning(
    asked: &str,
    disk: &DiskName,
    timeline: &Timeline,
    came: Option<Came>,
) -> Option<String> {
    lost_end(asked, timeline).or_else(|| of_time(asked, disk, timeline, came))
}

/// A point as it was asked for.
pub(crate) fn resolved(
    disk: &DiskRef,
    snapshot: &Snapshot,
    asked: String,
    at: TimedLsn,
    came: Option<Came>,
) -> ResolvedPoint {
    let warning = warning(&asked, &disk.name, snapshot.timeline(), came);
    let unheard = unheard(&asked, &disk.name, snapshot.timeline(), came).is_some();
    ResolvedPoint { disk: disk.clone(), asked, lsn: at.lsn, time: at.time, warning, unheard }
}

/// The interval that holds a point.
pub(crate) fn interval_of(timeline: &Timeline, lsn: Lsn) -> Option<&recovery::Interval> {
    timeline.intervals().iter().find(|interval| interval.from.lsn <= lsn && lsn <= interval.to.lsn)
}

/// Stands for the disk in a hint where its name is not known.
const NAME: &str = "NAME";

/// Why a point cannot be had, with everything that is known around it.
pub(crate) fn unavailable(asked: &str, error: &PointError) -> ApiError {
    match error {
        PointError::InHole { hole, nearest, .. } => {
            let details = details(asked, Some(self::hole(hole)), Some(nearest));
            hinted(ErrorCode::PointInHole, error, nearest).with_details(details)
        }
        PointError::Outside { nearest, .. } => {
            let details = details(asked, None, Some(nearest));
            hinted(ErrorCode::PointNotFound, error, nearest).with_details(details)
        }
        PointError::Future { latest, .. } => {
            let nearest = Nearest { before: *latest, after: None };
            ApiError::from_error(ErrorCode::PointNotFound, error)
                .with_hint("`latest` is the newest point, whatever the clocks say")
                .with_details(details(asked, None, Some(&nearest)))
        }
        PointError::NoPoints { .. } => ApiError::from_error(ErrorCode::PointNotFound, error)
            .with_hint(format!("wait until the first resync is complete: backtide wait {NAME} --for point"))
            .with_details(details(asked, None, None)),
        PointError::UnknownMark { .. } => ApiError::from_error(ErrorCode::PointNotFound, error)
            .with_hint(format!("`backtide points {NAME}` lists the marks"))
            .with_details(details(asked, None, None)),
        PointError::Log(error) => log_error(error),
    }
}

/// The same with the disk's name in the commands that its hint names, and with what a clock that differs may have to do with it: where
/// time was set back, `-5m` lies before a disk's first point or in what is a hole since long ago.
pub(crate) fn told_for(error: ApiError, asked: &str, disk: &DiskName, timeline: &Timeline) -> ApiError {
    let no_point = matches!(error.code, ErrorCode::PointNotFound | ErrorCode::PointInHole);
    let clock = other_clock(asked, disk, timeline, None).filter(|_| no_point);
    let hint = error.hint.map(|hint| hint.replace(NAME, disk.as_str()));
    ApiError { hint: hint.into_iter().chain(clock).reduce(|hint, clock| format!("{hint}; {clock}")), ..error }
}

/// A log that cannot be read, in the control API's words.
pub(crate) fn log_error(error: &LogError) -> ApiError {
    let code = match error {
        LogError::Damaged { .. } => ErrorCode::Damaged,
        LogError::NoLog { .. }
        | LogError::LogExists { .. }
        | LogError::UnknownVersion { .. }
        | LogError::Poisoned
        | LogError::Full { .. }
        | LogError::Io { .. } => ErrorCode::Failed,
    };
    ApiError::from_error(code, error)
}

fn hinted(code: ErrorCode, error: &PointError, nearest: &Nearest) -> ApiError {
    let api = ApiError::from_error(code, error);
    match nearest.before.or(nearest.after) {
        Some(point) => api.with_hint(format!("lsn:{} can be had", point.lsn)),
        None => api,
    }
}

fn details(asked: &str, hole: Option<Hole>, nearest: Option<&Nearest>) -> UnavailablePoint {
    UnavailablePoint {
        asked: asked.to_owned(),
        hole,
        before: nearest.and_then(|nearest| nearest.before).map(point),
        after: nearest.and_then(|nearest| nearest.after).map(point),
    }
}

fn interval(timeline: &Timeline, interval: &recovery::Interval) -> Interval {
    let newest = timeline.intervals().last() == Some(interval);
    Interval {
        from_lsn: interval.from.lsn,
        to_lsn: interval.to.lsn,
        from_time: interval.from.time,
        to_time: interval.to.time,
        open: newest && timeline.in_sync(),
    }
}

fn hole(hole: &recovery::Hole) -> Hole {
    let reason = Reason::from_code(hole.reason.code);
    Hole {
        after_lsn: hole.from.map_or(Lsn::ZERO, |from| from.lsn),
        before_lsn: hole.to.map(|to| to.lsn),
        from_time: hole.from.map_or(CaptureTime(0), |from| from.time),
        to_time: hole.to.map(|to| to.time),
        reason: hole.reason.text.clone(),
        reason_code: reason.map_or_else(|| format!("code-{}", hole.reason.code), reason_code),
        open: hole.to.is_none(),
    }
}

/// The reason's name in JSON, which is stable.
fn reason_code(reason: Reason) -> String {
    match serde_json::to_value(reason) {
        Ok(serde_json::Value::String(name)) => name,
        Ok(_) | Err(_) => format!("code-{}", reason.code()),
    }
}

/// Of several marks with one label the newest counts, and only it is listed.
pub(crate) fn marks(timeline: &Timeline) -> Vec<MarkPoint> {
    let mut seen = std::collections::BTreeSet::new();
    let newest = timeline.marks().iter().rev().filter(|mark| seen.insert(mark.label.clone()));
    let mut marks: Vec<_> = newest
        .map(|mark| MarkPoint {
            label: mark.label.clone(),
            lsn: mark.at.lsn,
            time: mark.at.time,
            recoverable: timeline.offers(mark.at.lsn),
        })
        .collect();
    marks.sort_by(|a, b| (a.lsn, &a.label).cmp(&(b.lsn, &b.label)));
    marks
}

pub(crate) fn point(at: TimedLsn) -> Point {
    Point { lsn: at.lsn, time: at.time }
}
