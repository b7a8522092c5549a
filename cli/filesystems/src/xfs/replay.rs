//! What the log has of directories, links, trees of extents and inodes, put over the volume.
//!
//! Allocation is left as it is: nothing here reads it. What on the volume is newer than the log is not replaced, as
//! in the kernel: each structure says which LSN it was written with.

use std::collections::{HashMap, HashSet};

use backtide_units::ByteOffset;

use super::{
    log::{Item, Log},
    patches::Patched,
    superblock::Superblock,
};
use crate::{
    Error, Source,
    fields::{be16, be64, byte, le16, le32, le64, part},
};

const INODE: u16 = 0x123b;
const BUFFER: u16 = 0x123c;

/// Flags of a buffer: it holds inodes of which only the list of deleted ones is logged; it was freed.
const INODE_BUFFER: u16 = 1;
const CANCELLED: u16 = 2;

/// What a buffer holds: trees, inodes, links, directories, the superblock.
const TREE: u16 = 4;
const INODES: u16 = 8;
const LINK: u16 = 9;
const DIRECTORY_BLOCK: u16 = 10;
const DIRECTORY_DATA: u16 = 11;
const SUPERBLOCK: u16 = 18;

/// Buffers are logged in chunks of so many bytes.
const CHUNK: usize = 128;

/// The most that is replayed.
const BYTES_MAX: usize = 256 << 20;

/// The longest buffer: blocks of a directory.
const BUFFER_MAX: usize = 64 << 10;

/// What an inode item has besides its core: the data fork, as bytes, extents, or the root of a tree.
const FORK_BYTES: u32 = 0x2 | 0x4;
const FORK_ROOT: u32 = 0x8;

/// A buffer on the volume, as the log names it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
struct Place {
    sector: u64,
    sectors: u16,
}

/// Changes of files that the log has begun and not ended: by their kind and number. Those of allocation alone are left
/// out, as nothing here reads it.
#[derive(Default)]
struct Unfinished(HashSet<(u16, u64)>);

/// The kinds of such changes and of their ends: of where a file's bytes are, and of two files that exchange theirs.
const BEGUN: [u16; 2] = [0x1244, 0x1248];
const ENDED: [u16; 2] = [0x1245, 0x1249];

impl Unfinished {
    fn note(&mut self, items: &[Item]) -> Result<(), Error> {
        for item in items {
            let Some(kind) = kind(item) else { continue };
            if BEGUN.contains(&kind) {
                self.0.insert((kind, le64(&item[0], 8)?));
            } else if ENDED.contains(&kind) {
                self.0.remove(&(kind - 1, le64(&item[0], 8)?));
            }
        }
        Ok(())
    }
}

/// Replays the log. What was put over `source` when it fails is not whole. How many changes of files it has begun
/// and not ended: a mount would end them.
pub(super) fn replay(superblock: &Superblock, source: &mut Patched) -> Result<usize, Error> {
    let named = |error: Error| error.of(|| "the log of this XFS".to_owned());
    let Some(start) = superblock.log else {
        let what = "it is on a device of its own".to_owned();
        return Err(Error::Unsupported { what });
    };
    let place = (start, superblock.log_length);
    let mut cancelled: HashMap<Place, u32> = HashMap::new();
    let mut transactions = Vec::new();
    let (mut bytes, mut unfinished) = (0, Unfinished::default());
    let mut first = |lsn: u64, mut items: Vec<Item>| {
        unfinished.note(&items)?;
        items.retain(is_wanted);
        bytes += items.iter().flatten().map(Vec::len).sum::<usize>();
        if bytes > BYTES_MAX {
            let (what, limit) = ("the log of this XFS".to_owned(), BYTES_MAX as u64);
            return Err(Error::TooMany { what, of: "bytes to replay", limit });
        }
        for item in &items {
            if let Some((place, _)) = buffer_format(item)?.filter(|(_, flags)| flags & CANCELLED != 0) {
                *cancelled.entry(place).or_default() += 1;
            }
        }
        transactions.push((lsn, items));
        Ok(())
    };
    Log::new(source, place, superblock.has_crc).transactions(&mut first).map_err(named)?;
    apply(superblock, source, transactions, cancelled).map_err(named)?;
    Ok(unfinished.0.len())
}

/// Puts transactions over the volume, in their order; `cancelled` is how often each buffer is freed in them.
fn apply(
    superblock: &Superblock,
    source: &mut Patched,
    transactions: Vec<(u64, Vec<Item>)>,
    mut cancelled: HashMap<Place, u32>,
) -> Result<(), Error> {
    for (lsn, items) in transactions {
        // Buffers first, then inodes, then what was freed: so it is written, too.
        for item in &items {
            if let Some((place, flags)) = buffer_format(item)?
                && flags & CANCELLED == 0
                && !cancelled.contains_key(&place)
            {
                buffer(superblock, source, (place, flags), item, lsn)?;
            }
        }
        for item in items.iter().filter(|item| kind(item) == Some(INODE)) {
            // What was freed with its inodes may hold the bytes of a file by now.
            let place = inode_cluster(&item[0])?;
            if !place.is_some_and(|place| cancelled.contains_key(&place)) {
                inode(superblock, source, item, lsn)?;
            }
        }
        for item in &items {
            let Some((place, flags)) = buffer_format(item)? else { continue };
            if let Some(count) = cancelled.get_mut(&place).filter(|_| flags & CANCELLED != 0) {
                *count -= 1;
                if *count == 0 {
                    cancelled.remove(&place);
                }
            }
        }
    }
    Ok(())
}

