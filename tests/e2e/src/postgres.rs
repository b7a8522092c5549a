//! A PostgreSQL server of this test alone, on whatever directory it is given.

use std::{
    io::{BufRead, BufReader, Write},
    os::unix::fs::{PermissionsExt, chown},
    path::{Path, PathBuf},
    process::{Child, ChildStdin, ChildStdout, Command, Stdio},
};

use crate::{Bench, bench::text, tools};

/// The server refuses to be root. This account is on every machine and owns nothing.
const ACCOUNT: [&str; 5] = ["--reuid=nobody", "--regid=nogroup", "--clear-groups", "--pdeathsig", "KILL"];

/// The directory of the newest server's programs, if one is installed.
fn programs() -> Option<PathBuf> {
    let versions = std::fs::read_dir("/usr/lib/postgresql").ok()?.flatten();
    let directories = versions.map(|version| version.path().join("bin"));
    directories.filter(|directory| directory.join("postgres").exists()).max()
}

/// The path of one of its programs.
fn program(name: &str) -> String {
    text(&programs().expect("PostgreSQL is there").join(name))
}

/// Why this machine has no server for us, if it has none.
pub fn cannot_serve() -> Option<&'static str> {
    programs().is_none().then_some("there is no PostgreSQL: it is in the Debian package postgresql")
}

/// A running server. Dropped, it and its sessions are killed.
pub struct Postgres {
    process: Option<tools::Beside>,
    sockets: PathBuf,
    log: PathBuf,
}

impl Postgres {
    /// Makes the files of a server in a new directory `data` of a mounted file system. What it says
    /// goes to files in the bench's directory, which it must be able to go through.
    pub fn create(bench: &Bench, mounted: &Path) {
        let open = PermissionsExt::from_mode(0o711);
        std::fs::set_permissions(bench.path(""), open).expect("let others through a directory");
        let data = mounted.join("data");
        std::fs::create_dir(&data).expect("make a directory");
        give_away(&data);
        let initdb = program("initdb");
        let mut arguments = ACCOUNT.to_vec();
        // Checksums: a page that is not as it was written is an error of whoever reads it.
        let rest = [&initdb, "--data-checksums", "--wal-segsize=1", "--auth=trust", "--username=backtide"];
        arguments.extend(rest);
        let data = text(&data);
        arguments.extend(["--no-locale", "--encoding=UTF8", "--no-instructions", "-D", &data]);
        tools::run("setpriv", &arguments);
    }

    /// Starts the server on these files and waits until it takes connections: until it has recovered.
    pub fn start(bench: &Bench, name: &str, mounted: &Path) -> Self {
        let (sockets, log) = (bench.path(name), bench.path(&format!("{name}.log")));
        std::fs::create_dir(&sockets).expect("make a directory");
        give_away(&sockets);
        let data = mounted.join("data");
        // The process it names is of another machine, as far as this copy of its files knows. Here it
        // may well run, or its number may be another's.
        let left_behind = std::fs::remove_file(data.join("postmaster.pid"));
        drop(left_behind);
        let script = "log=$1; shift; exec setpriv \"$@\" >\"$log\" 2>&1";
        let server = program("postgres");
        let (data, directory, log_name) = (text(&data), text(&sockets), text(&log));
        let mut arguments = vec!["-c", script, "sh", &log_name];
        arguments.extend(ACCOUNT);
        arguments.extend([&server, "-D", &data, "-k", &directory, "-h", "", "-c", "shared_buffers=16MB"]);
        // Checkpoints now and then, as in a server that runs for long.
        arguments.extend(["-c", "max_wal_size=8MB", "-c", "min_wal_size=2MB"]);
        let process = tools::Beside::start("sh", &arguments);
        let mut server = Self { process: Some(process), sockets, log };
        while !server.takes_connections() {
            assert!(
                server.process.as_mut().is_some_and(tools::Beside::runs),
                "PostgreSQL ended: {}",
                server.said()
            );
            std::thread::yield_now();
        }
        server
    }

    fn takes_connections(&self) -> bool {
        tools::try_run(&program("psql"), &self.arguments(&["-c", "select 1"])).0
    }

