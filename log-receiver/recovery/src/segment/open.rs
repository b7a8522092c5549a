//! The part of a segment that is there while it is written.

use backtide_segment::{Contents, Extent, ExtentKey, SegmentFile};
use backtide_units::ByteOffset;

use super::Next;
use crate::{LogCache, open_extents::Counted};

/// So many extents of an open segment are walked through before its writer may go on.
pub(super) const WALKED_AT_ONCE: usize = 1024;

/// A segment that is still written.
pub(crate) struct OpenSegment {
    pub(crate) file: SegmentFile,
    pub(crate) contents: Contents,
    pub(crate) end: ByteOffset,
    counted: Counted,
}

impl OpenSegment {
    pub(crate) fn new(file: SegmentFile, contents: Contents, end: ByteOffset, cache: &LogCache) -> Self {
        let counted = cache.open_indexes().count(contents.index().count());
        Self { file, contents, end, counted }
    }

    /// Visits a piece of what [`super::Segment::walk_on`] does; gives the key from which on to go on, none at the end.
    pub(super) fn walk_piece(
        &self,
        mut from: ExtentKey,
        visit: &mut dyn FnMut(ExtentKey, Extent) -> Next,
    ) -> Option<ExtentKey> {
        let index = self.contents.index();
        let mut extents = index.from(from);
        for _ in 0..WALKED_AT_ONCE {
            let (key, extent) = extents.next()?;
            match visit(key, extent) {
                Next::On => from = key.older(),
                Next::From(later) => {
                    from = later;
                    extents = index.from(later);
                }
                Next::End => return None,
            }
        }
        Some(from)
    }

    /// Counts what the contents have become.
    pub(crate) fn note_extents(&mut self) {
        self.counted.note(self.contents.index().count());
    }
}
