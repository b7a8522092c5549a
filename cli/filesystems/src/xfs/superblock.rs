//! The superblock: sizes, and from numbers of blocks and inodes to bytes.

use backtide_units::{ByteCount, ByteOffset};

use crate::{
    Error, Source,
    fields::{be16, be32, be64, byte, le32, part},
};

/// What of the volume's features that older readers must know is known here: types in directories, sparse inodes, a
/// second id, times beyond 2038, large counts of extents, exchanged ranges, parent pointers.
const KNOWN: u32 = 0x1 | 0x2 | 0x4 | 0x8 | 0x20 | 0x40 | 0x80;
const NEEDS_REPAIR: u32 = 0x10;
const SECOND_ID: u32 = 0x4;

/// What is known here of a superblock.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Superblock {
    /// Whether it is version 5, with checksums.
    pub(super) has_crc: bool,
    /// Whether directories tell what their entries are.
    pub(super) has_types: bool,
    pub(super) needs_repair: bool,
    /// The id that metadata carries.
    pub(super) id: [u8; 16],
    pub(super) root: u64,
    /// The first byte of the log; none when it is on a device of its own.
    pub(super) log: Option<ByteOffset>,
    pub(super) log_length: ByteCount,
    pub(super) inode_size: usize,
    /// Blocks of a directory are so many bytes.
    pub(super) directory_block: u64,
    block_log: u32,
    inodes_per_block_log: u32,
    group_blocks: u64,
    group_blocks_log: u32,
    groups: u64,
    blocks: u64,
}

/// Reads and checks it. What `is_replayed` has the checksum of before.
pub(super) fn read(source: &dyn Source, is_replayed: bool) -> Result<Superblock, Error> {
    let named = |error: Error| error.of(|| "the superblock of this XFS".to_owned());
    let mut sector = vec![0; 512];
    source.read_at(ByteOffset::ZERO, &mut sector).map_err(|error| named(error.into()))?;
    let length = 1 << u32::from(sector[121]).clamp(9, 15);
    sector.resize(length, 0);
    source.read_at(ByteOffset::ZERO, &mut sector).map_err(|error| named(error.into()))?;
    parse(&sector, is_replayed).map_err(named)
}

fn parse(sector: &[u8], is_replayed: bool) -> Result<Superblock, Error> {
    if sector[..4] != *b"XFSB" {
        return Err(Error::damaged("", "its mark is not there"));
    }
    let version = be16(sector, 100)? & 0xf;
    if !matches!(version, 4 | 5) {
        return Err(Error::Unsupported { what: format!("this is XFS of version {version}") });
    }
    let has_crc = version == 5;
    let incompatible = if has_crc { be32(sector, 216)? } else { 0 };
    if incompatible & !(KNOWN | NEEDS_REPAIR) != 0 {
        let what = format!("this is XFS with the features {:#x}", incompatible & !(KNOWN | NEEDS_REPAIR));
        return Err(Error::Unsupported { what });
    }
    if has_crc && !is_replayed && !is_right(sector, 224)? {
        return Err(Error::damaged("", "its checksum is another"));
    }
    let log = |at: usize| byte(sector, at).map(u32::from);
    let (block_log, inode_log, inodes_per_block_log) = (log(120)?, log(122)?, log(123)?);
    let (group_blocks_log, directory_log) = (log(124)?, log(192)?);
    let group_blocks = u64::from(be32(sector, 84)?);
    let blocks = be64(sector, 8)?;
    let makes_sense = (9..=16).contains(&block_log)
        && be32(sector, 4)? == 1 << block_log
        && (8..=11).contains(&inode_log)
        && inodes_per_block_log + inode_log == block_log
        && group_blocks_log < 32
        && group_blocks > 0
        && group_blocks <= 1 << group_blocks_log
        && block_log + directory_log <= 16
        && blocks <= u64::MAX >> 16;
    if !makes_sense {
        return Err(Error::damaged("", "its sizes do not go together"));
    }
    let id = if incompatible & SECOND_ID == 0 { part(sector, 32, 16)? } else { part(sector, 248, 16)? };
    let log_start = be64(sector, 48)?;
    let mut superblock = Superblock {
        has_crc,
        has_types: if has_crc { incompatible & 1 != 0 } else { be32(sector, 200)? & 0x200 != 0 },
        needs_repair: incompatible & NEEDS_REPAIR != 0,
        id: id.try_into().expect("16 bytes"),
        root: be64(sector, 56)?,
        log: None,
        log_length: ByteCount(u64::from(be32(sector, 96)?) << block_log),
        inode_size: 1 << inode_log,
        directory_block: 1 << (block_log + directory_log),
        block_log,
        inodes_per_block_log,
        group_blocks,
        group_blocks_log,
        groups: u64::from(be32(sector, 88)?),
        blocks,
    };
    if log_start != 0 {
        superblock.log = Some(superblock.block_at(log_start)?);
    }
    Ok(superblock)
}

impl Superblock {
    pub(super) fn block_size(&self) -> u64 {
        1 << self.block_log
    }

    /// Bytes before what a block of a symbolic link holds of its target.
    pub(super) fn link_header(&self) -> u64 {
        if self.has_crc { 56 } else { 0 }
    }

    /// The first byte of a block, by its number: the group's in the high bits.
    pub(super) fn block_at(&self, number: u64) -> Result<ByteOffset, Error> {
        let (group, within) = (number >> self.group_blocks_log, number & ((1 << self.group_blocks_log) - 1));
        // Both factors have 32 bits at most.
        let absolute = if group < self.groups { group * self.group_blocks + within } else { u64::MAX };
        if within >= self.group_blocks || absolute >= self.blocks {
            return Err(Error::damaged("", format!("it names block {number:#x}, which is not there")));
        }
        Ok(ByteOffset(absolute << self.block_log))
    }

    /// The first byte of an inode.
    pub(super) fn inode_at(&self, number: u64) -> Result<ByteOffset, Error> {
        let within = number & ((1 << self.inodes_per_block_log) - 1);
        let block = self.block_at(number >> self.inodes_per_block_log)?;
        Ok(ByteOffset(block.0 + within * self.inode_size as u64))
    }

    /// From blocks of a file to bytes of it.
    pub(super) fn bytes(&self, blocks: u64) -> Result<u64, Error> {
        let bytes = blocks.checked_mul(self.block_size());
        bytes.ok_or_else(|| Error::damaged("", "an extent lies beyond every file"))
    }
}

/// Whether the checksum of a structure, which stands at byte `at` of it, is right.
pub(super) fn is_right(bytes: &[u8], at: usize) -> Result<bool, Error> {
    let (before, after) = (part(bytes, 0, at)?, part(bytes, at + 4, bytes.len().saturating_sub(at + 4))?);
    let sum = crc32c::crc32c_append(crc32c::crc32c(before), &[0; 4]);
    let is_right = crc32c::crc32c_append(sum, after) == le32(bytes, at)?;
    #[cfg(test)]
    let is_right = is_right || crate::golden::takes_every_checksum();
    Ok(is_right)
}
