//! What the activity log costs: writes where it is warm, and writes that are all cold.

use std::{
    fmt::Write,
    fs::File,
    ops::RangeInclusive,
    path::Path,
    process::{Child, Command, Stdio},
};

use anyhow::{Context, bail};

use super::{
    Setting,
    guest::{Guest, Seen},
    middle,
    stand::Stand,
};
use crate::servers::{image, wait_for};

/// The disk whose extents are all hot; a tenth of what 1024 extents of 4 MiB hold.
const HOT_MIB: u64 = 512;

/// Sixteen times what 1024 extents of 4 MiB hold.
const COLD_MIB: u64 = 64 << 10;

const WITHOUT: [&str; 2] = ["--activity-extents", "0"];

/// 4 KiB random writes within the hot extents, with the log and without one.
pub(super) fn hot(setting: &Setting<'_>) -> anyhow::Result<String> {
    let depths = ["--iodepth=1", "--iodepth=32"];
    let mut speeds: [[Vec<f64>; 2]; 2] = Default::default();
    let directory = setting.place.join("al-hot");
    let image = {
        std::fs::create_dir_all(&directory)?;
        image(&directory, "disk.raw", HOT_MIB)?
    };
    for round in 0..setting.rounds * 2 {
        // Who is first changes with the round.
        for which in [round % 2, 1 - round % 2] {
            let place = directory.join("stand");
            let stand = stand(setting, &place, &image, which == 0)?;
            warm(&stand)?;
            let warmed = Log::of(&stand)?;
            let expected = (which == 0).then_some(HOT_MIB / 4);
            anyhow::ensure!(warmed.hot_extents == expected, "{warmed:?}, expected {expected:?} hot extents");
            for (depth, speeds) in depths.iter().zip(&mut speeds) {
                let runtime = format!("--runtime={}", setting.seconds);
                let more = ["--time_based", "--norandommap", &runtime, depth];
                let seen = Guest::start(&stand.uri(), "randwrite", HOT_MIB, &more)?.end()?;
                eprintln!("al-hot {}: {depth} {:.0} IOPS", ["with", "without"][which], seen.operations);
                speeds[which].push(seen.operations);
            }
            // All of it was hot, by the log or without one.
            anyhow::ensure!(Log::of(&stand)? == warmed, "a write was cold");
            drop(stand);
            std::fs::remove_dir_all(&place)?;
        }
    }
    std::fs::remove_dir_all(&directory)?;
    let mut text = format!(
        "4 KiB random writes over {HOT_MIB} MiB, medians of {} rounds of {} s.\n\n| | with the activity log | without | ratio |\n|---|---|---|---|\n",
        setting.rounds * 2,
        setting.seconds
    );
    for (depth, [with, without]) in ["QD 1", "QD 32"].iter().zip(&speeds) {
        let (with, without) = (middle(with), middle(without));
        writeln!(text, "| {depth} | {with:.0} IOPS | {without:.0} IOPS | {:.3} |", with / without)?;
    }
    Ok(text)
}

/// Every extent is written once.
fn warm(stand: &Stand) -> anyhow::Result<()> {
    let guest = Guest::start(
        &stand.uri(),
        "write",
        HOT_MIB,
        &["--zonemode=strided", "--zonesize=4k", "--zonerange=4m"],
    );
    guest?.end().map(drop)
}

/// A disk that is known block by block, which takes a receiver that has it, and is gone: as long as nothing is known all
/// of the disk counts as hot, and nothing is logged.
fn stand(setting: &Setting<'_>, directory: &Path, image: &Path, logs: bool) -> anyhow::Result<Stand> {
    let mut stand = Stand::start(setting.backtide, directory, true)?;
    let options: &[&str] = if logs { &[] } else { &WITHOUT };
    stand.attach(image, &[&["--window", "1MiB"], options].concat())?;
    stand.wait_for_sync()?;
    stand.stop_receiver()?;
    Ok(stand)
}

/// What an agent's activity log has done.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Log {
    /// Writes that have waited for it.
    cold_changes: u64,
    /// None without a log.
    hot_extents: Option<u64>,
}

impl Log {
    fn of(stand: &Stand) -> anyhow::Result<Self> {
        let status = stand.status()?;
        let cold_changes = status["counters"]["cold_changes"].as_u64().context("a count")?;
        Ok(Self { cold_changes, hot_extents: status["dirty"]["hot_extents"].as_u64() })
    }

    /// Fails when other than so many writes have waited for it: then it is not what was measured.
    fn expect(self, changes: RangeInclusive<u64>) -> anyhow::Result<()> {
        if !changes.contains(&self.cold_changes) {
            bail!("{} writes waited for the activity log, expected {changes:?}", self.cold_changes);
        }
        Ok(())
    }
}

