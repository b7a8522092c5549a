//! Files of every version stay readable, and what is written stays as it is.
//!
//! `testdata/v1/hydration/` is made by this test when `BACKTIDE_WRITE_GOLDEN` is set; the files are never
//! made again once a version with them was released.

use std::{
    path::{Path, PathBuf},
    sync::Arc,
};

use backtide_hydration::{Header, HydrationFile, Kind, SourcePoint};
use backtide_storage::{MemoryStorage, Storage};
use backtide_tracking::DirtyBitmap;
use backtide_units::{BlockCount, ByteCount, ByteOffset, CaptureTime, DiskId, Epoch, HistoryId, Lsn};
use uuid::Uuid;

const NAME: &str = "vm1.hydration";

/// Where a file's own id lies, which is random.
const ID: std::ops::Range<usize> = 24..40;

fn golden() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../../testdata/v1/hydration").join(NAME)
}

fn id(byte: u8) -> Uuid {
    Uuid::from_bytes([byte; 16])
}

fn header() -> Header {
    Header {
        disk: DiskId(id(1)),
        kind: Kind::Rewind,
        boot: id(2),
        epoch: Epoch(3),
        inode: 4,
        before: Lsn(50),
        total: BlockCount(100),
        compare: false,
        source: SourcePoint {
            receiver: "unix:/run/receiver.sock".to_owned(),
            disk: DiskId(id(1)),
            name: "vm1".parse().unwrap(),
            history: HistoryId(id(5)),
            lsn: Lsn(40),
            time: CaptureTime(1_700_000_000_000_000),
            size: ByteCount(1 << 20),
        },
    }
}

/// Some blocks became present before a flush, some after it.
fn write(storage: &MemoryStorage) {
    let missing = DirtyBitmap::of((10..110).into());
    let storage = Arc::new(storage.clone());
    let file = HydrationFile::create(storage, Path::new(NAME), header(), missing).unwrap();
    file.present(&[(10..20).into(), (30..31).into()]).unwrap();
    file.settle(|| Ok(())).unwrap();
    file.present(&[(100..110).into()]).unwrap();
}

fn open(content: &[u8], boot: Uuid) -> (MemoryStorage, HydrationFile) {
    let storage = MemoryStorage::new();
    let file = storage.create_new(Path::new(NAME)).unwrap();
    file.write_at(ByteOffset::ZERO, content).unwrap();
    let opened = HydrationFile::open(Arc::new(storage.clone()), Path::new(NAME), boot).unwrap();
    (storage, opened.expect("there is a file"))
}

#[test]
fn what_is_written_is_the_golden_file() {
    let storage = MemoryStorage::new();
    write(&storage);
    let (path, bytes) = storage.files().remove(0);
    assert_eq!(path, Path::new(NAME));
    if std::env::var_os("BACKTIDE_WRITE_GOLDEN").is_some() {
        std::fs::write(golden(), &bytes).unwrap();
    }
    let golden = std::fs::read(golden()).unwrap();
    assert_eq!(golden.len(), bytes.len());
    // Checksums follow from the id.
    assert!(golden[..ID.start] == bytes[..ID.start], "{NAME} is written differently now");
    let end = 184 + 23 + 3;
    assert!(golden[ID.end..end] == bytes[ID.end..end], "{NAME} is written differently now");
}

#[test]
fn the_golden_file_says_what_was_written() {
    let golden = std::fs::read(golden()).unwrap();
    let (_, file) = open(&golden, id(2));
    assert_eq!(*file.header(), header());
    let mut missing = DirtyBitmap::of((20..100).into());
    missing.remove((30..31).into());
    assert_eq!(file.missing(), missing, "everything counts in the same boot");
    assert!(!file.is_settled());
    let (storage, file) = open(&golden, id(9));
    missing.insert((100..110).into());
    assert_eq!(file.missing(), missing, "and what is durable in another");
    assert!(file.is_settled());
    assert_eq!(file.header().boot, id(9));
    let again = HydrationFile::open(Arc::new(storage), Path::new(NAME), id(9)).unwrap().unwrap();
    assert_eq!(again.missing(), missing);
}

#[test]
fn every_flipped_bit_is_refused() {
    let golden = std::fs::read(golden()).unwrap();
    for bit in 0..golden.len() * 8 {
        let mut damaged = golden.clone();
        damaged[bit / 8] ^= 1 << (bit % 8);
        let storage = MemoryStorage::new();
        let file = storage.create_new(Path::new(NAME)).unwrap();
        file.write_at(ByteOffset::ZERO, &damaged).unwrap();
        let opened = HydrationFile::open(Arc::new(storage), Path::new(NAME), id(2));
        // The space between the header and the journal holds nothing.
        let header = u64::from_le_bytes(golden[16..24].try_into().unwrap()) as usize;
        let padding = header..header.next_multiple_of(512);
        assert_eq!(opened.is_ok(), padding.contains(&(bit / 8)), "bit {bit}");
    }
}

#[test]
fn a_long_journal_is_begun_anew_at_a_flush() {
    let storage = MemoryStorage::new();
    let blocks = 40_000;
    let missing = DirtyBitmap::of((0..2 * blocks).into());
    let shared = Arc::new(storage.clone());
    let mut header = header();
    header.source.size = ByteCount(2 * blocks * 4096);
    let file = HydrationFile::create(shared.clone(), Path::new(NAME), header, missing).unwrap();
    for block in 0..blocks {
        file.present(&[(2 * block..2 * block + 1).into()]).unwrap();
    }
    assert!(storage.used() > HydrationFile::room_at_most(), "there is a place for what is noted next");
    file.settle(|| file.present(&[(1..2).into()])).unwrap();
    let room = HydrationFile::room_for(BlockCount(blocks));
    assert!(storage.used().0 < room.0 + 20_000, "the entries are in the bitmap now");
    let left = file.missing();
    assert_eq!(left.count(), BlockCount(blocks - 1));
    for (boot, count) in [(id(2), blocks - 1), (id(9), blocks)] {
        let again = HydrationFile::open(shared.clone(), Path::new(NAME), boot).unwrap().unwrap();
        assert_eq!(again.missing().count(), BlockCount(count), "block 1 was not synced");
    }
}
