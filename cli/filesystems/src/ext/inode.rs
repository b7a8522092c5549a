//! Inodes: what they say of a file, and what of it stands in the inode itself.

use backtide_units::ByteCount;

use super::{
    Volume,
    checksum::{crc32c, crc32c_without, is_right},
};
use crate::{
    Error, Kind, Node, Source,
    fields::{byte, le16, le32, part},
};

/// What an inode has in all versions.
const OLD_SIZE: usize = 128;

/// Where the pointers to its blocks are, or what takes their place, and how long they are.
const POINTERS_AT: usize = 0x28;
pub(super) const POINTERS: usize = 60;

const ENCRYPTED: u32 = 0x800;
const INDEXED: u32 = 0x1000;
const EXTENTS: u32 = 0x8_0000;
const INLINE: u32 = 0x1000_0000;

/// What the attributes in an inode begin with.
const ATTRIBUTES_MAGIC: u32 = 0xea02_0000;

/// The attribute that goes on with a file's bytes: `data`, of the kind `system`.
const SYSTEM: u8 = 7;
const DATA: &[u8] = b"data";

/// An inode, and its bytes.
pub(super) struct Inode {
    pub(super) node: Node,
    /// What the checksums of its blocks begin with, where there are such.
    pub(super) seed: Option<u32>,
    flags: u32,
    bytes: Vec<u8>,
}

/// Reads and checks an inode.
pub(super) fn read(volume: &Volume, number: u64) -> Result<Inode, Error> {
    let mut bytes = vec![0; volume.superblock.inode_size];
    volume.source.read_at(volume.superblock.inode_at(&volume.source, number)?, &mut bytes)?;
    // Where there is room for them, newer fields take so many bytes.
    let extra = if bytes.len() > OLD_SIZE { usize::from(le16(&bytes, 0x80)?) } else { 0 };
    if OLD_SIZE + extra > bytes.len() || !extra.is_multiple_of(4) {
        return Err(Error::damaged("", format!("it says that {extra} bytes of it are newer fields")));
    }
    let seed = match volume.superblock.seed {
        None => None,
        Some(seed) => {
            // Numbers of inodes have 32 bits.
            let seed = crc32c(seed, &(number as u32).to_le_bytes());
            Some(crc32c(seed, part(&bytes, 0x64, 4)?))
        }
    };
    if let Some(seed) = seed {
        check(&bytes, seed, extra)?;
    }
    parse(bytes, (seed, extra), volume.superblock.has_large_directories)
}

/// Checks its checksum, the higher half of which is among the newer fields.
fn check(bytes: &[u8], seed: u32, extra: usize) -> Result<(), Error> {
    let (old, new) = bytes.split_at(OLD_SIZE);
    let (mut stored, mut found) = (u32::from(le16(old, 0x7c)?), crc32c_without(seed, old, 0x7c, 2));
    if extra >= 4 {
        stored |= u32::from(le16(new, 2)?) << 16;
        found = crc32c_without(found, new, 2, 2);
    } else {
        found = crc32c(found, new) & 0xffff;
    }
    if is_right(stored, found) { Ok(()) } else { Err(Error::damaged("", "its checksum is another")) }
}

fn parse(
    bytes: Vec<u8>,
    (seed, extra): (Option<u32>, usize),
    has_large_directories: bool,
) -> Result<Inode, Error> {
    let mode = le16(&bytes, 0)?;
    let kind = match mode & 0xf000 {
        _ if le16(&bytes, 0x1a)? == 0 => return Err(Error::damaged("", "it is free")),
        0x8000 => Kind::File,
        0x4000 => Kind::Directory,
        0xa000 => Kind::Symlink,
        0x1000 | 0x2000 | 0x6000 | 0xc000 => Kind::Special,
        _ => return Err(Error::damaged("", format!("it is of the mode {mode:#o}"))),
    };
    // Directories had something else where the higher half of a size is.
    let high = match kind {
        Kind::Directory if has_large_directories => le32(&bytes, 0x6c)?,
        Kind::File => le32(&bytes, 0x6c)?,
        Kind::Directory | Kind::Symlink | Kind::Special => 0,
    };
    let size = u64::from(high) << 32 | u64::from(le32(&bytes, 4)?);
    if size > u64::MAX >> 1 {
        return Err(Error::damaged("", format!("it says it has {size} bytes")));
    }
    let wide = |low: usize, high: usize| -> Result<u32, Error> {
        Ok(u32::from(le16(&bytes, high)?) << 16 | u32::from(le16(&bytes, low)?))
    };
    Ok(Inode {
        node: Node {
            kind,
            size: ByteCount(size),
            mode: mode & 0o7777,
            uid: wide(0x02, 0x78)?,
            gid: wide(0x18, 0x7a)?,
            modified_ns: time(&bytes, 0x10, (0x88, extra))?,
            changed_ns: time(&bytes, 0x0c, (0x84, extra))?,
        },
        seed,
        flags: le32(&bytes, 0x20)?,
        bytes,
    })
}

