//! Where a log begins once its oldest part is folded into images.
//!
//! A log keeps every change from its *floor* on: an image of the disk at the floor stands for all segments before. Older
//! points that are kept are images of their own. The file that says so is there three times, for without it nobody finds the
//! images: `base.1` and `base.2` beside the segments, and one in `images/bases`, for the day when a log's directory has lost
//! both. Of the two the older counts until they are the same, so a power cut leaves the one or the other; the third counts when
//! neither of them is whole, and only for the segments that are there: it may have been put back from a copy, or be of a log
//! that somebody has removed. A base that cannot be written everywhere is taken back. Where that fails too there is a
//! [`Doubt`]: nobody is promised what it does without, until what counts is durable again.
//!
//! Invariants: the file is durable, three times, before a segment goes; every entry before `first_seq` with a version has one at
//! or below the floor, and every image it names is durable. So readers take from the log what lies above the floor and from
//! the image what the log has nothing of.

mod apart;
mod codec;
mod inspect;
mod put;

pub use apart::{Apart, Elsewhere};
pub use codec::MAGIC as BASE_MAGIC;
pub use inspect::inspect_base;
pub use put::{Doubt, settle_closed, sync_names};
pub(crate) use put::{put, replace};

use std::{
    io,
    path::{Path, PathBuf},
};

use backtide_images::{ImageError, Root};
use backtide_segment::{Entry, SegmentId, Seq};
use backtide_storage::{Storage, read_file};
use backtide_units::{ByteCount, ByteOffset, Lsn};

use crate::{
    Interval, LogError, LogIdentity, TimedLsn, Timeline,
    check::{chain, told},
    recover::{failed, list, open_to_recover},
    timeline::damage_reason,
};

/// The names of the file beside the segments.
const FILES: [&str; 2] = ["base.1", "base.2"];

/// Where it is once more, from the store's directory.
const ELSEWHERE: &str = "images/bases";

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
    /// What the entries before `first_seq` give, as if nothing were thinned; of a log that has ended what it offers.
    pub(crate) timeline: Timeline,
    /// None of a log that has ended (`ended.rs`).
    pub(crate) floor: Option<KeptPoint>,
    /// Points below the floor that are kept, ascending.
    pub(crate) kept: Vec<KeptPoint>,
}

impl Base {
    /// The point from which on every change is kept; none of a log that has ended, of which single points are left at most.
    pub fn floor(&self) -> Option<KeptPoint> {
        self.floor
    }

    /// Whether it is of a log that has ended, of which nothing is read but images.
    pub fn is_ended(&self) -> bool {
        self.floor.is_none()
    }

    /// Whether it is the next one of a log that begins with `before`.
    pub fn follows(&self, before: Option<&Self>) -> bool {
        self.generation == before.map_or(0, |before| before.generation) + 1
    }

    /// The single points below the floor, ascending.
    pub fn kept(&self) -> &[KeptPoint] {
        &self.kept
    }

    /// All points that are images, ascending.
    pub fn images(&self) -> impl Iterator<Item = KeptPoint> {
        self.kept.iter().chain(&self.floor).copied()
    }

    /// All images that it names.
    pub fn roots(&self) -> impl Iterator<Item = Root> {
        self.images().map(|kept| kept.root)
    }

    /// Thins a timeline to what this offers.
    pub(crate) fn thin(&self, timeline: &mut Timeline) {
        let Some(floor) = self.floor else { return };
        let kept: Vec<TimedLsn> = self.kept.iter().map(|kept| kept.at).collect();
        timeline.thin(floor.at, &kept);
    }

    /// Whether a log with this timeline ends before the floor: something has removed its end.
    pub(crate) fn is_above(&self, timeline: &Timeline) -> bool {
        self.floor.is_some_and(|floor| timeline.covered() < floor.at.lsn)
    }

    /// The entries that take a log that ends before its `floor` to it: the floor's image is a pass that is complete.
    pub(crate) fn bridge(floor: KeptPoint, timeline: &Timeline, what: &str) -> [Entry; 2] {
        let TimedLsn { lsn: at, time } = floor.at;
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
        timeline.intervals.extend(self.floor.map(|floor| Interval { from: floor.at, to: floor.at }));
        self.thin(timeline);
    }
}

/// Where the base of the log in `dir` is, in the order in which it is written.
fn copies(dir: &Path) -> [PathBuf; 3] {
    let [first, second] = FILES.map(|name| dir.join(name));
    [first, second, Path::new(ELSEWHERE).join(format!("{}.base", flat(dir)))]
}

/// A directory as one name.
fn flat(dir: &Path) -> String {
    let parts: Vec<_> = dir.iter().map(|part| part.to_string_lossy()).collect();
    parts.join("-")
}

/// What to say of a log without a base that does not begin with the first segment: what was before is lost, or what tells of it.
fn lost_with_the_first_segment(storage: &dyn Storage, dir: &Path) -> Result<Option<String>, LogError> {
    let segments_dir = dir.join("segments");
    let path = |id: SegmentId| segments_dir.join(id.file_name());
    // A log can have many thousand: they are listed only when this one is not there.
    if storage.open(&path(SegmentId::FIRST)).is_ok() {
        return Ok(None);
    }
    let ids = list(storage, &segments_dir)?;
    let begins = ids.first().filter(|first| **first > SegmentId::FIRST);
    Ok(begins.map(|first| {
        let (lost, first) = (storage.display(&path(SegmentId::FIRST)), storage.display(&path(*first)));
        format!(
            "{} is missing, and so is a base that says that the log begins with {}",
            lost.display(),
            first.display()
        )
    }))
}

