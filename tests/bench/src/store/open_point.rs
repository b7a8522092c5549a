//! How long it takes to open a point of a disk with millions of records, and what they take in memory.
//!
//! The log is made by the receiver's own writer, not by way of an agent, and is opened as the receiver opens it; the
//! memory is that of a real receiver.

use std::{
    fs::File,
    path::{Path, PathBuf},
    sync::Arc,
    time::Instant,
};

use anyhow::Context;
use backtide_recovery::{
    CacheLimits, DiskLog, Entry, LogCache, LogIdentity, LogOptions, PassReason, Snapshot,
};
use backtide_storage::{RealStorage, Storage};
use backtide_units::{
    ByteCount, ByteOffset, ByteRange, CaptureTime, DiskId, Epoch, HistoryId, Lsn, PayloadChecksum,
};
use bytes::Bytes;
use rustix::fs::{Advice, fadvise};
use uuid::Uuid;

use crate::tracking::{Setting, middle, stand::Stand};

const SIZE: u64 = 1 << 40;

/// Bytes of a write: what it holds has no part in this, so it is as little as a sector.
const WRITE: usize = 512;

/// Records between two syncs.
const BATCH: u64 = 1 << 16;

/// Reads that are timed in a view that is open.
const READS: u64 = 2000;

/// See the module's description.
pub(super) fn run(setting: &Setting<'_>) -> anyhow::Result<String> {
    let directory = setting.place.join("open-point");
    // The store's own file is the receiver's to write, and so is its memory without a log.
    let mut stand = Stand::start(setting.backtide, &directory, true)?;
    stand.obey(&["receiver", "status"])?;
    let empty = stand.receiver_memory()?;
    stand.stop_receiver()?;
    let store = stand.store();
    let disk = DiskId(Uuid::from_u128(0x6f70_656e));
    let place = Path::new("disks").join(disk.to_string());
    let storage: Arc<dyn Storage> = Arc::new(RealStorage::open(&store)?);
    let (bytes, segments) = fill(&storage, &place, disk, setting.records)?;
    let mut times = Times::default();
    for round in 0..setting.rounds as u64 {
        times.round(&storage, &store, &place, setting.records, round)?;
    }
    drop(storage);
    let began = Instant::now();
    stand.start_receiver()?;
    // It listens before it has opened its logs, and answers when it has.
    stand.obey(&["points", "disk"])?;
    let started = began.elapsed().as_secs_f64() * 1e3;
    let full = stand.receiver_memory()?;
    drop(stand);
    std::fs::remove_dir_all(&directory)?;
    let [log, cold, warm, read] = times.0.map(|times| middle(&times));
    Ok(format!(
        "A disk of 1 TiB with {} writes of {WRITE} bytes at random places in its log, {segments} segments of {} MB; a point in the middle, medians of {} rounds. Nothing of the store in memory: the log opened in {log:.0} ms, then a point opened and its first 4 KiB read in {cold:.1} ms. Another point and place later on: {warm:.2} ms. The next 4 KiB, at random: {read:.0} µs. A receiver with that log started in {started:.0} ms and takes {:.1} MiB more than an empty one: {:.2} bytes a record.\n",
        setting.records,
        bytes / 1_000_000,
        setting.rounds,
        (full - empty) / f64::from(1 << 20),
        (full - empty) / setting.records as f64,
    ))
}

/// Milliseconds for the log, for a first point, for another one; microseconds for a read.
#[derive(Default)]
struct Times([Vec<f64>; 4]);

impl Times {
    fn round(
        &mut self,
        storage: &Arc<dyn Storage>,
        store: &Path,
        place: &Path,
        records: u64,
        round: u64,
    ) -> anyhow::Result<()> {
        forget(store)?;
        let cache = LogCache::new(CacheLimits::default());
        let began = Instant::now();
        let (mut log, _) = DiskLog::open(Arc::clone(storage), place, LogOptions::default(), &cache)?;
        let opened = began.elapsed().as_secs_f64() * 1e3;
        let snapshot = log.snapshot()?;
        forget(store)?;
        let mut random = Random(round + 1);
        let mut timed = |part: u64| {
            let (at, range) = (Lsn(records / 5 * part), random.range());
            let began = Instant::now();
            look(&snapshot, at, range)?;
            Ok::<_, anyhow::Error>(began.elapsed().as_secs_f64() * 1e3)
        };
        let (cold, warm) = (timed(3)?, timed(2)?);
        let view = snapshot.view(Lsn(records / 2))?;
        let began = Instant::now();
        for _ in 0..READS {
            view.read(random.range())?;
        }
        let read = began.elapsed().as_secs_f64() * 1e6 / READS as f64;
        eprintln!(
            "open-point: the log {opened:.0} ms, cold {cold:.1} ms, warm {warm:.2} ms, a read {read:.0} µs"
        );
        for (times, time) in self.0.iter_mut().zip([opened, cold, warm, read]) {
            times.push(time);
        }
        Ok(())
    }
}