/// Whether a reader needs to know of an item.
fn is_wanted(item: &Item) -> bool {
    match buffer_format(item) {
        Ok(Some((_, flags))) => {
            let is_read =
                matches!(flags >> 11, TREE | INODES | LINK | DIRECTORY_BLOCK | DIRECTORY_DATA | SUPERBLOCK);
            flags & CANCELLED != 0 || is_read && flags & INODE_BUFFER == 0
        }
        Ok(None) => kind(item) == Some(INODE),
        // Whoever replays it says what is wrong with it.
        Err(_) => true,
    }
}

fn kind(item: &Item) -> Option<u16> {
    item.first().and_then(|format| le16(format, 0).ok())
}

/// Which buffer an item is of, and its flags.
fn buffer_format(item: &Item) -> Result<Option<(Place, u16)>, Error> {
    match item.first() {
        Some(format) if kind(item) == Some(BUFFER) => {
            let place = Place { sector: le64(format, 8)?, sectors: le16(format, 6)? };
            Ok(Some((place, le16(format, 4)?)))
        }
        Some(_) | None => Ok(None),
    }
}

/// The buffer that an inode lies in; none when no buffer can be so long.
fn inode_cluster(format: &[u8]) -> Result<Option<Place>, Error> {
    // Machines of 32 bits leave out four bytes before the number.
    let at = if format.len() >= 56 { 40 } else { 36 };
    let (sector, length) = (le64(format, at)?, le32(format, at + 8)?);
    Ok(u16::try_from(length).ok().map(|sectors| Place { sector, sectors }))
}

/// Puts the logged chunks of a buffer over the volume.
fn buffer(
    superblock: &Superblock,
    source: &mut Patched,
    (place, flags): (Place, u16),
    item: &Item,
    lsn: u64,
) -> Result<(), Error> {
    let beyond = || Error::damaged("", format!("it changes sector {}, which is not there", place.sector));
    let at = ByteOffset(place.sector.checked_mul(512).ok_or_else(beyond)?);
    let length = usize::from(place.sectors) * 512;
    if length == 0 || length > BUFFER_MAX {
        return Err(Error::damaged("", format!("it has a buffer of {length} bytes")));
    }
    let mut bytes = vec![0; length];
    source.read_at(at, &mut bytes)?;
    if superblock.has_crc && written_with(superblock, &bytes).is_some_and(|written| written >= lsn) {
        return Ok(());
    }
    let format = &item[0];
    let words = le32(format, 16)? as usize;
    let map: Vec<u32> = (0..words.min(length / CHUNK / 32 + 1))
        .map(|word| le32(format, 20 + word * 4))
        .collect::<Result<_, _>>()?;
    let is_set = |chunk: usize| map.get(chunk / 32).is_some_and(|word| word >> (chunk % 32) & 1 == 1);
    let chunks = length / CHUNK;
    let mut regions = item[1..].iter();
    let mut chunk = 0;
    while chunk < chunks {
        if !is_set(chunk) {
            chunk += 1;
            continue;
        }
        let run = (chunk..chunks).take_while(|chunk| is_set(*chunk)).count();
        let region = regions.next().ok_or_else(|| Error::damaged("", "a buffer in it lacks a region"))?;
        // A long run may be logged as several regions.
        let count = run.min(region.len() / CHUNK);
        if count == 0 {
            return Err(Error::damaged("", "a region of a buffer in it is too short"));
        }
        bytes[chunk * CHUNK..(chunk + count) * CHUNK].copy_from_slice(&region[..count * CHUNK]);
        chunk += count;
    }
    // Trees of free space have the same kind, and nobody reads them here.
    if flags >> 11 == TREE && !matches!(&bytes[..4], b"BMA3" | b"BMAP") {
        return Ok(());
    }
    source.patch(at, &bytes)
}

/// The LSN that a buffer on the volume was written with, when it is one of this volume that says so.
fn written_with(superblock: &Superblock, bytes: &[u8]) -> Option<u64> {
    let (lsn, id) = match bytes.get(..4)? {
        b"BMA3" => (32, 40),
        b"XDB3" | b"XDD3" => (16, 24),
        b"XSLM" => (48, 16),
        b"XFSB" => (240, 32),
        _ => return None,
    };
    let is_own = bytes.get(..4)? == b"XFSB" || part(bytes, id, 16).ok()? == superblock.id;
    let lsn = be64(bytes, lsn).ok()?;
    (is_own && lsn != 0 && lsn != u64::MAX).then_some(lsn)
}

