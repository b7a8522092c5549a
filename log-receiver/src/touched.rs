//! Which points a damaged place touches, in the control API's words.

use backtide_receiver_api::{ByteSpan, Touched, TouchedKnown, TouchedPoints};
use backtide_recovery::{Known, TimedLsn, TouchedSpan};
use backtide_units::ByteRange;

use crate::points::point;

/// So many stretches of points are in the text; the others are counted.
const SPOKEN_MAX: usize = 3;

/// What a place touches.
pub(crate) fn touched(place: &str, found: &backtide_recovery::Touched) -> Touched {
    let known = match found.known {
        Known::Exact => TouchedKnown::Exact,
        Known::AtMost => TouchedKnown::AtMost,
        Known::AtLeast => TouchedKnown::AtLeast,
    };
    let points = found.spans.iter().map(|span| TouchedPoints {
        bytes: span.range.map(|range| ByteSpan { offset: range.start(), length: range.count() }),
        from: span.from.map(point),
        to: span.to.map(point),
        open: span.open,
        lost: span.lost,
    });
    Touched { place: place.to_owned(), points: points.collect(), known, text: text(found) }
}

/// A damaged place with what it touches, if that is known.
pub(crate) fn told<'a>(why: &str, all: impl IntoIterator<Item = &'a Touched>) -> String {
    let place = backtide_recovery::damaged_place(why);
    match all.into_iter().find(|touched| touched.place == place) {
        Some(touched) => format!("{why}; {}", touched.text),
        None => why.to_owned(),
    }
}

fn text(found: &backtide_recovery::Touched) -> String {
    let (lost, damaged): (Vec<&TouchedSpan>, Vec<_>) = found.spans.iter().partition(|span| span.lost);
    let mut parts: Vec<String> = lost.into_iter().map(lost_text).collect();
    if !damaged.is_empty() {
        let spoken: Vec<String> = damaged.iter().take(SPOKEN_MAX).map(|span| span_text(span)).collect();
        let more = damaged.len().saturating_sub(SPOKEN_MAX);
        let more = if more > 0 { format!(", and {more} more stretches") } else { String::new() };
        let verb = match found.known {
            Known::Exact => "it touches",
            Known::AtMost => "it touches at most",
            Known::AtLeast => "it touches at least",
        };
        parts.push(format!("{verb} {}{more}", spoken.join(", ")));
    }
    if parts.is_empty() { "it touches no point".to_owned() } else { parts.join("; ") }
}

fn span_text(span: &TouchedSpan) -> String {
    let bytes = match span.range {
        Some(range) => bytes_text(range),
        None => "any bytes".to_owned(),
    };
    let points = match (span.from, span.to) {
        (Some(from), Some(to)) if from.lsn == to.lsn => from.to_string(),
        (Some(from), Some(to)) => format!("{from} to {to}"),
        (Some(only), None) | (None, Some(only)) => only.to_string(),
        (None, None) => return format!("{bytes} of points that are still to come"),
    };
    let open = if span.open { " and on, until they are written again" } else { "" };
    format!("{bytes} of {points}{open}")
}

fn bytes_text(range: ByteRange) -> String {
    format!("bytes {range}")
}

fn lost_text(span: &TouchedSpan) -> String {
    let after = |from: TimedLsn| format!("after {from}");
    let before = |to: TimedLsn| format!("before {to}");
    match (span.from.map(after), span.to.map(before)) {
        (Some(after), Some(before)) => format!("the points {after} and {before} are lost"),
        (Some(one), None) | (None, Some(one)) => format!("the points {one} are lost"),
        (None, None) => "all points are lost".to_owned(),
    }
}

#[cfg(test)]
mod tests {
    use backtide_units::{ByteOffset, CaptureTime, Lsn};

    use super::*;

    fn at(lsn: u64) -> Option<TimedLsn> {
        Some(TimedLsn { lsn: Lsn(lsn), time: CaptureTime(lsn * 1_000_000) })
    }

    fn span(from: u64, to: u64, open: bool) -> TouchedSpan {
        let range = Some(ByteRange::between(ByteOffset(0), ByteOffset(4096)));
        TouchedSpan { range, from: at(from), to: at(to), open, lost: false }
    }

    fn of(spans: Vec<TouchedSpan>, known: Known) -> String {
        text(&backtide_recovery::Touched { spans, known })
    }

    #[test]
    fn what_is_touched_is_told_in_few_words() {
        let (five, nine) = ("lsn:5 (1970-01-01T00:00:05Z)", "lsn:9 (1970-01-01T00:00:09Z)");
        assert_eq!(of(vec![], Known::Exact), "it touches no point");
        let told = of(vec![span(5, 9, false)], Known::Exact);
        assert_eq!(told, format!("it touches bytes 0..4096 of {five} to {nine}"));
        let told = of(vec![span(5, 5, true)], Known::AtLeast);
        let on = "and on, until they are written again";
        assert_eq!(told, format!("it touches at least bytes 0..4096 of {five} {on}"));
        let any = TouchedSpan { range: None, ..span(5, 9, false) };
        assert_eq!(of(vec![any], Known::AtMost), format!("it touches at most any bytes of {five} to {nine}"));
        let many = of((0..5).map(|lsn| span(lsn, lsn, false)).collect(), Known::Exact);
        assert!(many.ends_with(", and 2 more stretches"), "{many}");
        let to_come = TouchedSpan { from: None, to: None, ..span(0, 0, true) };
        let told = of(vec![to_come], Known::Exact);
        assert_eq!(told, "it touches bytes 0..4096 of points that are still to come");
        let lost = TouchedSpan { range: None, lost: true, ..span(5, 9, false) };
        assert_eq!(
            of(vec![lost], Known::Exact),
            format!("the points after {five} and before {nine} are lost")
        );
        let lost = TouchedSpan { to: None, ..lost };
        assert_eq!(of(vec![lost], Known::Exact), format!("the points after {five} are lost"));
    }

    #[test]
    fn a_place_is_told_with_what_it_touches_also_when_it_could_not_be_mended() {
        let found = backtide_recovery::Touched { spans: vec![span(5, 5, false)], known: Known::Exact };
        let all = [touched("a.seg is damaged at byte 7", &found)];
        let why = "a.seg is damaged at byte 7: cannot be mended: no space left";
        assert_eq!(told(why, &all), format!("{why}; {}", all[0].text));
        assert_eq!(told("a.seg is damaged at byte 70", &all), "a.seg is damaged at byte 70");
    }
}
