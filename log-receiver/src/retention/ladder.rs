//! A ladder: `any=24h hourly=7d daily=30d weekly=1y`, or `forever`.
//!
//! `any` is how long every point is kept; a rung says how long one point of every hour, day, week, or of any other period
//! (`per-10m=6h`) is kept. Durations are a number and `s`, `m`, `h`, `d`, `w` or `y`.

use std::{fmt, str::FromStr};

/// Microseconds, as capture times count.
const SECOND: u64 = 1_000_000;

/// A period or a time to keep, in microseconds.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) struct Span(pub(crate) u64);

/// One point of each period is kept for a while.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) struct Rung {
    pub(crate) every: Span,
    pub(crate) keep: Span,
}

/// What is kept how long.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(crate) struct Ladder {
    /// How long every point is kept; none is for ever.
    pub(crate) any: Option<Span>,
    /// By period.
    pub(crate) rungs: Vec<Rung>,
}

/// A text that is no ladder.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error(
    "{text:?} is no retention: {why}; expected `forever`, or for instance `any=24h hourly=7d daily=30d weekly=1y`"
)]
pub(crate) struct LadderError {
    text: String,
    why: String,
}

const NAMED: [(&str, u64); 4] =
    [("hourly", 3600), ("daily", 86_400), ("weekly", 604_800), ("yearly", 31_536_000)];

const UNITS: [(char, u64); 6] =
    [('y', 31_536_000), ('w', 604_800), ('d', 86_400), ('h', 3600), ('m', 60), ('s', 1)];

impl Span {
    pub(crate) fn parse(text: &str) -> Option<Self> {
        let (unit, seconds) = UNITS.iter().find(|(unit, _)| text.ends_with(*unit))?;
        let number: u64 = text.strip_suffix(*unit)?.parse().ok().filter(|number| *number > 0)?;
        // Some hundred thousand years are enough, and times never overflow.
        number.checked_mul(seconds * SECOND).filter(|us| *us < u64::MAX / 4).map(Self)
    }
}

impl fmt::Display for Span {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let seconds = self.0 / SECOND;
        let largest = UNITS.iter().find(|(_, of)| seconds.is_multiple_of(*of) && seconds > 0);
        let (unit, of) = largest.copied().unwrap_or(('s', 1));
        write!(f, "{}{unit}", seconds / of)
    }
}

impl Ladder {
    /// How far apart the points are below which the log is folded.
    pub(crate) fn step(&self) -> Option<Span> {
        let any = self.any?;
        let finest = self.rungs.iter().map(|rung| rung.every).min();
        Some(finest.unwrap_or(Span((any.0 / 24).max(SECOND))))
    }
}

impl FromStr for Ladder {
    type Err = LadderError;

    fn from_str(text: &str) -> Result<Self, LadderError> {
        let wrong = |why: String| LadderError { text: text.to_owned(), why };
        if text.trim() == "forever" {
            return Ok(Self::default());
        }
        let mut ladder = Self::default();
        for part in text.split_whitespace() {
            let (name, keep) = part.split_once('=').ok_or_else(|| wrong(format!("{part:?} has no `=`")))?;
            let span =
                |text: &str| Span::parse(text).ok_or_else(|| wrong(format!("{text:?} is no duration")));
            let keep = span(keep)?;
            if name == "any" {
                if ladder.any.replace(keep).is_some() {
                    return Err(wrong("`any` is there twice".to_owned()));
                }
                continue;
            }
            let named = NAMED.iter().find(|(known, _)| *known == name).map(|(_, of)| Span(of * SECOND));
            let every = match (named, name.strip_prefix("per-")) {
                (Some(every), _) => every,
                (None, Some(period)) => span(period)?,
                (None, None) => return Err(wrong(format!("nobody knows {name:?}"))),
            };
            if keep < every {
                return Err(wrong(format!("{part:?} keeps less than a period")));
            }
            if ladder.rungs.iter().any(|rung| rung.every == every) {
                return Err(wrong(format!("there are two rungs of {every}")));
            }
            ladder.rungs.push(Rung { every, keep });
        }
        ladder.rungs.sort();
        if ladder.any.is_none() {
            return Err(wrong("it does not say how long any point is kept".to_owned()));
        }
        Ok(ladder)
    }
}

impl fmt::Display for Ladder {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Some(any) = self.any else { return f.write_str("forever") };
        write!(f, "any={any}")?;
        for Rung { every, keep } in &self.rungs {
            match NAMED.iter().find(|(_, of)| of * SECOND == every.0) {
                Some((name, _)) => write!(f, " {name}={keep}")?,
                None => write!(f, " per-{every}={keep}")?,
            }
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_ladder_prints_as_it_is_written() {
        for text in ["forever", "any=24h hourly=7d daily=30d weekly=1y", "any=90s", "any=1h per-10m=6h"] {
            let ladder: Ladder = text.parse().unwrap();
            let again: Ladder = ladder.to_string().parse().unwrap();
            assert_eq!(ladder, again, "{text}");
        }
        let ladder: Ladder = " daily=30d  any=24h hourly=7d ".parse().unwrap();
        assert_eq!(ladder.to_string(), "any=1d hourly=1w daily=30d");
        assert_eq!(ladder.step(), Some(Span(3600 * SECOND)));
        assert_eq!("any=24h".parse::<Ladder>().unwrap().step(), Some(Span(3600 * SECOND)));
    }

    #[test]
    fn what_is_no_ladder_is_refused_with_a_reason() {
        let wrong = [
            ("", "any point"),
            ("hourly=7d", "any point"),
            ("any=0h", "duration"),
            ("any=7", "duration"),
            ("any=24h any=1h", "twice"),
            ("any=24h sometimes=3d", "nobody knows"),
            ("any=24h hourly=30m", "less than a period"),
            ("any=24h hourly=7d per-60m=9d", "two rungs"),
            ("any=99999999999999y", "duration"),
            ("any", "no `=`"),
        ];
        for (text, why) in wrong {
            let error = text.parse::<Ladder>().unwrap_err().to_string();
            assert!(error.contains(why) && error.contains("any=24h hourly=7d"), "{text}: {error}");
        }
    }
}
