//! Where a log begins once its oldest part is folded into images.
//!
//! A log keeps every change from its *floor* on: an image of the disk at the floor stands for all segments before. Older
//! points that are kept are images of their own. The file that says so is there twice, `base.1` and `base.2`, for without it
//! nobody finds the images; of two that are whole the older one counts until both are the same, so a base that could not be
//! written twice has changed nothing.
//!
//! Invariants: the file is durable, twice, before a segment goes; every entry before `first_seq` with a version has one at
//! or below the floor, and every image it names is durable. So readers take from the log what lies above the floor and from
//! the image what the log has nothing of.

mod codec;
mod inspect;

pub use codec::MAGIC as BASE_MAGIC;
pub use inspect::inspect_base;

use std::{io, path::Path};

use backtide_images::{ImageError, Root};
use backtide_segment::{Entry, SegmentId, Seq};
use backtide_storage::{Storage, read_file, replace_with};
use backtide_units::{ByteCount, ByteOffset, Lsn};

use crate::{Interval, LogError, LogIdentity, TimedLsn, Timeline, recover::failed, timeline::damage_reason};

/// The names of the file, which is there twice.
pub(crate) const FILES: [&str; 2] = ["base.1", "base.2"];

/// A timeline with everything it may have, and thousands of kept points, is far below.
const FILE_BYTES_MAX: ByteCount = ByteCount(256 << 20);

/// An image of the disk at a point.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct KeptPoint {
    /// The point.
    pub at: TimedLsn,
    /// Its image.
    pub root: Root,
}

/// Where a log begins.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Base {
    pub(crate) identity: LogIdentity,
    /// Counts the bases of a log, from 1 on.
    pub(crate) generation: u64,
    pub(crate) first_segment: SegmentId,
    pub(crate) first_seq: Seq,
    /// What the entries before `first_seq` give, as if nothing were thinned.
    pub(crate) timeline: Timeline,
    pub(crate) floor: KeptPoint,
    /// Points below the floor that are kept, ascending.
    pub(crate) kept: Vec<KeptPoint>,
}

impl Base {
    /// The point from which on every change is kept.
    pub fn floor(&self) -> KeptPoint {
        self.floor
    }

    /// The single points below it, ascending.
    pub fn kept(&self) -> &[KeptPoint] {
        &self.kept
    }

    /// All images that it names.
    pub fn roots(&self) -> impl Iterator<Item = Root> {
        self.kept.iter().chain([&self.floor]).map(|kept| kept.root)
    }

    /// Thins a timeline to what this offers.
    pub(crate) fn thin(&self, timeline: &mut Timeline) {
        let kept: Vec<TimedLsn> = self.kept.iter().map(|kept| kept.at).collect();
        timeline.thin(self.floor.at, &kept);
    }

    /// Whether a log with this timeline ends before the floor: something has removed its end.
    pub(crate) fn is_above(&self, timeline: &Timeline) -> bool {
        timeline.covered() < self.floor.at.lsn
    }

    /// The entries that take a log that ends before the floor to it: the floor's image is a pass that is complete.
    pub(crate) fn bridge(&self, timeline: &Timeline, what: &str) -> [Entry; 2] {
        let TimedLsn { lsn: at, time } = self.floor.at;
        let reason = damage_reason(what);
        [
            Entry::PassBegin { at, gap_from: timeline.covered(), time, reason },
            Entry::PassEnd { at, valid_from: Some(at), time },
        ]
    }

    /// Leaves of a timeline that does not reach the floor what is an image.
    pub(crate) fn thin_to_images(&self, timeline: &mut Timeline) {
        timeline.intervals.clear();
        timeline.in_interval = false;
        timeline.intervals.push(Interval { from: self.floor.at, to: self.floor.at });
        self.thin(timeline);
    }

