//! The bytes of an overlay's files. `FORMAT.md` beside this crate is the book.

use std::path::Path;

use backtide_storage::Storage;
use backtide_units::{BLOCK_SIZE, BlockIndex, BlockRange, ByteCount, ByteOffset};
use uuid::Uuid;

use crate::{OverlayError, OverlayId, blocks::Change, blocks::Slot};

/// The version this program writes and reads.
pub(crate) const VERSION: u32 = 1;

/// Length of a header: one sector.
pub(crate) const HEADER_LENGTH: usize = 512;
/// Where the map's mark of what is durable lies: a sector of its own, so that it is never torn.
pub(crate) const MARK_AT: ByteOffset = ByteOffset(HEADER_LENGTH as u64);
pub(crate) const MARK_LENGTH: usize = 32;
/// Where the map's records begin.
pub(crate) const RECORDS_AT: ByteOffset = ByteOffset(2 * HEADER_LENGTH as u64);
/// Where the data file's first slot begins.
pub(crate) const SLOTS_AT: ByteOffset = ByteOffset(BLOCK_SIZE);

pub(crate) const RECORD_HEADER_LENGTH: usize = 32;
const RECORD_MAGIC: u32 = 0x5256_4f42;
/// The longest body of a record: a write of [`BLOCKS_MAX`](crate::write) blocks needs much less.
pub(crate) const BODY_MAX: usize = 1 << 20;
const CHANGE_LENGTH: usize = 32;

/// Which of the two files.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum FileKind {
    Map,
    Data,
}

/// Number of a record of a map, from 1 without gaps. Zero comes before every record.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) struct RecordNumber(pub(crate) u64);

/// The changes of one write, in one place of the map.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Record {
    pub(crate) number: RecordNumber,
    /// The last record that was durable, with the data it names, when this one was written.
    pub(crate) durable: RecordNumber,
    pub(crate) changes: Vec<Change>,
}

/// A record's header, checked.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct RecordHeader {
    pub(crate) number: RecordNumber,
    pub(crate) durable: RecordNumber,
    pub(crate) body_length: usize,
    body_crc: u32,
}

impl FileKind {
    pub(crate) const fn magic(self) -> &'static [u8; 8] {
        match self {
            Self::Map => b"BKTDOVM\n",
            Self::Data => b"BKTDOVD\n",
        }
    }
}

impl Slot {
    /// Where the slot's bytes are in the data file.
    pub(crate) fn offset(self) -> ByteOffset {
        ByteOffset(SLOTS_AT.0 + u64::from(self.0) * BLOCK_SIZE)
    }
}

/// The header of a file.
pub(crate) fn encode_header(kind: FileKind, id: OverlayId, size: ByteCount) -> [u8; HEADER_LENGTH] {
    let mut bytes = [0; HEADER_LENGTH];
    bytes[..8].copy_from_slice(kind.magic());
    bytes[8..12].copy_from_slice(&VERSION.to_le_bytes());
    bytes[16..32].copy_from_slice(id.0.as_bytes());
    bytes[32..40].copy_from_slice(&size.0.to_le_bytes());
    let crc = crc32c::crc32c(&bytes[..HEADER_LENGTH - 4]);
    bytes[HEADER_LENGTH - 4..].copy_from_slice(&crc.to_le_bytes());
    bytes
}

/// Reads a header: whose file it is, and the size of the disk.
///
/// # Errors
/// Damaged, of another version, or of another overlay.
pub(crate) fn decode_header(
    bytes: &[u8; HEADER_LENGTH],
    kind: FileKind,
    storage: &dyn Storage,
    path: &Path,
) -> Result<(OverlayId, ByteCount), OverlayError> {
    let damaged = |why: &str| OverlayError::Damaged {
        path: storage.display(path),
        offset: ByteOffset::ZERO,
        why: why.to_owned(),
    };
    if bytes[..8] != *kind.magic() {
        return Err(damaged("it does not begin as such a file does"));
    }
    let version = u32_at(bytes, 8);
    if version != VERSION && u32_at(bytes, HEADER_LENGTH - 4) == crc32c::crc32c(&bytes[..HEADER_LENGTH - 4]) {
        return Err(OverlayError::UnknownVersion { path: storage.display(path), found: version });
    }
    let mut id = [0; 16];
    id.copy_from_slice(&bytes[16..32]);
    let (id, size) = (OverlayId(Uuid::from_bytes(id)), ByteCount(u64_at(bytes, 32)));
    if *bytes != encode_header(kind, id, size) {
        return Err(damaged("the header does not match its checksum"));
    }
    Ok((id, size))
}

/// The mark: records up to `durable` and their data are durable.
pub(crate) fn encode_mark(id: OverlayId, durable: RecordNumber) -> [u8; MARK_LENGTH] {
    let mut bytes = [0; MARK_LENGTH];
    bytes[..8].copy_from_slice(&durable.0.to_le_bytes());
    bytes[8..24].copy_from_slice(id.0.as_bytes());
    let crc = crc32c::crc32c(&bytes[..24]);
    bytes[24..28].copy_from_slice(&crc.to_le_bytes());
    bytes
}

