//! How long a guest takes to boot from a mount, beside the raw file.

use std::{os::unix::fs::FileExt, time::Instant};

use anyhow::{Context, bail};
use backtide_e2e::{
    Bench,
    machine::{Machine, Root, cannot_boot, make_root},
};

use crate::tracking::{Setting, middle, stand::Stand};

const SIZE: u64 = 512 << 20;

/// Files that the guest reads once it has booted.
const FILES: u64 = 64;
const FILE_BYTES: usize = 1 << 20;

/// The guest of the whole-system tests, its root on a writable mount and on the file itself.
pub(super) fn run(setting: &Setting<'_>) -> anyhow::Result<String> {
    if let Some(why) = cannot_boot() {
        bail!("{why}");
    }
    let directory = setting.place.join("boot");
    let files = directory.join("files");
    std::fs::create_dir_all(&files)?;
    let noise = crate::servers::image(&directory, "noise", FILES)?;
    let noise = std::fs::File::open(noise)?;
    for nth in 0..FILES {
        let mut content = vec![0; FILE_BYTES];
        noise.read_exact_at(&mut content, nth * FILE_BYTES as u64)?;
        std::fs::write(files.join(nth.to_string()), content)?;
    }
    let image = directory.join("disk.raw");
    std::fs::File::create(&image)?.set_len(SIZE)?;
    make_root(&image, &files);
    let copy = directory.join("copy.raw");
    std::fs::copy(&image, &copy)?;
    let stand = Stand::start(setting.backtide, &directory, true)?;
    stand.attach(&image, &[])?;
    stand.wait_for_sync()?;
    let (mut from_mount, mut from_file) = (Vec::new(), Vec::new());
    for round in 0..setting.rounds {
        let mounted = stand.ask(&["mount", "disk", "--at", "latest", "--writable"])?;
        from_mount.push(boot(mounted["uri"].as_str().context("a URI")?));
        stand.obey(&["unmount", mounted["id"].as_str().context("an id")?, "--discard"])?;
        from_file.push(boot(copy.to_str().context("a path that is text")?));
        eprintln!("boot: round {round}: {:?} s from a mount, {:?} s", from_mount.last(), from_file.last());
    }
    drop(stand);
    std::fs::remove_dir_all(&directory)?;
    let of = |times: &[(f64, f64)], which: fn(&(f64, f64)) -> f64| {
        middle(&times.iter().map(which).collect::<Vec<_>>())
    };
    let (boot, boot_file) = (of(&from_mount, |times| times.0), of(&from_file, |times| times.0));
    let (read, read_file) = (of(&from_mount, |times| times.1), of(&from_file, |times| times.1));
    Ok(format!(
        "A small guest in software emulation: booted from a writable mount in {boot:.2} s, from the raw file in {boot_file:.2} s, {:.2} times as long; then {FILES} MiB of files read in {read:.2} s, from the raw file in {read_file:.2} s: {:.2} times. Medians of {} rounds.\n",
        boot / boot_file,
        read / read_file,
        setting.rounds
    ))
}

/// Seconds until the guest takes commands, and those that reading the files took it then.
fn boot(disk: &str) -> (f64, f64) {
    let bench = Bench::new();
    let began = Instant::now();
    let mut machine = Machine::boot(&bench, "guest", Root::FirstDisk, &[disk], &[]);
    let booted = began.elapsed().as_secs_f64();
    let began = Instant::now();
    machine.run("cat /files/* > /dev/null");
    let read = began.elapsed().as_secs_f64();
    machine.cut_off();
    (booted, read)
}
