//! The same files with a checksum that is put right after each mutation, so that everything behind it is reached: nothing
//! panics, nor takes more memory than there is, whatever somebody has sealed.

use backtide_fuzz::Target;
use backtide_recovery::LogError;
use backtide_units::DiskName;

use crate::{
    cut::Cut,
    forgotten::Forgotten,
    golden,
    inspect::{inspect_durable, inspect_json},
    mount_numbers::{self, MountNumbers},
    overlays::{record, store_place::StorePlace},
    scrub,
    sealed_json::reseal,
    shortfalls,
};

use super::*;

const DISK: DiskId = DiskId(Uuid::from_u128(1));

/// Runs it: every sample, then `seeds` mutations, then as long as the environment says.
fn run(name: &'static str, seeds: u64, samples: Vec<Vec<u8>>, mend: fn(&mut [u8]), take: fn(&[u8])) {
    Target { name, seeds, samples, mend, take }.run();
}

fn run_json(name: &'static str, samples: Vec<Vec<u8>>, take: fn(&[u8])) {
    run(name, 3000, samples, reseal, take);
}

/// A store with one file.
fn store(path: &Path, bytes: &[u8]) -> (MemoryStorage, Arc<dyn Storage>) {
    let storage = MemoryStorage::new();
    storage.create_dir(path.parent().unwrap_or(Path::new(""))).unwrap();
    replace_file(&storage, path, bytes).unwrap();
    let _ = inspect_json(&storage, path, &mut std::io::sink());
    let shared: Arc<dyn Storage> = Arc::new(storage.clone());
    (storage, shared)
}

fn file(storage: &MemoryStorage, path: &Path) -> Vec<u8> {
    read_file(storage, path, ByteCount(1 << 20)).unwrap()
}

fn policies_file() -> Vec<u8> {
    let storage = MemoryStorage::new();
    let policies = Policies::open(Arc::new(storage.clone()), "any=9d".parse().unwrap());
    let lock = Lock::new(CaptureTime(u64::MAX / 2), policies.moment()).unwrap();
    policies.change(DISK, |policy| policy.ladder = Some("any=1h per-10m=2d".parse().unwrap())).unwrap();
    policies.add_lock(DISK, Some((Lsn(7), CaptureTime(8))), lock).unwrap();
    policies.add_lock(DISK, None, lock).unwrap();
    file(&storage, Path::new("retention.json"))
}

#[test]
fn policies() {
    run_json("retention.json", vec![policies_file()], |bytes| {
        let (storage, shared) = store(Path::new("retention.json"), bytes);
        let policies = Policies::open(shared, "any=9d".parse().unwrap());
        let (policy, now) = (policies.of(DISK), policies.moment());
        let _ = (policies.ladder(DISK), policies.locked_disks(), policies.note_time());
        let _ = (policy.all_locked(now), policy.staying(now));
        let _ = retention::damage_of(&storage);
    });
}

#[test]
fn findings_with_the_points_they_touch() {
    let storage = MemoryStorage::new();
    let samples =
        [("a.seg is damaged at byte 7", None), ("b", Some(golden::touched("b")))].map(|(why, touched)| {
            Findings::open(Arc::new(storage.clone())).of_life(DISK).note(why, touched);
            file(&storage, Path::new("findings.json"))
        });
    assert_eq!(Findings::open(Arc::new(storage.clone())).of(DISK).len(), 2);
    run_json("findings.json", samples.to_vec(), |bytes| {
        let (storage, shared) = store(Path::new("findings.json"), bytes);
        let findings = Findings::open(shared);
        let all = findings.of_life(DISK).all();
        let _ = crate::touched::told("a", all.iter().filter_map(|found| found.touched.as_ref()));
        findings.of_life(DISK).note("c.seg is damaged at byte 9", None);
        let _ = findings::damage_of(&storage);
    });
}

#[test]
fn the_stores_own() {
    let storage = MemoryStorage::new();
    let shared: Arc<dyn Storage> = Arc::new(storage.clone());
    store_file::open_store(&shared).unwrap();
    run_json("store.json", vec![file(&storage, Path::new("store.json"))], |bytes| {
        let (_, shared) = store(Path::new("store.json"), bytes);
        let _ = store_file::read_store(&shared);
    });
}

#[test]
fn memos() {
    let (storage, dir) = (MemoryStorage::new(), Path::new("d"));
    storage.create_dir(dir).unwrap();
    let attached = Attached {
        epoch: Epoch(3),
        attach: Uuid::from_u128(9),
        name: "vm1".parse().unwrap(),
        size: ByteCount(1 << 30),
        time: CaptureTime(5),
    };
    memo::write(&storage, dir, &Memo { identity: identity(), attached }).unwrap();
    run_json("disk.json", vec![file(&storage, &dir.join(memo::FILE))], |bytes| {
        let (storage, _) = store(&Path::new("d").join(memo::FILE), bytes);
        let _ = memo::read(&storage, Path::new("d"));
        let _ = (memo::damage_of(&storage, Path::new("d")), memo::is_free(&storage, Path::new("d")));
    });
}

