//! An agent with one disk, and a receiver when the row needs one, in a directory of their own.

use std::{
    path::{Path, PathBuf},
    process::{Child, Command, Stdio},
};

use anyhow::Context;
use serde_json::Value;

use crate::servers::{succeed, wait_for};

/// A receiver's settings, in the stand's directory.
const SETTINGS: &str = "receiver.toml";

/// A daemon of a stand.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Role {
    Agent,
    Receiver,
}

impl Role {
    pub(crate) fn name(self) -> &'static str {
        match self {
            Self::Agent => "agent",
            Self::Receiver => "receiver",
        }
    }
}

/// See the module's description.
pub(crate) struct Stand {
    backtide: PathBuf,
    directory: PathBuf,
    agent: Child,
    receiver: Option<Child>,
    /// Whether `agent` is the process that starts it again when it dies.
    held: bool,
}

impl Drop for Stand {
    fn drop(&mut self) {
        if self.held {
            // One that is killed leaves its agent behind.
            let asked = Command::new("kill").arg(self.agent.id().to_string()).status();
            if asked.is_ok_and(|asked| asked.success()) {
                let _ = self.agent.wait();
            }
        }
        for child in [Some(&mut self.agent), self.receiver.as_mut()].into_iter().flatten() {
            // Gone already, or ended now: either is fine at the end.
            let _ = child.kill();
            let _ = child.wait();
        }
    }
}

impl Stand {
    /// The daemons, before a disk is attached.
    pub(crate) fn start(backtide: &Path, directory: &Path, receives: bool) -> anyhow::Result<Self> {
        Self::start_with(backtide, directory, receives, false, |_| Vec::new())
    }

    /// The same, run by another program each.
    pub(crate) fn start_under(
        backtide: &Path,
        directory: &Path,
        receives: bool,
        under: impl Fn(Role) -> Vec<String>,
    ) -> anyhow::Result<Self> {
        Self::start_with(backtide, directory, receives, false, under)
    }

    /// The same, with a receiver that has these settings.
    pub(crate) fn with_settings(backtide: &Path, directory: &Path, settings: &str) -> anyhow::Result<Self> {
        std::fs::create_dir_all(directory)?;
        std::fs::write(directory.join(SETTINGS), settings)?;
        Self::start(backtide, directory, true)
    }

    /// The same, with a receiver and an agent that is started again when it dies.
    pub(crate) fn held(backtide: &Path, directory: &Path) -> anyhow::Result<Self> {
        Self::start_with(backtide, directory, true, true, |_| Vec::new())
    }

    fn start_with(
        backtide: &Path,
        directory: &Path,
        receives: bool,
        held: bool,
        under: impl Fn(Role) -> Vec<String>,
    ) -> anyhow::Result<Self> {
        std::fs::create_dir_all(directory)?;
        let start_receiver = || receiver(&under(Role::Receiver), backtide, directory).spawn();
        let receiver = receives.then(start_receiver).transpose().context("start a receiver")?;
        let mut agent = daemon_under(&under(Role::Agent), backtide, directory);
        agent.args(["agent", "run"]).args(held.then_some("--hold"));
        let agent = agent.spawn().context("start an agent")?;
        let (backtide, directory) = (backtide.to_owned(), directory.to_owned());
        let stand = Self { backtide, directory, agent, receiver, held };
        let directory = &stand.directory;
        if receives {
            wait_for(&directory.join("stream.sock"))?;
        }
        wait_for(&directory.join("agent.sock"))?;
        Ok(stand)
    }

    /// The daemons that run, and their processes.
    pub(crate) fn roles(&self) -> impl Iterator<Item = (Role, u32)> {
        let receiver = self.receiver.as_ref().map(|receiver| (Role::Receiver, receiver.id()));
        [(Role::Agent, self.agent.id())].into_iter().chain(receiver)
    }

    /// Ends the daemons in good order.
    pub(crate) fn end(mut self) -> anyhow::Result<()> {
        for child in [Some(&mut self.agent), self.receiver.as_mut()].into_iter().flatten() {
            succeed(Command::new("kill").arg(child.id().to_string()))?;
            child.wait()?;
        }
        Ok(())
    }

    /// Attaches the image as `disk`.
    pub(crate) fn attach(&self, image: &Path, options: &[&str]) -> anyhow::Result<()> {
        let stream = self.stream();
        let image = image.to_str().context("a path that is text")?;
        self.obey(
            &[&["attach", "disk", image, "--receiver", &stream, "--nbd", &self.uri()], options].concat(),
        )
    }

