//! How long it takes to open a point of a disk with millions of records, and what they take in memory.
//!
//! The log is opened as the receiver opens it, and cold is what follows right after that; the memory is that of a real receiver.

use std::{path::Path, sync::Arc, time::Instant};

use backtide_recovery::{CacheLimits, DiskLog, LogCache, LogOptions, Snapshot};
use backtide_storage::Storage;
use backtide_units::{ByteRange, Lsn};

use super::long_log::{self, LongLog, Random, WRITE, forget};
use crate::tracking::{Setting, middle, stand::Stand};

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
    let LongLog { storage, place, bytes, segments } = long_log::fill(&store, setting.records)?;
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
