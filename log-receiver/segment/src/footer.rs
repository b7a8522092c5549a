//! The footer that seals a segment: index, guide, summary, bitmap of blocks, trailer.
//!
//! It is written from the in-memory index in one walk, block by block; beside the index only the
//! bitmaps are in memory, and they are smaller than it. Nothing here syncs: a sealed segment is as
//! durable as the next ticket makes it, and a footer that does not survive is built again from the entries.

use std::io;

use backtide_storage::StorageFile;
use backtide_units::{BlockRange, ByteCount, ByteOffset};
use bytes::{BufMut, BytesMut};
use roaring::RoaringTreemap;

use crate::{
    COARSE_LEVEL, Contents, EntryHeader, SegmentHeader, Seq, Step,
    index::{ExtentKey, Piece},
};

pub(crate) const TRAILER_MAGIC: [u8; 8] = *b"BKTDEND\n";
pub(crate) const TRAILER_LENGTH: usize = 144;
pub(crate) const BLOCK_LENGTH: usize = 4096;
pub(crate) const RECORD_LENGTH: usize = 24;
pub(crate) const RECORDS_PER_BLOCK: usize = 170;
pub(crate) const COUNT_AT: usize = RECORD_LENGTH * RECORDS_PER_BLOCK;
pub(crate) const BLOCK_CRC_AT: usize = BLOCK_LENGTH - 4;
pub(crate) const FENCE_LENGTH: usize = 24;
pub(crate) const STRETCH_LENGTH: usize = 40;
/// An entry's number in its segment takes the lower bits of its field, the level of its extent the upper ones.
pub(crate) const SEQ_BITS: u32 = 28;
pub(crate) const STEP_RUN: u8 = 1;
pub(crate) const STEP_CONTROL: u8 = 2;

/// Writes of the footer are gathered to this size.
const CHUNK: usize = 256 << 10;

/// Appends to a file in chunks and keeps the position.
struct FooterWriter<'a> {
    file: &'a dyn StorageFile,
    at: u64,
    chunk: BytesMut,
}

impl FooterWriter<'_> {
    fn put(&mut self, bytes: &[u8]) -> io::Result<()> {
        self.chunk.put_slice(bytes);
        if self.chunk.len() >= CHUNK { self.flush() } else { Ok(()) }
    }

    fn flush(&mut self) -> io::Result<()> {
        self.file.write_at(ByteOffset(self.at), &self.chunk)?;
        self.at += self.chunk.len() as u64;
        self.chunk.clear();
        Ok(())
    }
}

/// Writes the footer at `entries_end` and cuts the file behind it; returns the file's length.
pub(crate) fn write_footer(
    file: &dyn StorageFile,
    header: &SegmentHeader,
    contents: &Contents,
    entries_end: ByteOffset,
) -> io::Result<ByteCount> {
    let mut out = FooterWriter { file, at: entries_end.0, chunk: BytesMut::with_capacity(CHUNK) };
    let (fences, blocks) = write_index(&mut out, header, contents)?;
    let guide = encode_guide(contents, &fences);
    out.put(&guide)?;
    let summary = encode_summary(header, contents)?;
    out.put(&summary)?;
    let mut bitmap = Vec::with_capacity(blocks.serialized_size());
    blocks.serialize_into(&mut bitmap)?;
    out.put(&bitmap)?;
    let mut trailer = BytesMut::with_capacity(TRAILER_LENGTH);
    put_stats(&mut trailer, header, contents, entries_end);
    trailer.put_u32_le(fences.len() as u32);
    trailer.put_u32_le(contents.index.count() as u32);
    trailer.put_u32_le(guide.len() as u32);
    trailer.put_u32_le(crc32c::crc32c(&guide));
    trailer.put_u32_le(summary.len() as u32);
    trailer.put_u32_le(crc32c::crc32c(&summary));
    trailer.put_u32_le(bitmap.len() as u32);
    trailer.put_u32_le(crc32c::crc32c(&bitmap));
    trailer.put_u32_le(0);
    trailer.put_u32_le(crc32c::crc32c_append(header.salt(), &trailer));
    assert_eq!(trailer.len(), TRAILER_LENGTH);
    out.put(&trailer)?;
    out.flush()?;
    let length = ByteCount(out.at);
    file.set_len(length)?;
    Ok(length)
}

