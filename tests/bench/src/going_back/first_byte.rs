//! How long a mount of a huge disk with a long log takes until its first byte is read.

use std::{fs::File, process::Command, time::Instant};

use anyhow::{Context, bail};

use crate::{
    servers::succeed,
    tracking::{Setting, middle, stand::Stand},
};

const SIZE: u64 = 1 << 40;

/// The longest that fio writes, which ends by the number of its writes.
const SECONDS_MAX: u32 = 3600;

/// A disk of 1 TiB written all over, and points of its log mounted, by a receiver that has just been
/// started and by one that has mounted it before.
pub(super) fn run(setting: &Setting<'_>) -> anyhow::Result<String> {
    let directory = setting.place.join("first-byte");
    std::fs::create_dir_all(&directory)?;
    let image = directory.join("disk.raw");
    File::create(&image)?.set_len(SIZE)?;
    let mut stand = Stand::start(setting.backtide, &directory, true)?;
    stand.attach(&image, &[])?;
    stand.wait_for_sync()?;
    fill(&stand.uri(), setting.records)?;
    stand.wait_for_sync()?;
    stand.obey(&["wait", "disk", "--for", "durable", "--timeout", "30m"])?;
    let points = stand.ask(&["points", "disk"])?;
    let interval = points["intervals"].as_array().and_then(|all| all.last()).context("an interval")?;
    let (from, to) = (interval["from_lsn"].as_u64(), interval["to_lsn"].as_u64());
    let (from, to) = (from.context("an LSN")?, to.context("an LSN")?);
    let (mut anew, mut again, mut asked) = (Vec::new(), Vec::new(), Vec::new());
    for round in 0..setting.rounds as u64 {
        stand.restart_receiver()?;
        for times in [&mut anew, &mut again] {
            // Some point in the middle, and some place.
            let lsn = from + (to - from) / (setting.rounds as u64 + 1) * (round + 1);
            let (mount, first) = mount(&stand, lsn, SIZE / 7 * (round % 7))?;
            eprintln!("mount-first-byte: lsn:{lsn}: {mount:.0} ms, {first:.0} ms with its first byte");
            times.push(first);
            asked.push(mount);
        }
    }
    drop(stand);
    std::fs::remove_dir_all(&directory)?;
    Ok(format!(
        "A disk of 1 TiB with {} writes all over it in its log, a point in the middle: {:.0} ms until qemu-io has read 4 KiB of it when the receiver has just been started, {:.0} ms later on; the start of the two programs is part of it. The mount alone answered after {:.0} ms. Medians of {} rounds.\n",
        to - from,
        middle(&anew),
        middle(&again),
        middle(&asked),
        setting.rounds
    ))
}

fn fill(uri: &str, records: u64) -> anyhow::Result<()> {
    let output = Command::new("fio")
        .args(["--name=fill", "--ioengine=nbd", "--rw=randwrite", "--bs=512", "--iodepth=32"])
        .args(["--norandommap", "--randrepeat=1", "--output-format=terse"])
        .arg(format!("--uri={uri}"))
        .arg(format!("--size={SIZE}"))
        .arg(format!("--number_ios={records}"))
        .arg(format!("--runtime={SECONDS_MAX}"))
        .output()
        .context("run fio")?;
    if !output.status.success() {
        bail!("fio on {uri}: {}", String::from_utf8_lossy(&output.stderr));
    }
    Ok(())
}

/// Mounts a point and reads a block: milliseconds until the mount was answered, and until the block
/// was there.
fn mount(stand: &Stand, lsn: u64, offset: u64) -> anyhow::Result<(f64, f64)> {
    let began = Instant::now();
    let mounted = stand.ask(&["mount", "disk", "--at", &format!("lsn:{lsn}")])?;
    let answered = began.elapsed();
    let (id, uri) = (mounted["id"].as_str().context("an id")?, mounted["uri"].as_str().context("a URI")?);
    let mut read = Command::new("qemu-io");
    read.args(["-r", "-f", "raw", uri, "-c", &format!("read {} 4k", offset / 4096 * 4096)]);
    succeed(&mut read)?;
    let first = began.elapsed();
    stand.obey(&["unmount", id])?;
    Ok((answered.as_secs_f64() * 1e3, first.as_secs_f64() * 1e3))
}
