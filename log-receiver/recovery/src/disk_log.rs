//! One disk's log: recovered when opened, then appended to, synced, sealed and viewed.

use std::{io, path::Path, sync::Arc};

use backtide_segment::{Entry, SegmentId, Seq};
use backtide_storage::Storage;
use backtide_units::{ByteCount, DiskId, HistoryId, Lsn};

use crate::{AppendError, LogCache, LogError, PointError, Snapshot, Timeline, View};

/// Whose log it is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct LogIdentity {
    /// The disk.
    pub disk: DiskId,
    /// Its history at this receiver.
    pub history: HistoryId,
}

/// Limits of one log.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct LogOptions {
    /// A segment is sealed when it would grow beyond this. Default 64 MiB.
    pub segment_bytes_max: ByteCount,
    /// A segment is sealed at so many index extents: bounds memory. Default 262,144.
    pub segment_extents_max: u32,
    /// Entries are held back until so many bytes are waiting, a ticket is taken, or a view.
    /// Default 1 MiB.
    pub buffer_bytes_max: ByteCount,
    /// Space is reserved in steps of this, so that a sync need not grow the file. Default 8 MiB.
    pub allocation_step: ByteCount,
}

/// What recovery found and did.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Recovered {
    /// Segments that the log has.
    pub segments: u32,
    /// Bytes of unacknowledged entries cut off the end.
    pub cut_bytes: ByteCount,
    /// Whole segments removed because nothing in them was acknowledged.
    pub removed_segments: Vec<SegmentId>,
    /// Segments whose index was missing and was written again.
    pub resealed_segments: Vec<SegmentId>,
    /// Entries whose payload is damaged; reading them gives an error that names the place.
    pub damaged_entries: Vec<String>,
}

/// How far the log is durable.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Durable {
    /// Every entry up to this one survives a power loss.
    pub seq: Seq,
    /// `Timeline::covered` at that entry.
    pub lsn: Lsn,
}

/// Files to sync for everything appended so far to be durable. Give it to a thread that may
/// block, then its outcome to [`DiskLog::synced`].
pub struct SyncTicket {
    through: Durable,
}

/// A ticket that was synced, or failed to.
pub struct SyncOutcome {
    through: Durable,
    result: io::Result<()>,
}

/// One disk's log. Owned by one thread; has none of its own.
pub struct DiskLog {
    timeline: Arc<Timeline>,
}

impl SyncTicket {
    /// What is durable once this has succeeded.
    pub fn through(&self) -> Durable {
        self.through
    }

    /// Syncs; blocks as long as the device takes.
    pub fn sync(self) -> SyncOutcome {
        unimplemented!()
    }
}

impl SyncOutcome {
    /// What is durable when it succeeded.
    pub fn result(&self) -> Result<Durable, &io::Error> {
        self.result.as_ref().map(|()| self.through)
    }
}

impl DiskLog {
    /// Creates an empty log in `dir` (and the directory); durable when this returns.
    ///
    /// # Errors
    /// [`LogError::LogExists`], or the file system's.
    pub fn create(
        storage: Arc<dyn Storage>,
        dir: &Path,
        identity: LogIdentity,
        options: LogOptions,
        cache: &LogCache,
    ) -> Result<Self, LogError> {
        let _ = (storage, dir, identity, options, cache);
        unimplemented!()
    }

    /// Opens the log in `dir`: folds all segments, cuts an unacknowledged tail, and makes
    /// everything that is left durable.
    ///
    /// # Errors
    /// [`LogError::NoLog`], [`LogError::Damaged`] when acknowledged entries are missing,
    /// [`LogError::UnknownVersion`], or the file system's.
    pub fn open(
        storage: Arc<dyn Storage>,
        dir: &Path,
        options: LogOptions,
        cache: &LogCache,
    ) -> Result<(Self, Recovered), LogError> {
        let _ = (storage, dir, options, cache);
        unimplemented!()
    }

    /// Whose log it is.
    pub fn identity(&self) -> LogIdentity {
        unimplemented!()
    }

    /// Appends an entry: visible to views at once, durable after a later ticket.
    /// Seals the segment and starts the next when it is full.
    ///
    /// # Errors
    /// [`AppendError::Invalid`] and [`LogError::Full`] change nothing; after any other the log
    /// is poisoned.
    pub fn append(&mut self, entry: Entry) -> Result<Seq, AppendError> {
        let _ = entry;
        unimplemented!()
    }

    /// The newest entry appended.
    pub fn appended(&self) -> Seq {
        unimplemented!()
    }

    /// What is known durable.
    pub fn durable(&self) -> Durable {
        unimplemented!()
    }

    /// What to sync for everything appended so far to be durable; `None` when it is already.
    /// Several tickets may be under way at once.
    ///
    /// # Errors
    /// When entries held back cannot be written; the log is then poisoned.
    pub fn ticket(&mut self) -> Result<Option<SyncTicket>, LogError> {
        unimplemented!()
    }

    /// Takes a ticket's outcome. A failed sync poisons the log.
    ///
    /// # Errors
    /// [`LogError::Io`] when the sync failed.
    pub fn synced(&mut self, outcome: SyncOutcome) -> Result<Durable, LogError> {
        let _ = outcome;
        unimplemented!()
    }

    /// Seals the current segment now and starts the next.
    ///
    /// # Errors
    /// As [`DiskLog::append`].
    pub fn seal(&mut self) -> Result<(), LogError> {
        unimplemented!()
    }

    /// What the log gives back.
    pub fn timeline(&self) -> &Timeline {
        &self.timeline
    }

    /// Bytes of all segment files.
    pub fn size(&self) -> ByteCount {
        unimplemented!()
    }

    /// The log as it is now, for other threads; stays valid while the log grows on.
    ///
    /// # Errors
    /// When entries held back cannot be written; the log is then poisoned.
    pub fn snapshot(&mut self) -> Result<Snapshot, LogError> {
        unimplemented!()
    }

    /// The disk at a point.
    ///
    /// # Errors
    /// When `at` is not a point: which hole, why, and the nearest points.
    pub fn view(&mut self, at: Lsn) -> Result<View, PointError> {
        self.snapshot()?.view(at)
    }

    /// The newest version of everything, whatever is offered: what the receiver has, for compares.
    ///
    /// # Errors
    /// As [`DiskLog::snapshot`].
    pub fn latest_view(&mut self) -> Result<View, LogError> {
        Ok(self.snapshot()?.latest_view())
    }
}

impl Default for LogOptions {
    fn default() -> Self {
        Self {
            segment_bytes_max: ByteCount(64 << 20),
            segment_extents_max: 1 << 18,
            buffer_bytes_max: ByteCount(1 << 20),
            allocation_step: ByteCount(8 << 20),
        }
    }
}
