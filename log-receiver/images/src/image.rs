//! An image: a disk as it was, read through its tree.
//!
//! A tree of height h covers 64 KiB times 256 to the h-th. What differs between two versions of a disk is found by
//! walking both trees side by side: equal references are equal content and end the walk.

use std::sync::Arc;

use backtide_units::{ByteCount, ByteOffset, ByteRange};
use bytes::{Buf, BufMut};

use crate::{
    CHUNK_BYTES, ImageError, Images,
    chunk::{ChunkRef, Kind},
    node::FANOUT,
};

/// Trees are not higher: 64 KiB times 256 to the fourth are 256 TiB.
const HEIGHT_MAX: u8 = 4;

/// Bytes of a root.
pub const ROOT_LENGTH: usize = 49;

/// What an image is found by.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Root {
    pub(crate) top: ChunkRef,
    pub(crate) height: u8,
    size: ByteCount,
}

/// A whole version of a disk. Cheap to clone; reads block on the file system.
#[derive(Clone)]
pub struct Image {
    images: Images,
    root: Arc<Root>,
}

impl Root {
    pub(crate) fn new(top: ChunkRef, size: ByteCount) -> Self {
        Self { top, height: height_of(size), size }
    }

    /// The disk's size.
    pub fn size(&self) -> ByteCount {
        self.size
    }

    /// The bytes.
    pub fn encode(&self) -> [u8; ROOT_LENGTH] {
        let mut bytes = [0; ROOT_LENGTH];
        let mut out = &mut bytes[..];
        self.top.encode(&mut out);
        out.put_u8(self.height);
        out.put_u64_le(self.size.0);
        bytes
    }

    /// Reads the bytes back; none for what is no root.
    pub fn decode(mut bytes: &[u8]) -> Option<Self> {
        let top = ChunkRef::decode(&mut bytes)?;
        let height = bytes.try_get_u8().ok()?;
        let size = ByteCount(bytes.try_get_u64_le().ok()?);
        let known = size <= span(HEIGHT_MAX) && height == height_of(size);
        known.then_some(Self { top, height, size })
    }
}

/// What a node of a level, or a chunk (0), covers.
pub(crate) fn span(level: u8) -> ByteCount {
    ByteCount(CHUNK_BYTES.0 << (8 * u32::from(level)))
}

/// The height of the tree of a disk.
pub(crate) fn height_of(size: ByteCount) -> u8 {
    (0..HEIGHT_MAX).find(|height| span(*height) >= size).unwrap_or(HEIGHT_MAX)
}

impl Image {
    pub(crate) fn new(images: Images, root: Arc<Root>) -> Self {
        Self { images, root }
    }

    /// What it is found by.
    pub fn root(&self) -> Root {
        *self.root
    }

    /// The disk's size.
    pub fn size(&self) -> ByteCount {
        self.root.size
    }

    /// Copies `range` into `buffer`, which must hold zeros and be as long. Beyond the disk's end are zeros.
    ///
    /// # Errors
    /// [`ImageError::Damaged`] with file and offset; never wrong data.
    ///
    /// # Panics
    /// When range and buffer are not equally long.
    pub fn read_into(&self, range: ByteRange, buffer: &mut [u8]) -> Result<(), ImageError> {
        assert_eq!(range.count().0, buffer.len() as u64, "a buffer as long as the range");
        self.each_chunk(range, &mut |covers, name| {
            let Some(part) = covers.intersection(range) else { return Ok(()) };
            let (from, to) = (part.start().0 - covers.start().0, part.start().0 - range.start().0);
            let (from, to, length) = (from as usize, to as usize, part.count().0 as usize);
            self.images.data(name, from, &mut buffer[to..to + length])
        })
    }

    /// Calls `visit` for the parts of `range` that may have data, in order; the others are zeroes.
    ///
    /// # Errors
    /// When a node cannot be read.
    pub fn data_in(&self, range: ByteRange, visit: &mut dyn FnMut(ByteRange)) -> Result<(), ImageError> {
        self.each_chunk(range, &mut |covers, _| {
            covers.intersection(range).into_iter().for_each(&mut *visit);
            Ok(())
        })
    }

