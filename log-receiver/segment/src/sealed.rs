//! Reading the footer of a sealed segment.
//!
//! A footer that is not whole makes the segment one that is not sealed, never an error: the entries
//! are the truth and the footer is built again from them. Index blocks are read one by one, when asked for.

use backtide_units::{ByteCount, ByteOffset, ByteRange, CaptureTime, Lsn};
use bytes::{Buf, Bytes};
use roaring::{RoaringBitmap, RoaringTreemap};

use crate::{
    Bucket, ENTRY_HEADER_LENGTH, EntryHeader, Extent, ExtentKey, Position, RecordRun, SegmentError,
    SegmentFile, SegmentHeader, SegmentStats, Seq, Step, VERSION,
    footer::{
        BLOCK_CRC_AT, BLOCK_LENGTH, COUNT_AT, FENCE_LENGTH, RECORD_LENGTH, RECORDS_PER_BLOCK, STEP_CONTROL,
        STEP_RUN, TRAILER_LENGTH, TRAILER_MAGIC, WIDE_LENGTH,
    },
    index::Piece,
};

/// What stays in memory of a sealed segment.
#[derive(Clone, Debug)]
pub struct SealedSegment {
    header: SegmentHeader,
    stats: SegmentStats,
    sections: Sections,
    fences: Vec<ExtentKey>,
    buckets: RoaringBitmap,
}

/// One block of the index, checked.
#[derive(Clone, Debug)]
pub struct IndexBlock {
    first_seq: Seq,
    count: usize,
    bytes: Bytes,
}

/// Where the parts of the footer are.
#[derive(Clone, Copy, Debug)]
struct Sections {
    entries_end: u64,
    blocks: u32,
    extents: u32,
    wide: u32,
    wide_crc: u32,
    summary: u32,
    summary_crc: u32,
    bitmap: u32,
    bitmap_crc: u32,
}

impl Sections {
    fn wide_at(&self) -> u64 {
        self.entries_end + u64::from(self.blocks) * BLOCK_LENGTH as u64
    }

    fn summary_at(&self) -> u64 {
        self.wide_at() + u64::from(self.wide) * WIDE_LENGTH as u64
    }

    fn bitmap_at(&self) -> u64 {
        self.summary_at() + u64::from(self.summary)
    }

    fn trailer_at(&self) -> u64 {
        self.bitmap_at() + u64::from(self.bitmap)
    }
}

impl SealedSegment {
    /// Reads the footer; `None` when there is no whole one.
    ///
    /// # Errors
    /// [`SegmentError::UnknownVersion`] or the file's.
    pub fn open(
        file: &SegmentFile,
        header: SegmentHeader,
    ) -> Result<Option<(Self, Vec<Step>)>, SegmentError> {
        let Some((stats, sections)) = read_trailer(file, &header)? else { return Ok(None) };
        let summary = read_section(file, sections.summary_at(), sections.summary, sections.summary_crc);
        let Some(summary) = missing_if_damaged(summary)? else { return Ok(None) };
        let decoded = decode_summary(summary, &header, &sections);
        Ok(decoded.map(|(fences, buckets, steps)| (Self { header, stats, sections, fences, buckets }, steps)))
    }

    /// The segment's header.
    pub fn header(&self) -> &SegmentHeader {
        &self.header
    }

    /// Counts and bounds.
    pub fn stats(&self) -> &SegmentStats {
        &self.stats
    }

    /// Where the entries end.
    pub fn entries_end(&self) -> ByteOffset {
        ByteOffset(self.sections.entries_end)
    }

    /// The file's length.
    pub fn length(&self) -> ByteCount {
        ByteCount(self.sections.trailer_at() + TRAILER_LENGTH as u64)
    }

    /// Whether any extent that is not wide lies in `bucket`.
    pub fn has(&self, bucket: Bucket) -> bool {
        self.buckets.contains(bucket.0)
    }

    /// How many extents that are not wide.
    pub fn extent_count(&self) -> u32 {
        self.sections.extents
    }

    /// How many wide extents.
    pub fn wide_count(&self) -> u32 {
        self.sections.wide
    }

    /// How many index blocks.
    pub fn block_count(&self) -> u32 {
        self.sections.blocks
    }

    /// The block in which a walk from `key` begins.
    pub fn block_of(&self, key: ExtentKey) -> u32 {
        (self.fences.partition_point(|fence| *fence <= key) as u32).saturating_sub(1)
    }

    /// Reads one index block.
    ///
    /// # Errors
    /// [`SegmentError::Damaged`] or the file's.
    ///
    /// # Panics
    /// When there is no such block.
    pub fn block(&self, file: &SegmentFile, number: u32) -> Result<IndexBlock, SegmentError> {
        assert!(number < self.sections.blocks, "block {number} of {}", self.sections.blocks);
        let at = self.sections.entries_end + u64::from(number) * BLOCK_LENGTH as u64;
        let mut bytes = vec![0; BLOCK_LENGTH];
        file.read_exact(at, &mut bytes)?;
        let mut tail = &bytes[BLOCK_CRC_AT..];
        let count = usize::from(u16::from_le_bytes([bytes[COUNT_AT], bytes[COUNT_AT + 1]]));
        if tail.get_u32_le() != crc32c::crc32c(&bytes[..BLOCK_CRC_AT]) || count > RECORDS_PER_BLOCK {
            return Err(file.damaged(at, format!("the checksum of index block {number} is wrong")));
        }
        Ok(IndexBlock { first_seq: self.header.first_seq, count, bytes: bytes.into() })
    }

