//! What is written comes back; what is damaged is never trusted.

use backtide_storage::MemoryStorage;

use super::*;
use crate::{activity::Captured, saved::tests::saved};

const SIZE: ByteCount = ByteCount(1 << 20);
const PATH: &str = "vm1.tracking";

fn limits() -> ActivityLimits {
    ActivityLimits { extent: BlockCount(4), hot: 4, sectors: 4, ..ActivityLimits::default() }
}

fn create(storage: &MemoryStorage, clean: bool, everything: bool) -> TrackingFile {
    let snapshot = Snapshot::first(saved(), clean, everything);
    TrackingFile::create(storage, Path::new(PATH), limits(), SIZE, &snapshot).unwrap()
}

fn load(storage: &MemoryStorage) -> Result<Loaded, LoadError> {
    Loaded::from_file(storage, Path::new(PATH)).map(|loaded| loaded.expect("there is a file"))
}

fn record(sequence: u64, first: u32) -> LogRecord {
    LogRecord { sequence, runs: vec![ExtentRun { first, count: 2 }] }
}

fn captured(generation: u64, log_from: u64, hot: u32) -> Snapshot {
    let captured = Captured { generation, log_from, hot: vec![ExtentRun { first: hot, count: 1 }] };
    Snapshot::of(captured, false, saved())
}

fn flip(storage: &MemoryStorage, at: u64) {
    let file = storage.open(Path::new(PATH)).unwrap();
    let mut byte = [0];
    file.read_exact_at(ByteOffset(at), &mut byte).unwrap();
    byte[0] ^= 1;
    file.write_at(ByteOffset(at), &byte).unwrap();
}

#[test]
fn hot_is_what_snapshot_and_later_records_say() {
    let storage = MemoryStorage::new();
    let file = create(&storage, false, false);
    for sequence in 1..=3 {
        file.write_record(&record(sequence, sequence as u32 * 10)).unwrap();
    }
    file.write_snapshot(&captured(2, 3, 7)).unwrap();
    let loaded = load(&storage).unwrap();
    let mut expected = DirtyBitmap::of((28..32).into());
    expected.insert((120..128).into());
    assert_eq!(loaded.hot, expected);
    assert_eq!(loaded.snapshot, captured(2, 3, 7));
    assert!(!loaded.clean);
}

#[test]
fn a_file_is_clean_until_something_is_logged() {
    let storage = MemoryStorage::new();
    let file = create(&storage, true, false);
    assert!(load(&storage).unwrap().clean);
    file.write_record(&record(1, 1)).unwrap();
    assert!(!load(&storage).unwrap().clean);
}

#[test]
fn a_torn_snapshot_leaves_the_older_one_and_its_log() {
    let storage = MemoryStorage::new();
    let file = create(&storage, false, false);
    file.write_record(&record(1, 10)).unwrap();
    file.write_snapshot(&captured(2, 2, 7)).unwrap();
    flip(&storage, file.layout.slot_at(2) + 40);
    let loaded = load(&storage).unwrap();
    assert_eq!(loaded.snapshot.generation, 1);
    assert_eq!(loaded.hot, DirtyBitmap::of((40..48).into()));
}

#[test]
fn an_older_snapshot_whose_log_was_overwritten_is_damage() {
    let storage = MemoryStorage::new();
    let file = create(&storage, false, false);
    for sequence in 1..=3 {
        file.write_record(&record(sequence, 1)).unwrap();
    }
    file.write_snapshot(&captured(2, 4, 7)).unwrap();
    for sequence in 4..=6 {
        file.write_record(&record(sequence, 1)).unwrap();
    }
    assert_eq!(load(&storage).unwrap().snapshot.generation, 2);
    flip(&storage, file.layout.slot_at(2) + 40);
    let error = load(&storage).unwrap_err();
    assert!(error.to_string().contains("record 1 of the activity log is missing"), "{error}");
}

#[test]
fn everything_stays_everything_when_one_copy_is_damaged() {
    for generation in [1, 2] {
        let storage = MemoryStorage::new();
        let file = create(&storage, false, true);
        flip(&storage, file.layout.slot_at(generation) + 40);
        assert!(load(&storage).unwrap().snapshot.everything);
    }
}

#[test]
fn no_flipped_byte_is_believed() {
    let storage = MemoryStorage::new();
    let file = create(&storage, false, false);
    for sequence in 1..=2 {
        file.write_record(&record(sequence, sequence as u32 * 10)).unwrap();
    }
    let good = load(&storage).unwrap();
    let slot = file.layout.slot_at(1);
    let snapshot = slot..slot + good.snapshot.encode().len() as u64;
    let header = 0..HEADER_BYTES as u64;
    for at in header.chain(LOG_AT..LOG_AT + 2 * SECTOR).chain(snapshot) {
        flip(&storage, at);
        let error = load(&storage).expect_err("damage is noticed");
        assert!(matches!(error, LoadError::Damaged { .. }), "byte {at}: {error}");
        flip(&storage, at);
    }
    assert_eq!(load(&storage).unwrap(), good);
}

