//! Files of every version stay readable, and what is written stays as it is.
//!
//! `testdata/v1/tracking/` is made by this test when `BACKTIDE_WRITE_GOLDEN` is set; the files are
//! never made again once a version with them was released.

use std::path::{Path, PathBuf};

use backtide_storage::{MemoryStorage, Storage};
use backtide_tracking::{
    ActivityLimits, Captured, DirtyBitmap, ExtentRun, ImageSeen, Loaded, LogRecord, SavedTracking,
    SignOfLife, Snapshot, TrackingFile,
};
use backtide_units::{BlockCount, ByteCount, CaptureTime, DiskId, HistoryId, LogPosition, Lsn, Reason};
use uuid::Uuid;

const NAME: &str = "crashed.tracking";

fn golden() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../../testdata/v1/tracking").join(NAME)
}

fn saved(last_lsn: u64) -> SavedTracking {
    SavedTracking {
        history: Some(HistoryId(Uuid::from_bytes([2; 16]))),
        last_lsn: Lsn(last_lsn),
        gap_from: Lsn(200),
        acked_durable: Lsn(199),
        acked_position: LogPosition(777),
        reason: Some(Reason::ReceiverAway),
        dirty: DirtyBitmap::of((5..90).into()),
        zeroes: DirtyBitmap::of((100..109).into()),
        ..SavedTracking::unknown(DiskId(Uuid::from_bytes([1; 16])))
    }
}

/// A file with two snapshots, records of before and after the newer, and a sign of life.
fn write(storage: &MemoryStorage) -> (Snapshot, DirtyBitmap) {
    let limits = ActivityLimits { extent: BlockCount(16), hot: 2, sectors: 4, ..ActivityLimits::default() };
    let first = Snapshot::first(saved(300), false, false);
    let file = TrackingFile::create(storage, Path::new(NAME), limits, ByteCount(1 << 20), &first).unwrap();
    let record = |sequence, first, count| LogRecord { sequence, runs: vec![ExtentRun { first, count }] };
    file.write_record(&record(1, 0, 1)).unwrap();
    file.write_record(&record(2, 3, 2)).unwrap();
    let captured = Captured { generation: 2, log_from: 2, hot: vec![ExtentRun { first: 7, count: 1 }] };
    let newer = Snapshot::of(captured, false, saved(400));
    file.write_snapshot(&newer).unwrap();
    file.write_record(&record(3, 9, 1)).unwrap();
    let image = Some(ImageSeen { inode: 12, modified_ns: 1_699_999_999_000_000_000 });
    let at = CaptureTime(1_700_000_000_000_000);
    let captured = CaptureTime(at.0 - 250_000);
    let alive = SignOfLife { at, boot: Uuid::from_bytes([3; 16]), image, captured };
    file.sign(alive).unwrap();
    let mut hot = DirtyBitmap::of((112..128).into());
    hot.insert((48..80).into());
    hot.insert((144..160).into());
    (newer, hot)
}

#[test]
fn what_is_written_is_the_golden_file() {
    let storage = MemoryStorage::new();
    write(&storage);
    let (_, bytes) = storage.files().into_iter().find(|(path, _)| path == Path::new(NAME)).unwrap();
    if std::env::var_os("BACKTIDE_WRITE_GOLDEN").is_some() {
        std::fs::write(golden(), &bytes).unwrap();
    }
    assert!(std::fs::read(golden()).unwrap() == bytes, "{NAME} is written differently now");
}

#[test]
fn the_golden_file_says_what_was_written() {
    let storage = MemoryStorage::new();
    let (newer, hot) = write(&MemoryStorage::new());
    let file = storage.create_new(Path::new(NAME)).unwrap();
    file.write_at(backtide_units::ByteOffset::ZERO, &std::fs::read(golden()).unwrap()).unwrap();
    let loaded = Loaded::from_file(&storage, Path::new(NAME)).unwrap().unwrap();
    assert_eq!((loaded.snapshot, loaded.hot, loaded.clean), (newer, hot, false));
    let alive = loaded.alive.unwrap();
    assert_eq!(alive.at, CaptureTime(1_700_000_000_000_000));
    assert_eq!(alive.captured, CaptureTime(1_699_999_999_750_000));
}
