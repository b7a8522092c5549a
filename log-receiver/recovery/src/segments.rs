//! All segments of a log: those that are not written any more in the directory, the others one by one.

use std::sync::Arc;

use backtide_segment::SegmentId;
use backtide_units::{ByteCount, ByteRange};
use roaring::RoaringTreemap;

use crate::{
    LogError,
    directory::{Directory, Leaf, Upkeep, Upkept, Versions},
    segment::Segment,
};

/// All segments of a log, in order. Cheap to clone.
#[derive(Clone)]
pub(crate) struct Segments {
    directory: Directory<Arc<Segment>>,
    recent: Vec<Arc<Segment>>,
    /// Those before it are folded into images.
    first: SegmentId,
}

impl Segments {
    /// None yet; the directory takes so much memory at most.
    pub(crate) fn new(directory_bytes_max: ByteCount) -> Self {
        Self { directory: Directory::new(directory_bytes_max), recent: Vec::new(), first: SegmentId::FIRST }
    }

    /// Adds a segment that is written.
    pub(crate) fn push(&mut self, segment: Arc<Segment>) {
        self.recent.push(segment);
    }

    /// Adds a segment that is not written any more, with the codes of its buckets.
    ///
    /// # Panics
    /// When one before it is still written.
    pub(crate) fn push_finished(&mut self, segment: Arc<Segment>, buckets: &RoaringTreemap) {
        assert!(self.recent.is_empty(), "segments are finished in order");
        let versions = Versions::of(&segment.stats());
        self.directory.push(Leaf::new(segment, versions, buckets));
        while let Some(upkeep) = self.directory.upkeep() {
            self.directory.install(upkeep.run());
        }
    }

    /// Takes the first segment that was written over to those that are not any more.
    ///
    /// # Panics
    /// When none is written.
    pub(crate) fn finish_first(&mut self, leaf: Leaf<Arc<Segment>>) {
        assert!(!self.recent.is_empty(), "a segment that was written");
        self.recent.remove(0);
        self.directory.push(leaf);
    }

    /// Work on the directory, if there is any; see [`Directory::upkeep`].
    pub(crate) fn upkeep(&self) -> Option<Upkeep<Arc<Segment>>> {
        self.directory.upkeep()
    }

    /// Puts such work's outcome in place.
    pub(crate) fn install(&mut self, upkept: Upkept<Arc<Segment>>) {
        self.directory.install(upkept);
    }

    pub(crate) fn directory(&self) -> &Directory<Arc<Segment>> {
        &self.directory
    }

    /// Those that are written, or were when this was cloned.
    pub(crate) fn recent(&self) -> &[Arc<Segment>] {
        &self.recent
    }

    pub(crate) fn iter(&self) -> impl DoubleEndedIterator<Item = &Arc<Segment>> {
        self.directory.iter().chain(&self.recent).filter(|segment| self.has_segment(segment))
    }

    /// Whether a segment that the directory gives is of the log: it is not folded into images.
    pub(crate) fn has_segment(&self, segment: &Segment) -> bool {
        segment.header().id >= self.first
    }

    pub(crate) fn len(&self) -> usize {
        self.iter().count()
    }

    /// Does without all segments before `first`, which are not written any more. Their memory is given back as far as
    /// nobody works on the directory.
    pub(crate) fn begin_with(&mut self, first: SegmentId, nobody_works: bool) {
        self.first = first;
        if nobody_works {
            self.directory.drop_first(|segment| segment.header().id < first);
        }
    }

    pub(crate) fn last(&self) -> Option<&Arc<Segment>> {
        self.iter().next_back()
    }

    /// Whether any segment may have extents in the buckets of a level that touch `range`.
    pub(crate) fn has(&self, level: u8, range: ByteRange) -> Result<bool, LogError> {
        for segment in &self.recent {
            if segment.may_have(level, range)? {
                return Ok(true);
            }
        }
        Ok(self.directory.has(level, range))
    }
}
