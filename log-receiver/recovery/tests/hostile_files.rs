//! Files made to do harm: any fields, with checksums that are right. They give an error or entries, never a panic, and
//! never take memory beyond what is there.

mod common;

use std::{ops::Range, path::PathBuf, sync::Arc};

use backtide_recovery::{DiskLog, Entry, LogError, LogOptions, Seq, Snapshot, Unreadable, inspect, salvage};
use backtide_storage::{MemoryStorage, Storage};
use backtide_units::{ByteOffset, ByteRange, CaptureTime, Lsn, PayloadChecksum};

use common::{Agent, Random, SayOnPanic, cache, directory, seeds};

const CASES: u64 = 300;

/// A small log of a few segments, sealed and open.
fn files() -> (Vec<(PathBuf, Vec<u8>)>, backtide_recovery::LogOptions) {
    let mut agent = Agent::new(6, MemoryStorage::new()).expect("create");
    agent.attach().expect("attach");
    agent.settle().expect("settle");
    for n in 0..30 {
        agent.write().expect("write");
        if n % 10 == 9 {
            agent.zero().expect("zero");
            agent.log.seal().expect("seal");
        }
        agent.sync().expect("sync");
    }
    (agent.storage.files(), agent.options)
}

fn u32_at(bytes: &[u8], at: usize) -> u32 {
    bytes.get(at..at + 4).map_or(0, |field| u32::from_le_bytes(field.try_into().expect("four bytes")))
}

fn u64_at(bytes: &[u8], at: usize) -> u64 {
    u64::from(u32_at(bytes, at)) | u64::from(u32_at(bytes, at + 4)) << 32
}

/// A part of a file, where its checksum is, and what that starts from.
struct Part {
    bytes: Range<usize>,
    crc_at: usize,
    start: u32,
}

/// The parts of a segment as it was written: header, entries' headers, and those of the footer, the trailer last.
fn parts(bytes: &[u8]) -> Vec<Part> {
    let salt = crc32c::crc32c(&bytes[16..48]);
    let mut parts = vec![Part { bytes: 0..124, crc_at: 124, start: 0 }];
    let trailer = bytes.len().saturating_sub(144);
    let sealed = &bytes[trailer..trailer + 8] == b"BKTDEND\n";
    let end = if sealed { u64_at(bytes, trailer + 96) as usize } else { bytes.len() };
    let mut at = 128;
    while at + 64 <= end && u32_at(bytes, at) != 0 {
        parts.push(Part { bytes: at + 4..at + 64, crc_at: at, start: salt });
        let payload = u32_at(bytes, at + 48) as usize;
        let table = if payload > 65_536 { (payload.div_ceil(65_536) * 4).next_multiple_of(8) } else { 0 };
        at += 64 + table + payload.next_multiple_of(8);
    }
    if sealed {
        let mut at = end;
        for _ in 0..u32_at(bytes, trailer + 104) {
            parts.push(Part { bytes: at..at + 4092, crc_at: at + 4092, start: 0 });
            at += 4096;
        }
        for length_at in [112, 120, 128] {
            let length = u32_at(bytes, trailer + length_at) as usize;
            parts.push(Part { bytes: at..at + length, crc_at: trailer + length_at + 4, start: 0 });
            at += length;
        }
        parts.push(Part { bytes: trailer..trailer + 140, crc_at: trailer + 140, start: salt });
    }
    parts
}

fn read_everything(snapshot: &Snapshot) {
    let intervals = snapshot.timeline().intervals();
    let points = intervals.iter().flat_map(|interval| [interval.from.lsn, interval.to.lsn]);
    for at in points.chain([Lsn::MAX]).take(8) {
        let view = snapshot.newest_view(at);
        let _ = (view.disk_size(), view.read(common::whole()));
        let _ = view.extents(ByteRange::between(ByteOffset(0), ByteOffset(1 << 44)));
        let _ = (snapshot.time_of(at), snapshot.changed_blocks(Lsn(1), at));
        let _ = snapshot.flush_points(at, 10);
    }
    let _ = snapshot.point_at(CaptureTime(1_000_010));
}

fn try_all(files: &[(PathBuf, Vec<u8>)], options: backtide_recovery::LogOptions) {
    let storage = MemoryStorage::new();
    storage.create_dir(&directory().join("segments")).expect("create dir");
    for (path, content) in files {
        storage.create_new(path).expect("create").write_at(ByteOffset(0), content).expect("write");
        let _ = inspect(&storage, path, &mut std::io::sink());
    }
    let shared: Arc<dyn Storage> = Arc::new(storage.clone());
    if let Ok(left) = salvage(&shared, directory(), &cache(), None, None, |_| Seq(0), Unreadable::IsDamage) {
        read_everything(&left.snapshot);
    }
    match DiskLog::open(Arc::new(storage), directory(), options, &cache()) {
        Ok((mut log, _)) => read_everything(&log.snapshot().expect("snapshot")),
        Err(LogError::Damaged { .. } | LogError::UnknownVersion { .. } | LogError::NoLog { .. }) => {}
        Err(error) => panic!("neither readable nor damaged: {error}"),
    }
}

/// Values that overflow, and some that do not.
fn extreme(random: &mut Random) -> u64 {
    let values =
        [0, 1, 7, 0xff, 0xffff, 0x10000, u64::from(u32::MAX), 1 << 32, 1 << 48, 1 << 63, u64::MAX - 1];
    match random.below(12) {
        11 => u64::MAX,
        n => values[n as usize],
    }
}

