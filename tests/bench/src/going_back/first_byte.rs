//! How long it takes to mount a point of a huge disk with a long log and to read its first byte.

use std::{
    path::Path,
    process::{Command, Stdio},
    time::Instant,
};

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
    let mut stand = stand_with_a_long_log(setting, &directory)?;
    let (mut anew, mut again) = (<[Vec<f64>; 2]>::default(), <[Vec<f64>; 2]>::default());
    for round in 0..setting.rounds as u64 {
        stand.stop_receiver()?;
        long_log::forget(&stand.store())?;
        // The daemon listens before it has opened its logs: that a mount waits for it counts.
        stand.start_receiver()?;
        for times in [&mut anew, &mut again] {
            let (lsn, place) = somewhere(setting, round);
            let Mounted { mount, first, .. } = mount(&stand, lsn, place, Where::AtReceiver)?;
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

/// The same points mounted by an agent, which fetches from the receiver what is read, beside mounts of the receiver.
pub(super) fn run_here(setting: &Setting<'_>) -> anyhow::Result<String> {
    let directory = setting.place.join("first-byte-here");
    let stand = stand_with_a_long_log(setting, &directory)?;
    let (mut here, mut ratios) = (<[Vec<f64>; 3]>::default(), Vec::new());
    // A round before those that count: whoever was just started pays for more than a mount.
    for round in 0..=setting.rounds as u64 {
        let (lsn, place) = somewhere(setting, round);
        let there = mount(&stand, lsn, place, Where::AtReceiver)?;
        let Mounted { mount, first, status } = mount(&stand, lsn, place, Where::Here)?;
        eprintln!(
            "mount-here-first-byte: lsn:{lsn}: {mount:.0} ms, {first:.0} ms with its first byte ({:.0} at the receiver), {status:.0} ms for its block status",
            there.first
        );
        if round > 0 {
            for (times, time) in here.iter_mut().zip([mount, first, status]) {
                times.push(time);
            }
            ratios.push(first / there.first);
        }
    }
    drop(stand);
    std::fs::remove_dir_all(&directory)?;
    let [answered, first, status] = here.map(|times| middle(&times));
    Ok(format!(
        "The same disk with {} writes, a point in the middle mounted by an agent (`mount --here`): {answered:.0} ms until the mount is answered, {first:.0} ms until qemu-io has read 4 KiB of it, {:.2} times as long as of a mount of the receiver. The first block status after that, by qemu-io: {status:.0} ms. Medians of {} rounds.\n",
        setting.records,
        middle(&ratios),
        setting.rounds
    ))
}

fn stand_with_a_long_log(setting: &Setting<'_>, directory: &Path) -> anyhow::Result<Stand> {
    let mut stand = Stand::start(setting.backtide, directory, true)?;
    // The store's own file is the receiver's to write.
    stand.obey(&["receiver", "status"])?;
    stand.stop_receiver()?;
    long_log::fill(&stand.store(), setting.records)?;
    stand.start_receiver()?;
    Ok(stand)
}

/// Some point in the middle, and some place.
fn somewhere(setting: &Setting<'_>, round: u64) -> (u64, u64) {
    let lsn = FIRST.0 + setting.records / (setting.rounds as u64 + 2) * (round + 1);
    (lsn, SIZE / 7 * (round % 7))
}

/// Who serves a mount.
#[derive(Clone, Copy, PartialEq)]
enum Where {
    AtReceiver,
    Here,
}

/// Milliseconds until a mount was answered, and until a block of it was there.
struct Mounted {
    mount: f64,
    first: f64,
    /// Of an agent's mount: then until it was known whether there is data.
    status: f64,
}

/// Mounts a point and reads a block.
fn mount(stand: &Stand, lsn: u64, offset: u64, by: Where) -> anyhow::Result<Mounted> {
    let (at, stream) = (format!("lsn:{lsn}"), stand.stream());
    let here: &[&str] = if by == Where::Here { &["--here", "--stream", &stream] } else { &[] };
    let began = Instant::now();
    let mounted = stand.ask(&[&["mount", "disk", "--at", &at], here].concat())?;
    let answered = began.elapsed();
    let (id, uri) = (mounted["id"].as_str().context("an id")?, mounted["uri"].as_str().context("a URI")?);
    let mut read = Command::new("qemu-io");
    read.args(["-r", "-f", "raw", uri, "-c", &format!("read {} 4k", offset / 4096 * 4096)]);
    succeed(&mut read)?;
    let first = began.elapsed();
    let mut status = 0.0;
    if by == Where::Here {
        let began = Instant::now();
        let mut ask = Command::new("qemu-io");
        ask.args(["-r", "-f", "raw", uri, "-c", &format!("alloc {} 4k", offset / 4096 * 4096)]);
        succeed(ask.stdout(Stdio::null()))?;
        status = began.elapsed().as_secs_f64() * 1e3;
    }
    stand.obey(&[&["unmount", id][..], &here[..here.len().min(1)]].concat())?;
    Ok(Mounted { mount: answered.as_secs_f64() * 1e3, first: first.as_secs_f64() * 1e3, status })
}
