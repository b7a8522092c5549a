//! Sizes, durations and times as people write and read them.

use std::time::Duration;

use backtide_units::{ByteCount, CaptureTime};
use bytesize::ByteSize;
use jiff::{SignedDuration, Timestamp, tz::TimeZone};

/// No size is larger: 8 EiB.
const SIZE_MAX: u64 = 1 << 63;

/// A size: bytes, or a number with KiB, MiB, GiB (K, M, G mean the same).
pub(crate) fn parse_size(text: &str) -> Result<ByteCount, String> {
    let wrong = || format!("{text:?} is no size: write bytes, or a number with KiB, MiB or GiB");
    // `64M` is 64 MiB to everybody who works with disks; `64MB` is what it says.
    let binary = text.strip_suffix(['K', 'M', 'G', 'T', 'k', 'm', 'g', 't']).is_some();
    let text = if binary { format!("{text}iB") } else { text.to_owned() };
    let size = text.parse::<ByteSize>().map_err(|_| wrong())?;
    // Beyond what a number holds, the parser gives the largest one.
    if size.as_u64() > SIZE_MAX {
        return Err(format!("{text:?} is more than 8 EiB, and no disk or memory has that"));
    }
    Ok(ByteCount(size.as_u64()))
}

/// A duration: a number with ms, s, m, h or d.
pub(crate) fn parse_duration(text: &str) -> Result<Duration, String> {
    let wrong = || format!("{text:?} is no duration: write a number with ms, s, m or h, such as 5m");
    let duration: SignedDuration = text.parse().map_err(|_| wrong())?;
    Duration::try_from(duration).map_err(|_| wrong())
}

/// A size for people: `64.0 MiB`.
pub(crate) fn size_text(size: ByteCount) -> String {
    ByteSize::b(size.0).display().iec().to_string()
}

/// A size in both readings: `64.0 MiB (67108864 bytes)`.
pub(crate) fn size_both(size: ByteCount) -> String {
    if size.0 < 1024 {
        format!("{} bytes", size.0)
    } else {
        format!("{} ({} bytes)", size_text(size), size.0)
    }
}

/// So many of something: `1 range`, `3 ranges`.
pub(crate) fn count_text(count: impl Into<u64>, noun: &str) -> String {
    match count.into() {
        1 => format!("1 {noun}"),
        count => format!("{count} {noun}s"),
    }
}

/// A time for people: RFC 3339 with the local zone, to the microsecond, so that it can be given
/// back as a point.
pub(crate) fn time_text(time: CaptureTime) -> String {
    zoned_text(time, TimeZone::system())
}

fn zoned_text(time: CaptureTime, zone: TimeZone) -> String {
    let timestamp = i64::try_from(time.0).ok().and_then(|micros| Timestamp::from_microsecond(micros).ok());
    match timestamp {
        Some(timestamp) => timestamp.to_zoned(zone).strftime("%Y-%m-%dT%H:%M:%S%.6f%:z").to_string(),
        None => format!("{} us after 1970", time.0),
    }
}

/// A duration for people: `340ms`, `4.2s`, `3m 5s`, `2h 1m`.
pub(crate) fn duration_text(seconds: f64) -> String {
    let seconds = seconds.max(0.0);
    if seconds == 0.0 {
        return "0s".to_owned();
    }
    if seconds < 1.0 {
        return format!("{:.0}ms", (seconds * 1000.0).max(1.0));
    }
    if seconds < 60.0 {
        return format!("{seconds:.1}s");
    }
    let whole = seconds as u64;
    let (days, hours, minutes) = (whole / 86_400, whole / 3600 % 24, whole / 60 % 60);
    match (days, hours) {
        (0, 0) => format!("{minutes}m {}s", whole % 60),
        (0, _) => format!("{hours}h {minutes}m"),
        _ => format!("{days}d {hours}h"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sizes_are_taken_in_the_usual_forms() {
        for (text, bytes) in [
            ("0", 0),
            ("4096", 4096),
            ("64MiB", 64 << 20),
            ("64M", 64 << 20),
            ("1g", 1 << 30),
            ("1MB", 1_000_000),
        ] {
            assert_eq!(parse_size(text), Ok(ByteCount(bytes)), "{text}");
        }
        for large in ["17EiB", "16EiB", "99999999999999GiB"] {
            assert!(parse_size(large).unwrap_err().contains("more than 8 EiB"), "{large}");
        }
        for wrong in ["", "M", "64X", "-1", "lots"] {
            assert!(parse_size(wrong).unwrap_err().contains("is no size"), "{wrong}");
        }
    }

    #[test]
    fn durations_are_taken_with_a_unit() {
        assert_eq!(parse_duration("5m"), Ok(Duration::from_secs(300)));
        assert_eq!(parse_duration("250ms"), Ok(Duration::from_millis(250)));
        for wrong in ["", "5", "-5m", "soon"] {
            assert!(parse_duration(wrong).unwrap_err().contains("is no duration"), "{wrong}");
        }
    }

    #[test]
    fn people_read_sizes_and_durations() {
        assert_eq!(size_both(ByteCount(64 << 20)), "64.0 MiB (67108864 bytes)");
        assert_eq!(size_both(ByteCount(512)), "512 bytes");
        let texts = [0.0, 0.0004, 0.34, 4.25, 185.0, 7300.0, 200_000.0].map(duration_text);
        assert_eq!(texts, ["0s", "1ms", "340ms", "4.2s", "3m 5s", "2h 1m", "2d 7h"]);
    }

    #[test]
    fn a_time_that_is_shown_is_the_same_point_again() {
        let time = CaptureTime(1_772_366_400_123_456);
        let zone = TimeZone::fixed(jiff::tz::offset(2));
        let text = zoned_text(time, zone);
        assert_eq!(text, "2026-03-01T14:00:00.123456+02:00");
        assert_eq!(text.parse::<Timestamp>().unwrap().as_microsecond() as u64, time.0);
    }
}
