//! The names of a directory: a tree, of which every node in use is read, in the order of the file.

use backtide_units::ByteOffset;

use super::{
    FIRST_FILE, Ntfs,
    attribute::{Attributes, NUMBER},
    record::restore,
};
use crate::{
    Error, FileId, Name,
    fields::{byte, index, le16, le32, le64, part},
    file_system::NAMES_MAX,
};

const ROOT: u32 = 0x90;
const ALLOCATION: u32 = 0xa0;
const BITMAP: u32 = 0xb0;

/// `$I30`, the index of names.
const NAME: [u8; 8] = *b"$\0I\x003\x000\0";

/// Names that old programs are given beside the true one.
const DOS: u8 = 2;

/// Blocks of one directory: more than a million names fill.
const BLOCKS_MAX: u64 = 1 << 18;

/// All names, each once.
pub(super) fn names(volume: &Ntfs, attributes: &Attributes) -> Result<Vec<Name>, Error> {
    let root = attributes.whole(volume, ROOT, &NAME, 1 << 16)?;
    let root = root.ok_or_else(|| Error::damaged("", "it has no root"))?;
    let mut names = Vec::new();
    entries(part(&root, 16, root.len().saturating_sub(16))?, &mut names)?;
    let Some(blocks) = attributes.contents(volume, ALLOCATION, &NAME)? else { return Ok(names) };
    let bitmap = attributes.whole(volume, BITMAP, &NAME, BLOCKS_MAX / 8)?.unwrap_or_default();
    let size = volume.index_block as u64;
    for number in 0..blocks.size().0 / size {
        let is_used = bitmap.get(index(number / 8)?).is_some_and(|byte| byte >> (number % 8) & 1 == 1);
        if number >= BLOCKS_MAX {
            break;
        }
        if !is_used {
            continue;
        }
        let mut block = vec![0; volume.index_block];
        let read = blocks.read_stored(volume.source.as_ref(), ByteOffset(number * size), &mut block);
        let read = read.and_then(|()| restore(&mut block, b"INDX"));
        let read = read.and_then(|()| entries(part(&block, 24, block.len() - 24)?, &mut names));
        read.map_err(|error| match error {
            Error::Damaged { why, .. } => Error::damaged("", format!("its block {number}: {why}")),
            other => other,
        })?;
    }
    Ok(names)
}

/// The names of a node, from its header on.
fn entries(node: &[u8], names: &mut Vec<Name>) -> Result<(), Error> {
    let (mut at, end) = (index(u64::from(le32(node, 0)?))?, index(u64::from(le32(node, 4)?))?);
    loop {
        let length = usize::from(le16(node, at + 8)?);
        let flags = le16(node, at + 12)?;
        if flags & 2 != 0 {
            return Ok(());
        }
        if length < 16 + 66 || at + length > end {
            return Err(Error::damaged("", "an entry of it has a length that cannot be"));
        }
        let entry = part(node, at, length)?;
        at += length;
        let id = FileId(le64(entry, 0)?);
        let letters = part(entry, 16 + 66, usize::from(byte(entry, 16 + 64)?) * 2)?;
        if byte(entry, 16 + 65)? == DOS || id.0 & NUMBER < FIRST_FILE {
            continue;
        }
        if names.len() >= NAMES_MAX {
            let what = "a directory of this NTFS".to_owned();
            return Err(Error::TooMany { what, of: "names", limit: NAMES_MAX as u64 });
        }
        names.push(Name { bytes: text(letters).into_bytes(), id });
    }
}

/// Letters of two bytes each; what is no letter is replaced.
pub(super) fn text(letters: &[u8]) -> String {
    let letters: Vec<u16> =
        letters.chunks_exact(2).map(|letter| u16::from_le_bytes([letter[0], letter[1]])).collect();
    String::from_utf16_lossy(&letters)
}
