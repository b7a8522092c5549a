//! How long a rewind keeps a guest from writing, and how long until the image is whole again, beside `nbdcopy`.

use std::{
    path::Path,
    process::Command,
    sync::atomic::{AtomicBool, Ordering},
    time::{Duration, Instant},
};

use anyhow::Context;
use backtide_e2e::{Guest, http};
use serde_json::json;

use crate::{
    servers::{Kind, Server, succeed},
    tracking::{Setting, middle, stand::Stand},
};

const GIB: u64 = 1 << 30;

/// What is written at a time, at places that are spread over the disk.
const PIECE: u64 = 64 << 10;

/// Reads of blocks that are missing, while they are.
const READ: usize = 4096;

/// How often a guest looks whether its disk is there, in good times.
const BEAT: Duration = Duration::from_millis(2);

/// One rewind.
struct Round {
    /// From the request to the first write that a guest has acknowledged, in seconds.
    until_written: f64,
    /// From the last request that was answered before to that one, in seconds.
    without_service: f64,
    /// From the request until nothing is missing, in seconds.
    until_whole: f64,
    /// Milliseconds, ascending.
    reads: Vec<f64>,
}

/// A part of a sparse disk is written twice; the disk goes back to the first state, then to the second, and so on. A guest
/// is hung up on at each and connects again at once.
pub(super) fn run(setting: &Setting<'_>) -> anyhow::Result<String> {
    let (size, changed) = if setting.small { (8 * GIB, GIB / 16) } else { (100 * GIB, GIB) };
    let directory = setting.place.join("rewind");
    std::fs::create_dir_all(&directory)?;
    let image = directory.join("disk.raw");
    std::fs::File::create(&image)?.set_len(size)?;
    let stand = Stand::start(setting.backtide, &directory, true)?;
    stand.attach(&image, &[])?;
    stand.wait_for_sync()?;
    let places: Vec<u64> = places(size, changed).collect();
    let mut states = Vec::new();
    for state in 1..=2 {
        fill(&stand.uri(), &places, state)?;
        stand.obey(&["wait", "disk", "--for", "durable", "--timeout", "30m"])?;
        states.push(stand.status()?["lsn"]["last"].as_u64().context("an LSN")?);
    }
    let mut to = states[0];
    let (mut rounds, mut copies) = (Vec::new(), Vec::new());
    for nth in 0..setting.rounds {
        copies.push(copy(setting, &directory, changed)?);
        let (round, from) = rewind(&stand, &directory, to, &places, size)?;
        to = from;
        eprintln!(
            "rewind: round {nth}: {:.3} s until written, {:.3} s without service, {:.1} s until whole, {} reads, nbdcopy {:.1} s",
            round.until_written,
            round.without_service,
            round.until_whole,
            round.reads.len(),
            copies[nth]
        );
        rounds.push(round);
        stand.wait_for_sync()?;
        stand.obey(&["wait", "disk", "--for", "durable", "--timeout", "30m"])?;
    }
    drop(stand);
    std::fs::remove_dir_all(&directory)?;
    let of = |figure: fn(&Round) -> f64| middle(&rounds.iter().map(figure).collect::<Vec<_>>());
    let (whole, copied) = (of(|round| round.until_whole), middle(&copies));
    Ok(format!(
        "A disk of {} GiB of which {} MiB changed, in pieces of 64 KiB all over it: {:.2} s from the request to a rewind until a guest that is hung up on has written again, {:.2} s since it was answered last; nothing missing after {whole:.1} s, `nbdcopy --flush` of as much from `nbdkit` to a file {copied:.1} s: {:.2} times as long. Meanwhile reads of 4 KiB that are missing, one at a time: p50 {:.1} ms, p99 {:.1} ms. Medians of {} rounds.\n",
        size / GIB,
        changed >> 20,
        of(|round| round.until_written),
        of(|round| round.without_service),
        whole / copied,
        of(|round| percentile(&round.reads, 50)),
        of(|round| percentile(&round.reads, 99)),
        setting.rounds
    ))
}

/// Where it is written, in an order that is no order of the disk.
fn places(size: u64, changed: u64) -> impl Iterator<Item = u64> {
    let count = changed / PIECE;
    let apart = size / count / PIECE * PIECE;
    // Without a divisor in common with any power of two.
    (0..count).map(move |nth| (nth * 7919 % count) * apart)
}