    /// Where the receiver takes streams.
    pub(crate) fn stream(&self) -> String {
        format!("unix:{}", self.directory.join("stream.sock").display())
    }

    pub(crate) fn uri(&self) -> String {
        format!("nbd+unix:///disk?socket={}", self.directory.join("nbd.sock").display())
    }

    /// Runs a command of backtide to its end.
    pub(crate) fn obey(&self, arguments: &[&str]) -> anyhow::Result<()> {
        let mut command = daemon(&self.backtide, &self.directory);
        command.args(arguments);
        succeed(&mut command)
    }

    pub(crate) fn wait_for_sync(&self) -> anyhow::Result<()> {
        self.obey(&["wait", "disk", "--for", "sync", "--timeout", "30m"])
    }

    pub(crate) fn status(&self) -> anyhow::Result<Value> {
        Ok(self.ask(&["status", "disk"])?["disks"][0].clone())
    }

    /// What a command of backtide answers.
    pub(crate) fn ask(&self, arguments: &[&str]) -> anyhow::Result<Value> {
        let mut command = daemon(&self.backtide, &self.directory);
        let output = command.arg("--json").args(arguments).stdout(Stdio::piped()).output()?;
        serde_json::from_slice(&output.stdout).with_context(|| format!("the answer to {arguments:?}"))
    }

    /// Ends the receiver in good order.
    pub(crate) fn stop_receiver(&mut self) -> anyhow::Result<()> {
        let mut receiver = self.receiver.take().context("a stand with a receiver")?;
        succeed(Command::new("kill").arg(receiver.id().to_string()))?;
        receiver.wait()?;
        Ok(())
    }

    /// Starts a receiver where there is none; ready when it answers.
    pub(crate) fn start_receiver(&mut self) -> anyhow::Result<()> {
        self.receiver = Some(receiver(&[], &self.backtide, &self.directory).spawn()?);
        wait_for(&self.directory.join("receiver.sock"))
    }

    /// Bytes of memory that the receiver has to itself.
    pub(crate) fn receiver_memory(&self) -> anyhow::Result<f64> {
        let receiver = self.receiver.as_ref().context("a stand with a receiver")?;
        let status = std::fs::read_to_string(format!("/proc/{}/status", receiver.id()))?;
        let line = status.lines().find_map(|line| line.strip_prefix("RssAnon:"));
        let kib = line.and_then(|text| text.trim().strip_suffix(" kB")).context("a size of memory")?;
        Ok(kib.parse::<f64>()? * 1024.0)
    }

    /// Everything the agent has written to files and sockets so far, in bytes.
    pub(crate) fn agent_wrote(&self) -> anyhow::Result<u64> {
        let io = std::fs::read_to_string(format!("/proc/{}/io", self.agent.id()))?;
        let written = io.lines().find_map(|line| line.strip_prefix("wchar: "));
        Ok(written.context("a count of bytes written")?.trim().parse()?)
    }

    /// The process that was started to be the agent, or to hold it.
    pub(crate) fn agent_id(&self) -> u32 {
        self.agent.id()
    }

    /// Where the receiver keeps its disks.
    pub(crate) fn store(&self) -> PathBuf {
        self.directory.join("store")
    }
}

/// A receiver, with its settings where it has some.
fn receiver(under: &[String], backtide: &Path, directory: &Path) -> Command {
    let mut command = daemon_under(under, backtide, directory);
    command.args(["receiver", "run"]);
    let settings = directory.join(SETTINGS);
    if settings.exists() {
        command.arg("--config").arg(settings);
    }
    command
}

/// Run by another program, if there is one.
fn daemon_under(under: &[String], backtide: &Path, directory: &Path) -> Command {
    let Some((program, arguments)) = under.split_first() else { return daemon(backtide, directory) };
    let mut command = daemon(Path::new(program), directory);
    command.args(arguments).arg(backtide);
    command
}

fn daemon(backtide: &Path, directory: &Path) -> Command {
    let socket = |name: &str| format!("unix:{}", directory.join(name).display());
    let mut command = Command::new(backtide);
    command
        .env("BACKTIDE_AGENT", socket("agent.sock"))
        .env("BACKTIDE_RECEIVER", socket("receiver.sock"))
        .env("BACKTIDE_STORE", directory.join("store"))
        .env("BACKTIDE_STATE", directory.join("state"))
        .env("RUST_LOG", "error")
        .stdin(Stdio::null())
        .stdout(Stdio::null());
    command
}
