//! The servers measured, each started as its own documentation says, each with files of its own.

use std::{
    ffi::OsString,
    fs::File,
    io::{BufRead, BufReader, Write},
    net::TcpListener,
    os::unix::net::UnixStream,
    path::{Path, PathBuf},
    process::{Child, Command, Stdio},
    thread::sleep,
    time::Duration,
};

use anyhow::{Context, bail};
use serde_json::{Value, json};

/// Who is measured.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Kind {
    QemuNbd,
    NbdkitFile,
    /// `qemu-storage-daemon` that writes each write to a second NBD server before it answers.
    Mirror,
    /// Backtide without a receiver: changes are marked in the bitmap.
    Tracking,
    /// Backtide in sync with a receiver on this machine.
    Sync,
    /// `qemu-nbd` around the page cache.
    QemuNbdDirect,
    /// Backtide in sync, around the page cache.
    SyncDirect,
    /// Backtide in sync, where flushes wait for the receiver.
    SyncDurable,
    /// Backtide in sync over TCP, without TLS and with it.
    SyncTcp,
    SyncTls,
}

/// Where a receiver takes the stream.
struct StreamAt {
    address: String,
    pki: Option<PathBuf>,
}

impl StreamAt {
    /// The options that name the certificates of `whose`.
    fn certificates(&self, whose: &str) -> Vec<OsString> {
        let folder = self.pki.as_ref().map(|pki| pki.join(whose));
        folder.map_or(Vec::new(), |folder| vec!["--tls-certificates".into(), folder.into()])
    }
}

/// A running server.
pub(crate) struct Server {
    kind: Kind,
    uri: String,
    children: Vec<(&'static str, Child)>,
    agent: Option<(PathBuf, String)>,
}

impl Kind {
    pub(crate) const ALL: [Self; 10] = [
        Self::QemuNbd,
        Self::NbdkitFile,
        Self::Mirror,
        Self::Tracking,
        Self::Sync,
        Self::QemuNbdDirect,
        Self::SyncDirect,
        Self::SyncDurable,
        Self::SyncTcp,
        Self::SyncTls,
    ];

    pub(crate) fn name(self) -> &'static str {
        match self {
            Self::QemuNbd => "qemu-nbd",
            Self::NbdkitFile => "nbdkit file",
            Self::Mirror => "qsd mirror",
            Self::Tracking => "backtide tracking",
            Self::Sync => "backtide sync",
            Self::QemuNbdDirect => "qemu-nbd direct",
            Self::SyncDirect => "backtide sync direct",
            Self::SyncDurable => "backtide sync durable",
            Self::SyncTcp => "backtide sync tcp",
            Self::SyncTls => "backtide sync tls",
        }
    }

    /// Whether it goes around the page cache.
    fn is_direct(self) -> bool {
        match self {
            Self::QemuNbdDirect | Self::SyncDirect => true,
            Self::QemuNbd | Self::NbdkitFile | Self::Mirror | Self::Tracking | Self::Sync => false,
            Self::SyncDurable | Self::SyncTcp | Self::SyncTls => false,
        }
    }

    fn has_receiver(self) -> bool {
        match self {
            Self::Sync | Self::SyncDirect | Self::SyncDurable | Self::SyncTcp | Self::SyncTls => true,
            Self::QemuNbd | Self::NbdkitFile | Self::Mirror | Self::Tracking | Self::QemuNbdDirect => false,
        }
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        for (_, child) in &mut self.children {
            // Gone already, or ended now: either is fine at the end.
            let _ = child.kill();
            let _ = child.wait();
        }
    }
}

impl Server {
    pub(crate) fn start(
        kind: Kind,
        directory: &Path,
        backtide: &Path,
        size_mib: u64,
    ) -> anyhow::Result<Self> {
        std::fs::create_dir_all(directory)?;
        let image = image(directory, "disk.raw", size_mib)?;
        let socket = directory.join("nbd.sock");
        let mut server = Self {
            kind,
            uri: format!("nbd+unix:///disk?socket={}", socket.display()),
            children: Vec::new(),
            agent: None,
        };
        match kind {
            Kind::QemuNbd | Kind::QemuNbdDirect => {
                server.spawn("server", qemu_nbd(&image, &socket, "disk", kind.is_direct()))?;
            }
            Kind::NbdkitFile => {
                let mut command = Command::new("nbdkit");
                command.args(["--foreground", "--exit-with-parent", "--exportname=disk", "--unix"]);
                command.arg(&socket).arg("file").arg(&image);
                server.spawn("server", command)?;
            }
            Kind::Mirror => server.start_mirror(directory, &image, &socket, size_mib)?,
            Kind::Tracking
            | Kind::Sync
            | Kind::SyncDirect
            | Kind::SyncDurable
            | Kind::SyncTcp
            | Kind::SyncTls => server.start_backtide(directory, &image, &socket, backtide)?,
        }
        wait_for(&socket)?;
        if kind == Kind::Mirror {
            start_mirroring(&directory.join("qmp.sock"), &directory.join("copy.sock"))?;
        }
        Ok(server)
    }

