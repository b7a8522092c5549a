//! The disk at one point: reads and extents.
//!
//! Opening a view costs nothing; each read merges the indexes of the segments that have the range and
//! reads only the entries it needs. Every payload is checked against the checksum from its capture.

use backtide_images::Image;
use backtide_segment::Extent;
use backtide_units::{ByteCount, ByteRange, HistoryId, Lsn};
use bytes::Bytes;

use crate::{
    LogError, Snapshot,
    merge::{Content, Piece, Source},
};

/// Reads from this length on are made in memory that is used again: fresh memory costs more than filling it.
const POOLED_MIN: ByteCount = ByteCount(64 << 10);

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

    /// The history that has the point; none when nothing of its log is left.
    pub fn history(&self) -> Option<HistoryId> {
        self.snapshot.history()
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
        if range.count() >= POOLED_MIN
            && let Some(pool) = self.snapshot.origin().buffers()
        {
            let mut buffer = pool.take(range.count());
            self.read_into(range, &mut buffer)?;
            return Ok(buffer.freeze());
        }
        let mut buffer = vec![0; range.count().as_usize().expect("a read that fits in memory")];
        self.read_into(range, &mut buffer)?;
        Ok(buffer.into())
    }

    /// The bytes of `range` into `buffer`, which is as long and may hold anything.
    fn read_into(&self, range: ByteRange, buffer: &mut [u8]) -> Result<(), LogError> {
        let image = self.snapshot.image_at(self.at);
        if self.is_below_the_log() {
            buffer.fill(0);
            return Ok(image.map_or(Ok(()), |image| image.read_into(range, buffer))?);
        }
        let merge = self.snapshot.merge(self.at);
        let mut sourced: Vec<(Source<'_>, ByteRange)> = Vec::new();
        let mut below = Vec::new();
        merge.pieces(range, &mut |piece| match piece.content {
            Content::Payload(source) => sourced.push((source, piece.range)),
            Content::Zeroes => buffer[place_in(range, piece.range)].fill(0),
            Content::Below => below.push(piece.range),
        })?;
        for part in below {
            let buffer = &mut buffer[place_in(range, part)];
            buffer.fill(0);
            if let Some(image) = image {
                image.read_into(part, buffer)?;
            }
        }
        // An entry's header is read and checked once for all parts that it gives.
        let entry = |source: &Source<'_>| (source.segment.header().id, source.extent.position.0);
        sourced.sort_by_key(|(source, range)| (entry(source), range.start()));
        for entry in sourced.chunk_by(|(a, _), (b, _)| entry(a) == entry(b)) {
            let (source, _) = entry[0];
            let wanted: Vec<(Extent, ByteRange)> =
                entry.iter().map(|(source, part)| (source.extent, *part)).collect();
            source.segment.read_entry(&wanted, range, buffer)?;
        }
        Ok(())
    }

    /// The version of the newest change of any byte of `range`; none when nothing of it ever changed. Of a time of which
    /// single points are left it is the first of those that has the bytes, and of what an older log held last and this one has
    /// nothing of it is the first point here. Takes a few look-ups in the indexes, whatever the history's length.
    ///
    /// # Errors
    /// When an index, or what an older log held, cannot be read.
    pub fn newest_version(&self, range: ByteRange) -> Result<Option<Lsn>, LogError> {
        let (mut newest, mut below) = (None, self.is_below_the_log());
        if !below {
            self.snapshot.merge(self.at).pieces(range, &mut |piece| {
                newest = newest.max(piece.version);
                below |= matches!(piece.content, Content::Below);
            })?;
        }
        if newest.is_none() && below {
            newest = self.newest_image(range)?;
        }
        if newest.is_some() { Ok(newest) } else { self.newest_before(range) }
    }

    /// The same in the logs before this one, which has nothing of `range`: it begins with an empty disk.
    fn newest_before(&self, range: ByteRange) -> Result<Option<Lsn>, LogError> {
        let Some(before) = self.snapshot.before() else { return Ok(None) };
        let Some(last) = before.timeline().latest() else { return Ok(None) };
        let last = before.view_of(last.lsn);
        let Some(newest) = last.newest_version(range)? else { return Ok(None) };
        let first = self.snapshot.own_timeline().intervals().first();
        let went = first.filter(|first| first.from.lsn <= self.at);
        match went {
            Some(first) if last.read(range)?.iter().any(|byte| *byte != 0) => Ok(Some(first.from.lsn)),
            Some(_) | None => Ok(Some(newest)),
        }
    }

    /// The oldest of the images that have `range` as the newest at the point has it; none when all have zeroes.
    fn newest_image(&self, range: ByteRange) -> Result<Option<Lsn>, LogError> {
        let read = |image: &Image| -> Result<Vec<u8>, LogError> {
            let mut bytes = vec![0; range.count().as_usize().expect("a read that fits in memory")];
            image.read_into(range, &mut bytes)?;
            Ok(bytes)
        };
        let images = self.snapshot.images_until(self.at);
        let Some(((at, newest), older)) = images.split_last() else { return Ok(None) };
        let (mut changed, bytes) = (at.lsn, read(newest)?);
        for (at, image) in older.iter().rev() {
            if read(image)? != bytes {
                return Ok(Some(changed));
            }
            changed = at.lsn;
        }
        Ok(bytes.iter().any(|byte| *byte != 0).then_some(changed))
    }

    /// Where `range` has data and where it is known to be zero: adjoining, in order, covering it.
    /// Takes time and memory by the number of extents, whatever the range's length.
    ///
    /// # Errors
    /// When an index cannot be read.
    pub fn extents(&self, range: ByteRange) -> Result<Vec<(ByteRange, Allocation)>, LogError> {
        let mut pieces: Vec<(ByteRange, Where)> = Vec::new();
        if self.is_below_the_log() {
            pieces.push((range, Where::Below));
        } else {
            self.snapshot.merge(self.at).pieces(range, &mut |Piece { range, content, .. }| {
                let place = match content {
                    Content::Payload(_) => Where::Data,
                    Content::Zeroes => Where::Zero,
                    Content::Below => Where::Below,
                };
                pieces.push((range, place));
            })?;
        }
        let image = self.snapshot.image_at(self.at);
        let mut extents = Extents::default();
        for (piece, place) in pieces {
            match (place, image) {
                (Where::Data, _) => extents.add(piece, Allocation::Data),
                (Where::Below, Some(image)) => {
                    let mut at = piece.start();
                    image.data_in(piece, &mut |data| {
                        extents.add(ByteRange::between(at, data.start()), Allocation::Zero);
                        extents.add(data, Allocation::Data);
                        at = data.end();
                    })?;
                    extents.add(ByteRange::between(at, piece.end()), Allocation::Zero);
                }
                (Where::Zero, _) | (Where::Below, None) => extents.add(piece, Allocation::Zero),
            }
        }
        Ok(extents.0)
    }

    /// Whether the point is an image and the log has nothing to do with it.
    fn is_below_the_log(&self) -> bool {
        self.at < self.snapshot.floor()
    }
}

/// [`Content`] without its source.
#[derive(Clone, Copy)]
enum Where {
    Data,
    Zero,
    Below,
}

/// Extents in order, neighbors of one kind joined.
#[derive(Default)]
struct Extents(Vec<(ByteRange, Allocation)>);

impl Extents {
    fn add(&mut self, range: ByteRange, allocation: Allocation) {
        if range.is_empty() {
            return;
        }
        match self.0.last_mut() {
            Some((last, same)) if *same == allocation => {
                *last = ByteRange::between(last.start(), range.end());
            }
            Some(_) | None => self.0.push((range, allocation)),
        }
    }
}

/// Where a part of a range is in its buffer.
fn place_in(whole: ByteRange, part: ByteRange) -> std::ops::Range<usize> {
    assert!(whole.contains(part), "{part} lies in {whole}");
    let at = |offset: u64| usize::try_from(offset - whole.start().0).expect("an offset in memory");
    at(part.start().0)..at(part.end().0)
}
