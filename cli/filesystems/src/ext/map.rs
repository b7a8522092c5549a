//! Where the bytes of a file lie: by a tree of extents, or by blocks of pointers as ext2 has them.
//!
//! ```text
//! node       F30A entries max depth generation | entries of 12 bytes
//! extent     block length start_high start_low     a length above 32768 is that much less, and never written
//! pointer    block child_low child_high
//! ```

use backtide_units::{ByteCount, ByteOffset};

use super::{
    Volume,
    checksum::{crc32c, is_right},
    inode::Inode,
    patches::MAGIC,
};
use crate::{
    Contents, Error, Piece, Place, Source,
    contents::PIECES_MAX,
    fields::{le16, le32, part},
};

const NODE_MAGIC: u16 = 0xf30a;
const HEADER: usize = 12;
const ENTRY: usize = 12;
const DEPTH_MAX: u16 = 5;

/// The longest extent that was written.
const WRITTEN_MAX: u16 = 0x8000;

/// Pointers to blocks of bytes in an inode; three more lead to blocks of pointers.
const DIRECT: usize = 12;

/// Blocks of one tree that are read.
const BLOCKS_MAX: u64 = 1 << 20;

/// The bytes of a file, a directory or a link that are in blocks.
pub(super) fn stored(volume: &Volume, inode: &Inode) -> Result<Contents, Error> {
    // No tree that is well has a block twice.
    let left = BLOCKS_MAX.min(volume.source.size().0 / volume.superblock.block_size());
    let mut map = Map { volume, inode, pieces: Vec::new(), left };
    if inode.has_extents() {
        let depth = le16(inode.pointers(), 6)?;
        map.node(inode.pointers(), depth, &mut 0)?;
    } else {
        map.pointers()?;
    }
    Contents::new(inode.node.size, map.pieces, volume.source.size())
}

struct Map<'volume> {
    volume: &'volume Volume,
    inode: &'volume Inode,
    pieces: Vec<Piece>,
    /// How many more blocks of the tree are read.
    left: u64,
}

