//! What disks that are written at once get, together and each.

use std::{fmt::Write, path::PathBuf, process::Command};

use anyhow::Context;
use serde_json::Value;

use super::{Setting, middle, stand::Stand};
use crate::servers::{image, succeed};

const MIB: u64 = 64;

/// Requests in flight, over all disks.
const DEPTH: usize = 32;

/// Disks written at once.
const DISKS: [usize; 3] = [1, 4, 16];

/// What one round brought.
struct Round {
    total: f64,
    /// The slowest disk's part of what each would get were they all alike.
    least: f64,
}

/// See the module's description.
pub(super) fn run(setting: &Setting<'_>) -> anyhow::Result<String> {
    let mut text = format!(
        "4 KiB random writes, {DEPTH} in flight over all disks of one agent, disks of {MIB} MiB. Medians of {} rounds.\n\n| | disks | writes a second | of one disk's | the slowest disk's part of the mean |\n|---|---|---|---|---|\n",
        setting.rounds
    );
    for (what, receives) in [("tracking", false), ("in sync", true)] {
        let directory = setting.place.join("many-disks");
        let stand = Stand::start(setting.backtide, &directory, receives)?;
        let uris = attach(&stand, &directory)?;
        warm(&uris)?;
        let mut rounds: [Vec<Round>; DISKS.len()] = Default::default();
        for _ in 0..setting.rounds {
            for (disks, rounds) in DISKS.into_iter().zip(&mut rounds) {
                if receives {
                    wait_for_sync(&stand)?;
                }
                rounds.push(measure(&uris[..disks], setting.seconds)?);
            }
        }
        drop(stand);
        std::fs::remove_dir_all(&directory)?;
        let of = |rounds: &[Round], value: fn(&Round) -> f64| {
            middle(&rounds.iter().map(value).collect::<Vec<_>>())
        };
        let one = of(&rounds[0], |round| round.total);
        for (disks, rounds) in DISKS.into_iter().zip(&rounds) {
            let (total, least) = (of(rounds, |round| round.total), of(rounds, |round| round.least));
            eprintln!(
                "many-disks, {what}: {disks} disks, {total:.0} IOPS, the slowest {least:.2} of the mean"
            );
            writeln!(text, "| {what} | {disks} | {total:.0} | {:.2} | {least:.2} |", total / one)?;
        }
    }
    Ok(text)
}

/// Attaches as many disks as are ever written; their exports.
fn attach(stand: &Stand, directory: &std::path::Path) -> anyhow::Result<Vec<String>> {
    let most = DISKS.into_iter().max().unwrap_or_default();
    let stream = format!("unix:{}", directory.join("stream.sock").display());
    (0..most)
        .map(|number| {
            let image: PathBuf = image(directory, &format!("disk{number}.raw"), MIB)?;
            let socket = directory.join(format!("nbd{number}.sock"));
            let uri = format!("nbd+unix:///disk{number}?socket={}", socket.display());
            let image = image.to_str().context("a path that is text")?;
            stand.obey(&["attach", &format!("disk{number}"), image, "--receiver", &stream, "--nbd", &uri])?;
            Ok(uri)
        })
        .collect()
}

fn wait_for_sync(stand: &Stand) -> anyhow::Result<()> {
    let most = DISKS.into_iter().max().unwrap_or_default();
    (0..most).try_for_each(|number| {
        stand.obey(&["wait", &format!("disk{number}"), "--for", "sync", "--timeout", "30m"])
    })
}

/// Every extent of every disk is written once: the first write of an extent waits for the activity log, of which
/// the disks that are in several of the measurements would be spared more than others.
fn warm(uris: &[String]) -> anyhow::Result<()> {
    let mut command = client(uris);
    command.args(["--zonemode=strided", "--zonesize=4k", "--zonerange=4m"]);
    succeed(for_each(command.arg("--rw=write"), uris))
}

fn client(uris: &[String]) -> Command {
    let mut command = Command::new("fio");
    command.args(["--output-format=json", "--ioengine=nbd", "--bs=4k", "--thread"]);
    command.arg(format!("--iodepth={}", DEPTH / uris.len())).arg(format!("--size={MIB}M"));
    command
}

/// One job of the client for each disk.
fn for_each<'command>(command: &'command mut Command, uris: &[String]) -> &'command mut Command {
    for (number, uri) in uris.iter().enumerate() {
        command.arg(format!("--name=disk{number}")).arg(format!("--uri={uri}"));
    }
    command
}

/// All disks at once.
fn measure(uris: &[String], seconds: u32) -> anyhow::Result<Round> {
    let mut command = client(uris);
    command.args(["--rw=randwrite", "--time_based", "--norandommap"]).arg(format!("--runtime={seconds}"));
    let output = for_each(&mut command, uris).output().context("run fio")?;
    let text = String::from_utf8_lossy(&output.stdout);
    // fio may write notes before its JSON.
    let json = text.find('{').map_or("", |start| &text[start..]);
    let report: Value = serde_json::from_str(json)
        .with_context(|| format!("read fio's report: {}", String::from_utf8_lossy(&output.stderr)))?;
    let jobs = report["jobs"].as_array().context("fio's jobs")?;
    let speeds: Vec<f64> = jobs.iter().filter_map(|job| job["write"]["iops"].as_f64()).collect();
    anyhow::ensure!(speeds.len() == uris.len(), "fio reports {} of {} disks", speeds.len(), uris.len());
    let total: f64 = speeds.iter().sum();
    let least = speeds.iter().copied().fold(f64::INFINITY, f64::min);
    Ok(Round { total, least: least * speeds.len() as f64 / total })
}
