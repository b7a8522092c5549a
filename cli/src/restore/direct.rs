//! A target around the page cache: what is written goes to the device at once, and what is read back comes from it.
//!
//! Through the cache every byte of a restore is copied there, waits there for a flush at the end, and is read back
//! only then. Around it a piece can be read back while the next ones are written.
//!
//! Invariant: only whole blocks go this way. What is left of the last one is written through the cache; a direct
//! read of it sees that.

use std::{
    fs::File,
    io,
    os::{fd::AsRawFd, unix::fs::FileExt},
};

use backtide_storage::{BUFFER_ALIGNMENT, Buffer, BufferPool};
use backtide_units::{ByteCount, ByteOffset, ByteRange};
use rustix::fs::{AtFlags, Mode, OFlags, StatxFlags, open, statx};

/// What offsets and lengths are multiples of: as much as any device or file system that is taken asks for.
const BLOCK: u64 = BUFFER_ALIGNMENT as u64;

/// A second way to an open file.
pub(super) struct Direct {
    file: File,
    buffers: BufferPool,
    is_told: bool,
}

impl Direct {
    /// None when the file cannot be used like that.
    pub(super) fn of(file: &File) -> Option<Self> {
        let told = statx(file, c"", AtFlags::EMPTY_PATH, StatxFlags::DIOALIGN).ok();
        let told = told.filter(|told| told.stx_mask & StatxFlags::DIOALIGN.bits() != 0);
        if let Some(told) = &told {
            let usable = |align: u32| align != 0 && BLOCK.is_multiple_of(align.into());
            if !usable(told.stx_dio_offset_align) || !usable(told.stx_dio_mem_align) {
                return None;
            }
        }
        // The same file whatever its name is by now; flags belong to what was opened, so it is opened again.
        let same = format!("/proc/self/fd/{}", file.as_raw_fd());
        let flags = OFlags::RDWR | OFlags::DIRECT | OFlags::CLOEXEC;
        let direct = Self {
            file: open(same, flags, Mode::empty()).ok()?.into(),
            buffers: BufferPool::default(),
            is_told: told.is_some(),
        };
        // Some file systems take the flag and then nothing that is read or written.
        let mut block = direct.buffers.take(ByteCount(BLOCK));
        direct.file.read_at(&mut block, 0).ok()?;
        Some(direct)
    }

    /// Whether the system says that reads come from the device. Some file systems take the flag and read from memory
    /// all the same, and older kernels do not say.
    pub(super) fn is_told(&self) -> bool {
        self.is_told
    }

    /// Writes all of `data` at the start of `range`; `through` is the same file through the page cache.
    pub(super) fn write(&self, through: &File, range: ByteRange, data: &[u8]) -> io::Result<()> {
        let start = range.start().0;
        let whole = match start.is_multiple_of(BLOCK) {
            true => data.len() / BUFFER_ALIGNMENT * BUFFER_ALIGNMENT,
            false => 0,
        };
        let (blocks, rest) = data.split_at(whole);
        if !blocks.is_empty() {
            let written = match blocks.as_ptr().addr().is_multiple_of(BUFFER_ALIGNMENT) {
                true => self.file.write_all_at(blocks, start),
                false => self.file.write_all_at(&self.buffers.copy_of(blocks), start),
            };
            match written {
                // Not here, says the file system; a direct read sees what goes through the cache.
                Err(error) if error.kind() == io::ErrorKind::InvalidInput => {
                    through.write_all_at(blocks, start)?;
                }
                written => written?,
            }
        }
        through.write_all_at(rest, start + whole as u64)
    }

    /// The bytes of a range.
    pub(super) fn read(&self, range: ByteRange) -> io::Result<Buffer> {
        let (start, length) = (range.start().0 / BLOCK * BLOCK, range.count().0 as usize);
        let skipped = (range.start().0 - start) as usize;
        let around = ByteRange::between(ByteOffset(start), ByteOffset(range.end().0.next_multiple_of(BLOCK)));
        let mut buffer = self.buffers.take(around.count());
        // Only the end of the file ends a read before the blocks do.
        let mut read = 0;
        while read < skipped + length {
            match self.file.read_at(&mut buffer[read..], start + read as u64) {
                Ok(0) => return Err(io::ErrorKind::UnexpectedEof.into()),
                Ok(count) => read += count,
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) => return Err(error),
            }
        }
        if skipped == 0 && around == range {
            return Ok(buffer);
        }
        Ok(self.buffers.copy_of(&buffer[skipped..skipped + length]))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn range(start: u64, end: u64) -> ByteRange {
        ByteRange::between(ByteOffset(start), ByteOffset(end))
    }

    #[test]
    fn any_range_is_written_and_read_whatever_its_place_and_that_of_its_memory() {
        let directory = tempfile::tempdir().unwrap();
        let file = File::options().read(true).write(true).create_new(true).open(directory.path().join("f"));
        let file = file.unwrap();
        let mut model: Vec<u8> = (0..5 * BLOCK + 700).map(|at| (at % 251) as u8).collect();
        file.write_all_at(&model, 0).unwrap();
        let Some(direct) = Direct::of(&file) else { return };
        let end = model.len() as u64;
        let places = [0, 1, 512, BLOCK, BLOCK + 512, 3 * BLOCK, 5 * BLOCK, 5 * BLOCK + 699, end];
        let source: Vec<u8> = (0..end as usize + 1).map(|at| (at % 13) as u8 ^ 0x80).collect();
        for (number, &start) in places.iter().enumerate() {
            for &stop in &places[number..] {
                let data = &source[number % 2..][..(stop - start) as usize];
                direct.write(&file, range(start, stop), data).unwrap();
                model[start as usize..stop as usize].copy_from_slice(data);
                assert!(direct.read(range(start, stop)).unwrap()[..] == *data, "{start}..{stop}");
                assert!(direct.read(range(0, end)).unwrap()[..] == model, "{start}..{stop}");
            }
        }
        assert!(direct.read(range(0, end + 1)).is_err());
    }
    #[test]
    fn a_file_system_in_memory_is_not_taken_for_a_device() {
        let Ok(directory) = tempfile::tempdir_in("/dev/shm") else { return };
        let file = File::options().read(true).write(true).create_new(true).open(directory.path().join("f"));
        let direct = Direct::of(&file.unwrap());
        // It may take the flag, and says nothing of an alignment.
        assert!(direct.is_none_or(|direct| !direct.is_told()));
    }
}
