//! Reading every byte of a log against its checksums: what `fsck` and `scrub` do.
//!
//! It walks the segments that a snapshot or a salvage has, with the readers that everybody else uses,
//! so it may run beside a log that grows. Nothing is cached, and nothing is written but by a check that mends: that puts
//! back what the checksums ask for, where it is still to be had (`mend.rs`).

mod images;
mod segment;

pub(crate) use segment::entry_places;

use std::collections::BTreeMap;

use backtide_segment::{SegmentError, SegmentId, Seq};
use backtide_units::ByteCount;

use crate::{AskDisk, LogError, Salvage, Snapshot, Touched, mend::Mender};

use segment::{SegmentCheck, no_footer};

/// So many places are named; the rest is counted.
const DAMAGE_MAX: usize = 100;

/// Of so many it is looked for which points they touch; of others a bound is told.
const LOOKED_FOR_MAX: u32 = 2000;

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
    /// What is damaged, a sentence each with file and place; at most 100, and first of all what the newest point needs.
    pub damage: Vec<String>,
    /// Damaged places beyond those.
    pub more_damage: u64,
    /// Which points the damaged places touch, by their [`damaged_place`]; those of which nobody can tell are not there.
    pub touched: BTreeMap<String, Touched>,
    /// What was damaged and has been mended, a sentence each; at most 100.
    pub mended: Vec<String>,
    /// Whether it was called off.
    pub called_off: bool,
    /// How often it was looked for the points that a place touches.
    looked_for: u32,
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
pub(crate) fn chain(error: &dyn std::error::Error) -> String {
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

    /// Notes a damaged place, why it could not be mended if that was tried, and the points that it touches: `touched` looks for
    /// them, or gives a bound where it is told that too much was looked for.
    pub(crate) fn note_touching(
        &mut self,
        place: String,
        why: Option<&str>,
        touched: impl FnOnce(bool) -> Touched,
    ) {
        self.looked_for = self.looked_for.saturating_add(1);
        let found = touched(self.looked_for <= LOOKED_FOR_MAX);
        let sentence = why.map_or_else(|| place.clone(), |why| cannot_be_mended(&place, why));
        if !found.is_past() && self.damage.len() >= DAMAGE_MAX && !self.damage.contains(&sentence) {
            self.name_no_more_of_the_past();
        }
        self.note(sentence);
        if self.damage.iter().any(|damage| damaged_place(damage) == place) {
            self.touched.entry(place).or_default().merge(found);
        }
    }

    /// Makes room for a place that the newest point or those to come need, if one is named that they do not need.
    fn name_no_more_of_the_past(&mut self) {
        let is_past = |damage: &String| self.touched.get(damaged_place(damage)).is_some_and(Touched::is_past);
        if let Some(at) = self.damage.iter().rposition(is_past) {
            let gone = self.damage.remove(at);
            self.touched.remove(damaged_place(&gone));
            self.more_damage += 1;
        }
    }

    /// Notes what was mended.
    pub(crate) fn note_mended(&mut self, damage: String) {
        if self.mended.len() < DAMAGE_MAX {
            self.mended.push(damage);
        }
    }

    /// Notes damage, or that it was mended. That a mend cannot be written says nothing of what else there is: the check
    /// goes on.
    fn note_or_mended(
        &mut self,
        damage: String,
        mended: Result<bool, LogError>,
        touched: impl FnOnce(bool) -> Touched,
    ) {
        match mended {
            Ok(false) => self.note_touching(damage, None, touched),
            Ok(true) => self.note_mended(damage),
            Err(error) => self.note_touching(damage, Some(&chain(&error)), touched),
        }
    }

    /// Whether nothing is damaged.
    pub fn is_sound(&self) -> bool {
        self.damage.is_empty()
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

    /// As [`Snapshot::check`] of some segments alone.
    pub(crate) fn check_segments(&self, some: &[SegmentId]) -> Result<Checked, LogError> {
        let mut checked = Checked::default();
        let some = self.segments.iter().filter(|segment| some.contains(&segment.header().id));
        for segment in some {
            SegmentCheck::new(self, segment, None)?.run(self.through().0, &mut checked, &mut |_| true)?;
        }
        Ok(checked)
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
            SegmentCheck::new(self, segment, of_segments)?.run(self.through().0, checked, step)?;
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
        let latest = self.snapshot.timeline().latest();
        for (nth, damage) in self.damage.iter().enumerate() {
            let is_loss = nth >= self.lost;
            checked.note_touching(damage.clone(), None, |_| {
                if is_loss { Touched::lost(latest, None) } else { Touched::nothing() }
            });
        }
        self.snapshot.check_into(checked, None, step)?;
        for segment in &self.beyond {
            if checked.called_off {
                break;
            }
            // They give no points.
            SegmentCheck::new(&self.snapshot, segment, None)?.run(u64::MAX, checked, step)?;
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
                let at_most = |_| self.snapshot.touched_at_most(None, stats.version_min);
                checked.note_touching(no_footer(segment, &segment.file()?), None, at_most);
            }
            durable = durable.max(stats.synced).max(segment.header().synced);
        }
        Ok(())
    }
}
