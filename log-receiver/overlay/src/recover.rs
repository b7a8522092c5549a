//! Opening an overlay as a power cut may have left it.
//!
//! The map is read record by record. Up to what is known to have been durable a bad record is damage.
//! Behind it, records are what nobody was promised: each is taken only with the data it names, and the
//! first that is not whole ends the map. Where the mark of what was durable cannot be read the records tell: each
//! names what was durable before it, and of a slot that was used again a later one does. What is taken is written again before it is synced: a device
//! that failed a sync once may say of the next that all is well without having kept the bytes.

use std::{path::Path, sync::Arc};

use backtide_storage::{Storage, StorageFile};
use backtide_units::{BLOCK_SIZE, BlockRange, ByteCount, ByteOffset};
use roaring::RoaringBitmap;

use crate::{
    OverlayError, OverlayFiles, OverlayId,
    blocks::{Blocks, Change, Slot},
    format::{
        self, FileKind, HEADER_LENGTH, MARK_AT, MARK_LENGTH, RECORD_HEADER_LENGTH, RECORDS_AT, RecordHeader,
        RecordNumber, SLOTS_AT,
    },
    slots::Slots,
};

/// An overlay that can be written on.
pub(crate) struct Found {
    pub(crate) map: Arc<dyn StorageFile>,
    pub(crate) data: Arc<dyn StorageFile>,
    pub(crate) blocks: Blocks,
    pub(crate) slots: Slots,
    pub(crate) end: ByteOffset,
    pub(crate) last: RecordNumber,
}

/// An overlay as its files tell it.
pub(crate) struct Scanned {
    pub(crate) map: Arc<dyn StorageFile>,
    pub(crate) data: Arc<dyn StorageFile>,
    pub(crate) blocks: Blocks,
    /// Where the last whole record ends.
    pub(crate) end: ByteOffset,
    pub(crate) last: RecordNumber,
    /// Where the records begin that were not known to be durable.
    tail_from: ByteOffset,
    /// What they wrote.
    tail: Vec<Change>,
    /// The mark that is written after each sync cannot be read.
    pub(crate) mark_is_damaged: bool,
}

/// Reads both files without changing them.
pub(crate) fn scan(
    storage: &dyn Storage,
    files: &OverlayFiles,
    id: OverlayId,
    size: ByteCount,
) -> Result<Scanned, OverlayError> {
    let map = open_file(storage, &files.map, FileKind::Map, id, size)?;
    let data = open_file(storage, &files.data, FileKind::Data, id, size)?;
    let io = |source| OverlayError::Io { what: "read", path: storage.display(&files.map), source };
    let mut mark = [0; MARK_LENGTH];
    map.read_at(MARK_AT, &mut mark).map_err(io)?;
    let mark = format::decode_mark(&mark, id);
    let mut scanned = Scanned {
        map,
        data,
        blocks: Blocks::default(),
        end: RECORDS_AT,
        last: RecordNumber::default(),
        tail_from: RECORDS_AT,
        tail: Vec::new(),
        mark_is_damaged: mark.is_none(),
    };
    let disk = BlockRange::whole_disk(size);
    let mut durable = match mark {
        Some(durable) => durable,
        None => told_by_records(&*scanned.map, id, disk).map_err(io)?,
    };
    loop {
        let read = read_record(&*scanned.map, scanned.end, scanned.last, id, disk).map_err(io)?;
        let why = match read {
            Ok((header, changes)) => {
                durable = durable.max(header.durable);
                // Records before a durable one are durable too, whenever that is told.
                if header.number <= durable || holds_data(&*scanned.data, &changes).map_err(io)? {
                    let length = RECORD_HEADER_LENGTH + header.body_length;
                    scanned.take(header, changes, durable, length);
                    continue;
                }
                let why = "the data that the record names is not there".to_owned();
                if scanned.mark_is_damaged {
                    // It may have been promised, and nothing tells that any more.
                    let (path, offset) = (storage.display(&files.map), scanned.end);
                    let why = format!("{why}, and the mark of what was durable cannot be read");
                    return Err(OverlayError::Damaged { path, offset, why });
                }
                why
            }
            Err(why) => why,
        };
        if scanned.last < durable {
            let (path, offset) = (storage.display(&files.map), scanned.end);
            let why = format!("{why}, and records up to {} were durable", durable.0);
            return Err(OverlayError::Damaged { path, offset, why });
        }
        return Ok(scanned);
    }
}

