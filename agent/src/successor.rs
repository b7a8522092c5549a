//! The program that follows on this one in the same process, at a restart.
//!
//! The process becomes the new program (`execve`). So the old one is provably gone when the new one
//! begins: its threads have ended, what they had in flight is over, its locks are free. The process
//! keeps its id, so that whoever supervises it sees nothing. The listening sockets pass through as
//! standard input.

use std::{
    env,
    ffi::OsString,
    io,
    os::unix::process::CommandExt,
    path::{Path, PathBuf},
    process::{Command, Stdio},
    time::Duration,
};

use backtide_control::{ApiError, ErrorCode};
use backtide_socket::{Sockets, passing};
use backtide_units::DiskName;

use crate::look;

/// How long the new program may take to say that it can start.
const CHECK_TIME: Duration = Duration::from_secs(20);

/// As much of what it complains about is told.
const SAID_BYTES_MAX: usize = 1024;

/// What a service manager, or an agent that has a program looked at, tells the process it started, and no other.
const FOR_THIS_PROCESS: [&str; 6] =
    ["LISTEN_PID", "LISTEN_FDS", "LISTEN_FDNAMES", "NOTIFY_SOCKET", passing::VARIABLE, look::LOST];

/// A program to become: the file that this process was started from, as it is then, with the same
/// arguments.
#[derive(Clone, Debug)]
pub struct Successor {
    program: PathBuf,
    arguments: Vec<OsString>,
}

impl Successor {
    /// Of this process. To be called at its start: a package may replace the file later, and then the
    /// path is all that counts.
    ///
    /// # Errors
    /// When the system does not tell.
    pub fn of_this_process() -> io::Result<Self> {
        Ok(Self { program: env::current_exe()?, arguments: env::args_os().skip(1).collect() })
    }

    /// What will be started.
    pub fn program(&self) -> &Path {
        &self.program
    }

    /// Whether the program starts and likes its settings, and the records of disks but those that are `lost` already: it is
    /// run with `--check`.
    pub(crate) async fn check(&self, lost: &[DiskName]) -> Result<(), ApiError> {
        let refused = |why: String| {
            let message = format!("{} cannot follow: {why}", self.program.display());
            ApiError::new(ErrorCode::Refused, message)
                .with_hint("the running agent goes on; see what the program says when it is run with --check")
        };
        let mut command = tokio::process::Command::new(&self.program);
        command.args(&self.arguments).arg("--check").stdin(Stdio::null()).kill_on_drop(true);
        for variable in FOR_THIS_PROCESS {
            command.env_remove(variable);
        }
        command.env(look::LOST, look::lost_text(lost));
        let output = match tokio::time::timeout(CHECK_TIME, command.output()).await {
            Ok(output) => output.map_err(|error| refused(error.to_string()))?,
            Err(_) => return Err(refused(format!("it does not end a check in {} s", CHECK_TIME.as_secs()))),
        };
        if output.status.success() {
            return Ok(());
        }
        let said = String::from_utf8_lossy(&output.stderr);
        let said: String = said.trim().chars().take(SAID_BYTES_MAX).collect();
        Err(refused(format!("{}: {}", output.status, said.replace('\n', "; "))))
    }

    /// Becomes it. Returns only when that fails; this process is as it was then.
    pub fn follow(&self, sockets: &Sockets) -> io::Error {
        let packed = match sockets.pack() {
            Ok(packed) => packed,
            Err(error) => return error,
        };
        let mut command = Command::new(&self.program);
        // The service manager stays the same; what it passed at the start has been taken.
        for variable in FOR_THIS_PROCESS.into_iter().filter(|variable| *variable != "NOTIFY_SOCKET") {
            command.env_remove(variable);
        }
        let error = command
            .args(&self.arguments)
            .env(passing::VARIABLE, passing::FROM_STDIN)
            .stdin(Stdio::from(packed))
            .exec();
        if let Err(error) = passing::close_stdin() {
            tracing::warn!(%error, "standard input");
        }
        error
    }
}
