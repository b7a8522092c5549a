//! How fast a point becomes a file, beside `nbdcopy`.

use std::{
    path::Path,
    process::Command,
    time::{Duration, Instant},
};

use anyhow::Context;

use crate::{
    servers::{Kind, Server, image, succeed},
    tracking::{Setting, middle, stand::Stand},
};

const MIB: u64 = 512;

/// A disk full of data: `restore`, with and without reading back what it wrote, beside `nbdcopy`, which never does,
/// from a mount of the same point and from `nbdkit` with the plain file. All end with what they wrote synced.
pub(super) fn run(setting: &Setting<'_>) -> anyhow::Result<String> {
    let directory = setting.place.join("restore");
    std::fs::create_dir_all(&directory)?;
    let image = image(&directory, "disk.raw", MIB)?;
    let stand = Stand::start(setting.backtide, &directory, true)?;
    stand.attach(&image, &[])?;
    stand.wait_for_sync()?;
    let mounted = stand.ask(&["mount", "disk", "--at", "latest"])?;
    let mount = mounted["uri"].as_str().context("a URI")?;
    let plain = Server::start(Kind::NbdkitFile, &directory.join("plain"), setting.backtide, MIB)?;
    let output = directory.join("restored.raw");
    let (mut ours, mut unproved) = (Vec::new(), Vec::new());
    let (mut of_mount, mut of_file) = (Vec::new(), Vec::new());
    for _ in 0..setting.rounds {
        let path = output.to_str().context("a path that is text")?;
        let restore = ["restore", "disk", "--at", "latest", "--output", path, "--force", "--no-verify"];
        ours.push(timed(&output, || stand.obey(&restore[..7]))?);
        unproved.push(timed(&output, || stand.obey(&restore))?);
        of_mount.push(timed(&output, || nbdcopy(mount, &output))?);
        of_file.push(timed(&output, || nbdcopy(plain.uri(), &output))?);
        let last =
            [&ours, &unproved, &of_mount, &of_file].map(|speeds| speeds.last().copied().unwrap_or(0.0));
        eprintln!("restore: {last:.0?} MB/s");
    }
    plain.stop()?;
    drop(stand);
    std::fs::remove_dir_all(&directory)?;
    let [ours, unproved, of_mount, of_file] =
        [ours, unproved, of_mount, of_file].map(|speeds| middle(&speeds));
    Ok(format!(
        "A disk of {MIB} MiB, all of it data, to a file, synced. Medians of {} rounds.\n\n| | MB/s | of nbdcopy of a mount | of nbdcopy of the plain file |\n|---|---|---|---|\n| restore, everything read back and compared | {ours:.0} | {:.2} | {:.2} |\n| restore --no-verify | {unproved:.0} | {:.2} | {:.2} |\n| nbdcopy of a mount of the same point | {of_mount:.0} | | |\n| nbdcopy of the plain file behind nbdkit | {of_file:.0} | | |\n",
        setting.rounds,
        ours / of_mount,
        ours / of_file,
        unproved / of_mount,
        unproved / of_file,
    ))
}

/// MB/s of what makes the file, which is not there before and is removed after.
fn timed(output: &Path, make: impl FnOnce() -> anyhow::Result<()>) -> anyhow::Result<f64> {
    let began = Instant::now();
    make()?;
    let took: Duration = began.elapsed();
    std::fs::remove_file(output)?;
    Ok((MIB << 20) as f64 / took.as_secs_f64() / 1e6)
}

fn nbdcopy(uri: &str, output: &Path) -> anyhow::Result<()> {
    let mut command = Command::new("nbdcopy");
    command.arg("--flush").arg(uri).arg(output);
    succeed(&mut command)
}
