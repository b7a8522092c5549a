//! What any few blocks of a chunk are checked by, once all of it was.
//!
//! A chunk has one hash. Whoever has read it and found it right keeps the checksum of each 4 KiB of it, so that the next
//! reader of a few of these need not read and hash all of them.

use std::sync::Arc;

/// What is read and checked at once from then on.
const PART: usize = 4096;

/// CRC32C of each 4 KiB of a chunk that was right.
#[derive(Clone, Debug)]
pub(crate) struct PartSums(Arc<[u32]>);

impl PartSums {
    /// Of the whole content.
    pub(crate) fn of(content: &[u8]) -> Self {
        Self(content.chunks(PART).map(crc32c::crc32c).collect())
    }

    /// Bytes that it takes in memory.
    pub(crate) fn weight(&self) -> usize {
        self.0.len() * size_of::<u32>()
    }

    /// The content from `from` on, as many bytes as the buffer has, by way of `read`, which fills what it is given with the
    /// bytes from a place on or says that it cannot. False when that is so, or what was read is something else.
    pub(crate) fn read<E>(
        &self,
        from: usize,
        buffer: &mut [u8],
        read: impl FnOnce(usize, &mut [u8]) -> Result<bool, E>,
    ) -> Result<bool, E> {
        let (first, end) = (from / PART, (from + buffer.len()).div_ceil(PART));
        let fits = from.is_multiple_of(PART) && buffer.len().is_multiple_of(PART);
        let mut around = vec![0; if fits { 0 } else { (end - first) * PART }];
        let into = if fits { &mut *buffer } else { &mut around[..] };
        let sound = |parts: &[u8]| {
            let mut expected = self.0[first..end].iter();
            parts.chunks(PART).all(|part| expected.next() == Some(&crc32c::crc32c(part)))
        };
        if !read(first * PART, into)? || !sound(into) {
            return Ok(false);
        }
        if !fits {
            buffer.copy_from_slice(&around[from - first * PART..][..buffer.len()]);
        }
        Ok(true)
    }
}
