//! Reading and writing an image by calls that wait until it is done, or that do only what needs no
//! waiting.
//!
//! Invariant: nothing is written beyond the image's end, which would make it grow.

use std::{io, os::unix::fs::FileExt, sync::atomic::Ordering};

use backtide_units::{ByteCount, ByteOffset, ByteRange};
use bytes::Bytes;
use rustix::{
    fs::FallocateFlags,
    io::{Errno, ReadWriteFlags},
};

use super::{ImageFile, direct};

/// How far a write got that was not to wait.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Wrote {
    /// All of it is written.
    All,
    /// It has to wait; some of it may be written.
    WouldWait,
    /// The file system cannot tell: nothing is written.
    CannotTell,
}

/// Zeroes are written in pieces of this size where the file system cannot make them.
#[repr(align(4096))]
struct Zeroes([u8; 64 * 1024]);

static ZEROES: Zeroes = Zeroes([0; 64 * 1024]);

/// As much is zeroed behind the end of a file to see whether it can be.
const PROBE_BYTES: u64 = 4096;

impl ImageFile {
    /// Reads a range without waiting for a device, if the page cache has all of it.
    ///
    /// # Errors
    /// The operating system's.
    pub fn try_read(&self, range: ByteRange) -> io::Result<Option<Bytes>> {
        if self.direct.is_some() {
            return Ok(None);
        }
        let mut buffer = self.buffers.take(range.count());
        let wanted = buffer.len();
        let mut slices = [io::IoSliceMut::new(&mut buffer)];
        let flags = ReadWriteFlags::NOWAIT;
        match rustix::io::preadv2(&self.file, &mut slices, range.start().0, flags) {
            Ok(read) => Ok((read == wanted).then(|| buffer.freeze())),
            Err(Errno::AGAIN | Errno::OPNOTSUPP | Errno::INTR | Errno::NOSYS) => Ok(None),
            Err(errno) => Err(errno.into()),
        }
    }

    /// Reads a range.
    ///
    /// # Errors
    /// The operating system's; also at the end of a file that was cut short.
    pub fn read(&self, range: ByteRange) -> io::Result<Bytes> {
        let outer = self.direct.map_or(range, |alignment| alignment.widen(range));
        let mut buffer = self.buffers.take(outer.count());
        self.file.read_exact_at(&mut buffer, outer.start().0)?;
        let skipped = (range.start().0 - outer.start().0) as usize;
        let wanted = range.count().0 as usize;
        Ok(buffer.freeze().slice(skipped..skipped + wanted))
    }

    /// Fills `buffer` from `offset`.
    ///
    /// # Errors
    /// The operating system's; also at the end of a file that was cut short.
    pub fn read_at(&self, offset: ByteOffset, buffer: &mut [u8]) -> io::Result<()> {
        match self.direct {
            None => self.file.read_exact_at(buffer, offset.0),
            Some(alignment) => direct::read(&self.file, alignment, &self.buffers, offset, buffer),
        }
    }

    /// Writes all of `data` at `offset`.
    ///
    /// # Errors
    /// The operating system's.
    pub fn write_at(&self, offset: ByteOffset, data: &[u8]) -> io::Result<()> {
        self.require_inside(offset, ByteCount::of(data))?;
        match self.direct {
            None => self.file.write_all_at(data, offset.0),
            Some(alignment) => direct::write(&self.file, alignment, &self.buffers, offset, data),
        }
    }

    /// Writes `data` at `offset` into the page cache as far as that needs no waiting: neither for a
    /// device nor for other writes. A write that has to wait is to be done anew, all of it.
    ///
    /// # Errors
    /// The operating system's.
    pub fn try_write(&self, offset: ByteOffset, data: &[u8]) -> io::Result<Wrote> {
        self.require_inside(offset, ByteCount::of(data))?;
        if self.direct.is_some() {
            return Ok(Wrote::WouldWait);
        }
        if self.cannot_tell.load(Ordering::Relaxed) {
            return Ok(Wrote::CannotTell);
        }
        let slices = [io::IoSlice::new(data)];
        match rustix::io::pwritev2(&self.file, &slices, offset.0, ReadWriteFlags::NOWAIT) {
            Ok(written) if written == data.len() => Ok(Wrote::All),
            Ok(_) | Err(Errno::AGAIN | Errno::INTR) => Ok(Wrote::WouldWait),
            Err(Errno::OPNOTSUPP | Errno::INVAL | Errno::NOSYS) => {
                self.cannot_tell.store(true, Ordering::Relaxed);
                Ok(Wrote::CannotTell)
            }
            Err(errno) => Err(errno.into()),
        }
    }