#[test]
fn a_file_cut_anywhere_is_no_guess() {
    let storage = MemoryStorage::new();
    let file = create(&storage, false, false);
    file.write_record(&record(1, 10)).unwrap();
    let handle = storage.open(Path::new(PATH)).unwrap();
    let len = handle.len().unwrap().0;
    let snapshot_end = file.layout.slot_at(1) + load(&storage).unwrap().snapshot.encode().len() as u64;
    for cut in [0, 10, SECTOR, LOG_AT + 5, file.layout.slot_at(0), snapshot_end - 1] {
        assert!(cut < len);
        handle.set_len(ByteCount(cut)).unwrap();
        assert!(load(&storage).is_err(), "cut to {cut}");
    }
}

#[test]
fn a_sign_of_life_comes_back_and_a_damaged_one_is_none() {
    let storage = MemoryStorage::new();
    let file = create(&storage, false, false);
    assert_eq!(load(&storage).unwrap().alive, None);
    let alive = SignOfLife {
        at: CaptureTime(1234),
        boot: Uuid::from_bytes([9; 16]),
        image: Some(ImageSeen { inode: 5, modified_ns: 6 }),
        captured: CaptureTime(1230),
    };
    file.sign(alive).unwrap();
    assert_eq!(load(&storage).unwrap().alive, Some(alive));
    flip(&storage, LIFE_AT + 3);
    assert_eq!(load(&storage).unwrap().alive, None);
}

#[test]
fn a_crash_while_a_new_file_takes_the_place_leaves_one_of_them() {
    for changes in 0..20 {
        let storage = MemoryStorage::new();
        create(&storage, true, false);
        storage.sync_dir(Path::new("")).unwrap();
        storage.cut_power_after(changes);
        let second = Snapshot::first(saved(), false, true);
        let result = TrackingFile::create(&storage, Path::new(PATH), limits(), SIZE, &second);
        storage.crash(changes);
        let loaded = load(&storage).expect("the old or the new");
        assert!(loaded.clean || loaded.snapshot.everything);
        if result.is_ok() {
            assert!(loaded.snapshot.everything, "it was durable");
        }
    }
}

#[test]
fn what_cannot_be_created_leaves_nothing_beside_and_the_old_file_in_place() {
    for writes in 0..3 {
        let storage = MemoryStorage::new();
        create(&storage, true, false);
        storage.fail_write_after(writes);
        let snapshot = Snapshot::first(saved(), false, true);
        let created = TrackingFile::create(&storage, Path::new(PATH), limits(), SIZE, &snapshot);
        assert!(created.is_err(), "{writes}");
        assert_eq!(storage.list(Path::new("")).unwrap(), [PATH], "{writes}");
        assert!(load(&storage).unwrap().clean, "{writes}");
    }
}

#[test]
fn sectors_are_filled_ahead_once_and_never_over_a_record() {
    let made = [(1, 1, 0), (2, 1, 0), (64, 1, 0), (100, 7, 0), (1000, 1, 0), (1000, 999, 0)];
    let with_room = [(1, 1, 1), (2, 1, 2), (64, 1, 64), (100, 1, 64), (1000, 1, 64)];
    for (sectors, first, room) in made.into_iter().chain(with_room) {
        let mut filled = Filled::up_to(room);
        let mut places: Vec<Option<u64>> = vec![None; sectors as usize];
        places[..room as usize].fill(Some(0));
        let place = |sequence: u64| ((sequence - 1) % u64::from(sectors)) as usize;
        for sequence in first..first + 3 * u64::from(sectors) {
            let ahead = filled.with(sequence, sectors);
            assert!(ahead.end - ahead.start <= FILL_SECTORS);
            for filled in ahead {
                let there = places[place(filled)].replace(0);
                assert_eq!(there, None, "record {sequence} of {sectors} from {first} fills {filled}");
            }
            places[place(sequence)] = Some(sequence);
        }
    }
}

#[test]
fn a_file_with_room_has_its_first_records_in_it() {
    let storage = MemoryStorage::new();
    let writes_of = |file: &TrackingFile, sequence| {
        let before = storage.counts().writes;
        file.write_record(&record(sequence, 3)).unwrap();
        storage.counts().writes - before
    };
    assert_eq!(writes_of(&create(&storage, false, false), 1), 2, "one makes room for the next");
    let limits = ActivityLimits { sectors: 200, ..limits() };
    let snapshot = Snapshot::first(saved(), false, true);
    let file = TrackingFile::create_with_room(&storage, Path::new(PATH), limits, SIZE, &snapshot).unwrap();
    assert!(load(&storage).unwrap().snapshot.everything);
    let writes: Vec<u64> = (1..=65).map(|sequence| writes_of(&file, sequence)).collect();
    assert_eq!((&writes[..64], writes[64]), ([1; 64].as_slice(), 2));
}
