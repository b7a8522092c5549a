//! The small files of a store as they are for ever: what this program writes is equal to `testdata/v1/store/`, which is laid
//! out as a store, and this program reads what is there.
//!
//! The files are made by these tests when `BACKTIDE_WRITE_GOLDEN` is set; they are never made again for a version that was
//! released. A kind whose times and ids only its own module can set has its test there.

use std::{fs, path::Path, sync::Arc};

use backtide_overlay::OverlayId;
use backtide_receiver_api::{ByteSpan, DiskRef, Point, Touched, TouchedKnown, TouchedPoints};
use backtide_recovery::{Attached, LogIdentity};
use backtide_storage::{MemoryStorage, Storage, read_file, replace_file};
use backtide_units::{ByteCount, ByteOffset, CaptureTime, DiskId, DiskName, Epoch, HistoryId, Lsn};
use uuid::Uuid;

use crate::{
    Findings, Forgotten, Shelf,
    cut::Cut,
    findings::{self, Finding},
    forgotten::{self, Tombstone},
    inspect::inspect_json,
    memo::{self, Memo},
    mount_numbers::{self, MountNumbers},
    overlays::record::{self, Record},
};

/// The disk of all golden files.
pub(crate) const DISK: DiskId = DiskId(Uuid::from_u128(1));

const SECOND: u64 = 1_000_000;

/// So many seconds after noon of 1 March 2026.
pub(crate) fn at(seconds: u64) -> CaptureTime {
    CaptureTime((1_772_366_400 + seconds) * SECOND)
}

/// Makes sure that the file at `path` of a store is the golden one, and that people can read it. Gives a store with the golden
/// one alone, for whoever reads it.
pub(crate) fn check(storage: &MemoryStorage, path: &Path) -> MemoryStorage {
    let limit = ByteCount(1 << 20);
    let written = read_file(storage, path, limit).unwrap();
    let place = Path::new(env!("CARGO_MANIFEST_DIR")).join("../testdata/v1/store").join(path);
    if std::env::var_os("BACKTIDE_WRITE_GOLDEN").is_some() {
        fs::create_dir_all(place.parent().unwrap()).unwrap();
        fs::write(&place, &written).unwrap();
    }
    let golden = fs::read(&place).unwrap();
    let text = String::from_utf8(written.clone()).unwrap();
    assert!(golden == written, "{} is not the golden one:\n{text}", path.display());
    let store = MemoryStorage::new();
    store.create_dir(path.parent().unwrap()).unwrap();
    replace_file(&store, path, &golden).unwrap();
    let mut listing = Vec::new();
    let is_whole = inspect_json(&store, path, &mut listing).unwrap();
    let listing = String::from_utf8(listing).unwrap();
    assert!(is_whole && listing.contains(", version 1") && listing.lines().count() > 1, "{listing}");
    store
}

/// What some damage touches, with everything that can be said of it.
pub(crate) fn touched(place: &str) -> Touched {
    let point = |lsn: u64| Some(Point { lsn: Lsn(lsn), time: at(lsn) });
    let bytes = Some(ByteSpan { offset: ByteOffset(131_072), length: ByteCount(65_536) });
    let points = vec![
        TouchedPoints { bytes, from: point(8), to: point(40), open: true, lost: false },
        TouchedPoints { bytes: None, from: None, to: point(5), open: false, lost: true },
    ];
    let text = "the points before lsn:5 are lost; it touches at least bytes 131072..196608".to_owned();
    Touched { place: place.to_owned(), points, known: TouchedKnown::AtLeast, text }
}

fn name(text: &str) -> DiskName {
    text.parse().unwrap()
}

fn shared(storage: &MemoryStorage) -> Arc<dyn Storage> {
    Arc::new(storage.clone())
}

/// The directory of the disk's first log, in a store that has nothing else.
fn log() -> (MemoryStorage, std::path::PathBuf) {
    let (storage, dir) = (MemoryStorage::new(), Shelf::dir(DISK, 1));
    storage.create_dir(&dir).unwrap();
    (storage, dir)
}

