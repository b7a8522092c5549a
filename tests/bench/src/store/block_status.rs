//! How long it takes to say where a disk has data, with millions of small writes all over it: all at once, which walks
//! through each segment's index once, and in small parts, which asks the segments for each bucket as reads do.

use std::{sync::Arc, time::Instant};

use backtide_recovery::{CacheLimits, DiskLog, LogCache, LogOptions, View};
use backtide_units::{ByteCount, ByteOffset, ByteRange, Lsn};

use super::long_log::{self, LongLog, SIZE};
use crate::tracking::{Setting, middle};

/// What is told in small parts too.
const SAMPLE: ByteCount = ByteCount(4 << 30);

/// A small part.
const PART: ByteCount = ByteCount(1 << 20);

/// See the module's description.
pub(super) fn run(setting: &Setting<'_>) -> anyhow::Result<String> {
    let store = setting.place.join("block-status");
    std::fs::create_dir_all(&store)?;
    let LongLog { storage, place, segments, .. } = long_log::fill(&store, setting.records)?;
    let (mut ratios, mut parts, mut once, mut whole) = (Vec::new(), Vec::new(), Vec::new(), Vec::new());
    for round in 0..setting.rounds as u64 {
        let cache = LogCache::new(CacheLimits::default());
        let (mut log, _) = DiskLog::open(Arc::clone(&storage), &place, LogOptions::default(), &cache)?;
        let view = log.snapshot()?.view(Lsn(setting.records / 2))?;
        let start = SIZE / (setting.rounds as u64 + 1) * (round + 1) / PART.0 * PART.0;
        let sample = ByteRange::between(ByteOffset(start), ByteOffset(start + SAMPLE.0));
        // Whoever comes first reads the indexes from the device.
        told(&view, &[sample])?;
        let (at_once, extents) = told(&view, &[sample])?;
        let (in_parts, same) = told(&view, &sample.split_at_multiples(PART).collect::<Vec<_>>())?;
        anyhow::ensure!(same >= extents, "fewer extents in small parts");
        let (all, _) = told(&view, &[ByteRange::between(ByteOffset(0), ByteOffset(SIZE))])?;
        eprintln!(
            "block-status: 4 GiB {at_once:.1} ms, in parts {in_parts:.1} ms, {extents} extents; all of it {all:.0} ms"
        );
        ratios.push(in_parts / at_once);
        parts.push(in_parts);
        once.push(at_once);
        whole.push(all);
    }
    drop(storage);
    std::fs::remove_dir_all(&store)?;
    Ok(format!(
        "A disk of 1 TiB with {} writes of 512 bytes at random places in its log of {segments} segments, a point in the middle: where 4 GiB of it have data is told in {:.1} ms at once, in {:.1} ms in parts of 1 MiB, {:.1} times as long; all of the disk at once in {:.0} ms. Medians of {} rounds.\n",
        setting.records,
        middle(&once),
        middle(&parts),
        middle(&ratios),
        middle(&whole),
        setting.rounds
    ))
}

/// Milliseconds that it takes, and how many extents there are.
fn told(view: &View, ranges: &[ByteRange]) -> anyhow::Result<(f64, usize)> {
    let began = Instant::now();
    let mut extents = 0;
    for range in ranges {
        extents += view.extents(*range)?.len();
    }
    Ok((began.elapsed().as_secs_f64() * 1e3, extents))
}
