//! Payloads that are compressed together: what is gathered, what is left alone, and what a torn or damaged batch costs.

use std::{path::Path, sync::Arc};

use backtide_segment::{
    Compression, Contents, ENTRY_HEADER_LENGTH, Entry, EntryHeader, Extent, Position, SegmentFile,
    SegmentHeader, SegmentId, SegmentWriter, Seq, WriterOptions, scan,
};
use backtide_storage::{MemoryStorage, Storage, StorageFile, read_file};
use backtide_units::{
    ByteCount, ByteOffset, ByteRange, CaptureTime, DiskId, HistoryId, Lsn, PayloadChecksum,
};
use bytes::Bytes;
use uuid::Uuid;

const BOTH: [Compression; 2] = [Compression::Lz4, Compression::Zstd];

fn header() -> SegmentHeader {
    SegmentHeader {
        disk: DiskId(Uuid::from_u128(1)),
        history: HistoryId(Uuid::from_u128(2)),
        id: SegmentId(1),
        first_seq: Seq(1),
        synced: Seq(0),
    }
}

struct Log {
    storage: MemoryStorage,
    file: SegmentFile,
    writer: SegmentWriter,
    contents: Contents,
    payloads: Vec<(Position, Bytes)>,
    noise: u64,
}

impl Log {
    fn new(compression: Compression) -> Self {
        let storage = MemoryStorage::new();
        let path = Path::new("1.seg");
        let file = SegmentFile::new(storage.create_new(path).unwrap(), path.to_owned());
        let options = WriterOptions {
            buffer_bytes_max: ByteCount(1 << 20),
            allocation_step: ByteCount(1 << 20),
            compression,
        };
        let writer = SegmentWriter::create(file.clone(), header(), options, ByteCount::ZERO).unwrap();
        let contents = Contents::new(Seq(1), Seq(0));
        Self { storage, file, writer, contents, payloads: Vec::new(), noise: 1 }
    }

    /// Text-like bytes, or bytes that do not compress.
    fn write(&mut self, length: usize, noisy: bool) -> Position {
        let mut next = || {
            self.noise =
                self.noise.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
            (self.noise >> 56) as u8
        };
        let bytes: Vec<u8> = (0..length).map(|at| if noisy || at % 8 == 0 { next() } else { 7 }).collect();
        let payload = Bytes::from(bytes);
        let lsn = self.payloads.len() as u64 + 1;
        let entry = Entry::Write {
            lsn: Lsn(lsn),
            time: CaptureTime(lsn),
            range: range(lsn, length),
            checksum: PayloadChecksum::of(&payload),
            payload: payload.clone(),
        };
        let position = self.writer.append(entry, Seq(0), &mut self.contents).unwrap();
        self.payloads.push((position, payload));
        position
    }

    fn read_back(&mut self) {
        self.writer.write_waiting().unwrap();
        let end = self.writer.end();
        let positions: Vec<Position> = self.file.headers(header(), end).map(|item| item.unwrap().1).collect();
        assert_eq!(positions, self.payloads.iter().map(|(position, _)| *position).collect::<Vec<_>>());
        for (position, payload) in &self.payloads {
            assert!(self.file.entry(&header(), *position).unwrap().1 == payload, "{position:?}");
        }
        let scanned = scan(&self.file, header(), Seq(0), Seq(0)).unwrap();
        assert_eq!((scanned.end, scanned.damaged.len()), (end, 0));
        assert_eq!(scanned.contents.stats(), self.contents.stats());
    }

    fn extent(&self, number: usize) -> Extent {
        let (position, payload) = &self.payloads[number];
        let lsn = number as u64 + 1;
        let range = range(lsn, payload.len());
        Extent { range, version: Lsn(lsn), seq: Seq(lsn), position: *position, zero: false }
    }

    /// A copy of the file with some change to its bytes.
    fn changed(&self, change: impl FnOnce(&mut Vec<u8>)) -> SegmentFile {
        let mut bytes = read_file(&self.storage, Path::new("1.seg"), ByteCount(64 << 20)).unwrap();
        change(&mut bytes);
        let copy = MemoryStorage::new().create_new(Path::new("x.seg")).unwrap();
        copy.write_at(ByteOffset(0), &bytes).unwrap();
        SegmentFile::new(Arc::clone(&copy) as Arc<dyn StorageFile>, "x.seg".into())
    }
}

fn range(lsn: u64, length: usize) -> ByteRange {
    let start = lsn << 26;
    ByteRange::between(ByteOffset(start), ByteOffset(start + length as u64))
}

#[test]
fn what_is_gathered_takes_less_and_reads_back() {
    for compression in BOTH {
        let mut log = Log::new(compression);
        for length in [4096, 1, 513, 65_536, 70_000, 4096, 200_000, 65_535, 2, 2] {
            log.write(length, false);
        }
        for _ in 0..1000 {
            log.write(512, false);
        }
        log.read_back();
        let bytes: usize = log.payloads.iter().map(|(_, payload)| payload.len()).sum();
        let allowed = bytes / 2 + log.payloads.len() * 72;
        assert!(log.writer.end().0 < allowed as u64, "{compression:?}: {} of {bytes}", log.writer.end());
    }
}

