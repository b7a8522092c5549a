//! The bytes of version 1, as files: what this program writes is equal to them, and it reads them.
//!
//! `testdata/v1/segment/` is made by this test when `BACKTIDE_WRITE_GOLDEN` is set; the files are never
//! made again for a version that was released.

use std::{
    fs,
    path::{Path, PathBuf},
    sync::Arc,
};

use backtide_segment::{
    AttachFacts, AttachOrigin, Compression, Contents, Entry, Extent, PassContent, PassReason, Position,
    SealedSegment, SegmentFile, SegmentHeader, SegmentId, SegmentWriter, Seq, Step, Summary, WriterOptions,
    inspect, scan,
};
use backtide_storage::{MemoryStorage, Storage, read_file};
use backtide_units::{
    ByteCount, ByteOffset, ByteRange, CaptureTime, DiskId, DiskName, Epoch, HistoryId, Lsn, PayloadChecksum,
};
use bytes::Bytes;
use uuid::Uuid;

fn golden(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../../testdata/v1/segment").join(name)
}

fn range(start: u64, count: u64) -> ByteRange {
    ByteRange::new(ByteOffset(start), ByteCount(count)).expect("a range")
}

/// One entry of each kind, and two that cross a bucket's boundary.
fn entries() -> Vec<Entry> {
    let payload = |byte: u8, length: usize| {
        let payload = Bytes::from(vec![byte; length]);
        (PayloadChecksum::of(&payload), payload)
    };
    let time = |n: u64| CaptureTime(1_700_000_000_000_000 + n);
    let (write_crc, write) = payload(0xa1, 513);
    let (pass_crc, pass) = payload(0xb2, 100);
    let name: DiskName = "golden".parse().expect("a name");
    let origin = AttachOrigin {
        receiver: "tcp://keeper:7400".to_owned(),
        disk: DiskId(Uuid::from_u128(0x89ab)),
        name: "template".parse().expect("a name"),
        lsn: Lsn(7),
        time: time(0),
    };
    vec![
        Entry::Attach {
            epoch: Epoch(3),
            attach: Uuid::from_u128(0x0011_2233_4455_6677_8899_aabb_ccdd_eeff),
            next_lsn: Lsn(10),
            size: ByteCount(1 << 30),
            name,
            time: time(0),
            facts: AttachFacts { before: Seq(39), ack: 3, origin: Some(Box::new(origin)) },
        },
        Entry::PassBegin {
            at: Lsn(10),
            gap_from: Lsn(0),
            time: time(1),
            reason: PassReason { code: 7, text: "first protection".to_owned() },
        },
        Entry::PassData {
            at: Lsn(10),
            range: range(0, 100),
            content: PassContent::Bytes { payload: pass, checksum: pass_crc },
        },
        Entry::Write {
            lsn: Lsn(11),
            time: time(2),
            range: range(65_500, 513),
            payload: write,
            checksum: write_crc,
        },
        Entry::PassData { at: Lsn(10), range: range(4096, 200_000), content: PassContent::Zeroes },
        Entry::PassEnd { at: Lsn(10), valid_from: Some(Lsn(10)), time: time(3) },
        Entry::Zero { lsn: Lsn(12), time: time(4), range: range(8 << 20, 5 << 20), trim: true },
        Entry::Zero { lsn: Lsn(13), time: time(5), range: range(512, 512), trim: false },
        Entry::Flush { lsn: Lsn(13), time: time(6) },
        Entry::Mark { lsn: Lsn(13), time: time(7), label: "vor dem Größeren".to_owned() },
        Entry::PassEnd { at: Lsn(99), valid_from: None, time: time(8) },
        Entry::Unchanged { lsn: Lsn(13), time: time(9) },
    ]
}

/// A payload of three pieces, and a short one behind it.
fn long_entries() -> Vec<Entry> {
    let write = |lsn: u64, length: usize| {
        let payload: Vec<u8> = (0..length).map(|at| (at / 4096) as u8 + 1).collect();
        let checksum = PayloadChecksum::of(&payload);
        let (time, range) = (CaptureTime(1_700_000_000_000_000 + lsn), range(lsn * 4096, length as u64));
        Entry::Write { lsn: Lsn(lsn), time, range, payload: payload.into(), checksum }
    };
    vec![write(1, 2 * 65_536 + 1001), write(2, 65_536)]
}