    /// Puts it into the directory of its log, durably and twice.
    pub(crate) fn write(&self, storage: &dyn Storage, dir: &Path) -> Result<(), LogError> {
        let bytes = codec::encode(self);
        for name in FILES {
            let path = dir.join(name);
            let written = replace_with(storage, &path, |file| file.write_at(ByteOffset::ZERO, &bytes));
            written
                .map_err(|source| failed(format!("write {}", storage.display(&path).display()), source))?;
        }
        Ok(())
    }
}

/// What the directory of a log says about where it begins.
#[derive(Debug, Default)]
pub struct FoundBase {
    /// The oldest that is whole: what a newer one does without is there as long as it is not there twice.
    pub base: Option<Base>,
    /// Images that any of them names that is whole.
    pub roots: Vec<Root>,
    /// How many are whole and alike.
    alike: usize,
    /// What is wrong with the files, a sentence each.
    pub damage: Vec<String>,
}

impl FoundBase {
    /// Reads the files in the directory of a log.
    ///
    /// # Errors
    /// [`LogError::UnknownVersion`], or the file system's.
    pub fn read(storage: &dyn Storage, dir: &Path) -> Result<Self, LogError> {
        let mut found = Self::default();
        let mut missing = 0;
        for name in FILES {
            let path = dir.join(name);
            let shown = storage.display(&path);
            match read_file(storage, &path, FILE_BYTES_MAX) {
                Ok(bytes) => match codec::decode(&bytes, &shown) {
                    Ok(base) => found.take(base),
                    Err(error @ LogError::Damaged { .. }) => found.damage.push(error.to_string()),
                    Err(error) => return Err(error),
                },
                Err(error) if error.kind() == io::ErrorKind::NotFound => missing += 1,
                Err(source) => return Err(failed(format!("read {}", shown.display()), source)),
            }
        }
        if missing == 1 && found.damage.is_empty() && found.base.is_some() {
            let shown = storage.display(dir);
            found.damage.push(format!("one of {}/base.1 and base.2 is missing", shown.display()));
        }
        Ok(found)
    }

    fn take(&mut self, base: Base) {
        self.roots.extend(base.roots());
        match &self.base {
            Some(known) if *known == base => self.alike += 1,
            Some(known) if known.generation < base.generation => {}
            // Two of one generation that differ are of two attempts, and the second file has the earlier one.
            Some(_) | None => {
                self.base = Some(base);
                self.alike = 1;
            }
        }
    }

    /// Whether there is nothing at all.
    pub fn is_none(&self) -> bool {
        self.base.is_none() && self.damage.is_empty()
    }

    /// Whether there is nothing, or all of it twice.
    pub fn is_settled(&self) -> bool {
        self.is_none() || self.alike == FILES.len()
    }

    /// The base, for a log that is to be opened.
    ///
    /// # Errors
    /// [`LogError::Damaged`] when files are there and none is whole.
    pub(crate) fn usable(self, storage: &dyn Storage, dir: &Path) -> Result<Option<Base>, LogError> {
        match (self.base, self.damage.into_iter().next()) {
            (None, Some(what)) => Err(LogError::Damaged {
                file: storage.display(&dir.join(FILES[0])),
                offset: ByteOffset::ZERO,
                what: format!("nothing tells where the log begins: {what}"),
            }),
            (base, _) => Ok(base),
        }
    }
}

impl From<ImageError> for LogError {
    fn from(error: ImageError) -> Self {
        match error {
            ImageError::Damaged { file, offset, what } => Self::Damaged { file, offset, what },
            ImageError::UnknownVersion { file, found, known } => Self::UnknownVersion { file, found, known },
            ImageError::Full { step, source } => Self::Full { step, source },
            ImageError::Io { step, source } => Self::Io { step, source },
        }
    }
}

/// The highest LSN of a version that the entries before the base can have.
pub(crate) fn floor_of(base: Option<&Base>) -> Lsn {
    base.map_or(Lsn::ZERO, |base| base.floor.at.lsn)
}
