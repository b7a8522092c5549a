//! Letting a log begin later: its oldest segments are folded into images and go.
//!
//! ```text
//!   what could go (Snapshot::foldable) ─▶ images made, durable ─▶ Snapshot::rebase: the new base
//!     ─▶ DiskLog::rebase: a ticket ─▶ RebaseTicket::write, where blocking is fine: durable everywhere
//!     ─▶ DiskLog::rebased: readers of from now on ─▶ remove_unused: segments go when no reader has them
//! ```
//! A crash on the way leaves the log as it was, or as it will be: the base's file decides, and segments before
//! it are nobody's.

use std::{path::PathBuf, sync::Arc};

use backtide_images::{ImageError, ImageSource, ImageWriter, Images, Root};
use backtide_segment::{SegmentId, Seq};
use backtide_storage::Storage;
use backtide_units::{BlockRange, ByteCount, ByteOffset, ByteRange, Lsn};
use bytes::Bytes;
use roaring::RoaringTreemap;

use crate::{
    Allocation, AppendError, Base, Doubt, KeptPoint, LogError, LogIdentity, Snapshot, View,
    base::{put, replace},
    chores::Owned,
    origin::Origin,
};

use super::DiskLog;

/// The oldest segments of a log, as far as all they hold lies at or below a point.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Foldable {
    /// How many.
    pub segments: u64,
    /// Their bytes.
    pub bytes: ByteCount,
    /// The highest version in them: a floor must not lie below it.
    pub reaches: Lsn,
    first_segment: SegmentId,
    first_seq: Seq,
}

/// A base that is to become the log's.
pub struct RebaseTicket {
    storage: Arc<dyn Storage>,
    dir: PathBuf,
    base: Base,
    before: Option<Base>,
    images: Images,
    owned: Arc<Owned>,
}

/// The base of a log, to be made durable everywhere.
pub struct SettleTicket {
    storage: Arc<dyn Storage>,
    dir: PathBuf,
    base: Option<Base>,
    owned: Arc<Owned>,
}

/// Why a log does not begin later.
#[derive(Debug, thiserror::Error)]
#[error("the log does not begin later")]
pub struct RebaseError {
    /// The file system's error.
    pub source: LogError,
    /// None when the log begins as before, durably.
    pub doubt: Option<Doubt>,
}

/// A base that is durable.
pub struct Rebased(Base);

/// Why an image was not made.
#[derive(Debug, thiserror::Error)]
pub enum FoldError {
    /// It is not wanted any more.
    #[error("it is not wanted any more")]
    CalledOff,
    /// What the disk held there at the point cannot be read.
    #[error("the disk's {range} cannot be read")]
    Unreadable {
        /// Of the disk.
        range: ByteRange,
        /// Why.
        source: LogError,
    },
    /// A node of the image before that leads there cannot be read.
    #[error("what the image before has of the disk's {range} cannot be found")]
    Lost {
        /// Of the disk.
        range: ByteRange,
        /// Why.
        source: LogError,
    },
    /// The log or the images cannot be read or written.
    #[error(transparent)]
    Log(#[from] LogError),
}

impl From<RebaseError> for LogError {
    fn from(error: RebaseError) -> Self {
        error.source
    }
}

impl From<RebaseError> for FoldError {
    fn from(error: RebaseError) -> Self {
        Self::Log(error.source)
    }
}

impl From<ImageError> for FoldError {
    fn from(error: ImageError) -> Self {
        Self::Log(error.into())
    }
}

/// A point of the log, and what changed since the image before.
struct Source<'a> {
    view: View,
    changed: RoaringTreemap,
    everything: bool,
    pace: &'a mut dyn FnMut(ByteCount) -> bool,
}

impl ImageSource for Source<'_> {
    type Error = FoldError;

    fn changed(&self, range: ByteRange) -> bool {
        let blocks = BlockRange::touched_by(range).indices();
        let before = blocks.start.checked_sub(1).map_or(0, |before| self.changed.rank(before));
        self.everything || self.changed.rank(blocks.end - 1) > before
    }

    fn is_zero(&mut self, range: ByteRange) -> Result<bool, FoldError> {
        let extents = self.view.extents(range).map_err(|source| FoldError::Unreadable { range, source })?;
        Ok(extents.iter().all(|(_, allocation)| *allocation == Allocation::Zero))
    }

    fn read(&mut self, range: ByteRange) -> Result<Bytes, FoldError> {
        self.pace(range.count())?;
        self.view.read(range).map_err(|source| FoldError::Unreadable { range, source })
    }

    fn pace(&mut self, bytes: ByteCount) -> Result<(), FoldError> {
        if (self.pace)(bytes) { Ok(()) } else { Err(FoldError::CalledOff) }
    }

    fn lost(&mut self, range: ByteRange, error: ImageError) -> FoldError {
        FoldError::Lost { range, source: error.into() }
    }
}

