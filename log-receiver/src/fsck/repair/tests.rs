//! A repair whose power is cut at every step: the next one ends it, and it is as if there had been one.

use backtide_recovery::{Entry, LogCache, LogIdentity, LogOptions, PassReason};
use backtide_segment::AttachFacts;
use backtide_storage::MemoryStorage;
use backtide_units::{ByteOffset, ByteRange, CaptureTime, Epoch, HistoryId, Lsn};
use bytes::Bytes;
use uuid::Uuid;

use crate::findings::Findings;

mod again;
mod doubt;
mod marks;
mod repeated;

use super::*;

const IDENTITY: LogIdentity =
    LogIdentity { disk: DiskId(Uuid::from_u128(1)), history: HistoryId(Uuid::from_u128(2)) };

fn attach(epoch: u64, next_lsn: u64) -> Entry {
    Entry::Attach {
        epoch: Epoch(epoch),
        attach: Uuid::from_u128(epoch.into()),
        next_lsn: Lsn(next_lsn),
        size: ByteCount(1 << 20),
        name: "vm1".parse().unwrap(),
        time: CaptureTime(next_lsn),
        facts: AttachFacts::default(),
    }
}

fn write(lsn: u64) -> Entry {
    let payload = Bytes::from(vec![lsn as u8; 4096]);
    let range = ByteRange::new(ByteOffset(lsn % 16 * 4096), ByteCount(4096)).unwrap();
    let checksum = backtide_units::PayloadChecksum::of(&payload);
    Entry::Write { lsn: Lsn(lsn), time: CaptureTime(lsn), range, payload, checksum }
}

/// How a log begins: its disk is attached, and read once.
fn first_pass() -> [Entry; 3] {
    let (at, time) = (Lsn(5), CaptureTime(5));
    let reason = PassReason { code: 1, text: "first".to_owned() };
    [
        attach(1, 1),
        Entry::PassBegin { at, gap_from: Lsn(0), time, reason },
        Entry::PassEnd { at, valid_from: Some(at), time },
    ]
}

fn sync(log: &mut DiskLog) {
    if let Some(ticket) = log.ticket().unwrap() {
        log.synced(ticket.sync()).unwrap();
    }
}

fn sync_all(log: &mut DiskLog) {
    while log.durable().seq < log.appended() {
        sync(log);
    }
}

/// A store with one log of many segments, whose entries say of each other that they are durable, or not.
fn whole(synced_each: bool) -> MemoryStorage {
    let storage = MemoryStorage::new();
    let shared: Arc<dyn Storage> = Arc::new(storage.clone());
    write_store(&shared).unwrap();
    let dir = Shelf::dir(IDENTITY.disk, 1);
    let options = LogOptions { segment_bytes_max: ByteCount(20_000), ..LogOptions::default() };
    let cache = LogCache::new(Default::default());
    let mut log = DiskLog::create(Arc::clone(&shared), &dir, IDENTITY, options, &cache).unwrap();
    for entry in
        first_pass().into_iter().chain((6..=40).map(write)).chain([attach(7, 90)]).chain((90..=95).map(write))
    {
        log.append(entry).unwrap();
        if synced_each {
            sync(&mut log);
        }
    }
    sync_all(&mut log);
    let noted = Noted::whole(log.durable());
    Watermark::replace(&storage, &dir, IDENTITY.history, noted).unwrap();
    drop(log);
    storage
}

/// The same without the third segment; the fence and the highest LSN lie behind it.
fn damaged() -> MemoryStorage {
    let (storage, dir) = (whole(true), Shelf::dir(IDENTITY.disk, 1));
    storage.remove(&dir.join("segments").join(SegmentId(3).file_name())).unwrap();
    storage.sync_dir(&dir.join("segments")).unwrap();
    storage
}

/// The segment files of a store, with where they are.
fn segments(storage: &MemoryStorage) -> Vec<(PathBuf, Vec<u8>)> {
    let mut files = storage.files();
    files.retain(|(path, _)| path.to_string_lossy().contains(".seg"));
    files
}

fn last_segment(storage: &MemoryStorage) -> PathBuf {
    let files = storage.files().into_iter().map(|(path, _)| path);
    files.filter(|path| path.extension().is_some_and(|name| name == "seg")).max().unwrap()
}

/// A store whose last segment is nothing any more: only what is noted beside the log tells that it was durable.
fn without_an_end() -> MemoryStorage {
    let storage = whole(false);
    let file = storage.open(&last_segment(&storage)).unwrap();
    let length = file.len().unwrap().0 as usize;
    file.write_at(ByteOffset(0), &vec![0xee; length]).unwrap();
    file.sync_data().unwrap();
    storage
}

/// As [`damaged`], with a mark of long ago: only what is cut off tells how far LSNs had come.
fn with_an_old_mark() -> MemoryStorage {
    let (storage, dir) = (damaged(), Shelf::dir(IDENTITY.disk, 1));
    let old = Noted::whole(Durable { seq: backtide_recovery::Seq(3), lsn: Lsn(5) });
    Watermark::replace(&storage, &dir, IDENTITY.history, old).unwrap();
    storage
}