    pub(crate) fn uri(&self) -> &str {
        &self.uri
    }

    fn spawn(&mut self, name: &'static str, mut command: Command) -> anyhow::Result<()> {
        let child = command.stdin(Stdio::null()).stdout(Stdio::null()).spawn();
        self.children.push((name, child.with_context(|| format!("start {:?}", command.get_program()))?));
        Ok(())
    }

    fn start_mirror(
        &mut self,
        directory: &Path,
        image: &Path,
        socket: &Path,
        size_mib: u64,
    ) -> anyhow::Result<()> {
        let copy = self::image(directory, "copy.raw", size_mib)?;
        let copy_socket = directory.join("copy.sock");
        self.spawn("copy's server", qemu_nbd(&copy, &copy_socket, "copy", false))?;
        wait_for(&copy_socket)?;
        let mut command = Command::new("qemu-storage-daemon");
        command
            .arg("--chardev")
            .arg(format!("socket,id=qmp,server=on,wait=off,path={}", directory.join("qmp.sock").display()));
        command.args(["--monitor", "chardev=qmp", "--blockdev"]);
        command.arg(format!("driver=file,node-name=disk,filename={},discard=unmap", image.display()));
        command.arg("--nbd-server").arg(format!("addr.type=unix,addr.path={}", socket.display()));
        command.args(["--export", "type=nbd,id=e,node-name=disk,name=disk,writable=on"]);
        self.spawn("server", command)
    }

    fn start_backtide(
        &mut self,
        directory: &Path,
        image: &Path,
        socket: &Path,
        backtide: &Path,
    ) -> anyhow::Result<()> {
        let [agent, receiver] =
            ["agent.sock", "receiver.sock"].map(|name| format!("unix:{}", directory.join(name).display()));
        let stream = self.stream(directory, backtide)?;
        if self.kind.has_receiver() {
            let mut command = Command::new(backtide);
            command.args(["receiver", "run", "--store"]).arg(directory.join("store"));
            command.args(["--listen", &stream.address, "--api", &receiver]).env("RUST_LOG", "error");
            command.args(stream.certificates("localhost"));
            self.spawn("receiver", command)?;
            wait_for(&directory.join("receiver.sock"))?;
        }
        let mut command = Command::new(backtide);
        command.args(["agent", "run", "--state"]).arg(directory.join("state"));
        command.args(["--api", &agent]).env("RUST_LOG", "error");
        self.spawn("agent", command)?;
        wait_for(&directory.join("agent.sock"))?;
        let nbd = format!("nbd+unix:///disk?socket={}", socket.display());
        let mut attach = Command::new(backtide);
        attach.args(["--agent", &agent, "attach", "disk"]).arg(image).args([
            "--receiver",
            &stream.address.replace("127.0.0.1", "localhost"),
            "--nbd",
            &nbd,
            "--cache",
            if self.kind.is_direct() { "direct" } else { "writeback" },
            "--ack",
            if self.kind == Kind::SyncDurable { "durable" } else { "local" },
        ]);
        attach.args(stream.certificates("agent"));
        succeed(&mut attach)?;
        self.agent = Some((backtide.to_path_buf(), agent));
        Ok(())
    }

    /// The address of the stream, and certificates of its own where it has them.
    fn stream(&self, directory: &Path, backtide: &Path) -> anyhow::Result<StreamAt> {
        // Free a moment ago: whoever takes it first has it, and then this run ends with an error.
        let free_port = || Ok::<_, std::io::Error>(TcpListener::bind("127.0.0.1:0")?.local_addr()?.port());
        let address = match self.kind {
            Kind::SyncTcp => format!("tcp://127.0.0.1:{}", free_port()?),
            Kind::SyncTls => format!("tls://127.0.0.1:{}", free_port()?),
            Kind::QemuNbd
            | Kind::NbdkitFile
            | Kind::Mirror
            | Kind::Tracking
            | Kind::Sync
            | Kind::QemuNbdDirect
            | Kind::SyncDirect
            | Kind::SyncDurable => format!("unix:{}", directory.join("stream.sock").display()),
        };
        let pki = (self.kind == Kind::SyncTls).then(|| directory.join("pki"));
        if let Some(pki) = &pki {
            for arguments in [["init", "--receiver", "localhost"].as_slice(), &["issue", "agent"]] {
                let mut command = Command::new(backtide);
                succeed(command.args(["pki", arguments[0]]).arg(pki).args(&arguments[1..]))?;
            }
        }
        Ok(StreamAt { address, pki })
    }

    /// Waits until the server is in the state that is to be measured.
    pub(crate) fn settle(&self) -> anyhow::Result<()> {
        if self.kind.has_receiver() {
            let (backtide, agent) = self.agent.as_ref().expect("started with an agent");
            let mut wait = Command::new(backtide);
            wait.args(["--agent", agent, "wait", "disk", "--for", "sync"]);
            succeed(&mut wait)?;
        }
        Ok(())
    }

