//! The log's way to the device: what is held back goes into the file, a ticket syncs it, and the first failure ends it.

use std::sync::Arc;

use backtide_segment::{SegmentError, SegmentWriter};
use backtide_storage::KillPoint;

use crate::{Durable, LogError, SyncOutcome, SyncTicket, ticket::DirectorySync};

use super::{Current, DiskLog};

impl DiskLog {
    /// What to sync for everything appended so far to be durable; `None` when it is already.
    /// Several tickets may be under way at once.
    ///
    /// # Errors
    /// When entries held back cannot be written; the log is then poisoned.
    pub fn ticket(&mut self) -> Result<Option<SyncTicket>, LogError> {
        self.write_with(SegmentWriter::write_for_sync)?;
        if !self.wants_sync() {
            return Ok(None);
        }
        Ok(Some(self.ticket_now()))
    }

    /// Whether a [`ticket`](Self::ticket) would have something to do.
    pub fn wants_sync(&self) -> bool {
        self.appended != self.durable.seq || self.has_waiting()
    }

    /// A ticket over all that is in the files, entries or not.
    pub(super) fn ticket_now(&mut self) -> SyncTicket {
        let chores = self.chores();
        let mut files: Vec<_> = self.unsynced.iter().map(|(file, _)| Arc::clone(file)).collect();
        let sealed = chores.iter().flat_map(|chores| &chores.seal).map(|job| Arc::clone(job.file.file()));
        for file in sealed.collect::<Vec<_>>().into_iter().rev() {
            if !files.iter().any(|known| Arc::ptr_eq(known, &file)) {
                files.insert(0, file);
            }
        }
        if let Some(Current { writer, .. }) = &self.current {
            files.push(writer.sync_handle());
            self.resident.grew(writer.sync_handle(), writer.end());
        }
        let directory = (self.change_durable < self.started)
            .then(|| DirectorySync { storage: Arc::clone(&self.storage), path: self.segments_dir.clone() });
        let through = Durable { seq: self.appended, lsn: self.timeline.covered() };
        let (let_go, owned) = (self.resident.take(), self.rotation.owned());
        SyncTicket { through, change: self.change, files, directory, chores, let_go, owned }
    }

    /// Takes a ticket's outcome. A failed sync poisons the log.
    ///
    /// # Errors
    /// [`LogError::Io`] when the sync failed.
    pub fn synced(&mut self, outcome: SyncOutcome) -> Result<Durable, LogError> {
        self.require_sound()?;
        let result = outcome.result;
        let result = result.map_err(|source| {
            let step = format!("sync {}", self.storage.display(&self.segments_dir).display());
            LogError::Io { step, source }
        });
        self.poison_on_failure(result)?;
        self.unsynced.retain(|(_, change)| *change > outcome.change);
        self.change_durable = self.change_durable.max(outcome.change);
        self.rotation.note_durable(outcome.change);
        if outcome.through.seq > self.durable.seq {
            self.durable = outcome.through;
        }
        if let Some(done) = outcome.done {
            self.take_done(done);
        }
        Ok(self.durable)
    }

    pub(super) fn write_waiting(&mut self) -> Result<(), LogError> {
        self.write_with(SegmentWriter::write_waiting)
    }

    fn write_with(
        &mut self,
        write: fn(&mut SegmentWriter) -> Result<(), SegmentError>,
    ) -> Result<(), LogError> {
        self.require_sound()?;
        let Some(current) = &mut self.current else { return Ok(()) };
        let written = write(&mut current.writer).map_err(LogError::from);
        let end = current.writer.end();
        current.segment.with_open_mut(|open| open.end = end);
        KillPoint::EntriesWritten.reached();
        self.poison_on_failure(written)
    }

    pub(super) fn require_sound(&self) -> Result<(), LogError> {
        if self.poisoned { Err(LogError::Poisoned) } else { Ok(()) }
    }

    pub(super) fn poison_on_failure<T>(&mut self, result: Result<T, LogError>) -> Result<T, LogError> {
        let current = self.current.as_ref();
        let refused = matches!(result, Err(LogError::Full { .. }))
            && current.is_some_and(|current| !current.writer.is_poisoned());
        self.poisoned |= result.is_err() && !refused;
        result
    }
}
