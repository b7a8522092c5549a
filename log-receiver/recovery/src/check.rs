//! Reading every byte of a log against its checksums: what `fsck` and `scrub` do.
//!
//! It walks the segments that a snapshot or a salvage has, with the readers that everybody else uses,
//! so it may run beside a log that grows. Nothing is cached, and nothing is written but by a check that mends: that puts
//! back what the checksums ask for, where it is still to be had (`mend.rs`).

mod images;

use std::sync::Arc;

use backtide_segment::{EntryReader, Position, SealedSegment, SegmentError, SegmentFile, Seq};
use backtide_units::ByteCount;

use crate::{AskDisk, LogError, Salvage, Snapshot, mend::Mender, segment::Segment};

/// So many places are named; the rest is counted.
const DAMAGE_MAX: usize = 100;

/// What stands between a damaged place and why it could not be mended.
const CANNOT_BE_MENDED: &str = ": cannot be mended: ";

/// What a check that mends may change of a log.
#[derive(Clone, Copy)]
enum Mends {
    All,
    /// What lies outside its own files.
    Images,
}

/// What a check has read, and what it found.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Checked {
    /// Segment files.
    pub segments: u64,
    /// Images.
    pub images: u64,
    /// Entries that are whole.
    pub entries: u64,
    /// Bytes read.
    pub bytes: ByteCount,
    /// What is damaged, a sentence each with file and place; at most 100.
    pub damage: Vec<String>,
    /// Damaged places beyond those.
    pub more_damage: u64,
    /// What was damaged and has been mended, a sentence each; at most 100.
    pub mended: Vec<String>,
    /// Whether it was called off.
    pub called_off: bool,
}

/// The damaged place of which a sentence of a check is, without why it could not be mended: that is another one the next
/// time, or none.
pub fn damaged_place(sentence: &str) -> &str {
    sentence.split_once(CANNOT_BE_MENDED).map_or(sentence, |(place, _)| place)
}

/// The sentence of a place that could not be mended.
fn cannot_be_mended(place: &str, why: &str) -> String {
    format!("{place}{CANNOT_BE_MENDED}{why}")
}

/// An error with its cause.
fn chain(error: &dyn std::error::Error) -> String {
    let source = error.source().map(|source| format!(": {source}")).unwrap_or_default();
    format!("{error}{source}")
}

impl Checked {
    /// Notes a damaged place, once.
    pub fn note(&mut self, damage: String) {
        if self.damage.contains(&damage) {
            return;
        }
        if self.damage.len() < DAMAGE_MAX { self.damage.push(damage) } else { self.more_damage += 1 }
    }

    /// Notes what was mended.
    pub(crate) fn note_mended(&mut self, damage: String) {
        if self.mended.len() < DAMAGE_MAX {
            self.mended.push(damage);
        }
    }

    /// Notes damage, or that it was mended. That a mend cannot be written says nothing of what else there is: the check
    /// goes on.
    fn note_or_mended(&mut self, damage: String, mended: Result<bool, LogError>) {
        match mended {
            Ok(false) => self.note(damage),
            Ok(true) => self.note_mended(damage),
            Err(error) => self.note(cannot_be_mended(&damage, &chain(&error))),
        }
    }

    /// Whether nothing is damaged.
    pub fn is_sound(&self) -> bool {
        self.damage.is_empty()
    }

    /// Takes a result: damage is a finding, any other error ends the check.
    fn take<T>(&mut self, result: Result<T, SegmentError>) -> Result<Option<T>, LogError> {
        Ok(told(result)?.map_err(|damage| self.note(damage)).ok())
    }
}

/// Tells damage from errors that say nothing of what is in a file.
pub(crate) fn told<T>(result: Result<T, SegmentError>) -> Result<Result<T, String>, LogError> {
    match result {
        Ok(value) => Ok(Ok(value)),
        Err(damage @ SegmentError::Damaged { .. }) => Ok(Err(damage.to_string())),
        Err(
            error @ (SegmentError::UnknownVersion { .. }
            | SegmentError::Full { .. }
            | SegmentError::Io { .. }
            | SegmentError::Poisoned),
        ) => Err(error.into()),
    }
}

