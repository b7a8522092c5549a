//! Making it durable, and keeping the map short.
//!
//! A sync covers the data and the map, then the mark says so; the next sync makes the mark durable. Only
//! then are slots free that records up to there have emptied: whoever opens the overlay after a power cut
//! reads the data of all records behind the mark, those of blocks written over since among them.

use std::{io::ErrorKind, sync::Arc, sync::MutexGuard, sync::PoisonError};

use backtide_storage::StorageFile;
use backtide_units::{ByteCount, ByteOffset};

use crate::{
    Overlay, OverlayError,
    blocks::Change,
    format::{self, FileKind, MARK_AT, RECORDS_AT, Record, RecordNumber},
    overlay::Writer,
    write::BLOCKS_MAX,
};

/// Changes are gathered into records of so many checksums ...
const GATHERED_MAX: usize = 16 * 1024;
/// ... and so many changes.
const CHANGES_MAX: usize = 8 * 1024;

impl Overlay {
    /// Makes everything durable that was written before.
    ///
    /// # Errors
    /// The file system's; the overlay is out of use then, until it is opened again.
    pub fn flush(&self) -> Result<(), OverlayError> {
        self.sync(false)
    }

    /// [`Overlay::flush`], and all slots that were emptied are free.
    pub(crate) fn flush_and_free(&self) -> Result<(), OverlayError> {
        self.sync(true)
    }

    fn sync(&self, and_free: bool) -> Result<(), OverlayError> {
        let _one_at_a_time = self.syncing.lock().unwrap_or_else(PoisonError::into_inner);
        let (target, undurable, map) = {
            let writer = self.writer();
            if let Some(why) = &writer.poisoned {
                return Err(OverlayError::Poisoned(why.clone()));
            }
            if writer.durable == writer.last && !(and_free && writer.slots.waiting() > 0) {
                return Ok(());
            }
            (writer.last, writer.undurable, Arc::clone(&writer.map))
        };
        let synced = self.data.sync_data().map_err(|error| self.io("sync", &self.files.data, error));
        let synced = synced.and_then(|()| map.sync_data().map_err(|e| self.io("sync", &self.files.map, e)));
        let mark = synced.and_then(|()| self.mark(&*map, target, and_free));
        let mut writer = self.writer();
        self.poison_on_error(&mut writer, mark)?;
        // What the mark said before is durable with this sync.
        let marked = if and_free { target } else { writer.durable };
        writer.durable = target;
        writer.undurable.0 -= undurable.0;
        self.wait_for_readers();
        writer.slots.free_through(marked);
        if writer.end.0 > 2 * writer.compact.0 + self.options.map_slack.0 {
            self.compact(&mut writer)?;
        }
        Ok(())
    }

    /// Notes that records up to `durable` and their data are durable.
    fn mark(&self, map: &dyn StorageFile, durable: RecordNumber, and_sync: bool) -> Result<(), OverlayError> {
        let written = map.write_at(MARK_AT, &format::encode_mark(self.id, durable));
        let marked = written.and_then(|()| if and_sync { map.sync_data() } else { Ok(()) });
        marked.map_err(|error| self.io("mark", &self.files.map, error))
    }

    /// Nobody reads slots any more that were found before this.
    fn wait_for_readers(&self) {
        drop(self.blocks.write().unwrap_or_else(PoisonError::into_inner));
    }

    fn poison_on_error<T>(
        &self,
        writer: &mut MutexGuard<'_, Writer>,
        result: Result<T, OverlayError>,
    ) -> Result<T, OverlayError> {
        if let Err(error) = &result {
            let cause = std::error::Error::source(error).map(|cause| format!(": {cause}"));
            writer.poisoned = Some(format!("{error}{}", cause.unwrap_or_default()));
        }
        result
    }

    /// Writes the map anew, as short as it can be, in place of the old one.
    fn compact(&self, writer: &mut MutexGuard<'_, Writer>) -> Result<(), OverlayError> {
        // Whatever becomes of this: not again before the map is twice as long.
        writer.compact = ByteCount(writer.end.0);
        let synced = self.data.sync_data().map_err(|error| self.io("sync", &self.files.data, error));
        self.poison_on_error(writer, synced)?;
        // Record by record: zeroed blocks that are not beside each other make very many changes.
        let written = {
            let blocks = self.blocks.read().unwrap_or_else(PoisonError::into_inner);
            self.write_map(blocks.changes(BLOCKS_MAX as usize))
        };
        let Ok((map, end, last)) = written else {
            // The old map is as good as it was.
            let _ = self.storage.remove(&self.files.map_beside());
            return Ok(());
        };
        let dir = self.files.map.parent().unwrap_or(std::path::Path::new(""));
        let renamed = self.storage.rename(&self.files.map_beside(), &self.files.map);
        let renamed = renamed.and_then(|()| self.storage.sync_dir(dir));
        let renamed = renamed.map_err(|error| self.io("replace", &self.files.map, error));
        self.poison_on_error(writer, renamed)?;
        writer.map = map;
        writer.end = end;
        (writer.last, writer.durable) = (last, last);
        writer.undurable = ByteCount::ZERO;
        writer.compact = ByteCount(end.0);
        self.wait_for_readers();
        writer.slots.free_through(RecordNumber(u64::MAX));
        Ok(())
    }

    /// Writes a map with `changes` beside the one in use, durably.
    fn write_map(
        &self,
        changes: impl Iterator<Item = Change>,
    ) -> std::io::Result<(Arc<dyn StorageFile>, ByteOffset, RecordNumber)> {
        let beside = self.files.map_beside();
        match self.storage.remove(&beside) {
            Err(error) if error.kind() != ErrorKind::NotFound => return Err(error),
            Ok(()) | Err(_) => {}
        }
        let map = self.storage.create_new(&beside)?;
        map.write_at(ByteOffset::ZERO, &format::encode_header(FileKind::Map, self.id, self.size))?;
        let (mut end, mut last) = (RECORDS_AT, RecordNumber::default());
        for changes in gathered(changes) {
            let number = RecordNumber(last.0 + 1);
            let bytes = Record { number, durable: last, changes }.encode(self.id);
            (self.options.room)(ByteCount::of(&bytes)).map_err(std::io::Error::other)?;
            map.write_at(end, &bytes)?;
            end.0 += bytes.len() as u64;
            last = number;
        }
        map.write_at(MARK_AT, &format::encode_mark(self.id, last))?;
        map.set_len(ByteCount(end.0))?;
        map.sync_data()?;
        Ok((map, end, last))
    }
}

/// Changes in groups that fit into a record each.
fn gathered(changes: impl Iterator<Item = Change>) -> impl Iterator<Item = Vec<Change>> {
    let mut changes = changes.peekable();
    let checksums = |change: &Change| match change {
        Change::Data { crcs, .. } => crcs.len(),
        Change::Zero(_) => 0,
    };
    std::iter::from_fn(move || {
        let mut group = vec![changes.next()?];
        let mut gathered = checksums(&group[0]);
        while group.len() < CHANGES_MAX
            && let Some(change) = changes.next_if(|next| gathered + checksums(next) <= GATHERED_MAX)
        {
            gathered += checksums(&change);
            group.push(change);
        }
        Some(group)
    })
}
