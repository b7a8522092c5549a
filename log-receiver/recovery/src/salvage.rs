//! Reading what is left of a log that cannot be opened, without changing it.
//!
//! A damaged log, or one whose writer failed, still gives back every point before the place that is
//! lost: versions in the log never fall below what it had covered, so what is lost lies above all of
//! them. A segment header alone is no loss: all it says stands in its neighbors, and every entry
//! proves by its checksum that it belongs to this log. Points behind the lost place are not given:
//! nobody knows which blocks they miss.
//!
//! What is lost because a file is missing, or because the device cannot read it, may be there again the next time: whoever
//! decides what of a log goes is told so ([`Salvage::away`]).
//!
//! Invariants: nothing is written; of a log whose writer failed, nothing above `through` is offered.

use std::{path::Path, sync::Arc};

use backtide_segment::{
    Entry, Scanned, SealedSegment, SegmentFile, SegmentHeader, SegmentId, Seq, Step, Summary, scan_prefix,
};
use backtide_storage::Storage;
use backtide_units::{ByteCount, ByteOffset, Lsn};
use roaring::RoaringTreemap;

use crate::{
    FoundBase, LogCache, LogError, LogIdentity, LogOptions, Snapshot, Timeline,
    check::told,
    origin::Origin,
    recover::{Found, Open, find, open, open_to_recover},
    segment::{OpenSegment, Segment},
    segments::Segments,
};

/// What is left of a log.
pub struct Salvage {
    /// Whose log it is; none when nothing says it.
    pub identity: Option<LogIdentity>,
    /// Reads it.
    pub snapshot: Snapshot,
    /// What is wrong, the first place first: a sentence each, with file and place. Empty when nothing is.
    pub damage: Vec<String>,
    /// Bytes of what can be read.
    pub size: ByteCount,
    /// Of the damage what may be no more than away: a file that is missing, a place that the device cannot read, with points
    /// there or behind that nobody can read now. None of a log that somebody had cut there.
    pub away: Option<String>,
    /// From this one on they say that something is lost; those before cost no point.
    pub(crate) lost: usize,
    /// Segments behind a lost place: they give no points.
    pub(crate) beyond: Vec<Arc<Segment>>,
    /// Where something is lost, when there are points before it and the log is known to be read from its beginning.
    pub(crate) lost_place: Option<LostPlace>,
    /// Headers that are lost, of segments that are read all the same.
    pub(crate) lost_headers: Vec<SegmentHeader>,
}

impl Salvage {
    /// Of a log of which no segment is left: no points, and a hole that says why.
    pub fn nothing(damage: String) -> Self {
        let mut timeline = Timeline::default();
        timeline.end(Some(&damage));
        let away = Some(damage.clone());
        Self { away, ..Self::unreadable(timeline, vec![damage]) }
    }

    pub(crate) fn unreadable(timeline: Timeline, damage: Vec<String>) -> Self {
        let snapshot = nothing_of(timeline);
        let (beyond, lost_headers) = (Vec::new(), Vec::new());
        Self {
            identity: None,
            snapshot,
            damage,
            size: ByteCount::ZERO,
            away: None,
            lost: 0,
            beyond,
            lost_place: None,
            lost_headers,
        }
    }

    /// The same, with a hole at its end that says why nothing follows. For a log that ends where it was cut.
    #[must_use]
    pub fn cut_because(self, why: &str) -> Self {
        Self { snapshot: self.snapshot.cut_because(why), damage: Vec::new(), away: None, ..self }
    }

    /// The last entry that can be read, also behind a lost place.
    pub fn reached(&self) -> Seq {
        let ends = self.beyond.iter().map(|segment| Seq(segment.stats().next_seq.0 - 1));
        ends.max().unwrap_or_default().max(self.snapshot.through())
    }

    /// The same of a log that is known to have reached `lsn`: none up to there may come a second time.
    #[must_use]
    pub fn reaching(self, lsn: Lsn) -> Self {
        Self { snapshot: self.snapshot.reaching(lsn), ..self }
    }
}

/// Where a log breaks off although more of it was written.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct LostPlace {
    /// In this segment.
    pub(crate) segment: SegmentId,
    /// Behind these bytes of it; none when nothing of it is of use.
    pub(crate) keep: Option<ByteOffset>,
}

/// One segment, as far as it can be read.
enum Part {
    Sealed(Box<SealedSegment>, Summary),
    Prefix(Box<Scanned>),
}

