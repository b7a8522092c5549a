//! The rest of the agent's hold on a disk's thread: commands go in, answers come back.
//!
//! A disk's thread stands still while its image does. What is asked of it then is given up after a
//! bounded time, so that the other disks can be asked meanwhile.

use std::{
    sync::{Arc, Mutex, PoisonError},
    time::Duration,
};

use backtide_agent_api::DiskStatus;
use tokio::{
    sync::{mpsc, oneshot},
    time::Instant,
};

use super::thread::Command;

/// How long a disk may take to tell its status.
const STATUS_TIME: Duration = Duration::from_secs(2);

/// How long it may take to do what does not wait for anything.
const ANSWER_TIME: Duration = Duration::from_secs(10);

/// A disk's thread, from outside. Cheap to clone.
#[derive(Clone, Debug)]
pub(crate) struct DiskHandle {
    commands: mpsc::Sender<Command>,
    /// What it told last, and when.
    last: Arc<Mutex<Option<(Instant, DiskStatus)>>>,
}

/// Why a disk's thread gives no answer.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub(crate) enum NoAnswer {
    /// It has ended.
    #[error("the disk is being detached")]
    Ended,
    /// It stands still.
    #[error("the disk does not answer: its image may be on storage that stands still")]
    Silent,
}

impl DiskHandle {
    pub(crate) fn new(commands: mpsc::Sender<Command>) -> Self {
        Self { commands, last: Arc::default() }
    }

    /// Sends a command that carries where its answer goes, and waits for that answer for as long as
    /// the thread runs.
    pub(crate) async fn ask_at_length<T>(
        &self,
        command: impl FnOnce(oneshot::Sender<T>) -> Command,
    ) -> Result<T, NoAnswer> {
        let (answer, answered) = oneshot::channel();
        self.commands.send(command(answer)).await.map_err(|_| NoAnswer::Ended)?;
        answered.await.map_err(|_| NoAnswer::Ended)
    }

    /// The same with what the thread does at once, unless it stands still.
    pub(crate) async fn ask<T>(
        &self,
        command: impl FnOnce(oneshot::Sender<T>) -> Command,
    ) -> Result<T, NoAnswer> {
        let answer = tokio::time::timeout(ANSWER_TIME, self.ask_at_length(command));
        answer.await.unwrap_or(Err(NoAnswer::Silent))
    }

    /// The disk's status; of one that stands still the last known, which says so.
    pub(crate) async fn status(&self) -> Result<DiskStatus, NoAnswer> {
        match tokio::time::timeout(STATUS_TIME, self.ask_at_length(Command::Status)).await {
            Ok(Ok(status)) => {
                *self.last.lock().unwrap_or_else(PoisonError::into_inner) =
                    Some((Instant::now(), status.clone()));
                Ok(status)
            }
            Ok(Err(ended)) => Err(ended),
            Err(_) => {
                let last = self.last.lock().unwrap_or_else(PoisonError::into_inner).clone();
                last.map(|(at, status)| not_answering(at, status)).ok_or(NoAnswer::Silent)
            }
        }
    }
}

impl DiskHandle {
    /// The last known status of a disk that is being detached, which says so.
    pub(crate) fn leaving(&self) -> Option<DiskStatus> {
        let last = self.last.lock().unwrap_or_else(PoisonError::into_inner).clone();
        last.map(|(_, status)| DiskStatus {
            reason: "the disk is being detached".to_owned(),
            reason_code: "detaching".to_owned(),
            ..status
        })
    }
}

fn not_answering(at: Instant, status: DiskStatus) -> DiskStatus {
    let seconds = at.elapsed().as_secs();
    let reason = format!("the disk is not answering: this is its status of {seconds} s ago");
    DiskStatus { reason, reason_code: "not-answering".to_owned(), ..status }
}

#[cfg(test)]
impl DiskHandle {
    /// Sends a command as it is.
    pub(crate) async fn send(&self, command: Command) {
        self.commands.send(command).await.expect("the disk takes commands");
    }

    /// The same disk as if it stood still from now on, for as long as the receiver is kept.
    pub(crate) fn standing_still(&self) -> (Self, mpsc::Receiver<Command>) {
        let (commands, unread) = mpsc::channel(64);
        (Self { commands, last: Arc::clone(&self.last) }, unread)
    }
}
