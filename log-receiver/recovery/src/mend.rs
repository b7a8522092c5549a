//! Where the bytes of a damaged entry may still be: what a check that mends asks.
//!
//! What is found counts only when it has the checksum that the entry's payload was captured with, so it is tried from wherever it
//! may be: the newest version of the range, which an agent that is still attached sends again when a compare meets damage;
//! the version before the entry; the two images around it. One after the other, so that no more than one is in memory.

use std::cell::Cell;

use backtide_segment::{Position, SegmentError, SegmentFile};
use backtide_units::{ByteCount, ByteRange, Lsn};
use bytes::Bytes;

use crate::{LogError, Snapshot, View, check::told, segment::Segment};

/// Mends what a check finds, from all that a snapshot has.
pub(crate) struct Mender<'a> {
    snapshot: &'a Snapshot,
    /// Bytes of candidates, for the pace.
    read: Cell<u64>,
}

impl<'a> Mender<'a> {
    pub(crate) fn new(snapshot: &'a Snapshot) -> Self {
        Self { snapshot, read: Cell::default() }
    }

    /// Whether an entry is whole again. The segment that is still written is left alone.
    pub(crate) fn entry(
        &self,
        segment: &Segment,
        file: &SegmentFile,
        position: Position,
    ) -> Result<bool, LogError> {
        if !segment.is_sealed() {
            return Ok(false);
        }
        let mut find = |range, lsn, is_wanted: &dyn Fn(&Bytes) -> bool| self.version(range, lsn, is_wanted);
        done(file.mend_entry(segment.header(), position, &mut find))
    }

    /// Whether a header is whole again.
    pub(crate) fn header(&self, segment: &Segment, file: &SegmentFile) -> Result<bool, LogError> {
        if !segment.is_sealed() {
            return Ok(false);
        }
        done(file.mend_header(segment.header()).map(|()| true))
    }

    /// Whether a footer is whole again.
    pub(crate) fn footer(&self, segment: &Segment, file: &SegmentFile) -> Result<bool, LogError> {
        segment.sealed().map_or(Ok(false), |sealed| done(file.mend_footer(sealed)))
    }

    /// What the range has, or had, that is what is wanted; what cannot be read is left out.
    fn version(&self, range: ByteRange, lsn: Lsn, is_wanted: &dyn Fn(&Bytes) -> bool) -> Option<Bytes> {
        let before = lsn.0.checked_sub(1).map(Lsn);
        let newest = [Some(Lsn::MAX), before].into_iter().flatten().find_map(|at| {
            self.count(range);
            View::new(self.snapshot.clone(), at).read(range).ok().filter(is_wanted)
        });
        newest.or_else(|| {
            let images = self.snapshot.origin().images();
            let behind = images.partition_point(|(point, _)| point.lsn < lsn);
            let around = [Some(behind), behind.checked_sub(1)];
            let mut around = around.into_iter().flatten().filter_map(|place| images.get(place));
            around.find_map(|(_, image)| {
                self.count(range);
                let mut bytes = vec![0; range.count().as_usize().expect("a piece fits in memory")];
                image.read_into(range, &mut bytes).ok()?;
                Some(Bytes::from(bytes)).filter(is_wanted)
            })
        })
    }

    fn count(&self, range: ByteRange) {
        self.read.set(self.read.get().saturating_add(range.count().0));
    }

    /// Bytes that were read of candidates since it was last asked.
    pub(crate) fn take_read(&self) -> ByteCount {
        ByteCount(self.read.take())
    }
}

/// Damage that is left is no error.
fn done(mended: Result<bool, SegmentError>) -> Result<bool, LogError> {
    Ok(told(mended)?.unwrap_or(false))
}