    /// Arguments of its clients.
    fn arguments<'a>(&'a self, rest: &[&'a str]) -> Vec<&'a str> {
        let directory = self.sockets.to_str().expect("a path that is text");
        let mut arguments = vec!["-X", "-q", "-A", "-t", "-v", "ON_ERROR_STOP=1", "-h", directory];
        arguments.extend(["-U", "backtide", "-d", "postgres"]);
        arguments.extend(rest);
        arguments
    }

    /// The answer to a query.
    pub fn query(&self, sql: &str) -> String {
        let (success, said) = tools::try_run(&program("psql"), &self.arguments(&["-c", sql]));
        assert!(success, "{sql}: {said}: {}", self.said());
        said.trim().to_owned()
    }

    /// Makes the tables of pgbench.
    pub fn prepare_pgbench(&self) {
        let directory = text(&self.sockets);
        tools::run(&program("pgbench"), &["-i", "-q", "-h", &directory, "-U", "backtide", "postgres"]);
    }

    /// Two sessions of pgbench's usual transactions, so many a second, until dropped.
    pub fn pgbench(&self, rate: u32) -> tools::Beside {
        let (directory, rate) = (text(&self.sockets), format!("--rate={rate}"));
        let forever = u32::MAX >> 1;
        let count = format!("--transactions={forever}");
        let arguments = ["-n", "-c", "2", &rate, &count, "-h", &directory, "-U", "backtide", "postgres"];
        tools::Beside::start(&program("pgbench"), &arguments)
    }

    /// A session for one statement after the other.
    pub fn session(&self) -> Session {
        let mut command = Command::new("setpriv");
        command.args(["--pdeathsig", "KILL", &program("psql")]).args(self.arguments(&[]));
        command.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::inherit());
        let mut child = command.spawn().expect("run psql");
        let (stdin, stdout) = (child.stdin.take(), child.stdout.take());
        Session {
            child,
            stdin: stdin.expect("a pipe"),
            stdout: BufReader::new(stdout.expect("a pipe")),
            log: self.log.clone(),
        }
    }

    /// Its log.
    pub fn said(&self) -> String {
        last_lines(&self.log)
    }

    /// Ends it at once, as a crash would, and waits until no process has its files open.
    pub fn cut_off(mut self) {
        let mut process = self.process.take().expect("it runs");
        process.signal("QUIT");
        while process.runs() {
            std::thread::yield_now();
        }
    }
}

fn last_lines(log: &Path) -> String {
    let log = String::from_utf8_lossy(&std::fs::read(log).unwrap_or_default()).into_owned();
    let lines: Vec<&str> = log.lines().collect();
    lines[lines.len().saturating_sub(40)..].join("\n")
}

fn give_away(directory: &Path) {
    let id = |flag: &str, name: &str| -> u32 {
        let said = tools::run("id", &[flag, name]);
        said.trim().parse().expect("a number of an account")
    };
    let (user, group) = (id("-u", "nobody"), id("-g", "nobody"));
    chown(directory, Some(user), Some(group)).expect("give a directory away");
}

/// A session of psql.
pub struct Session {
    child: Child,
    stdin: ChildStdin,
    stdout: BufReader<ChildStdout>,
    log: PathBuf,
}

impl Session {
    /// Does statements, each of which commits, and comes back when all are acknowledged.
    ///
    /// # Errors
    /// When the server is gone or refuses one: what its log says.
    pub fn run(&mut self, sql: &str) -> Result<(), String> {
        let failed = |why: &str| Err(format!("{why}: {}", last_lines(&self.log)));
        if writeln!(self.stdin, "{sql};\n\\echo done").and_then(|()| self.stdin.flush()).is_err() {
            return failed("psql is gone");
        }
        let mut line = String::new();
        match self.stdout.read_line(&mut line) {
            Ok(_) if line.trim() == "done" => Ok(()),
            Ok(_) => failed(&format!("{sql}: {line:?}")),
            Err(error) => failed(&error.to_string()),
        }
    }
}

impl Drop for Session {
    fn drop(&mut self) {
        // It ends by itself too, when its input does.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}