impl Snapshot {
    /// The oldest segments that hold nothing above `floor`, which is a point; none when there is no such. The snapshot
    /// must be durable as a whole.
    pub fn foldable(&self, floor: Lsn) -> Option<Foldable> {
        let mut foldable: Option<Foldable> = None;
        let mut segments = self.segments.iter().peekable();
        while let Some(segment) = segments.next() {
            let stats = segment.stats();
            let data = stats.version_min <= stats.version_max;
            let Some(next) = segments.peek() else { break };
            if !segment.is_sealed() || (data && stats.version_max > floor) || stats.next_seq > self.through()
            {
                break;
            }
            let before = foldable.unwrap_or(Foldable {
                segments: 0,
                bytes: ByteCount::ZERO,
                reaches: Lsn::ZERO,
                first_segment: next.header().id,
                first_seq: stats.next_seq,
            });
            foldable = Some(Foldable {
                segments: before.segments + 1,
                bytes: ByteCount(before.bytes.0 + segment.file_bytes().0),
                reaches: if data { before.reaches.max(stats.version_max) } else { before.reaches },
                first_segment: next.header().id,
                first_seq: stats.next_seq,
            });
        }
        foldable
    }

    /// The first sealed segment with versions up to `through` whose index cannot be read whole, if there is one: its lowest
    /// version, and why. No image of a point behind it can be made, nor can it be folded, though all that it holds may be there.
    /// Reads the indexes of all segments before it.
    pub fn index_damage(&self, through: Lsn) -> Option<(Lsn, LogError)> {
        for segment in self.segments.iter() {
            let stats = segment.stats();
            if !segment.is_sealed() || (stats.version_min <= stats.version_max && stats.version_min > through)
            {
                break;
            }
            if let Err(error) = segment.read_index() {
                return Some((stats.version_min, error));
            }
        }
        None
    }

    /// Whether the image that the log begins with can be read as far as the nodes that lead to a byte of the disk.
    ///
    /// # Errors
    /// When one of them cannot be.
    pub fn leads_to(&self, byte: ByteOffset) -> Result<(), LogError> {
        let Some((_, image)) = self.origin().images().last() else { return Ok(()) };
        Ok(image.data_in(ByteRange::between(byte, ByteOffset(byte.0 + 1)), &mut |_| {})?)
    }

    /// Makes an image of the disk at a point, `before` being that of an older point, if there is one. `pace` is told what
    /// will be read, may wait, and says whether to go on.
    ///
    /// # Errors
    /// See [`FoldError`].
    ///
    /// # Panics
    /// When `at` is no point.
    pub fn make_image(
        &self,
        writer: &mut ImageWriter,
        at: Lsn,
        before: Option<KeptPoint>,
        pace: &mut dyn FnMut(ByteCount) -> bool,
    ) -> Result<Root, FoldError> {
        assert!(self.timeline().offers(at), "an image of a point");
        let view = View::new(self.clone(), at);
        let size = view.disk_size();
        let before = before.filter(|before| before.root.size() <= size);
        let changed = self.changed_blocks(before.map_or(Lsn::ZERO, |before| before.at.lsn), at)?;
        let image = before.map(|before| self.images().image(before.root));
        let everything = image.is_none() && self.base().is_some();
        let mut source = Source { view, changed, everything, pace };
        writer.image(image.as_ref(), size, &mut source)
    }

    /// The base of a log that begins without the segments of `foldable`, with these images. Reads the segments'
    /// summaries.
    ///
    /// # Errors
    /// When they cannot be read.
    ///
    /// # Panics
    /// When the floor is no point, or lies below what is folded.
    pub fn rebase(
        &self,
        foldable: &Foldable,
        floor: KeptPoint,
        kept: Vec<KeptPoint>,
    ) -> Result<Base, LogError> {
        assert!(
            foldable.reaches <= floor.at.lsn && self.timeline().offers(floor.at.lsn),
            "a floor of this log"
        );
        assert!(kept.iter().all(|kept| kept.at.lsn < floor.at.lsn), "kept points lie below the floor");
        let mut timeline = self.base().map(|base| base.timeline.clone()).unwrap_or_default();
        let mut identity = None;
        for segment in self.segments.iter().take_while(|s| s.header().id < foldable.first_segment) {
            identity = Some(LogIdentity { disk: segment.header().disk, history: segment.header().history });
            for step in segment.steps()? {
                timeline.fold_step(&step).map_err(|invalid| LogError::Damaged {
                    file: segment.name(),
                    offset: ByteOffset::ZERO,
                    what: format!("its entries do not follow those before: {invalid}"),
                })?;
            }
        }
        Ok(Base {
            identity: identity.expect("what can be folded is a segment at least"),
            generation: self.base().map_or(1, |base| base.generation + 1),
            first_segment: foldable.first_segment,
            first_seq: foldable.first_seq,
            timeline,
            floor: Some(floor),
            kept,
        })
    }

