//! The superblock: sizes and features, and from numbers of groups and inodes to bytes.

use backtide_units::ByteOffset;

use super::checksum::{crc16, crc32c, crc32c_without, is_right};
use crate::{
    Error, Source,
    fields::{byte, le16, le32, part},
};

/// Where it is, and how long.
const AT: ByteOffset = ByteOffset(1024);
const LENGTH: usize = 1024;

/// Features that a reader must know: types in directories, a journal to replay, groups of descriptors, extents, 64 bits,
/// protection against two mounts, tables anywhere, attributes in inodes, a seed of checksums, large directories, bytes in
/// inodes, encryption of single files, names without capitals.
const KNOWN: u32 =
    0x2 | 0x4 | 0x10 | 0x40 | 0x80 | 0x100 | 0x200 | 0x400 | 0x2000 | 0x4000 | 0x8000 | 0x1_0000 | 0x2_0000;

/// Those that have a name and are not known here.
const NAMED: [(u32, &str); 3] =
    [(0x1, "compression"), (0x8, "journal_dev: it is a journal of another volume"), (0x1000, "dirdata")];

const NEEDS_RECOVERY: u32 = 0x4;
const META_GROUPS: u32 = 0x10;
const WIDE: u32 = 0x80;
const OWN_SEED: u32 = 0x2000;
const LARGE_DIRECTORIES: u32 = 0x4000;

const HAS_JOURNAL: u32 = 0x4;
const DIRECTORY_INDEX: u32 = 0x20;
const TWO_BACKUPS: u32 = 0x200;

const SPARSE: u32 = 0x1;
const GROUP_SUMS: u32 = 0x10;
const METADATA_SUMS: u32 = 0x400;

const STATE_CLEAN: u16 = 1;
const STATE_ERRORS: u16 = 2;

/// Checksums by CRC-32C: the only kind there is.
const CRC32C: u8 = 1;

/// How group descriptors are checked.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum GroupSums {
    None,
    Crc16,
    Crc32c,
}

/// Which groups have a copy of the superblock.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Backups {
    All,
    Sparse,
    Two([u32; 2]),
}

/// Where the journal is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Journal {
    /// There is none.
    None,
    /// In the file of this inode.
    Inode(u32),
    /// On a device of its own.
    Elsewhere,
}

/// What is known here of a superblock.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Superblock {
    pub(super) journal: Journal,
    /// Whether a mount would replay the journal.
    pub(super) needs_recovery: bool,
    /// Whether it was unmounted, or never mounted.
    pub(super) is_clean: bool,
    /// Whether something has been found to be wrong with it.
    pub(super) has_errors: bool,
    /// Whether large directories have an index.
    pub(super) has_index: bool,
    /// Whether directories may be as long as files.
    pub(super) has_large_directories: bool,
    /// What checksums of metadata begin with; none when there are no such sums.
    pub(super) seed: Option<u32>,
    /// How many blocks the volume has.
    pub(super) blocks: u64,
    pub(super) inode_size: usize,
    block_log: u32,
    id: [u8; 16],
    inodes: u32,
    first_block: u64,
    group_blocks: u64,
    group_inodes: u32,
    groups: u64,
    descriptor: u64,
    group_sums: GroupSums,
    /// The first block of descriptors that lies with the groups that it describes.
    meta_from: Option<u64>,
    backups: Backups,
}

/// Reads and checks it.
pub(super) fn read(source: &dyn Source) -> Result<Superblock, Error> {
    let mut bytes = vec![0; LENGTH];
    let read = source.read_at(AT, &mut bytes).map_err(Error::from);
    let parsed = read.and_then(|()| parse(&bytes));
    parsed.map_err(|error| error.of(|| "the superblock of this ext file system".to_owned()))
}

