//! What disks that are written at once get, together and each, beside `nbdkit`, of which each disk has one of its own.

use std::{
    fmt::Write,
    path::{Path, PathBuf},
    process::Command,
};

use anyhow::Context;
use serde_json::Value;

use super::{Setting, middle, stand::Stand};
use crate::servers::{Kind, Server, image, succeed};

/// MiB that are written, over all disks: what a processor's caches hold of it is the same for one disk and for many.
const MIB: u64 = 512;

/// Requests in flight at once.
const DEPTH: usize = 32;

/// Disks written at once.
const DISKS: [usize; 3] = [1, 4, 16];

const DISKS_MAX: usize = 16;

/// Who has `DEPTH` requests in flight.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Load {
    /// All disks together: each of many has few.
    Shared,
    /// Each disk.
    Each,
}

impl Load {
    const ALL: [Self; 2] = [Self::Shared, Self::Each];

    fn depth(self, disks: usize) -> usize {
        match self {
            Self::Shared => DEPTH / disks,
            Self::Each => DEPTH,
        }
    }

    fn name(self) -> &'static str {
        match self {
            Self::Shared => "over all disks",
            Self::Each => "of each disk",
        }
    }
}

/// Disks of one sort, and who serves them.
struct Served {
    what: &'static str,
    uris: Vec<String>,
    stand: Option<Stand>,
    receives: bool,
    /// Ended with the measurement.
    _peers: Vec<Server>,
}

/// What one round brought.
struct Round {
    total: f64,
    /// The slowest disk's part of what each would get were they all alike.
    least: f64,
    /// Of what the first that is served got in the same round.
    of_peer: f64,
}

/// See the module's description.
pub(super) fn run(setting: &Setting<'_>) -> anyhow::Result<String> {
    let directory = setting.place.join("many-disks");
    let served = [
        nbdkit(setting, &directory.join("nbdkit"))?,
        backtide(setting, &directory.join("tracking"), false)?,
        backtide(setting, &directory.join("sync"), true)?,
    ];
    let mut text = format!(
        "4 KiB random writes, {DEPTH} in flight, all over {MIB} MiB of all disks together. Medians of {} rounds.\n\n| in flight | | disks | writes a second | of one disk's | of nbdkit | the slowest disk's part of the mean |\n|---|---|---|---|---|---|---|\n",
        setting.rounds
    );
    for load in Load::ALL {
        let mut rounds: [[Vec<Round>; DISKS.len()]; 3] = Default::default();
        for _ in 0..setting.rounds {
            for (place, disks) in DISKS.into_iter().enumerate() {
                let mut peer = None;
                for (served, rounds) in served.iter().zip(&mut rounds) {
                    served.settle()?;
                    let (total, least) = measure(&served.uris[..disks], load, setting.seconds)?;
                    let of_peer = total / *peer.get_or_insert(total);
                    rounds[place].push(Round { total, least, of_peer });
                }
            }
        }
        for (served, rounds) in served.iter().zip(&rounds) {
            lines(&mut text, load, served.what, rounds)?;
        }
    }
    drop(served);
    std::fs::remove_dir_all(&directory)?;
    Ok(text)
}

fn lines(
    text: &mut String,
    load: Load,
    what: &str,
    rounds: &[Vec<Round>; DISKS.len()],
) -> Result<(), std::fmt::Error> {
    let of =
        |rounds: &[Round], value: fn(&Round) -> f64| middle(&rounds.iter().map(value).collect::<Vec<_>>());
    let one = of(&rounds[0], |round| round.total);
    for (disks, rounds) in DISKS.into_iter().zip(rounds) {
        let (total, least) = (of(rounds, |round| round.total), of(rounds, |round| round.least));
        let (part, of_peer) = (total / one, of(rounds, |round| round.of_peer));
        let load = load.name();
        eprintln!(
            "many-disks, {what}: {disks} disks, {DEPTH} {load}: {total:.0} IOPS, {of_peer:.2} of nbdkit, the slowest {least:.2} of the mean"
        );
        writeln!(text, "| {load} | {what} | {disks} | {total:.0} | {part:.2} | {of_peer:.2} | {least:.2} |")?;
    }
    Ok(())
}

