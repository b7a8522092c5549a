//! Which partitions and logical volumes a point has, and what seems to be in each.

use std::{io, rc::Rc};

use backtide_filesystems::{
    Source, Window,
    lvm::{self, LogicalBytes, Segment},
};
use backtide_units::{ByteCount, ByteOffset, ByteRange};
use gpt::{GptConfig, disk::LogicalBlockSize};
use serde::Serialize;

use super::PointReader;

const SECTOR: u64 = 512;

/// Logical partitions that are looked for: a table can be a circle.
const LOGICAL_MAX: u32 = 128;

/// Bytes of an entry of a GPT: the only length that is in use.
const ENTRY_LENGTH: u32 = 128;

/// Entries of a GPT: there are 128 nearly everywhere.
const ENTRIES_MAX: u32 = 1024;

/// A part of a disk.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub(crate) struct Partition {
    /// Its number as Linux gives it; 0 is a disk without partitions.
    pub(crate) number: u32,
    /// Its first byte.
    pub(crate) offset: ByteOffset,
    /// How many bytes.
    pub(crate) length: ByteCount,
    /// What it seems to hold.
    pub(crate) content: Content,
    /// Why that cannot be told, when its beginning cannot be read.
    #[serde(skip)]
    pub(super) unread: Option<String>,
}

/// What a partition seems to hold.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
pub(crate) enum Content {
    /// ext2, ext3 or ext4.
    Ext4,
    /// XFS.
    Xfs,
    /// Btrfs.
    Btrfs,
    /// NTFS.
    Ntfs,
    /// FAT.
    Fat,
    /// A physical volume of LVM.
    Lvm,
    /// An encrypted volume.
    Luks,
    /// Swap space.
    Swap,
    /// Nothing that is known here.
    Unknown,
}

impl Content {
    /// Whether its files can be read here.
    pub(crate) fn is_readable(self) -> bool {
        match self {
            Self::Ext4 | Self::Xfs | Self::Ntfs | Self::Fat => true,
            Self::Btrfs | Self::Lvm | Self::Luks | Self::Swap | Self::Unknown => false,
        }
    }

    /// Whether its mark is where a table of partitions would be.
    fn is_in_first_sector(self) -> bool {
        match self {
            Self::Xfs | Self::Ntfs | Self::Luks | Self::Fat => true,
            Self::Ext4 | Self::Btrfs | Self::Lvm | Self::Swap | Self::Unknown => false,
        }
    }

    /// What people call those whose files can be read here.
    pub(crate) fn readable_names() -> &'static str {
        "ext2/3/4, XFS, NTFS and FAT"
    }

    /// What people call it.
    pub(crate) fn name(self) -> &'static str {
        match self {
            Self::Ext4 => "ext2/3/4",
            Self::Xfs => "XFS",
            Self::Btrfs => "Btrfs",
            Self::Ntfs => "NTFS",
            Self::Fat => "FAT",
            Self::Lvm => "LVM",
            Self::Luks => "LUKS",
            Self::Swap => "swap",
            Self::Unknown => "unknown",
        }
    }
}

impl Partition {
    /// Its bytes on the disk.
    pub(crate) fn range(&self) -> ByteRange {
        let end = self.offset.0.saturating_add(self.length.0);
        ByteRange::between(self.offset, ByteOffset(end))
    }
}

/// A logical volume of LVM.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub(crate) struct LogicalVolume {
    /// The group's name and its own: `group/name`.
    pub(crate) name: String,
    /// How many bytes.
    pub(crate) length: ByteCount,
    /// What it seems to hold.
    pub(crate) content: Content,
    /// Why it cannot be read, when it cannot.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(crate) unreadable: Option<String>,
    /// Why it cannot be told what it holds, when its beginning cannot be read.
    #[serde(skip)]
    pub(super) unread: Option<String>,
    /// Where its bytes are.
    #[serde(skip)]
    segments: Vec<Segment>,
}

impl LogicalVolume {
    /// Its bytes.
    pub(crate) fn bytes(&self, disk: Rc<dyn Source>) -> LogicalBytes {
        LogicalBytes::new(disk, self.segments.clone())
    }

    /// Where bytes of it are on the disk.
    pub(crate) fn on_disk(&self, range: ByteRange) -> Vec<ByteRange> {
        lvm::on_disk(&self.segments, range)
    }
}

