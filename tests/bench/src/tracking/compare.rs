//! How fast a compare finds few differences, beside how fast reading and hashing could go.

use std::{
    fs::File,
    os::unix::fs::FileExt,
    path::{Path, PathBuf},
    time::{Duration, Instant},
};

use anyhow::Context;

use super::{Setting, middle, stand::Stand};
use crate::servers::image;

const MIB: u64 = 2048;

/// One block of so many differs.
const ONE_IN: u64 = 1000;

const CHUNK: usize = 64 * 1024;

/// A disk whose image changed while nobody looked: everything is compared.
pub(super) fn run(setting: &Setting<'_>) -> anyhow::Result<String> {
    let directory = setting.place.join("compare");
    std::fs::create_dir_all(&directory)?;
    let image = image(&directory, "disk.raw", MIB)?;
    let stand = Stand::start(setting.backtide, &directory, true)?;
    stand.attach(&image, &[])?;
    stand.wait_for_sync()?;
    let (mut ratios, mut bounds, mut speeds, mut sent) = (Vec::new(), Vec::new(), Vec::new(), 0);
    for round in 0..setting.rounds {
        stand.obey(&["detach", "disk"])?;
        change_some(&image, round as u64)?;
        let bound = bytes_a_second(bound(&image, &stand.store())?);
        let began = Instant::now();
        stand.attach(&image, &[])?;
        stand.wait_for_sync()?;
        let speed = bytes_a_second(began.elapsed());
        sent = stand.status()?["counters"]["resync_sent_bytes"].as_u64().context("a counter")?;
        eprintln!("compare: {:.0} MB/s, bound {:.0} MB/s", speed / 1e6, bound / 1e6);
        ratios.push(speed / bound);
        bounds.push(bound / 1e6);
        speeds.push(speed / 1e6);
    }
    drop(stand);
    std::fs::remove_dir_all(&directory)?;
    Ok(format!(
        "A disk of {MIB} MiB of which 0.1 % of the blocks differ, attach and handshake included: {:.0} MB/s, the bound (reading the image and the store, BLAKE3 in chunks of 64 KiB on both, side by side) is {:.0} MB/s: {:.2} of it. Sent: {:.2} % of the disk. Medians of {} rounds.\n",
        middle(&speeds),
        middle(&bounds),
        middle(&ratios),
        sent as f64 * 100.0 / (MIB << 20) as f64,
        setting.rounds
    ))
}

fn bytes_a_second(took: Duration) -> f64 {
    (MIB << 20) as f64 / took.as_secs_f64()
}

fn change_some(image: &Path, round: u64) -> anyhow::Result<()> {
    let file = File::options().write(true).open(image)?;
    for block in (0..(MIB << 20) / 4096).step_by(ONE_IN as usize) {
        file.write_all_at(&(round + 1).to_le_bytes(), block * 4096)?;
    }
    file.sync_all()?;
    Ok(())
}

/// How long both sides need at least.
fn bound(image: &Path, store: &Path) -> anyhow::Result<Duration> {
    let mut segments: Vec<PathBuf> = Vec::new();
    collect(store, &mut segments)?;
    let began = Instant::now();
    std::thread::scope(|scope| {
        let theirs = scope.spawn(|| {
            segments.iter().try_fold(0, |read, file| Ok(read + hash(file, (MIB << 20).saturating_sub(read))?))
        });
        let ours = hash(image, MIB << 20).map(drop);
        let theirs: std::io::Result<u64> = theirs.join().expect("hashing does not panic");
        ours.and(theirs.map(drop))
    })?;
    Ok(began.elapsed())
}

fn collect(directory: &Path, files: &mut Vec<PathBuf>) -> anyhow::Result<()> {
    for entry in std::fs::read_dir(directory)? {
        let path = entry?.path();
        if path.is_dir() {
            collect(&path, files)?;
        } else {
            files.push(path);
        }
    }
    files.sort();
    Ok(())
}

/// Reads and hashes as much of a file, and says how much there was.
fn hash(path: &Path, most: u64) -> std::io::Result<u64> {
    let file = File::open(path)?;
    let mut buffer = vec![0; 16 * CHUNK];
    let mut at = 0;
    while at < most {
        let read = file.read_at(&mut buffer, at)?;
        if read == 0 {
            break;
        }
        for chunk in buffer[..read].chunks(CHUNK) {
            std::hint::black_box(blake3::hash(chunk));
        }
        at += read as u64;
    }
    Ok(at)
}
