//! Policies: durable, and a file that cannot be understood lets nothing go.

use backtide_storage::{MemoryStorage, read_file, replace_file};
use backtide_units::ByteOffset;
use uuid::Uuid;

use super::*;
use crate::golden::{at, check};

#[test]
fn policies_are_durable_and_a_damaged_file_lets_nothing_go() {
    let storage = MemoryStorage::new();
    let (a, b) = (DiskId::random(), DiskId::random());
    let open = || Policies::open(Arc::new(storage.clone()), "any=9d".parse().unwrap());
    let policies = open();
    assert_eq!(policies.ladder(a).to_string(), "any=9d");
    policies.change(a, |policy| policy.ladder = Some("any=1h daily=7d".parse().unwrap())).unwrap();
    policies.change(b, |policy| policy.pins.extend([(Lsn(7), CaptureTime(8))])).unwrap();
    let held = Pin { lsn: Lsn(9), time: CaptureTime(9) };
    policies.change(b, |policy| policy.holds.extend([("rewind of b".to_owned(), held)])).unwrap();
    storage.crash(1);
    let policies = open();
    assert_eq!(policies.ladder(a).to_string(), "any=1h daily=1w");
    assert_eq!(policies.of(b).holds["rewind of b"], held);
    let staying: Vec<Lsn> = policies.of(b).staying(policies.moment()).into_keys().collect();
    assert_eq!(staying, [Lsn(7), Lsn(9)]);
    assert!(
        policies
            .change(b, |policy| policy.pins = (0..9999).map(|n| (Lsn(n), CaptureTime(n))).collect())
            .is_err()
    );
    assert_eq!(policies.of(b).pins.len(), 1);
    let length = storage.open(Path::new(FILE)).unwrap().len().unwrap().0;
    for byte in 0..length {
        storage.flip_bit(Path::new(FILE), ByteOffset(byte), 1);
        let found = open();
        assert!(found.damage().is_some(), "byte {byte}");
        assert_eq!(found.ladder(a), Ladder::default());
        let refused = found.change(a, |policy| policy.ladder = None).unwrap_err().to_string();
        assert!(refused.contains(FILE) && refused.contains("--forget-retention"), "{refused}");
        storage.flip_bit(Path::new(FILE), ByteOffset(byte), 1);
    }
    policies.change(a, |policy| policy.ladder = None).unwrap();
    assert_eq!(open().ladder(a).to_string(), "any=9d");
    SealedJson { version: 2, ..KIND }.write(&storage, Path::new(FILE), &["sites"]).unwrap();
    let newer = storage.files();
    let found = open();
    assert!(found.damage().unwrap().contains("has version 2"), "{:?}", found.damage());
    assert!(found.change(a, |policy| policy.ladder = None).is_err());
    assert!(storage.files() == newer, "it stays as it is");
}

#[test]
fn no_file_is_written_that_is_too_large_to_be_read_again() {
    let storage = MemoryStorage::new();
    let open = || Policies::open(Arc::new(storage.clone()), Ladder::default());
    let (policies, disk) = (open(), DiskId::random());
    let held = Pin { lsn: Lsn(9), time: CaptureTime(9) };
    policies.change(disk, |policy| policy.holds.extend([("a".to_owned(), held)])).unwrap();
    let long = "b".repeat(64 << 20);
    let refused =
        policies.change(disk, |policy| policy.holds.extend([(long, held)])).unwrap_err().to_string();
    assert!(refused.contains(FILE) && refused.contains("larger than"), "{refused}");
    assert_eq!(policies.of(disk).holds.len(), 1);
    assert_eq!(open().of(disk), policies.of(disk));
}

/// A store whose clocks the test sets: the machine's, and the seconds since the receiver has started.
fn clocked(storage: &MemoryStorage, wall: u64, running: u64) -> Policies {
    let second = 1_000_000;
    let clock =
        LockClock::of(move || CaptureTime(wall * second), move || std::time::Duration::from_secs(running));
    Policies::open_with(Arc::new(storage.clone()), "any=9d".parse().unwrap(), clock)
}

