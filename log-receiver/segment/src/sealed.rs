//! Reading the footer of a sealed segment.
//!
//! A footer whose trailer or summary is not whole makes the segment one that is not sealed, never an error: the entries
//! are the truth and the footer is built again from them. Damage of its other parts is found when they are read, and is
//! an error there. Its parts are read when they are asked for, index blocks
//! one by one: what stays in memory of a sealed segment does not depend on what it holds.

use backtide_units::{ByteCount, ByteOffset, CaptureTime, Lsn};
use bytes::{Buf, Bytes};
use roaring::RoaringTreemap;

use crate::{
    ENTRY_HEADER_LENGTH, EntryHeader, Guide, IndexBlock, RecordRun, SEGMENT_HEADER_LENGTH, SegmentError,
    SegmentFile, SegmentHeader, SegmentStats, Seq, Step, VERSION,
    footer::{BLOCK_LENGTH, RECORDS_PER_BLOCK, STEP_CONTROL, STEP_RUN, TRAILER_LENGTH, TRAILER_MAGIC},
};

/// What stays in memory of a sealed segment.
#[derive(Clone, Debug)]
pub struct SealedSegment {
    header: SegmentHeader,
    stats: SegmentStats,
    sections: Sections,
}

/// What opening a log needs of a segment, and nobody else.
#[derive(Clone, Debug)]
pub struct Summary {
    /// The codes of the buckets that have extents.
    pub buckets: RoaringTreemap,
    /// The steps of the timeline.
    pub steps: Vec<Step>,
}

/// Where the parts of the footer are.
#[derive(Clone, Copy, Debug)]
struct Sections {
    entries_end: u64,
    blocks: u32,
    extents: u32,
    guide: u32,
    guide_crc: u32,
    summary: u32,
    summary_crc: u32,
    bitmap: u32,
    bitmap_crc: u32,
}

impl Sections {
    fn guide_at(&self) -> u64 {
        self.entries_end + u64::from(self.blocks) * BLOCK_LENGTH as u64
    }

    fn summary_at(&self) -> u64 {
        self.guide_at() + u64::from(self.guide)
    }

    fn bitmap_at(&self) -> u64 {
        self.summary_at() + u64::from(self.summary)
    }

    fn trailer_at(&self) -> u64 {
        self.bitmap_at() + u64::from(self.bitmap)
    }
}

impl SealedSegment {
    /// Reads the footer's trailer and checks its summary; `None` when one is not whole.
    ///
    /// # Errors
    /// [`SegmentError::UnknownVersion`] or the file's.
    pub fn open(file: &SegmentFile, header: SegmentHeader) -> Result<Option<Self>, SegmentError> {
        let Some((stats, sections)) = missing_if_damaged(read_trailer(file, &header))?.flatten() else {
            return Ok(None);
        };
        let sealed = Self { header, stats, sections };
        Ok(missing_if_damaged(sealed.summary(file))?.map(|_| sealed))
    }

    /// Reads what opening a log needs.
    ///
    /// # Errors
    /// [`SegmentError::Damaged`] or the file's.
    pub fn summary(&self, file: &SegmentFile) -> Result<Summary, SegmentError> {
        let (at, sections) = (self.sections.summary_at(), &self.sections);
        let bytes = read_section(file, at, sections.summary, sections.summary_crc)?;
        decode_summary(bytes, &self.header)
            // More buckets than extents would be a bitmap made to fill memory.
            .filter(|summary| summary.buckets.len() <= u64::from(sections.extents))
            .ok_or_else(|| file.damaged(at, "the summary cannot be read".to_owned()))
    }

    /// Reads what finds an extent or a record in this segment.
    ///
    /// # Errors
    /// [`SegmentError::Damaged`] or the file's.
    pub fn guide(&self, file: &SegmentFile) -> Result<Guide, SegmentError> {
        let (at, sections) = (self.sections.guide_at(), &self.sections);
        let bytes = read_section(file, at, sections.guide, sections.guide_crc)?;
        Guide::decode(bytes, sections.blocks, &self.header, self.stats.next_seq, sections.entries_end)
            .ok_or_else(|| file.damaged(at, "the guide cannot be read".to_owned()))
    }