/// Two batches of short payloads with entries without any between them, bytes that do not compress, and a long payload.
fn batched_entries() -> Vec<Entry> {
    let mut noise = 1_u64;
    let mut write = |lsn: u64, length: usize, noisy: bool| {
        let mut next = || {
            noise = noise.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
            (noise >> 56) as u8
        };
        let payload: Vec<u8> =
            (0..length).map(|at| if noisy || at % 4096 < 64 { next() } else { (at / 512) as u8 }).collect();
        let checksum = PayloadChecksum::of(&payload);
        let (time, range) = (CaptureTime(1_700_000_000_000_000 + lsn), range(lsn * 4096, length as u64));
        Entry::Write { lsn: Lsn(lsn), time, range, payload: payload.into(), checksum }
    };
    let mut entries = vec![write(1, 4096, false), write(2, 513, false)];
    entries.push(Entry::Flush { lsn: Lsn(2), time: CaptureTime(1_700_000_000_000_003) });
    entries.extend((3..20).map(|lsn| write(lsn, 8192, false)));
    entries.push(Entry::Mark {
        lsn: Lsn(19),
        time: CaptureTime(1_700_000_000_000_020),
        label: "between batches".to_owned(),
    });
    entries.push(write(20, 2 * 65_536 + 1001, false));
    entries.push(write(21, 4096, true));
    entries
}

/// A file as this program writes it.
fn written(entries: Vec<Entry>, sealed: bool) -> Vec<u8> {
    written_with(entries, sealed, Compression::None)
}

fn written_with(entries: Vec<Entry>, sealed: bool, compression: Compression) -> Vec<u8> {
    let storage = MemoryStorage::new();
    let path = Path::new("golden.seg");
    let file = SegmentFile::new(storage.create_new(path).expect("create"), path.to_owned());
    let header = SegmentHeader {
        disk: DiskId(Uuid::from_u128(0x0123_4567_89ab_cdef_0123_4567_89ab_cdef)),
        history: HistoryId(Uuid::from_u128(0xfedc_ba98_7654_3210_fedc_ba98_7654_3210)),
        id: SegmentId(2),
        first_seq: Seq(40),
        synced: Seq(38),
    };
    let options =
        WriterOptions { buffer_bytes_max: ByteCount(4096), allocation_step: ByteCount(4096), compression };
    let mut writer = SegmentWriter::create(file, header, options, ByteCount::ZERO).expect("create");
    let mut contents = Contents::new(header.first_seq, header.synced);
    for entry in entries {
        writer.append(entry, Seq(39), &mut contents).expect("append");
    }
    if sealed {
        writer.seal(&contents).expect("seal");
    } else {
        writer.write_waiting().expect("write");
    }
    let mut bytes = read_file(&storage, path, ByteCount(1 << 20)).expect("read");
    if !sealed {
        // Reserved space of the last entry's kind, but not all of it.
        bytes.truncate(writer.end().0 as usize + 128);
    }
    bytes
}

fn loaded(name: &str) -> (MemoryStorage, SegmentFile) {
    let storage = MemoryStorage::new();
    let file = storage.create_new(Path::new(name)).expect("create");
    file.write_at(ByteOffset(0), &fs::read(golden(name)).expect("a golden file")).expect("write");
    (storage, SegmentFile::new(Arc::clone(&file), name.into()))
}

fn read_back(file: &SegmentFile, header: SegmentHeader, end: ByteOffset) -> Vec<Entry> {
    let headers = file.headers(header, end);
    let read = headers.map(|item| {
        let (_, position) = item.expect("a good header");
        let (header, payload) = file.entry(&header, position).expect("a good entry");
        header.entry(payload).expect("a good payload")
    });
    read.collect()
}

#[test]
fn what_is_written_is_equal_to_the_golden_files() {
    let files = [
        ("sealed.seg", entries(), true),
        ("open.seg", entries(), false),
        ("pieces.seg", long_entries(), true),
    ];
    for (name, entries, sealed) in files {
        let bytes = written(entries, sealed);
        if std::env::var_os("BACKTIDE_WRITE_GOLDEN").is_some() {
            fs::create_dir_all(golden("")).expect("create dir");
            fs::write(golden(name), &bytes).expect("write");
        }
        assert!(fs::read(golden(name)).expect("a golden file") == bytes, "{name} differs");
    }
}