#[test]
fn what_does_not_compress_is_left_alone_for_a_while_and_costs_hardly_anything() {
    for compression in BOTH {
        let mut log = Log::new(compression);
        for _ in 0..4000 {
            log.write(4096, true);
        }
        log.read_back();
        let plain = 4000 * (4096 + 64) as u64;
        assert!(log.writer.end().0 < plain + plain / 1000, "{compression:?}: {} {plain}", log.writer.end());
        // It is tried again later.
        let before = log.writer.end().0;
        for _ in 0..4000 {
            log.write(4096, false);
        }
        log.read_back();
        assert!(log.writer.end().0 - before < plain * 3 / 4, "{compression:?}");
    }
}

#[test]
fn an_entry_of_a_batch_is_read_by_way_of_the_index() {
    for compression in BOTH {
        let mut log = Log::new(compression);
        for length in [4096, 8192, 200_000, 512] {
            log.write(length, false);
        }
        log.read_back();
        for number in 0..4 {
            let extent = log.extent(number);
            let parts = log.file.parts(&header(), &extent, &|_| None).unwrap();
            let payload = &log.payloads[number].1;
            assert!(parts.body().is_some());
            assert_eq!(log.file.payload(&parts, 0..parts.count()).unwrap(), payload);
            for piece in 0..parts.count() {
                let (bytes, sums) = log.file.piece(&parts, piece).unwrap();
                let from = piece * 65_536;
                assert_eq!(bytes, payload[from..from + bytes.len()]);
                let start = parts.piece(piece).start().0 + 5;
                let wanted = ByteRange::between(ByteOffset(start), ByteOffset(start + 300));
                let mut buffer = vec![0; 300];
                log.file.part(&parts, piece, &sums, wanted, &mut buffer).unwrap();
                assert_eq!(buffer, payload[from + 5..from + 305]);
            }
        }
    }
}

#[test]
fn a_batch_that_is_torn_anywhere_is_cut_as_a_whole() {
    for compression in BOTH {
        let mut log = Log::new(compression);
        log.write(4096, false);
        log.writer.write_waiting().unwrap();
        let end = log.writer.end().0;
        for _ in 0..5 {
            log.write(4096, false);
        }
        log.writer.write_waiting().unwrap();
        for torn in (end + 1..log.writer.end().0).step_by(13) {
            let file = log.changed(|bytes| bytes[torn as usize..].fill(0));
            let scanned = scan(&file, header(), Seq(0), Seq(0)).unwrap();
            // Zeroes may be what stood in the last few bytes.
            let whole = scanned.end == log.writer.end();
            assert!(scanned.end.0 == end || (whole && scanned.damaged.is_empty()), "at {torn}");
            assert!(!whole || torn + 13 > log.writer.end().0, "at {torn}");
        }
    }
}

#[test]
fn damage_in_an_acknowledged_batch_costs_its_payloads_and_no_other() {
    for compression in BOTH {
        let mut log = Log::new(compression);
        for _ in 0..3 {
            for _ in 0..5 {
                log.write(4096, false);
            }
            log.writer.write_waiting().unwrap();
        }
        // In the frame of the second batch: behind its headers, the body's header and the table.
        let frame = log.payloads[5].0.offset().0 as usize + 6 * ENTRY_HEADER_LENGTH + 5 * 4 + 12;
        for place in [frame, frame + 100, frame + 1000] {
            let file = log.changed(|bytes| bytes[place] ^= 4);
            let scanned = scan(&file, header(), Seq(15), Seq(0)).unwrap();
            let damaged: Vec<u64> = scanned.damaged.iter().map(|(seq, _)| seq.0).collect();
            assert_eq!(damaged, [6, 7, 8, 9, 10]);
            assert_eq!(scanned.end, log.writer.end());
            for (number, (position, payload)) in log.payloads.iter().enumerate() {
                let read = file.entry(&header(), *position);
                assert_eq!(read.is_ok(), !(5..10).contains(&number));
                assert!(read.is_err() || read.unwrap().1 == payload);
            }
        }
    }
}

#[test]
fn a_damaged_header_of_a_body_costs_no_more_than_the_batch() {
    for compression in BOTH {
        let mut log = Log::new(compression);
        for length in [4096; 5].into_iter().chain([200_000]).chain([4096; 5]) {
            log.write(length, false);
        }
        log.writer.write_waiting().unwrap();
        let end = log.writer.end();
        let after = |number: usize| log.payloads[number].0.offset().0 as usize + ENTRY_HEADER_LENGTH;
        for (body, lost) in [(after(4), 1..=5), (after(5), 6..=6), (after(10), 7..=11)] {
            let lost: Vec<u64> = lost.collect();
            for bit in (0..ENTRY_HEADER_LENGTH * 8).step_by(7) {
                let flip = |bytes: &mut Vec<u8>| bytes[body + bit / 8] ^= 1 << (bit % 8);
                let file = log.changed(flip);
                let scanned = scan(&file, header(), Seq(11), Seq(0)).unwrap();
                let damaged: Vec<u64> = scanned.damaged.iter().map(|(seq, _)| seq.0).collect();
                assert_eq!((&damaged, scanned.end), (&lost, end), "bit {bit}");
                let walked = file.headers(header(), end).map(|item| item.unwrap().0.seq.0);
                assert!(walked.eq(1..=11), "bit {bit}");
                for (seq, (position, payload)) in (1_u64..).zip(&log.payloads) {
                    let read = file.entry(&header(), *position);
                    assert_eq!(read.is_err(), lost.contains(&seq));
                    assert!(read.is_err() || read.unwrap().1 == payload);
                }
                // Everything it said is known from elsewhere.
                if bit % 35 == 0 {
                    let (position, payload) = &log.payloads[lost[0] as usize - 1];
                    assert!(file.mend_entry(&header(), *position, &mut |_, _, _| None).unwrap());
                    assert_eq!(file.entry(&header(), *position).unwrap().1, payload);
                    assert!(scan(&file, header(), Seq(11), Seq(0)).unwrap().damaged.is_empty());
                }
            }
        }
    }
}