    /// The segment's header.
    pub fn header(&self) -> &SegmentHeader {
        &self.header
    }

    /// Counts and bounds.
    pub fn stats(&self) -> &SegmentStats {
        &self.stats
    }

    /// The last entry; the one before its first when it has none.
    pub fn last(&self) -> Seq {
        Seq(self.stats.next_seq.0.saturating_sub(1))
    }

    /// Where the entries end.
    pub fn entries_end(&self) -> ByteOffset {
        ByteOffset(self.sections.entries_end)
    }

    /// The file's length.
    pub fn length(&self) -> ByteCount {
        ByteCount(self.sections.trailer_at() + TRAILER_LENGTH as u64)
    }

    /// How many extents.
    pub fn extent_count(&self) -> u32 {
        self.sections.extents
    }

    /// How many index blocks.
    pub fn block_count(&self) -> u32 {
        self.sections.blocks
    }

    /// Reads one index block, which must be the one that the guide says.
    ///
    /// # Errors
    /// [`SegmentError::Damaged`] or the file's.
    ///
    /// # Panics
    /// When there is no such block.
    pub fn block(&self, file: &SegmentFile, guide: &Guide, number: u32) -> Result<IndexBlock, SegmentError> {
        assert!(number < self.sections.blocks, "block {number} of {}", self.sections.blocks);
        let at = self.sections.entries_end + u64::from(number) * BLOCK_LENGTH as u64;
        let mut bytes = vec![0; BLOCK_LENGTH];
        file.read_exact(at, &mut bytes)?;
        let block = IndexBlock::decode(bytes.into(), self.header.first_seq)
            .ok_or_else(|| file.damaged(at, format!("index block {number} is not what was written")))?;
        if !guide.is_block(number, &block) {
            return Err(
                file.damaged(at, format!("index block {number} is not the one that the guide expects"))
            );
        }
        Ok(block)
    }

    /// Reads and checks every part of the footer: the trailer alone does not say that the parts before it
    /// reached the device.
    ///
    /// # Errors
    /// [`SegmentError::Damaged`] for the first part that is not whole, or the file's.
    pub fn verify(&self, file: &SegmentFile) -> Result<(), SegmentError> {
        let guide = self.guide(file)?;
        for number in 0..self.sections.blocks {
            self.block(file, &guide, number)?;
        }
        self.summary(file)?;
        self.disk_blocks(file).map(|_| ())
    }

    /// Reads the bitmap of 4 KiB blocks that extents other than coarse ones touch.
    ///
    /// # Errors
    /// [`SegmentError::Damaged`] or the file's.
    pub fn disk_blocks(&self, file: &SegmentFile) -> Result<RoaringTreemap, SegmentError> {
        let at = self.sections.bitmap_at();
        let bytes = read_section(file, at, self.sections.bitmap, self.sections.bitmap_crc)?;
        RoaringTreemap::deserialize_from(&bytes[..])
            .map_err(|error| file.damaged(at, format!("the bitmap of blocks cannot be read: {error}")))
    }
}

fn missing_if_damaged<T>(result: Result<T, SegmentError>) -> Result<Option<T>, SegmentError> {
    match result {
        Ok(value) => Ok(Some(value)),
        Err(SegmentError::Damaged { .. }) => Ok(None),
        Err(
            error @ (SegmentError::UnknownVersion { .. }
            | SegmentError::Full { .. }
            | SegmentError::Io { .. }
            | SegmentError::Poisoned),
        ) => Err(error),
    }
}

fn read_section(file: &SegmentFile, at: u64, length: u32, crc: u32) -> Result<Bytes, SegmentError> {
    let mut bytes = vec![0; length as usize];
    file.read_exact(at, &mut bytes)?;
    if crc32c::crc32c(&bytes) != crc {
        return Err(file.damaged(at, format!("the checksum of {length} bytes of the footer is wrong")));
    }
    Ok(bytes.into())
}

