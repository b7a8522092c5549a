//! One segment against its checksums: its header, its entries, its footer.
//!
//! Entries are walked over by their headers, for that finds all of them. Where a header is damaged nobody knows where the next
//! one stands; then the index says where data is, as it does for every reader.

use std::{collections::BTreeMap, sync::Arc};

use backtide_segment::{EntryHeader, EntryReader, Extent, Position, SealedSegment, SegmentFile};
use backtide_units::{ByteCount, ByteOffset, ByteRange, Lsn};

use super::{Checked, chain, told};
use crate::{LogError, Snapshot, Touched, mend::Mender, segment::Segment};

/// The check of one segment.
pub(super) struct SegmentCheck<'a> {
    snapshot: &'a Snapshot,
    segment: &'a Arc<Segment>,
    file: SegmentFile,
    mender: Option<&'a Mender<'a>>,
}

type Step<'a> = &'a mut dyn FnMut(ByteCount) -> bool;

/// That the footer of a segment is lost.
pub(super) fn no_footer(segment: &Segment, file: &SegmentFile) -> String {
    let end = segment.entries_end();
    format!("{} is damaged at byte {end}: its footer is not whole", file.name().display())
}

impl<'a> SegmentCheck<'a> {
    pub(super) fn new(
        snapshot: &'a Snapshot,
        segment: &'a Arc<Segment>,
        mender: Option<&'a Mender<'a>>,
    ) -> Result<Self, LogError> {
        Ok(Self { snapshot, segment, file: segment.file()?, mender })
    }

    /// Reads all of it, up to the entry `through`.
    pub(super) fn run(&self, through: u64, checked: &mut Checked, step: Step<'_>) -> Result<(), LogError> {
        checked.segments += 1;
        self.header(checked)?;
        let end = self.segment.entries_end();
        let mut at = 0;
        let mut reader = EntryReader::new(&self.file, *self.segment.header());
        for item in self.file.headers(*self.segment.header(), end) {
            let (header, position) = match told(item)? {
                Ok(found) => found,
                Err(damage) => {
                    self.lost_header(damage, ByteOffset(at), through, checked, step)?;
                    break;
                }
            };
            if header.seq.0 > through {
                break;
            }
            self.entry(&mut reader, &header, position, checked)?;
            let read = position.offset().0 - at;
            at = position.offset().0;
            checked.bytes.0 += read;
            if !self.pace(read, step) {
                checked.called_off = true;
                return Ok(());
            }
        }
        let rest = end.0.saturating_sub(at);
        checked.bytes.0 += rest;
        checked.called_off |= !step(ByteCount(rest));
        self.footer(checked)
    }

    /// What a mend reads is for the pace alone: it is no part of what is checked.
    fn pace(&self, read: u64, step: Step<'_>) -> bool {
        let mending = self.mender.map_or(ByteCount::ZERO, Mender::take_read);
        step(ByteCount(read.saturating_add(mending.0)))
    }

    fn header(&self, checked: &mut Checked) -> Result<(), LogError> {
        let ours = self.segment.header();
        match told(self.file.header())? {
            Ok(found) if (found.disk, found.history, found.id) == (ours.disk, ours.history, ours.id) => {}
            Ok(_) => {
                let name = self.file.name().display();
                let what = format!("{name} is damaged at byte 0: it is another segment's file");
                checked.note_touching(what, None, |_| self.at_most());
            }
            Err(damage) => {
                let mended = self.mender.map_or(Ok(false), |mender| mender.header(self.segment, &self.file));
                // All that it says stands in its neighbors, and in every entry.
                checked.note_or_mended(damage, mended, |_| Touched::nothing());
            }
        }
        Ok(())
    }

    fn entry(
        &self,
        reader: &mut EntryReader<'_>,
        header: &EntryHeader,
        position: Position,
        checked: &mut Checked,
    ) -> Result<(), LogError> {
        let Err(damage) = told(reader.entry(position))? else {
            checked.entries += 1;
            return Ok(());
        };
        match header.range() {
            Some(range) => {
                let (seq, version) = (header.seq, header.lsn);
                self.damaged(Extent { range, version, seq, position, zero: false }, damage, checked)
            }
            None => {
                checked.note_touching(damage, None, |_| self.of_control(header.lsn));
                Ok(())
            }
        }
    }