/// Writes the blocks of extents; gives the first key of each, and the bitmap of disk blocks.
fn write_index(
    out: &mut FooterWriter<'_>,
    header: &SegmentHeader,
    contents: &Contents,
) -> io::Result<(Vec<ExtentKey>, RoaringTreemap)> {
    let mut fences = Vec::new();
    let mut disk_blocks = RoaringTreemap::new();
    let mut block = BytesMut::with_capacity(BLOCK_LENGTH);
    let mut count = 0_u16;
    for (key, piece) in contents.index.pieces() {
        if count == 0 {
            fences.push(key);
        }
        put_record(&mut block, header.first_seq, key, piece);
        if key.bucket().level() < COARSE_LEVEL {
            disk_blocks.insert_range(BlockRange::touched_by(piece.extent(key).range).indices());
        }
        count += 1;
        if usize::from(count) == RECORDS_PER_BLOCK {
            finish_block(&mut block, count);
            out.put(&block)?;
            block.clear();
            count = 0;
        }
    }
    if count > 0 {
        finish_block(&mut block, count);
        out.put(&block)?;
    }
    disk_blocks.optimize();
    Ok((fences, disk_blocks))
}

fn put_record(block: &mut BytesMut, first_seq: Seq, key: ExtentKey, piece: Piece) {
    block.put_u32_le(key.bucket().number());
    block.put_u16_le(piece.start);
    block.put_u16_le(piece.last);
    block.put_u64_le(key.version().0);
    let number = key.seq().0 - first_seq.0;
    assert!(number < 1 << SEQ_BITS, "a segment of 4 GiB has less than 2^26 entries");
    block.put_u32_le(u32::from(key.bucket().level()) << SEQ_BITS | number as u32);
    block.put_u32_le(piece.position);
}

fn finish_block(block: &mut BytesMut, count: u16) {
    block.put_bytes(0, COUNT_AT - block.len());
    block.put_u16_le(count);
    block.put_bytes(0, BLOCK_CRC_AT - block.len());
    block.put_u32_le(crc32c::crc32c(block));
}

fn encode_guide(contents: &Contents, fences: &[ExtentKey]) -> Vec<u8> {
    let stretches = contents.stretches();
    let mut out = Vec::with_capacity(fences.len() * FENCE_LENGTH + stretches.len() * STRETCH_LENGTH);
    for fence in fences {
        out.put_u64_le(fence.bucket().code());
        out.put_u64_le(fence.version().0);
        out.put_u64_le(fence.seq().0);
    }
    for stretch in stretches {
        out.put_u32_le(stretch.position.0);
        out.put_u32_le(0);
        out.put_u64_le(stretch.seq.0);
        out.put_u32_le(stretch.records);
        out.put_u32_le(stretch.flushes);
        out.put_u64_le(stretch.lsn_min.0);
        out.put_u64_le(stretch.time_min.0);
    }
    out
}

fn encode_summary(header: &SegmentHeader, contents: &Contents) -> io::Result<Vec<u8>> {
    let mut out = Vec::new();
    let buckets = contents.index.buckets();
    out.put_u32_le(buckets.serialized_size() as u32);
    buckets.serialize_into(&mut out)?;
    out.put_u32_le(contents.steps.len() as u32);
    for step in &contents.steps {
        match step {
            Step::Run(run) => {
                out.put_u8(STEP_RUN);
                out.put_u64_le(run.records);
                for (lsn, time) in [run.first, run.last, run.last_flush, run.unchanged] {
                    out.put_u64_le(lsn.0);
                    out.put_u64_le(time.0);
                }
                out.put_u64_le(run.flushes);
                out.put_u64_le(run.pass_bytes);
            }
            Step::Control(entry) => {
                // The number is of no use here; 1 stands for it.
                let (entry_header, text) = EntryHeader::of(entry, Seq(1), header.id, Seq(0));
                out.put_u8(STEP_CONTROL);
                out.put_slice(&entry_header.encode(header.salt()));
                out.put_slice(&text);
            }
        }
    }
    Ok(out)
}

fn put_stats(out: &mut BytesMut, header: &SegmentHeader, contents: &Contents, entries_end: ByteOffset) {
    let stats = &contents.stats;
    out.put_slice(&TRAILER_MAGIC);
    out.put_u32_le(crate::VERSION);
    out.put_u32_le(header.id.0);
    for number in [
        header.first_seq.0,
        stats.next_seq.0,
        stats.version_min.0,
        stats.version_max.0,
        stats.time_min.0,
        stats.time_max.0,
        stats.records,
        stats.flushes,
        stats.payload_bytes.0,
        stats.synced.0,
        entries_end.0,
    ] {
        out.put_u64_le(number);
    }
}
