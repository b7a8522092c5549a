//! The journal of an ext: a file whose blocks are written round and round, as JBD2 has them.
//!
//! ```text
//! superblock   magic type sequence block_size length first | sequence start error | features | id .. checksum
//! descriptor   magic 1 sequence | tags                       the blocks that its tags name follow it
//! commit       magic 2 sequence | kind of checksum, checksum, time
//! revoke       magic 5 sequence length | numbers of blocks
//! ```
//! Numbers have their highest byte first.

use std::ops::Range;

use backtide_units::ByteOffset;

use super::{
    checksum::{crc32c, crc32c_without, is_right},
    patches::MAGIC,
    superblock::Superblock,
};
use crate::{
    Contents, Error, Place, Source,
    fields::{be16, be32, be64, byte, part},
};

/// What a block of the journal is.
pub(super) const DESCRIPTOR: u32 = 1;
pub(super) const COMMIT: u32 = 2;
pub(super) const REVOKE: u32 = 5;

/// Superblocks: the older one has no features.
const OLD: u32 = 3;
const NEW: u32 = 4;
const SUPERBLOCK: usize = 1024;

/// What a block begins with.
pub(super) const HEADER: usize = 12;

/// The checksum at the end of descriptors and revocations.
const TAIL: usize = 4;

/// Older journals have sums of whole transactions in their commits.
const COMPATIBLE_SUMS: u32 = 0x1;

/// Features that a reader must know: revocations, 64 bits, commits that do not wait, checksums, fast commits.
const KNOWN: u32 = 0x1 | 0x2 | 0x4 | SUMS_2 | SUMS_3 | FAST;
const WIDE: u32 = 0x2;
const ASYNCHRONOUS: u32 = 0x4;
const SUMS_2: u32 = 0x8;
const SUMS_3: u32 = 0x10;
const FAST: u32 = 0x20;

const CRC32C: u8 = 4;

/// Blocks for fast commits when the journal does not say how many, and how many it must have besides.
const FAST_BLOCKS: u32 = 256;
const BLOCKS_MIN: u32 = 1024;

/// Flags of a tag.
const ESCAPED: u16 = 1;
const SAME_ID: u16 = 2;
const LAST: u16 = 8;

/// The id of a volume in a tag that is not of the same as the tag before.
const ID: usize = 16;

/// How a journal is checked.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Sums {
    None,
    /// Of whole transactions.
    Commits,
    /// Of each block, half of it in the tag.
    Half,
    /// Of each block.
    Full,
}

/// The journal on its volume.
pub(super) struct Journal<'volume> {
    source: &'volume dyn Source,
    contents: Contents,
    block_size: u64,
    /// The blocks that are written round and round.
    pub(super) ring: Range<u32>,
    /// Blocks that a fast commit may begin in.
    pub(super) fast: Vec<u32>,
    /// The first transaction, and the block it begins in; 0 when there is none.
    pub(super) sequence: u32,
    pub(super) start: u32,
    pub(super) sums: Sums,
    pub(super) is_asynchronous: bool,
    is_wide: bool,
    seed: u32,
}

/// A block that a descriptor names.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Tag {
    /// Its place on the volume.
    pub(super) block: u64,
    pub(super) is_escaped: bool,
    sum: u32,
}

impl<'volume> Journal<'volume> {
    /// The journal that `contents` is.
    pub(super) fn open(
        source: &'volume dyn Source,
        contents: Contents,
        superblock: &Superblock,
    ) -> Result<Self, Error> {
        let block_size = superblock.block_size();
        let mut bytes = vec![0; SUPERBLOCK];
        contents.read_stored(source, ByteOffset::ZERO, &mut bytes)?;
        let kind = be32(&bytes, 4)?;
        if bytes[..4] != MAGIC || !matches!(kind, OLD | NEW) {
            return Err(Error::damaged("", "it has no superblock"));
        }
        let feature = |at: usize| if kind == NEW { be32(&bytes, at) } else { Ok(0) };
        let (compatible, incompatible) = (feature(0x24)?, feature(0x28)?);
        if incompatible & !KNOWN != 0 {
            let what = format!("it has the features {:#x}", incompatible & !KNOWN);
            return Err(Error::Unsupported { what });
        }
        let sums = match (incompatible & SUMS_2 != 0, incompatible & SUMS_3 != 0) {
            (false, false) if compatible & COMPATIBLE_SUMS != 0 => Sums::Commits,
            (false, false) => Sums::None,
            (true, false) => Sums::Half,
            (false, true) => Sums::Full,
            (true, true) => return Err(Error::damaged("", "it has checksums of two kinds")),
        };
        if matches!(sums, Sums::Half | Sums::Full) {
            let found = crc32c_without(u32::MAX, &bytes, 0xfc, 4);
            if byte(&bytes, 0x50)? != CRC32C || !is_right(be32(&bytes, 0xfc)?, found) {
                return Err(Error::damaged("", "the checksum of its superblock is another"));
            }
        }
        let (length, first, start) = (be32(&bytes, 0x10)?, be32(&bytes, 0x14)?, be32(&bytes, 0x1c)?);
        let (mut end, mut fast) = (length, Vec::new());
        if incompatible & FAST != 0 {
            let count = match be32(&bytes, 0x54)? {
                0 => FAST_BLOCKS,
                count => count,
            };
            if let Some(before) = length.checked_sub(count).filter(|before| *before >= BLOCKS_MIN) {
                end = before;
            }
            // The first block of these is left out by those who write them, and may not be by others.
            fast = (end..length).take(2).collect();
        }
        let makes_sense = u64::from(be32(&bytes, 0xc)?) == block_size
            && u64::from(length) <= contents.size().0 / block_size
            && first > 0
            && first < end
            && (start == 0 || (first..end).contains(&start));
        if !makes_sense {
            return Err(Error::damaged("", "the sizes in its superblock do not go together"));
        }
        Ok(Self {
            source,
            contents,
            block_size,
            ring: first..end,
            fast,
            sequence: be32(&bytes, 0x18)?,
            start,
            sums,
            is_asynchronous: incompatible & ASYNCHRONOUS != 0,
            is_wide: incompatible & WIDE != 0,
            seed: crc32c(u32::MAX, part(&bytes, 0x30, ID)?),
        })
    }

