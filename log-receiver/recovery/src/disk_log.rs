//! One disk's log: recovered when opened, then appended to, synced, sealed and viewed.
//!
//! Invariants: at most one segment is open, the last; entries of a segment are durable only together
//! with all segments before it; after a failed write or sync nothing is written any more.

mod options;
mod rebase;
mod rotate;
mod sync;

use std::{
    path::{Path, PathBuf},
    sync::Arc,
};

use backtide_segment::{Entry, SegmentHeader, SegmentId, SegmentWriter, Seq, Step};
use backtide_storage::{KillPoint, Storage, StorageFile};
use backtide_units::{ByteCount, ByteOffset, DiskId, HistoryId, Lsn};

use crate::{
    AppendError, Base, Checked, Durable, FoundBase, InvalidEntry, LogCache, LogError, PointError, Snapshot,
    Timeline, View,
    base::{forget_bases, put},
    chores::LastWork,
    origin::Origin,
    recover::{self, Kept, KeptState, failed, sync_above},
    resident::Resident,
    segment::{OpenSegment, Segment},
    segments::Segments,
};

pub use options::LogOptions;
pub use rebase::{FoldError, Foldable, RebaseError, RebaseTicket, Rebased, SettleTicket};
use rotate::Rotation;

/// Whose log it is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct LogIdentity {
    /// The disk.
    pub disk: DiskId,
    /// Its history at this receiver.
    pub history: HistoryId,
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
    /// Entries of the tail whose payload is damaged; reading them gives an error that names the place.
    pub damaged_entries: Vec<String>,
    /// Segments with such entries, or of which durable entries are gone that a footer tells of.
    pub damaged_segments: Vec<SegmentId>,
}

/// One disk's log. Owned by one thread; has none of its own.
pub struct DiskLog {
    storage: Arc<dyn Storage>,
    segments_dir: PathBuf,
    identity: LogIdentity,
    options: LogOptions,
    cache: LogCache,
    timeline: Arc<Timeline>,
    segments: Arc<Segments>,
    origin: Arc<Origin>,
    dir: PathBuf,
    current: Option<Current>,
    appended: Seq,
    durable: Durable,
    /// Sealed segments whose footers are not known durable, with the change that sealed them.
    unsynced: Vec<(Arc<dyn StorageFile>, u64)>,
    /// Counts segments started and sealed.
    change: u64,
    /// The newest segment start, and the newest change that is durable.
    started: u64,
    change_durable: u64,
    sealed_bytes: u64,
    rotation: Rotation,
    resident: Resident,
    poisoned: bool,
    /// Segments in which opening has met damage.
    damaged: Vec<SegmentId>,
}

/// The open segment.
struct Current {
    segment: Arc<Segment>,
    writer: SegmentWriter,
}

/// A segment is sealed when its control entries take so much memory.
const CONTROL_BYTES_MAX: ByteCount = ByteCount(4 << 20);

/// Room for one entry of any length beside the header, so that positions stay below 4 GiB.
const SEGMENT_BYTES_MAX: u64 = 2 << 30;

impl DiskLog {
    /// Creates an empty log in `dir` (and the directory, and those above it); durable when this returns.
    ///
    /// # Errors
    /// [`LogError::LogExists`], or the file system's. What a failed attempt leaves is no log and is
    /// cleared by the next.
    pub fn create(
        storage: Arc<dyn Storage>,
        dir: &Path,
        identity: LogIdentity,
        options: LogOptions,
        cache: &LogCache,
    ) -> Result<Self, LogError> {
        let segments_dir = dir.join("segments");
        let io = |what: &str, path: &Path| {
            let step = format!("{what} {}", storage.display(path).display());
            move |source| failed(step, source)
        };
        if FoundBase::read(&*storage, dir)?.is_beside() {
            return Err(LogError::LogExists { dir: storage.display(dir) });
        }
        match recover::recover(&*storage, &segments_dir, options.writer(), None, |_| Seq(0)) {
            Err(LogError::NoLog { .. }) => {}
            Ok(_) | Err(LogError::Damaged { .. } | LogError::UnknownVersion { .. }) => {
                return Err(LogError::LogExists { dir: storage.display(dir) });
            }
            Err(
                error @ (LogError::LogExists { .. }
                | LogError::Poisoned
                | LogError::Full { .. }
                | LogError::Io { .. }),
            ) => return Err(error),
        }
        // Somebody removed a log's directory: what tells of its images is of no log any more.
        forget_bases(&*storage, dir).map_err(io("forget the log that was in", dir))?;
        storage.create_dir(&segments_dir).map_err(io("create", &segments_dir))?;
        for leftover in recover::list(&*storage, &segments_dir)? {
            let path = segments_dir.join(leftover.file_name());
            storage.remove(&path).map_err(io("remove", &path))?;
        }
        let mut log = Self::empty(Arc::clone(&storage), dir, identity, options, cache, None);
        log.start_segment()?;
        let ticket = log.ticket_now();
        log.synced(ticket.sync())?;
        sync_above(&*storage, dir)?;
        Ok(log)
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
        Self::open_noted(storage, dir, options, cache, |_| Seq(0))
    }