#[test]
fn marks_of_what_is_durable() {
    let (storage, dir) = (MemoryStorage::new(), Path::new("d"));
    storage.create_dir(dir).unwrap();
    drop(Watermark::open(&storage, dir, identity().history, Durable { seq: Seq(7), lsn: Lsn(9) }).unwrap());
    let seal = |bytes: &mut [u8]| {
        if let Some((noted, crc)) = bytes.split_at_mut_checked(60)
            && let Some(crc) = crc.get_mut(..4)
        {
            crc.copy_from_slice(&crc32c::crc32c(noted).to_le_bytes());
        }
    };
    run("durable", 3000, vec![file(&storage, &dir.join(watermark::FILE))], seal, |bytes| {
        let dir = Path::new("d");
        let (storage, _) = store(&dir.join(watermark::FILE), bytes);
        let found = Watermark::find(&storage, dir, identity().history);
        match Watermark::of_any(&storage, dir) {
            Ok(any) => assert_eq!(any.is_none(), Watermark::damage_of(&storage, dir).is_some()),
            Err(error) => {
                assert!(matches!(error, LogError::UnknownVersion { .. }) && found.is_err(), "{error}")
            }
        }
        let _ = inspect_durable(&storage, &dir.join(watermark::FILE), &mut std::io::sink());
    });
}

#[test]
fn notes_of_a_scrub() {
    run_json("scrub.json", scrub::samples(), |bytes| {
        let (storage, shared) = store(Path::new(scrub::FILE), bytes);
        scrub::take(&shared);
        let _ = (scrub::damage_of(&storage), scrub::is_damaged(&storage));
    });
}

#[test]
fn numbers_of_mounts() {
    let storage = MemoryStorage::new();
    let numbers = MountNumbers::open(Arc::new(storage.clone()), CaptureTime(0));
    for name in ["vm1", "vm2", "vm1"] {
        numbers.next(&name.parse().unwrap());
    }
    let most = br#"{"before":18446744073709551615,"last":{"vm1":18446744073709551615}}"#;
    let own = file(&storage, Path::new(mount_numbers::FILE));
    let head = own.iter().position(|byte| *byte == b'\n').unwrap() + 1;
    let mut full = [&own[..head], most, b"\n", &own[own.len() - 22..]].concat();
    reseal(&mut full);
    run_json("mounts.json", vec![own, full], |bytes| {
        let (storage, shared) = store(Path::new(mount_numbers::FILE), bytes);
        let _ = mount_numbers::damage_of(&storage);
        let numbers = MountNumbers::open(shared, CaptureTime(1_772_366_400_000_000));
        let (vm1, vm3): (DiskName, DiskName) = ("vm1".parse().unwrap(), "vm3".parse().unwrap());
        let _ = (numbers.next(&vm1), numbers.next(&vm1), numbers.next(&vm3));
    });
}

#[test]
fn tombstones() {
    let storage = MemoryStorage::new();
    let forgotten = Forgotten::load(Arc::new(storage.clone())).unwrap();
    let stone = |gone| crate::forgotten::Tombstone {
        name: Some("vm1".parse().unwrap()),
        epoch: Epoch(3),
        time: CaptureTime(4),
        gone,
    };
    let path = || Path::new(crate::forgotten::DIR).join(format!("{DISK}.json"));
    let samples = [false, true].map(|gone| {
        forgotten.note(DISK, stone(gone)).unwrap();
        file(&storage, &path())
    });
    run_json("forgotten", samples.to_vec(), |bytes| {
        let (_, shared) = store(&Path::new(crate::forgotten::DIR).join(format!("{DISK}.json")), bytes);
        let forgotten = Forgotten::load(shared).unwrap();
        let _ = (forgotten.going(), forgotten.alarms(), forgotten.is_leaving(DISK));
    });
}

#[test]
fn records_of_overlays() {
    let storage = MemoryStorage::new();
    storage.create_dir(Path::new(record::DIR)).unwrap();
    let disk =
        backtide_receiver_api::DiskRef { name: "vm1".parse().unwrap(), uuid: DISK, size: ByteCount(1 << 30) };
    let overlay = backtide_overlay::OverlayId(Uuid::from_u128(2));
    let samples = [None, Some("nbd+unix:///vm1-1?socket=/run/a.sock".to_owned())].map(|uri| {
        let store = uri.as_ref().map(|_| StorePlace::of(Path::new("/")).unwrap());
        let (id, disk) = ("vm1-1".to_owned(), disk.clone());
        let (lsn, time, created) = (Lsn(3), CaptureTime(4), CaptureTime(5));
        record::write(&storage, &record::Record { id, overlay, disk, lsn, time, created, uri, store })
            .unwrap();
        file(&storage, &record::path("vm1-1"))
    });
    run_json("overlays/ID.json", samples.to_vec(), |bytes| {
        let (storage, _) = store(&record::path("vm1-1"), bytes);
        let _ = record::read(&storage, "vm1-1");
    });
}

#[test]
fn notes_of_a_cut() {
    let (storage, dir) = (MemoryStorage::new(), Path::new("d"));
    storage.create_dir(dir).unwrap();
    Cut { why: "a.seg is missing".to_owned() }.write(&storage, dir).unwrap();
    run_json("cut.json", vec![file(&storage, Path::new("d/cut.json"))], |bytes| {
        let (storage, _) = store(Path::new("d/cut.json"), bytes);
        // Whatever stands there: the log was cut.
        assert!(Cut::read(&storage, Path::new("d")).map_or(true, |cut| cut.is_some()));
        let _ = Cut::damage_of(&storage, Path::new("d"));
    });
}

#[test]
fn notes_of_what_a_store_had_less_of() {
    let (storage, dir) = (MemoryStorage::new(), Path::new("d"));
    storage.create_dir(dir).unwrap();
    shortfalls::sample(&storage, dir);
    run_json("shortfalls.json", vec![file(&storage, &dir.join(shortfalls::FILE))], |bytes| {
        let (storage, shared) = store(&Path::new("d").join(shortfalls::FILE), bytes);
        let _ = shortfalls::damage_of(&storage, Path::new("d"));
        shortfalls::take(shared, Path::new("d"));
        let _ = shortfalls::remove_damaged(&storage, Path::new("d"));
    });
}