impl Map<'_> {
    /// A block of the tree.
    fn block(&mut self, number: u64) -> Result<Vec<u8>, Error> {
        let left = self.left.checked_sub(1);
        self.left = left.ok_or_else(|| too_many("blocks of its tree", BLOCKS_MAX))?;
        let mut block = vec![0; self.volume.superblock.block_size() as usize];
        self.volume.source.read_at(self.volume.superblock.block_at(number)?, &mut block)?;
        Ok(block)
    }

    /// Takes what a node of the tree of extents has; `next` is the first block of the file that may follow.
    fn node(&mut self, node: &[u8], depth: u16, next: &mut u64) -> Result<(), Error> {
        let wrong = |why: String| Err(Error::damaged("", format!("a node of its tree of extents {why}")));
        let (count, max) = (usize::from(le16(node, 2)?), usize::from(le16(node, 4)?));
        if le16(node, 0)? != NODE_MAGIC {
            return wrong("has no mark".to_owned());
        }
        if depth > DEPTH_MAX || le16(node, 6)? != depth {
            return wrong(format!("is of the level {}", le16(node, 6)?));
        }
        if count > max || max > (node.len() - HEADER) / ENTRY || (count == 0 && depth > 0) {
            return wrong(format!("has {count} entries, and room for {max}"));
        }
        for entry in part(node, HEADER, count * ENTRY)?.chunks_exact(ENTRY) {
            let block = u64::from(le32(entry, 0)?);
            if block < *next {
                return wrong(format!("has block {block} of the file where {next} is the first that can be"));
            }
            if depth == 0 {
                *next = self.extent(entry, block)?;
                continue;
            }
            // What is below begins there, or behind.
            *next = block;
            let child = u64::from(le16(entry, 8)?) << 32 | u64::from(le32(entry, 4)?);
            let child = self.block(child)?;
            self.check_node(&child)?;
            self.node(&child, depth - 1, next)?;
            *next = (*next).max(block + 1);
        }
        Ok(())
    }

    /// Checks the checksum of a node that is a block: it stands behind the room for entries.
    fn check_node(&self, node: &[u8]) -> Result<(), Error> {
        let Some(seed) = self.inode.seed else { return Ok(()) };
        let at = HEADER + ENTRY * usize::from(le16(node, 4)?);
        if is_right(le32(node, at)?, crc32c(seed, part(node, 0, at)?)) {
            return Ok(());
        }
        Err(Error::damaged("", "a node of its tree of extents has another checksum"))
    }

    /// Takes an extent; the block of the file behind it.
    fn extent(&mut self, entry: &[u8], block: u64) -> Result<u64, Error> {
        let length = le16(entry, 4)?;
        let start = u64::from(le16(entry, 6)?) << 32 | u64::from(le32(entry, 8)?);
        let is_written = length <= WRITTEN_MAX;
        let count = u64::from(if is_written { length } else { length - WRITTEN_MAX });
        if count == 0 {
            return Err(Error::damaged("", "an extent of it has no blocks"));
        }
        // What was reserved and never written reads as zeroes.
        if is_written {
            self.add(block, start, count)?;
        }
        Ok(block + count)
    }

    /// Takes the blocks that an inode of ext2 points to.
    fn pointers(&mut self) -> Result<(), Error> {
        let end = self.inode.node.size.0.div_ceil(self.volume.superblock.block_size());
        let (pointers, mut at) = (self.inode.pointers(), 0);
        for (number, pointer) in pointers.chunks_exact(4).enumerate() {
            let levels = number.saturating_sub(DIRECT - 1);
            at = self.pointer(le32(pointer, 0)?, levels as u32, (at, end))?;
        }
        Ok(())
    }

    /// Takes what a pointer leads to, from block `at` of a file that ends before block `end`; the block of the file
    /// behind it.
    fn pointer(&mut self, pointer: u32, levels: u32, (mut at, end): (u64, u64)) -> Result<u64, Error> {
        // Three levels of 2^14 pointers each at most.
        let spanned = (self.volume.superblock.block_size() / 4).pow(levels);
        if pointer == 0 || at >= end {
            return Ok(at + spanned);
        }
        if levels == 0 {
            self.add(at, u64::from(pointer), 1)?;
            return Ok(at + 1);
        }
        for pointer in self.block(u64::from(pointer))?.chunks_exact(4) {
            at = self.pointer(le32(pointer, 0)?, levels - 1, (at, end))?;
        }
        Ok(at)
    }

    /// Adds blocks of the file, each at its newest copy.
    fn add(&mut self, block: u64, start: u64, count: u64) -> Result<(), Error> {
        let (superblock, size) = (&self.volume.superblock, self.volume.superblock.block_size());
        let first = superblock.block_at(start)?;
        // 32768 blocks at most, and 2^48 before them.
        superblock.block_at(start + count - 1)?;
        let at = ByteOffset(block * size);
        let behind = |offset: ByteOffset, blocks: u64| ByteOffset(offset.0 + blocks * size);
        let mut done = 0;
        for (number, copied) in self.volume.source.copies(start, count) {
            let skipped = number - start;
            self.push(behind(at, done), (skipped - done) * size, Place::Volume(behind(first, done)))?;
            let (at, mut from, mut length) = (behind(at, skipped), copied.at, size);
            let mut to = at;
            if copied.is_escaped {
                let taken = MAGIC.len() as u64;
                self.push(at, taken, Place::Inline(MAGIC.to_vec()))?;
                (to, from, length) = (ByteOffset(at.0 + taken), ByteOffset(from.0 + taken), size - taken);
            }
            self.push(to, length, Place::Volume(from))?;
            done = skipped + 1;
        }
        self.push(behind(at, done), (count - done) * size, Place::Volume(behind(first, done)))
    }

    /// Adds a piece, or makes the one before longer.
    fn push(&mut self, at: ByteOffset, length: u64, place: Place) -> Result<(), Error> {
        if length == 0 {
            return Ok(());
        }
        if let (Some(last), Place::Volume(from)) = (self.pieces.last_mut(), &place)
            && let Place::Volume(start) = last.place
            && (last.at.0 + last.length.0, start.0 + last.length.0) == (at.0, from.0)
        {
            last.length = ByteCount(last.length.0 + length);
            return Ok(());
        }
        if self.pieces.len() >= PIECES_MAX {
            return Err(too_many("extents", PIECES_MAX as u64));
        }
        self.pieces.push(Piece { at, length: ByteCount(length), place });
        Ok(())
    }
}

fn too_many(of: &'static str, limit: u64) -> Error {
    Error::TooMany { what: "a file of this ext file system".to_owned(), of, limit }
}
