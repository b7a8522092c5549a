//! Which partitions and logical volumes a point has, and what seems to be in each.

use std::{io, rc::Rc};

use backtide_filesystems::{
    Source, Window,
    lvm::{self, LogicalBytes, Segment},
    partitions::{Mark, table},
};
use backtide_units::{ByteCount, ByteOffset, ByteRange};
use serde::Serialize;

use super::PointReader;

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

    /// Where its mark is on a disk that holds it as a whole.
    fn mark(self) -> Mark {
        match self {
            Self::Xfs | Self::Ntfs | Self::Luks | Self::Fat => Mark::InItsPlace,
            Self::Ext4 | Self::Btrfs | Self::Lvm | Self::Swap => Mark::Behind,
            Self::Unknown => Mark::None,
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
    let ranges = table(disk.as_ref(), whole.mark())?;
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