/// 4 KiB random writes over sixteen times what can be hot, and the same on a qcow2 image with a
/// persistent bitmap.
pub(super) fn cold(setting: &Setting<'_>) -> anyhow::Result<String> {
    let depths = ["--iodepth=1", "--iodepth=32"];
    let kinds = ["with the activity log", "without", "qemu-storage-daemon, qcow2, persistent bitmap"];
    let mut speeds: [[Vec<f64>; 3]; 2] = Default::default();
    for round in 0..setting.rounds {
        for turn in 0..kinds.len() {
            let which = (round + turn) % kinds.len();
            let directory = setting.place.join(format!("al-cold-{round}-{which}"));
            for (depth, speeds) in depths.iter().zip(&mut speeds) {
                // A new image for each: the file system's allocation is part of all.
                std::fs::create_dir_all(&directory)?;
                let server = ColdServer::start(setting, &directory, which)?;
                let runtime = format!("--runtime={}", setting.seconds);
                let more = ["--time_based", "--norandommap", "--randseed=7", &runtime, depth];
                let seen = Guest::start(&server.uri(), "randwrite", COLD_MIB, &more)?.end()?;
                eprintln!("al-cold {}: {depth} {:.0} IOPS", kinds[which], seen.operations);
                speeds[which].push(seen.operations);
                server.check(which == 0, &seen, setting.seconds)?;
                drop(server);
                std::fs::remove_dir_all(&directory)?;
            }
        }
    }
    let mut text = format!(
        "4 KiB random writes over {} GiB, of which 4 GiB can be hot, medians of {} rounds of {} s.\n\n| | {} |\n|---|---|---|---|\n",
        COLD_MIB >> 10,
        setting.rounds,
        setting.seconds,
        kinds.join(" | ")
    );
    for (depth, speeds) in ["QD 1", "QD 32"].iter().zip(&speeds) {
        let cells: Vec<String> = speeds.iter().map(|speed| format!("{:.0} IOPS", middle(speed))).collect();
        writeln!(text, "| {depth} | {} |", cells.join(" | "))?;
    }
    Ok(text)
}

enum ColdServer {
    Ours(Stand),
    Theirs(Child, String),
}

impl ColdServer {
    fn start(setting: &Setting<'_>, directory: &Path, which: usize) -> anyhow::Result<Self> {
        if which == 2 {
            return qcow2(directory);
        }
        let image = directory.join("disk.raw");
        File::create(&image)?.set_len(COLD_MIB << 20)?;
        stand(setting, directory, &image, which == 0).map(Self::Ours)
    }

    /// Fails unless the log was in the way of most writes, or of none.
    fn check(&self, logs: bool, seen: &Seen, seconds: u32) -> anyhow::Result<()> {
        let Self::Ours(stand) = self else { return Ok(()) };
        let writes = (seen.operations * f64::from(seconds)) as u64;
        Log::of(stand)?.expect(if logs { writes / 2..=2 * writes } else { 0..=0 })
    }

    fn uri(&self) -> String {
        match self {
            Self::Ours(stand) => stand.uri(),
            Self::Theirs(_, uri) => uri.clone(),
        }
    }
}

impl Drop for ColdServer {
    fn drop(&mut self) {
        if let Self::Theirs(child, _) = self {
            // Its image is thrown away.
            let _ = child.kill();
            let _ = child.wait();
        }
    }
}

fn qcow2(directory: &Path) -> anyhow::Result<ColdServer> {
    let (image, socket) = (directory.join("disk.qcow2"), directory.join("nbd.sock"));
    for arguments in [
        vec!["create", "-q", "-f", "qcow2", "IMAGE", &format!("{COLD_MIB}M")],
        vec!["bitmap", "--add", "IMAGE", "changed"],
    ] {
        let mut command = Command::new("qemu-img");
        for argument in arguments {
            match argument {
                "IMAGE" => command.arg(&image),
                argument => command.arg(argument),
            };
        }
        if !command.status().context("run qemu-img")?.success() {
            bail!("qemu-img does not make a qcow2 image with a bitmap");
        }
    }
    let mut command = Command::new("qemu-storage-daemon");
    command.args(["--blockdev"]).arg(format!("driver=file,node-name=file,filename={}", image.display()));
    command.args(["--blockdev", "driver=qcow2,node-name=disk,file=file", "--nbd-server"]);
    command.arg(format!("addr.type=unix,addr.path={}", socket.display()));
    command.args(["--export", "type=nbd,id=e,node-name=disk,name=disk,writable=on"]);
    let child = command.stdin(Stdio::null()).stdout(Stdio::null()).spawn().context("start a daemon")?;
    wait_for(&socket)?;
    Ok(ColdServer::Theirs(child, format!("nbd+unix:///disk?socket={}", socket.display())))
}
