//! Where the bytes of a damaged entry may still be: what a check that mends asks.
//!
//! What is found counts only when it has the checksum that the entry's payload was captured with, so it is tried from wherever it
//! may be: the newest version of the range, which an agent that is still attached sends again when a compare meets damage;
//! the version before the entry; the images.

use backtide_segment::{EntryHeader, Position, SegmentError, SegmentFile};
use backtide_units::{ByteRange, Lsn};
use bytes::Bytes;

use crate::{LogError, Snapshot, View, check::told, segment::Segment};

/// Mends what a check finds, from all that a snapshot has.
pub(crate) struct Mender<'a> {
    snapshot: &'a Snapshot,
}

impl<'a> Mender<'a> {
    pub(crate) fn new(snapshot: &'a Snapshot) -> Self {
        Self { snapshot }
    }

    /// Whether an entry is whole again. The segment that is still written is left alone.
    pub(crate) fn entry(
        &self,
        segment: &Segment,
        file: &SegmentFile,
        header: &EntryHeader,
        position: Position,
    ) -> Result<bool, LogError> {
        if !segment.is_sealed() {
            return Ok(false);
        }
        let mended =
            file.mend_entry(segment.header(), position, &mut |range| self.versions(range, header.lsn));
        done(mended)
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

    /// What the range has, or had; what cannot be read is left out.
    fn versions(&self, range: ByteRange, lsn: Lsn) -> Vec<Bytes> {
        let before = lsn.0.checked_sub(1).map(Lsn);
        let views =
            [Some(Lsn::MAX), before].into_iter().flatten().map(|at| View::new(self.snapshot.clone(), at));
        let mut versions: Vec<Bytes> = views.filter_map(|view| view.read(range).ok()).collect();
        let length = range.count().as_usize().expect("a piece fits in memory");
        for (_, image) in self.snapshot.origin().images() {
            let mut bytes = vec![0; length];
            if image.read_into(range, &mut bytes).is_ok() {
                versions.push(bytes.into());
            }
        }
        versions
    }
}

/// Damage that is left is no error.
fn done(mended: Result<bool, SegmentError>) -> Result<bool, LogError> {
    Ok(told(mended)?.unwrap_or(false))
}
