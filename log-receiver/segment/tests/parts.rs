//! Parts of a piece that was checked are read without the rest, and never with a wrong byte.

use std::{path::Path, sync::Arc};

use backtide_segment::{
    Compression, Contents, Entry, EntryParts, Extent, PartSums, SegmentFile, SegmentHeader, SegmentId,
    SegmentWriter, Seq, WriterOptions,
};
use backtide_storage::{MemoryStorage, Storage, StorageFile};
use backtide_units::{
    ByteCount, ByteOffset, ByteRange, CaptureTime, DiskId, HistoryId, Lsn, PayloadChecksum,
};
use bytes::Bytes;
use uuid::Uuid;

/// Not a multiple of anything, nor is where it begins.
const LENGTH: usize = 2 * 65_536 + 3 * 4096 + 700;
const START: u64 = 1537;

fn range(start: u64, end: u64) -> ByteRange {
    ByteRange::between(ByteOffset(START + start), ByteOffset(START + end))
}

fn payload() -> Vec<u8> {
    (0..LENGTH).map(|at| (at % 251) as u8 ^ (at >> 12) as u8).collect()
}

/// A file with one long write.
fn written() -> (Arc<dyn StorageFile>, SegmentFile, EntryParts) {
    let storage = MemoryStorage::new();
    let file = storage.create_new(Path::new("x")).expect("create");
    let named = SegmentFile::new(Arc::clone(&file), "x".into());
    let header = SegmentHeader {
        disk: DiskId(Uuid::from_u128(1)),
        history: HistoryId(Uuid::from_u128(2)),
        id: SegmentId::FIRST,
        first_seq: Seq(1),
        synced: Seq(0),
    };
    let mut contents = Contents::new(header.first_seq, header.synced);
    let options = WriterOptions {
        buffer_bytes_max: ByteCount(1),
        allocation_step: ByteCount(4096),
        compression: Compression::None,
    };
    let mut writer = SegmentWriter::create(named.clone(), header, options, ByteCount::ZERO).expect("create");
    let bytes = Bytes::from(payload());
    let checksum = PayloadChecksum::of(&bytes);
    let whole = range(0, LENGTH as u64);
    let (lsn, time) = (Lsn(7), CaptureTime(1));
    let entry = Entry::Write { lsn, time, range: whole, payload: bytes, checksum };
    writer.append(entry, Seq(0), &mut contents).expect("append");
    writer.write_waiting().expect("write");
    let extent: Extent = contents.index().extents().next().expect("an extent");
    let parts = named.parts(&header, &extent, &|_| None).expect("a sound entry");
    (file, named, parts)
}

fn read(
    file: &SegmentFile,
    parts: &EntryParts,
    piece: usize,
    sums: &PartSums,
    at: ByteRange,
) -> Option<Vec<u8>> {
    let mut buffer = vec![0; at.count().0 as usize];
    file.part(parts, piece, sums, at, &mut buffer).ok().map(|()| buffer)
}

#[test]
fn any_part_of_any_piece_is_what_was_written() {
    let (_, file, parts) = written();
    let payload = payload();
    assert_eq!(parts.count(), 3);
    for number in 0..parts.count() {
        let piece = parts.piece(number);
        let (bytes, sums) = file.piece(&parts, number).expect("a sound piece");
        let from = (piece.start().0 - START) as usize;
        assert!(bytes == payload[from..from + bytes.len()], "piece {number}");
        assert_eq!(sums.count(), bytes.len().div_ceil(4096));
        let length = bytes.len() as u64;
        for start in [0, 1, 4095, 4096, 8192, 12_287] {
            for end in [4096, 4097, 8192, 12_288, 12_300, length] {
                if start < end {
                    let at = range(from as u64 + start, from as u64 + end);
                    let expected = &payload[from + start as usize..from + end as usize];
                    let found = read(&file, &parts, number, &sums, at);
                    assert!(found.is_some_and(|found| found == *expected), "piece {number}, {start}..{end}");
                }
            }
        }
    }
}

#[test]
fn damage_since_the_piece_was_checked_is_found_by_whoever_reads_it() {
    let (raw, file, parts) = written();
    let (_, sums) = file.piece(&parts, 1).expect("a sound piece");
    // Behind the file's header, the entry's, and its table.
    let damaged = 128 + 64 + 16 + 65_536 + 5 * 4096 + 17;
    let mut byte = [0];
    raw.read_at(ByteOffset(damaged), &mut byte).expect("read");
    raw.write_at(ByteOffset(damaged), &[byte[0] ^ 4]).expect("write");
    for part in 0..16 {
        let at = range(65_536 + part * 4096, 65_536 + (part + 1) * 4096);
        assert_eq!(read(&file, &parts, 1, &sums, at).is_none(), part == 5, "part {part}");
    }
    assert!(file.piece(&parts, 1).is_err());
}
