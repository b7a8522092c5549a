use backtide_storage::MemoryStorage;
use backtide_units::ByteOffset;

use super::*;
use crate::golden;

const DAY: u64 = 24 * 60 * 60 * 1_000_000;
const NOW: CaptureTime = CaptureTime(100 * DAY);

fn found(lsn: u64, days: u64) -> Shortfall {
    let from = Some(Place { lsn: Lsn(lsn), time: CaptureTime(u64::MAX / 2) });
    let (reason, at) = (Reason::ReceiverRolledBack, CaptureTime(days * DAY));
    Shortfall { reason, from, at, is_open: false }
}

fn store() -> (MemoryStorage, Arc<dyn Storage>) {
    let storage = MemoryStorage::new();
    storage.create_dir(Path::new("d")).unwrap();
    storage.sync_dir(Path::new("")).unwrap();
    (storage.clone(), Arc::new(storage))
}

fn open(storage: &Arc<dyn Storage>) -> Shortfalls {
    Shortfalls::open(Arc::clone(storage), PathBuf::from("d"))
}

#[test]
fn one_is_told_for_a_week_by_the_receivers_clock_whatever_its_agents_says_and_then_its_file_goes() {
    let (memory, storage) = store();
    let shortfalls = open(&storage);
    shortfalls.note(found(5, 93));
    shortfalls.write();
    memory.crash(1);
    assert_eq!(open(&storage).told(NOW), [found(5, 93)], "after a power cut too");
    let shortfalls = open(&storage);
    let later = CaptureTime(NOW.0 + 1);
    assert!(shortfalls.told(later).is_empty() && shortfalls.wants_writing());
    shortfalls.write();
    memory.crash(2);
    assert!(memory.files().is_empty() && !shortfalls.wants_writing());
    assert!(open(&storage).told(NOW).is_empty());
}

#[test]
fn one_of_a_clock_that_was_ahead_is_told_for_a_week_from_now_on() {
    let (_, storage) = store();
    let shortfalls = open(&storage);
    shortfalls.note(found(5, 10_000));
    shortfalls.write();
    assert_eq!(shortfalls.told(NOW), [found(5, 100)]);
    shortfalls.write();
    for shortfalls in [&shortfalls, &open(&storage)] {
        assert!(shortfalls.told(CaptureTime(NOW.0 + 8 * DAY)).is_empty(), "also after a start");
    }
}

#[test]
fn the_same_is_one_and_the_newest_few_are_kept() {
    let (_, storage) = store();
    let shortfalls = open(&storage);
    shortfalls.note(found(5, 98));
    shortfalls.note(found(5, 99));
    assert_eq!(shortfalls.told(NOW), [found(5, 99)]);
    let damaged = Shortfall { reason: Reason::Damaged, ..found(5, 99) };
    shortfalls.note(damaged);
    assert_eq!(shortfalls.told(NOW), [found(5, 99), damaged]);
    (6..20).for_each(|lsn| shortfalls.note(found(lsn, 99)));
    assert_eq!(shortfalls.told(NOW), [16, 17, 18, 19].map(|lsn| found(lsn, 99)));
}

#[test]
fn what_a_person_dismisses_is_told_no_more_and_what_comes_after_is() {
    let (memory, storage) = store();
    let shortfalls = open(&storage);
    assert_eq!(shortfalls.dismiss(NOW).unwrap(), Vec::<String>::new());
    shortfalls.note(found(5, 98));
    shortfalls.note(found(6, 99));
    shortfalls.write();
    memory.fail_sync_after(0);
    shortfalls.dismiss(NOW).unwrap_err();
    shortfalls.write();
    for shortfalls in [&shortfalls, &open(&storage)] {
        assert_eq!(shortfalls.told(NOW), [found(5, 98), found(6, 99)], "all is as it was");
    }
    let dismissed = shortfalls.dismiss(NOW).unwrap();
    assert_eq!(dismissed.len(), 2);
    assert!(dismissed[1].contains("after lsn:6 ("), "{dismissed:?}");
    memory.crash(1);
    assert!(shortfalls.told(NOW).is_empty() && open(&storage).told(NOW).is_empty());
    shortfalls.note(found(7, 99));
    shortfalls.write();
    assert_eq!(open(&storage).told(NOW), [found(7, 99)]);
    let is_brought = Shortfall { is_open: true, ..found(8, 99) };
    shortfalls.note(is_brought);
    assert_eq!(shortfalls.dismiss(NOW).unwrap().len(), 1);
    assert_eq!(open(&storage).told(NOW), [is_brought], "it is not past");
    shortfalls.end();
    shortfalls.write();
    assert_eq!(open(&storage).told(NOW), [found(8, 99)]);
}

#[test]
fn one_that_cannot_be_written_is_told_and_tried_again() {
    let (memory, storage) = store();
    let shortfalls = open(&storage);
    memory.set_capacity(Some(memory.used()));
    shortfalls.note(found(5, 99));
    shortfalls.write();
    assert!(shortfalls.wants_writing() && open(&storage).told(NOW).is_empty());
    assert_eq!(shortfalls.told(NOW), [found(5, 99)]);
    memory.set_capacity(None);
    shortfalls.write();
    assert_eq!(open(&storage).told(NOW), [found(5, 99)]);
}

#[test]
fn a_damaged_file_is_removed_and_one_of_a_newer_version_stays() {
    let (memory, storage) = store();
    let path = Path::new("d").join(FILE);
    sample(&*storage, Path::new("d"));
    assert_eq!(damage_of(&*storage, Path::new("d")), None);
    memory.flip_bit(&path, ByteOffset(60), 1);
    assert!(damage_of(&*storage, Path::new("d")).unwrap().contains("shortfalls.json is damaged"));
    let shortfalls = open(&storage);
    assert!(shortfalls.told(NOW).is_empty() && shortfalls.wants_writing());
    shortfalls.write();
    assert!(memory.files().is_empty());
    SealedJson { version: 2, ..KIND }.write(&*storage, &path, &["more"]).unwrap();
    let before = memory.files();
    let shortfalls = open(&storage);
    shortfalls.note(found(5, 99));
    shortfalls.write();
    assert!(memory.files() == before);
    assert_eq!(shortfalls.told(NOW), [found(5, 99)]);
    shortfalls.dismiss(NOW).unwrap_err();
    assert!(memory.files() == before);
    assert_eq!(remove_damaged(&*storage, Path::new("d")).unwrap(), None);
}

#[test]
fn the_golden_file_is_what_is_written_and_is_read() {
    let (memory, dir) = (MemoryStorage::new(), Shelf::dir(golden::DISK, 1));
    memory.create_dir(&dir).unwrap();
    let lost = Shortfall { reason: Reason::Damaged, from: None, at: golden::at(8), is_open: false };
    let from = Some(Place { lsn: Lsn(5), time: golden::at(5) });
    let put_back = Shortfall { reason: Reason::ReceiverRolledBack, from, at: golden::at(9), is_open: true };
    let shortfalls = Shortfalls::open(Arc::new(memory.clone()), dir.clone());
    shortfalls.note(lost);
    shortfalls.note(put_back);
    shortfalls.write();
    let store = golden::check(&memory, &dir.join(FILE));
    assert_eq!(Shortfalls::open(Arc::new(store), dir).told(golden::at(9)), [lost, put_back]);
}