fn look(snapshot: &Snapshot, at: Lsn, range: ByteRange) -> anyhow::Result<()> {
    let view = snapshot.view(at)?;
    view.read(range)?;
    Ok(())
}

/// Writes the log; gives its bytes and its segments.
fn fill(
    storage: &Arc<dyn Storage>,
    place: &Path,
    disk: DiskId,
    records: u64,
) -> anyhow::Result<(u64, usize)> {
    let identity = LogIdentity { disk, history: HistoryId(Uuid::from_u128(1)) };
    let cache = LogCache::new(CacheLimits::default());
    let mut log = DiskLog::create(Arc::clone(storage), place, identity, LogOptions::default(), &cache)?;
    let time = |lsn: u64| CaptureTime(1_700_000_000_000_000 + lsn * 100);
    log.append(Entry::Attach {
        epoch: Epoch(1),
        attach: Uuid::from_u128(2),
        next_lsn: Lsn(1),
        size: ByteCount(SIZE),
        name: "disk".parse()?,
        time: time(0),
        facts: Default::default(),
    })?;
    let (at, reason) = (Lsn(1), PassReason { code: 1, text: "the first".to_owned() });
    log.append(Entry::PassBegin { at, gap_from: Lsn(0), time: time(1), reason })?;
    log.append(Entry::PassEnd { at, valid_from: Some(at), time: time(1) })?;
    let mut random = Random(7);
    let payload = Bytes::from(vec![0x5a; WRITE]);
    let checksum = PayloadChecksum::of(&payload);
    for lsn in 2..records + 2 {
        let start = random.range().start();
        let range = ByteRange::new(start, ByteCount(WRITE as u64)).context("a range")?;
        let (payload, checksum) = (payload.clone(), checksum.clone());
        log.append(Entry::Write { lsn: Lsn(lsn), time: time(lsn), range, payload, checksum })?;
        if lsn.is_multiple_of(BATCH) {
            sync(&mut log)?;
        }
    }
    log.seal()?;
    for _ in 0..3 {
        sync(&mut log)?;
    }
    Ok((log.size().0, log.segment_count()))
}

fn sync(log: &mut DiskLog) -> anyhow::Result<()> {
    if let Some(ticket) = log.ticket()? {
        log.synced(ticket.sync())?;
    }
    Ok(())
}

/// Takes the store's files out of the page cache.
fn forget(store: &Path) -> anyhow::Result<()> {
    for path in files(store)? {
        let file = File::open(&path)?;
        file.sync_all()?;
        fadvise(&file, 0, None, Advice::DontNeed)?;
    }
    Ok(())
}

fn files(directory: &Path) -> anyhow::Result<Vec<PathBuf>> {
    let mut found = Vec::new();
    for entry in std::fs::read_dir(directory)? {
        let entry = entry?;
        match entry.file_type()? {
            kind if kind.is_dir() => found.extend(files(&entry.path())?),
            kind if kind.is_file() => found.push(entry.path()),
            _ => {}
        }
    }
    Ok(found)
}

/// Xorshift.
struct Random(u64);

impl Random {
    /// 4 KiB somewhere.
    fn range(&mut self) -> ByteRange {
        for shift in [13_i32, -7, 17] {
            let shifted = if shift > 0 { self.0 << shift } else { self.0 >> -shift };
            self.0 ^= shifted;
        }
        let start = ByteOffset(self.0.wrapping_mul(0x2545_f491_4f6c_dd1d) % (SIZE / 4096) * 4096);
        ByteRange::between(start, ByteOffset(start.0 + 4096))
    }
}