/// What one copy says.
enum Copy {
    Whole(Box<Base>),
    /// A sentence.
    Damaged(String),
    /// The device cannot read it now.
    Unreadable(LogError),
    Missing,
}

fn read_copy(storage: &dyn Storage, path: &Path) -> Result<Copy, LogError> {
    let shown = storage.display(path);
    match read_file(storage, path, FILE_BYTES_MAX) {
        Ok(bytes) => match codec::decode(&bytes, &shown) {
            Ok(base) => Ok(Copy::Whole(Box::new(base))),
            Err(error @ LogError::Damaged { .. }) => Ok(Copy::Damaged(error.to_string())),
            Err(error) => Err(error),
        },
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(Copy::Missing),
        Err(source) => Ok(Copy::Unreadable(failed(format!("read {}", shown.display()), source))),
    }
}

/// Whether a base can be that of the segments in a log's directory: the one that it begins with is there, and of the same
/// log; or none is left.
fn is_of_the_segments(base: &Base, storage: &dyn Storage, dir: &Path) -> Result<bool, LogError> {
    let segments_dir = dir.join("segments");
    let ids = list(storage, &segments_dir)?;
    // Of a log that has ended any that is left.
    let first = ids.iter().find(|id| base.is_ended() || **id == base.first_segment);
    let Some(first) = first else { return Ok(ids.is_empty()) };
    // A header that is lost says nothing against it.
    let Ok(header) = told(open_to_recover(storage, &segments_dir, *first)?.header())? else {
        return Ok(true);
    };
    let identity = LogIdentity { disk: header.disk, history: header.history };
    Ok(identity == base.identity && (base.is_ended() || header.first_seq == base.first_seq))
}

/// Removes what is kept elsewhere of the logs in `dir` and in the directories below it, durably.
///
/// # Errors
/// The file system's: then the next try removes the rest.
pub fn forget_bases(storage: &dyn Storage, dir: &Path) -> io::Result<()> {
    let (elsewhere, own) = (Path::new(ELSEWHERE), flat(dir));
    let names = match storage.list(elsewhere) {
        Ok(names) => names,
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(()),
        Err(error) => return Err(error),
    };
    let mut ours = names.iter().filter(|name| apart::is_below(name, &own)).peekable();
    if ours.peek().is_none() {
        return Ok(());
    }
    ours.try_for_each(|name| storage.remove(&elsewhere.join(name)))?;
    storage.sync_dir(elsewhere)
}

/// What the directory of a log says about where it begins.
#[derive(Debug, Default)]
pub struct FoundBase {
    /// The older of the two beside the segments, or else the third: what a newer one does without is there as long as that
    /// is not everywhere.
    pub base: Option<Base>,
    /// Images that any of them names that is whole.
    pub roots: Vec<Root>,
    /// How many are whole and alike.
    alike: usize,
    /// Whether there is any in the directory of the log.
    beside: bool,
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
        let (mut missing, mut unreadable) = (Vec::new(), Vec::new());
        let [first, second, third] = copies(dir);
        for path in [&first, &second] {
            match read_copy(storage, path)? {
                Copy::Whole(base) => found.take(*base),
                Copy::Damaged(why) => found.damage.push(why),
                Copy::Unreadable(error) => unreadable.push(error),
                Copy::Missing => {
                    missing.push(storage.display(path));
                    continue;
                }
            }
            found.beside = true;
        }
        match read_copy(storage, &third)? {
            Copy::Whole(base) => {
                found.roots.extend(base.roots());
                match &found.base {
                    Some(known) if known == &*base => found.alike += 1,
                    Some(_) => {}
                    None if is_of_the_segments(&base, storage, dir)? => {
                        found.base = Some(*base);
                        found.alike = 1;
                    }
                    None => {}
                }
            }
            Copy::Damaged(why) => found.damage.push(why),
            Copy::Unreadable(error) => unreadable.push(error),
            Copy::Missing => missing.push(storage.display(&third)),
        }
        for error in unreadable {
            // One that is whole tells all, and is written over what cannot be read.
            if found.base.is_none() {
                return Err(error);
            }
            found.damage.push(chain(&error));
        }
        if found.is_none() {
            found.damage.extend(lost_with_the_first_segment(storage, dir)?);
        }
        if !found.is_none() {
            let missing = missing.iter().map(|name| format!("{} is missing", name.display()));
            found.damage.extend(missing);
        }
        Ok(found)
    }

    fn take(&mut self, base: Base) {
        self.roots.extend(base.roots());
        match &self.base {
            Some(known) if *known == base => self.alike += 1,
            Some(known) if known.generation < base.generation => {}
            // Those of one generation that differ are of two attempts, and what is written later has the earlier one.
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

    /// Whether there is nothing, or one and the same everywhere.
    pub fn is_settled(&self) -> bool {
        self.is_none() || self.alike == copies(Path::new("")).len()
    }

    /// Whether there is anything of it beside the segments.
    pub(crate) fn is_beside(&self) -> bool {
        self.beside
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

/// The highest LSN of a version that the entries before the base can have: of one that has ended, any.
pub(crate) fn floor_of(base: Option<&Base>) -> Lsn {
    base.map_or(Lsn::ZERO, |base| base.floor.map_or(Lsn::MAX, |floor| floor.at.lsn))
}
