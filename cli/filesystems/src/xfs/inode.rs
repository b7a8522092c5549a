//! Inodes: what they say of a file, and the extents or the tree of extents that say where its bytes are.

use backtide_units::{ByteCount, ByteOffset};

use super::{
    patches::Patched,
    superblock::{Superblock, is_right},
};
use crate::{
    Contents, Error, Kind, Node, Piece, Place, Source,
    contents::PIECES_MAX,
    fields::{be16, be32, be64, byte, index, part},
};

/// Levels of a tree of extents; XFS has 9 at most.
const LEVELS_MAX: u16 = 9;

/// Blocks of one tree: half full they have twice the extents that are read.
const BLOCKS_MAX: usize = 1 << 17;

/// Seconds from the time that new time stamps count from to 1970.
const BIG_TIME: i128 = 1 << 31;

const BIG_TIMES: u64 = 1 << 3;
const BIG_COUNTS: u64 = 1 << 4;

/// How the data fork is stored.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Fork {
    Device,
    Inline,
    Extents,
    Tree,
}

/// An inode, and the bytes of its data fork.
pub(super) struct Inode {
    pub(super) node: Node,
    /// Whether its bytes are on a device of their own.
    is_realtime: bool,
    pub(super) number: u64,
    fork: Fork,
    extents: u64,
    data: Vec<u8>,
}

/// Reads and checks an inode.
pub(super) fn read(source: &Patched, superblock: &Superblock, number: u64) -> Result<Inode, Error> {
    let at = superblock.inode_at(number)?;
    let mut bytes = vec![0; superblock.inode_size];
    source.read_at(at, &mut bytes)?;
    if bytes[..2] != *b"IN" {
        return Err(Error::damaged("", "its mark is not there"));
    }
    if superblock.has_crc {
        if !source.is_patched(at, bytes.len()) && !is_right(&bytes, 100)? {
            return Err(Error::damaged("", "its checksum is another"));
        }
        if be64(&bytes, 152)? != number {
            return Err(Error::damaged("", format!("it says it is inode {}", be64(&bytes, 152)?)));
        }
    }
    parse(&bytes, number)
}

fn parse(bytes: &[u8], number: u64) -> Result<Inode, Error> {
    let version = byte(bytes, 4)?;
    let start = match version {
        1 | 2 => 100,
        3 => 176,
        version => return Err(Error::damaged("", format!("it is of version {version}"))),
    };
    let mode = be16(bytes, 2)?;
    let fork = match byte(bytes, 5)? {
        0 => Fork::Device,
        1 => Fork::Inline,
        2 => Fork::Extents,
        3 => Fork::Tree,
        format => return Err(Error::damaged("", format!("its data fork is of the format {format}"))),
    };
    let kind = match mode & 0xf000 {
        0x8000 => Kind::File,
        0x4000 => Kind::Directory,
        0xa000 => Kind::Symlink,
        0 => return Err(Error::damaged("", "it is free")),
        _ => Kind::Special,
    };
    let flags = if version == 3 { be64(bytes, 120)? } else { 0 };
    let extents = if flags & BIG_COUNTS != 0 { be64(bytes, 24)? } else { u64::from(be32(bytes, 76)?) };
    let time = |at: usize| -> Result<i128, Error> {
        Ok(if flags & BIG_TIMES != 0 {
            i128::from(be64(bytes, at)?) - BIG_TIME * 1_000_000_000
        } else {
            let seconds = i128::from(be32(bytes, at)?.cast_signed());
            seconds * 1_000_000_000 + i128::from(be32(bytes, at + 4)?)
        })
    };
    let attributes = usize::from(byte(bytes, 82)?) * 8;
    let length = if attributes == 0 { bytes.len().saturating_sub(start) } else { attributes };
    Ok(Inode {
        node: Node {
            kind,
            size: ByteCount(be64(bytes, 56)?),
            mode: mode & 0o7777,
            uid: be32(bytes, 8)?,
            gid: be32(bytes, 12)?,
            modified_ns: time(40)?,
            changed_ns: time(48)?,
        },
        is_realtime: be16(bytes, 90)? & 1 != 0,
        number,
        fork,
        extents,
        data: part(bytes, start, length)?.to_vec(),
    })
}

impl Inode {
    /// Whether its bytes stand in the inode itself.
    pub(super) fn is_inline(&self) -> bool {
        self.fork == Fork::Inline
    }

    /// The bytes that stand in the inode itself, of which only those up to its size count.
    pub(super) fn inline(&self) -> Result<&[u8], Error> {
        Ok(part(&self.data, 0, index(self.node.size.0)?)?)
    }

