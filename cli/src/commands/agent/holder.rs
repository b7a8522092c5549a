//! The holder of `backtide agent run --hold`: a process that outlives its agents.
//!
//! It keeps the agent's listening sockets open and starts the agent again when it dies, so that to a
//! client which reconnects the death is a pause. It speaks the part of systemd's protocol that the
//! agent needs (`sd_notify(3)`: READY, FDSTORE, FDSTOREREMOVE, and passes the rest on to its own
//! service manager) and does nothing else, so that there is nothing in it to go wrong.
//!
//! Invariants: one agent at a time, the next is started only when the process of the one before has
//! been waited for; an agent that was asked to end is not started again.

mod kept;

use std::{
    env,
    ffi::OsString,
    io,
    os::fd::AsFd,
    path::{Path, PathBuf},
    process::{ExitStatus, Stdio},
    time::{Duration, Instant},
};

use backtide_agent::Config;
use backtide_socket::{Notifier, SocketFile, passing};
use rustix::process::{Pid, Signal, kill_process};
use tokio::{
    io::Interest,
    net::UnixDatagram,
    process::{Child, Command},
};

use self::kept::{Kept, Said};
use crate::{
    commands::Stop,
    ending::{Ending, Failure, failed, io_failure},
};

/// Waits before an agent that died soon after its start is started again, doubling. Without a wait
/// the first time: a guest waits too.
const AGAIN_FIRST: Duration = Duration::from_millis(100);
const AGAIN_LAST: Duration = Duration::from_secs(5);

/// An agent that was ready and lived for so long has started well.
const LIVED: Duration = Duration::from_secs(10);

/// So many deaths in a row soon after the start, and nobody is helped by more.
const DEATHS_MAX: u32 = 16;

/// How often an agent that is to end is told so: it may be becoming another program just then.
const END_AGAIN: Duration = Duration::from_secs(2);

struct Holder {
    program: PathBuf,
    arguments: Vec<OsString>,
    address: PathBuf,
    inbox: UnixDatagram,
    kept: Kept,
    above: Option<Notifier>,
    /// The running agent has said that it is ready.
    ready: bool,
    _file: SocketFile,
}

/// What became of an agent.
enum End {
    /// It was to end, or ended by itself in good order.
    Wanted(ExitStatus),
    /// It died.
    Died(ExitStatus),
}

/// Holds agents until a signal, or until they cannot be kept alive.
pub(super) async fn hold(config: &Config, mut stop: Stop) -> Result<Ending, Failure> {
    std::fs::create_dir_all(&config.run).map_err(|error| io_failure(config.run.display(), &error))?;
    let mut holder = Holder::new(&config.run).map_err(|error| io_failure("hold the agent", &error))?;
    let mut deaths = 0;
    let mut ever_ready = false;
    loop {
        let started = Instant::now();
        holder.ready = false;
        let why = match holder.start() {
            Ok(child) => {
                let end = holder.look_after(child, &mut stop).await;
                let end = end.map_err(|error| io_failure("the agent", &error))?;
                ever_ready |= holder.ready;
                match end {
                    End::Wanted(status) => return Ok(ending_as(status)),
                    // Its settings are wrong, or another agent runs: it has said so.
                    End::Died(status) if !ever_ready && status.code().is_some() => {
                        return Ok(ending_as(status));
                    }
                    End::Died(status) => format!("the agent has died ({status})"),
                }
            }
            Err(error) if !ever_ready => return Err(io_failure(holder.program.display(), &error)),
            // No memory, no process id, a program that is being replaced: it may pass, and with this
            // process every kept socket would go.
            Err(error) => format!("the agent cannot be started ({}: {error})", holder.program.display()),
        };
        deaths = if holder.ready && started.elapsed() >= LIVED { 1 } else { deaths + 1 };
        if deaths > DEATHS_MAX {
            let why =
                format!("{why}, which makes {deaths} times in a row soon after or at its start: giving up");
            tracing::error!("{why}");
            return Err(failed(why));
        }
        tracing::error!(deaths, "{why}: starting it again");
        holder.tell_above(&format!("STATUS={why}: starting it again"));
        tokio::select! {
            () = tokio::time::sleep(pause(deaths)) => {}
            () = stop.asked() => return Ok(Ending::Done),
        }
    }
}

/// How long to wait after so many deaths in a row.
fn pause(deaths: u32) -> Duration {
    match deaths.checked_sub(2) {
        None => Duration::ZERO,
        Some(doublings) => AGAIN_FIRST.saturating_mul(1 << doublings.min(16)).min(AGAIN_LAST),
    }
}

fn ending_as(status: ExitStatus) -> Ending {
    match status.code().map(u8::try_from) {
        Some(Ok(0)) => Ending::Done,
        Some(Ok(code)) => Ending::As(code),
        Some(Err(_)) | None => Ending::As(1),
    }
}