    /// Reads the wide extents, newest version first.
    ///
    /// # Errors
    /// [`SegmentError::Damaged`] or the file's.
    pub fn wide(&self, file: &SegmentFile) -> Result<Vec<Extent>, SegmentError> {
        let length = self.sections.wide * WIDE_LENGTH as u32;
        let mut bytes = read_section(file, self.sections.wide_at(), length, self.sections.wide_crc)?;
        let mut extents = Vec::with_capacity(self.sections.wide as usize);
        for _ in 0..self.sections.wide {
            let (start, count) = (bytes.get_u64_le(), bytes.get_u64_le());
            let range = ByteRange::new(ByteOffset(start), ByteCount(count)).ok_or_else(|| {
                file.damaged(self.sections.wide_at(), "a wide extent beyond any disk".to_owned())
            })?;
            let (version, seq) = (Lsn(bytes.get_u64_le()), Seq(bytes.get_u64_le()));
            let position = Position(bytes.get_u32_le());
            bytes.advance(4);
            extents.push(Extent { range, version, seq, position, zero: true });
        }
        Ok(extents)
    }

    /// Reads and checks every part of the footer: the trailer alone does not say that the parts before it
    /// reached the device.
    ///
    /// # Errors
    /// [`SegmentError::Damaged`] for the first part that is not whole, or the file's.
    pub fn verify(&self, file: &SegmentFile) -> Result<(), SegmentError> {
        for number in 0..self.sections.blocks {
            self.block(file, number)?;
        }
        self.wide(file)?;
        self.disk_blocks(file).map(|_| ())
    }

    /// Reads the bitmap of 4 KiB blocks that extents other than wide ones touch.
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

impl IndexBlock {
    /// How many extents.
    pub fn len(&self) -> usize {
        self.count
    }

    /// Whether it has no extents.
    pub fn is_empty(&self) -> bool {
        self.count == 0
    }

    /// One extent, with its key.
    ///
    /// # Panics
    /// When there is no such extent.
    pub fn get(&self, place: usize) -> (ExtentKey, Extent) {
        assert!(place < self.count, "extent {place} of {}", self.count);
        let mut record = &self.bytes[place * RECORD_LENGTH..][..RECORD_LENGTH];
        let bucket = Bucket(record.get_u32_le());
        let (start, last) = (record.get_u16_le(), record.get_u16_le());
        let version = Lsn(record.get_u64_le());
        let seq = Seq(self.first_seq.0.saturating_add(u64::from(record.get_u32_le())));
        let position = record.get_u32_le();
        let key = ExtentKey::new(bucket, version, seq);
        // A block whose checksum is right was written by us, so start <= last; the maximum only
        // keeps a hand-made file from a panic.
        (key, Piece { start, last: last.max(start), position }.extent(key))
    }

    /// The first place at or after `key`.
    pub fn lower_bound(&self, key: ExtentKey) -> usize {
        let (mut low, mut high) = (0, self.count);
        while low < high {
            let middle = usize::midpoint(low, high);
            if self.get(middle).0 < key { low = middle + 1 } else { high = middle }
        }
        low
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
        wide: input.get_u32_le(),
        wide_crc: input.get_u32_le(),
        summary: input.get_u32_le(),
        summary_crc: input.get_u32_le(),
        bitmap: input.get_u32_le(),
        bitmap_crc: input.get_u32_le(),
    };
    let ours = segment == header.id.0 && first_seq == header.first_seq && stats.next_seq >= first_seq;
    let fits = sections.entries_end <= length && sections.trailer_at() == at;
    Ok((ours && fits).then_some((stats, sections)))
}

type Summary = (Vec<ExtentKey>, RoaringBitmap, Vec<Step>);

/// `None` when it is no summary: its checksum was right, so only a hand-made file comes to that.
fn decode_summary(mut input: Bytes, header: &SegmentHeader, sections: &Sections) -> Option<Summary> {
    let fences_length = sections.blocks as usize * FENCE_LENGTH;
    if input.len() < fences_length {
        return None;
    }
    let mut fences_bytes = input.split_to(fences_length);
    let mut fences = Vec::with_capacity(sections.blocks as usize);
    while fences_bytes.has_remaining() {
        let bucket = Bucket(fences_bytes.get_u32_le());
        let (version, seq) = (Lsn(fences_bytes.get_u64_le()), Seq(fences_bytes.get_u64_le()));
        fences.push(ExtentKey::new(bucket, version, seq));
    }
    let bitmap_length = input.try_get_u32_le().ok()? as usize;
    if input.len() < bitmap_length {
        return None;
    }
    let buckets = RoaringBitmap::deserialize_from(&input.split_to(bitmap_length)[..]).ok()?;
    let count = input.try_get_u32_le().ok()?;
    let mut steps = Vec::new();
    for _ in 0..count {
        steps.push(decode_step(&mut input, header)?);
    }
    (!input.has_remaining()).then_some((fences, buckets, steps))
}

fn decode_step(input: &mut Bytes, header: &SegmentHeader) -> Option<Step> {
    match input.try_get_u8().ok()? {
        STEP_RUN => {
            if input.len() < 9 * 8 {
                return None;
            }
            let records = input.get_u64_le();
            let mut at = || (Lsn(input.get_u64_le()), CaptureTime(input.get_u64_le()));
            let (first, last, last_flush) = (at(), at(), at());
            let flushes = input.get_u64_le();
            let pass_bytes = input.get_u64_le();
            Some(Step::Run(RecordRun { records, first, last, flushes, last_flush, pass_bytes }))
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
