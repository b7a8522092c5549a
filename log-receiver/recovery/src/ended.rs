//! A log that has ended, and what is left of it once all of its history is old: single points, each an image, or none.
//!
//! A disk's log ends when it is damaged or was cut, and the next one begins behind it: nothing is appended to it any more.
//! So its newest part grows old as well, and then nothing of it is read but images. Its base says so: it has no floor, for there
//! is no point from which on every change is kept, and its timeline is what it offers, with the marks, attaches and
//! takeovers of all of it.
//!
//! Invariants: as for every base, the images are durable before it is and all of it before a segment goes. Nobody has such
//! a log open, so whoever writes its base sees to it that nobody else does, nor opens it.

use std::{path::Path, sync::Arc};

use backtide_images::Images;
use backtide_segment::{SegmentId, Seq};
use backtide_storage::Storage;
use backtide_units::ByteCount;

use crate::{
    Base, Doubt, Hole, Interval, KeptPoint, LogCache, LogIdentity, RebaseError, Salvage, Snapshot, TimedLsn,
    Timeline, base::replace, origin::Origin, timeline::thinned,
};

/// All segments lie before it.
const BEHIND_ALL: SegmentId = SegmentId(u32::MAX);

impl Snapshot {
    /// The logs whose points are in the timeline, each alone, the oldest first.
    pub fn logs(&self) -> Vec<Self> {
        let mut logs = vec![self.alone()];
        let mut older = self.before();
        while let Some(log) = older {
            logs.push(log.alone());
            older = log.before();
        }
        logs.reverse();
        logs
    }

    /// How many segments this log has.
    pub fn segment_count(&self) -> u64 {
        self.segments.len() as u64
    }

    /// Bytes of this log's own segments.
    pub fn segment_bytes(&self) -> ByteCount {
        ByteCount(self.segments.iter().map(|segment| segment.file_bytes().0).sum())
    }

    /// The base of a log that has ended, of which only these points are left, ascending. `identity` says whose log it is.
    ///
    /// # Panics
    /// When one of them is none of its points, or they do not ascend.
    pub fn ended(&self, identity: LogIdentity, kept: Vec<KeptPoint>) -> Base {
        let own = self.own_timeline();
        assert!(kept.iter().all(|kept| own.offers(kept.at.lsn)), "points of this log");
        assert!(kept.is_sorted_by(|a, b| a.at.lsn < b.at.lsn), "points in order");
        let mut timeline = own.clone();
        timeline.leave(&kept.iter().map(|kept| kept.at).collect::<Vec<_>>());
        Base {
            identity,
            generation: self.base().map_or(1, |base| base.generation + 1),
            first_segment: BEHIND_ALL,
            first_seq: self.through().next(),
            timeline,
            floor: None,
            kept,
        }
    }
}

impl Salvage {
    /// Of a log that has ended, with the images of its base.
    pub(crate) fn of_ended(
        dir: &Path,
        base: Base,
        damage: Vec<String>,
        images: &Images,
        cache: &LogCache,
    ) -> Self {
        let (identity, last) = (base.identity, Seq(base.first_seq.0 - 1));
        let nothing = Self::unreadable(base.timeline.clone(), damage);
        let timeline = Arc::new(base.timeline.clone());
        let origin = Origin::new(dir, Some(base), images, cache.origins());
        let snapshot = Snapshot::new(timeline, Arc::clone(&nothing.snapshot.segments), last, origin);
        // A copy of the base costs no point while another is whole.
        Self { identity: Some(identity), snapshot, lost: nothing.damage.len(), ..nothing }
    }

    /// Whether the log has ended, and what is left of it are images, or nothing: none of its segments counts.
    pub fn is_ended(&self) -> bool {
        self.snapshot.base().is_some_and(Base::is_ended)
    }
}

impl Timeline {
    /// Leaves these points alone, ascending, of a timeline that has ended. The hole behind the last keeps its reason: that is
    /// why the log ended.
    pub(crate) fn leave(&mut self, kept: &[TimedLsn]) {
        let ending = self.holes.pop().filter(|hole| hole.to.is_none());
        self.in_interval = false;
        self.open_pass = None;
        self.seams.clear();
        self.intervals = kept.iter().map(|point| Interval { from: *point, to: *point }).collect();
        let between = |two: &[TimedLsn]| Hole { from: Some(two[0]), to: Some(two[1]), ..thinned() };
        self.holes = kept.windows(2).map(between).collect();
        if let (Some(last), Some(ending)) = (kept.last(), ending) {
            self.holes.push(Hole { from: Some(*last), ..ending });
        }
    }
}

/// Lets a log begin later, or end, that has ended and that nobody has open: puts `base` everywhere in place of `before`.
///
/// # Errors
/// The file system's: then it begins as before, or with a [`Doubt`] nobody knows, until
/// [`settle_closed`](crate::settle_closed) says.
pub fn rebase_closed(
    base: &Base,
    before: Option<&Base>,
    storage: &dyn Storage,
    dir: &Path,
    images: &Images,
) -> Result<(), RebaseError> {
    replace(base, before, storage, dir).map_err(|(source, taken_back)| {
        let doubt = (!taken_back).then(|| Doubt::about(base, before, images));
        RebaseError { source, doubt }
    })
}
