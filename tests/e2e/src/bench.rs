//! A directory in which daemons run and commands are given.

use std::{
    cell::Cell,
    os::fd::OwnedFd,
    path::{Path, PathBuf},
    process::{Command, ExitStatus, Stdio},
};

use serde_json::Value;

use crate::{Daemon, Disk, Doomed, left};

/// A directory with everything in it: sockets, store, state, images and logs.
pub struct Bench {
    directory: tempfile::TempDir,
    started: Cell<u32>,
}

/// What a command said, and how it ended.
#[derive(Debug)]
pub struct Said {
    /// Its exit code.
    pub code: i32,
    /// What it printed.
    pub stdout: String,
    /// What it complained about.
    pub stderr: String,
}

impl Said {
    /// The error object of a command that was run with `--json` and failed.
    pub fn error(&self) -> Value {
        let last = self.stderr.lines().last().unwrap_or_default();
        let error: Value =
            serde_json::from_str(last).unwrap_or_else(|error| panic!("no JSON error: {error}: {self:?}"));
        error["error"].clone()
    }

    /// The one sentence of the error, after checking that it is one.
    pub fn sentence(&self) -> String {
        let error = self.error();
        let message = error["message"].as_str().unwrap_or_else(|| panic!("no message: {self:?}")).to_owned();
        assert!(!message.is_empty() && !message.contains('\n'), "one sentence: {message:?}");
        message
    }
}

impl Default for Bench {
    fn default() -> Self {
        Self::new()
    }
}

impl Drop for Bench {
    fn drop(&mut self) {
        left::end_servers_of(self.directory.path());
    }
}

impl Bench {
    /// An empty directory.
    pub fn new() -> Self {
        let directory = tempfile::Builder::new().prefix("backtide-").tempdir().expect("make a directory");
        Self { directory, started: Cell::new(0) }
    }

    /// A path in the directory.
    pub fn path(&self, name: &str) -> PathBuf {
        self.directory.path().join(name)
    }

    /// The same as text.
    pub fn name(&self, name: &str) -> String {
        text(&self.path(name))
    }

    /// An address in the directory.
    pub fn socket(&self, name: &str) -> String {
        format!("unix:{}", self.name(name))
    }

    /// A file of zeroes, all of it a hole.
    pub fn image(&self, name: &str, bytes: u64) -> PathBuf {
        let path = self.path(name);
        let file = std::fs::File::create(&path).expect("create an image");
        file.set_len(bytes).expect("size an image");
        path
    }

    /// The binary under test, told where this bench's daemons are.
    pub fn command(&self, arguments: &[&str]) -> Command {
        let mut command = Command::new(binary());
        self.set_up(&mut command, arguments);
        command
    }

    fn set_up(&self, command: &mut Command, arguments: &[&str]) {
        command
            .args(arguments)
            .env("BACKTIDE_AGENT", self.socket("agent.sock"))
            .env("BACKTIDE_RECEIVER", self.socket("receiver.sock"))
            .env("BACKTIDE_STORE", self.path("store"))
            .env("BACKTIDE_STATE", self.path("state"))
            .env("TMPDIR", self.directory.path())
            .env("RUST_BACKTRACE", "1")
            .env_remove("RUST_LOG")
            .stdin(Stdio::null());
    }

    /// Runs a command with `--json` to its end.
    pub fn run(&self, arguments: &[&str]) -> Said {
        self.plain(&[&["--json"], arguments].concat())
    }

    /// Runs a command to its end as a person does, without `--json`.
    pub fn plain(&self, arguments: &[&str]) -> Said {
        let output = self.command(arguments).output().expect("run backtide");
        Said {
            code: exit_code(output.status),
            stdout: String::from_utf8(output.stdout).expect("text on stdout"),
            stderr: String::from_utf8(output.stderr).expect("text on stderr"),
        }
    }

    /// Runs a command that must end with 0, and gives its result.
    pub fn json(&self, arguments: &[&str]) -> Value {
        self.json_ending(0, arguments)
    }

    /// Runs a command that must end with `code` and a result, and gives the result.
    pub fn json_ending(&self, code: i32, arguments: &[&str]) -> Value {
        let said = self.run(arguments);
        assert_eq!(said.code, code, "{arguments:?}: {said:?}");
        serde_json::from_str(&said.stdout).unwrap_or_else(|error| panic!("{arguments:?}: {error}: {said:?}"))
    }

    /// A program of this bench's own, with the directory it is in.
    pub fn script(&self, name: &str, text: &str) {
        use std::os::unix::fs::PermissionsExt;
        let path = self.path(name);
        let parent = path.parent().expect("a path in the directory");
        std::fs::create_dir_all(parent).expect("make a directory");
        std::fs::write(&path, text).expect("write a script");
        std::fs::set_permissions(&path, PermissionsExt::from_mode(0o755)).expect("make a script executable");
    }

    /// Starts a daemon and waits until it says that it is ready.
    pub fn daemon(&self, arguments: &[&str]) -> Daemon {
        self.daemon_with(arguments, &[])
    }

    /// The same when it may have only so many files open, until it asks for more.
    pub fn limited_daemon(&self, open_files: u32, arguments: &[&str]) -> Daemon {
        let binary = text(&binary());
        let script = format!("ulimit -Sn {open_files} && exec setpriv --pdeathsig KILL \"$@\"");
        let mut command = Command::new("sh");
        command.args(["-c", &script, "sh", &binary, "--json"]);
        self.set_up(&mut command, arguments);
        Daemon::start(command, &self.path("limited.log"))
    }

