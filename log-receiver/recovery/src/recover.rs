//! Opening a log: what is there, what is kept, what is cut.
//!
//! Segments are looked at from the last to the first, because later ones know what was durable when
//! they were written; then they are chained from the first on. Where the chain breaks, nothing behind
//! the break was acknowledged, or the log is damaged. What is kept is synced before anything is
//! appended: a process that was killed leaves bytes that can be read and are not durable.

use std::{io, path::Path};

use backtide_segment::{
    EntryHeader, Position, SEGMENT_HEADER_LENGTH, Scanned, SealedSegment, SegmentError, SegmentFile,
    SegmentHeader, SegmentId, SegmentWriter, Seq, WriterOptions, claims, scan,
};
use backtide_storage::Storage;
use backtide_units::{ByteCount, ByteOffset};

use crate::{Base, LogError, LogIdentity, Recovered, chores::SPARE};

/// A segment that is kept.
pub(crate) struct Kept {
    pub(crate) header: SegmentHeader,
    pub(crate) state: KeptState,
}

/// How a segment that is kept was found.
pub(crate) enum KeptState {
    Sealed(Box<SealedSegment>),
    /// The last one only; its file stays open.
    Open(SegmentFile, Box<Scanned>),
}

/// What opening found.
pub(crate) struct Opened {
    pub(crate) identity: LogIdentity,
    pub(crate) kept: Vec<Kept>,
    pub(crate) recovered: Recovered,
}

/// A segment number of the directory, and what is under it.
pub(crate) struct Found {
    pub(crate) id: SegmentId,
    pub(crate) present: bool,
    /// `Err` when there is no header to go by.
    pub(crate) header: Result<SegmentHeader, String>,
}

/// What recovery works on.
struct Recovery<'a> {
    storage: &'a dyn Storage,
    segments_dir: &'a Path,
    options: WriterOptions,
    identity: LogIdentity,
    /// The number of the first entry.
    first_seq: Seq,
    /// Every entry up to this one was durable at some time.
    synced: Seq,
    /// So it was up to this one, as is noted beside the log.
    noted: Seq,
    recovered: Recovered,
}

/// How much behind a lost header is looked at for entries.
const ENTRIES_LOOKED_AT: usize = 64 * 1024;

/// Recovers the log whose segments are in `segments_dir` and which begins with `base`. `noted` says of which entry somebody noted beside the log
/// that it was durable.
pub(crate) fn recover(
    storage: &dyn Storage,
    segments_dir: &Path,
    options: WriterOptions,
    base: Option<&Base>,
    noted: impl FnOnce(LogIdentity) -> Seq,
) -> Result<Opened, LogError> {
    let (first, first_seq) =
        base.map_or((SegmentId::FIRST, Seq(1)), |base| (base.first_segment, base.first_seq));
    let found = find(storage, segments_dir, first, open_to_recover)?;
    let identity = identity_of(storage, segments_dir, &found)?;
    if let Some(other) = base.map(|base| base.identity).filter(|other| *other != identity) {
        return Err(LogError::Damaged {
            file: storage.display(segments_dir),
            offset: ByteOffset::ZERO,
            what: format!("its base belongs to disk {}, history {}", other.disk, other.history),
        });
    }
    let recovered = Recovered::default();
    let noted = noted(identity);
    let synced = Seq(0);
    let mut recovery =
        Recovery { storage, segments_dir, options, identity, first_seq, synced, noted, recovered };
    let states = recovery.read_backwards(&found)?;
    let mut kept = recovery.chain(&found, states)?;
    if kept.is_empty() {
        return Err(no_log(storage, segments_dir));
    }
    recovery.remove_spare()?;
    recovery.settle(&mut kept)?;
    let mut recovered = recovery.recovered;
    recovered.segments = kept.len() as u32;
    Ok(Opened { identity, kept, recovered })
}

pub(crate) fn no_log(storage: &dyn Storage, segments_dir: &Path) -> LogError {
    LogError::NoLog { dir: storage.display(segments_dir.parent().unwrap_or(segments_dir)) }
}

