//! Tables of partitions: GPT, and the boot records of before with their chain of logical partitions.

use std::{
    fmt,
    io::{self, Read, Seek, SeekFrom, Write},
};

use backtide_units::{ByteCount, ByteOffset, ByteRange};
use gpt::{GptConfig, disk::LogicalBlockSize};

use crate::Source;

const SECTOR: u64 = 512;

/// Logical partitions that are looked for: a table can be a circle.
const LOGICAL_MAX: u32 = 128;

/// Bytes of an entry of a GPT: the only length that is in use.
const ENTRY_LENGTH: u32 = 128;

/// Entries of a GPT: there are 128 nearly everywhere.
const ENTRIES_MAX: u32 = 1024;

/// Where the disk as a whole has the mark of something that is known.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Mark {
    /// Nowhere.
    None,
    /// Where a table would be.
    InItsPlace,
    /// Behind that: it may be what was there before the table.
    Behind,
}

/// The partitions of a disk, by their numbers; none when there is no table.
///
/// # Errors
/// When it cannot be read, or its table is damaged.
pub fn table(disk: &dyn Source, mark: Mark) -> io::Result<Vec<(u32, ByteRange)>> {
    let mut first = [0; SECTOR as usize];
    // A file system that begins where a table would be lies on a bare disk: FAT has a table's signature, too.
    if disk.size().0 < 2 * SECTOR || mark == Mark::InItsPlace {
        return Ok(Vec::new());
    }
    disk.read_at(ByteOffset::ZERO, &mut first)?;
    if first[510..] != [0x55, 0xaa] {
        return Ok(Vec::new());
    }
    // What has its mark further behind may be what was there before the table.
    let is_sure = mark == Mark::None;
    if primary(&first).any(|(kind, _)| kind == 0xee) {
        return match gpt_partitions(disk) {
            Err(_) if !is_sure => Ok(Vec::new()),
            found => found,
        };
    }
    let sectors = disk.size().0 / SECTOR;
    let is_inside = |(kind, (start, count)): (u8, (u64, u64))| {
        kind != 0 && start > 0 && count > 0 && start + count <= sectors
    };
    if is_sure || primary(&first).any(is_inside) { mbr_partitions(disk, &first) } else { Ok(Vec::new()) }
}

/// Refuses a header of a table that `gpt` would panic about or take memory for without bounds: the numbers are
/// the guest's, and a checksum keeps nobody from writing any.
fn check_gpt_header(disk: &dyn Source, at: u64) -> io::Result<()> {
    let mut header = [0; 92];
    disk.read_at(ByteOffset(at), &mut header)?;
    if header[..8] != *b"EFI PART" {
        return Ok(());
    }
    let number = |at: usize| u32::from_le_bytes(header[at..at + 4].try_into().expect("four bytes"));
    let (entries, length) = (number(80), number(84));
    if length == ENTRY_LENGTH && entries <= ENTRIES_MAX {
        return Ok(());
    }
    let why = format!(
        "the partition table (GPT) says it has {entries} entries of {length} bytes; \
         {ENTRIES_MAX} of {ENTRY_LENGTH} at most can be read here"
    );
    Err(io::Error::new(io::ErrorKind::InvalidData, why))
}

fn gpt_partitions(disk: &dyn Source) -> io::Result<Vec<(u32, ByteRange)>> {
    // Either header may be the one that is used: the second takes the place of a damaged first.
    let last = (disk.size().0 / SECTOR).saturating_sub(1) * SECTOR;
    for at in [SECTOR, last] {
        check_gpt_header(disk, at)?;
    }
    let block = LogicalBlockSize::Lb512;
    let config = GptConfig::new().writable(false).logical_block_size(block);
    let table = config.open_from_device(Device { disk, position: 0 }).map_err(io::Error::other)?;
    let mut ranges = Vec::new();
    for (number, partition) in table.partitions() {
        let (start, length) = (partition.bytes_start(block)?, partition.bytes_len(block)?);
        let range = ByteRange::new(ByteOffset(start), ByteCount(length));
        ranges.push((*number, range.ok_or(io::ErrorKind::InvalidData)?));
    }
    Ok(ranges)
}

