//! A mark of what is durable that the device cannot read: it is an error, and never taken for none.

use backtide_protocol::ReceiverState;

use crate::{small_files, watermark};

use super::*;

fn mark() -> PathBuf {
    Shelf::dir(IDENTITY.disk, 1).join(watermark::FILE)
}

fn make_unreadable(storage: &MemoryStorage) {
    storage.make_unreadable(&mark(), ByteRange::new(ByteOffset(0), ByteCount(512)).unwrap());
}

fn heal(storage: &MemoryStorage) {
    storage.make_unreadable(&mark(), ByteRange::default());
}

/// A store whose last segment is gone: only the mark tells that there was one.
pub(super) fn without_its_end() -> MemoryStorage {
    let storage = whole(false);
    storage.remove(&last_segment(&storage)).unwrap();
    storage.sync_dir(&Shelf::dir(IDENTITY.disk, 1).join("segments")).unwrap();
    storage
}

/// A store in whose last entry a payload is damaged, which no later entry calls durable.
fn with_a_damaged_end() -> MemoryStorage {
    let storage = whole(false);
    let segment = last_segment(&storage);
    let files = storage.files();
    let (_, bytes) = files.iter().find(|(path, _)| *path == segment).unwrap();
    // The payload of the last write, and no footer: the segment was being written.
    let payload = bytes.windows(4096).rposition(|page| page == [95; 4096]).unwrap();
    storage.flip_bit(&segment, ByteOffset(payload as u64 + 9), 3);
    storage
}

#[test]
fn a_log_whose_mark_is_of_a_newer_version_is_left_to_who_wrote_it() {
    let storage = without_its_end();
    let mut bytes = backtide_storage::read_file(&storage, &mark(), ByteCount(64)).unwrap();
    bytes[58] = 1;
    let crc = crc32c::crc32c(&bytes[..60]).to_le_bytes();
    bytes[60..].copy_from_slice(&crc);
    backtide_storage::replace_file(&storage, &mark(), &bytes).unwrap();
    let of_disks = || {
        let mut files = storage.files();
        files.retain(|(path, _)| path.starts_with("disks"));
        files
    };
    let files = of_disks();
    let why = "durable has format version 2, this program reads up to 1";
    let error = shelf(&storage).open(IDENTITY.disk, 1).err().unwrap();
    assert!(matches!(error, LogError::UnknownVersion { found: 2, known: 1, .. }), "{error}");
    let disk = shelf(&storage).open_disk(IDENTITY.disk).unwrap();
    let failure = disk.failure().unwrap();
    assert!(failure.why.contains(why) && !failure.damaged, "no new log begins beside it: {}", failure.why);
    for what in [Repair::Rebuild, Repair::Everything] {
        let report = run(&storage, what).unwrap();
        assert!(!report.sound && report.disks[0].error.as_ref().unwrap().contains(why), "{report:?}");
        assert!(report.disks[0].mended.is_empty() && report.disks[0].cut.is_empty(), "{report:?}");
    }
    assert!(of_disks() == files, "nothing of it changes");
}

#[test]
fn a_log_whose_mark_cannot_be_read_is_not_opened_and_nothing_of_it_changes() {
    for before in [whole(true), without_its_end(), with_a_damaged_end()] {
        let storage = before.copy();
        make_unreadable(&storage);
        let files = storage.files();
        let error = shelf(&storage).open(IDENTITY.disk, 1).err().unwrap();
        assert!(matches!(&error, LogError::Io { step, .. } if step.contains("durable")), "{error}");
        // A disk with that log is there, and says why it cannot be used; an agent that comes is refused, not served less.
        let disk = shelf(&storage).open_disk(IDENTITY.disk).unwrap();
        let why = &disk.failure().unwrap().why;
        assert!(why.contains("durable") && why.contains("fsck --repair"), "{why}");
        assert!(!disk.failure().unwrap().damaged, "no new log begins beside it");
        let report = run(&storage, Repair::Rebuild).unwrap();
        assert!(!report.sound && report.disks[0].error.is_some(), "{report:?}");
        assert_eq!(storage.files(), files);
    }
}