    /// The block `count` behind another, round the end. No more than the ring has.
    pub(super) fn after(&self, block: u32, count: u32) -> u32 {
        let left = self.ring.end - block;
        if count < left { block + count } else { self.ring.start + (count - left) }
    }

    /// Where a block of it is on the volume.
    pub(super) fn place(&self, block: u32) -> Result<ByteOffset, Error> {
        let at = ByteOffset(u64::from(block) * self.block_size);
        let pieces = self.contents.pieces();
        let before = pieces.partition_point(|piece| piece.at <= at).checked_sub(1);
        match before.map(|index| (&pieces[index], &pieces[index].place)) {
            Some((piece, Place::Volume(start))) if at.0 + self.block_size <= piece.at.0 + piece.length.0 => {
                Ok(ByteOffset(start.0 + at.0 - piece.at.0))
            }
            _ => Err(Error::damaged("", format!("its block {block} is not on the volume"))),
        }
    }

    /// A block of it.
    pub(super) fn block(&self, block: u32) -> Result<Vec<u8>, Error> {
        let mut bytes = vec![0; self.block_size as usize];
        self.source.read_at(self.place(block)?, &mut bytes)?;
        Ok(bytes)
    }

    /// How many bytes of a descriptor or a revocation are used.
    fn used(&self) -> usize {
        // Blocks have a kibibyte at least.
        self.block_size as usize - if matches!(self.sums, Sums::Half | Sums::Full) { TAIL } else { 0 }
    }

    /// Whether a descriptor or a revocation has the right checksum at its end, if it has one.
    pub(super) fn is_tail_right(&self, block: &[u8]) -> Result<bool, Error> {
        if matches!(self.sums, Sums::None | Sums::Commits) {
            return Ok(true);
        }
        let at = block.len() - TAIL;
        Ok(is_right(be32(block, at)?, crc32c_without(self.seed, block, at, TAIL)))
    }

    /// Whether a commit has the right checksum of itself, if it has one.
    pub(super) fn is_commit_right(&self, block: &[u8]) -> Result<bool, Error> {
        if matches!(self.sums, Sums::None | Sums::Commits) {
            return Ok(true);
        }
        let stored = be32(block, 16)?;
        // Some have summed it up before the rest of the block was what it is.
        let mut rest_empty = block.to_vec();
        rest_empty[64..].fill(0);
        let found = [block, &rest_empty].map(|block| crc32c_without(self.seed, block, 16, 4));
        Ok(found.iter().any(|found| is_right(stored, *found)))
    }

    /// Whether a block is what the tag of a transaction says.
    pub(super) fn is_block_right(&self, block: &[u8], tag: Tag, sequence: u32) -> bool {
        let found = || crc32c(crc32c(self.seed, &sequence.to_be_bytes()), block);
        match self.sums {
            Sums::None | Sums::Commits => true,
            Sums::Half => is_right(tag.sum, found() & 0xffff),
            Sums::Full => is_right(tag.sum, found()),
        }
    }

    /// The blocks that a descriptor names.
    pub(super) fn tags(&self, block: &[u8]) -> Result<Vec<Tag>, Error> {
        let length = match (self.sums, self.is_wide) {
            (Sums::Full, _) => 16,
            (Sums::Half, true) => 14,
            (Sums::Half, false) => 10,
            (Sums::None | Sums::Commits, true) => 12,
            (Sums::None | Sums::Commits, false) => 8,
        };
        let (mut at, mut tags) = (HEADER, Vec::new());
        while at + length <= self.used() {
            let flags = be16(block, at + 6)?;
            let high = if self.is_wide { be32(block, at + 8)? } else { 0 };
            tags.push(Tag {
                block: u64::from(high) << 32 | u64::from(be32(block, at)?),
                is_escaped: flags & ESCAPED != 0,
                sum: match self.sums {
                    Sums::Full => be32(block, at + 12)?,
                    Sums::Half | Sums::None | Sums::Commits => be16(block, at + 4)?.into(),
                },
            });
            at += length + if flags & SAME_ID == 0 { ID } else { 0 };
            if flags & LAST != 0 {
                break;
            }
        }
        Ok(tags)
    }

    /// The blocks that a revocation names.
    pub(super) fn revoked(&self, block: &[u8]) -> Result<Vec<u64>, Error> {
        let length = be32(block, HEADER)? as usize;
        if length > self.used() {
            return Err(Error::damaged("", format!("a revocation in it has {length} bytes")));
        }
        let numbers = block.get(HEADER + 4..length).unwrap_or_default();
        if self.is_wide {
            return numbers.chunks_exact(8).map(|number| Ok(be64(number, 0)?)).collect();
        }
        numbers.chunks_exact(4).map(|number| Ok(u64::from(be32(number, 0)?))).collect()
    }
}
