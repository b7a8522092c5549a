//! The disk at one point: reads and extents.
//!
//! Opening a view costs nothing; each read merges the indexes of the segments that have the range and
//! reads only the entries it needs. Every payload is checked against the checksum from its capture.

use backtide_segment::Extent;
use backtide_units::{ByteCount, ByteRange, Lsn};
use bytes::Bytes;

use crate::{
    LogError, Snapshot,
    merge::{Piece, Source},
};

/// The disk at one point. Cheap to clone; reads block on the file system.
#[derive(Clone)]
pub struct View {
    snapshot: Snapshot,
    at: Lsn,
}

/// Whether an extent of a view has data or is known to read as zeroes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Allocation {
    /// There may be any bytes.
    Data,
    /// All bytes are zero.
    Zero,
}

impl View {
    pub(crate) fn new(snapshot: Snapshot, at: Lsn) -> Self {
        Self { snapshot, at }
    }

    /// The point; [`Lsn::MAX`] for the newest of everything.
    pub fn at(&self) -> Lsn {
        self.at
    }

    /// The snapshot it belongs to.
    pub fn snapshot(&self) -> &Snapshot {
        &self.snapshot
    }

    /// The size that the disk had at the point.
    pub fn disk_size(&self) -> ByteCount {
        self.snapshot.timeline().size_at(self.at)
    }

    /// The bytes of `range`, each checked against the checksum it was captured with.
    ///
    /// # Errors
    /// [`LogError::Damaged`] with file and offset; never wrong data.
    ///
    /// # Panics
    /// When the range is longer than memory can be, or beyond the largest disk.
    pub fn read(&self, range: ByteRange) -> Result<Bytes, LogError> {
        let length = range.count().as_usize().expect("a read that fits in memory");
        let mut buffer = vec![0; length];
        self.read_into(range, &mut buffer)?;
        Ok(buffer.into())
    }

    /// The bytes of `range` into `buffer`, which must hold zeros and be as long.
    fn read_into(&self, range: ByteRange, buffer: &mut [u8]) -> Result<(), LogError> {
        let merge = self.snapshot.merge(self.at);
        let mut sourced: Vec<(Source<'_>, ByteRange)> = Vec::new();
        merge.pieces(range, &mut |piece| sourced.extend(piece.source.map(|source| (source, piece.range))))?;
        // A piece of a payload is read and checked as a whole, so once for all parts that it gives.
        let entry = |source: &Source<'_>| (source.segment.header().id, source.extent.position.0);
        sourced.sort_by_key(|(source, range)| (entry(source), range.start()));
        for entry in sourced.chunk_by(|(a, _), (b, _)| entry(a) == entry(b)) {
            let (source, _) = entry[0];
            let wanted: Vec<(Extent, ByteRange)> =
                entry.iter().map(|(source, part)| (source.extent, *part)).collect();
            source.segment.read_entry(&wanted, |part, bytes| {
                let to = offset_in(range, part);
                buffer[to..to + bytes.len()].copy_from_slice(bytes);
            })?;
        }
        Ok(())
    }

    /// The version of the newest change of any byte of `range`; none when nothing of it ever changed in this
    /// log. Takes a few look-ups in the indexes, whatever the history's length.
    ///
    /// # Errors
    /// When an index cannot be read.
    pub fn newest_version(&self, range: ByteRange) -> Result<Option<Lsn>, LogError> {
        let mut newest = None;
        self.snapshot.merge(self.at).pieces(range, &mut |piece| newest = newest.max(piece.version))?;
        Ok(newest)
    }

    /// Where `range` has data and where it is known to be zero: adjoining, in order, covering it.
    /// Takes time and memory by the number of extents, whatever the range's length.
    ///
    /// # Errors
    /// When an index cannot be read.
    pub fn extents(&self, range: ByteRange) -> Result<Vec<(ByteRange, Allocation)>, LogError> {
        let mut extents: Vec<(ByteRange, Allocation)> = Vec::new();
        self.snapshot.merge(self.at).pieces(range, &mut |Piece { range, source, .. }| {
            let allocation = if source.is_some() { Allocation::Data } else { Allocation::Zero };
            match extents.last_mut() {
                Some((last, same)) if *same == allocation => {
                    *last = ByteRange::between(last.start(), range.end());
                }
                Some(_) | None => extents.push((range, allocation)),
            }
        })?;
        Ok(extents)
    }
}

fn offset_in(whole: ByteRange, part: ByteRange) -> usize {
    assert!(whole.contains(part), "{part} lies in {whole}");
    usize::try_from(part.start().0 - whole.start().0).expect("an offset in memory")
}