/// Seconds since 1970, to which a newer field adds 2 bits above and 30 bits of nanoseconds, if the inode has it.
fn time(bytes: &[u8], at: usize, (more_at, extra): (usize, usize)) -> Result<i128, Error> {
    let seconds = i128::from(le32(bytes, at)?.cast_signed());
    let more = if OLD_SIZE + extra >= more_at + 4 { le32(bytes, more_at)? } else { 0 };
    Ok((seconds + (i128::from(more & 3) << 32)) * 1_000_000_000 + i128::from(more >> 2))
}

impl Inode {
    pub(super) fn is_encrypted(&self) -> bool {
        self.flags & ENCRYPTED != 0
    }

    /// Whether it is a directory with an index.
    pub(super) fn is_indexed(&self) -> bool {
        self.flags & INDEXED != 0
    }

    pub(super) fn has_extents(&self) -> bool {
        self.flags & EXTENTS != 0
    }

    /// Whether its bytes stand in the inode itself.
    pub(super) fn is_inline(&self) -> bool {
        self.flags & INLINE != 0
    }

    /// The pointers to its blocks, or what takes their place.
    pub(super) fn pointers(&self) -> &[u8] {
        &self.bytes[POINTERS_AT..POINTERS_AT + POINTERS]
    }

    /// Both places in which bytes of it stand in the inode.
    pub(super) fn inline(&self) -> Result<[&[u8]; 2], Error> {
        Ok([self.pointers(), self.inline_attribute()?.unwrap_or_default()])
    }

    /// Its bytes, which stand in the inode.
    pub(super) fn inline_bytes(&self) -> Result<Vec<u8>, Error> {
        let mut bytes = self.inline()?.concat();
        let size = self.node.size.0;
        if size > bytes.len() as u64 {
            let why = format!("it says that {size} bytes are in it, and {} are", bytes.len());
            return Err(Error::damaged("", why));
        }
        bytes.truncate(size as usize);
        Ok(bytes)
    }

    fn inline_attribute(&self) -> Result<Option<&[u8]>, Error> {
        if self.bytes.len() <= OLD_SIZE {
            return Ok(None);
        }
        let start = OLD_SIZE + usize::from(le16(&self.bytes, 0x80)?);
        let attributes = self.bytes.get(start..).unwrap_or_default();
        if le32(attributes, 0).ok() != Some(ATTRIBUTES_MAGIC) {
            return Ok(None);
        }
        let attributes = &attributes[4..];
        let mut at = 0;
        // Four zeroes end them, unless there is no room for more.
        while le32(attributes, at).is_ok_and(|first| first != 0) {
            let length = usize::from(byte(attributes, at)?);
            let name = part(attributes, at + 16, length)?;
            if byte(attributes, at + 1)? == SYSTEM && name == DATA {
                if le32(attributes, at + 4)? != 0 {
                    return Err(Error::damaged("", "its bytes are said to be in another inode"));
                }
                let value = (usize::from(le16(attributes, at + 2)?), le32(attributes, at + 8)? as usize);
                return Ok(Some(part(attributes, value.0, value.1)?));
            }
            at += (16 + length).next_multiple_of(4);
        }
        Ok(None)
    }
}