impl Holder {
    fn new(run: &Path) -> io::Result<Self> {
        remove_left(run);
        let address = run.join(format!("{ADDRESS}{}", std::process::id()));
        // Whoever can send here has sockets kept and agents called ready: the same user only.
        let mask = rustix::process::umask(rustix::fs::Mode::from_raw_mode(0o177));
        let bound = std::os::unix::net::UnixDatagram::bind(&address);
        rustix::process::umask(mask);
        let inbox = bound?;
        inbox.set_nonblocking(true)?;
        Ok(Self {
            program: env::current_exe()?,
            arguments: env::args_os().skip(1).filter(|argument| argument != "--hold").collect(),
            _file: SocketFile::of(&address)?,
            address,
            inbox: UnixDatagram::from_std(inbox)?,
            kept: Kept::default(),
            above: Notifier::from_environment(),
            ready: false,
        })
    }

    fn start(&self) -> io::Result<Child> {
        let packed = passing::pack(self.kept.sockets())?;
        let mut command = Command::new(&self.program);
        // Without a process id the watchdog's time is the agent's: its signs of life are passed on.
        for variable in ["LISTEN_PID", "LISTEN_FDS", "LISTEN_FDNAMES", "WATCHDOG_PID"] {
            command.env_remove(variable);
        }
        command
            .args(&self.arguments)
            .env("NOTIFY_SOCKET", &self.address)
            .env(passing::VARIABLE, passing::FROM_STDIN)
            .env(passing::HOLDER_VARIABLE, std::process::id().to_string())
            .stdin(Stdio::from(packed))
            .spawn()
    }

    /// Until the agent has ended.
    async fn look_after(&mut self, mut child: Child, stop: &mut Stop) -> io::Result<End> {
        let mut ending = false;
        loop {
            tokio::select! {
                said = hear(&self.inbox) => self.note(said),
                status = child.wait() => {
                    // What it said last, before it is forgotten who said it.
                    while let Some(said) = hear_now(&self.inbox) {
                        self.note(said);
                    }
                    let status = status?;
                    return Ok(if ending || status.success() { End::Wanted(status) } else { End::Died(status) });
                }
                () = stop.asked(), if !ending => {
                    ending = true;
                    end(&child);
                }
                () = tokio::time::sleep(END_AGAIN), if ending => end(&child),
            }
        }
    }

    fn note(&mut self, heard: io::Result<(String, Vec<std::os::fd::OwnedFd>)>) {
        let (text, sockets) = match heard {
            Ok(heard) => heard,
            Err(error) => return tracing::warn!(%error, "what the agent said cannot be read"),
        };
        match self.kept.note(&text, sockets) {
            Said::Sockets => {}
            Said::Other { ready } => {
                self.ready |= ready;
                self.tell_above(&text);
            }
        }
    }

    fn tell_above(&self, text: &str) {
        if let Some(above) = &self.above {
            above.tell(text);
        }
    }
}

async fn hear(inbox: &UnixDatagram) -> io::Result<(String, Vec<std::os::fd::OwnedFd>)> {
    inbox.async_io(Interest::READABLE, || passing::receive(inbox.as_fd())).await
}

fn hear_now(inbox: &UnixDatagram) -> Option<io::Result<(String, Vec<std::os::fd::OwnedFd>)>> {
    match passing::receive(inbox.as_fd()) {
        Err(error) if error.kind() == io::ErrorKind::WouldBlock => None,
        heard => Some(heard),
    }
}

/// Asks an agent to end. One that has ended already has nothing to hear.
fn end(child: &Child) {
    if let Some(id) = child.id().and_then(|id| i32::try_from(id).ok()).and_then(Pid::from_raw)
        && let Err(error) = kill_process(id, Signal::TERM)
    {
        tracing::warn!(%error, "cannot ask the agent to end");
    }
}

/// How the addresses of holders begin; their process ids follow.
const ADDRESS: &str = "agent-hold.";

/// Removes the addresses of holders that were killed.
fn remove_left(run: &Path) {
    let Ok(entries) = std::fs::read_dir(run) else { return };
    for entry in entries.flatten() {
        let name = entry.file_name();
        let id = name.to_str().and_then(|name| name.strip_prefix(ADDRESS)?.parse::<u32>().ok());
        if id.is_some_and(|id| !Path::new(&format!("/proc/{id}")).exists()) {
            // Nothing is lost if it stays.
            let _ = std::fs::remove_file(entry.path());
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_first_death_costs_no_wait_and_many_cost_a_bounded_one() {
        assert_eq!(pause(1), Duration::ZERO);
        assert_eq!(pause(2), Duration::from_millis(100));
        assert_eq!(pause(4), Duration::from_millis(400));
        assert_eq!(pause(DEATHS_MAX), AGAIN_LAST);
    }

    #[test]
    fn addresses_of_dead_holders_go_and_others_stay() {
        let directory = tempfile::tempdir().unwrap();
        let own = std::process::id();
        for name in ["agent-hold.999999999".to_owned(), format!("agent-hold.{own}"), "agent.sock".to_owned()]
        {
            std::fs::write(directory.path().join(name), "").unwrap();
        }
        remove_left(directory.path());
        let left = std::fs::read_dir(directory.path()).unwrap().count();
        assert!(!directory.path().join("agent-hold.999999999").exists());
        assert_eq!(left, 2);
    }
}