#[test]
fn what_a_mark_tells_is_known_again_when_it_can_be_read() {
    let storage = without_its_end();
    make_unreadable(&storage);
    let shelf = shelf(&storage);
    assert!(shelf.open(IDENTITY.disk, 1).is_err());
    heal(&storage);
    let log = shelf.open(IDENTITY.disk, 1).unwrap();
    // The device fails between two reads.
    make_unreadable(&storage);
    assert!(shelf.mark(IDENTITY.disk, 1, &log).is_err());
    heal(&storage);
    let loss = shelf.mark(IDENTITY.disk, 1, &log).unwrap().loss.unwrap();
    assert_eq!(loss.lost.lsn, Lsn(95));
}

#[test]
fn a_log_of_which_it_cannot_be_noted_that_its_end_is_lost_is_not_used_until_it_can() {
    for fail in [MemoryStorage::fail_write_after, MemoryStorage::fail_sync_after] {
        let storage = without_its_end();
        let before = storage.copy();
        let shelf = shelf(&storage);
        let log = shelf.open(IDENTITY.disk, 1).unwrap();
        fail(&storage, 0);
        let error = shelf.mark(IDENTITY.disk, 1, &log).err().unwrap();
        assert!(matches!(&error, LogError::Io { step, .. } if step.contains("durable")), "{error}");
        let log = super::shelf(&before).open_marked(IDENTITY.disk, 1).unwrap();
        assert_eq!(log.1.loss.unwrap().lost.lsn, Lsn(95));
    }
    // One that has lost nothing goes on without its mark: an older one is true all the same.
    let whole = whole(true);
    whole.remove(&mark()).unwrap();
    let shelf = super::shelf(&whole);
    let log = shelf.open(IDENTITY.disk, 1).unwrap();
    whole.fail_write_after(0);
    assert!(shelf.mark(IDENTITY.disk, 1, &log).unwrap().watermark.is_none());
}

#[test]
fn what_is_left_of_a_log_is_read_and_it_is_told_that_its_mark_is_not() {
    let storage = whole(true);
    make_unreadable(&storage);
    let left = shelf(&storage).salvage(IDENTITY.disk, 1, None).unwrap();
    assert_eq!(left.snapshot.timeline().highest_lsn(), Lsn(95));
    assert!(left.damage.len() == 1 && left.damage[0].contains("durable"), "{:?}", left.damage);
    assert!(shelf(&storage).salvage_to_repair(IDENTITY.disk, 1).is_err());
    let told = small_files::beside_log(&storage, &Shelf::dir(IDENTITY.disk, 1), true);
    assert!(told.iter().any(|damage| damage.contains("durable cannot be read")), "{told:?}");
}

#[test]
fn a_repair_makes_a_mark_anew_that_cannot_be_read() {
    let storage = whole(true);
    make_unreadable(&storage);
    let report = run(&storage, Repair::Everything).unwrap();
    assert!(report.sound, "{report:?}");
    let said = |what: &str| report.disks[0].mended.iter().any(|mended| mended.contains(what));
    assert!(said("made anew, up to lsn:95") && said("agent"), "{report:?}");
    let log = shelf(&storage).open(IDENTITY.disk, 1).unwrap();
    let noted = Watermark::find(&storage, &Shelf::dir(IDENTITY.disk, 1), IDENTITY.history).unwrap();
    assert_eq!(noted, Some(Noted::in_doubt(log.durable())));
    assert_eq!(doubt::claimed(&storage), ReceiverState::Foreign, "its agent compares everything");
}

/// A store whose log was cut, with a mark that cannot be read since.
fn cut() -> MemoryStorage {
    let storage = damaged();
    assert_eq!(run(&storage, Repair::Everything).unwrap().disks[0].cut.len(), 1);
    storage
}

#[test]
fn a_damaged_log_whose_mark_cannot_be_read_is_cut_as_with_its_mark_whatever_step_the_power_fails_at() {
    for before in [damaged(), without_an_end()] {
        let with_its_mark = before.copy();
        run(&with_its_mark, Repair::Everything).unwrap();
        let without_it = before.copy();
        make_unreadable(&without_it);
        let report = run(&without_it, Repair::Everything).unwrap();
        assert!(report.disks[0].mended.iter().any(|mended| mended.contains("made anew")), "{report:?}");
        // What was cut off is put aside, all of it.
        assert_eq!(segments(&without_it), segments(&with_its_mark));
        let refused = shelf(&without_it).open(IDENTITY.disk, 1).err().unwrap();
        assert!(matches!(refused, LogError::Damaged { .. }), "{refused}");
    }
    cut_at_every_step(&damaged(), Lsn(95), make_unreadable);
    // Of what is lost altogether nothing but the mark told how far LSNs had come.
    cut_at_every_step(&without_an_end(), Lsn(94), make_unreadable);
}