fn fill(uri: &str, places: &[u64], state: u8) -> anyhow::Result<()> {
    let mut guest = Guest::try_connect(uri)?;
    let mut piece = vec![0; PIECE as usize];
    for (nth, place) in (0_u64..).zip(places) {
        // No two pieces are alike.
        for (at, word) in (0_u64..).zip(piece.chunks_exact_mut(8)) {
            word.copy_from_slice(&(nth << 20 | at << 2 | u64::from(state)).to_le_bytes());
        }
        guest.write(*place, &piece)?;
    }
    guest.flush()?;
    Ok(())
}

/// Sets the disk back to `to`; what was measured, and where it was before.
fn rewind(
    stand: &Stand,
    directory: &Path,
    to: u64,
    places: &[u64],
    size: u64,
) -> anyhow::Result<(Round, u64)> {
    let uri = stand.uri();
    let asked = AtomicBool::new(false);
    let (began, from, guest) = std::thread::scope(|scope| {
        let guest = scope.spawn(|| guest_meanwhile(&uri, places[0] + PIECE, &asked));
        while !asked.load(Ordering::Acquire) {
            std::thread::sleep(BEAT);
        }
        let began = Instant::now();
        let body = json!({ "to": to, "reconnect": true });
        let report = http::call(&directory.join("agent.sock"), "POST", "/v1/disks/disk/rewind", Some(&body));
        (began, report["from"].as_u64(), guest.join().expect("the guest does not panic"))
    });
    let Meanwhile { answered, written } = guest?;
    let mut guest = Guest::try_connect(&uri)?;
    let mut reads = Vec::new();
    let mut buffer = [0; READ];
    let mut places: Vec<u64> = places.to_vec();
    // From the end on: what comes in the background comes from the beginning.
    places.sort_unstable();
    for place in places.iter().rev().filter(|place| **place + PIECE < size) {
        let read = Instant::now();
        guest.read(*place, &mut buffer)?;
        reads.push(read.elapsed().as_secs_f64() * 1e3);
        if reads.len().is_multiple_of(16) && stand.status()?["hydration"].is_null() {
            break;
        }
    }
    while !stand.status()?["hydration"].is_null() {
        std::thread::sleep(BEAT);
    }
    let until_whole = began.elapsed().as_secs_f64();
    reads.sort_by(f64::total_cmp);
    let round = Round {
        until_written: written.duration_since(began).as_secs_f64(),
        without_service: written.duration_since(answered).as_secs_f64(),
        until_whole,
        reads,
    };
    Ok((round, from.context("an LSN")?))
}

/// What a guest saw of a rewind.
struct Meanwhile {
    answered: Instant,
    written: Instant,
}

/// A guest that reads now and then until it is hung up on, connects again at once and writes.
fn guest_meanwhile(uri: &str, at: u64, ready: &AtomicBool) -> anyhow::Result<Meanwhile> {
    let guest = Guest::try_connect(uri);
    // Also when there is none: somebody waits for it.
    ready.store(true, Ordering::Release);
    let mut guest = guest?;
    let mut buffer = [0; READ];
    let mut answered = Instant::now();
    while guest.read(at, &mut buffer).is_ok() {
        answered = Instant::now();
        std::thread::sleep(BEAT);
    }
    loop {
        let written = Guest::try_connect(uri).and_then(|mut guest| guest.write(at, &[7; READ]));
        if written.is_ok() {
            return Ok(Meanwhile { answered, written: Instant::now() });
        }
    }
}

/// Seconds that `nbdcopy` takes for so much to a new file.
fn copy(setting: &Setting<'_>, directory: &Path, bytes: u64) -> anyhow::Result<f64> {
    let (plain, output) = (directory.join("plain"), directory.join("copy.raw"));
    let server = Server::start(Kind::NbdkitFile, &plain, setting.backtide, bytes >> 20)?;
    let mut command = Command::new("nbdcopy");
    command.arg("--flush").arg(server.uri()).arg(&output);
    let began = Instant::now();
    succeed(&mut command)?;
    let took = began.elapsed().as_secs_f64();
    server.stop()?;
    std::fs::remove_file(output)?;
    std::fs::remove_dir_all(plain)?;
    Ok(took)
}

fn percentile(ascending: &[f64], percent: usize) -> f64 {
    let Some(last) = ascending.len().checked_sub(1) else { return f64::NAN };
    ascending[last * percent / 100]
}