    /// As [`DiskLog::open`], when something beside the log may tell which entry of it was durable. Entries up to
    /// there are not cut because a payload is damaged: that one is an error when it is read.
    ///
    /// # Errors
    /// As [`DiskLog::open`].
    pub fn open_noted(
        storage: Arc<dyn Storage>,
        dir: &Path,
        options: LogOptions,
        cache: &LogCache,
        noted: impl FnOnce(LogIdentity) -> Seq,
    ) -> Result<(Self, Recovered), LogError> {
        let segments_dir = dir.join("segments");
        let base = FoundBase::read(&*storage, dir)?;
        let doubtful = !base.is_settled();
        let base = base.usable(&*storage, dir)?;
        if base.as_ref().is_some_and(Base::is_ended) {
            return Err(LogError::Damaged {
                file: storage.display(&segments_dir),
                offset: ByteOffset::ZERO,
                what: "the log has ended: nothing is appended to it any more, and only images of it are left"
                    .to_owned(),
            });
        }
        let opened = recover::recover(&*storage, &segments_dir, options.writer(), base.as_ref(), noted)?;
        if base.is_some() && doubtful {
            put(base.as_ref(), &*storage, dir)?;
        }
        // Whoever created the log may have crashed before its directories were durable.
        sync_above(&*storage, dir)?;
        let mut log = Self::empty(storage, dir, opened.identity, options, cache, base);
        for kept in opened.kept {
            log.keep(kept)?;
        }
        log.durable = Durable { seq: log.appended, lsn: log.timeline.covered() };
        let mut recovered = opened.recovered;
        log.damaged.clone_from(&recovered.damaged_segments);
        recovered.damaged_entries.extend(log.reach_the_floor()?);
        if let Some(base) = log.origin.base() {
            base.thin(Arc::make_mut(&mut log.timeline));
        }
        Ok((log, recovered))
    }

    fn empty(
        storage: Arc<dyn Storage>,
        dir: &Path,
        identity: LogIdentity,
        options: LogOptions,
        cache: &LogCache,
        base: Option<Base>,
    ) -> Self {
        let timeline = base.as_ref().map(|base| base.timeline.clone()).unwrap_or_default();
        let mut segments = Segments::new(options.directory_bytes_max);
        if let Some(base) = &base {
            segments.begin_with(base.first_segment, true);
        }
        let origin = Origin::new(dir, base, &cache.images(&storage), cache.origins());
        Self {
            storage,
            segments_dir: dir.join("segments"),
            dir: dir.to_owned(),
            origin,
            identity,
            options,
            cache: cache.clone(),
            timeline: Arc::new(timeline),
            segments: Arc::new(segments),
            current: None,
            appended: Seq(0),
            durable: Durable::default(),
            unsynced: Vec::new(),
            change: 0,
            started: 0,
            change_durable: 0,
            sealed_bytes: 0,
            rotation: Rotation::default(),
            resident: Resident::default(),
            poisoned: false,
            damaged: Vec::new(),
        }
    }

    /// Takes a segment that recovery kept; one that is open is the last. Of a footer only what is needed
    /// here is in memory, and only for as long.
    fn keep(&mut self, kept: Kept) -> Result<(), LogError> {
        let path = self.segments_dir.join(kept.header.id.file_name());
        let storage = Arc::clone(&self.storage);
        match kept.state {
            KeptState::Sealed(sealed) => {
                self.appended = Seq(sealed.stats().next_seq.0 - 1);
                self.sealed_bytes += sealed.length().0;
                let file = recover::open_to_recover(&*storage, &self.segments_dir, kept.header.id)?;
                let summary = sealed.summary(&file)?;
                self.fold(&kept.header, &summary.steps)?;
                let segment = Segment::new_sealed(storage, path, kept.header, &self.cache, *sealed);
                Arc::make_mut(&mut self.segments).push_finished(Arc::new(segment), &summary.buckets);
            }
            KeptState::Open(file, scanned) => {
                self.appended = Seq(scanned.contents.stats().next_seq.0 - 1);
                self.fold(&kept.header, scanned.contents.steps())?;
                let writer =
                    SegmentWriter::resume(file.clone(), kept.header, self.options.writer(), scanned.end);
                let file = file.for_readers();
                let open = OpenSegment::new(file, scanned.contents, scanned.end, &self.cache);
                let segment = Arc::new(Segment::new_open(storage, path, kept.header, &self.cache, open));
                Arc::make_mut(&mut self.segments).push(Arc::clone(&segment));
                self.current = Some(Current { segment, writer });
            }
        }
        Ok(())
    }