/// The methods are others' work, and a newer one of theirs may give other bytes for the same: what counts is
/// that what was written stays readable.
#[test]
fn golden_batches_read_back() {
    for (name, compression) in [("lz4.seg", Compression::Lz4), ("zstd.seg", Compression::Zstd)] {
        let now = written_with(batched_entries(), true, compression);
        if std::env::var_os("BACKTIDE_WRITE_GOLDEN").is_some() {
            fs::write(golden(name), &now).expect("write");
        }
        let (_, file) = loaded(name);
        let header = file.header().expect("a header");
        let sealed = SealedSegment::open(&file, header).expect("no error").expect("sealed");
        assert_eq!(read_back(&file, header, sealed.entries_end()), batched_entries());
        let scanned = scan(&file, header, Seq(0), Seq(0)).expect("no damage");
        assert_eq!((scanned.end, scanned.damaged.len()), (sealed.entries_end(), 0));
        assert_eq!(scanned.contents.stats(), sealed.stats());
        let plain = written(batched_entries(), true).len();
        assert!(fs::metadata(golden(name)).expect("a file").len() < plain as u64 / 3, "{name} is compressed");
    }
}

#[test]
fn inspect_tells_of_batches() {
    let (storage, _) = loaded("zstd.seg");
    let mut out = Vec::new();
    assert!(inspect(&storage, Path::new("zstd.seg"), &mut out).expect("a listing"), "it is whole");
    let text = String::from_utf8(out).expect("text");
    assert!(text.contains(" bytes in ") && text.contains(" by zstd\n"), "{text}");
    assert!(text.contains("between batches"), "{text}");
}

#[test]
fn the_golden_files_read_back() {
    let (_, open) = loaded("open.seg");
    let header = open.header().expect("a header");
    assert!(SealedSegment::open(&open, header).expect("no error").is_none());
    let scanned = scan(&open, header, Seq(0), Seq(0)).expect("no damage");
    assert_eq!((scanned.synced, scanned.trailing, scanned.damaged.len()), (Seq(39), ByteCount(0), 0));
    assert_eq!(read_back(&open, header, scanned.end), entries());

    let (_, file) = loaded("sealed.seg");
    let header = file.header().expect("a header");
    let sealed = SealedSegment::open(&file, header).expect("no error").expect("sealed");
    let Summary { steps, buckets } = sealed.summary(&file).expect("a summary");
    assert_eq!(read_back(&file, header, sealed.entries_end()), entries());
    assert_eq!(sealed.stats(), scanned.contents.stats());
    assert_eq!(steps, scanned.contents.steps());
    let controls = steps.iter().filter(|step| matches!(step, Step::Control(_))).count();
    assert_eq!(controls, 5);
    sealed.verify(&file).expect("every part is whole");
    let guide = sealed.guide(&file).expect("a guide");
    let block = sealed.block(&file, &guide, 0).expect("a block");
    let found: Vec<_> = (0..block.len()).map(|place| block.get(place).1).collect();
    assert_eq!(found, scanned.contents.index().extents().collect::<Vec<_>>());
    assert_eq!(buckets, scanned.contents.index().buckets());
    assert_eq!(guide.stretches(), scanned.contents.stretches());
}

#[test]
fn inspect_lists_every_entry() {
    for name in ["open.seg", "sealed.seg"] {
        let (storage, _) = loaded(name);
        let mut out = Vec::new();
        assert!(inspect(&storage, Path::new(name), &mut out).expect("a listing"), "it is whole");
        let text = String::from_utf8(out).expect("text");
        for seq in 40..51 {
            assert!(text.contains(&format!(" #{seq} ")), "{text}");
        }
        assert!(text.contains("vor dem Größeren") && text.contains("first protection"), "{text}");
        assert!(!text.contains("DAMAGED"), "{text}");
    }
}

#[test]
fn inspect_tells_whether_a_payload_is_damaged() {
    for name in ["sealed.seg", "pieces.seg"] {
        let (storage, file) = loaded(name);
        let header = file.header().expect("a header");
        let (payload, position) = file
            .headers(header, ByteOffset(u64::MAX))
            .map_while(Result::ok)
            .find(|(header, _)| header.kind.is_data() && header.payload_length > 0)
            .expect("an entry with a payload");
        let middle = position.offset().0 + payload.stored_length() / 2;
        storage.flip_bit(Path::new(name), ByteOffset(middle), 1);
        let mut out = Vec::new();
        let whole = inspect(&storage, Path::new(name), &mut out).expect("a listing");
        assert!(!whole, "{name}: {}", String::from_utf8_lossy(&out));
    }
}

#[test]
fn inspect_tells_of_pieces() {
    let (storage, _) = loaded("pieces.seg");
    let mut out = Vec::new();
    inspect(&storage, Path::new("pieces.seg"), &mut out).expect("a listing");
    let text = String::from_utf8(out).expect("text");
    assert!(text.contains("payload 132073 in 3 pieces\n") && text.contains("payload 65536\n"), "{text}");
}

