//! How fast a mounted point is read, beside `qemu-nbd` with the plain file: from the log, and from an image.

use std::{process::Command, time::Duration};

use anyhow::{Context, bail};

use crate::{
    fio::{self, ROWS},
    servers::{Kind, Server, image},
    tracking::{Setting, middle, stand::Stand},
};

const MIB: u64 = 512;

/// Writes of 4 KiB on top of what the first resync brought: an eighth of the disk.
const WRITES: u64 = MIB * 256 / 8;

/// The receiver looks for history to fold as often as this, and reads for it as fast as it can.
const SETTINGS: &str = "[retention]\ninterval_ms = 200\nbytes_per_second_max = 0\n";

/// How often it is asked whether that is done.
const LOOK: Duration = Duration::from_millis(100);

/// 4 KiB at random places, and 1 MiB one after the other.
const PATTERNS: [fio::Row; 2] = [ROWS[3], ROWS[5]];

/// A disk full of data, an eighth of it written over since; its newest point mounted, before and after its
/// log is folded into an image.
pub(super) fn run(setting: &Setting<'_>) -> anyhow::Result<String> {
    let directory = setting.place.join("mount-reads");
    std::fs::create_dir_all(&directory)?;
    let image = image(&directory, "disk.raw", MIB)?;
    let stand = Stand::with_settings(setting.backtide, &directory, SETTINGS)?;
    stand.attach(&image, &[])?;
    stand.wait_for_sync()?;
    write(&stand.uri())?;
    stand.wait_for_sync()?;
    stand.obey(&["wait", "disk", "--for", "durable", "--timeout", "30m"])?;
    let plain = Server::start(Kind::QemuNbd, &directory.join("plain"), setting.backtide, MIB)?;
    let from_log = measure(setting, &stand, &plain, "from the log")?;
    fold(&stand)?;
    let from_image = measure(setting, &stand, &plain, "from an image")?;
    plain.stop()?;
    drop(stand);
    std::fs::remove_dir_all(&directory)?;
    let mut text = format!(
        "A disk of {MIB} MiB full of data, {WRITES} writes of 4 KiB on top; its newest point mounted, beside qemu-nbd with a file of that size. Medians of {} rounds of {} s.\n\n| | before compaction | after | qemu-nbd | ratios |\n|---|---|---|---|---|\n",
        setting.rounds, setting.seconds
    );
    for (number, row) in PATTERNS.into_iter().enumerate() {
        let of = |speeds: &Speeds, which: usize| middle(&speeds[number][which]);
        let (log, image) = (of(&from_log, 0), of(&from_image, 0));
        let (before, after) = (of(&from_log, 1), of(&from_image, 1));
        let say = |speed| fio::speed_text(speed, row);
        text += &format!(
            "| {} | {} | {} | {}, {} | {:.2}, {:.2} |\n",
            row.name,
            say(log),
            say(image),
            say(before),
            say(after),
            log / before,
            image / after
        );
    }
    Ok(text)
}

/// For each pattern the speeds of the mount and of `qemu-nbd`.
type Speeds = [[Vec<f64>; 2]; 2];

fn measure(setting: &Setting<'_>, stand: &Stand, plain: &Server, what: &str) -> anyhow::Result<Speeds> {
    let mounted = stand.ask(&["mount", "disk", "--at", "latest"])?;
    let (id, uri) = (mounted["id"].as_str().context("an id")?, mounted["uri"].as_str().context("a URI")?);
    let mut speeds = Speeds::default();
    for _ in 0..setting.rounds {
        for (row, speeds) in PATTERNS.into_iter().zip(&mut speeds) {
            for (uri, speeds) in [uri, plain.uri()].into_iter().zip(speeds) {
                let figure = fio::run(row, uri, setting.seconds, MIB)?;
                eprintln!("mount-reads: {what}: {}: {} on {uri}", row.name, figure.text(row));
                speeds.push(figure.speed(row));
            }
        }
    }
    stand.obey(&["unmount", id])?;
    Ok(speeds)
}

fn write(uri: &str) -> anyhow::Result<()> {
    let output = Command::new("fio")
        .args(["--name=write", "--ioengine=nbd", "--rw=randwrite", "--bs=4k", "--iodepth=32"])
        .args(["--norandommap", "--randrepeat=1", "--output-format=terse"])
        .arg(format!("--uri={uri}"))
        .arg(format!("--size={MIB}M"))
        .arg(format!("--number_ios={WRITES}"))
        .output()
        .context("run fio")?;
    if !output.status.success() {
        bail!("fio on {uri}: {}", String::from_utf8_lossy(&output.stderr));
    }
    Ok(())
}

/// Has everything folded into an image.
fn fold(stand: &Stand) -> anyhow::Result<()> {
    let points = stand.ask(&["points", "disk"])?;
    let interval = points["intervals"].as_array().and_then(|all| all.last()).context("an interval")?;
    let last = interval["to_lsn"].as_u64().context("an LSN")?;
    stand.obey(&["retention", "set", "disk", "any=1s", "--yes"])?;
    loop {
        let report = stand.ask(&["retention", "show", "disk"])?;
        let disk = &report["disks"][0];
        if !disk["error"].is_null() {
            bail!("the log is not folded: {disk}");
        }
        if disk["every_point_from"]["lsn"].as_u64().is_some_and(|from| from >= last) {
            return Ok(());
        }
        std::thread::sleep(LOOK);
    }
}
