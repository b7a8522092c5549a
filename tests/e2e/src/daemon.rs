//! A daemon of ours, its log and its end.

use std::{
    io::{BufRead, BufReader, Read},
    os::unix::process::ExitStatusExt,
    path::{Path, PathBuf},
    process::{Child, ChildStdout, Command, Stdio},
};

use serde_json::Value;

/// A running `receiver run`, `agent run` or `up`.
///
/// Dropped, it is killed, and a line of level ERROR or a panic in its log fails the test, unless the
/// test said that it provokes one.
pub struct Daemon {
    child: Child,
    stdout: BufReader<ChildStdout>,
    log: PathBuf,
    forgiven: Vec<&'static str>,
    ended: bool,
    /// What it printed when it was ready.
    pub ready: Value,
}

/// How much of a log is shown when a test fails.
const SHOWN_LINES: usize = 60;

/// A daemon that is going to die by itself, at a kill point.
pub struct Doomed(Child);

impl Doomed {
    pub(crate) fn start(mut command: Command, log: &Path) -> Self {
        let file = std::fs::File::create(log).expect("create a log");
        let spawned = command.stdout(Stdio::null()).stderr(file).spawn();
        Self(spawned.unwrap_or_else(|error| panic!("run {command:?}: {error}")))
    }

    /// Whether it has died, which must be by SIGKILL.
    pub fn is_dead(&mut self) -> bool {
        let Some(status) = self.0.try_wait().expect("wait for a daemon") else { return false };
        assert_eq!(status.signal(), Some(9), "it was to die at its kill point: {status}");
        true
    }

    /// Waits for its death, which must be by SIGKILL: it answers no longer.
    pub fn died(&mut self) -> bool {
        self.0.wait().expect("wait for a daemon");
        self.is_dead()
    }

    /// Ends it where it is.
    pub fn kill(mut self) {
        self.0.kill().expect("kill a daemon");
        self.0.wait().expect("wait for a daemon");
    }
}

impl Drop for Doomed {
    fn drop(&mut self) {
        // It has ended, unless a test failed.
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

impl Daemon {
    pub(crate) fn start(mut command: Command, log: &Path) -> Self {
        let file = std::fs::File::create(log).expect("create a log");
        let mut child =
            command.stdout(Stdio::piped()).stderr(file).spawn().unwrap_or_else(|error| {
                panic!("setpriv of the Debian package util-linux is needed: {error}")
            });
        let stdout = BufReader::new(child.stdout.take().expect("stdout is a pipe"));
        let mut daemon = Self {
            child,
            stdout,
            log: log.to_owned(),
            forgiven: Vec::new(),
            ended: false,
            ready: Value::Null,
        };
        let mut line = String::new();
        daemon.stdout.read_line(&mut line).expect("read what a daemon prints");
        daemon.ready = serde_json::from_str(&line)
            .unwrap_or_else(|error| panic!("{} is not ready: {error}: {line:?}", daemon.log.display()));
        daemon
    }

    /// This test provokes errors: lines of the log with `text` in them are no surprise.
    pub fn may_complain(&mut self, text: &'static str) {
        self.forgiven.push(text);
    }

    /// `kill -9`.
    pub fn kill(mut self) {
        self.child.kill().expect("kill a daemon");
        self.child.wait().expect("wait for a daemon");
        self.ended = true;
    }

    /// SIGTERM; gives the exit code once it has ended.
    pub fn stop(mut self) -> i32 {
        self.signal("TERM");
        let status = self.child.wait().expect("wait for a daemon");
        self.ended = true;
        status.code().unwrap_or_else(|| panic!("{} was ended by {status}", self.log.display()))
    }

    /// Its process.
    pub fn id(&self) -> u32 {
        self.child.id()
    }

    /// From now on it writes no file beyond so many bytes, as where a file system is full; or `unlimited`.
    pub fn limit_files(&self, bytes: &str) {
        let (process, limit) = (self.id().to_string(), format!("--fsize={bytes}:unlimited"));
        crate::tools::run("prlimit", &["--pid", &process, &limit]);
    }

    /// Sends a signal, such as `STOP`.
    pub fn signal(&self, name: &str) {
        crate::tools::signal(self.child.id(), name);
    }

    /// Whether it is stopped by a signal.
    pub fn is_stopped(&self) -> bool {
        crate::tools::is_stopped(self.child.id())
    }

    /// The rest of what it prints, until it ends.
    pub fn rest_of_output(&mut self) -> String {
        let mut rest = String::new();
        self.stdout.read_to_string(&mut rest).expect("read what a daemon prints");
        rest
    }

    /// Its log so far.
    pub fn log(&self) -> String {
        String::from_utf8_lossy(&std::fs::read(&self.log).expect("read a log")).into_owned()
    }

    /// The most memory it ever had resident, in bytes.
    pub fn memory_peak(&self) -> u64 {
        let path = format!("/proc/{}/status", self.child.id());
        let status = std::fs::read_to_string(path).expect("read /proc");
        let line = status.lines().find_map(|line| line.strip_prefix("VmHWM:")).expect("a peak");
        let kib: u64 = line.trim().trim_end_matches(" kB").parse().expect("a number of kB");
        kib * 1024
    }

    fn surprises(&self) -> Vec<String> {
        let bad = |line: &&str| line.contains("\"level\":\"ERROR\"") || line.contains("panicked at");
        let forgiven = |line: &str| self.forgiven.iter().any(|text| line.contains(text));
        self.log().lines().filter(bad).filter(|line| !forgiven(line)).map(str::to_owned).collect()
    }
}

impl Drop for Daemon {
    fn drop(&mut self) {
        if !self.ended {
            // It may have ended already, which is what the test wanted then.
            let _ = self.child.kill();
            let _ = self.child.wait();
        }
        if std::thread::panicking() {
            let log = self.log();
            let lines: Vec<&str> = log.lines().collect();
            let shown = &lines[lines.len().saturating_sub(SHOWN_LINES)..];
            eprintln!("--- {} ---\n{}", self.log.display(), shown.join("\n"));
            return;
        }
        let surprises = self.surprises();
        assert!(surprises.is_empty(), "{} has surprises:\n{}", self.log.display(), surprises.join("\n"));
    }
}