/// The logical volumes whose physical volumes are among `partitions`, and what kept others from being found.
pub(crate) fn logical_volumes(
    disk: &Rc<PointReader>,
    partitions: &[Partition],
) -> (Vec<LogicalVolume>, Option<backtide_filesystems::Error>) {
    let (mut physicals, mut damage) = (Vec::new(), None);
    for partition in partitions.iter().filter(|partition| partition.content == Content::Lvm) {
        let window = Window::new(Rc::clone(disk) as Rc<dyn Source>, partition.range());
        match lvm::physical(&window) {
            Ok(physical) => physicals.push((partition.range(), physical)),
            Err(error) => damage = damage.or(Some(error)),
        }
    }
    let found = lvm::logical_volumes(&physicals).unwrap_or_else(|error| {
        damage.get_or_insert(error);
        Vec::new()
    });
    let found = found.into_iter().map(|logical| {
        let (segments, unreadable) = match logical.segments {
            Ok(segments) => (segments, None),
            Err(why) => (Vec::new(), Some(why)),
        };
        let bytes = LogicalBytes::new(Rc::clone(disk) as Rc<dyn Source>, segments.clone());
        let (content, unread) = content_or_why(&bytes);
        let name = format!("{}/{}", logical.group, logical.name);
        LogicalVolume { name, length: logical.length, content, unreadable, unread, segments }
    });
    (found.collect(), damage)
}

/// The partitions of a disk, or the disk as a whole when it has no table.
///
/// # Errors
/// When it cannot be read, or its table is damaged.
pub(crate) fn partitions(disk: &Rc<PointReader>) -> io::Result<Vec<Partition>> {
    let (whole, unread) = content_or_why(disk.as_ref());
    let ranges = table(disk, whole)?;
    if ranges.is_empty() {
        let (offset, length) = (ByteOffset::ZERO, disk.size());
        return Ok(vec![Partition { number: 0, offset, length, content: whole, unread }]);
    }
    let found = ranges.into_iter().map(|(number, range)| {
        let part = Window::new(Rc::clone(disk) as Rc<dyn Source>, range);
        let (content, unread) = content_or_why(&part);
        Partition { number, offset: range.start(), length: part.size(), content, unread }
    });
    Ok(found.collect())
}

/// The partitions of a disk that seems to hold `whole`, by their numbers; none when there is no table.
fn table(disk: &PointReader, whole: Content) -> io::Result<Vec<(u32, ByteRange)>> {
    let mut first = [0; SECTOR as usize];
    // A file system that begins where a table would be lies on a bare disk: FAT has a table's signature, too.
    if disk.size().0 < 2 * SECTOR || whole.is_in_first_sector() {
        return Ok(Vec::new());
    }
    disk.read_at(ByteOffset::ZERO, &mut first)?;
    if first[510..] != [0x55, 0xaa] {
        return Ok(Vec::new());
    }
    // What has its mark further behind may be what was there before the table.
    let is_sure = whole == Content::Unknown;
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
fn check_gpt_header(disk: &PointReader, at: u64) -> io::Result<()> {
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

fn gpt_partitions(disk: &PointReader) -> io::Result<Vec<(u32, ByteRange)>> {
    // Either header may be the one that is used: the second takes the place of a damaged first.
    let last = (disk.size().0 / SECTOR).saturating_sub(1) * SECTOR;
    for at in [SECTOR, last] {
        check_gpt_header(disk, at)?;
    }
    let block = LogicalBlockSize::Lb512;
    let config = GptConfig::new().writable(false).logical_block_size(block);
    let table = config.open_from_device(disk.clone()).map_err(io::Error::other)?;
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

fn mbr_partitions(disk: &PointReader, first: &[u8; SECTOR as usize]) -> io::Result<Vec<(u32, ByteRange)>> {
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

/// What a volume seems to hold, or that this is unknown and why.
fn content_or_why(volume: &dyn Source) -> (Content, Option<String>) {
    match content(volume) {
        Ok(content) => (content, None),
        Err(error) => (Content::Unknown, Some(error.to_string())),
    }
}

/// What a volume seems to hold, by its marks.
fn content(volume: &dyn Source) -> io::Result<Content> {
    let marks: [(u64, &[u8], Content); 9] = [
        (1080, &[0x53, 0xef], Content::Ext4),
        (0, b"XFSB", Content::Xfs),
        (0x1_0040, b"_BHRfS_M", Content::Btrfs),
        (3, b"NTFS    ", Content::Ntfs),
        (0, b"LUKS\xba\xbe", Content::Luks),
        (536, b"LVM2 001", Content::Lvm),
        (4086, b"SWAPSPACE2", Content::Swap),
        (54, b"FAT1", Content::Fat),
        (82, b"FAT32", Content::Fat),
    ];
    for (at, mark, content) in marks {
        let mut found = vec![0; mark.len()];
        match volume.read_at(ByteOffset(at), &mut found) {
            Ok(()) if found == mark => return Ok(content),
            Ok(()) => {}
            // It ends before the mark.
            Err(error) if error.kind() == io::ErrorKind::UnexpectedEof => {}
            Err(error) => return Err(error),
        }
    }
    Ok(Content::Unknown)
}