#[test]
fn a_repair_that_died_half_way_is_ended_when_its_mark_cannot_be_read_since() {
    let (before, once) = (damaged(), damaged());
    run(&once, Repair::Everything).unwrap();
    let (points, memo, _, refused) = found(&once);
    for cuts in 0.. {
        let storage = before.copy();
        storage.cut_power_after(cuts);
        let _died = run(&storage, Repair::Everything);
        let ended = !storage.is_off();
        storage.crash(cuts);
        make_unreadable(&storage);
        let report = run(&storage, Repair::Everything).unwrap();
        assert!(report.sound, "cut {cuts}: {report:?}");
        let after = found(&storage);
        assert_eq!((&after.0, &after.1, after.3), (&points, &memo, refused), "cut {cuts}");
        if ended {
            assert!(cuts > 10, "{cuts} steps");
            break;
        }
    }
}

#[test]
fn a_lost_header_is_written_again_of_a_log_whose_mark_cannot_be_read() {
    let storage = with_a_damaged_end();
    storage.flip_bit(&last_segment(&storage).with_file_name(SegmentId(3).file_name()), ByteOffset(40), 3);
    make_unreadable(&storage);
    let report = run(&storage, Repair::Everything).unwrap();
    assert!(report.disks[0].error.is_none() && report.disks[0].cut.is_empty(), "{report:?}");
    let mended = &report.disks[0].mended;
    assert!(mended.iter().any(|mended| mended.contains("header is written again")), "{report:?}");
    assert_eq!(shelf(&storage).open(IDENTITY.disk, 1).unwrap().durable().lsn, Lsn(95));
}

#[test]
fn a_log_that_was_cut_gets_its_mark_anew() {
    let storage = cut();
    let expected = found(&storage).0;
    let files = segments(&storage);
    make_unreadable(&storage);
    let report = run(&storage, Repair::Everything).unwrap();
    assert!(report.sound, "{report:?}");
    assert!(report.disks[0].mended.iter().any(|mended| mended.contains("made anew")), "{report:?}");
    assert!(report.disks[0].cut.is_empty(), "{report:?}");
    assert_eq!((found(&storage).0, segments(&storage)), (expected, files));
    let again = run(&storage, Repair::Everything).unwrap();
    assert!(again.sound && again.disks[0].mended.is_empty(), "{again:?}");
}

#[test]
fn nothing_is_cut_of_an_end_that_may_have_been_durable() {
    let storage = with_a_damaged_end();
    let segment = last_segment(&storage);
    let read = |storage: &MemoryStorage| {
        let files = storage.files();
        files.into_iter().find(|(path, _)| *path == segment).unwrap().1
    };
    let before = read(&storage);
    make_unreadable(&storage);
    let report = run(&storage, Repair::Everything).unwrap();
    assert!(report.disks[0].error.is_none() && report.disks[0].cut.is_empty(), "{report:?}");
    assert!(!report.sound, "the payload is damaged still: {report:?}");
    let after = read(&storage);
    assert!(before.starts_with(&after) && before[after.len()..].iter().all(|byte| *byte == 0));
    let log = shelf(&storage).open(IDENTITY.disk, 1).unwrap();
    assert_eq!(log.durable().lsn, Lsn(95));
    let noted = Watermark::find(&storage, &Shelf::dir(IDENTITY.disk, 1), IDENTITY.history).unwrap();
    assert_eq!(noted, Some(Noted::in_doubt(log.durable())));
    assert_eq!(doubt::claimed(&storage), ReceiverState::Foreign, "its agent compares everything");
}

#[test]
fn a_disk_of_which_nothing_tells_whose_log_it_had_gets_a_mark_that_can_be_read() {
    let storage = whole(true);
    make_unreadable(&storage);
    for (path, _) in segments(&storage) {
        storage.remove(&path).unwrap();
    }
    let report = run(&storage, Repair::Everything).unwrap();
    assert!(report.disks[0].error.is_none(), "{report:?}");
    let disk = shelf(&storage).open_disk(IDENTITY.disk).unwrap();
    let failure = disk.failure().unwrap();
    assert!(failure.damaged, "a new log may begin: {}", failure.why);
    assert!(failure.why.contains("nothing tells how much was durable"), "{}", failure.why);
}