#[test]
fn every_flipped_bit_of_a_sealed_file_is_noticed() {
    // Padding behind payloads is in no checksum, and holds nothing.
    assert_eq!(unnoticed("sealed.seg", 1), 4 + 4 + 7 + 6);
}

#[test]
fn flipped_bits_of_batches_are_noticed() {
    for name in ["lz4.seg", "zstd.seg"] {
        let padding = unnoticed(name, 7);
        assert!(padding < 8, "{name}: {padding}");
    }
}

/// How many of the flips of a bit in every so many bytes of a golden file nobody notices.
fn unnoticed(name: &str, step: usize) -> u64 {
    let (_, file) = loaded(name);
    let header = file.header().expect("a header");
    let sealed = SealedSegment::open(&file, header).expect("no error").expect("sealed");
    let entries_end = sealed.entries_end();
    let good = fs::read(golden(name)).expect("a golden file");
    let mut unnoticed = 0;
    for byte in (0..good.len()).step_by(step) {
        let storage = MemoryStorage::new();
        let mut bytes = good.clone();
        bytes[byte] ^= 1 << (byte % 8);
        let copy = storage.create_new(Path::new("x")).expect("create");
        copy.write_at(ByteOffset(0), &bytes).expect("write");
        let file = SegmentFile::new(copy, "x".into());
        let Ok(header) = file.header() else { continue };
        let opened = SealedSegment::open(&file, header).expect("no error but an unknown version");
        let Some(sealed) = opened else { continue };
        if sealed.verify(&file).is_err() {
            continue;
        }
        let whole = scan(&file, header, Seq(0), Seq(0)).is_ok_and(|scanned| {
            scanned.end == entries_end
                && scanned.contents.stats() == sealed.stats()
                && scanned.damaged.is_empty()
        });
        unnoticed += u64::from(whole);
    }
    unnoticed
}

/// The long entry of `pieces.seg` as an index knows it.
fn long_extent() -> Extent {
    let position = Position(128);
    Extent { range: range(4096, 65_536), version: Lsn(1), seq: Seq(40), position, zero: false }
}

#[test]
fn a_piece_is_read_without_the_others() {
    let (_, file) = loaded("pieces.seg");
    let header = file.header().expect("a header");
    let sealed = SealedSegment::open(&file, header).expect("no error").expect("sealed");
    assert_eq!(read_back(&file, header, sealed.entries_end()), long_entries());
    let parts = file.parts(&header, &long_extent(), &|_| None).expect("a sound entry");
    assert_eq!(parts.count(), 3);
    assert_eq!(parts.piece(1), range(4096 + 65_536, 65_536));
    assert_eq!(parts.pieces_of(range(4096 + 65_536, 65_537)), 1..3);
    let payload = file.payload(&parts, 1..2).expect("a sound piece");
    assert_eq!(payload.len(), 65_536);
    assert_eq!((payload[0], payload[65_535]), (17, 32));
}

#[test]
fn damage_of_a_piece_is_found_there_and_nowhere_else() {
    let good = fs::read(golden("pieces.seg")).expect("a golden file");
    let table = 128 + 64;
    let payload = table + 16;
    // Each byte of the table, and a sample of each piece.
    let samples = (0..3).flat_map(|piece| [0, 1, 999].map(|at| payload + piece * 65_536 + at));
    for byte in (table..table + 12).chain(samples) {
        let storage = MemoryStorage::new();
        let mut bytes = good.clone();
        bytes[byte] ^= 1 << (byte % 8);
        let copy = storage.create_new(Path::new("x")).expect("create");
        copy.write_at(ByteOffset(0), &bytes).expect("write");
        let file = SegmentFile::new(copy, "x".into());
        let header = file.header().expect("a header");
        assert!(file.entry(&header, Position(128)).is_err(), "byte {byte}");
        let scanned = scan(&file, header, Seq(41), Seq(0)).expect("acknowledged and not lost");
        assert_eq!(scanned.damaged, [(Seq(40), Position(128))], "byte {byte}");
        match file.parts(&header, &long_extent(), &|_| None) {
            Err(error) => assert!(byte < payload, "byte {byte}: {error}"),
            Ok(parts) => {
                let sound: Vec<_> =
                    (0..3).filter(|&piece| file.payload(&parts, piece..piece + 1).is_ok()).collect();
                let damaged = (byte - payload) / 65_536;
                assert_eq!(sound, [0, 1, 2].into_iter().filter(|&n| n != damaged).collect::<Vec<_>>());
            }
        }
    }
}