fn read_trailer(
    file: &SegmentFile,
    header: &SegmentHeader,
) -> Result<Option<(SegmentStats, Sections)>, SegmentError> {
    let length = file.length()?;
    let Some(at) = length.checked_sub(TRAILER_LENGTH as u64) else { return Ok(None) };
    let mut bytes = [0; TRAILER_LENGTH];
    file.read_exact(at, &mut bytes)?;
    let mut crc = &bytes[TRAILER_LENGTH - 4..];
    let computed = crc32c::crc32c_append(header.salt(), &bytes[..TRAILER_LENGTH - 4]);
    if bytes[..8] != TRAILER_MAGIC || crc.get_u32_le() != computed {
        return Ok(None);
    }
    let mut input = &bytes[8..];
    let version = input.get_u32_le();
    if version != VERSION {
        return Err(SegmentError::UnknownVersion {
            file: file.name().clone(),
            found: version,
            known: VERSION,
        });
    }
    let segment = input.get_u32_le();
    let first_seq = Seq(input.get_u64_le());
    let stats = SegmentStats {
        next_seq: Seq(input.get_u64_le()),
        version_min: Lsn(input.get_u64_le()),
        version_max: Lsn(input.get_u64_le()),
        time_min: CaptureTime(input.get_u64_le()),
        time_max: CaptureTime(input.get_u64_le()),
        records: input.get_u64_le(),
        flushes: input.get_u64_le(),
        payload_bytes: ByteCount(input.get_u64_le()),
        synced: Seq(input.get_u64_le()),
    };
    let sections = Sections {
        entries_end: input.get_u64_le(),
        blocks: input.get_u32_le(),
        extents: input.get_u32_le(),
        guide: input.get_u32_le(),
        guide_crc: input.get_u32_le(),
        summary: input.get_u32_le(),
        summary_crc: input.get_u32_le(),
        bitmap: input.get_u32_le(),
        bitmap_crc: input.get_u32_le(),
    };
    let ours = segment == header.id.0
        && first_seq == header.first_seq
        && stats.next_seq >= first_seq
        && stats.next_seq <= Seq::MAX.next();
    let fits = sections.entries_end <= length
        && sections.entries_end >= SEGMENT_HEADER_LENGTH as u64
        && sections.trailer_at() == at
        && u64::from(sections.extents) <= u64::from(sections.blocks) * RECORDS_PER_BLOCK as u64;
    Ok((ours && fits).then_some((stats, sections)))
}

/// `None` when it is no summary: its checksum was right, so only a hand-made file comes to that.
fn decode_summary(mut input: Bytes, header: &SegmentHeader) -> Option<Summary> {
    let bitmap_length = input.try_get_u32_le().ok()? as usize;
    if input.len() < bitmap_length {
        return None;
    }
    let buckets = RoaringTreemap::deserialize_from(&input.split_to(bitmap_length)[..]).ok()?;
    let count = input.try_get_u32_le().ok()?;
    let mut steps = Vec::new();
    for _ in 0..count {
        steps.push(decode_step(&mut input, header)?);
    }
    (!input.has_remaining()).then_some(Summary { buckets, steps })
}

fn decode_step(input: &mut Bytes, header: &SegmentHeader) -> Option<Step> {
    match input.try_get_u8().ok()? {
        STEP_RUN => {
            if input.len() < 11 * 8 {
                return None;
            }
            let records = input.get_u64_le();
            let mut at = || (Lsn(input.get_u64_le()), CaptureTime(input.get_u64_le()));
            let (first, last, last_flush, unchanged) = (at(), at(), at(), at());
            let flushes = input.get_u64_le();
            let pass_bytes = input.get_u64_le();
            Some(Step::Run(RecordRun { records, first, last, flushes, last_flush, unchanged, pass_bytes }))
        }
        STEP_CONTROL => {
            if input.len() < ENTRY_HEADER_LENGTH {
                return None;
            }
            let bytes = input.split_to(ENTRY_HEADER_LENGTH);
            let bytes: &[u8; ENTRY_HEADER_LENGTH] = bytes[..].try_into().ok()?;
            let entry = EntryHeader::decode(bytes, header.salt(), header.id).ok()?;
            if input.len() < entry.payload_length as usize || entry.kind.is_data() {
                return None;
            }
            entry.entry(input.split_to(entry.payload_length as usize)).ok().map(Step::Control)
        }
        _ => None,
    }
}