struct Work<'a> {
    open: Open,
    storage: &'a Arc<dyn Storage>,
    segments_dir: &'a Path,
    cache: &'a LogCache,
    identity: LogIdentity,
    through: Seq,
    /// Every entry up to this one was durable at some time, as is noted beside the log.
    noted: Seq,
    timeline: Timeline,
    segments: Segments,
    next: Seq,
    damage: Vec<String>,
    size: u64,
    away: Option<String>,
    beyond: Vec<Arc<Segment>>,
    lost_place: Option<LostPlace>,
    lost_headers: Vec<SegmentHeader>,
}

/// What a place says that the device cannot read.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Unreadable {
    /// It is damaged: for reading what is left.
    IsDamage,
    /// Nothing, for the next try may read it: for deciding what of a log goes.
    IsAnError,
}

/// Reads what is left of the log in `dir`, up to entry `through` when that is given. `known` says whose
/// log it is when no header does, `noted` of which entry somebody noted beside the log that it was durable: what damage
/// takes of the log, and a repair cuts off, may be all else that says so.
///
/// # Errors
/// [`LogError::NoLog`], [`LogError::UnknownVersion`], or the file system's.
pub fn salvage(
    storage: &Arc<dyn Storage>,
    dir: &Path,
    cache: &LogCache,
    known: Option<LogIdentity>,
    through: Option<Seq>,
    noted: impl FnOnce(LogIdentity) -> Seq,
    unreadable: Unreadable,
) -> Result<Salvage, LogError> {
    let open = match unreadable {
        Unreadable::IsDamage => open,
        Unreadable::IsAnError => open_to_recover,
    };
    let segments_dir = dir.join("segments");
    let FoundBase { base, damage: base_damage, .. } = FoundBase::read(&**storage, dir)?;
    if let Some(base) = base.as_ref().filter(|base| base.is_ended()) {
        return Ok(Salvage::of_ended(dir, base.clone(), base_damage, &cache.images(storage), cache));
    }
    let first = base.as_ref().map_or(SegmentId::FIRST, |base| base.first_segment);
    let mut damage = base_damage;
    let nobody_knows_the_base = base.is_none() && !damage.is_empty();
    let found = match find(&**storage, &segments_dir, first, open) {
        // Its images are there.
        Err(LogError::NoLog { .. }) if base.is_some() => {
            damage.push(format!("no segment is left in {}", storage.display(&segments_dir).display()));
            Vec::new()
        }
        found => found?,
    };
    let stated = found.iter().filter_map(|found| found.header.as_ref().ok());
    let stated = stated.map(|header| LogIdentity { disk: header.disk, history: header.history }).next();
    let known = known.or(base.as_ref().map(|base| base.identity));
    let Some(identity) = known.or(stated) else {
        let describe = |found: &Found| describe(&**storage, &segments_dir, found);
        damage.extend(found.iter().filter_map(describe));
        let mut timeline = Timeline::default();
        timeline.end(damage.first().map(String::as_str));
        return Ok(Salvage::unreadable(timeline, damage));
    };
    let mut work = Work {
        open,
        storage,
        segments_dir: &segments_dir,
        cache,
        identity,
        through: through.unwrap_or(Seq(u64::MAX)),
        noted: noted(identity),
        timeline: base.as_ref().map(|base| base.timeline.clone()).unwrap_or_default(),
        segments: Segments::new(LogOptions::default().directory_bytes_max),
        next: base.as_ref().map_or(Seq(1), |base| base.first_seq),
        damage,
        size: 0,
        away: None,
        beyond: Vec::new(),
        lost_place: None,
        lost_headers: Vec::new(),
    };
    if found.is_empty() {
        work.away = work.damage.last().cloned();
    }
    let mut rest = found.iter().zip(durable_later(&found));
    // Without a segment the last sentence says so.
    let mut lost = work.damage.len() - usize::from(found.is_empty());
    for (here, durable) in rest.by_ref() {
        lost = work.damage.len();
        if work.next > work.through {
            break;
        }
        if let Some(place) = work.take(here, durable)? {
            work.lost_place = Some(place);
            break;
        }
        lost = work.damage.len();
    }
    if nobody_knows_the_base {
        lost = 0;
    }
    if work.next <= work.through {
        work.survey(rest)?;
    }
    if let Some(base) = &base {
        work.segments.begin_with(base.first_segment, true);
        if base.is_above(&work.timeline) {
            // Nothing of the log is left that reaches the floor: its images are.
            base.thin_to_images(&mut work.timeline);
        } else {
            base.thin(&mut work.timeline);
        }
    }
    work.timeline.end(work.damage.first().map(String::as_str));
    let last = Seq(work.next.0 - 1);
    let from = base.as_ref().map_or(Seq(1), |base| base.first_seq);
    let origin = Origin::new(dir, base, &cache.images(storage), cache.origins());
    let snapshot = Snapshot::new(Arc::new(work.timeline), Arc::new(work.segments), last, origin);
    let Work { damage, size, away, beyond, lost_place, lost_headers, .. } = work;
    Ok(Salvage {
        identity: Some(identity),
        snapshot,
        damage,
        size: ByteCount(size),
        away,
        lost,
        beyond,
        // A log of which nothing is read may have lost what tells where it begins: all of it may be whole.
        lost_place: lost_place.filter(|_| last >= from),
        lost_headers,
    })
}

