use backtide_storage::MemoryStorage;
use backtide_units::ByteOffset;

use super::*;

fn open(storage: &MemoryStorage) -> Findings {
    Findings::open(Arc::new(storage.clone()))
}

#[test]
fn a_place_is_kept_once_until_it_is_forgotten_and_their_number_is_bounded() {
    let (storage, disk) = (MemoryStorage::new(), DiskId::random());
    let findings = open(&storage);
    let of_disk = findings.of_life(disk);
    of_disk.note("a", None);
    let before = of_disk.known();
    of_disk.note("b", None);
    of_disk.note("a", None);
    assert_eq!(of_disk.known(), ["a", "b"]);
    storage.crash(1);
    let findings = open(&storage);
    assert_eq!(findings.of_life(disk).known(), ["a", "b"], "after a power cut too");
    findings.of_life(disk).forget(&before);
    assert_eq!(findings.of_life(disk).known(), ["b"], "what was found since stays");
    storage.crash(2);
    let findings = open(&storage);
    assert_eq!(findings.of_life(disk).known(), ["b"]);
    assert!(findings.of(DiskId::random()).is_empty());
    let of_disk = findings.of_life(disk);
    assert!(of_disk.is_new("c") && !of_disk.is_new("b: cannot be mended: no space left"));
    for number in 0..2 * PLACES_MAX {
        findings.of_life(disk).note(&number.to_string(), None);
    }
    assert_eq!(findings.of(disk).len(), PLACES_MAX);
    of_disk.note("c", None);
    assert!(of_disk.is_new("c"), "it could not be noted");
    of_disk.note_opening("c", None);
    assert!(!of_disk.is_new("c") && of_disk.is_new("b"), "the oldest makes room");
}

#[test]
fn why_a_place_could_not_be_mended_is_what_the_last_scrub_says_and_goes_with_the_place() {
    let (storage, disk) = (MemoryStorage::new(), DiskId::random());
    let findings = open(&storage).of_life(disk);
    let (full, slow) = ("a: cannot be mended: no space left", "a: cannot be mended: it was called off");
    findings.note_anew(full, None);
    findings.note("a", None);
    assert_eq!(findings.known(), [full], "a read says no more of it");
    findings.note_anew(slow, None);
    assert_eq!(findings.known(), [slow]);
    findings.note_anew("a", None);
    assert_eq!(findings.known(), ["a"]);
    findings.note_anew(full, None);
    // The scrub of another disk has put it back.
    findings.all.forget(disk, &["a".to_owned()]);
    assert!(findings.known().is_empty() && open(&storage).of(disk).is_empty());
}

#[test]
fn the_points_that_a_place_touches_are_kept_as_the_last_scrub_has_them_and_older_files_are_read() {
    let (storage, disk) = (MemoryStorage::new(), DiskId::random());
    KIND.write(&storage, Path::new(FILE), &BTreeMap::from([(disk, ["a"])])).unwrap();
    let touched = |text: &str| {
        let (place, known) = ("a".to_owned(), backtide_receiver_api::TouchedKnown::Exact);
        Some(Touched { place, points: Vec::new(), known, text: text.to_owned() })
    };
    let findings = open(&storage).of_life(disk);
    assert_eq!(findings.all(), [Finding { damage: "a".to_owned(), touched: None }]);
    findings.note("a", touched("by a read"));
    findings.note("a", touched("by another"));
    assert_eq!(open(&storage).of(disk)[0].touched, touched("by a read"));
    findings.note_anew("a", touched("by a scrub"));
    findings.note_anew("a", None);
    assert_eq!(open(&storage).of(disk)[0].touched, touched("by a scrub"));
    assert_eq!(damage_of(&storage), None);
}

#[test]
fn places_are_named_where_the_store_stands_and_from_its_root_in_the_file() {
    let disk = DiskId::random();
    let segment = format!("disks/{disk}/log-2/segments/0000000000000001.seg is damaged at byte 7: x");
    let pack = "images/packs/1.pack is damaged at byte 7".to_owned();
    for sentence in [&segment, &pack] {
        let at = |root: &str| {
            let damage = format!("{root}{sentence}");
            let known = backtide_receiver_api::TouchedKnown::Exact;
            let text = String::new();
            let touched = Some(Touched { place: damage.clone(), points: Vec::new(), known, text });
            Finding { damage, touched }
        };
        assert_eq!(at("/a/disks/").within("/a/disks/"), at(""));
        // Of another root only an older program may have noted it.
        for noted in ["", "/b/", "/images/b c/", "/a/disks/old/"] {
            assert_eq!(at(noted).named("/a/disks/", disk), at("/a/disks/"), "{noted}");
        }
        for other in ["list ", "/b/more/list "] {
            assert_eq!(at(other).named("/b/", disk), at(other));
        }
    }
}

#[test]
fn what_is_found_of_a_disk_that_was_forgotten_is_not_noted_of_one_that_comes_after_it() {
    let (storage, disk, other) = (MemoryStorage::new(), DiskId::random(), DiskId::random());
    let findings = open(&storage);
    let (before, beside) = (findings.of_life(disk), findings.of_life(other));
    before.note("a", None);
    findings.forget_all(disk);
    before.note("its file is missing", None);
    before.note_anew("all its files are", None);
    assert!(!before.is_current() && findings.of(disk).is_empty());
    let after = findings.of_life(disk);
    after.note("b", None);
    before.forget(&["b".to_owned()]);
    beside.note("c", None);
    assert!(after.is_current() && beside.is_current());
    let findings = open(&storage);
    let known = |disk| findings.of_life(disk).known();
    assert_eq!((known(disk), known(other)), (vec!["b".to_owned()], vec!["c".to_owned()]));
}

#[test]
fn a_damaged_file_is_told_and_replaced_by_what_is_found_next() {
    let (storage, disk) = (MemoryStorage::new(), DiskId::random());
    open(&storage).of_life(disk).note("a", None);
    assert_eq!(damage_of(&storage), None);
    storage.flip_bit(Path::new(FILE), ByteOffset(60), 1);
    assert!(damage_of(&storage).unwrap().contains("findings.json is damaged"));
    let findings = open(&storage);
    assert!(findings.of(disk).is_empty());
    findings.of_life(disk).note("b", None);
    assert_eq!(open(&storage).of_life(disk).known(), ["b"]);
}

#[test]
fn a_file_of_a_newer_version_stays_as_it_is() {
    let (storage, disk) = (MemoryStorage::new(), DiskId::random());
    SealedJson { version: 2, ..KIND }.write(&storage, Path::new(FILE), &["more"]).unwrap();
    let before = storage.files();
    let findings = open(&storage).of_life(disk);
    findings.note("a", None);
    assert_eq!(findings.known(), ["a"]);
    assert!(storage.files() == before);
    assert!(damage_of(&storage).unwrap().contains("has version 2"));
}
