//! What can go wrong, by what the caller can do about it.

use std::{fmt, io, path::PathBuf};

use backtide_segment::SegmentError;
use backtide_units::{ByteOffset, ByteRange, CaptureTime, Lsn};

use crate::Hole;

/// The log cannot be opened, read or written.
#[derive(Debug, thiserror::Error)]
pub enum LogError {
    /// Bytes that were acknowledged are not there any more: restore or repair; nothing was changed.
    #[error("{} is damaged at byte {offset}: {what}", file.display())]
    Damaged {
        /// The file.
        file: PathBuf,
        /// Where in it.
        offset: ByteOffset,
        /// What was expected and found.
        what: String,
    },
    /// There is no log in this directory: create one.
    #[error("{} holds no log", dir.display())]
    NoLog {
        /// The directory.
        dir: PathBuf,
    },
    /// There is a log already.
    #[error("{} holds a log already", dir.display())]
    LogExists {
        /// The directory.
        dir: PathBuf,
    },
    /// A file of a version that this program does not know: use a newer program.
    #[error("{} has format version {found}, this program reads up to {known}", file.display())]
    UnknownVersion {
        /// The file.
        file: PathBuf,
        /// Its version.
        found: u32,
        /// The newest we know.
        known: u32,
    },
    /// A write or sync failed before: drop the log and open it again.
    #[error("the log stopped after a failed write; it must be opened again")]
    Poisoned,
    /// The store is full. Nothing of the entry was written; the log goes on when there is space.
    #[error("no space left to {step}")]
    Full {
        /// What was attempted.
        step: String,
        /// The system's error.
        source: io::Error,
    },
    /// A file operation failed.
    #[error("cannot {step}")]
    Io {
        /// What was attempted, with the file's name.
        step: String,
        /// The system's error.
        source: io::Error,
    },
}

/// An entry that cannot come now: the sender broke the order. Nothing was written.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum InvalidEntry {
    /// A record at or below what the log covers.
    #[error("a record with LSN {found} after the log has reached {covered}")]
    NotAbove {
        /// The record's.
        found: Lsn,
        /// The log's.
        covered: Lsn,
    },
    /// A pass whose T is not above what the log covers, or not above its own gap.
    #[error("a resync pass at {at} with its gap from {gap_from}, after the log has reached {covered}")]
    PassNotAbove {
        /// T.
        at: Lsn,
        /// The gap's start.
        gap_from: Lsn,
        /// The log's.
        covered: Lsn,
    },
    /// A pass that claims more records than the log has.
    #[error("a resync pass whose gap begins at {gap_from}, the log has reached only {covered}")]
    GapAhead {
        /// The gap's start.
        gap_from: Lsn,
        /// The log's.
        covered: Lsn,
    },
    /// Pass data or a pass end for a pass that is not open.
    #[error("an entry of the resync pass at {found}, the open pass is {open:?}")]
    NotThisPass {
        /// The entry's T.
        found: Lsn,
        /// The open pass's T.
        open: Option<Lsn>,
    },
    /// A pass end whose first point lies before T or beyond what the log covers.
    #[error("a resync pass at {at} that ends valid from {valid_from}, the log has reached {covered}")]
    ValidFromOutside {
        /// T.
        at: Lsn,
        /// The claimed first point.
        valid_from: Lsn,
        /// The log's.
        covered: Lsn,
    },
    /// An attach with an epoch that is not above the newest seen.
    #[error("an attach with epoch {found} after epoch {seen}")]
    StaleEpoch {
        /// The entry's.
        found: u64,
        /// The log's.
        seen: u64,
    },
    /// A range that is empty, or that the format cannot hold.
    #[error("a record of {range}: {why}")]
    Range {
        /// The range.
        range: ByteRange,
        /// What is wrong with it.
        why: &'static str,
    },
    /// A payload that is not what was captured.
    #[error("a payload with checksum {found:08x}, it was captured with another")]
    Checksum {
        /// The checksum that it has.
        found: u32,
    },
    /// A payload or text whose length is wrong.
    #[error("a payload of {found} bytes, expected {expected}")]
    Length {
        /// Its length.
        found: u64,
        /// What was expected.
        expected: String,
    },
}

/// An entry was not appended.
#[derive(Debug, thiserror::Error)]
pub enum AppendError {
    /// The sender broke the order; nothing was written and the log goes on.
    #[error("refused {0}")]
    Invalid(#[from] InvalidEntry),
    /// The log failed.
    #[error(transparent)]
    Log(#[from] LogError),
}

/// A point cannot be given.
#[derive(Debug, thiserror::Error)]
pub enum PointError {
    /// It lies in a hole.
    #[error("{asked} lies in a hole: {hole}; {nearest}")]
    InHole {
        /// What was asked for.
        asked: String,
        /// The hole, with its reason.
        hole: Box<Hole>,
        /// What can be had instead.
        nearest: Nearest,
    },
    /// It lies before the first point or after the last.
    #[error("{asked} lies outside the timeline; {nearest}")]
    Outside {
        /// What was asked for.
        asked: String,
        /// What can be had instead.
        nearest: Nearest,
    },
    /// It is a time that has not come yet: what it will be is not known.
    #[error("{asked} is in the future: it is {} now, and {}", crate::point::time_text(*now), newest(*latest))]
    Future {
        /// What was asked for.
        asked: String,
        /// The time of whoever was asked.
        now: CaptureTime,
        /// The newest point, if there is one.
        latest: Option<TimedLsn>,
    },
    /// There is no point at all yet.
    #[error("there is no recovery point yet: {why}")]
    NoPoints {
        /// Why not.
        why: String,
    },
    /// No mark has this label.
    #[error("there is no mark {label:?}")]
    UnknownMark {
        /// The label.
        label: String,
    },
    /// The log failed.
    #[error(transparent)]
    Log(#[from] LogError),
}

/// The nearest points around one that cannot be given.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Nearest {
    /// The last point before.
    pub before: Option<TimedLsn>,
    /// The first point after.
    pub after: Option<TimedLsn>,
}

/// An LSN and when it was captured.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord)]
pub struct TimedLsn {
    /// The LSN.
    pub lsn: Lsn,
    /// Its time.
    pub time: CaptureTime,
}

fn newest(latest: Option<TimedLsn>) -> String {
    latest
        .map_or_else(|| "there is no point yet".to_owned(), |latest| format!("the latest point is {latest}"))
}

impl fmt::Display for Nearest {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match (self.before, self.after) {
            (None, None) => write!(f, "there are no points around it"),
            (Some(before), None) => write!(f, "the nearest point before is {before}"),
            (None, Some(after)) => write!(f, "the nearest point after is {after}"),
            (Some(before), Some(after)) => {
                write!(f, "the nearest points are {before} before and {after} after")
            }
        }
    }
}

impl fmt::Display for TimedLsn {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "lsn:{} ({})", self.lsn, crate::point::time_text(self.time))
    }
}

impl From<SegmentError> for LogError {
    fn from(error: SegmentError) -> Self {
        match error {
            SegmentError::Damaged { file, offset, what } => Self::Damaged { file, offset, what },
            SegmentError::UnknownVersion { file, found, known } => {
                Self::UnknownVersion { file, found, known }
            }
            SegmentError::Full { step, source } => Self::Full { step, source },
            SegmentError::Io { step, source } => Self::Io { step, source },
            SegmentError::Poisoned => Self::Poisoned,
        }
    }
}
