//! Where bytes come from: a disk, or a part of one.

use std::{io, rc::Rc};

use backtide_units::{ByteCount, ByteOffset, ByteRange};

/// Bytes that can be read anywhere.
pub trait Source {
    /// How many there are.
    fn size(&self) -> ByteCount;

    /// Fills `buffer` from `offset` on.
    ///
    /// # Errors
    /// When it reaches beyond the end, or the bytes cannot be had.
    fn read_at(&self, offset: ByteOffset, buffer: &mut [u8]) -> io::Result<()>;
}

/// Checks that a read lies within `size` bytes.
fn check(size: ByteCount, offset: ByteOffset, buffer: &[u8]) -> io::Result<()> {
    match offset.checked_add(ByteCount::of(buffer)) {
        Some(end) if end.0 <= size.0 => Ok(()),
        _ => Err(io::ErrorKind::UnexpectedEof.into()),
    }
}

/// Bytes in memory.
#[derive(Clone, Debug)]
pub struct Bytes(pub Vec<u8>);

impl Source for Bytes {
    fn size(&self) -> ByteCount {
        ByteCount::of(&self.0)
    }

    fn read_at(&self, offset: ByteOffset, buffer: &mut [u8]) -> io::Result<()> {
        check(self.size(), offset, buffer)?;
        let start = usize::try_from(offset.0).expect("within memory");
        buffer.copy_from_slice(&self.0[start..start + buffer.len()]);
        Ok(())
    }
}

/// A part of a source, such as a partition.
#[derive(Clone)]
pub struct Window {
    source: Rc<dyn Source>,
    range: ByteRange,
}

impl Window {
    /// The bytes of `range`, cut where the source ends.
    pub fn new(source: Rc<dyn Source>, range: ByteRange) -> Self {
        let cut = |at: ByteOffset| ByteOffset(at.0.min(source.size().0));
        let range = ByteRange::between(cut(range.start()), cut(range.end()));
        Self { source, range }
    }
}

impl Source for Window {
    fn size(&self) -> ByteCount {
        self.range.count()
    }

    fn read_at(&self, offset: ByteOffset, buffer: &mut [u8]) -> io::Result<()> {
        check(self.size(), offset, buffer)?;
        self.source.read_at(ByteOffset(self.range.start().0 + offset.0), buffer)
    }
}