    /// Mends an entry with data, or notes which bytes of it are damaged.
    fn damaged(&self, extent: Extent, damage: String, checked: &mut Checked) -> Result<(), LogError> {
        let mend = |mender: &Mender<'_>| mender.entry(self.segment, &self.file, extent.position);
        let why = match self.mender.map_or(Ok(false), mend) {
            Ok(true) => {
                checked.entries += 1;
                checked.note_mended(damage);
                return Ok(());
            }
            Ok(false) => None,
            Err(error) => Some(chain(&error)),
        };
        let (mut places, _) = entry_places(self.segment, &self.file, &extent)?;
        if places.is_empty() {
            // It is whole by now, or it is damaged as a whole.
            places.push((damage, extent.range));
        }
        for (place, range) in places {
            checked.note_touching(place, why.as_deref(), |look| match look {
                true => self.snapshot.touched_by_entry(self.segment, extent.position, range, extent.version),
                false => self.snapshot.touched_at_most(Some(range), extent.version),
            });
        }
        Ok(())
    }

    /// A header that is damaged, behind `at`: what the index knows of behind that place is read by it.
    fn lost_header(
        &self,
        damage: String,
        at: ByteOffset,
        through: u64,
        checked: &mut Checked,
        step: Step<'_>,
    ) -> Result<(), LogError> {
        let mut entries: BTreeMap<u32, Extent> = BTreeMap::new();
        let known = self.segment.each_extent(&mut |extent| {
            if extent.position.offset() > at && extent.seq.0 <= through && !extent.zero {
                let known = entries.entry(extent.position.0).or_insert(*extent);
                let start = known.range.start().min(extent.range.start());
                known.range = ByteRange::between(start, known.range.end().max(extent.range.end()));
            }
        });
        if known.is_err() {
            // Without the index nobody knows what else there is.
            checked.note_touching(damage, None, |_| self.at_most());
            return Ok(());
        }
        let is_open = !self.segment.is_sealed();
        let first = entries.values().map(|extent| extent.version).min();
        checked.note_touching(damage, None, |_| match first.filter(|_| is_open) {
            Some(first) => self.snapshot.touched_at_most(None, first),
            None => Touched::nothing(),
        });
        for extent in entries.into_values() {
            let (places, _) = entry_places(self.segment, &self.file, &extent)?;
            match places.into_iter().next() {
                Some((damage, _)) => self.damaged(extent, damage, checked)?,
                None => checked.entries += 1,
            }
            if !self.pace(0, step) {
                checked.called_off = true;
                break;
            }
        }
        Ok(())
    }

    /// Of an entry without data the footer knows what it says; of one in a segment that is still written it is missed when
    /// the log is opened again.
    fn of_control(&self, lsn: Lsn) -> Touched {
        match self.segment.is_sealed() {
            true => Touched::nothing(),
            false => self.snapshot.touched_at_most(None, lsn),
        }
    }

    /// All points at which anything of the segment can be the newest.
    fn at_most(&self) -> Touched {
        let stats = self.segment.stats();
        match stats.version_min <= stats.version_max {
            true => self.snapshot.touched_at_most(None, stats.version_min),
            false => Touched::nothing(),
        }
    }

    /// A trailer or summary that is damaged is built again when the log is opened, but it is damage all the same. So are the
    /// other parts, which opening does not read where a later segment says that the footer was durable.
    fn footer(&self, checked: &mut Checked) -> Result<(), LogError> {
        if !self.segment.is_sealed() {
            return Ok(());
        }
        let damage = match told(SealedSegment::open(&self.file, *self.segment.header()))? {
            Ok(Some(sealed)) => told(sealed.verify(&self.file))?.err(),
            Ok(None) => Some(no_footer(self.segment, &self.file)),
            Err(damage) => Some(damage),
        };
        let Some(damage) = damage else { return Ok(()) };
        let mended = self.mender.map_or(Ok(false), |mender| mender.footer(self.segment, &self.file));
        checked.note_or_mended(damage, mended, |_| self.at_most());
        Ok(())
    }
}

/// What of an entry with data cannot be read, by what is wrong: all of it, or some of its pieces; and whether other entries'
/// bytes are compressed with it.
pub(crate) fn entry_places(
    segment: &Segment,
    file: &SegmentFile,
    extent: &Extent,
) -> Result<(Vec<(String, ByteRange)>, bool), LogError> {
    let parts = match told(file.parts(segment.header(), extent, &|_| None))? {
        Ok(parts) => parts,
        Err(damage) => return Ok((vec![(damage, extent.range)], true)),
    };
    let mut places = Vec::new();
    for number in parts.pieces_of(extent.range) {
        if let Err(damage) = told(file.piece(&parts, number))? {
            places.push((damage, parts.piece(number)));
        }
    }
    Ok((places, parts.body().is_some()))
}
