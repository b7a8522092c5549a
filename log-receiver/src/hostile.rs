//! The small files of a store against mutations of what is right: they are understood or damaged, and nothing panics.

mod sealed;

use std::{path::Path, sync::Arc};

use backtide_fuzz::{Random, mutate};
use backtide_recovery::{Attached, Durable, LogIdentity};
use backtide_segment::Seq;
use backtide_storage::{MemoryStorage, Storage, read_file, replace_file};
use backtide_units::{ByteCount, CaptureTime, DiskId, Epoch, HistoryId, Lsn};
use uuid::Uuid;

use crate::{
    findings::{self, Findings},
    memo::{self, Memo},
    retention::{self, Lock, Policies},
    store_file,
    watermark::{self, Watermark},
};

const SEEDS: u64 = 1500;

/// Takes every mutation of a file that is right.
fn try_file(name: &Path, storage: &MemoryStorage, take: impl Fn(&MemoryStorage)) {
    let right = read_file(storage, name, ByteCount(1 << 20)).expect("a file");
    let seeds = match std::env::var("SEED") {
        Ok(seed) => vec![seed.parse().expect("SEED is a number")],
        Err(_) => (0..SEEDS).collect(),
    };
    for seed in seeds {
        let bytes = mutate(std::slice::from_ref(&right), &mut Random(seed));
        replace_file(storage, name, &bytes).expect("write");
        eprintln!("{} with SEED={seed}", name.display());
        take(storage);
    }
}

fn identity() -> LogIdentity {
    LogIdentity { disk: DiskId(Uuid::from_u128(1)), history: HistoryId(Uuid::from_u128(2)) }
}

#[test]
fn policies_and_locks() {
    let storage = MemoryStorage::new();
    let policies = Policies::open(Arc::new(storage.clone()), "any=9d".parse().unwrap());
    let disk = identity().disk;
    let lock = Lock::new(CaptureTime(u64::MAX / 2), policies.moment()).unwrap();
    policies.change(disk, |policy| policy.ladder = Some("any=1h per-10m=2d".parse().unwrap())).unwrap();
    policies.add_lock(disk, Some((Lsn(7), CaptureTime(8))), lock).unwrap();
    try_file(Path::new("retention.json"), &storage, |storage| {
        let found = Policies::open(Arc::new(storage.clone()), "any=9d".parse().unwrap());
        // A file that is not whole lets nothing go.
        assert!(found.damage().is_some() || found.of(disk) == policies.of(disk));
        let _ = retention::damage_of(storage);
    });
}

#[test]
fn findings_of_damage() {
    let storage = MemoryStorage::new();
    let disk = identity().disk;
    Findings::open(Arc::new(storage.clone())).of_life(disk).note("a.seg is damaged at byte 7", None);
    let right = Findings::open(Arc::new(storage.clone())).of(disk);
    assert_eq!((right.len(), right[0].damage.as_str()), (1, "a.seg is damaged at byte 7"));
    try_file(Path::new("findings.json"), &storage, |storage| {
        let found = Findings::open(Arc::new(storage.clone())).of(disk);
        assert!(findings::damage_of(storage).is_some() || found == right, "{found:?}");
    });
}

#[test]
fn the_stores_own_file() {
    let storage = MemoryStorage::new();
    let shared: Arc<dyn Storage> = Arc::new(storage.clone());
    let id = store_file::open_store(&shared).unwrap();
    try_file(Path::new("store.json"), &storage, |_| {
        assert!(store_file::read_store(&shared).map_or(true, |found| found == id));
    });
}

#[test]
fn what_stands_beside_a_log() {
    let (storage, dir) = (MemoryStorage::new(), Path::new("d"));
    storage.create_dir(dir).unwrap();
    let attached = Attached {
        epoch: Epoch(3),
        attach: Uuid::from_u128(9),
        name: "vm1".parse().unwrap(),
        size: ByteCount(1 << 30),
        time: CaptureTime(5),
    };
    let right = Memo { identity: identity(), attached };
    memo::write(&storage, dir, &right).unwrap();
    try_file(&dir.join(memo::FILE), &storage, |storage| {
        let found = memo::read(storage, dir);
        assert!(found.as_ref().is_none_or(|found| *found == right), "{found:?}");
        assert_eq!(memo::damage_of(storage, dir).is_some(), found.is_none());
    });
    let durable = Durable { seq: Seq(7), lsn: Lsn(9) };
    drop(Watermark::open(&storage, dir, identity().history, durable).unwrap());
    try_file(&dir.join(watermark::FILE), &storage, |storage| {
        let found = Watermark::find(storage, dir, identity().history).unwrap();
        let any = Watermark::of_any(storage, dir).unwrap().map(|(_, noted)| noted);
        assert!(found.is_none() || any.is_some());
        for noted in [found, any].into_iter().flatten() {
            assert_eq!(noted.durable, durable);
        }
        let _ = Watermark::open(storage, dir, identity().history, durable);
    });
}