/// The four entries of a boot record, with their kind and the sectors they name.
fn primary(sector: &[u8; SECTOR as usize]) -> impl Iterator<Item = (u8, (u64, u64))> + '_ {
    sector[446..510].chunks_exact(16).map(|entry| {
        let number = |at: usize| u32::from_le_bytes(entry[at..at + 4].try_into().expect("four bytes"));
        (entry[4], (u64::from(number(8)), u64::from(number(12))))
    })
}

fn is_extended(kind: u8) -> bool {
    matches!(kind, 0x05 | 0x0f | 0x85)
}

fn sectors(start: u64, count: u64) -> ByteRange {
    // Numbers of 32 bits each: far below what a byte offset can be.
    let start = ByteOffset(start * SECTOR);
    ByteRange::new(start, ByteCount(count * SECTOR)).expect("sectors of 32 bits")
}

fn mbr_partitions(disk: &dyn Source, first: &[u8; SECTOR as usize]) -> io::Result<Vec<(u32, ByteRange)>> {
    let mut ranges = Vec::new();
    let mut extended = None;
    for (number, (kind, (start, count))) in (1..).zip(primary(first)) {
        match kind {
            _ if count == 0 => {}
            kind if is_extended(kind) => extended = Some(start),
            _ => ranges.push((number, sectors(start, count))),
        }
    }
    let Some(base) = extended else { return Ok(ranges) };
    // Each boot record of the chain names one partition, relative to itself, and the next record, relative
    // to the first.
    let mut at = base;
    let mut number = 5;
    for _ in 0..LOGICAL_MAX {
        let mut record = [0; SECTOR as usize];
        disk.read_at(ByteOffset(at * SECTOR), &mut record)?;
        if record[510..] != [0x55, 0xaa] {
            return Err(io::Error::new(
                io::ErrorKind::InvalidData,
                "the table of logical partitions is damaged",
            ));
        }
        let mut next = None;
        for (kind, (start, count)) in primary(&record).take(2) {
            match kind {
                // Linux has no number for it.
                _ if count == 0 => {}
                kind if is_extended(kind) => next = next.or(Some(base + start)),
                _ => {
                    ranges.push((number, sectors(at + start, count)));
                    number += 1;
                }
            }
        }
        match next {
            Some(next) => at = next,
            None => break,
        }
    }
    Ok(ranges)
}

/// A disk for code that reads as from a file.
struct Device<'a> {
    disk: &'a dyn Source,
    position: u64,
}

impl Read for Device<'_> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        let left = self.disk.size().0.saturating_sub(self.position);
        let count = buffer.len().min(usize::try_from(left).unwrap_or(usize::MAX));
        self.disk.read_at(ByteOffset(self.position), &mut buffer[..count])?;
        self.position += count as u64;
        Ok(count)
    }
}

impl Seek for Device<'_> {
    fn seek(&mut self, to: SeekFrom) -> io::Result<u64> {
        let position = match to {
            SeekFrom::Start(at) => Some(at),
            SeekFrom::End(by) => self.disk.size().0.checked_add_signed(by),
            SeekFrom::Current(by) => self.position.checked_add_signed(by),
        };
        self.position = position.ok_or(io::ErrorKind::InvalidInput)?;
        Ok(self.position)
    }
}

/// Tables are read through a trait that could write them, too.
impl Write for Device<'_> {
    fn write(&mut self, _: &[u8]) -> io::Result<usize> {
        Err(io::ErrorKind::ReadOnlyFilesystem.into())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

impl fmt::Debug for Device<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Device({} bytes)", self.disk.size())
    }
}