#[test]
fn whose_log_it_is() {
    let (storage, dir) = log();
    let identity = LogIdentity { disk: DISK, history: HistoryId(Uuid::from_u128(2)) };
    let attached = Attached {
        epoch: Epoch(3),
        attach: Uuid::from_u128(4),
        name: name("vm1"),
        size: ByteCount(10 << 30),
        time: at(5),
    };
    let memo = Memo { identity, attached };
    for write in [memo::write_durably, memo::write] {
        write(&storage, &dir, &memo).unwrap();
        let store = check(&storage, &dir.join(memo::FILE));
        assert_eq!(memo::read(&store, &dir), Some(memo.clone()));
    }
}

#[test]
fn that_a_log_was_cut() {
    let (storage, dir) = log();
    let cut = Cut { why: "segments/0000000000000003.seg is missing".to_owned() };
    cut.write(&storage, &dir).unwrap();
    let store = check(&storage, &dir.join("cut.json"));
    assert_eq!(Cut::read(&store, &dir).unwrap(), Some(cut));
}

#[test]
fn what_an_overlay_lies_over() {
    let storage = MemoryStorage::new();
    storage.create_dir(Path::new(record::DIR)).unwrap();
    let place = r#"{"path":"/srv/backtide","device":2049,"inode":262145}"#;
    let record = Record {
        id: "vm1-3".to_owned(),
        overlay: OverlayId(Uuid::from_u128(5)),
        disk: DiskRef { name: name("vm1"), uuid: DISK, size: ByteCount(10 << 30) },
        lsn: Lsn(40),
        time: at(40),
        created: at(90),
        uri: Some("nbd+unix:///vm1-3?socket=/srv/backtide/run/vm1-3.sock".to_owned()),
        store: Some(serde_json::from_str(place).unwrap()),
    };
    record::write(&storage, &record).unwrap();
    let store = check(&storage, &record::path("vm1-3"));
    assert_eq!(record::read(&store, "vm1-3"), Ok(record));
}

#[test]
fn the_last_numbers_of_mounts() {
    let (storage, path) = (MemoryStorage::new(), Path::new(mount_numbers::FILE));
    // One that has lost what it knew has a number below which all were given.
    replace_file(&storage, path, b"{").unwrap();
    let numbers = MountNumbers::open(shared(&storage), at(0));
    let given = ["vm1", "vm1", "vm2"].map(|disk| numbers.next(&name(disk)));
    assert_eq!(given, [1_772_366_401, 1_772_366_402, 1_772_366_401]);
    let numbers = MountNumbers::open(shared(&check(&storage, path)), at(99));
    let given = ["vm1", "vm2", "vm3"].map(|disk| numbers.next(&name(disk)));
    assert_eq!(given, [1_772_366_403, 1_772_366_402, 1_772_366_401]);
}

#[test]
fn damage_that_was_found() {
    let (storage, other) = (MemoryStorage::new(), DiskId(Uuid::from_u128(6)));
    let findings = Findings::open(shared(&storage));
    let place = |at: u32| format!("disks/{DISK}/segments/0000000000000001.seg is damaged at byte {at}");
    let found = [
        Finding { damage: place(64), touched: None },
        Finding {
            damage: format!("{}: cannot be mended: nobody has it", place(131_648)),
            touched: Some(touched(&place(131_648))),
        },
    ];
    for Finding { damage, touched } in found.clone() {
        findings.of_life(DISK).note(&damage, touched);
    }
    let pack = "images/packs/0000000000000001.pack is damaged at byte 7".to_owned();
    findings.of_life(other).note(&pack, None);
    let findings = Findings::open(shared(&check(&storage, Path::new(findings::FILE))));
    assert_eq!(findings.of(DISK), found);
    assert_eq!(findings.of(other), [Finding { damage: pack, touched: None }]);
}

#[test]
fn a_disk_that_was_forgotten() {
    let storage = MemoryStorage::new();
    let stone = Tombstone { name: Some(name("vm1")), epoch: Epoch(3), time: at(7), gone: true };
    Forgotten::load(shared(&storage)).unwrap().note(DISK, stone.clone()).unwrap();
    let store = check(&storage, &Path::new(forgotten::DIR).join(format!("{DISK}.json")));
    assert_eq!(forgotten::read_all(&store).unwrap(), [Ok((DISK, stone))]);
}