impl Scanned {
    fn take(&mut self, header: RecordHeader, changes: Vec<Change>, durable: RecordNumber, length: usize) {
        for change in &changes {
            self.blocks.apply(change);
        }
        self.last = header.number;
        self.end.0 += length as u64;
        if header.number <= durable {
            self.tail_from = self.end;
            self.tail.clear();
        } else {
            self.tail.extend(changes);
        }
    }

    /// The slots of all blocks.
    fn used(&self, storage: &dyn Storage, path: &Path) -> Result<RoaringBitmap, OverlayError> {
        let mut used = RoaringBitmap::new();
        for (block, stored) in self.blocks.each_stored(backtide_units::BlockIndex(0)) {
            if !used.insert(stored.slot.0) {
                return Err(OverlayError::Damaged {
                    path: storage.display(path),
                    offset: RECORDS_AT,
                    why: format!("block {block} shares slot {} with another block", stored.slot.0),
                });
            }
        }
        Ok(used)
    }
}

/// Opens an overlay and makes durable what is taken of it.
pub(crate) fn open(
    storage: &dyn Storage,
    files: &OverlayFiles,
    id: OverlayId,
    size: ByteCount,
) -> Result<Found, OverlayError> {
    let scanned = scan(storage, files, id, size)?;
    let io = |what, path: &Path| {
        let path = storage.display(path);
        move |source| OverlayError::Io { what, path, source }
    };
    let data_length = scanned.data.len().map_err(io("read", &files.data))?;
    let total = data_length.0.saturating_sub(SLOTS_AT.0).div_ceil(BLOCK_SIZE);
    let used = scanned.used(storage, &files.map)?;
    let total = u32::try_from(total).unwrap_or(u32::MAX).max(used.max().map_or(0, |last| last + 1));
    let map_length = scanned.map.len().map_err(io("read", &files.map))?;
    if map_length.0 != scanned.end.0 || scanned.tail_from != scanned.end {
        for change in &scanned.tail {
            rewrite(&*scanned.data, change).map_err(io("write", &files.data))?;
        }
        let tail = ByteCount(scanned.end.0 - scanned.tail_from.0);
        let mut records = vec![0; tail.as_usize().expect("what is not durable is little")];
        scanned.map.read_exact_at(scanned.tail_from, &mut records).map_err(io("read", &files.map))?;
        scanned.map.set_len(ByteCount(scanned.end.0)).map_err(io("cut", &files.map))?;
        scanned.map.write_at(scanned.tail_from, &records).map_err(io("write", &files.map))?;
        scanned.data.sync_data().map_err(io("sync", &files.data))?;
        scanned.map.sync_data().map_err(io("sync", &files.map))?;
    }
    // A map that was written anew may have its name only until the next power cut.
    let dir = files.map.parent().unwrap_or(Path::new(""));
    storage.sync_dir(dir).map_err(io("sync", dir))?;
    // The mark that was read may not be durable, and slots are free from here on that records before it
    // have emptied.
    let mark = format::encode_mark(id, scanned.last);
    scanned.map.write_at(MARK_AT, &mark).map_err(io("write", &files.map))?;
    scanned.map.sync_data().map_err(io("sync", &files.map))?;
    let slots = Slots::new(total, &used);
    let Scanned { map, data, blocks, end, last, .. } = scanned;
    Ok(Found { map, data, blocks, slots, end, last })
}

