//! How fast one disk's writes become durable at the receiver, beside a file that is written around the page cache.

use std::{
    fmt::Write,
    path::Path,
    process::Command,
    time::{Duration, Instant},
};

use anyhow::Context;
use backtide_protocol::Data;
use serde_json::Value;

use super::{peer::Peer, receiver::Receiver, thousand::payload_of};
use crate::tracking::{Setting, middle};

/// As the receiver does it for a stream that nobody waits for: flushed when so many MiB have come.
const FLUSH_MIB: usize = 4;

/// What one round of the receiver brought.
struct Round {
    writes_per_second: f64,
    /// Bytes of the log per byte of payload.
    log: f64,
    /// Bytes written to the device per byte of payload.
    device: f64,
    /// Time of processors per write.
    cpu_us: f64,
}

/// See the module's description.
pub(super) fn run(setting: &Setting<'_>) -> anyhow::Result<String> {
    let directory = setting.place.join("ingest");
    let (mut large, mut small, mut files) = (Vec::new(), Vec::new(), Vec::new());
    for number in 0..setting.rounds {
        files.push(file(&directory, setting.seconds)?);
        large.push(round(setting, &directory, number, 1 << 20)?);
        small.push(round(setting, &directory, number, 4096)?);
        eprintln!(
            "ingest: round {}: a file {:.0} MiB/s; 1 MiB {:.0} a second; 4 KiB {:.0} a second, {:.2} µs each",
            number + 1,
            files[number],
            large[number].writes_per_second,
            small[number].writes_per_second,
            small[number].cpu_us,
        );
    }
    let of =
        |rounds: &[Round], value: fn(&Round) -> f64| middle(&rounds.iter().map(value).collect::<Vec<_>>());
    let (file, streamed) = (middle(&files), of(&large, |round| round.writes_per_second));
    let mut text = format!(
        "Writes of one disk as fast as the receiver takes them, until all are durable. Medians of {} rounds of {} s.\n\n| | |\n|---|---|\n",
        setting.rounds, setting.seconds
    );
    writeln!(
        text,
        "| fio, 1 MiB direct writes to a file, flushed every {FLUSH_MIB} MiB | {file:.0} MiB/s |"
    )?;
    writeln!(text, "| the receiver, 1 MiB writes | {streamed:.0} MiB/s, {:.2} of that |", streamed / file)?;
    writeln!(text, "| 4 KiB writes | {:.0} a second |", of(&small, |round| round.writes_per_second))?;
    for (what, rounds) in [("1 MiB", &large), ("4 KiB", &small)] {
        writeln!(
            text,
            "| {what}: bytes per byte of payload, in the log and to the device | {:.3}, {:.3} |",
            of(rounds, |round| round.log),
            of(rounds, |round| round.device)
        )?;
        writeln!(
            text,
            "| {what}: the receiver's processors per write | {:.2} µs |",
            of(rounds, |round| round.cpu_us)
        )?;
    }
    Ok(text)
}

fn round(setting: &Setting<'_>, directory: &Path, number: usize, bytes: usize) -> anyhow::Result<Round> {
    let place = directory.join(format!("{number}-{bytes}"));
    let receiver = Receiver::start(setting.backtide, &place)?;
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
    let data = Data::capture(payload_of(bytes));
    let mut peer = runtime.block_on(Peer::attach(&receiver.stream(), 0))?;
    let before = receiver.usage()?;
    let begun = Instant::now();
    let until = begun + Duration::from_secs(setting.seconds.into());
    let writes = runtime.block_on(peer.pump(&data, until))?;
    let seconds = begun.elapsed().as_secs_f64();
    let after = receiver.usage()?;
    let log = receiver.status()?["log_bytes"].as_u64().context("the log's size")?;
    let payload = (writes * bytes as u64) as f64;
    drop(receiver);
    std::fs::remove_dir_all(&place)?;
    Ok(Round {
        writes_per_second: writes as f64 / seconds,
        log: log as f64 / payload,
        device: (after.written - before.written) as f64 / payload,
        cpu_us: (after.cpu - before.cpu).as_secs_f64() * 1e6 / writes as f64,
    })
}

/// A file that another program writes, in MiB a second.
fn file(directory: &Path, seconds: u32) -> anyhow::Result<f64> {
    std::fs::create_dir_all(directory)?;
    let path = directory.join("file");
    let mut command = Command::new("fio");
    command.args([
        "--output-format=json",
        "--name=file",
        "--ioengine=psync",
        "--rw=write",
        "--bs=1M",
        "--direct=1",
    ]);
    command.args(["--size=16G", "--time_based=0", "--fallocate=none"]);
    command.arg(format!("--fdatasync={FLUSH_MIB}")).arg(format!("--runtime={seconds}"));
    let output = command.arg("--filename").arg(&path).output().context("run fio")?;
    std::fs::remove_file(&path)?;
    let text = String::from_utf8_lossy(&output.stdout);
    // fio may write notes before its JSON.
    let json = text.find('{').map_or("", |start| &text[start..]);
    let report: Value = serde_json::from_str(json)
        .with_context(|| format!("read fio's report: {}", String::from_utf8_lossy(&output.stderr)))?;
    let kib = report["jobs"][0]["write"]["bw"].as_f64().context("fio's speed")?;
    Ok(kib / 1024.0)
}