    /// The chunks of data in `range` that cannot be read: what is wrong, a sentence with file and place; the chunk; and what of
    /// the disk it covers.
    ///
    /// # Errors
    /// When a node cannot be read; the file system's.
    pub fn damaged_chunks(&self, range: ByteRange) -> Result<Vec<(String, ChunkRef, ByteRange)>, ImageError> {
        let mut damaged = Vec::new();
        self.each_chunk(range, &mut |covers, name| match self.images.content(name, Kind::Data) {
            Ok(_) => Ok(()),
            Err(error @ ImageError::Damaged { .. }) => {
                damaged.push((error.to_string(), *name, covers));
                Ok(())
            }
            Err(error) => Err(error),
        })?;
        Ok(damaged)
    }

    /// Whether it has a chunk of data in a range; not when that cannot be read.
    pub fn has_chunk(&self, chunk: &ChunkRef, range: ByteRange) -> bool {
        let mut has = false;
        let walked = self.each_chunk(range, &mut |_, name| {
            has |= name == chunk;
            Ok(())
        });
        walked.is_ok() && has
    }

    /// Calls `visit` for each chunk that touches `range`, in order.
    fn each_chunk(
        &self,
        range: ByteRange,
        visit: &mut dyn FnMut(ByteRange, &ChunkRef) -> Result<(), ImageError>,
    ) -> Result<(), ImageError> {
        self.walk(&self.root.top, self.root.height, ByteOffset::ZERO, range, visit)
    }

    fn walk(
        &self,
        name: &ChunkRef,
        level: u8,
        start: ByteOffset,
        range: ByteRange,
        visit: &mut dyn FnMut(ByteRange, &ChunkRef) -> Result<(), ImageError>,
    ) -> Result<(), ImageError> {
        let covers = covered(start, level);
        if name.is_zeroes() || covers.intersection(range).is_none() {
            return Ok(());
        }
        let Some(below) = level.checked_sub(1) else { return visit(covers, name) };
        let node = self.images.node(name, level)?;
        let step = span(below).0;
        let first = range.start().0.saturating_sub(start.0) / step;
        let behind = (range.end().0 - start.0).div_ceil(step).min(FANOUT as u64);
        for place in first..behind {
            let child = &node.children[place as usize];
            self.walk(child, below, ByteOffset(start.0 + place * step), range, visit)?;
        }
        Ok(())
    }

    /// Calls `visit` for ranges that may differ from `other`, in order; all others are equal.
    ///
    /// # Errors
    /// When a node cannot be read.
    pub fn differing(&self, other: &Self, visit: &mut dyn FnMut(ByteRange)) -> Result<(), ImageError> {
        let height = self.root.height.max(other.root.height);
        let (mine, yours) = ((self.root.top, self.root.height), (other.root.top, other.root.height));
        self.differ(mine, yours, height, ByteOffset::ZERO, visit)
    }

    fn differ(
        &self,
        mine: (ChunkRef, u8),
        yours: (ChunkRef, u8),
        level: u8,
        start: ByteOffset,
        visit: &mut dyn FnMut(ByteRange),
    ) -> Result<(), ImageError> {
        let same_content = mine.0.hash == yours.0.hash && mine.0.is_zeroes() == yours.0.is_zeroes();
        if same_content && (mine.1 == yours.1 || mine.0.is_zeroes()) {
            return Ok(());
        }
        let Some(below) = level.checked_sub(1) else {
            visit(covered(start, 0));
            return Ok(());
        };
        let (mine, yours) = (self.images.children(mine, level)?, self.images.children(yours, level)?);
        for (place, (mine, yours)) in (0..).zip(mine.into_iter().zip(yours)) {
            let start = ByteOffset(start.0 + place * span(below).0);
            self.differ(mine, yours, below, start, visit)?;
        }
        Ok(())
    }

    pub(crate) fn images(&self) -> &Images {
        &self.images
    }
}

impl Images {
    /// The children, at `level`, of something that may be lower than that: then it is the first of them.
    pub(crate) fn children(
        &self,
        (name, height): (ChunkRef, u8),
        level: u8,
    ) -> Result<Vec<(ChunkRef, u8)>, ImageError> {
        if name.is_zeroes() {
            return Ok(vec![(name, 0); FANOUT]);
        }
        if height < level {
            let mut children = vec![(ChunkRef::ZEROES, 0); FANOUT];
            children[0] = (name, height);
            return Ok(children);
        }
        let node = self.node(&name, level)?;
        Ok(node.children.iter().map(|child| (*child, level - 1)).collect())
    }
}

/// What a chunk or node that begins at `start` covers.
pub(crate) fn covered(start: ByteOffset, level: u8) -> ByteRange {
    ByteRange::between(start, ByteOffset(start.0 + span(level).0))
}
