//! Running the real binary.

// Each test crate uses its own part of this.
#![allow(dead_code, reason = "shared by several test crates")]

use std::{
    io::{BufRead, BufReader},
    path::{Path, PathBuf},
    process::{Child, Command, ExitStatus, Stdio},
};

use serde_json::Value;

/// A directory with everything in it; daemons started in it end with it.
pub(crate) struct Bench {
    directory: tempfile::TempDir,
}

/// What a command said.
#[derive(Debug)]
pub(crate) struct Said {
    pub(crate) code: i32,
    pub(crate) stdout: String,
    pub(crate) stderr: String,
}

/// A daemon that printed that it is ready.
pub(crate) struct Daemon {
    child: Child,
    stdout: BufReader<std::process::ChildStdout>,
    pub(crate) ready: Value,
}

impl Bench {
    pub(crate) fn new() -> Self {
        Self { directory: tempfile::tempdir().unwrap() }
    }

    pub(crate) fn path(&self, name: &str) -> PathBuf {
        self.directory.path().join(name)
    }

    /// An address in this directory.
    pub(crate) fn socket(&self, name: &str) -> String {
        format!("unix:{}", self.path(name).display())
    }

    /// A file of zeroes.
    pub(crate) fn image(&self, name: &str, bytes: u64) -> PathBuf {
        let path = self.path(name);
        std::fs::File::create(&path).unwrap().set_len(bytes).unwrap();
        path
    }

    /// The binary, told where this bench's daemons are.
    pub(crate) fn command(&self, arguments: &[&str]) -> Command {
        let mut command = Command::new(env!("CARGO_BIN_EXE_backtide"));
        command
            .args(arguments)
            .env("BACKTIDE_AGENT", self.socket("agent.sock"))
            .env("BACKTIDE_RECEIVER", self.socket("receiver.sock"))
            .env("BACKTIDE_STORE", self.path("store"))
            .env("BACKTIDE_STATE", self.path("state"))
            .env("TMPDIR", self.directory.path())
            .env_remove("RUST_LOG")
            .stdin(Stdio::null());
        command
    }

    /// Runs a command to its end.
    pub(crate) fn run(&self, arguments: &[&str]) -> Said {
        let output = self.command(arguments).output().unwrap();
        Said {
            code: exit_code(output.status),
            stdout: String::from_utf8(output.stdout).unwrap(),
            stderr: String::from_utf8(output.stderr).unwrap(),
        }
    }

    /// Runs a command with `--json` that must succeed, and gives its result.
    pub(crate) fn json(&self, arguments: &[&str]) -> Value {
        let said = self.run(&[&["--json"], arguments].concat());
        assert_eq!(said.code, 0, "{arguments:?}: {said:?}");
        serde_json::from_str(&said.stdout).unwrap_or_else(|error| panic!("{arguments:?}: {error}: {said:?}"))
    }

    /// Starts a daemon and waits until it is ready.
    pub(crate) fn daemon(&self, arguments: &[&str]) -> Daemon {
        let log = std::fs::File::create(self.path(&format!("{}.log", arguments[0]))).unwrap();
        let mut child = self
            .command(&[&["--json"], arguments].concat())
            .stdout(Stdio::piped())
            .stderr(log)
            .spawn()
            .unwrap();
        let mut stdout = BufReader::new(child.stdout.take().unwrap());
        let mut line = String::new();
        stdout.read_line(&mut line).unwrap();
        let ready = serde_json::from_str(&line).unwrap_or_else(|error| {
            panic!("{arguments:?} is not ready: {error}: {line:?}, see {}", self.directory.path().display())
        });
        Daemon { child, stdout, ready }
    }

    /// The names in the directory.
    pub(crate) fn names(&self) -> Vec<String> {
        let entries = std::fs::read_dir(self.directory.path()).unwrap();
        entries.map(|entry| entry.unwrap().file_name().into_string().unwrap()).collect()
    }
}

impl Daemon {
    /// Ends it with ctrl-c and gives its exit code.
    pub(crate) fn interrupt(mut self) -> i32 {
        signal(&self.child, "INT");
        exit_code(self.child.wait().unwrap())
    }

    /// What a power cut does to a process.
    pub(crate) fn kill(mut self) {
        self.child.kill().unwrap();
        self.child.wait().unwrap();
    }
}

impl Drop for Daemon {
    fn drop(&mut self) {
        // It may have ended already, which is what the test wanted then.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// Sends a signal to a child that has not been waited for.
pub(crate) fn signal(child: &Child, name: &str) {
    let status = Command::new("kill").args(["-s", name, &child.id().to_string()]).status().unwrap();
    assert!(status.success(), "kill -s {name}");
}

pub(crate) fn exit_code(status: ExitStatus) -> i32 {
    status.code().unwrap_or_else(|| panic!("ended by a signal: {status}"))
}

/// Runs a tool that must be there and must succeed.
pub(crate) fn tool(package: &str, program: &str, arguments: &[&str]) {
    let output = Command::new(program)
        .args(arguments)
        .output()
        .unwrap_or_else(|error| panic!("{program} of the Debian package {package} is needed: {error}"));
    assert!(output.status.success(), "{program} {arguments:?}: {}", String::from_utf8_lossy(&output.stderr));
}

/// Whether two files hold the same bytes.
pub(crate) fn same(one: &Path, other: &Path) -> bool {
    std::fs::read(one).unwrap() == std::fs::read(other).unwrap()
}