fn parse(bytes: &[u8]) -> Result<Superblock, Error> {
    if le16(bytes, 0x38)? != 0xef53 {
        return Err(Error::damaged("", "its mark is not there"));
    }
    // The first revision has no features, and inodes of one size.
    let is_dynamic = le32(bytes, 0x4c)? >= 1;
    let features = |at: usize| if is_dynamic { le32(bytes, at) } else { Ok(0) };
    let (compatible, incompatible, read_only) = (features(0x5c)?, features(0x60)?, features(0x64)?);
    check_features(incompatible)?;
    let has_sums = read_only & METADATA_SUMS != 0;
    if has_sums {
        if byte(bytes, 0x175)? != CRC32C {
            let what = format!("this is ext with checksums of the kind {}", byte(bytes, 0x175)?);
            return Err(Error::Unsupported { what });
        }
        if !is_right(le32(bytes, 0x3fc)?, crc32c(u32::MAX, part(bytes, 0, 0x3fc)?)) {
            return Err(Error::damaged("", "its checksum is another"));
        }
    }
    let block_log = le32(bytes, 0x18)?.saturating_add(10);
    let inode_size = if is_dynamic { usize::from(le16(bytes, 0x58)?) } else { 128 };
    let is_wide = incompatible & WIDE != 0;
    let high = |at: usize| if is_wide { le32(bytes, at) } else { Ok(0) };
    let blocks = u64::from(high(0x150)?) << 32 | u64::from(le32(bytes, 4)?);
    let descriptor = if is_wide { le16(bytes, 0xfe)? } else { 32 };
    let (first_block, group_blocks) = (u64::from(le32(bytes, 0x14)?), u64::from(le32(bytes, 0x20)?));
    let group_inodes = le32(bytes, 0x28)?;
    let makes_sense = (10..=16).contains(&block_log)
        && inode_size.is_power_of_two()
        && (128..=1 << block_log).contains(&inode_size)
        && descriptor.is_power_of_two()
        && (if is_wide { 64 } else { 32 }..=1024).contains(&descriptor)
        && first_block < blocks
        && blocks <= u64::MAX >> 18
        && group_blocks > 0
        && group_inodes > 0;
    if !makes_sense {
        return Err(Error::damaged("", "its sizes do not go together"));
    }
    let groups = (blocks - first_block).div_ceil(group_blocks);
    let inodes = le32(bytes, 0)?;
    if u64::from(inodes).div_ceil(u64::from(group_inodes)) > groups {
        return Err(Error::damaged("", "it has more inodes than its groups"));
    }
    let id: [u8; 16] = part(bytes, 0x68, 16)?.try_into().expect("16 bytes");
    let seed = match incompatible & OWN_SEED {
        0 => crc32c(u32::MAX, &id),
        _ => le32(bytes, 0x270)?,
    };
    let state = le16(bytes, 0x3a)?;
    Ok(Superblock {
        journal: match (compatible & HAS_JOURNAL, le32(bytes, 0xe0)?) {
            (0, _) => Journal::None,
            (_, 0) => Journal::Elsewhere,
            (_, inode) => Journal::Inode(inode),
        },
        needs_recovery: incompatible & NEEDS_RECOVERY != 0,
        is_clean: state & STATE_CLEAN != 0,
        has_errors: state & STATE_ERRORS != 0,
        has_index: compatible & DIRECTORY_INDEX != 0,
        has_large_directories: incompatible & LARGE_DIRECTORIES != 0,
        seed: has_sums.then_some(seed),
        blocks,
        inode_size,
        block_log,
        id,
        inodes,
        first_block,
        group_blocks,
        group_inodes,
        groups,
        descriptor: u64::from(descriptor),
        group_sums: match read_only {
            _ if has_sums => GroupSums::Crc32c,
            read_only if read_only & GROUP_SUMS != 0 => GroupSums::Crc16,
            _ => GroupSums::None,
        },
        meta_from: match incompatible & META_GROUPS {
            0 => None,
            _ => Some(u64::from(le32(bytes, 0x104)?)),
        },
        backups: match read_only & SPARSE {
            _ if compatible & TWO_BACKUPS != 0 => Backups::Two([le32(bytes, 0x24c)?, le32(bytes, 0x250)?]),
            0 => Backups::All,
            _ => Backups::Sparse,
        },
    })
}

fn check_features(incompatible: u32) -> Result<(), Error> {
    let unknown = incompatible & !KNOWN;
    if unknown == 0 {
        return Ok(());
    }
    let named: Vec<&str> =
        NAMED.iter().filter(|(bit, _)| unknown & bit != 0).map(|(_, name)| *name).collect();
    let rest = NAMED.iter().fold(unknown, |rest, (bit, _)| rest & !bit);
    let mut which = named.join(", ");
    if rest != 0 {
        which.push_str(&format!("{}{rest:#x}", if which.is_empty() { "" } else { ", " }));
    }
    Err(Error::Unsupported { what: format!("this is ext with the features {which}") })
}

