//! How long it takes to mount a point of a huge disk with a long log and to read its first byte.

use std::{process::Command, time::Instant};

use anyhow::Context;

use crate::{
    servers::succeed,
    store::long_log::{self, FIRST, SIZE},
    tracking::{Setting, middle, stand::Stand},
};

/// Points of the log mounted by a receiver that has just been started, with nothing of the store in memory, and by
/// one that has mounted it before.
pub(super) fn run(setting: &Setting<'_>) -> anyhow::Result<String> {
    let directory = setting.place.join("first-byte");
    let mut stand = Stand::start(setting.backtide, &directory, true)?;
    // The store's own file is the receiver's to write.
    stand.obey(&["receiver", "status"])?;
    stand.stop_receiver()?;
    long_log::fill(&stand.store(), setting.records)?;
    stand.start_receiver()?;
    let (mut anew, mut again) = (<[Vec<f64>; 2]>::default(), <[Vec<f64>; 2]>::default());
    for round in 0..setting.rounds as u64 {
        stand.stop_receiver()?;
        long_log::forget(&stand.store())?;
        // The daemon listens before it has opened its logs: that a mount waits for it counts.
        stand.start_receiver()?;
        for times in [&mut anew, &mut again] {
            // Some point in the middle, and some place.
            let lsn = FIRST.0 + setting.records / (setting.rounds as u64 + 1) * (round + 1);
            let (mount, first) = mount(&stand, lsn, SIZE / 7 * (round % 7))?;
            eprintln!("mount-first-byte: lsn:{lsn}: {mount:.0} ms, {first:.0} ms with its first byte");
            times[0].push(mount);
            times[1].push(first);
        }
    }
    drop(stand);
    std::fs::remove_dir_all(&directory)?;
    let [anew, again] = [anew, again].map(|times| times.map(|times| middle(&times)));
    Ok(format!(
        "A disk of 1 TiB with {} writes all over it in its log, a point in the middle, by a receiver that has just been started with nothing of the store in memory: {:.0} ms until the mount is answered, {:.0} ms until qemu-io has read 4 KiB of it; later on {:.0} ms and {:.0} ms. The start of the two programs is part of it. Medians of {} rounds.\n",
        setting.records, anew[0], anew[1], again[0], again[1], setting.rounds
    ))
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