    /// The same when `wrapper`, a program with its first arguments, starts it.
    pub fn daemon_under(&self, wrapper: &[&str], arguments: &[&str]) -> Daemon {
        self.started.set(self.started.get() + 1);
        let log = self.path(&format!("{}-{}.log", arguments[0], self.started.get()));
        let mut command = Command::new(wrapper[0]);
        command.args(&wrapper[1..]).args(["setpriv", "--pdeathsig", "KILL", &text(&binary()), "--json"]);
        self.set_up(&mut command, arguments);
        Daemon::start(command, &log)
    }

    /// The same with more in its environment.
    pub fn daemon_with(&self, arguments: &[&str], environment: &[(&str, &str)]) -> Daemon {
        let (command, log) = self.daemon_command(arguments, environment);
        Daemon::start(command, &log)
    }

    /// Starts a daemon that is going to die at a kill point: a name of `backtide_storage::KillPoint`,
    /// perhaps with how often it is to be reached, as `NAME:3`.
    pub fn doomed(&self, arguments: &[&str], kill_at: &str) -> Doomed {
        let (command, log) = self.daemon_command(arguments, &[("BACKTIDE_KILL_AT", kill_at)]);
        Doomed::start(command, &log)
    }

    fn daemon_command(&self, arguments: &[&str], environment: &[(&str, &str)]) -> (Command, PathBuf) {
        self.started.set(self.started.get() + 1);
        let log = self.path(&format!("{}-{}.log", arguments[0], self.started.get()));
        let binary = text(&binary());
        // The daemon dies with the thread of its test, however that ends.
        let mut command = Command::new("setpriv");
        command.args(["--pdeathsig", "KILL", &binary, "--json"]);
        self.set_up(&mut command, arguments);
        command.envs(environment.iter().copied());
        (command, log)
    }

    /// An agent that a service manager starts with one listening socket, which it calls `name`.
    pub fn activated_agent(&self, name: &str, socket: OwnedFd, environment: &[(&str, &str)]) -> Daemon {
        let (inner, log) = self.daemon_command(&["agent", "run"], environment);
        let script = "export LISTEN_PID=$$ LISTEN_FDS=1; exec \"$@\" 3<&0 </dev/null";
        let mut command = Command::new("sh");
        command.args(["-c", script, "sh"]).arg(inner.get_program()).args(inner.get_args());
        command.envs(inner.get_envs().filter_map(|(name, value)| Some((name, value?))));
        command.env_remove("RUST_LOG").env("LISTEN_FDNAMES", name).stdin(Stdio::from(socket));
        Daemon::start(command, &log)
    }

    /// A receiver with the defaults, that takes streams at `stream.sock`.
    pub fn receiver(&self) -> Daemon {
        self.daemon(&["receiver", "run"])
    }

    /// A receiver with a configuration file.
    pub fn receiver_with(&self, configuration: &str) -> Daemon {
        let file = self.path("receiver.toml");
        std::fs::write(&file, configuration).expect("write a configuration");
        self.daemon(&["receiver", "run", "--config", &text(&file)])
    }

    /// An agent with the defaults.
    pub fn agent(&self) -> Daemon {
        self.daemon(&["agent", "run"])
    }

    /// Attaches an image in this directory, or an NBD URI, to the receiver of this bench, which must
    /// be there.
    pub fn attach(&self, name: &str, image: &str, options: &[&str]) -> Disk<'_> {
        self.attach_ending(0, name, image, options)
    }

    /// The same when the command must end with `code`.
    pub fn attach_ending(&self, code: i32, name: &str, image: &str, options: &[&str]) -> Disk<'_> {
        self.attach_ending_to(code, &self.socket("stream.sock"), name, image, options)
    }

    /// Attaches to a receiver at another address.
    pub fn attach_to(&self, receiver: &str, name: &str, image: &str, options: &[&str]) -> Disk<'_> {
        self.attach_ending_to(0, receiver, name, image, options)
    }

    fn attach_ending_to(
        &self,
        code: i32,
        receiver: &str,
        name: &str,
        image: &str,
        options: &[&str],
    ) -> Disk<'_> {
        let image = if image.contains("://") { image.to_owned() } else { self.name(image) };
        let attach = ["attach", name, &image, "--receiver", receiver];
        self.json_ending(code, &[&attach, options].concat());
        Disk::new(self, name, &image)
    }

    /// A disk that is attached already, its image in this directory under its name.
    pub fn disk(&self, name: &str) -> Disk<'_> {
        Disk::new(self, name, &self.name(name))
    }

    /// A receiver, an agent, and a disk `vm1` of `bytes` that is in sync.
    pub fn protected(&self, bytes: u64, options: &[&str]) -> (Daemon, Daemon, Disk<'_>) {
        let (receiver, agent) = (self.receiver(), self.agent());
        self.image("vm1.img", bytes);
        let disk = self.attach("vm1", "vm1.img", options);
        disk.wait("sync");
        (receiver, agent, disk)
    }
}

/// A path that is text, as all of ours are.
pub(crate) fn text(path: &Path) -> String {
    path.to_str().expect("a path that is text").to_owned()
}

/// Where cargo puts what it builds: `target/PROFILE`.
pub(crate) fn build_directory() -> PathBuf {
    let test = std::env::current_exe().expect("this executable has a path");
    test.parent().and_then(Path::parent).expect("an executable is in target/PROFILE/deps").to_owned()
}

/// The binary of the same build: cargo puts it beside the directory of test executables.
fn binary() -> PathBuf {
    if let Some(binary) = std::env::var_os("BACKTIDE_BINARY") {
        return binary.into();
    }
    let binary = build_directory().join("backtide");
    assert!(binary.exists(), "{} is missing: run `cargo build -p backtide` first", binary.display());
    binary
}

fn exit_code(status: ExitStatus) -> i32 {
    status.code().unwrap_or_else(|| panic!("ended by a signal: {status}"))
}