#[test]
fn a_lock_lasts_while_no_receiver_runs_and_is_not_fooled_by_the_clock() {
    let (storage, disk) = (MemoryStorage::new(), DiskId::random());
    let policies = clocked(&storage, 1000, 0);
    let lock = Lock::new(CaptureTime(1_600_000_000), policies.moment()).unwrap();
    policies.add_lock(disk, Some((Lsn(7), CaptureTime(5))), lock).unwrap();
    let stays = |policies: &Policies| policies.of(disk).staying(policies.moment()).contains_key(&Lsn(7));
    storage.crash(1);
    // A receiver that runs for 500 of the 600 seconds.
    let policies = clocked(&storage, 1500, 500);
    assert!(stays(&policies));
    assert_eq!(policies.note_time().unwrap(), None);
    storage.crash(2);
    for wall in [1400, 1600, 999_999] {
        assert!(stays(&clocked(&storage, wall, 99)), "the machine says {wall}");
        assert!(!stays(&clocked(&storage, wall, 100)) || wall < 1600, "the machine says {wall}");
    }
    // What has ended is forgotten at the next change.
    let policies = clocked(&storage, 1600, 100);
    policies.change(disk, |_| {}).unwrap();
    assert_eq!(policies.of(disk), Policy::default());
}

#[test]
fn locks_are_bounded_and_a_damaged_file_lets_nothing_go() {
    let (storage, disk) = (MemoryStorage::new(), DiskId::random());
    let policies = clocked(&storage, 1000, 0);
    let lock = Lock::new(CaptureTime(1_600_000_000), policies.moment()).unwrap();
    let full = policies.change(disk, |policy| {
        (0..=LOCKS_MAX as u64).for_each(|lsn| policy.locks.add(Some((Lsn(lsn), CaptureTime(lsn))), lock));
    });
    assert!(full.unwrap_err().to_string().contains("can be locked"));
    policies.add_lock(disk, None, lock).unwrap();
    assert!(policies.of(disk).all_locked(policies.moment()).is_some());
    storage.flip_bit(Path::new(FILE), ByteOffset(90), 1);
    let damaged = clocked(&storage, 1000, 0);
    assert!(damaged.damage().unwrap().contains(FILE));
    assert!(damaged.note_time().is_ok(), "and it stays as it is");
}

#[test]
fn who_asks_what_is_wanted_waits_for_nobody_who_changes_it() {
    let (storage, disk) = (MemoryStorage::new(), DiskId::random());
    let policies = clocked(&storage, 1000, 0);
    let lock = Lock::new(CaptureTime(1_600_000_000), policies.moment()).unwrap();
    policies.add_lock(disk, None, lock).unwrap();
    let wanted = policies.of(disk);
    let asked = policies.while_wanted(disk, &wanted, |_| {
        assert_eq!(policies.ladder(disk).to_string(), "any=9d");
        assert!(policies.shortened(disk, CaptureTime(0)).is_none() && policies.damage().is_none());
        (policies.of(disk), policies.locked_disks())
    });
    assert_eq!(asked, Some((wanted, 1)));
}