fn run(storage: &MemoryStorage, what: Repair) -> Result<StoreCheck, StoreFileError> {
    let shared: Arc<dyn Storage> = Arc::new(storage.clone());
    repair_store(Path::new("store"), &shared, what, &mut |_| {})
}

fn shelf(storage: &MemoryStorage) -> Shelf {
    let shared: Arc<dyn Storage> = Arc::new(storage.clone());
    reading(&shared, Forgotten::load(Arc::clone(&shared)).unwrap())
}

/// What a receiver finds.
fn found(storage: &MemoryStorage) -> (String, Option<Memo>, Lsn, bool) {
    let shelf = shelf(storage);
    let salvaged = shelf.salvage(IDENTITY.disk, 1, None).unwrap();
    assert_eq!(salvaged.damage, Vec::<String>::new());
    let timeline = salvaged.snapshot.timeline();
    let refused = matches!(shelf.open(IDENTITY.disk, 1), Err(LogError::Damaged { .. }));
    let points = format!("{:?} {:?}", timeline.intervals(), timeline.holes());
    (points, shelf.memo(IDENTITY.disk, 1), timeline.highest_lsn(), refused)
}

#[test]
fn a_power_cut_at_any_step_of_a_repair_costs_nothing() {
    for before in [damaged(), without_an_end(), with_an_old_mark()] {
        cut_at_every_step(&before, Lsn(95), |_| {});
    }
}

/// LSNs had come to `reached`, as far as anything tells. `fault` is of the device, which a copy does not have.
fn cut_at_every_step(before: &MemoryStorage, reached: Lsn, fault: impl Fn(&MemoryStorage)) {
    let once = before.copy();
    fault(&once);
    let report = run(&once, Repair::Everything).unwrap();
    assert!(report.sound && report.disks[0].cut.len() == 1, "{report:?}");
    let expected = found(&once);
    let (_, memo, highest, refused) = &expected;
    assert_eq!(
        memo.as_ref().map(|memo| memo.attached.epoch),
        Some(Epoch(7)),
        "the fence of what was cut off"
    );
    assert_eq!((*highest, *refused), (reached, true));
    let mut cuts = 0;
    loop {
        let storage = before.copy();
        fault(&storage);
        storage.cut_power_after(cuts);
        let first = run(&storage, Repair::Everything);
        let ended = !storage.is_off();
        assert!(ended || first.is_err() || first.is_ok_and(|report| !report.sound), "cut {cuts}");
        storage.crash(cuts);
        let report = run(&storage, Repair::Everything).unwrap();
        assert!(report.sound, "cut {cuts}: {report:?}");
        assert_eq!(found(&storage), expected, "cut {cuts}");
        if ended {
            break;
        }
        cuts += 1;
    }
    assert!(cuts > 10, "{cuts} steps");
}

#[test]
fn a_rebuild_leaves_a_log_that_lost_something_as_it_is() {
    let storage = damaged();
    let before = storage.files();
    let report = run(&storage, Repair::Rebuild).unwrap();
    assert!(!report.sound && report.disks[0].cut.is_empty(), "{report:?}");
    let mut after = storage.files();
    after.retain(|(path, _)| before.iter().any(|(known, _)| known == path));
    assert_eq!(after, before);
}

#[test]
fn what_the_device_cannot_read_is_an_error_and_nothing_is_cut() {
    let storage = whole(true);
    let segment = last_segment(&storage);
    let page = ByteRange::new(ByteOffset(4096), ByteCount(512)).unwrap();
    storage.make_unreadable(&segment, page);
    let before = storage.files();
    let report = run(&storage, Repair::Everything).unwrap();
    assert!(report.disks[0].error.is_some() && report.disks[0].cut.is_empty(), "{report:?}");
    let mut after = storage.files();
    // What was found is noted.
    after.retain(|(path, _)| path != Path::new(findings::FILE));
    assert!(after == before, "{:?}", after.iter().map(|(path, _)| path).collect::<Vec<_>>());
}

/// Puts into a store what only a newer program can have noted of damage, and gives it.
fn note_as_a_newer_program(storage: &MemoryStorage) -> Vec<u8> {
    let newer = b"{\"magic\":\"backtide-findings\",\"version\":2}\n{}\n";
    let seal = format!("{{\"crc32c\":\"{:08x}\"}}\n", crc32c::crc32c(newer));
    let content = [&newer[..], seal.as_bytes()].concat();
    backtide_storage::replace_file(storage, Path::new(findings::FILE), &content).unwrap();
    content
}

#[test]
fn what_a_newer_program_wrote_stays() {
    let storage = damaged();
    let content = note_as_a_newer_program(&storage);
    let report = run(&storage, Repair::Everything).unwrap();
    assert!(report.damage.iter().any(|damage| damage.contains("has version 2")), "{report:?}");
    assert!(report.repaired.is_empty(), "{report:?}");
    assert!(
        storage.files().iter().any(|(path, found)| path == Path::new(findings::FILE) && *found == content)
    );
}