pub(crate) fn failed(step: String, source: io::Error) -> LogError {
    if source.kind() == io::ErrorKind::StorageFull {
        LogError::Full { step, source }
    } else {
        LogError::Io { step, source }
    }
}

/// Makes a directory durable, and those above it.
pub(crate) fn sync_above(storage: &dyn Storage, dir: &Path) -> Result<(), LogError> {
    for path in dir.ancestors() {
        let synced = storage.sync_dir(path);
        synced.map_err(|source| failed(format!("sync {}", storage.display(path).display()), source))?;
    }
    Ok(())
}

/// The segment numbers of a directory, in order.
pub(crate) fn list(storage: &dyn Storage, segments_dir: &Path) -> Result<Vec<SegmentId>, LogError> {
    match storage.list(segments_dir) {
        Ok(names) => Ok(names.iter().filter_map(|name| SegmentId::from_file_name(name)).collect()),
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(Vec::new()),
        Err(source) => Err(failed(format!("list {}", storage.display(segments_dir).display()), source)),
    }
}

/// Opens one segment's file. Files are opened as they are needed: a log can have more of them than a
/// process may have open.
pub(crate) fn open(
    storage: &dyn Storage,
    segments_dir: &Path,
    id: SegmentId,
) -> Result<SegmentFile, LogError> {
    let path = segments_dir.join(id.file_name());
    let name = storage.display(&path);
    let file = storage.open(&path).map_err(|source| failed(format!("open {}", name.display()), source))?;
    Ok(SegmentFile::new(file, name))
}

/// Opens one segment's file for deciding what the log is: where the device cannot read it, that is no damage but
/// an error, and nothing changes. The next try may read it; a new log would put this one aside for good.
pub(crate) fn open_to_recover(
    storage: &dyn Storage,
    segments_dir: &Path,
    id: SegmentId,
) -> Result<SegmentFile, LogError> {
    Ok(open(storage, segments_dir, id)?.for_recovery())
}

/// [`open`] or [`open_to_recover`].
pub(crate) type Open = fn(&dyn Storage, &Path, SegmentId) -> Result<SegmentFile, LogError>;

/// Every segment from `first` on, and of each gap between them the first number that is missing.
pub(crate) fn find(
    storage: &dyn Storage,
    segments_dir: &Path,
    first: SegmentId,
    open: Open,
) -> Result<Vec<Found>, LogError> {
    let mut ids = list(storage, segments_dir)?;
    ids.retain(|id| *id >= first);
    if ids.is_empty() {
        return Err(no_log(storage, segments_dir));
    }
    let mut found = Vec::new();
    let mut expected = first;
    for id in ids {
        if id != expected {
            let header = Err("the segment's file is missing".to_owned());
            found.push(Found { id: expected, present: false, header });
        }
        expected = id.next();
        let file = open(storage, segments_dir, id)?;
        let header = match file.header() {
            Ok(header) if header.id == id => Ok(header),
            Ok(header) => Err(format!("expected segment {id}, found {}", header.id)),
            Err(SegmentError::Damaged { what, .. }) => Err(what),
            Err(
                error @ (SegmentError::UnknownVersion { .. }
                | SegmentError::Full { .. }
                | SegmentError::Io { .. }
                | SegmentError::Poisoned),
            ) => return Err(error.into()),
        };
        found.push(Found { id, present: true, header });
    }
    Ok(found)
}

/// Whose log it is: any header says it, and all must agree.
fn identity_of(storage: &dyn Storage, segments_dir: &Path, found: &[Found]) -> Result<LogIdentity, LogError> {
    let headers = || found.iter().filter_map(|found| Some((found, found.header.as_ref().ok()?)));
    let Some((_, first)) = headers().next() else {
        // The first segment's header is durable before its log is used: without one, and with nothing
        // behind it, this was never a log, and a power cut tore the header while it was made.
        for Found { id, present, header } in found {
            if let (true, Err(what)) = (present, header) {
                let file = open_to_recover(storage, segments_dir, *id)?;
                if has_entries(&file)? {
                    let (file, what) = (file.name().clone(), what.clone());
                    return Err(LogError::Damaged { file, offset: ByteOffset::ZERO, what });
                }
            }
        }
        return Err(no_log(storage, segments_dir));
    };
    let identity = LogIdentity { disk: first.disk, history: first.history };
    for (found, header) in headers() {
        if (header.disk, header.history) != (first.disk, first.history) {
            return Err(LogError::Damaged {
                file: storage.display(&segments_dir.join(found.id.file_name())),
                offset: ByteOffset::ZERO,
                what: format!("it belongs to disk {}, history {}", header.disk, header.history),
            });
        }
    }
    Ok(identity)
}

