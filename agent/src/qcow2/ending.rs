//! The end of a `qemu-nbd`: asked for, then forced, and given up when even that does not help.
//!
//! A process whose storage stands still waits in the kernel and takes no signal. Whoever ends it must not wait with
//! it: an attach or detach that never answers, and the name of the disk with it, would be stuck until the storage is
//! back.
//!
//! Invariant: a signal goes only to the process that was meant. A child is one until it was waited for, and any other
//! is held by a descriptor from before it was looked at.

use std::{io, os::fd::OwnedFd, time::Duration};

use rustix::{
    event::{PollFd, PollFlags, Timespec, poll},
    io::Errno,
    process::{Pid, PidfdFlags, Signal, kill_process, pidfd_open, pidfd_send_signal},
};
use tokio::{
    process::Child,
    time::{Instant, sleep, timeout},
};

/// How often a process that is no child is looked at.
const END_POLL: Duration = Duration::from_millis(5);

/// How long a process is waited for.
#[derive(Clone, Copy, Debug)]
pub(super) struct Patience {
    /// Once it was asked to end: it writes its tables and flushes.
    pub(super) asked: Duration,
    /// Once it was killed: only what the kernel does for it can take time then.
    pub(super) killed: Duration,
}

impl Patience {
    /// Of a server that was flushed before it is ended.
    pub(super) const USUAL: Self = Self { asked: Duration::from_secs(20), killed: Duration::from_secs(5) };
}

/// Why a process is still there.
#[derive(Debug, thiserror::Error)]
pub(crate) enum NotEnded {
    /// It takes no signal.
    #[error("process {process} does not end, not even when it is killed: its storage stands still")]
    StandsStill {
        /// Its id.
        process: u32,
    },
    /// The system does not let it be ended, or waited for.
    #[error("cannot end process {process}: {source}")]
    Io {
        /// Its id.
        process: u32,
        /// Why.
        source: io::Error,
    },
}

/// Ends a child of this process. True when it had to be killed.
pub(super) async fn end_child(child: &mut Child, patience: Patience) -> Result<bool, NotEnded> {
    // It was waited for already.
    let Some(process) = child.id() else { return Ok(false) };
    let failed = |source| NotEnded::Io { process, source };
    if let Some(id) = pid(process) {
        kill_process(id, Signal::TERM).or_else(unless_gone).map_err(|error| failed(error.into()))?;
    }
    if let Ok(ended) = timeout(patience.asked, child.wait()).await {
        return ended.map(|_| false).map_err(failed);
    }
    child.start_kill().map_err(failed)?;
    match timeout(patience.killed, child.wait()).await {
        Ok(ended) => ended.map(|_| true).map_err(failed),
        Err(_) => Err(NotEnded::StandsStill { process }),
    }
}

/// Ends a process of somebody else, if it is the one that is meant; `is_meant` looks at what has that id now.
pub(super) async fn end_other(
    process: u32,
    is_meant: impl Fn() -> bool,
    patience: Patience,
) -> Result<(), NotEnded> {
    let failed = |source: io::Error| NotEnded::Io { process, source };
    let Some(id) = pid(process) else { return Ok(()) };
    let held = match pidfd_open(id, PidfdFlags::empty()) {
        Ok(held) => held,
        Err(Errno::SRCH) => return Ok(()),
        Err(error) => return Err(failed(error.into())),
    };
    // From here on the id may be another's, but not the descriptor.
    if !is_meant() {
        return Ok(());
    }
    for (signal, time) in [(Signal::TERM, patience.asked), (Signal::KILL, patience.killed)] {
        pidfd_send_signal(&held, signal).or_else(unless_gone).map_err(|error| failed(error.into()))?;
        if ends_within(&held, time).await.map_err(|error| failed(error.into()))? {
            return Ok(());
        }
    }
    Err(NotEnded::StandsStill { process })
}

/// Whether a process has ended, waiting for it. Its descriptor can be read then.
async fn ends_within(held: &OwnedFd, time: Duration) -> Result<bool, Errno> {
    let until = Instant::now() + time;
    loop {
        let mut looked_at = [PollFd::new(held, PollFlags::IN)];
        match poll(&mut looked_at, Some(&Timespec { tv_sec: 0, tv_nsec: 0 })) {
            Ok(0) | Err(Errno::INTR) => {}
            Ok(_) => return Ok(true),
            Err(error) => return Err(error),
        }
        if Instant::now() >= until {
            return Ok(false);
        }
        sleep(END_POLL).await;
    }
}

fn unless_gone(error: Errno) -> Result<(), Errno> {
    if error == Errno::SRCH { Ok(()) } else { Err(error) }
}

fn pid(process: u32) -> Option<Pid> {
    Pid::from_raw(i32::try_from(process).ok()?)
}

#[cfg(test)]
mod tests {
    use std::process::Stdio;

    use tokio::{
        io::{AsyncBufReadExt, BufReader},
        process::{ChildStdin, Command},
    };

    use super::*;

    const AT_ONCE: Patience = Patience { asked: Duration::from_millis(20), killed: Duration::from_secs(60) };
    const NEVER_KILLED: Patience =
        Patience { asked: Duration::from_secs(60), killed: Duration::from_secs(60) };

    /// A process that has come to the end of `first`, and then waits for its input to end.
    async fn waiting_after(first: &str) -> (Child, ChildStdin) {
        let script = format!("{first}\necho ready\nread never");
        let mut command = Command::new("sh");
        command.args(["-c", &script]).stdin(Stdio::piped()).stdout(Stdio::piped()).kill_on_drop(true);
        let mut child = command.spawn().unwrap();
        let mut said = String::new();
        BufReader::new(child.stdout.take().unwrap()).read_line(&mut said).await.unwrap();
        assert_eq!(said, "ready\n");
        let input = child.stdin.take().unwrap();
        (child, input)
    }

    #[tokio::test]
    async fn a_child_that_is_asked_is_not_killed_and_one_that_does_not_hear_is() {
        let (mut child, _input) = waiting_after(":").await;
        assert!(!end_child(&mut child, NEVER_KILLED).await.unwrap());
        assert!(!end_child(&mut child, NEVER_KILLED).await.unwrap(), "there is nothing left to end");
        let (mut child, _input) = waiting_after("trap '' TERM").await;
        let began = Instant::now();
        assert!(end_child(&mut child, AT_ONCE).await.unwrap());
        assert!(began.elapsed() >= AT_ONCE.asked);
    }

    #[tokio::test]
    async fn anothers_process_is_ended_only_if_it_is_the_one_that_is_meant() {
        for deaf in ["trap '' TERM", ":"] {
            let (mut child, _input) = waiting_after(deaf).await;
            let process = child.id().unwrap();
            end_other(process, || false, AT_ONCE).await.unwrap();
            assert!(child.try_wait().unwrap().is_none());
            end_other(process, || true, AT_ONCE).await.unwrap();
            assert!(!child.wait().await.unwrap().success());
            // Nobody has that id now, or somebody else.
            end_other(process, || false, AT_ONCE).await.unwrap();
        }
    }
}