/// Puts an extreme value into some field of a part, most often of a small one.
fn put_extreme(bytes: &mut [u8], parts: &[Part], random: &mut Random) {
    let count = parts.len() as u64;
    let place = if random.one_in(2) { count - 1 - random.below(6.min(count)) } else { random.below(count) };
    let range = &parts[place as usize].bytes;
    if range.is_empty() {
        return;
    }
    let width = [1, 2, 4, 8][random.below(4) as usize].min(range.len());
    // What counts stands first in most parts.
    let near = if random.one_in(4) { range.len() } else { range.len().min(96) };
    let place = random.below((near / width).max(1) as u64) as usize;
    let at = range.start + place * width;
    bytes[at..at + width].copy_from_slice(&extreme(random).to_le_bytes()[..width]);
}

#[test]
fn any_field_with_a_right_checksum_is_read_without_a_panic() {
    let (mut files, options) = files();
    files.retain(|(path, _)| path.extension().is_some_and(|extension| extension == "seg"));
    let parts: Vec<Vec<Part>> = files.iter().map(|(_, bytes)| parts(bytes)).collect();
    assert!(files.len() > 3 && parts.iter().all(|parts| parts.len() > 2));
    for seed in seeds(CASES) {
        let _say = SayOnPanic(format!("SEED={seed}"));
        let mut random = Random(seed);
        let mut harmed = files.clone();
        for _ in 0..1 + random.below(3) {
            let chosen = random.below(files.len() as u64) as usize;
            let bytes = &mut harmed[chosen].1;
            put_extreme(bytes, &parts[chosen], &mut random);
            for Part { bytes: range, crc_at, start } in &parts[chosen] {
                let crc = crc32c::crc32c_append(*start, &bytes[range.clone()]);
                bytes[*crc_at..crc_at + 4].copy_from_slice(&crc.to_le_bytes());
            }
        }
        try_all(&harmed, options);
    }
}

#[test]
fn an_index_that_points_to_another_entry_is_damage_and_no_panic() {
    let mut agent = Agent::new(6, MemoryStorage::new()).expect("create");
    agent.attach().expect("attach");
    agent.settle().expect("settle");
    agent.log.seal().expect("seal");
    agent.sync().expect("sync");
    // One segment for both.
    agent.options = LogOptions::default();
    agent.reopen().expect("open");
    let before = agent.log.timeline().highest_lsn();
    // Of several pieces, so that what is known of the newer entry is kept; the older one's extents are the same.
    for lsn in 1..3 {
        let payload = bytes::Bytes::from(vec![lsn as u8; 150_000]);
        let checksum = PayloadChecksum::captured(crc32c::crc32c(&payload));
        let range = ByteRange::between(ByteOffset(0), ByteOffset(150_000));
        let (lsn, time) = (Lsn(before.0 + lsn), CaptureTime(9_000_000));
        agent.log.append(Entry::Write { lsn, time, range, payload, checksum }).expect("append");
    }
    agent.log.seal().expect("seal");
    agent.sync().expect("sync");
    let (path, mut bytes) = agent.storage.files().into_iter().max().expect("a segment");
    let trailer = bytes.len() - 144;
    let index = u64_at(&bytes, trailer + 96) as usize;
    let newer = u32_at(&bytes, index + 20);
    for record in 0..u32_at(&bytes, trailer + 108) as usize {
        bytes[index + record * 24 + 20..][..4].copy_from_slice(&newer.to_le_bytes());
    }
    let crc = crc32c::crc32c(&bytes[index..index + 4092]);
    bytes[index + 4092..index + 4096].copy_from_slice(&crc.to_le_bytes());
    agent.storage.open(&path).expect("open").write_at(ByteOffset(0), &bytes).expect("write");
    agent.reopen().expect("open");
    let range = ByteRange::between(ByteOffset(0), ByteOffset(150_000));
    let mut read =
        |lsn: u64| agent.log.snapshot().expect("snapshot").newest_view(Lsn(before.0 + lsn)).read(range);
    assert!(read(2).expect("the newer one is sound").iter().all(|byte| *byte == 2));
    let error = read(1).map(|bytes| bytes.len()).expect_err("the index says what is not so");
    assert!(matches!(error, LogError::Damaged { .. }), "{error}");
}

#[test]
fn an_index_out_of_order_is_damage_and_hides_nothing() {
    let (mut files, options) = files();
    files.retain(|(path, _)| path.extension().is_some_and(|extension| extension == "seg"));
    let index_of = |bytes: &[u8]| {
        let trailer = bytes.len().checked_sub(144).filter(|at| &bytes[*at..at + 8] == b"BKTDEND\n")?;
        (u32_at(bytes, trailer + 108) > 2).then(|| u64_at(bytes, trailer + 96) as usize)
    };
    let (path, index) =
        files.iter().find_map(|(path, bytes)| Some((path.clone(), index_of(bytes)?))).expect("an index");
    // The first two extents change places, in the block alone: then it begins with another key than its fence, and
    // its keys do not ascend.
    let storage = MemoryStorage::new();
    storage.create_dir(&directory().join("segments")).expect("create dir");
    for (name, content) in &mut files {
        if *name == path {
            let (first, second) = content[index..index + 48].split_at_mut(24);
            first.swap_with_slice(second);
            let crc = crc32c::crc32c(&content[index..index + 4092]);
            content[index + 4092..index + 4096].copy_from_slice(&crc.to_le_bytes());
        }
        storage.create_new(name).expect("create").write_at(ByteOffset(0), content).expect("write");
    }
    let (mut log, _) = DiskLog::open(Arc::new(storage), directory(), options, &cache()).expect("open");
    let whole = log.snapshot().expect("snapshot").newest_view(Lsn::MAX).read(common::whole());
    let error = whole.map(|bytes| bytes.len()).expect_err("damage");
    assert!(error.to_string().contains(".seg is damaged at byte"), "{error}");
}