/// Whether something stands behind the header.
fn has_entries(file: &SegmentFile) -> Result<bool, LogError> {
    let mut bytes = vec![0; ENTRIES_LOOKED_AT];
    let behind = ByteOffset(SEGMENT_HEADER_LENGTH as u64);
    let read = file.file().read_at(behind, &mut bytes);
    read.map_err(|source| failed(format!("read {}", file.name().display()), source))?;
    Ok(bytes.iter().any(|&byte| byte != 0))
}

impl Recovery<'_> {
    /// Reads footers and scans what has none, from the last segment to the first; `None` for a segment
    /// without a header. Collects what was durable.
    fn read_backwards(&mut self, found: &[Found]) -> Result<Vec<Option<KeptState>>, LogError> {
        let mut states = Vec::new();
        // Where the next segment begins, this one ends: it may have lost its footer and no entry.
        let mut next_begins = None;
        for Found { id, present, header } in found.iter().rev() {
            if !present {
                states.push(None);
                next_begins = None;
                continue;
            }
            let file = open_to_recover(self.storage, self.segments_dir, *id)?;
            let Ok(header) = header else {
                let LogIdentity { disk, history } = self.identity;
                let lost = SegmentHeader { disk, history, id: *id, first_seq: Seq(1), synced: Seq(0) };
                let claimed = claims(&file, &lost, ByteOffset::ZERO)?;
                self.synced = self.synced.max(claimed.unwrap_or_default());
                states.push(None);
                next_begins = None;
                continue;
            };
            states.push(Some(self.read_segment(file, *header, next_begins)?));
            next_begins = Some(header.first_seq);
        }
        states.reverse();
        Ok(states)
    }

    /// A footer is trusted when a later segment says that one of its own entries was durable: only then
    /// were this segment's entries and footer, which are synced before. Any other is checked against the
    /// entries, for a power cut can leave a trailer without what stands before it. Where entries are gone that were durable, as
    /// is noted, no power cut was it, and the footer is all that tells of them.
    fn read_segment(
        &mut self,
        file: SegmentFile,
        header: SegmentHeader,
        next_begins: Option<Seq>,
    ) -> Result<KeptState, LogError> {
        let footer = SealedSegment::open(&file, header)?;
        if let Some(sealed) = &footer {
            self.synced = self.synced.max(sealed.stats().synced);
        }
        match footer {
            Some(sealed) if self.synced >= sealed.stats().next_seq => {
                return Ok(KeptState::Sealed(Box::new(sealed)));
            }
            Some(_) | None => {}
        }
        let expected = next_begins.map_or(self.synced, |next| self.synced.min(Seq(next.0 - 1)));
        let scanned = scan(&file, header, expected, self.noted);
        let knows_more = footer.as_ref().filter(|sealed| sealed.last() <= self.noted);
        if let Some((sealed, gone)) =
            knows_more.and_then(|sealed| Some((sealed, gone(&file, sealed, &scanned)?)))
        {
            self.recovered.damaged_entries.push(gone);
            self.recovered.damaged_segments.push(header.id);
            return Ok(KeptState::Sealed(Box::new(sealed.clone())));
        }
        let scanned = scanned?;
        self.synced = self.synced.max(scanned.synced);
        self.report_damage(&file, header.id, &scanned);
        match footer {
            Some(sealed)
                if scanned.contents.stats() == sealed.stats()
                    && scanned.end == sealed.entries_end()
                    && sealed.verify(&file).is_ok() =>
            {
                Ok(KeptState::Sealed(Box::new(sealed)))
            }
            Some(_) | None => Ok(KeptState::Open(file, Box::new(scanned))),
        }
    }

    /// Keeps segments as long as each begins where the one before ends; removes the rest.
    fn chain(&mut self, found: &[Found], states: Vec<Option<KeptState>>) -> Result<Vec<Kept>, LogError> {
        let mut kept = Vec::new();
        let mut expected = self.first_seq;
        for (place, (found_here, state)) in found.iter().zip(states).enumerate() {
            let why = match (&found_here.header, state) {
                (Ok(header), Some(state)) if header.first_seq == expected => {
                    expected = next_seq(&state);
                    kept.push(Kept { header: *header, state });
                    continue;
                }
                (Ok(header), _) => {
                    format!("expected it to begin with entry {expected}, it begins with {}", header.first_seq)
                }
                (Err(why), _) => why.clone(),
            };
            let overlaps = found_here.header.as_ref().is_ok_and(|header| header.first_seq < expected);
            let proven = self.synced >= expected || overlaps;
            if proven || (self.noted >= expected && self.has_anything(&found[place..])?) {
                let path = self.segments_dir.join(found_here.id.file_name());
                return Err(LogError::Damaged {
                    file: self.storage.display(&path),
                    offset: ByteOffset::ZERO,
                    what: format!("{why}; entries up to {} were durable", self.synced.max(self.noted)),
                });
            }
            self.remove(&found[place..])?;
            break;
        }
        Ok(kept)
    }

    /// Whether there is more of these segments than files that were just made.
    fn has_anything(&self, found: &[Found]) -> Result<bool, LogError> {
        for Found { id, present, header } in found {
            if *present
                && (header.is_ok() || has_entries(&open_to_recover(self.storage, self.segments_dir, *id)?)?)
            {
                return Ok(true);
            }
        }
        Ok(false)
    }

    /// Removes segments in which nothing was acknowledged, the last first: a power cut on the way
    /// leaves a log that this ends the same way.
    fn remove(&mut self, found: &[Found]) -> Result<(), LogError> {
        for Found { id, .. } in found.iter().rev().filter(|found| found.present) {
            let path = self.segments_dir.join(id.file_name());
            let removed = self.storage.remove(&path);
            removed.map_err(|source| {
                failed(format!("remove {}", self.storage.display(&path).display()), source)
            })?;
            self.sync_dir()?;
            self.recovered.removed_segments.push(*id);
        }
        Ok(())
    }

    /// Cuts the tail, builds missing footers, and makes what is kept durable.
    fn settle(&mut self, kept: &mut [Kept]) -> Result<(), LogError> {
        let last = kept.len() - 1;
        for (place, segment) in kept.iter_mut().enumerate() {
            let through = Seq(next_seq(&segment.state).0 - 1);
            // A footer is synced with the first entry behind its segment, not with the last in it.
            let mut doubtful = through >= self.synced || place == last;
            if let KeptState::Open(file, scanned) = &segment.state {
                doubtful = true;
                if place == last {
                    self.cut(file, scanned)?;
                } else {
                    segment.state = self.seal_again(file, segment.header, scanned)?;
                }
            }
            if doubtful {
                let file = open_to_recover(self.storage, self.segments_dir, segment.header.id)?;
                self.write_again(&file, segment)?;
                let synced = file.file().sync_data();
                synced.map_err(|source| failed(format!("sync {}", file.name().display()), source))?;
            }
        }
        self.sync_dir()
    }

    /// Writes again what is not known durable, in place. After a failed sync the system may hold bytes
    /// that it takes for written and that are not on the device; a further sync would not write them.
    fn write_again(&self, file: &SegmentFile, segment: &Kept) -> Result<(), LogError> {
        let end = match &segment.state {
            KeptState::Sealed(sealed) => sealed.entries_end(),
            KeptState::Open(_, scanned) => scanned.end,
        };
        let mut from = ByteOffset::ZERO;
        if segment.header.first_seq <= self.synced {
            let behind = |item: &Result<(EntryHeader, Position), SegmentError>| match item {
                Ok((header, _)) => header.seq > self.synced,
                Err(_) => true,
            };
            from = match file.headers(segment.header, end).find(behind).transpose() {
                Ok(found) => found.map_or(end, |(_, position)| position.offset()),
                // Of a segment with a footer: nobody knows where it stands.
                Err(SegmentError::Damaged { .. }) => ByteOffset::ZERO,
                Err(error) => return Err(error.into()),
            };
        }
        let failed = |source| failed(format!("write {} again", file.name().display()), source);
        let mut chunk = vec![0; 1 << 20];
        loop {
            let length = file.file().read_at(from, &mut chunk).map_err(failed)?;
            if length == 0 {
                return Ok(());
            }
            file.file().write_at(from, &chunk[..length]).map_err(failed)?;
            from.0 += length as u64;
        }
    }

    fn report_damage(&mut self, file: &SegmentFile, id: SegmentId, scanned: &Scanned) {
        self.recovered.damaged_segments.extend((!scanned.damaged.is_empty()).then_some(id));
        for (seq, position) in &scanned.damaged {
            let entry = format!("{}: entry {seq} at byte {position}", file.name().display());
            self.recovered.damaged_entries.push(format!("{entry} has a damaged payload"));
        }
    }

    /// Zeros would be taken for the end of the log, anything else could be taken for an entry once the
    /// log has grown up to it: so what is behind the end goes.
    fn cut(&mut self, file: &SegmentFile, scanned: &Scanned) -> Result<(), LogError> {
        self.recovered.cut_bytes = scanned.trailing;
        let cut = file.file().set_len(ByteCount(scanned.end.0));
        cut.map_err(|source| failed(format!("cut {}", file.name().display()), source))
    }

    fn seal_again(
        &mut self,
        file: &SegmentFile,
        header: SegmentHeader,
        scanned: &Scanned,
    ) -> Result<KeptState, LogError> {
        let mut writer = SegmentWriter::resume(file.clone(), header, self.options, scanned.end);
        writer.seal(&scanned.contents)?;
        self.recovered.resealed_segments.push(header.id);
        match SealedSegment::open(file, header)? {
            Some(sealed) => Ok(KeptState::Sealed(Box::new(sealed))),
            None => Err(LogError::Damaged {
                file: file.name().clone(),
                offset: scanned.end,
                what: "the footer that was just written cannot be read".to_owned(),
            }),
        }
    }

    /// A file that was to become the next segment holds nothing.
    fn remove_spare(&self) -> Result<(), LogError> {
        let path = self.segments_dir.join(SPARE);
        match self.storage.remove(&path) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => {
                Err(failed(format!("remove {}", self.storage.display(&path).display()), error))
            }
            Ok(()) | Err(_) => Ok(()),
        }
    }

    fn sync_dir(&self) -> Result<(), LogError> {
        let synced = self.storage.sync_dir(self.segments_dir);
        synced.map_err(|source| {
            failed(format!("sync {}", self.storage.display(self.segments_dir).display()), source)
        })
    }
}

/// What a scan lacks of a sealed segment: a sentence; none when it lacks nothing.
fn gone(
    file: &SegmentFile,
    sealed: &SealedSegment,
    scanned: &Result<Scanned, SegmentError>,
) -> Option<String> {
    match scanned {
        Err(damage @ SegmentError::Damaged { .. }) => Some(damage.to_string()),
        Ok(scanned) if scanned.contents.stats().next_seq < sealed.stats().next_seq => {
            let (name, first) = (file.name().display(), scanned.contents.stats().next_seq);
            Some(format!("{name} is damaged at byte {}: entry {first} was durable and is gone", scanned.end))
        }
        Ok(_) | Err(_) => None,
    }
}

fn next_seq(state: &KeptState) -> Seq {
    match state {
        KeptState::Sealed(sealed) => sealed.stats().next_seq,
        KeptState::Open(_, scanned) => scanned.contents.stats().next_seq,
    }
}
