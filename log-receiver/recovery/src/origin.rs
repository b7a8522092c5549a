//! What a log begins with, as readers have it: the images of its base.
//!
//! Whoever reads a log has its origin of that moment. As long as anybody has it, neither its images nor the segments that a
//! later base does without are removed: a mounted point is never pulled away.

use std::{
    collections::BTreeSet,
    io,
    path::{Path, PathBuf},
    sync::{Arc, Mutex, MutexGuard, PoisonError, Weak},
};

use backtide_images::{Image, Images};
use backtide_segment::SegmentId;
use backtide_storage::{BufferPool, Storage};
use backtide_units::{ByteCount, ByteOffset, ByteRange, Lsn};
use roaring::RoaringTreemap;

use crate::{
    Base, LogCache, LogError, TimedLsn,
    chores::SPARE,
    recover::{failed, list},
};

/// See the module's description.
pub(crate) struct Origin {
    dir: PathBuf,
    base: Option<Base>,
    store: Option<Images>,
    /// Of the kept points, and last of the floor.
    images: Vec<(TimedLsn, Image)>,
}

/// The origins that somebody has.
#[derive(Clone, Default)]
pub(crate) struct Origins(Arc<Mutex<Vec<Weak<Origin>>>>);

/// What was removed.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Removed {
    /// Segments.
    pub segments: u64,
    /// Their bytes.
    pub bytes: ByteCount,
    /// Bytes of segments that the log does without but a reader has, or that stay until its base is written everywhere.
    pub left: ByteCount,
}

impl Origin {
    /// Of a log in `dir`.
    pub(crate) fn new(dir: &Path, base: Option<Base>, images: &Images, origins: &Origins) -> Arc<Self> {
        let points = base.iter().flat_map(Base::images);
        let opened = points.map(|kept| (kept.at, images.image(kept.root))).collect();
        let origin =
            Arc::new(Self { dir: dir.to_owned(), base, store: Some(images.clone()), images: opened });
        let mut all = origins.lock();
        all.retain(|origin| origin.strong_count() > 0);
        all.push(Arc::downgrade(&origin));
        drop(all);
        origin
    }

    /// Of a log that begins with itself, or of which nothing is left.
    pub(crate) fn none() -> Arc<Self> {
        Arc::new(Self { dir: PathBuf::new(), base: None, store: None, images: Vec::new() })
    }

    pub(crate) fn base(&self) -> Option<&Base> {
        self.base.as_ref()
    }

    /// What of the log counts lies above this.
    pub(crate) fn floor(&self) -> Lsn {
        crate::base::floor_of(self.base())
    }

    /// The images of the store.
    ///
    /// # Panics
    /// When there is no log.
    pub(crate) fn images_store(&self) -> &Images {
        self.store.as_ref().expect("a log is in a store")
    }

    /// Memory for reads; none when there is no log.
    pub(crate) fn buffers(&self) -> Option<&BufferPool> {
        self.store.as_ref().map(Images::buffers)
    }

    /// All images, by their points.
    pub(crate) fn images(&self) -> &[(TimedLsn, Image)] {
        &self.images
    }

    /// What stands for everything at or below `at` that the log has nothing of: below the floor all there is.
    pub(crate) fn image_at(&self, at: Lsn) -> Option<&Image> {
        let behind = self.images.partition_point(|(point, _)| point.lsn <= at);
        behind.checked_sub(1).map(|place| &self.images[place].1)
    }

    /// The blocks that may differ between two points that are not above the floor; the lower one may be before everything.
    pub(crate) fn differing(&self, after: Lsn, through: Lsn) -> Result<RoaringTreemap, LogError> {
        let mut blocks = RoaringTreemap::new();
        let mut insert = |range: ByteRange| {
            blocks.insert_range(backtide_units::BlockRange::touched_by(range).indices());
        };
        match (self.image_at(after), self.image_at(through)) {
            (Some(before), Some(behind)) => before.differing(behind, &mut insert)?,
            (None, Some(all)) | (Some(all), None) => {
                all.data_in(ByteRange::between(ByteOffset::ZERO, ByteOffset(all.size().0)), &mut insert)?;
            }
            (None, None) => {}
        }
        Ok(blocks)
    }

    fn first_segment(&self) -> SegmentId {
        self.base().map_or(SegmentId::FIRST, |base| base.first_segment)
    }
}

impl Origins {
    fn lock(&self) -> MutexGuard<'_, Vec<Weak<Origin>>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The first segment that anybody has of the log in `dir`.
    fn first_had(&self, dir: &Path) -> Option<SegmentId> {
        let all: Vec<Arc<Origin>> = self.lock().iter().filter_map(Weak::upgrade).collect();
        all.iter().filter(|origin| origin.dir == dir).map(|origin| origin.first_segment()).min()
    }
}

/// Removes the segments that the base of the log in `dir` does without, and no reader has.
///
/// # Errors
/// The file system's, or of reading the base; then the next try removes the rest.
pub fn remove_unused(storage: &dyn Storage, dir: &Path, cache: &LogCache) -> Result<Removed, LogError> {
    let mut removed = Removed::default();
    let found = crate::FoundBase::read(storage, dir)?;
    let settled = found.is_settled();
    let Some(base) = found.base else { return Ok(removed) };
    let had = cache.origins().first_had(dir);
    let first = had.map_or(base.first_segment, |had| had.min(base.first_segment));
    let segments_dir = dir.join("segments");
    if base.is_ended() && settled {
        removed.bytes.0 += remove_spare(storage, &segments_dir)?;
    }
    let mut names = BTreeSet::new();
    for id in list(storage, &segments_dir)?.into_iter().filter(|id| *id < base.first_segment) {
        let path = segments_dir.join(id.file_name());
        let fail = |source| failed(format!("remove {}", storage.display(&path).display()), source);
        let length = storage.open(&path).and_then(|file| file.len()).map_err(fail)?.0;
        if !settled || id >= first {
            removed.left.0 += length;
            continue;
        }
        removed.bytes.0 += length;
        storage.remove(&path).map_err(fail)?;
        removed.segments += 1;
        names.insert(storage.display(&path));
    }
    // An open file takes its room as long as it is open.
    cache.forget_files(&names);
    Ok(removed)
}

/// Removes the file that was to become the next segment of a log that has ended; gives its bytes.
fn remove_spare(storage: &dyn Storage, segments_dir: &Path) -> Result<u64, LogError> {
    let path = segments_dir.join(SPARE);
    let length = match storage.open(&path) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(0),
        opened => opened.and_then(|file| file.len()),
    };
    let removed = length.and_then(|length| storage.remove(&path).map(|()| length.0));
    removed.map_err(|source| failed(format!("remove {}", storage.display(&path).display()), source))
}
