//! Where the bytes of a damaged entry, or of a chunk of an image, may still be: what a check that mends asks.
//!
//! What is found counts only when it has the checksum that the entry's payload was captured with, or the hash that is the
//! chunk's name, so it is tried from wherever it may be: the newest version of the range, which is on the disk itself too when
//! that is still attached; the version before the entry; the two images around it. For a chunk the log's versions of that
//! time are laid over each of them, as far as it still has any. One after the other, so that few are in memory.

use std::cell::Cell;

use backtide_images::LostChunk;
use backtide_segment::{Position, SegmentError, SegmentFile};
use backtide_units::{ByteCount, ByteOffset, ByteRange, Lsn};
use bytes::Bytes;

use crate::{
    LogError, Snapshot, View,
    check::told,
    merge::{Content, Merge, Piece},
    segment::Segment,
};

/// Reads what the disk itself has in a range now; none when it cannot be asked, or does not answer.
pub type AskDisk<'a> = &'a dyn Fn(ByteRange) -> Option<Bytes>;

/// Mends what a check finds, from all that a snapshot has, and from the disk.
pub(crate) struct Mender<'a> {
    snapshot: &'a Snapshot,
    disk: AskDisk<'a>,
    /// Bytes of candidates, for the pace.
    read: Cell<u64>,
}

impl<'a> Mender<'a> {
    pub(crate) fn new(snapshot: &'a Snapshot, disk: AskDisk<'a>) -> Self {
        Self { snapshot, disk, read: Cell::default() }
    }

    /// The same for a log that ended before this one began.
    pub(crate) fn of(&self, before: &'a Snapshot) -> Self {
        Self::new(before, self.disk)
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
        let before = || self.view(range, lsn.0.checked_sub(1).map(Lsn)?);
        let known = self.newest(range).filter(is_wanted).or_else(|| before().filter(is_wanted));
        known.or_else(|| {
            let behind = self.snapshot.origin().images().partition_point(|(point, _)| point.lsn < lsn);
            let around = [Some(behind), behind.checked_sub(1)];
            around.into_iter().flatten().find_map(|nth| self.image(nth, range).filter(is_wanted))
        })
    }

    /// What a chunk of an image had: what lies in the log of what had come by then, over what lies there in other images, or now.
    pub(crate) fn chunk(&self, lost: &LostChunk, is_wanted: &dyn Fn(&[u8]) -> bool) -> Option<Bytes> {
        let images = self.snapshot.origin().images();
        lost.places().iter().find_map(|(nth, covers)| {
            let (at, image) = images.get(*nth)?;
            // Behind the disk's end of that time there are zeroes.
            let end = covers.end().0.min(image.size().0);
            let range = ByteRange::between(covers.start(), ByteOffset(end.max(covers.start().0)));
            let tried = |below: Option<Bytes>| {
                let mut bytes = below.map_or_else(|| vec![0; length(range)], |below| below.to_vec());
                self.lay_log_over(range, at.lsn, &mut bytes).ok()?;
                bytes.resize(length(*covers), 0);
                is_wanted(&bytes).then(|| Bytes::from(bytes))
            };
            let newest = || tried(Some(self.newest(range)?));
            let older = || tried(Some(self.image(nth.checked_sub(1)?, range)?));
            let newer = || tried(Some(self.image(nth + 1, range)?));
            newest().or_else(older).or_else(newer).or_else(|| tried(None))
        })
    }

    /// What the range has now: of the log, or of the disk itself where damage keeps that from being read.
    fn newest(&self, range: ByteRange) -> Option<Bytes> {
        self.view(range, Lsn::MAX).or_else(|| {
            self.count(range);
            (self.disk)(range).filter(|bytes| ByteCount::of(bytes) == range.count())
        })
    }

    fn view(&self, range: ByteRange, at: Lsn) -> Option<Bytes> {
        self.count(range);
        View::new(self.snapshot.clone(), at).read(range).ok()
    }

    fn image(&self, nth: usize, range: ByteRange) -> Option<Bytes> {
        let (_, image) = self.snapshot.origin().images().get(nth)?;
        self.count(range);
        let mut bytes = vec![0; length(range)];
        image.read_into(range, &mut bytes).ok()?;
        Some(Bytes::from(bytes))
    }

    /// What the log still has of versions up to `at`, also of those that lie below its floor, into `buffer`.
    fn lay_log_over(&self, range: ByteRange, at: Lsn, buffer: &mut [u8]) -> Result<(), LogError> {
        if range.is_empty() {
            return Ok(());
        }
        self.count(range);
        let merge = Merge { floor: Lsn::ZERO, ..self.snapshot.merge(at) };
        let mut pieces = Vec::new();
        merge.pieces(range, &mut |piece| pieces.push(piece))?;
        for Piece { range: part, content, .. } in pieces {
            match content {
                Content::Payload(source) => {
                    source.segment.read_entry(&[(source.extent, part)], range, buffer)?;
                }
                Content::Zeroes => {
                    let from = usize::try_from(part.start().0 - range.start().0).expect("a place in memory");
                    buffer[from..from + length(part)].fill(0);
                }
                Content::Below => {}
            }
        }
        Ok(())
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

fn length(range: ByteRange) -> usize {
    range.count().as_usize().expect("a piece or a chunk fits in memory")
}
