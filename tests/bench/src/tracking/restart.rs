//! How long a guest waits when the agent is restarted under it, and when it is killed.
//!
//! The guest writes through a `qemu-storage-daemon` that connects again as QEMU does. What is shown is the
//! longest write: whatever else was slow is in it.

use std::{
    path::Path,
    process::{Child, Command, Stdio},
    thread::sleep,
    time::Duration,
};

use anyhow::{Context, bail};

use super::{Setting, guest::Guest, middle, stand::Stand};
use crate::servers::{image, wait_for};

const MIB: u64 = 256;

/// Between two of what happens to the agent.
const PAUSE: Duration = Duration::from_millis(500);

/// What happens to the agent while the guest writes.
#[derive(Clone, Copy)]
enum Happens {
    Nothing,
    Restart,
    Killed,
}

/// See the module's description.
pub(super) fn run(setting: &Setting<'_>) -> anyhow::Result<String> {
    let directory = setting.place.join("restart");
    let mut text = format!(
        "4 KiB random writes, QD 1, over a disk of {MIB} MiB in sync, through a `qemu-storage-daemon` that connects again; `agent run --hold`. Medians and the highest of {} rounds.\n\n| | longest write | the highest |\n|---|---|---|\n",
        setting.rounds
    );
    let cases = [
        ("nothing happens", Happens::Nothing),
        ("`agent restart`", Happens::Restart),
        ("`kill -9` of the agent", Happens::Killed),
    ];
    for (what, happens) in cases {
        let mut longest = Vec::new();
        for _ in 0..setting.rounds {
            std::fs::create_dir_all(&directory)?;
            longest.push(measure(setting, &directory, happens)? / 1000.0);
            std::fs::remove_dir_all(&directory)?;
        }
        let highest = longest.iter().copied().fold(0.0, f64::max);
        eprintln!("restart: {what}: {:.0} ms, at the most {highest:.0} ms", middle(&longest));
        text += &format!("| {what} | {:.0} ms | {highest:.0} ms |\n", middle(&longest));
    }
    Ok(text)
}

/// The longest write, in microseconds.
fn measure(setting: &Setting<'_>, directory: &Path, happens: Happens) -> anyhow::Result<f64> {
    let image = image(directory, "disk.raw", MIB)?;
    let stand = Stand::held(setting.backtide, directory)?;
    stand.attach(&image, &[])?;
    stand.wait_for_sync()?;
    let reconnecting = Reconnecting::before(directory)?;
    let guest = Guest::start(
        &reconnecting.uri,
        "randwrite",
        MIB,
        &["--time_based", "--norandommap", "--iodepth=1", "--runtime=600"],
    )?;
    sleep(PAUSE);
    match happens {
        Happens::Nothing => {}
        Happens::Restart => stand.obey(&["agent", "restart"])?,
        Happens::Killed => kill_child_of(stand.agent_id())?,
    }
    sleep(PAUSE * 3);
    Ok(guest.stop()?.longest_us)
}

fn kill_child_of(holder: u32) -> anyhow::Result<()> {
    let killed = Command::new("pkill").args(["-KILL", "-P", &holder.to_string()]).status()?;
    if !killed.success() {
        bail!("the agent cannot be killed");
    }
    Ok(())
}

/// A client that connects again, and serves what it reaches.
struct Reconnecting {
    daemon: Child,
    uri: String,
}

impl Reconnecting {
    fn before(directory: &Path) -> anyhow::Result<Self> {
        let (there, own) = (directory.join("nbd.sock"), directory.join("again.sock"));
        let daemon = Command::new("qemu-storage-daemon")
            .arg("--blockdev")
            .arg(format!(
                "driver=nbd,node-name=disk,server.type=unix,server.path={},export=disk,reconnect-delay=60",
                there.display()
            ))
            .arg("--nbd-server")
            .arg(format!("addr.type=unix,addr.path={}", own.display()))
            .args(["--export", "type=nbd,id=disk,node-name=disk,name=disk,writable=on"])
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .spawn()
            .context("start qemu-storage-daemon")?;
        let reconnecting = Self { daemon, uri: format!("nbd+unix:///disk?socket={}", own.display()) };
        wait_for(&own)?;
        Ok(reconnecting)
    }
}

impl Drop for Reconnecting {
    fn drop(&mut self) {
        // Gone already, or ended now: either is fine at the end.
        let _ = self.daemon.kill();
        let _ = self.daemon.wait();
    }
}