impl Snapshot {
    /// Reads and checks everything that the snapshot has, of older logs too. `step` is told how many
    /// bytes were read since it was last asked, and says whether to go on.
    ///
    /// # Errors
    /// The file system's: then nobody knows what it would have found.
    pub fn check(&self, step: &mut dyn FnMut(ByteCount) -> bool) -> Result<Checked, LogError> {
        let mut checked = Checked::default();
        self.check_into(&mut checked, None, step)?;
        Ok(checked)
    }

    /// As [`Snapshot::check`], and mends what can be: in sealed segments footers and headers, and payloads whose bytes are
    /// somewhere else too; in packs of images tables, and chunks that are somewhere else too. `disk` is asked for what the disk
    /// itself has, where nothing here has it.
    ///
    /// # Errors
    /// As [`Snapshot::check`]. A mend that cannot be written is none: the damage stays, and says so.
    pub fn check_and_mend(
        &self,
        disk: AskDisk<'_>,
        step: &mut dyn FnMut(ByteCount) -> bool,
    ) -> Result<Checked, LogError> {
        let mut checked = Checked::default();
        self.check_into(&mut checked, Some(disk), step)?;
        Ok(checked)
    }

    /// As [`Snapshot::check`], or with a disk as [`Snapshot::check_and_mend`]: what was found is in `checked`, also when
    /// an error ends this.
    ///
    /// # Errors
    /// As those.
    pub fn check_into(
        &self,
        checked: &mut Checked,
        disk: Option<AskDisk<'_>>,
        step: &mut dyn FnMut(ByteCount) -> bool,
    ) -> Result<(), LogError> {
        let mender = disk.map(|disk| Mender::new(self, disk));
        self.walk(checked, mender.as_ref(), Mends::All, step)
    }

    fn walk(
        &self,
        checked: &mut Checked,
        mender: Option<&Mender<'_>>,
        mends: Mends,
        step: &mut dyn FnMut(ByteCount) -> bool,
    ) -> Result<(), LogError> {
        if let Some(before) = self.before() {
            // A log that is out of use is never written again; its images lie with those of all others.
            let mender = mender.map(|mender| mender.of(before));
            before.walk(checked, mender.as_ref(), Mends::Images, step)?;
        }
        let of_segments = mender.filter(|_| matches!(mends, Mends::All));
        for segment in self.segments.iter() {
            if checked.called_off {
                break;
            }
            check_segment(segment, self.through().0, checked, of_segments, step)?;
        }
        self.check_images(checked, mender, step)
    }

    /// Bytes that a check reads; with images about.
    pub fn bytes(&self) -> ByteCount {
        let own: u64 = self.segments.iter().map(|segment| segment.entries_end().0).sum();
        // Most chunks belong to several images, and to several disks: this is too much rather than too little.
        let images = self.base().and_then(|_| self.images().size().ok()).unwrap_or_default();
        ByteCount(own + images.0 + self.before().map_or(0, |before| before.bytes().0))
    }
}

impl Salvage {
    /// As [`Snapshot::check`], with what stands behind a lost place, and what was found on the way.
    ///
    /// # Errors
    /// As [`Snapshot::check`].
    pub fn check(&self, step: &mut dyn FnMut(ByteCount) -> bool) -> Result<Checked, LogError> {
        let mut checked = Checked::default();
        self.check_into(&mut checked, step)?;
        Ok(checked)
    }

    /// As [`Salvage::check`]: what was found is in `checked`, also when an error ends this.
    ///
    /// # Errors
    /// As [`Snapshot::check`].
    pub fn check_into(
        &self,
        checked: &mut Checked,
        step: &mut dyn FnMut(ByteCount) -> bool,
    ) -> Result<(), LogError> {
        self.damage.iter().for_each(|damage| checked.note(damage.clone()));
        self.snapshot.check_into(checked, None, step)?;
        for segment in &self.beyond {
            if checked.called_off {
                break;
            }
            check_segment(segment, u64::MAX, checked, None, step)?;
        }
        self.note_lost_footers(checked)
    }