    /// Where its bytes lie.
    pub(super) fn stored(&self, source: &Patched, superblock: &Superblock) -> Result<Contents, Error> {
        if self.is_realtime {
            let what = format!("inode {} is on the realtime device of its XFS", self.number);
            return Err(Error::Unsupported { what });
        }
        let mut pieces = Vec::new();
        match self.fork {
            Fork::Device => return Err(Error::damaged("", "it is a device")),
            Fork::Inline => return Ok(Contents::inline(self.inline()?.to_vec())),
            Fork::Extents => {
                let length = index(self.extents)?.saturating_mul(16);
                add_extents(superblock, part(&self.data, 0, length)?, &mut pieces)?;
            }
            Fork::Tree => self.add_tree(source, superblock, &mut pieces)?,
        }
        Contents::new(self.node.size, pieces, source.size())
    }

    /// The extents of a tree, level by level from the root that stands in the inode.
    fn add_tree(
        &self,
        source: &Patched,
        superblock: &Superblock,
        pieces: &mut Vec<Piece>,
    ) -> Result<(), Error> {
        let (level, count) = (be16(&self.data, 0)?, usize::from(be16(&self.data, 2)?));
        if level == 0 || level > LEVELS_MAX {
            return Err(Error::damaged("", format!("its tree of extents has {level} levels")));
        }
        let room = (self.data.len() - 4) / 16;
        let mut blocks = pointers(part(&self.data, 4, self.data.len() - 4)?, room, count)?;
        for level in (0..level).rev() {
            let mut below = Vec::new();
            for number in blocks {
                let block = self.tree_block(source, superblock, number, level)?;
                let header = if superblock.has_crc { 72 } else { 24 };
                let (count, body) = (usize::from(be16(&block, 6)?), &block[header..]);
                if level == 0 {
                    add_extents(superblock, part(body, 0, count * 16)?, pieces)?;
                } else {
                    below.extend(pointers(body, body.len() / 16, count)?);
                }
                if below.len() > BLOCKS_MAX {
                    return Err(too_many());
                }
            }
            blocks = below;
        }
        Ok(())
    }

    fn tree_block(
        &self,
        source: &Patched,
        superblock: &Superblock,
        number: u64,
        level: u16,
    ) -> Result<Vec<u8>, Error> {
        let at = superblock.block_at(number)?;
        // Blocks of 512 bytes at least: the header is there.
        let mut block = vec![0; superblock.block_size() as usize];
        source.read_at(at, &mut block)?;
        let wrong = |why: &str| Error::damaged("", format!("block {number:#x} of its tree of extents {why}"));
        let mark = if superblock.has_crc { b"BMA3" } else { b"BMAP" };
        if block[..4] != *mark || be16(&block, 4)? != level {
            return Err(wrong("is none"));
        }
        if superblock.has_crc {
            if !source.is_patched(at, block.len()) && !is_right(&block, 64)? {
                return Err(wrong("has another checksum"));
            }
            if be64(&block, 56)? != self.number {
                return Err(wrong("is another file's"));
            }
        }
        Ok(block)
    }
}

/// The pointers of a node of which `count` are in use: they stand behind the room for as many keys as there can be.
fn pointers(body: &[u8], room: usize, count: usize) -> Result<Vec<u64>, Error> {
    if count > room {
        return Err(Error::damaged("", format!("a node of its tree of extents has {count} pointers")));
    }
    (0..count).map(|number| Ok(be64(body, room * 8 + number * 8)?)).collect()
}

/// Extents as they are packed into 16 bytes: unwritten 1, offset 54, block 52, count 21 bits.
fn add_extents(superblock: &Superblock, records: &[u8], pieces: &mut Vec<Piece>) -> Result<(), Error> {
    for record in records.chunks_exact(16) {
        let (high, low) = (be64(record, 0)?, be64(record, 8)?);
        let (offset, blocks) = (high >> 9 & ((1 << 54) - 1), low & ((1 << 21) - 1));
        let start = (high & 0x1ff) << 43 | low >> 21;
        // What was reserved and never written reads as zeroes.
        if high >> 63 == 1 {
            continue;
        }
        if pieces.len() >= PIECES_MAX {
            return Err(too_many());
        }
        let (at, length) = (superblock.bytes(offset)?, superblock.bytes(blocks)?);
        let place = Place::Volume(superblock.block_at(start)?);
        pieces.push(Piece { at: ByteOffset(at), length: ByteCount(length), place });
    }
    Ok(())
}

fn too_many() -> Error {
    Error::TooMany { what: "a file of this XFS".to_owned(), of: "extents", limit: PIECES_MAX as u64 }
}
