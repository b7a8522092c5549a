//! Every block of an overlay against its checksum, for scrub and fsck.

use std::{path::Path, sync::Arc, sync::PoisonError, time::Duration};

use backtide_storage::{Storage, StorageFile};
use backtide_units::{BLOCK_SIZE, BlockCount, BlockIndex, BlockRange, ByteCount, ByteOffset};

use crate::{
    Overlay, OverlayError, OverlayFiles, OverlayId,
    blocks::{Blocks, Stored},
    format::{self, FileKind, MARK_AT, MARK_LENGTH, RECORD_HEADER_LENGTH, RECORDS_AT, RecordNumber},
    read::check_block,
    recover,
};

/// The most damaged places that are named.
const DAMAGE_MAX: usize = 100;

/// A mark that cannot be read is read again after this.
const MARK_AGAIN: Duration = Duration::from_millis(100);

/// Blocks that are read before others may use the map again.
const BATCH: usize = 256;

/// What a check found.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Checked {
    /// Blocks with data.
    pub blocks: BlockCount,
    /// What is damaged: a sentence each, with file and place.
    pub damage: Vec<String>,
    /// Damaged places beyond those.
    pub more_damage: u64,
}

impl Checked {
    fn note(&mut self, why: String) {
        if self.damage.len() < DAMAGE_MAX { self.damage.push(why) } else { self.more_damage += 1 }
    }

    /// Reads one batch of blocks.
    fn batch(&mut self, data: &dyn StorageFile, path: &Path, batch: &[(BlockIndex, Stored)]) {
        for (block, stored) in batch {
            let mut content = [0; BLOCK_SIZE as usize];
            let offset = stored.slot.offset();
            let why = match data.read_at(offset, &mut content) {
                Ok(_) => check_block(*block, *stored, &content).err(),
                Err(error) => Some(error.to_string()),
            };
            if let Some(why) = why {
                self.note(format!("{} is damaged at byte {offset}: {why}", path.display()));
            }
        }
        self.blocks.0 += batch.len() as u64;
    }
}

impl Overlay {
    /// Reads the map, and every block against its checksum, while the overlay is in use. `step` is told how many
    /// bytes were read since it was told last, and answers whether to go on.
    pub fn check(&self, step: &mut dyn FnMut(ByteCount) -> bool) -> Checked {
        let path = self.storage.display(&self.files.data);
        let mut checked = Checked::default();
        if let Err(why) = self.check_map() {
            checked.note(why);
        }
        let mut from = BlockIndex(0);
        loop {
            let read = {
                let blocks = self.blocks.read().unwrap_or_else(PoisonError::into_inner);
                let batch: Vec<_> = blocks.each_stored(from).take(BATCH).collect();
                checked.batch(&*self.data, &path, &batch);
                batch
            };
            let Some((last, _)) = read.last() else { return checked };
            from = BlockIndex(last.0 + 1);
            if !step(BlockCount(read.len() as u64).bytes()) {
                return checked;
            }
        }
    }
}

impl Overlay {
    /// Reads both headers, the map up to where it is written, and its mark. What is in the map up to there stays as it is, also when
    /// another map takes its place; the mark is written in place, so it is read again before it counts as damaged.
    fn check_map(&self) -> Result<(), String> {
        let (map, end) = {
            let writer = self.writer.lock().unwrap_or_else(PoisonError::into_inner);
            (Arc::clone(&writer.map), writer.end)
        };
        let path = self.storage.display(&self.files.map);
        let failed = |error: std::io::Error| format!("cannot read {}: {error}", path.display());
        let at =
            |offset: ByteOffset, why: &str| format!("{} is damaged at byte {offset}: {why}", path.display());
        for (file, kind) in [(&self.files.map, FileKind::Map), (&self.files.data, FileKind::Data)] {
            recover::open_file(&*self.storage, file, kind, self.id, self.size)
                .map_err(|error| error.to_string())?;
        }
        let disk = BlockRange::whole_disk(self.size);
        let (mut next, mut last) = (RECORDS_AT, RecordNumber::default());
        while next < end {
            let read = recover::read_record(&*map, next, last, self.id, disk).map_err(failed)?;
            let (header, _) = read.map_err(|why| at(next, &why))?;
            last = header.number;
            next.0 += (RECORD_HEADER_LENGTH + header.body_length) as u64;
        }
        let mark = || -> std::io::Result<[u8; MARK_LENGTH]> {
            let mut mark = [0; MARK_LENGTH];
            map.read_at(MARK_AT, &mut mark).map(|_| mark)
        };
        let mut before = mark().map_err(failed)?;
        while format::decode_mark(&before, self.id).is_none() {
            std::thread::sleep(MARK_AGAIN);
            let now = mark().map_err(failed)?;
            if now == before {
                return Err(at(MARK_AT, "its mark is written again when something is made durable"));
            }
            before = now;
        }
        Ok(())
    }
}

/// Reads the map of an overlay that is not in use, and its mark: what is wrong with them, if anything is. Data is read only as far as
/// it is not known to be durable.
///
/// # Errors
/// The file system's.
pub fn check_map(
    storage: &dyn Storage,
    files: &OverlayFiles,
    id: OverlayId,
    size: ByteCount,
) -> Result<Option<String>, OverlayError> {
    match recover::scan(storage, files, id, size) {
        Ok(scanned) if scanned.mark_is_damaged => Ok(Some(damaged_mark(storage, files))),
        Ok(_) => Ok(None),
        Err(error @ OverlayError::Damaged { .. }) => Ok(Some(error.to_string())),
        Err(error) => Err(error),
    }
}

fn damaged_mark(storage: &dyn Storage, files: &OverlayFiles) -> String {
    let map = storage.display(&files.map);
    format!("{} is damaged: its mark is written again when it is mounted", map.display())
}

/// Reads an overlay that is not in use, without changing it. `step` as for [`Overlay::check`].
///
/// # Errors
/// When its map cannot be read: damage of it, or the file system's.
pub fn check(
    storage: &Arc<dyn Storage>,
    files: &OverlayFiles,
    id: OverlayId,
    size: ByteCount,
    step: &mut dyn FnMut(ByteCount) -> bool,
) -> Result<Checked, OverlayError> {
    let scanned = recover::scan(&**storage, files, id, size)?;
    let mut checked = Checked::default();
    if scanned.mark_is_damaged {
        checked.note(damaged_mark(&**storage, files));
    }
    let path = storage.display(&files.data);
    let blocks: &Blocks = &scanned.blocks;
    let mut from = BlockIndex(0);
    loop {
        let batch: Vec<_> = blocks.each_stored(from).take(BATCH).collect();
        checked.batch(&*scanned.data, &path, &batch);
        let Some((last, _)) = batch.last() else { return Ok(checked) };
        from = BlockIndex(last.0 + 1);
        if !step(BlockCount(batch.len() as u64).bytes()) {
            return Ok(checked);
        }
    }
}