#[test]
fn a_file_that_was_lost_lets_nothing_go_and_one_that_never_was_is_no_loss() {
    let storage = MemoryStorage::new();
    let shared: Arc<dyn Storage> = Arc::new(storage.clone());
    let id = store_file::open_store(&shared).unwrap();
    let open = || Policies::open(Arc::clone(&shared), "any=1s".parse().unwrap());
    let disk = DiskId::random();
    assert_eq!((open().damage(), damage_of(&storage)), (None, None), "nothing was ever wanted");
    open().change(disk, |policy| policy.pins.extend([(Lsn(7), CaptureTime(8))])).unwrap();
    assert!(
        store_file::has_had_retention(&storage),
        "it is noted with the first one, not only by the next start"
    );
    storage.crash(1);
    assert!(open().damage().is_none() && open().of(disk).pins.len() == 1);
    storage.remove(Path::new(FILE)).unwrap();
    let lost = open();
    assert!(lost.damage().unwrap().contains("is missing"), "{:?}", lost.damage());
    assert!(damage_of(&storage).is_some(), "a check of the store tells it");
    assert_eq!(lost.ladder(disk), Ladder::default(), "nothing goes");
    assert!(lost.change(disk, |policy| policy.ladder = None).is_err());
    assert!(lost.while_allowed(disk, |_, _| true, |_| ()).is_none());
    // A person says that all of it is to be forgotten.
    write_anew(&storage).unwrap();
    assert_eq!((open().damage(), open().ladder(disk).to_string().as_str()), (None, "any=1s"));
    assert_eq!(store_file::read_store(&shared).unwrap(), id);
    // What it tells of the file is under its checksum.
    let path = Path::new(store_file::FILE);
    let noted = String::from_utf8(read_file(&storage, path, ByteCount(4096)).unwrap()).unwrap();
    let changed = noted.replacen("\"retention\": true", "\"retention\": false", 1);
    assert_ne!(changed, noted);
    replace_file(&storage, path, changed.as_bytes()).unwrap();
    assert!(store_file::read_store(&shared).is_err());
}

#[test]
fn a_power_cut_while_the_first_file_is_written_makes_none_look_lost() {
    for cut in 0.. {
        let storage = MemoryStorage::new();
        let shared: Arc<dyn Storage> = Arc::new(storage.clone());
        store_file::open_store(&shared).unwrap();
        storage.cut_power_after(cut);
        let policies = Policies::open(Arc::clone(&shared), Ladder::default());
        let _ = policies.change(DiskId::random(), |policy| policy.ladder = Some("any=1h".parse().unwrap()));
        let ended = !storage.is_off();
        storage.crash(cut);
        assert_eq!(damage_of(&storage), None, "cut {cut}");
        // A file of a store that did not come to note it is noted by the next start.
        let there = storage.open(Path::new(FILE)).is_ok();
        drop(Policies::open(Arc::clone(&shared), Ladder::default()));
        assert_eq!(store_file::has_had_retention(&storage), there, "cut {cut}");
        if ended {
            assert!(there && cut > 4, "{cut} steps");
            break;
        }
    }
}

#[test]
fn a_store_has_no_room_also_where_a_quota_says_so() {
    use io::ErrorKind::{PermissionDenied, QuotaExceeded, StorageFull};
    let unwritten = |kind| NotChanged::unwritten(kind, "why".to_owned());
    let full = NotChanged::Full("why".to_owned());
    assert_eq!([StorageFull, QuotaExceeded].map(unwritten), [full.clone(), full]);
    assert_eq!(unwritten(PermissionDenied), NotChanged::Failed("why".to_owned()));
}

#[test]
fn the_golden_file_is_what_is_written_and_is_read() {
    let (storage, disks) = (MemoryStorage::new(), [1, 6].map(|number| DiskId(Uuid::from_u128(number))));
    let policies = clocked(&storage, 1_772_366_400, 60);
    let lock = |seconds| Lock::new(at(seconds), policies.moment()).unwrap();
    let point = |lsn| (Lsn(lsn), at(lsn));
    let pin = |lsn| Pin { lsn: Lsn(lsn), time: at(lsn) };
    let everything = |policy: &mut Policy| {
        policy.ladder = Some("any=1h per-10m=2d hourly=7d".parse().unwrap());
        policy.pins.extend([point(7), point(8)]);
        policy.locks.add(None, lock(600));
        policy.locks.add(Some(point(9)), lock(3600));
        policy.holds.insert("rewind of vm2".to_owned(), pin(5));
        policy.shrunk = Some(at(3));
    };
    policies.change(disks[0], everything).unwrap();
    policies.change(disks[1], |policy| policy.ladder = Some(Ladder::default())).unwrap();
    let golden = check(&storage, Path::new(FILE));
    let read = clocked(&golden, 0, 0);
    assert_eq!(read.damage(), None);
    assert_eq!(disks.map(|disk| read.of(disk)), disks.map(|disk| policies.of(disk)));
    assert_eq!(read.moment().open, policies.moment().open);
}