fn nbdkit(setting: &Setting<'_>, directory: &Path) -> anyhow::Result<Served> {
    let start = |number: usize| {
        Server::start(
            Kind::NbdkitFile,
            &directory.join(format!("disk{number}")),
            setting.backtide,
            size(number),
        )
    };
    let peers = (0..DISKS_MAX).map(start).collect::<anyhow::Result<Vec<_>>>()?;
    let uris: Vec<String> = peers.iter().map(|peer| peer.uri().to_owned()).collect();
    DISKS.into_iter().try_for_each(|disks| warm(&uris[..disks]))?;
    Ok(Served { what: Kind::NbdkitFile.name(), uris, stand: None, receives: false, _peers: peers })
}

fn backtide(setting: &Setting<'_>, directory: &Path, receives: bool) -> anyhow::Result<Served> {
    let stand = Stand::start(setting.backtide, directory, receives)?;
    let uris = attach(&stand, directory)?;
    DISKS.into_iter().try_for_each(|disks| warm(&uris[..disks]))?;
    let what = if receives { "in sync" } else { "tracking" };
    Ok(Served { what, uris, stand: Some(stand), receives, _peers: Vec::new() })
}

impl Served {
    /// Waits until nothing of what was written before is still on its way.
    fn settle(&self) -> anyhow::Result<()> {
        let Some(stand) = self.stand.as_ref().filter(|_| self.receives) else { return Ok(()) };
        (0..DISKS_MAX).try_for_each(|number| {
            stand.obey(&["wait", &format!("disk{number}"), "--for", "sync", "--timeout", "30m"])
        })
    }
}

/// MiB of a disk: its part of what is written by the fewest that it is one of.
fn size(number: usize) -> u64 {
    let disks = DISKS.into_iter().find(|disks| number < *disks).unwrap_or(DISKS_MAX);
    MIB / disks as u64
}

/// Attaches as many disks as are ever written; their exports.
fn attach(stand: &Stand, directory: &Path) -> anyhow::Result<Vec<String>> {
    let stream = format!("unix:{}", directory.join("stream.sock").display());
    (0..DISKS_MAX)
        .map(|number| {
            let image: PathBuf = image(directory, &format!("disk{number}.raw"), size(number))?;
            let socket = directory.join(format!("nbd{number}.sock"));
            let uri = format!("nbd+unix:///disk{number}?socket={}", socket.display());
            let image = image.to_str().context("a path that is text")?;
            stand.obey(&["attach", &format!("disk{number}"), image, "--receiver", &stream, "--nbd", &uri])?;
            Ok(uri)
        })
        .collect()
}

/// Every extent of every disk is written once: the first write of an extent waits for the activity log, of which
/// the disks that are in several of the measurements would be spared more than others.
fn warm(uris: &[String]) -> anyhow::Result<()> {
    let mut command = client(uris.len(), DEPTH / uris.len());
    command.args(["--zonemode=strided", "--zonesize=4k", "--zonerange=4m"]);
    succeed(for_each(command.arg("--rw=write"), uris))
}

fn client(disks: usize, depth: usize) -> Command {
    let mut command = Command::new("fio");
    command.args(["--output-format=json", "--ioengine=nbd", "--bs=4k", "--thread"]);
    command.arg(format!("--iodepth={depth}")).arg(format!("--size={}M", MIB / disks as u64));
    command
}

/// One job of the client for each disk.
fn for_each<'command>(command: &'command mut Command, uris: &[String]) -> &'command mut Command {
    for (number, uri) in uris.iter().enumerate() {
        command.arg(format!("--name=disk{number}")).arg(format!("--uri={uri}"));
    }
    command
}

/// All disks at once: their writes a second, and the slowest disk's part of what each would get were they all alike.
fn measure(uris: &[String], load: Load, seconds: u32) -> anyhow::Result<(f64, f64)> {
    let mut command = client(uris.len(), load.depth(uris.len()));
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
    Ok((total, least * speeds.len() as f64 / total))
}