    /// A segment without a footer was not sealed yet, unless a later one knows that the footer was
    /// durable: nothing behind a segment is called durable before that.
    fn note_lost_footers(&self, checked: &mut Checked) -> Result<(), LogError> {
        let segments: Vec<_> = self.snapshot.segments.iter().chain(&self.beyond).collect();
        let mut durable = Seq(0);
        for segment in segments.into_iter().rev() {
            let stats = segment.stats();
            if !segment.is_sealed() && durable >= stats.next_seq {
                checked.note(no_footer(segment, &segment.file()?));
            }
            durable = durable.max(stats.synced).max(segment.header().synced);
        }
        Ok(())
    }
}

fn no_footer(segment: &Segment, file: &SegmentFile) -> String {
    let end = segment.entries_end();
    format!("{} is damaged at byte {end}: its footer is not whole", file.name().display())
}

fn check_segment(
    segment: &Arc<Segment>,
    through: u64,
    checked: &mut Checked,
    mender: Option<&Mender<'_>>,
    step: &mut dyn FnMut(ByteCount) -> bool,
) -> Result<(), LogError> {
    let file = segment.file()?;
    checked.segments += 1;
    check_header(segment, &file, checked, mender)?;
    let end = segment.entries_end();
    let mut at = 0;
    let mut reader = EntryReader::new(&file, *segment.header());
    for item in file.headers(*segment.header(), end) {
        // Without its header nobody knows where the next entry stands.
        let Some((header, position)) = checked.take(item)? else { break };
        if header.seq.0 > through {
            break;
        }
        check_entry(segment, (&file, &mut reader), position, checked, mender)?;
        let read = position.offset().0 - at;
        at = position.offset().0;
        checked.bytes.0 += read;
        // What a mend reads is for the pace alone: it is no part of what is checked.
        let mending = mender.map_or(ByteCount::ZERO, Mender::take_read);
        if !step(ByteCount(read.saturating_add(mending.0))) {
            checked.called_off = true;
            return Ok(());
        }
    }
    let rest = end.0.saturating_sub(at);
    checked.bytes.0 += rest;
    checked.called_off = !step(ByteCount(rest));
    check_footer(segment, &file, checked, mender)
}

fn check_header(
    segment: &Segment,
    file: &SegmentFile,
    checked: &mut Checked,
    mender: Option<&Mender<'_>>,
) -> Result<(), LogError> {
    let ours = segment.header();
    match told(file.header())? {
        Ok(found) if (found.disk, found.history, found.id) == (ours.disk, ours.history, ours.id) => {}
        Ok(_) => {
            checked.note(format!(
                "{} is damaged at byte 0: it is another segment's file",
                file.name().display()
            ));
        }
        Err(damage) => {
            let mended = mender.map_or(Ok(false), |mender| mender.header(segment, file));
            checked.note_or_mended(damage, mended);
        }
    }
    Ok(())
}

fn check_entry(
    segment: &Segment,
    (file, reader): (&SegmentFile, &mut EntryReader<'_>),
    position: Position,
    checked: &mut Checked,
    mender: Option<&Mender<'_>>,
) -> Result<(), LogError> {
    let mut whole = true;
    if let Err(damage) = told(reader.entry(position))? {
        let mended = mender.map_or(Ok(false), |mender| mender.entry(segment, file, position));
        whole = matches!(mended, Ok(true));
        checked.note_or_mended(damage, mended);
    }
    checked.entries += u64::from(whole);
    Ok(())
}

/// A trailer or summary that is damaged is built again when the log is opened, but it is damage all the same. So are the
/// other parts, which opening does not read where a later segment says that the footer was durable.
fn check_footer(
    segment: &Segment,
    file: &SegmentFile,
    checked: &mut Checked,
    mender: Option<&Mender<'_>>,
) -> Result<(), LogError> {
    if !segment.is_sealed() {
        return Ok(());
    }
    let damage = match told(SealedSegment::open(file, *segment.header()))? {
        Ok(Some(sealed)) => told(sealed.verify(file))?.err(),
        Ok(None) => Some(no_footer(segment, file)),
        Err(damage) => Some(damage),
    };
    let Some(damage) = damage else { return Ok(()) };
    let mended = mender.map_or(Ok(false), |mender| mender.footer(segment, file));
    checked.note_or_mended(damage, mended);
    Ok(())
}
