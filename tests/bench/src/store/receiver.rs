//! A receiver of its own for a row, and what the system says of its process.

use std::{
    fs,
    path::{Path, PathBuf},
    process::{Child, Command, Stdio},
    time::{Duration, Instant},
};

use anyhow::Context;
use serde_json::Value;

use crate::servers::{succeed, wait_for};

/// A clock tick of `/proc/PID/stat`: 100 a second on Linux, whatever the kernel's own are.
const TICK: Duration = Duration::from_millis(10);

/// Where the processes' own counters stand.
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct Usage {
    pub(super) cpu: Duration,
    /// Bytes written to devices on its behalf.
    pub(super) written: u64,
    /// Flushes that its commits made, and disks that they made durable.
    pub(super) flushes: u64,
    pub(super) commits: u64,
}

/// A running receiver.
pub(super) struct Receiver {
    backtide: PathBuf,
    directory: PathBuf,
    child: Child,
}

impl Drop for Receiver {
    fn drop(&mut self) {
        // Gone already, or ended now: either is fine at the end.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

impl Receiver {
    pub(super) fn start(backtide: &Path, directory: &Path) -> anyhow::Result<Self> {
        fs::create_dir_all(directory)?;
        let child =
            command(backtide, directory).args(["receiver", "run"]).spawn().context("start a receiver")?;
        let receiver = Self { backtide: backtide.to_owned(), directory: directory.to_owned(), child };
        wait_for(&receiver.stream())?;
        receiver.status()?;
        Ok(receiver)
    }

    pub(super) fn stream(&self) -> PathBuf {
        self.directory.join("stream.sock")
    }

    pub(super) fn store(&self) -> PathBuf {
        self.directory.join("store")
    }

    /// Ends it in good order.
    pub(super) fn end(mut self) -> anyhow::Result<()> {
        succeed(Command::new("kill").arg(self.child.id().to_string()))?;
        self.child.wait()?;
        Ok(())
    }

    pub(super) fn status(&self) -> anyhow::Result<Value> {
        self.ask(&["receiver", "status"])
    }

    /// What a command of backtide answers.
    pub(super) fn ask(&self, arguments: &[&str]) -> anyhow::Result<Value> {
        let mut command = command(&self.backtide, &self.directory);
        let output =
            command.arg("--json").args(arguments).stderr(Stdio::piped()).stdout(Stdio::piped()).output()?;
        serde_json::from_slice(&output.stdout).with_context(|| {
            format!("the answer to {arguments:?}: {}", String::from_utf8_lossy(&output.stderr))
        })
    }

    /// How long a command of backtide takes, and what it answers.
    pub(super) fn time(&self, arguments: &[&str]) -> anyhow::Result<(Duration, Value)> {
        let begun = Instant::now();
        let answer = self.ask(arguments)?;
        Ok((begun.elapsed(), answer))
    }

    fn proc(&self, file: &str) -> anyhow::Result<String> {
        let path = format!("/proc/{}/{file}", self.child.id());
        fs::read_to_string(&path).with_context(|| format!("read {path}"))
    }

    /// Memory that is its own, in bytes: what it maps of its program's file is not counted.
    pub(super) fn memory(&self) -> anyhow::Result<u64> {
        self.status_field("RssAnon:").map(|kib| kib * 1024)
    }

    pub(super) fn threads(&self) -> anyhow::Result<u64> {
        self.status_field("Threads:")
    }

    pub(super) fn open_files(&self) -> anyhow::Result<usize> {
        Ok(fs::read_dir(format!("/proc/{}/fd", self.child.id()))?.count())
    }

    fn status_field(&self, name: &str) -> anyhow::Result<u64> {
        let status = self.proc("status")?;
        let line =
            status.lines().find_map(|line| line.strip_prefix(name)).context("a field of its status")?;
        Ok(line.split_whitespace().next().context("a number")?.parse()?)
    }

    pub(super) fn usage(&self) -> anyhow::Result<Usage> {
        let stat = self.proc("stat")?;
        // The name may have spaces; fields after it are counted from its end: the 12th and 13th are the times.
        let fields: Vec<&str> = stat.rsplit(')').next().unwrap_or_default().split_whitespace().collect();
        let ticks =
            |field: usize| fields.get(field).and_then(|text| text.parse::<u32>().ok()).context("a time");
        let io = self.proc("io")?;
        let written =
            io.lines().find_map(|line| line.strip_prefix("write_bytes: ")).context("bytes written")?;
        let status = self.status()?;
        let counted = |name: &str| status["commits"][name].as_u64().unwrap_or_default();
        Ok(Usage {
            cpu: TICK * (ticks(11)? + ticks(12)?),
            written: written.trim().parse()?,
            flushes: counted("flushes"),
            commits: counted("disks"),
        })
    }
}

fn command(backtide: &Path, directory: &Path) -> Command {
    let mut command = Command::new(backtide);
    let store = directory.join("store");
    command
        .env("BACKTIDE_RECEIVER", format!("unix:{}", directory.join("receiver.sock").display()))
        .env("BACKTIDE_STORE", store)
        .env("RUST_LOG", "error")
        .stdin(Stdio::null())
        .stdout(Stdio::null());
    command
}