#[test]
fn a_body_of_which_nothing_is_left_ends_where_the_next_entry_begins() {
    for compression in BOTH {
        let mut log = Log::new(compression);
        for length in [4096; 5].into_iter().chain([200_000]).chain([4096; 5]) {
            log.write(length, false);
        }
        log.writer.write_waiting().unwrap();
        let end = log.writer.end();
        let at = |number: usize| log.payloads[number].0.offset().0 as usize;
        for (first, last) in [(0, 4), (5, 5)] {
            let file = log.changed(|bytes| bytes[at(last) + ENTRY_HEADER_LENGTH..at(last + 1)].fill(0xa5));
            let scanned = scan(&file, header(), Seq(11), Seq(0)).unwrap();
            let damaged: Vec<u64> = scanned.damaged.iter().map(|(seq, _)| seq.0).collect();
            assert_eq!((damaged, scanned.end), ((first as u64 + 1..=last as u64 + 1).collect(), end));
            assert_eq!(file.headers(header(), end).filter(Result::is_ok).count(), 11);
            let position = log.payloads[first].0;
            assert!(!file.mend_entry(&header(), position, &mut |_, _, _| None).unwrap());
        }
        // Behind the last one nothing tells where it ended, as behind a damaged header of an entry.
        let file = log.changed(|bytes| bytes[at(10) + ENTRY_HEADER_LENGTH..end.0 as usize].fill(0xa5));
        let error = scan(&file, header(), Seq(11), Seq(0)).unwrap_err();
        assert!(error.to_string().contains("entry 7 was durable"), "{error}");
        assert_eq!(scan(&file, header(), Seq(6), Seq(0)).unwrap().contents.stats().next_seq, Seq(7));
    }
}

#[test]
fn a_damaged_batch_is_mended_when_all_of_it_is_somewhere_else() {
    for compression in BOTH {
        let mut log = Log::new(compression);
        for length in [4096, 8192, 512, 200_000] {
            log.write(length, false);
        }
        log.writer.write_waiting().unwrap();
        let good = read_file(&log.storage, Path::new("1.seg"), ByteCount(1 << 20)).unwrap();
        let bodies = [log.payloads[3].0.offset().0 as usize, log.writer.end().0 as usize];
        for (number, end) in [(1, bodies[0]), (3, bodies[1])] {
            let file = log.changed(|bytes| bytes[end - 40] ^= 1);
            let (position, _) = log.payloads[number];
            assert!(file.entry(&header(), position).is_err(), "it is damaged");
            let mut asked = Vec::new();
            let mut find = |range: ByteRange, lsn: Lsn, is_wanted: &dyn Fn(&Bytes) -> bool| {
                asked.push(lsn);
                let from = (range.start().0 - (lsn.0 << 26)) as usize;
                let payload = &log.payloads[lsn.0 as usize - 1].1;
                Some(payload.slice(from..from + range.count().0 as usize)).filter(is_wanted)
            };
            assert!(file.mend_entry(&header(), position, &mut find).unwrap());
            let (_, payload) = file.entry(&header(), position).unwrap();
            assert_eq!(payload, log.payloads[number].1);
            let mut now = vec![0; good.len()];
            file.file().read_at(ByteOffset(0), &mut now).unwrap();
            assert!(now == good, "{asked:?}");
            // One that is gone everywhere leaves the batch as it is.
            let file = log.changed(|bytes| bytes[end - 40] ^= 1);
            assert!(!file.mend_entry(&header(), position, &mut |_, _, _| None).unwrap());
        }
    }
}

#[test]
fn a_batch_ends_before_an_entry_with_a_text() {
    let mut log = Log::new(Compression::Lz4);
    log.write(4096, false);
    let mark = Entry::Mark { lsn: Lsn(1), time: CaptureTime(1), label: "here".to_owned() };
    let position = log.writer.append(mark.clone(), Seq(0), &mut log.contents).unwrap();
    log.writer.write_waiting().unwrap();
    let (found, payload): (EntryHeader, Bytes) = log.file.entry(&header(), position).unwrap();
    assert_eq!(found.entry(payload).unwrap(), mark);
}
