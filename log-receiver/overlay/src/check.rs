//! Every block of an overlay against its checksum, for scrub and fsck.

use std::{path::Path, sync::Arc, sync::PoisonError};

use backtide_storage::{Storage, StorageFile};
use backtide_units::{BLOCK_SIZE, BlockCount, BlockIndex, ByteCount};

use crate::{
    Overlay, OverlayError, OverlayFiles, OverlayId, blocks::Blocks, blocks::Stored, read::check_block,
    recover,
};

/// The most damaged places that are named.
const DAMAGE_MAX: usize = 100;

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
    /// Reads every block against its checksum while the overlay is in use. `step` is told how many
    /// bytes were read since it was told last, and answers whether to go on.
    pub fn check(&self, step: &mut dyn FnMut(ByteCount) -> bool) -> Checked {
        let path = self.storage.display(&self.files.data);
        let mut checked = Checked::default();
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
        let map = storage.display(&files.map);
        checked.note(format!("{} is damaged: its mark is written again when it is mounted", map.display()));
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
