//! The names of a directory: in blocks, or in its inode.
//!
//! ```text
//! entry   inode length name_length type | name, padded
//! ```
//! Blocks of an index look like one long entry that names nothing, so that whoever does not know them goes over them.

use backtide_units::ByteOffset;

use super::{
    Volume,
    checksum::{crc32c, is_right},
    inode::Inode,
    map,
};
use crate::{
    Contents, Error, FileId, Name,
    fields::{byte, le16, le32, part},
    file_system::NAMES_MAX,
};

/// The most blocks of one directory: a gigabyte of names, with the usual size.
const BLOCKS_MAX: usize = 1 << 18;

/// What stands before a name.
const HEADER: usize = 8;

/// The entry at a block's end that has its checksum, and the type by which it is known.
const TAIL: usize = 12;
const TAIL_TYPE: u8 = 0xde;

/// Where the entries of an index begin: in its root, and in a block below it.
const ROOT_ENTRIES: usize = 32;
const NODE_ENTRIES: usize = 8;

/// The inode of the directory above, before the names that are in an inode.
const PARENT: usize = 4;

/// All names but `.` and `..`.
pub(super) fn names(volume: &Volume, inode: &Inode) -> Result<Vec<Name>, Error> {
    let mut names = Vec::new();
    if inode.is_inline() {
        let [first, second] = inode.inline()?;
        add_entries(&first[PARENT..], &mut names)?;
        add_entries(second, &mut names)?;
        return Ok(names);
    }
    let (stored, size) = (map::stored(volume, inode)?, volume.superblock.block_size());
    let end = inode.node.size.0;
    let (mut next, mut blocks) = (0, 0);
    for piece in stored.pieces() {
        // Pieces lie within the volume, so their ends are no overflow. A block may have several pieces.
        let end = (piece.at.0 + piece.length.0).min(end);
        let mut at = next.max(piece.at.0 / size * size);
        if at > next {
            return Err(hole(next));
        }
        while at < end {
            blocks += 1;
            if blocks > BLOCKS_MAX {
                return Err(too_many("blocks", BLOCKS_MAX));
            }
            let block = block(volume, inode, &stored, ByteOffset(at));
            let added = block.and_then(|block| add_entries(&block, &mut names));
            added.map_err(|error| in_block(error, at))?;
            at += size;
            next = at;
        }
    }
    if next < end { Err(hole(next)) } else { Ok(names) }
}

/// A directory has names in each of its blocks, or says there that they hold none: what was in this one is lost.
fn hole(at: u64) -> Error {
    in_block(Error::damaged("", "it is a hole, which no directory has"), at)
}

/// Reads and checks a block.
fn block(volume: &Volume, inode: &Inode, stored: &Contents, at: ByteOffset) -> Result<Vec<u8>, Error> {
    let mut block = vec![0; volume.superblock.block_size() as usize];
    stored.read_stored(volume.source.unpatched(), at, &mut block)?;
    let Some(seed) = inode.seed else { return Ok(block) };
    let is_index = volume.superblock.has_index && inode.is_indexed();
    let is_whole = entry_length(le16(&block, 4)?, block.len()) == block.len();
    let is_right = if is_index && (at == ByteOffset::ZERO || is_whole) {
        is_index_right(&block, seed, if is_whole { NODE_ENTRIES } else { ROOT_ENTRIES })?
    } else {
        is_tail_right(&block, seed)?
    };
    if is_right { Ok(block) } else { Err(Error::damaged("", "the checksum is another")) }
}

/// Whether a block of names has its checksum at its end, and the right one.
fn is_tail_right(block: &[u8], seed: u32) -> Result<bool, Error> {
    let at = block.len() - TAIL;
    let is_tail = le32(block, at)? == 0
        && usize::from(le16(block, at + 4)?) == TAIL
        && byte(block, at + 6)? == 0
        && byte(block, at + 7)? == TAIL_TYPE;
    Ok(is_tail && is_right(le32(block, at + 8)?, crc32c(seed, &block[..at])))
}

/// Whether a block of an index has the right checksum: it stands behind the room for entries, the first of which has
/// their numbers instead of a hash.
fn is_index_right(block: &[u8], seed: u32, entries: usize) -> Result<bool, Error> {
    let (limit, count) = (usize::from(le16(block, entries)?), usize::from(le16(block, entries + 2)?));
    let tail = part(block, entries + limit * 8, 8)?;
    if count > limit {
        return Ok(false);
    }
    let found = crc32c(crc32c(seed, part(block, 0, entries + count * 8)?), &tail[..4]);
    Ok(is_right(le32(tail, 4)?, crc32c(found, &[0; 4])))
}

/// Adds what is named in a block, or in a part of an inode.
fn add_entries(bytes: &[u8], names: &mut Vec<Name>) -> Result<(), Error> {
    let mut at = 0;
    while at < bytes.len() {
        let length = entry_length(le16(bytes, at + 4)?, bytes.len());
        let name_length = usize::from(byte(bytes, at + 6)?);
        let entry = part(bytes, at, length)?;
        if length < HEADER || !length.is_multiple_of(4) || HEADER + name_length > length {
            let why =
                format!("an entry at byte {at} says it has {length} bytes, and {name_length} of a name");
            return Err(Error::damaged("", why));
        }
        at += length;
        let (id, name) = (le32(entry, 0)?, &entry[HEADER..HEADER + name_length]);
        if id == 0 || name == b"." || name == b".." {
            continue;
        }
        if name.is_empty() {
            return Err(Error::damaged("", "an entry has no name"));
        }
        if names.len() >= NAMES_MAX {
            return Err(too_many("names", NAMES_MAX));
        }
        names.push(Name { bytes: name.to_vec(), id: FileId(id.into()) });
    }
    Ok(())
}

/// How long an entry is: blocks of 64 KiB have lengths that 16 bits do not take, whose highest bits stand lowest.
fn entry_length(stored: u16, block: usize) -> usize {
    match (stored, block) {
        (0 | u16::MAX, 0x1_0000) => block,
        (stored, 0x1_0000) => usize::from(stored & !3) | usize::from(stored & 3) << 16,
        (stored, _) => usize::from(stored),
    }
}

/// Says in which block of the directory something is wrong.
fn in_block(error: Error, at: u64) -> Error {
    match error {
        Error::Damaged { what, why } if what.is_empty() => {
            Error::damaged("", format!("in its block at byte {at}, {why}"))
        }
        other => other,
    }
}

fn too_many(of: &'static str, limit: usize) -> Error {
    Error::TooMany { what: "a directory of this ext file system".to_owned(), of, limit: limit as u64 }
}
