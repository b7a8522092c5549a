//! Direct I/O to an image: around the page cache, in whole blocks of the device.
//!
//! What is not aligned is widened: a read takes the blocks around it, a write reads them, changes
//! its part and writes them back.
//!
//! Invariant: whoever writes holds the tracking blocks (4 KiB) it touches against every other change,
//! so the bytes written back around a write are those that were read. That is why an image whose
//! blocks are longer is refused.

use std::{fs::File, io, os::unix::fs::FileExt, path::Path};

use backtide_units::{ByteCount, ByteOffset, ByteRange};
use rustix::fs::{AtFlags, StatxFlags};

use crate::buffer::{BUFFER_ALIGNMENT, BufferPool};

/// What direct I/O to an image has to be multiples of.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Alignment {
    /// Offsets and lengths, in bytes; a power of two, at most 4096.
    pub block: u32,
    /// Addresses in memory, in bytes; a power of two, at most 4096.
    pub memory: u32,
}

/// The longest block a change may be widened to: what the filter's guard holds at once.
pub(super) const BLOCK_MAX: u32 = 4096;

/// Where nobody tells: what every device takes.
const UNKNOWN: u32 = 4096;

impl Alignment {
    /// Of an open image, as its file system or device tells; none when it takes no direct I/O.
    pub(super) fn of(file: &File, is_device: bool) -> io::Result<Option<Self>> {
        if let Ok(told) = rustix::fs::statx(file, c"", AtFlags::EMPTY_PATH, StatxFlags::DIOALIGN)
            && told.stx_mask & StatxFlags::DIOALIGN.bits() != 0
        {
            let (block, memory) = (told.stx_dio_offset_align, told.stx_dio_mem_align);
            return Ok((block != 0).then_some(Self { block, memory }));
        }
        let block = if is_device { rustix::fs::ioctl_blksszget(file)? } else { block_of_file_system(file) };
        Ok(Some(Self { block, memory: block }))
    }

    /// Whether blocks and buffers of this kind can be served.
    pub(super) fn is_usable(self) -> bool {
        let usable = |bytes: u32, most: u32| bytes.is_power_of_two() && bytes <= most;
        usable(self.block, BLOCK_MAX) && usable(self.memory, BUFFER_ALIGNMENT as u32)
    }

    /// At least blocks and buffers of `bytes`.
    #[must_use]
    pub(super) fn at_least(self, bytes: u32) -> Self {
        Self { block: self.block.max(bytes), memory: self.memory.max(bytes) }
    }

    /// Whether a range consists of whole blocks.
    pub fn takes(self, range: ByteRange) -> bool {
        let block = u64::from(self.block);
        range.start().0.is_multiple_of(block) && range.end().0.is_multiple_of(block)
    }

    /// Whether the device can reach `memory` as it lies.
    pub fn takes_memory(self, memory: &[u8]) -> bool {
        memory.as_ptr().addr().is_multiple_of(self.memory as usize)
    }

    /// The whole blocks around `range`.
    #[must_use]
    pub fn widen(self, range: ByteRange) -> ByteRange {
        let block = u64::from(self.block);
        let start = range.start().0 / block * block;
        ByteRange::between(ByteOffset(start), ByteOffset(range.end().0.next_multiple_of(block)))
    }
}

/// File systems on which the flag `RWF_DSYNC` holds for a direct write that ends later, as those of an io_uring do:
/// ext4, XFS and F2FS. FUSE completes such a write without a sync, and so did Btrfs before Linux 6.1.
const KEEPING_THE_FLAG: [u32; 3] = [0xef53, 0x5846_5342, 0xf2f5_2010];

/// Whether a direct write that is to be stable needs no more than that flag when it ends later.
pub(super) fn keeps_flag(file: &File, is_device: bool) -> bool {
    let is_known = |found: rustix::fs::StatFs| {
        // The magic numbers are of 32 bits, whatever the field is of this processor.
        KEEPING_THE_FLAG.contains(&(found.f_type as u32))
    };
    is_device || rustix::fs::fstatfs(file).is_ok_and(is_known)
}

/// The logical block of the device that a file lies on.
fn block_of_file_system(file: &File) -> u32 {
    let told = || -> Option<u32> {
        let device = rustix::fs::fstat(file).ok()?.st_dev;
        let place = format!("/sys/dev/block/{}:{}", rustix::fs::major(device), rustix::fs::minor(device));
        // A partition has no queue of its own.
        ["queue", "../queue"].iter().find_map(|queue| {
            let text = std::fs::read_to_string(Path::new(&place).join(queue).join("logical_block_size"));
            text.ok()?.trim().parse().ok()
        })
    };
    told().unwrap_or(UNKNOWN)
}

/// Fills `buffer` from `offset`.
pub(super) fn read(
    file: &File,
    alignment: Alignment,
    pool: &BufferPool,
    offset: ByteOffset,
    buffer: &mut [u8],
) -> io::Result<()> {
    let range = range_of(offset, buffer);
    if alignment.takes(range) && alignment.takes_memory(buffer) {
        return file.read_exact_at(buffer, offset.0);
    }
    let outer = alignment.widen(range);
    let mut blocks = pool.take(outer.count());
    file.read_exact_at(&mut blocks, outer.start().0)?;
    let skipped = (offset.0 - outer.start().0) as usize;
    buffer.copy_from_slice(&blocks[skipped..skipped + buffer.len()]);
    Ok(())
}

/// Writes all of `data` at `offset`.
pub(super) fn write(
    file: &File,
    alignment: Alignment,
    pool: &BufferPool,
    offset: ByteOffset,
    data: &[u8],
) -> io::Result<()> {
    let range = range_of(offset, data);
    if alignment.takes(range) {
        return match alignment.takes_memory(data) {
            true => file.write_all_at(data, offset.0),
            false => file.write_all_at(&pool.copy_of(data), offset.0),
        };
    }
    let outer = alignment.widen(range);
    let mut blocks = pool.take(outer.count());
    let block = alignment.block as usize;
    let last = blocks.len() - block;
    if outer.start() != range.start() || last == 0 {
        file.read_exact_at(&mut blocks[..block], outer.start().0)?;
    }
    if outer.end() != range.end() && last > 0 {
        file.read_exact_at(&mut blocks[last..], outer.start().0 + last as u64)?;
    }
    let skipped = (offset.0 - outer.start().0) as usize;
    blocks[skipped..skipped + data.len()].copy_from_slice(data);
    file.write_all_at(&blocks, outer.start().0)
}

fn range_of(offset: ByteOffset, buffer: &[u8]) -> ByteRange {
    ByteRange::new(offset, ByteCount::of(buffer)).expect("inside the image")
}