/// Puts a logged inode over the volume.
fn inode(superblock: &Superblock, source: &mut Patched, item: &Item, lsn: u64) -> Result<(), Error> {
    let format = &item[0];
    // Machines of 32 bits leave out four bytes before the number.
    let number = le64(format, if format.len() >= 56 { 16 } else { 12 })?;
    let fields = le32(format, 4)?;
    let core = item.get(1).ok_or_else(|| Error::damaged("", "an inode in it has no core"))?;
    let at = superblock.inode_at(number)?;
    let mut bytes = vec![0; superblock.inode_size];
    source.read_at(at, &mut bytes)?;
    let is_inode = bytes[..2] == *b"IN";
    if is_inode && byte(&bytes, 4)? == 3 {
        // Blocks that get inodes may still have those of a volume that was there before.
        let own = be64(&bytes, 152)? == number && bytes[160..176] == superblock.id;
        let written = be64(&bytes, 112)?;
        // Several transactions may have begun at one LSN, so an equal one does not say that this is in its place.
        if own && written != 0 && written != u64::MAX && written > lsn {
            return Ok(());
        }
    } else if is_inode {
        // Older inodes count how often they were written.
        let (written, logged) = (be16(&bytes, 30)?, le16(core, 30)?);
        if written > logged && !(written == u16::MAX && logged < u16::MAX >> 1) {
            return Ok(());
        }
    }
    put_core(&mut bytes, core)?;
    let start = if byte(&bytes, 4)? == 3 { 176 } else { 100 };
    let attributes = usize::from(byte(&bytes, 82)?) * 8;
    let length = if attributes == 0 { bytes.len() - start } else { attributes };
    let fork = bytes.get_mut(start..start + length);
    let fork = fork.ok_or_else(|| Error::damaged("", "an inode in it has too long a fork"))?;
    if fields & (FORK_BYTES | FORK_ROOT) != 0 {
        let logged = item.get(2).ok_or_else(|| Error::damaged("", "an inode in it has no fork"))?;
        if fields & FORK_BYTES != 0 {
            let target = fork.get_mut(..logged.len());
            let target = target.ok_or_else(|| Error::damaged("", "an inode in it has too long a fork"))?;
            target.copy_from_slice(logged);
        } else {
            put_root(superblock, fork, logged)?;
        }
    }
    source.patch(at, &bytes)
}

/// The core of an inode, from the byte order of the machine to that of the volume.
fn put_core(bytes: &mut [u8], core: &[u8]) -> Result<(), Error> {
    const BIG_TIMES: u64 = 1 << 3;
    const BIG_COUNTS: u64 = 1 << 4;
    let is_long = byte(core, 4)? == 3;
    let length = if is_long { 176 } else { 96 };
    let core = part(core, 0, length)?;
    let flags = if is_long { le64(core, 120)? } else { 0 };
    let mut put = |at: usize, width: usize| {
        let target = &mut bytes[at..at + width];
        target.copy_from_slice(&core[at..at + width]);
        target.reverse();
    };
    for at in [0, 2, 20, 22, 88, 90] {
        put(at, 2);
    }
    for at in [8, 12, 16, 72, 84, 92] {
        put(at, 4);
    }
    for at in [56, 64] {
        put(at, 8);
    }
    if flags & BIG_COUNTS != 0 {
        put(24, 8);
        put(76, 4);
        put(80, 2);
    } else {
        put(30, 2);
        put(76, 4);
        put(80, 2);
    }
    let times: &[usize] = if is_long { &[32, 40, 48, 144] } else { &[32, 40, 48] };
    for at in times {
        if flags & BIG_TIMES != 0 {
            put(*at, 8);
        } else {
            put(*at, 4);
            put(*at + 4, 4);
        }
    }
    if is_long {
        for at in [104, 112, 120, 152] {
            put(at, 8);
        }
        put(128, 4);
        bytes[160..176].copy_from_slice(&core[160..176]);
    }
    // Single bytes: version, format, attributes' place and format.
    for at in [4, 5, 6, 7, 82, 83] {
        bytes[at] = core[at];
    }
    Ok(())
}

/// The root of a tree of extents, which is logged with the header that a block of the tree has.
fn put_root(superblock: &Superblock, fork: &mut [u8], logged: &[u8]) -> Result<(), Error> {
    let header = if superblock.has_crc { 72 } else { 24 };
    let (level, count) = (be16(logged, 4)?, usize::from(be16(logged, 6)?));
    let (room_there, room) = (logged.len().saturating_sub(header) / 16, fork.len().saturating_sub(4) / 16);
    if count > room || count > room_there {
        return Err(Error::damaged("", format!("the root of a tree in it has {count} pointers")));
    }
    fork[..2].copy_from_slice(&level.to_be_bytes());
    fork[2..4].copy_from_slice(&(count as u16).to_be_bytes());
    fork[4..4 + count * 8].copy_from_slice(part(logged, header, count * 8)?);
    let pointers = part(logged, header + room_there * 8, count * 8)?;
    fork[4 + room * 8..4 + (room + count) * 8].copy_from_slice(pointers);
    Ok(())
}

#[cfg(test)]
mod tests;