/// Reads the mark; none when it is damaged.
pub(crate) fn decode_mark(bytes: &[u8; MARK_LENGTH], id: OverlayId) -> Option<RecordNumber> {
    let durable = RecordNumber(u64_at(bytes, 0));
    (*bytes == encode_mark(id, durable)).then_some(durable)
}

impl Record {
    /// The record's bytes in the map of `id`.
    pub(crate) fn encode(&self, id: OverlayId) -> Vec<u8> {
        let mut bytes = vec![0; RECORD_HEADER_LENGTH];
        for change in &self.changes {
            let (kind, first, count, slot) = match change {
                Change::Data { first, slot, crcs } => (1_u32, first.0, crcs.len() as u64, slot.0),
                Change::Zero(blocks) => (2, blocks.start().0, blocks.count().0, 0),
            };
            bytes.extend_from_slice(&kind.to_le_bytes());
            bytes.extend_from_slice(&slot.to_le_bytes());
            bytes.extend_from_slice(&first.to_le_bytes());
            bytes.extend_from_slice(&count.to_le_bytes());
            bytes.extend_from_slice(&[0; 8]);
            if let Change::Data { crcs, .. } = change {
                crcs.iter().for_each(|crc| bytes.extend_from_slice(&crc.to_le_bytes()));
            }
        }
        let (header, body) = bytes.split_at_mut(RECORD_HEADER_LENGTH);
        assert!(body.len() <= BODY_MAX, "a record of {} bytes is split before", body.len());
        header[..4].copy_from_slice(&RECORD_MAGIC.to_le_bytes());
        header[4..8].copy_from_slice(&(body.len() as u32).to_le_bytes());
        header[8..16].copy_from_slice(&self.number.0.to_le_bytes());
        header[16..24].copy_from_slice(&self.durable.0.to_le_bytes());
        header[24..28].copy_from_slice(&crc32c::crc32c(body).to_le_bytes());
        let crc = header_crc(id, header);
        header[28..32].copy_from_slice(&crc.to_le_bytes());
        bytes
    }
}

impl RecordHeader {
    /// Reads a record's header; says why it is none.
    pub(crate) fn decode(bytes: &[u8; RECORD_HEADER_LENGTH], id: OverlayId) -> Result<Self, String> {
        if u32_at(bytes, 0) != RECORD_MAGIC {
            return Err("no record begins here".to_owned());
        }
        let (expected, found) = (header_crc(id, bytes), u32_at(bytes, 28));
        if expected != found {
            return Err(format!("the record's header has checksum {found:08x}, expected {expected:08x}"));
        }
        let body_length = u32_at(bytes, 4) as usize;
        if body_length > BODY_MAX {
            return Err(format!("the record has {body_length} bytes, expected at most {BODY_MAX}"));
        }
        let number = |at| RecordNumber(u64_at(bytes, at));
        Ok(Self { number: number(8), durable: number(16), body_length, body_crc: u32_at(bytes, 24) })
    }

    /// Reads the changes of a record of a disk of so many blocks; says why it has none.
    pub(crate) fn changes(&self, body: &[u8], disk: BlockRange) -> Result<Vec<Change>, String> {
        let found = crc32c::crc32c(body);
        if found != self.body_crc {
            return Err(format!("the record has checksum {found:08x}, expected {:08x}", self.body_crc));
        }
        let mut changes = Vec::new();
        let mut rest = body;
        while !rest.is_empty() {
            let (head, after) = rest.split_at_checked(CHANGE_LENGTH).ok_or("a change is cut off")?;
            let (first, count) = (u64_at(head, 8), u64_at(head, 16));
            let end = first.checked_add(count).filter(|end| count > 0 && *end <= disk.end().0);
            let end = end.ok_or_else(|| format!("{count} blocks from {first} on are not of the disk"))?;
            rest = match u32_at(head, 0) {
                1 => {
                    let length = usize::try_from(count).ok().and_then(|count| count.checked_mul(4));
                    let split = length.and_then(|length| after.split_at_checked(length));
                    let (crcs, rest) = split.ok_or("a change's checksums are cut off")?;
                    let slot = Slot(u32_at(head, 4));
                    if u64::from(slot.0) + count > u64::from(u32::MAX) {
                        return Err(format!("slot {} is none of a data file", slot.0));
                    }
                    let crcs = crcs.chunks_exact(4).map(|crc| u32_at(crc, 0)).collect();
                    changes.push(Change::Data { first: BlockIndex(first), slot, crcs });
                    rest
                }
                2 => {
                    changes.push(Change::Zero(BlockRange::from(first..end)));
                    after
                }
                kind => return Err(format!("a change is of the unknown kind {kind}")),
            };
        }
        Ok(changes)
    }
}

/// The overlay's id is in it: a record of another overlay is none of this one.
fn header_crc(id: OverlayId, header: &[u8]) -> u32 {
    crc32c::crc32c_append(crc32c::crc32c(id.0.as_bytes()), &header[..28])
}

fn u32_at(bytes: &[u8], at: usize) -> u32 {
    u32::from_le_bytes(bytes[at..at + 4].try_into().expect("four bytes"))
}

fn u64_at(bytes: &[u8], at: usize) -> u64 {
    u64::from_le_bytes(bytes[at..at + 8].try_into().expect("eight bytes"))
}

#[cfg(test)]
mod tests;