impl Superblock {
    pub(super) fn block_size(&self) -> u64 {
        1 << self.block_log
    }

    /// The first byte of a block.
    pub(super) fn block_at(&self, number: u64) -> Result<ByteOffset, Error> {
        if number == 0 || number >= self.blocks {
            return Err(Error::damaged("", format!("it names block {number}, which is not there")));
        }
        Ok(ByteOffset(number << self.block_log))
    }

    /// The first byte of an inode.
    pub(super) fn inode_at(&self, source: &dyn Source, number: u64) -> Result<ByteOffset, Error> {
        if number == 0 || number > u64::from(self.inodes) {
            return Err(Error::damaged("", "there is none of this number"));
        }
        let (index, per_group) = (number - 1, u64::from(self.group_inodes));
        let (group, within) = (index / per_group, index % per_group);
        let table = self.inode_table(source, group);
        let table = table.map_err(|error| error.of(|| format!("the descriptor of group {group}")))?;
        // The table begins within the volume, and numbers of inodes have 32 bits.
        Ok(ByteOffset(table.0 + within * self.inode_size as u64))
    }

    /// Where the inodes of a group are.
    fn inode_table(&self, source: &dyn Source, group: u64) -> Result<ByteOffset, Error> {
        let mut bytes = vec![0; self.descriptor as usize];
        source.read_at(self.descriptor_at(group)?, &mut bytes)?;
        // There are fewer groups than inodes and blocks of them: their numbers have 32 bits.
        let number = (group as u32).to_le_bytes();
        let stored = le16(&bytes, 0x1e)?;
        let found = match (self.group_sums, self.seed) {
            (GroupSums::Crc32c, Some(seed)) => crc32c_without(crc32c(seed, &number), &bytes, 0x1e, 2) as u16,
            (GroupSums::Crc16, _) => {
                let sum = crc16(crc16(u16::MAX, &self.id), &number);
                crc16(crc16(sum, &bytes[..0x1e]), &bytes[0x20..])
            }
            (GroupSums::None | GroupSums::Crc32c, _) => stored,
        };
        if !is_right(stored.into(), found.into()) {
            return Err(Error::damaged("", "its checksum is another"));
        }
        let high = if self.descriptor >= 64 { le32(&bytes, 0x28)? } else { 0 };
        self.block_at(u64::from(high) << 32 | u64::from(le32(&bytes, 8)?))
    }

    fn descriptor_at(&self, group: u64) -> Result<ByteOffset, Error> {
        let per_block = self.block_size() / self.descriptor;
        let (number, within) = (group / per_block, group % per_block);
        // Blocks of a kibibyte have the superblock in the second.
        let superblock = AT.0 / self.block_size();
        let block = match self.meta_from {
            Some(from) if number >= from => {
                let first = number * per_block;
                let is_behind = superblock == 1 && first == 0 && self.first_block == 0;
                self.first_block
                    + first * self.group_blocks
                    + u64::from(self.has_superblock(first))
                    + u64::from(is_behind)
            }
            _ => superblock + 1 + number,
        };
        Ok(ByteOffset(self.block_at(block)?.0 + within * self.descriptor))
    }

    /// Whether a group begins with a copy of the superblock.
    fn has_superblock(&self, group: u64) -> bool {
        let is_power = |base: u64| {
            let mut power = base;
            while power < group {
                power *= base;
            }
            power == group
        };
        match self.backups {
            _ if group == 0 => true,
            Backups::Two(groups) => groups.iter().any(|backup| u64::from(*backup) == group),
            Backups::All => true,
            Backups::Sparse => group == 1 || [3, 5, 7].into_iter().any(is_power),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn features_that_are_not_known_are_refused_by_their_names() {
        let said = |features: u32| check_features(features).unwrap_err().to_string();
        assert!(check_features(KNOWN).is_ok());
        assert_eq!(
            said(0x1001),
            "this is ext with the features compression, dirdata, which is not read here"
        );
        assert_eq!(
            said(0x4000_0003),
            "this is ext with the features compression, 0x40000000, which is not read here"
        );
        assert!(said(8).contains("journal_dev"));
    }
}
