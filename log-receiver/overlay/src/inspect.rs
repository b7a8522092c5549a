//! The files of an overlay for people: what the map says became of which block, and what is wrong.

use std::{io, path::Path, sync::Arc};

use backtide_storage::Storage;
use backtide_units::{BLOCK_SIZE, BlockRange, ByteCount, ByteOffset};

use crate::{
    OverlayError, OverlayFiles, OverlayId,
    blocks::Change,
    check,
    format::{
        self, FileKind, HEADER_LENGTH, MARK_AT, MARK_LENGTH, RECORD_HEADER_LENGTH, RECORDS_AT, RecordNumber,
        SLOTS_AT,
    },
    recover::read_record,
};

/// How the map of an overlay begins.
pub const MAP_MAGIC: [u8; 8] = *FileKind::Map.magic();

/// How the data of an overlay begin.
pub const DATA_MAGIC: [u8; 8] = *FileKind::Data.magic();

/// Writes a readable listing of the map of an overlay, a change a line; damage is a line of the listing. Whether there is none.
///
/// # Errors
/// Of reading the file and of writing to `out`; a version that this program does not know.
pub fn inspect_map(storage: &dyn Storage, path: &Path, out: &mut dyn io::Write) -> io::Result<bool> {
    let Some((id, size)) = header(storage, path, FileKind::Map, out)? else { return Ok(false) };
    let map = storage.open(path)?;
    let mut mark = [0; MARK_LENGTH];
    map.read_at(MARK_AT, &mut mark)?;
    let mark = format::decode_mark(&mark, id);
    match mark {
        Some(mark) => writeln!(out, "durable up to record {}", mark.0)?,
        None => writeln!(out, "DAMAGED at byte {MARK_AT}: its mark is not what was written")?,
    }
    let (length, disk) = (map.len()?.0, BlockRange::whole_disk(size));
    let mut durable = mark.unwrap_or_default();
    let (mut at, mut last) = (RECORDS_AT, RecordNumber::default());
    while at.0 < length {
        let (header, changes) = match read_record(&*map, at, last, id, disk)? {
            Ok(read) => read,
            Err(why) if last < durable => {
                writeln!(out, "DAMAGED at byte {at}: {why}, and records up to {} were durable", durable.0)?;
                return Ok(false);
            }
            Err(why) => {
                writeln!(out, "ends at byte {at} with what nobody was promised: {why}")?;
                break;
            }
        };
        (durable, last) = (durable.max(header.durable), header.number);
        for change in changes {
            match change {
                Change::Data { first, slot, crcs } => {
                    let count = crcs.len();
                    writeln!(out, "{at:>10}  #{} {count} blocks from {first} on in slot {}", last.0, slot.0)?;
                }
                Change::Zero(blocks) => writeln!(out, "{at:>10}  #{} zeroes in blocks {blocks}", last.0)?,
            }
        }
        at.0 += (RECORD_HEADER_LENGTH + header.body_length) as u64;
    }
    Ok(mark.is_some())
}

/// The same of the data: each block that the map beside it names against its checksum there.
///
/// # Errors
/// As [`inspect_map`].
pub fn inspect_data(storage: &Arc<dyn Storage>, path: &Path, out: &mut dyn io::Write) -> io::Result<bool> {
    let Some((id, size)) = header(&**storage, path, FileKind::Data, out)? else { return Ok(false) };
    let slots = storage.open(path)?.len()?.0.saturating_sub(SLOTS_AT.0).div_ceil(BLOCK_SIZE);
    writeln!(out, "{slots} slots of {BLOCK_SIZE} bytes")?;
    let files = OverlayFiles { map: path.with_extension("map"), data: path.to_owned() };
    match check(storage, &files, id, size, &mut |_| true) {
        Ok(checked) => {
            writeln!(out, "{} blocks are in them", checked.blocks)?;
            checked.damage.iter().try_for_each(|damage| writeln!(out, "{damage}"))?;
            if checked.more_damage > 0 {
                writeln!(out, "{} more damaged places", checked.more_damage)?;
            }
            Ok(checked.damage.is_empty())
        }
        Err(error) => {
            let map = storage.display(&files.map);
            writeln!(out, "which blocks they have {} does not tell: {error}", map.display())?;
            Ok(!matches!(error, OverlayError::Damaged { .. }))
        }
    }
}

/// Whose file it is; none when its header is damaged.
fn header(
    storage: &dyn Storage,
    path: &Path,
    kind: FileKind,
    out: &mut dyn io::Write,
) -> io::Result<Option<(OverlayId, ByteCount)>> {
    writeln!(out, "{}", storage.display(path).display())?;
    let mut bytes = [0; HEADER_LENGTH];
    storage.open(path)?.read_at(ByteOffset::ZERO, &mut bytes)?;
    match format::decode_header(&bytes, kind, storage, path) {
        Ok((id, size)) => {
            let what = match kind {
                FileKind::Map => "map",
                FileKind::Data => "data",
            };
            writeln!(out, "{what} of overlay {} of a disk of {size} bytes", id.0)?;
            Ok(Some((id, size)))
        }
        Err(error @ OverlayError::Damaged { .. }) => writeln!(out, "{error}").map(|()| None),
        Err(error) => Err(io::Error::other(error)),
    }
}