    /// Peak memory of each process and, for Backtide, what happened to the disk.
    pub(crate) fn facts(&self) -> anyhow::Result<Vec<(String, f64)>> {
        let mut facts = Vec::new();
        for (name, child) in &self.children {
            let status = std::fs::read_to_string(format!("/proc/{}/status", child.id()))?;
            let peak = status.lines().find_map(|line| line.strip_prefix("VmHWM:"));
            let kib = peak.and_then(|text| text.trim().strip_suffix(" kB")).context("a peak of memory")?;
            facts.push((format!("{name}: peak memory, MiB"), kib.parse::<f64>()? / 1024.0));
        }
        if let Some((backtide, agent)) = &self.agent {
            let output =
                Command::new(backtide).args(["--agent", agent, "--json", "status", "disk"]).output()?;
            let status: Value = serde_json::from_slice(&output.stdout).context("read the status")?;
            let counters = &status["disks"][0]["counters"];
            for (counter, what) in
                [("window_overflows", "window overflows"), ("guest_delay_max_us", "longest delay, µs")]
            {
                facts.push((what.to_owned(), counters[counter].as_f64().context("a counter")?));
            }
        }
        Ok(facts)
    }

    pub(crate) fn stop(mut self) -> anyhow::Result<()> {
        for (_, child) in &mut self.children {
            child.kill()?;
            child.wait()?;
        }
        self.children.clear();
        Ok(())
    }
}

/// A file of that size, all of it written, so that no server meets a hole.
pub(crate) fn image(directory: &Path, name: &str, size_mib: u64) -> anyhow::Result<PathBuf> {
    let path = directory.join(name);
    let mut file = File::create(&path)?;
    let mut block = vec![0u8; 1 << 20];
    let mut state = 0x9e37_79b9_7f4a_7c15u64;
    for _ in 0..size_mib {
        for word in block.chunks_exact_mut(8) {
            state ^= state << 13;
            state ^= state >> 7;
            state ^= state << 17;
            word.copy_from_slice(&state.to_le_bytes());
        }
        file.write_all(&block)?;
    }
    file.sync_all()?;
    Ok(path)
}

fn qemu_nbd(image: &Path, socket: &Path, name: &str, direct: bool) -> Command {
    let mut command = Command::new("qemu-nbd");
    command.args(["--format=raw", "--persistent", "--shared=8", "--discard=unmap"]);
    command.arg(if direct { "--cache=none" } else { "--cache=writeback" });
    command.arg(format!("--export-name={name}")).arg("--socket").arg(socket).arg(image);
    command
}

/// Copies the disk to the second server and from then on writes to both before answering.
fn start_mirroring(qmp: &Path, copy: &Path) -> anyhow::Result<()> {
    let stream = UnixStream::connect(qmp).context("connect to qemu-storage-daemon")?;
    let mut lines = BufReader::new(stream.try_clone()?).lines();
    let mut writer = stream;
    let server = json!({"type": "unix", "path": copy});
    for command in [
        json!({"execute": "qmp_capabilities"}),
        json!({"execute": "blockdev-add", "arguments": {"driver": "nbd", "node-name": "copy", "server": server, "export": "copy"}}),
        json!({"execute": "blockdev-mirror", "arguments": {"job-id": "mirror", "device": "disk", "target": "copy", "sync": "full", "copy-mode": "write-blocking"}}),
    ] {
        writeln!(writer, "{command}")?;
        loop {
            let line = lines.next().context("qemu-storage-daemon ended")??;
            let answer: Value = serde_json::from_str(&line)?;
            if let Some(error) = answer.get("error") {
                bail!("qemu-storage-daemon refused {command}: {error}");
            }
            if answer.get("return").is_some() {
                break;
            }
        }
    }
    for line in lines {
        let event: Value = serde_json::from_str(&line?)?;
        if event["event"] == "BLOCK_JOB_READY" {
            return Ok(());
        }
    }
    bail!("qemu-storage-daemon ended before the mirror was ready")
}

pub(crate) fn wait_for(socket: &Path) -> anyhow::Result<()> {
    for _ in 0..1000 {
        if UnixStream::connect(socket).is_ok() {
            return Ok(());
        }
        sleep(Duration::from_millis(10));
    }
    bail!("nobody listens at {}", socket.display())
}

pub(crate) fn succeed(command: &mut Command) -> anyhow::Result<()> {
    let output = command.output().with_context(|| format!("run {command:?}"))?;
    // 3: done with a warning, as an attach is whose receiver is away on purpose.
    if !matches!(output.status.code(), Some(0 | 3)) {
        bail!("{command:?}: {}", String::from_utf8_lossy(&output.stderr));
    }
    Ok(())
}
