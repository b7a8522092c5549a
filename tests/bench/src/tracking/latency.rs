//! What a resync of the whole disk at full speed costs the guest, and how fast it is.

use std::{fmt::Write, path::Path, process::Command, time::Instant};

use anyhow::bail;

use super::{
    Setting,
    guest::{Guest, Seen},
    middle,
    stand::Stand,
};
use crate::servers::image;

const MIB: u64 = 1024;

const PATTERNS: [&str; 2] = ["randwrite", "randread"];

/// What one round brought for one pattern.
struct Round {
    without: Seen,
    during: Seen,
    /// While `nbdcopy` reads the image and writes the copy.
    beside_copy: Seen,
    drain: f64,
    drain_alone: f64,
    copy: f64,
    copy_beside: f64,
}

/// See the module's description.
pub(super) fn run(setting: &Setting<'_>) -> anyhow::Result<String> {
    let directory = setting.place.join("resync-latency");
    std::fs::create_dir_all(&directory)?;
    let image = image(&directory, "disk.raw", MIB)?;
    let mut text = format!(
        "4 KiB requests, QD 1, over a disk of {MIB} MiB that is sent whole (`backtide resync --full`); `nbdcopy --flush` copies the image to a new file beside it; each once alone and once with the same guest beside it. Medians of {} rounds.\n\n| guest | p99 without | p99 during | ratio | p99 beside nbdcopy | drain alone | nbdcopy alone | ratio | drain beside the guest | ratio to nbdcopy alone | nbdcopy beside the guest | ratio |\n|---|---|---|---|---|---|---|---|---|---|---|---|\n",
        setting.rounds
    );
    for pattern in PATTERNS {
        let mut rounds = Vec::new();
        for round in 0..setting.rounds {
            let place = directory.join(format!("{pattern}-{round}"));
            let measured = measure(setting, &place, &image, pattern)?;
            std::fs::remove_dir_all(&place)?;
            eprintln!(
                "resync-latency {pattern}: p50 {:.0} -> {:.0} us, p99 {:.0} -> {:.0} us (beside nbdcopy {:.0}), longest {:.0} -> {:.0} us, {:.0} and beside the guest {:.0} MB/s, nbdcopy {:.0} and {:.0} MB/s",
                measured.without.p50_us,
                measured.during.p50_us,
                measured.without.p99_us,
                measured.during.p99_us,
                measured.beside_copy.p99_us,
                measured.without.longest_us,
                measured.during.longest_us,
                measured.drain_alone / 1e6,
                measured.drain / 1e6,
                measured.copy / 1e6,
                measured.copy_beside / 1e6
            );
            rounds.push(measured);
        }
        let of = |value: fn(&Round) -> f64| middle(&rounds.iter().map(value).collect::<Vec<_>>());
        writeln!(
            text,
            "| {pattern} | {:.0} µs | {:.0} µs | {:.2} | {:.0} µs | {:.0} MB/s | {:.0} MB/s | {:.2} | {:.0} MB/s | {:.2} | {:.0} MB/s | {:.2} |",
            of(|round| round.without.p99_us),
            of(|round| round.during.p99_us),
            of(|round| round.during.p99_us / round.without.p99_us),
            of(|round| round.beside_copy.p99_us),
            of(|round| round.drain_alone / 1e6),
            of(|round| round.copy / 1e6),
            of(|round| round.drain_alone / round.copy),
            of(|round| round.drain / 1e6),
            of(|round| round.drain / round.copy),
            of(|round| round.copy_beside / 1e6),
            of(|round| round.drain / round.copy_beside),
        )?;
    }
    std::fs::remove_dir_all(&directory)?;
    Ok(text)
}

fn measure(
    setting: &Setting<'_>,
    place: &Path,
    image: &Path,
    pattern: &'static str,
) -> anyhow::Result<Round> {
    let stand = Stand::start(setting.backtide, place, true)?;
    stand.attach(image, &[])?;
    stand.wait_for_sync()?;
    let runtime = format!("--runtime={}", setting.seconds);
    let without = start(&stand, pattern, &runtime)?.end()?;
    stand.wait_for_sync()?;
    let guest = start(&stand, pattern, "--runtime=600")?;
    let copy_beside = copy(image, &place.join("copy.raw"))?;
    let beside_copy = guest.stop()?;
    stand.wait_for_sync()?;
    let guest = start(&stand, pattern, "--runtime=600")?;
    let drain = drain(&stand)?;
    let during = guest.stop()?;
    stand.wait_for_sync()?;
    let drain_alone = self::drain(&stand)?;
    let copy = copy(image, &place.join("copy.raw"))?;
    Ok(Round { without, during, beside_copy, drain, drain_alone, copy, copy_beside })
}

/// Bytes a second of a resync of the whole disk.
fn drain(stand: &Stand) -> anyhow::Result<f64> {
    let began = Instant::now();
    stand.obey(&["resync", "disk", "--full", "--wait"])?;
    Ok((MIB << 20) as f64 / began.elapsed().as_secs_f64())
}

fn start(stand: &Stand, pattern: &'static str, runtime: &str) -> anyhow::Result<Guest> {
    Guest::start(&stand.uri(), pattern, MIB, &["--time_based", "--norandommap", "--iodepth=1", runtime])
}

/// Bytes a second.
fn copy(image: &Path, to: &Path) -> anyhow::Result<f64> {
    let began = Instant::now();
    if !Command::new("nbdcopy").arg("--flush").arg(image).arg(to).status()?.success() {
        bail!("nbdcopy does not copy the image");
    }
    let took = began.elapsed();
    std::fs::remove_file(to)?;
    Ok((MIB << 20) as f64 / took.as_secs_f64())
}