/// Opens a file of the overlay `id`.
pub(crate) fn open_file(
    storage: &dyn Storage,
    path: &Path,
    kind: FileKind,
    id: OverlayId,
    size: ByteCount,
) -> Result<Arc<dyn StorageFile>, OverlayError> {
    let io = |what| move |source| OverlayError::Io { what, path: storage.display(path), source };
    let file = storage.open(path).map_err(io("open"))?;
    let mut header = [0; HEADER_LENGTH];
    file.read_at(ByteOffset::ZERO, &mut header).map_err(io("read"))?;
    let found = format::decode_header(&header, kind, storage, path)?;
    if found != (id, size) {
        return Err(OverlayError::Damaged {
            path: storage.display(path),
            offset: ByteOffset::ZERO,
            why: format!(
                "it is of overlay {} of a disk of {} bytes, expected {} of {size} bytes",
                found.0.0, found.1, id.0
            ),
        });
    }
    Ok(file)
}

/// The last record that another one tells was durable.
fn told_by_records(map: &dyn StorageFile, id: OverlayId, disk: BlockRange) -> std::io::Result<RecordNumber> {
    let (mut at, mut last, mut durable) = (RECORDS_AT, RecordNumber::default(), RecordNumber::default());
    while let Ok((header, _)) = read_record(map, at, last, id, disk)? {
        (last, durable) = (header.number, durable.max(header.durable));
        at.0 += (RECORD_HEADER_LENGTH + header.body_length) as u64;
    }
    Ok(durable)
}

pub(crate) type MaybeRecord = Result<(RecordHeader, Vec<Change>), String>;

/// The record at `at`, which follows `last`; or why there is none.
pub(crate) fn read_record(
    map: &dyn StorageFile,
    at: ByteOffset,
    last: RecordNumber,
    id: OverlayId,
    disk: BlockRange,
) -> std::io::Result<MaybeRecord> {
    let mut header = [0; RECORD_HEADER_LENGTH];
    if map.read_at(at, &mut header)? < RECORD_HEADER_LENGTH {
        return Ok(Err("the file ends".to_owned()));
    }
    let header = match RecordHeader::decode(&header, id) {
        Ok(header) => header,
        Err(why) => return Ok(Err(why)),
    };
    if header.number.0 != last.0 + 1 || header.durable > last {
        return Ok(Err(format!("record {} follows record {}", header.number.0, last.0)));
    }
    let mut body = vec![0; header.body_length];
    if map.read_at(ByteOffset(at.0 + RECORD_HEADER_LENGTH as u64), &mut body)? < body.len() {
        return Ok(Err("the file ends within a record".to_owned()));
    }
    Ok(header.changes(&body, disk).map(|changes| (header, changes)))
}

/// Whether the data that `changes` name is there.
fn holds_data(data: &dyn StorageFile, changes: &[Change]) -> std::io::Result<bool> {
    for change in changes {
        let Change::Data { slot, crcs, .. } = change else { continue };
        let mut bytes = vec![0; crcs.len() * BLOCK_SIZE as usize];
        if data.read_at(slot.offset(), &mut bytes)? < bytes.len() {
            return Ok(false);
        }
        let mut blocks = bytes.chunks_exact(BLOCK_SIZE as usize).zip(crcs);
        if !blocks.all(|(block, crc)| crc32c::crc32c(block) == *crc) {
            return Ok(false);
        }
    }
    Ok(true)
}

/// Writes what is there once more.
fn rewrite(data: &dyn StorageFile, change: &Change) -> std::io::Result<()> {
    let Change::Data { slot: Slot(slot), crcs, .. } = change else { return Ok(()) };
    let mut bytes = vec![0; crcs.len() * BLOCK_SIZE as usize];
    let offset = Slot(*slot).offset();
    data.read_exact_at(offset, &mut bytes)?;
    data.write_at(offset, &bytes)
}