    /// The same base with other kept points.
    pub fn rebase_kept(&self, kept: Vec<KeptPoint>) -> Option<Base> {
        let base = self.base()?;
        assert!(kept.iter().all(|kept| base.kept.contains(kept)), "kept points become fewer");
        if base.is_ended() {
            return Some(self.ended(base.identity, kept));
        }
        Some(Base { generation: base.generation + 1, kept, ..base.clone() })
    }
}

impl RebaseTicket {
    /// Makes the base durable; blocks as long as the device takes. None when the log was closed meanwhile.
    ///
    /// # Errors
    /// The file system's: then the log begins as before. With a [`Doubt`] it may begin as this says when it is opened again,
    /// until a [`SettleTicket`] is written.
    pub fn write(self) -> Result<Option<Rebased>, RebaseError> {
        let Self { storage, dir, base, before, images, owned } = self;
        let Some(_working) = owned.work() else { return Ok(None) };
        match replace(&base, before.as_ref(), &*storage, &dir) {
            Ok(()) => Ok(Some(Rebased(base))),
            Err((source, taken_back)) => {
                let doubt = (!taken_back).then(|| Doubt::about(&base, before.as_ref(), &images));
                Err(RebaseError { source, doubt })
            }
        }
    }
}

impl SettleTicket {
    /// Makes what the log begins with durable everywhere; blocks as long as the device takes. False when the log was closed
    /// meanwhile.
    ///
    /// # Errors
    /// The file system's: then a [`Doubt`] that there was remains.
    pub fn write(self) -> Result<bool, LogError> {
        let Self { storage, dir, base, owned } = self;
        let Some(_working) = owned.work() else { return Ok(false) };
        put(base.as_ref(), &*storage, &dir).map(|()| true)
    }
}

impl DiskLog {
    /// Takes a base that a snapshot of this log gave. None when the log has another one since, or does not go so far
    /// durably.
    pub fn rebase(&self, base: Base) -> Option<RebaseTicket> {
        let follows = base.identity == self.identity && base.follows(self.origin.base());
        let durable = base.first_seq <= self.durable.seq && !self.poisoned;
        (follows && durable).then(|| RebaseTicket {
            storage: Arc::clone(&self.storage),
            dir: self.dir.clone(),
            base,
            before: self.origin.base().cloned(),
            images: self.cache.images(&self.storage),
            owned: self.rotation.owned(),
        })
    }

    /// What makes durable everywhere what the log begins with, after a [`Doubt`]. None when the log has failed.
    pub fn settle(&self) -> Option<SettleTicket> {
        (!self.poisoned).then(|| SettleTicket {
            storage: Arc::clone(&self.storage),
            dir: self.dir.clone(),
            base: self.origin.base().cloned(),
            owned: self.rotation.owned(),
        })
    }

    /// Lets the log begin with a base that is durable. Who reads it already goes on as before.
    ///
    /// # Panics
    /// When it is not of this log.
    pub fn rebased(&mut self, rebased: Rebased) {
        let Rebased(base) = rebased;
        assert_eq!(base.identity, self.identity, "a base of this log");
        let gone = self.segments.iter().take_while(|s| s.header().id < base.first_segment);
        self.sealed_bytes -= gone.map(|segment| segment.file_bytes().0).sum::<u64>();
        base.thin(Arc::make_mut(&mut self.timeline));
        let nobody_works = !self.rotation.is_away();
        Arc::make_mut(&mut self.segments).begin_with(base.first_segment, nobody_works);
        let images = self.cache.images(&self.storage);
        self.origin = Origin::new(&self.dir, Some(base), &images, self.cache.origins());
    }

    /// Takes a log that ends before its floor to it, durably, for something has removed its end: what lies below is in
    /// the floor's image, so the log goes on from there as after a complete pass. Says what was found, if that is so.
    pub(super) fn reach_the_floor(&mut self) -> Result<Option<String>, LogError> {
        let origin = Arc::clone(&self.origin);
        let base = origin.base().filter(|base| base.is_above(&self.timeline));
        let Some(floor) = base.and_then(Base::floor) else { return Ok(None) };
        let what = format!(
            "the log in {} ends at lsn:{}, before lsn:{}, the first point of which everything was kept",
            self.storage.display(&self.segments_dir).display(),
            self.timeline.covered(),
            floor.at.lsn
        );
        for entry in Base::bridge(floor, &self.timeline, &what) {
            self.append(entry).map_err(|error| match error {
                AppendError::Log(error) => error,
                AppendError::Invalid(invalid) => {
                    panic!("the bridge follows any log below the floor: {invalid}")
                }
            })?;
        }
        if let Some(ticket) = self.ticket()? {
            self.synced(ticket.sync())?;
        }
        Ok(Some(what))
    }
}