/// A log of which no segment is left.
fn nothing_of(timeline: Timeline) -> Snapshot {
    let segments = Arc::new(Segments::new(ByteCount::ZERO));
    Snapshot::new(Arc::new(timeline), segments, Seq(0), Origin::none())
}

/// For each segment, the newest entry that headers of later segments say was durable.
fn durable_later(found: &[Found]) -> Vec<Seq> {
    let mut newest = Seq(0);
    let mut durable: Vec<Seq> = Vec::with_capacity(found.len());
    for found in found.iter().rev() {
        durable.push(newest);
        newest = newest.max(found.header.as_ref().map_or(Seq(0), |header| header.synced));
    }
    durable.reverse();
    durable
}

fn describe(storage: &dyn Storage, segments_dir: &Path, found: &Found) -> Option<String> {
    let name = storage.display(&segments_dir.join(found.id.file_name()));
    let why = found.header.as_ref().err()?;
    if found.present {
        Some(format!("{} is damaged at byte 0: {why}", name.display()))
    } else {
        Some(format!("{} is missing", name.display()))
    }
}

impl Work<'_> {
    /// Takes what follows in this segment; gives the place behind which nothing can be used, if it has one.
    fn take(&mut self, found: &Found, durable: Seq) -> Result<Option<LostPlace>, LogError> {
        let nothing_of_it = Some(LostPlace { segment: found.id, keep: None });
        let LogIdentity { disk, history } = self.identity;
        let name = self.storage.display(&self.segments_dir.join(found.id.file_name()));
        if let Some(why) = describe(&**self.storage, self.segments_dir, found) {
            self.damage.push(why);
        }
        if !found.present {
            self.away = self.damage.last().cloned();
            return Ok(nothing_of_it);
        }
        let ours = |header: &&SegmentHeader| (header.disk, header.history) == (disk, history);
        let header = match found.header.as_ref().ok() {
            None => SegmentHeader { disk, history, id: found.id, first_seq: self.next, synced: Seq(0) },
            Some(header) if header.first_seq == self.next && ours(&header) => *header,
            Some(header) => {
                let why = format!(
                    "expected it to begin with entry {} of history {history}, it begins with entry {} of \
                     history {}; what stood between is lost",
                    self.next, header.first_seq, header.history
                );
                self.damage.push(format!("{} is damaged at byte 0: {why}", name.display()));
                return Ok(nothing_of_it);
            }
        };
        let file = (self.open)(&**self.storage, self.segments_dir, found.id)?;
        let (part, broken) = self.read(&file, header, durable)?;
        let stops = broken.is_some() && matches!(part, Part::Prefix(_));
        if stops && self.read(&file.for_recovery(), header, durable).is_err() {
            self.away.clone_from(&broken);
        }
        let mut timeline = self.timeline.clone();
        let steps = match &part {
            Part::Sealed(_, summary) => &summary.steps,
            Part::Prefix(scanned) => scanned.contents.steps(),
        };
        for step in steps {
            if let Err(invalid) = timeline.fold_step(step) {
                let why = format!("its entries do not follow those before: {invalid}");
                self.damage.push(format!("{} is damaged at byte 0: {why}", name.display()));
                return Ok(nothing_of_it);
            }
        }
        self.timeline = timeline;
        let keep = match &part {
            Part::Sealed(..) => None,
            Part::Prefix(scanned) => Some(scanned.end),
        };
        let any = match &part {
            Part::Sealed(..) => true,
            Part::Prefix(scanned) => scanned.contents.stats().next_seq > self.next,
        };
        if found.header.is_err() {
            if !any {
                return Ok(nothing_of_it);
            }
            self.lost_headers.push(header);
        }
        self.keep(file, header, part);
        let lost = keep.filter(|_| broken.is_some());
        self.damage.extend(broken);
        Ok(lost.map(|end| LostPlace { segment: found.id, keep: Some(end).filter(|_| any) }))
    }

    /// A footer that is whole speaks for its entries: one that is damaged is an error when it is read, and
    /// is told of here where opening the log looks at them too, that is where no later segment says that the footer
    /// was durable. One that is not whole speaks for entries that were durable and are gone.
    fn read(
        &self,
        file: &SegmentFile,
        header: SegmentHeader,
        durable: Seq,
    ) -> Result<(Part, Option<String>), LogError> {
        let sealed = SealedSegment::open(file, header)?;
        let sealed = sealed.filter(|sealed| sealed.last() <= self.through);
        let Some(sealed) = sealed else {
            let (scanned, damage) = scan_prefix(file, header, self.through, self.noted)?;
            return Ok((Part::Prefix(Box::new(scanned)), damage.map(|damage| damage.to_string())));
        };
        let summary = sealed.summary(file)?;
        let known_durable = durable >= sealed.stats().next_seq;
        let Err(footer) = told(sealed.verify(file))? else {
            let mut damage = None;
            for item in file.headers(header, sealed.entries_end()).take_while(|_| !known_durable) {
                damage = told(item)?.err();
                if damage.is_some() {
                    break;
                }
            }
            return Ok((Part::Sealed(Box::new(sealed), summary), damage));
        };
        let (scanned, damage) = scan_prefix(file, header, self.through, self.noted)?;
        let were_durable = known_durable || sealed.last() <= self.noted;
        if were_durable && scanned.contents.stats().next_seq < sealed.stats().next_seq {
            // Opening the log believes it as well: what is damaged of it is an error when that is read.
            return Ok((Part::Sealed(Box::new(sealed), summary), Some(footer)));
        }
        Ok((Part::Prefix(Box::new(scanned)), damage.map(|damage| damage.to_string())))
    }

    fn keep(&mut self, file: SegmentFile, header: SegmentHeader, part: Part) {
        let (segment, buckets) = self.segment(file, header, part);
        self.next = segment.stats().next_seq;
        self.size += segment.entries_end().0;
        self.segments.push_finished(segment, &buckets);
    }

    fn segment(
        &self,
        file: SegmentFile,
        header: SegmentHeader,
        part: Part,
    ) -> (Arc<Segment>, RoaringTreemap) {
        let path = self.segments_dir.join(header.id.file_name());
        let storage = Arc::clone(self.storage);
        let (segment, buckets) = match part {
            Part::Sealed(sealed, summary) => {
                (Segment::new_sealed(storage, path, header, self.cache, *sealed), summary.buckets)
            }
            Part::Prefix(scanned) => {
                // Whoever reads it later decides nothing.
                let open = OpenSegment::new(file.for_readers(), scanned.contents, scanned.end, self.cache);
                let buckets = open.contents.index().buckets();
                (Segment::new_open(storage, path, header, self.cache, open), buckets)
            }
        };
        (Arc::new(segment), buckets)
    }

    /// What stands behind the lost place gives no points, but it knows newer attaches: a stale epoch must
    /// stay fenced, and no LSN may come a second time.
    fn survey<'f>(&mut self, rest: impl Iterator<Item = (&'f Found, Seq)>) -> Result<(), LogError> {
        for (found, durable) in rest {
            let Ok(header) = &found.header else {
                self.damage.extend(describe(&**self.storage, self.segments_dir, found));
                continue;
            };
            let file = (self.open)(&**self.storage, self.segments_dir, found.id)?;
            let (part, damage) = self.read(&file, *header, durable)?;
            self.damage.extend(damage);
            let steps = match &part {
                Part::Sealed(_, summary) => &summary.steps,
                Part::Prefix(scanned) => scanned.contents.steps(),
            };
            for step in steps {
                match step {
                    Step::Run(run) => self.timeline.see(run.last.0),
                    Step::Control(attach @ Entry::Attach { .. }) => self.timeline.fold(attach),
                    Step::Control(Entry::PassBegin { at, .. }) => self.timeline.see(*at),
                    Step::Control(
                        Entry::Write { .. }
                        | Entry::Zero { .. }
                        | Entry::Flush { .. }
                        | Entry::Unchanged { .. }
                        | Entry::PassData { .. }
                        | Entry::PassEnd { .. }
                        | Entry::Mark { .. },
                    ) => {}
                }
            }
            let (segment, _) = self.segment(file, *header, part);
            self.beyond.push(segment);
        }
        Ok(())
    }
}