    fn fold(&mut self, header: &SegmentHeader, steps: &[Step]) -> Result<(), LogError> {
        for step in steps {
            Arc::make_mut(&mut self.timeline).fold_step(step).map_err(|invalid| LogError::Damaged {
                file: self.storage.display(&self.segments_dir.join(header.id.file_name())),
                offset: ByteOffset::ZERO,
                what: format!("its entries do not follow those before: {invalid}"),
            })?;
        }
        Ok(())
    }

    /// What a check finds in the segments in which opening has met damage: nothing where it has met none. Before anything is
    /// appended.
    ///
    /// # Errors
    /// The file system's.
    pub fn damage_met(&self) -> Result<Checked, LogError> {
        let (timeline, segments) = (Arc::clone(&self.timeline), Arc::clone(&self.segments));
        let snapshot = Snapshot::new(timeline, segments, self.appended, Arc::clone(&self.origin));
        snapshot.check_segments(&self.damaged)
    }

    /// Whose log it is.
    pub fn identity(&self) -> LogIdentity {
        self.identity
    }

    /// Appends an entry: visible to views at once, durable after a later ticket.
    /// Seals the segment and starts the next when it is full.
    ///
    /// # Errors
    /// [`AppendError::Invalid`] and [`LogError::Full`] change nothing; after any other the log
    /// is poisoned.
    pub fn append(&mut self, entry: Entry) -> Result<Seq, AppendError> {
        self.require_sound()?;
        self.timeline.check(&entry)?;
        let entry = entry.complete().map_err(|found| InvalidEntry::Checksum { found })?;
        self.make_room(&entry)?;
        let synced = self.claimable();
        let folded = entry.clone();
        let current = self.current.as_mut().expect("room was made in an open segment");
        let writer = &mut current.writer;
        let appended = current.segment.with_open_mut(|open| {
            let appended = writer.append(entry, synced, &mut open.contents);
            open.note_extents();
            appended
        });
        // An entry whose write failed is in the index and perhaps not in the file: nothing reads it,
        // for the log is poisoned and no later snapshot is given.
        let appended = appended.map_err(LogError::from);
        self.poison_on_failure(appended)?;
        Arc::make_mut(&mut self.timeline).fold(&folded);
        self.appended = self.appended.next();
        KillPoint::EntryAppended.reached();
        Ok(self.appended)
    }

    /// Sees to it that there is an open segment with room for `entry`.
    fn make_room(&mut self, entry: &Entry) -> Result<(), LogError> {
        if let Some(current) = &self.current {
            let end = current.writer.reach(entry).0;
            let (extents, control) = current
                .segment
                .while_open(|open| (open.contents.index().count(), open.contents.control_bytes()))
                .expect("the current segment is open");
            let full = end > self.options.segment_bytes_max.0.min(SEGMENT_BYTES_MAX)
                || extents >= self.options.segment_extents_max as usize
                || self.cache.open_indexes().asks_to_seal(extents)
                || control > CONTROL_BYTES_MAX;
            if full && self.appended >= current.writer.header().first_seq {
                self.fill_current()?;
            }
        }
        if self.current.is_none() { self.start_segment() } else { Ok(()) }
    }

    /// The newest entry appended.
    pub fn appended(&self) -> Seq {
        self.appended
    }

    /// What is known durable.
    pub fn durable(&self) -> Durable {
        self.durable
    }

    /// Seals the current segment now, unless a ticket that is under way seals others: then the next one does.
    /// The next entry starts the next.
    ///
    /// # Errors
    /// As [`DiskLog::append`].
    pub fn seal(&mut self) -> Result<(), LogError> {
        self.require_sound()?;
        if self.current.as_ref().is_some_and(|current| self.appended >= current.writer.header().first_seq) {
            self.fill_current()?;
        }
        self.seal_waiting()
    }

    /// What the log gives back. Its newest points may not be durable yet.
    pub fn timeline(&self) -> &Timeline {
        &self.timeline
    }

    /// Bytes of all segment files, without space reserved ahead.
    pub fn size(&self) -> ByteCount {
        let current = self.current.as_ref().map_or(0, |current| current.writer.end().0);
        ByteCount(self.sealed_bytes + self.rotation.bytes().0 + current)
    }

    /// How many segments there are.
    pub fn segment_count(&self) -> usize {
        self.segments.len()
    }

    /// Whether a write or sync has failed: the log must be dropped and opened again.
    pub fn is_poisoned(&self) -> bool {
        self.poisoned
    }

    /// Gives the log up without waiting for what other threads do to its files.
    pub fn abandon(mut self) -> LastWork {
        self.rotation.abandon()
    }

    /// The log as it is now, for other threads; stays valid while the log grows on.
    ///
    /// # Errors
    /// When entries held back cannot be written; the log is then poisoned.
    pub fn snapshot(&mut self) -> Result<Snapshot, LogError> {
        self.write_waiting()?;
        let (timeline, segments) = (Arc::clone(&self.timeline), Arc::clone(&self.segments));
        Ok(Snapshot::new(timeline, segments, self.appended, Arc::clone(&self.origin)))
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
