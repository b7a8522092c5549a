//! A repair that is done again, and one whose report something stands in the way of.

use crate::fsck::check_snapshot;

use super::*;

fn aside() -> PathBuf {
    Path::new(CUT_DIR).join(IDENTITY.disk.to_string()).join("log-1")
}

/// A store whose log lost its third segment, and of its second the header of an entry, which its index tells all the same.
fn damaged_before_the_cut() -> MemoryStorage {
    let (storage, dir) = (damaged(), Shelf::dir(IDENTITY.disk, 1));
    storage.flip_bit(&dir.join("segments").join(SegmentId(2).file_name()), ByteOffset(128 + 8), 1);
    storage
}

#[test]
fn a_repair_that_is_done_again_does_nothing_and_says_so_also_when_damage_stays() {
    let storage = damaged_before_the_cut();
    let first = run(&storage, Repair::Everything).unwrap();
    assert!(!first.sound && !first.disks[0].damage.is_empty(), "{first:?}");
    assert_eq!(first.disks[0].cut.len(), 1, "{first:?}");
    let files = storage.files();
    let again = run(&storage, Repair::Everything).unwrap();
    assert_eq!((&again.disks[0].cut, &again.disks[0].mended), (&Vec::new(), &Vec::new()));
    assert_eq!(again.disks[0].damage, first.disks[0].damage);
    assert_eq!(storage.files(), files);
}

#[test]
fn a_repair_that_ends_an_earlier_one_tells_what_that_has_put_aside() {
    let storage = damaged();
    assert!(run(&storage, Repair::Everything).unwrap().sound);
    // Its last step was not done.
    let dir = Shelf::dir(IDENTITY.disk, 1);
    let before = Noted::whole(Durable { seq: Seq(90), lsn: Lsn(95) });
    Watermark::replace(&storage, &dir, IDENTITY.history, before).unwrap();
    let report = run(&storage, Repair::Everything).unwrap();
    let [cut] = &report.disks[0].cut[..] else { panic!("{report:?}") };
    assert!(cut.contains(&aside().display().to_string()) && !cut.contains("nothing was left"), "{cut}");
    assert!(run(&storage, Repair::Everything).unwrap().disks[0].cut.is_empty());
}

#[test]
fn a_repair_is_told_of_when_what_follows_it_cannot_be_read() {
    let directory = tempfile::tempdir().unwrap();
    let store = directory.path();
    for (path, bytes) in damaged().files() {
        let path = store.join(path);
        fs::create_dir_all(path.parent().unwrap()).unwrap();
        fs::write(path, bytes).unwrap();
    }
    // No directory of overlays.
    fs::write(store.join("overlays"), "").unwrap();
    let looked = crate::fsck::fsck(store, &mut |_| {}).unwrap();
    assert_eq!(looked.disks.len(), 1, "{looked:?}");
    for (report, cuts) in [(looked, 0), (repair(store, Repair::Everything, &mut |_| {}).unwrap(), 1)] {
        assert!(!report.sound && report.disks[0].cut.len() == cuts, "{report:?}");
        assert!(report.damage.iter().any(|why| why.contains("overlays")), "{report:?}");
    }
}

#[test]
fn a_memo_that_the_device_cannot_read_is_not_sound() {
    let storage = whole(true);
    assert!(run(&storage, Repair::Everything).unwrap().sound);
    let memo = Shelf::dir(IDENTITY.disk, 1).join(memo::FILE);
    storage.make_unreadable(&memo, ByteRange::new(ByteOffset(0), ByteCount(16)).unwrap());
    let shared: Arc<dyn Storage> = Arc::new(storage);
    let report = check_store(Path::new("store"), &shared, &mut |_| {}, &mut |_, _| {}).unwrap();
    let told = report.disks[0].damage.iter().any(|why| why.contains("disk.json cannot be read"));
    assert!(!report.sound && told, "{report:?}");
}

#[test]
fn what_a_repair_finds_damaged_still_is_remembered_and_what_is_whole_again_is_not() {
    let storage = whole(true);
    let shared: Arc<dyn Storage> = Arc::new(storage.clone());
    let noted = || Findings::open(Arc::clone(&shared)).of(IDENTITY.disk);
    assert!(run(&storage, Repair::Everything).unwrap().sound);
    assert!(noted().is_empty());
    // A payload that nobody has any more.
    let first = Shelf::dir(IDENTITY.disk, 1).join("segments").join(SegmentId(1).file_name());
    let bytes = storage.files().into_iter().find(|(path, _)| *path == first).unwrap().1;
    let place = bytes.windows(64).position(|bytes| bytes == [7; 64]).unwrap();
    storage.flip_bit(&first, ByteOffset(place as u64), 3);
    assert!(!run(&storage, Repair::Rebuild).unwrap().sound);
    assert!(noted().is_empty(), "a rebuild writes what follows from the logs alone");
    let report = run(&storage, Repair::Everything).unwrap();
    assert!(!report.sound && report.disks[0].touched.len() == 1, "{report:?}");
    let found = noted();
    assert_eq!(found.len(), 1, "{found:?}");
    assert_eq!(
        (&found[0].damage, found[0].touched.as_ref()),
        (&report.disks[0].damage[0], report.disks[0].touched.first())
    );
    storage.flip_bit(&first, ByteOffset(place as u64), 3);
    assert!(run(&storage, Repair::Everything).unwrap().sound);
    assert!(noted().is_empty());
}