    /// Writes all of `data` at `offset`, to stable storage.
    ///
    /// # Errors
    /// The operating system's.
    pub fn write_stable(&self, offset: ByteOffset, data: &[u8]) -> io::Result<()> {
        self.require_inside(offset, ByteCount::of(data))?;
        let range = ByteRange::new(offset, ByteCount::of(data)).expect("inside the image");
        let as_it_is = self.direct.is_none_or(|direct| direct.takes(range) && direct.takes_memory(data));
        if as_it_is && self.syncs_ranges {
            // Only this range has to be stable, where a sync would be for all that was ever written.
            let slices = [io::IoSlice::new(data)];
            match rustix::io::pwritev2(&self.file, &slices, offset.0, ReadWriteFlags::DSYNC) {
                Ok(written) if written == data.len() => return Ok(()),
                // Not this system, or only a part: the long way.
                Ok(_) | Err(Errno::OPNOTSUPP | Errno::INVAL | Errno::NOSYS | Errno::INTR) => {}
                Err(errno) => return Err(errno.into()),
            }
        }
        self.write_at(offset, data)?;
        self.sync()
    }

    /// Makes the range read as zeroes; `may_unmap`: its space may be given back.
    ///
    /// # Errors
    /// The operating system's.
    pub fn zero(&self, range: ByteRange, may_unmap: bool) -> io::Result<()> {
        self.require_inside(range.start(), range.count())?;
        // A device makes zeroes of whole blocks only; what is around them is written.
        let first = range.start().0.next_multiple_of(self.zero_block);
        let last = range.end().0 / self.zero_block * self.zero_block;
        if first >= last {
            return self.write_zeroes(range);
        }
        let (first, last) = (ByteOffset(first), ByteOffset(last));
        self.write_zeroes(ByteRange::between(range.start(), first))?;
        self.zero_blocks(ByteRange::between(first, last), may_unmap)?;
        self.write_zeroes(ByteRange::between(last, range.end()))
    }

    fn zero_blocks(&self, range: ByteRange, may_unmap: bool) -> io::Result<()> {
        let how = if may_unmap { FallocateFlags::PUNCH_HOLE } else { FallocateFlags::ZERO_RANGE };
        let flags = how | FallocateFlags::KEEP_SIZE;
        loop {
            match rustix::fs::fallocate(&self.file, flags, range.start().0, range.count().0) {
                Ok(()) => return Ok(()),
                Err(Errno::INTR) => {}
                // Not this file system, or not at this alignment of this device.
                Err(Errno::OPNOTSUPP | Errno::NOSYS | Errno::INVAL | Errno::NODEV) => {
                    return self.write_zeroes(range);
                }
                Err(errno) => return Err(errno.into()),
            }
        }
    }

    /// Whether [`zero`](Self::zero) is a matter of the file system's books, not of writing zeroes. Found
    /// out behind the end of the file, where there is nothing: ask it before the first such change, not
    /// of a disk that nobody changes. A device is never known to be fast.
    pub fn zeroes_fast(&self, may_unmap: bool) -> bool {
        if self.is_device {
            return false;
        }
        let punch = FallocateFlags::PUNCH_HOLE | FallocateFlags::KEEP_SIZE;
        let zero = FallocateFlags::ZERO_RANGE | FallocateFlags::KEEP_SIZE;
        let done = |flags| rustix::fs::fallocate(&self.file, flags, self.size.0, PROBE_BYTES).is_ok();
        if may_unmap {
            return done(punch);
        }
        let zeroes = done(zero);
        // The space that this has taken is given back; where that cannot be, it is a block.
        let _ = zeroes && done(punch);
        zeroes
    }

    /// A write beyond the end would grow the file, and the guest's disk has no such place.
    pub(crate) fn require_inside(&self, offset: ByteOffset, count: ByteCount) -> io::Result<()> {
        match offset.checked_add(count) {
            Some(end) if end.0 <= self.size.0 => Ok(()),
            Some(_) | None => Err(io::Error::new(
                io::ErrorKind::InvalidInput,
                format!("{count} bytes at {offset} end beyond the image's {} bytes", self.size),
            )),
        }
    }

    fn write_zeroes(&self, range: ByteRange) -> io::Result<()> {
        for piece in range.split_at_multiples(ByteCount(ZEROES.0.len() as u64)) {
            let length = usize::try_from(piece.count().0).expect("a piece is small");
            self.write_at(piece.start(), &ZEROES.0[..length])?;
        }
        Ok(())
    }

    /// Everything written so far to stable storage. Direct writes need it too: the device has a cache, and
    /// the file system's own tables are in memory.
    ///
    /// # Errors
    /// The operating system's.
    pub fn sync(&self) -> io::Result<()> {
        self.file.sync_data()
    }
}
