//! A mounted point for code that reads as from a file: blocks the thread it runs on.
//!
//! One stretch of 64 KiB is remembered: file systems read their tables in small pieces.

use std::{
    fmt,
    io::{self, Read, Seek, SeekFrom, Write},
};

use backtide_export::Client;
use backtide_units::{ByteCount, ByteOffset, ByteRange};
use bytes::Bytes;
use tokio::runtime::Handle;

/// What is read at once at least.
const STRETCH: u64 = 64 << 10;

/// A part of a point, seen as a disk of its own. Must not be used on a thread of the runtime.
#[derive(Clone)]
pub(crate) struct PointReader {
    client: Client,
    runtime: Handle,
    part: ByteRange,
    position: u64,
    /// The last stretch that was read, and where it begins on the point.
    stretch: (u64, Bytes),
}

impl PointReader {
    /// All of the point behind `client`, whose connection runs on `runtime`.
    pub(crate) fn new(client: Client, runtime: Handle) -> Self {
        let part = ByteRange::between(ByteOffset::ZERO, ByteOffset(client.size().0));
        Self { client, runtime, part, position: 0, stretch: (0, Bytes::new()) }
    }

    /// A part of it, cut at its end.
    pub(crate) fn part(&self, part: ByteRange) -> Self {
        let clamp =
            |at: ByteOffset| ByteOffset((self.part.start().0.saturating_add(at.0)).min(self.part.end().0));
        let part = ByteRange::between(clamp(part.start()), clamp(part.end()));
        Self { part, position: 0, ..self.clone() }
    }

    /// How many bytes it has.
    pub(crate) fn size(&self) -> ByteCount {
        self.part.count()
    }

    /// Fills `buffer` from `offset` on.
    pub(crate) fn read_at(&mut self, offset: u64, buffer: &mut [u8]) -> io::Result<()> {
        let end = offset.checked_add(buffer.len() as u64).filter(|end| *end <= self.size().0);
        if end.is_none() {
            return Err(io::ErrorKind::UnexpectedEof.into());
        }
        let (mut at, mut done) = (self.part.start().0 + offset, 0);
        while done < buffer.len() {
            let (start, stretch) = self.stretch_with(at, buffer.len() - done)?;
            let from = usize::try_from(at - start).expect("within a stretch");
            let count = (stretch.len() - from).min(buffer.len() - done);
            buffer[done..done + count].copy_from_slice(&stretch[from..from + count]);
            (at, done) = (at + count as u64, done + count);
        }
        Ok(())
    }

    /// The stretch that has the byte `at` of the point, of `wanted` bytes from there on if it is read anew.
    fn stretch_with(&mut self, at: u64, wanted: usize) -> io::Result<(u64, Bytes)> {
        let (start, stretch) = &self.stretch;
        if (*start..start + stretch.len() as u64).contains(&at) {
            return Ok((*start, stretch.clone()));
        }
        let start = at / STRETCH * STRETCH;
        // As long as one request may be, for a long read.
        let end = at.saturating_add((wanted as u64).min(1 << 20)).next_multiple_of(STRETCH);
        let count = ByteCount(end.min(self.client.size().0) - start);
        let read = self.runtime.block_on(self.client.read(ByteOffset(start), count));
        let stretch = read.map_err(io::Error::other)?;
        self.stretch = (start, stretch.clone());
        Ok((start, stretch))
    }
}

impl ext4_view::Ext4Read for PointReader {
    fn read(
        &mut self,
        start_byte: u64,
        dst: &mut [u8],
    ) -> Result<(), Box<dyn std::error::Error + Send + Sync + 'static>> {
        self.read_at(start_byte, dst).map_err(Into::into)
    }
}

impl Read for PointReader {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        let left = self.size().0.saturating_sub(self.position);
        let count = buffer.len().min(usize::try_from(left).unwrap_or(usize::MAX));
        self.read_at(self.position, &mut buffer[..count])?;
        self.position += count as u64;
        Ok(count)
    }
}

impl Seek for PointReader {
    fn seek(&mut self, to: SeekFrom) -> io::Result<u64> {
        let position = match to {
            SeekFrom::Start(at) => Some(at),
            SeekFrom::End(by) => self.size().0.checked_add_signed(by),
            SeekFrom::Current(by) => self.position.checked_add_signed(by),
        };
        self.position = position.ok_or(io::ErrorKind::InvalidInput)?;
        Ok(self.position)
    }
}

/// Partition tables are read through a trait that could write them, too.
impl Write for PointReader {
    fn write(&mut self, _: &[u8]) -> io::Result<usize> {
        Err(io::ErrorKind::ReadOnlyFilesystem.into())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

impl fmt::Debug for PointReader {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "PointReader({})", self.part)
    }
}
