//! How people name a point: `latest`, `lsn:N`, an RFC 3339 time, a duration ago, `mark:NAME`.

use std::{fmt, str::FromStr};

use backtide_units::{CaptureTime, Lsn};
use jiff::{SignedDuration, Span, SpanRelativeTo, Timestamp, civil::DateTime};

/// A point as a person names it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Point {
    /// The newest point.
    Latest,
    /// Just after this LSN's write.
    Lsn(Lsn),
    /// The last record captured at or before this time.
    Time(CaptureTime),
    /// So long before now.
    Ago(SignedDuration),
    /// A named point.
    Mark(String),
}

/// Text that names no point.
#[derive(Debug, thiserror::Error)]
pub enum ParsePointError {
    /// A time of which nobody knows where on earth.
    #[error("the time {0:?} has no zone: add Z, or an offset such as +02:00")]
    NoZone(String),
    /// Anything else.
    #[error(
        "{0:?} names no point: expected latest, lsn:NUMBER, a time such as 2026-03-01T12:00:00Z, \
         a duration ago such as -5m, or mark:NAME"
    )]
    Other(String),
}

impl FromStr for Point {
    type Err = ParsePointError;

    fn from_str(text: &str) -> Result<Self, ParsePointError> {
        let wrong = || ParsePointError::Other(text.to_owned());
        if text == "latest" {
            return Ok(Self::Latest);
        }
        if let Some(number) = text.strip_prefix("lsn:") {
            return number.parse().map(Self::Lsn).map_err(|_| wrong());
        }
        if let Some(label) = text.strip_prefix("mark:") {
            return if label.is_empty() { Err(wrong()) } else { Ok(Self::Mark(label.to_owned())) };
        }
        if let Some(ago) = text.strip_prefix('-') {
            return duration(ago).map(Self::Ago).ok_or_else(wrong);
        }
        let timestamp: Timestamp = text.parse().map_err(|_| match text.parse::<DateTime>() {
            Ok(_) => ParsePointError::NoZone(text.to_owned()),
            Err(_) => wrong(),
        })?;
        // Rounded down: the point is the last record at or before the time, and capture times
        // have microseconds.
        let micros = timestamp.as_nanosecond().div_euclid(1000);
        u64::try_from(micros).map(|micros| Self::Time(CaptureTime(micros))).map_err(|_| wrong())
    }
}

/// A duration such as `5m`, `1h 30m`, `2d` (of 24 hours each).
fn duration(text: &str) -> Option<SignedDuration> {
    if text.starts_with(['-', '+']) {
        return None;
    }
    let span: Span = text.parse().ok()?;
    let duration = span.to_duration(SpanRelativeTo::days_are_24_hours()).ok()?;
    (!duration.is_negative()).then_some(duration)
}

/// A capture time as people read it: RFC 3339 in UTC.
pub fn time_text(time: CaptureTime) -> String {
    i64::try_from(time.0)
        .ok()
        .and_then(|micros| Timestamp::from_microsecond(micros).ok())
        .map_or_else(|| format!("{} us after 1970", time.0), |timestamp| timestamp.to_string())
}

/// The time so long before `now`; the beginning of time when it is longer.
pub fn ago(now: CaptureTime, duration: SignedDuration) -> CaptureTime {
    let micros = u64::try_from(duration.as_micros()).unwrap_or(u64::MAX);
    CaptureTime(now.0.saturating_sub(micros))
}

impl fmt::Display for Point {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Latest => f.write_str("latest"),
            Self::Lsn(lsn) => write!(f, "lsn:{lsn}"),
            Self::Time(time) => f.write_str(&time_text(*time)),
            Self::Ago(duration) => write!(f, "-{duration:#}"),
            Self::Mark(label) => write!(f, "mark:{label}"),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parse(text: &str) -> Option<Point> {
        text.parse().ok()
    }

    #[test]
    fn every_form_is_understood() {
        assert_eq!(parse("latest"), Some(Point::Latest));
        assert_eq!(parse("lsn:42"), Some(Point::Lsn(Lsn(42))));
        assert_eq!(parse("mark:before upgrade"), Some(Point::Mark("before upgrade".into())));
        assert_eq!(parse("-5m"), Some(Point::Ago(SignedDuration::from_mins(5))));
        assert_eq!(parse("-1h30m"), Some(Point::Ago(SignedDuration::from_mins(90))));
        assert_eq!(parse("-2d"), Some(Point::Ago(SignedDuration::from_hours(48))));
        assert_eq!(parse("-PT10S"), Some(Point::Ago(SignedDuration::from_secs(10))));
        assert_eq!(parse("1970-01-01T00:00:01Z"), Some(Point::Time(CaptureTime(1_000_000))));
        assert_eq!(parse("1970-01-01T01:00:01+01:00"), Some(Point::Time(CaptureTime(1_000_000))));
    }

    #[test]
    fn nine_fractional_digits_are_rounded_down() {
        assert_eq!(parse("1970-01-01T00:00:00.123456789Z"), Some(Point::Time(CaptureTime(123_456))));
    }

    #[test]
    fn anything_else_is_refused() {
        for bad in
            ["", "now", "lsn:", "lsn:-1", "mark:", "-", "--5m", "5m", "1960-01-01T00:00:00Z", "2026-03-01"]
        {
            assert_eq!(parse(bad), None, "{bad}");
        }
    }

    #[test]
    fn what_is_shown_is_understood_again() {
        for text in ["latest", "lsn:7", "mark:a", "2026-03-01T12:00:00.5Z", "-90s"] {
            let point = parse(text).expect("a point");
            assert_eq!(parse(&point.to_string()), Some(point));
        }
    }

    #[test]
    fn a_time_without_a_zone_is_told_so() {
        let why = |text: &str| text.parse::<Point>().unwrap_err().to_string();
        for text in ["2026-03-01T12:00:00", "2026-03-01 12:00", "2026-03-01"] {
            assert_eq!(
                why(text),
                format!("the time {text:?} has no zone: add Z, or an offset such as +02:00")
            );
        }
        assert!(why("yesterday").starts_with("\"yesterday\" names no point"));
    }
}