/// What a scrub notes of the log in use.
fn scrubbed(storage: &MemoryStorage) -> Vec<findings::Finding> {
    let noted = Findings::open(Arc::new(storage.clone()));
    let mut log = shelf(storage).open(IDENTITY.disk, 1).unwrap();
    let snapshot = log.snapshot().unwrap();
    note(&noted, &check_snapshot(DiskCheck::unread(IDENTITY.disk), &snapshot, None, &mut |_| true), &[]);
    noted.of(IDENTITY.disk)
}

#[test]
fn a_repair_remembers_what_it_cannot_mend_of_a_log_that_opens_for_that_says_nothing_of_itself() {
    for footer_too in [false, true] {
        // The newest segment: no later one says that it was durable, and its footer tells of an entry that is gone.
        let (storage, path, [_, entry]) = repeated::of_one_segment(22, true);
        storage.flip_bit(&path, ByteOffset(entry - 64 + 9), 1);
        if footer_too {
            storage.flip_bit(&path, ByteOffset(repeated::footer_of(&storage) + 10), 1);
        }
        let noted = scrubbed(&storage);
        assert!(noted.iter().any(|finding| finding.touched.is_some()), "{noted:?}");
        let report = run(&storage, Repair::Everything).unwrap();
        assert!(!report.sound && report.disks[0].cut.is_empty(), "{report:?}");
        let disk = shelf(&storage).open_disk(IDENTITY.disk).unwrap();
        assert_eq!((disk.failure(), disk.damage().count()), (None, 0));
        assert_eq!(Findings::open(Arc::new(storage.clone())).of(IDENTITY.disk), noted);
    }
}

#[test]
fn a_repair_notes_nothing_that_the_disk_says_itself_as_long_as_it_is_so() {
    // A log in use that has lost its end, and one that is cut and has damage before that.
    for storage in [marks::without_its_end(), damaged_before_the_cut()] {
        let report = run(&storage, Repair::Everything).unwrap();
        assert!(!report.sound && !report.disks[0].damage.is_empty(), "{report:?}");
        let disk = shelf(&storage).open_disk(IDENTITY.disk).unwrap();
        assert_eq!(disk.damage().cloned().collect::<Vec<_>>(), report.disks[0].damage);
        assert_eq!(Findings::open(Arc::new(storage)).of(IDENTITY.disk), []);
    }
}

#[test]
fn a_repair_forgets_no_finding_of_places_that_it_did_not_all_read() {
    let storage: Arc<dyn Storage> = Arc::new(MemoryStorage::new());
    let findings = Findings::open(storage);
    let whole = DiskCheck::unread(IDENTITY.disk);
    let failed = DiskCheck { error: Some("the device failed".to_owned()), ..whole.clone() };
    let too_many = DiskCheck { more_damage: 1, ..whole.clone() };
    findings.of_life(IDENTITY.disk).note_anew("a.seg is damaged at byte 7: found before", None);
    for (report, left) in [(failed, 1), (too_many, 1), (whole, 0)] {
        note(&findings, &report, &[]);
        assert_eq!(findings.of(IDENTITY.disk).len(), left, "{report:?}");
    }
    let damaged =
        DiskCheck { damage: vec!["b.seg is missing".to_owned()], ..DiskCheck::unread(IDENTITY.disk) };
    note(&findings, &damaged, &damaged.damage);
    assert!(findings.of(IDENTITY.disk).is_empty(), "what its log tells itself whenever it is opened");
}

#[test]
fn a_retention_json_that_is_lost_is_made_anew_when_a_person_says_so_and_no_receiver_runs() {
    let directory = tempfile::tempdir().unwrap();
    let store = directory.path();
    let storage: Arc<dyn Storage> = Arc::new(RealStorage::open(store).unwrap());
    write_store(&storage).unwrap();
    retention::write_anew(&*storage).unwrap();
    assert_eq!(forget_retention(store).unwrap(), None, "nothing is wrong with it");
    drop(retention::Policies::open(Arc::clone(&storage), Default::default()));
    storage.remove(Path::new(retention::FILE)).unwrap();
    let held = lock_store(store).unwrap();
    assert!(matches!(forget_retention(store), Err(StoreFileError::Locked { .. })));
    assert!(retention::damage_of(&*storage).is_some());
    drop(held);
    let said = forget_retention(store).unwrap().unwrap();
    assert!(said.contains("is missing") && said.contains("is forgotten"), "{said}");
    assert_eq!((retention::damage_of(&*storage), forget_retention(store).unwrap()), (None, None));
    // One that is made anew while there is a `retention.json` knows of it.
    write_store(&storage).unwrap();
    storage.remove(Path::new(retention::FILE)).unwrap();
    assert!(retention::damage_of(&*storage).is_some());
}
