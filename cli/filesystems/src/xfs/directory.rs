//! The names of a directory: in its inode, in one block, or in many.

use backtide_units::ByteOffset;

use super::{
    inode::Inode,
    patches::Patched,
    superblock::{Superblock, is_right},
};
use crate::{
    Contents, Error, FileId, Name,
    fields::{be16, be32, be64, byte, part},
    file_system::NAMES_MAX,
};

/// Where the names of a large directory end in it: behind are hashes of them.
const NAMES_END: u64 = 32 << 30;

/// The most blocks of one directory: a gigabyte of names, with the usual size.
const BLOCKS_MAX: usize = 1 << 18;

/// All names but `.` and `..`.
pub(super) fn names(source: &Patched, superblock: &Superblock, inode: &Inode) -> Result<Vec<Name>, Error> {
    if inode.is_inline() {
        return inline(superblock, inode.inline()?);
    }
    let (stored, mut names) = (inode.stored(source, superblock)?, Vec::new());
    let size = superblock.directory_block;
    let (mut next, mut blocks) = (0, 0);
    for piece in stored.pieces() {
        // Pieces lie within the volume, so their ends are no overflow. A block may have several pieces.
        let end = (piece.at.0 + piece.length.0).min(NAMES_END);
        let mut at = next.max(piece.at.0 / size * size);
        while at < end {
            blocks += 1;
            if blocks > BLOCKS_MAX {
                return Err(too_many("blocks", BLOCKS_MAX));
            }
            block(source, superblock, (inode.number, &stored), ByteOffset(at), &mut names)?;
            at += size;
            next = at;
        }
    }
    Ok(names)
}

/// `count long_count parent` and then entries; inodes have 8 bytes when any needs them.
fn inline(superblock: &Superblock, bytes: &[u8]) -> Result<Vec<Name>, Error> {
    let count = byte(bytes, 0)?;
    let width = if byte(bytes, 1)? > 0 { 8 } else { 4 };
    let (mut at, mut names) = (2 + width, Vec::new());
    for _ in 0..count {
        let length = usize::from(byte(bytes, at)?);
        let name = part(bytes, at + 3, length)?;
        at += 3 + length + usize::from(superblock.has_types);
        let id = if width == 8 { be64(bytes, at)? } else { u64::from(be32(bytes, at)?) };
        at += width;
        names.push(Name { bytes: name.to_vec(), id: FileId(id) });
    }
    Ok(names)
}

fn block(
    source: &Patched,
    superblock: &Superblock,
    (number, stored): (u64, &Contents),
    at: ByteOffset,
    names: &mut Vec<Name>,
) -> Result<(), Error> {
    let wrong = |why: &str| Error::damaged("", format!("its block at byte {at} {why}"));
    // 64 KiB at most, and 512 bytes at least: the header is there.
    let mut block = vec![0; superblock.directory_block as usize];
    stored.read_stored(source, at, &mut block)?;
    let (single, many, start): (_, _, usize) =
        if superblock.has_crc { (b"XDB3", b"XDD3", 64) } else { (b"XD2B", b"XD2D", 16) };
    let end = match &block[..4] {
        mark if mark == single => {
            // Hashes of the names stand at its end, and their number last.
            let hashes = be32(&block, block.len() - 8)? as usize;
            let end = hashes.checked_mul(8).and_then(|hashes| (block.len() - 8).checked_sub(hashes));
            end.filter(|end| *end >= start).ok_or_else(|| wrong("has more hashes than room"))?
        }
        mark if mark == many => block.len(),
        // Replaced by the log with what is no directory, or never written.
        _ => return Err(wrong("is none of a directory")),
    };
    let is_patched = stored.touches(at, block.len(), |place, length| source.is_patched(place, length));
    if superblock.has_crc && !is_patched && !is_right(&block, 4)? {
        return Err(wrong("has another checksum"));
    }
    if superblock.has_crc && be64(&block, 40)? != number {
        return Err(wrong("is another directory's"));
    }
    let mut at = start;
    while at < end {
        if be16(&block, at)? == 0xffff {
            let free = usize::from(be16(&block, at + 2)?);
            if free == 0 || free % 8 != 0 {
                return Err(wrong("has free space of a length that cannot be"));
            }
            at += free;
            continue;
        }
        let id = FileId(be64(&block, at)?);
        let length = usize::from(byte(&block, at + 8)?);
        let name = part(&block[..end], at + 9, length)?;
        if name.is_empty() {
            return Err(wrong("has an entry without a name"));
        }
        if name != b"." && name != b".." {
            if names.len() >= NAMES_MAX {
                return Err(too_many("names", NAMES_MAX));
            }
            names.push(Name { bytes: name.to_vec(), id });
        }
        // The inode, the length, the name, the type, and the entry's own place.
        at += (8 + 1 + length + usize::from(superblock.has_types) + 2).next_multiple_of(8);
    }
    Ok(())
}

fn too_many(of: &'static str, limit: usize) -> Error {
    Error::TooMany { what: "a directory of this XFS".to_owned(), of, limit: limit as u64 }
}
