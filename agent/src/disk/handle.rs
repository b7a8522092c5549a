//! The rest of the agent's hold on a disk's thread: commands go in, answers come back.

use tokio::sync::{mpsc, oneshot};

use super::thread::Command;

/// A disk's thread, from outside. Cheap to clone.
#[derive(Clone, Debug)]
pub(crate) struct DiskHandle {
    commands: mpsc::Sender<Command>,
}

/// The disk's thread has ended: it is being detached.
#[derive(Clone, Copy, Debug, thiserror::Error)]
#[error("the disk is being detached")]
pub(crate) struct Ended;

impl DiskHandle {
    pub(crate) fn new(commands: mpsc::Sender<Command>) -> Self {
        Self { commands }
    }

    /// Sends a command that carries where its answer goes, and waits for that answer.
    pub(crate) async fn ask<T>(
        &self,
        command: impl FnOnce(oneshot::Sender<T>) -> Command,
    ) -> Result<T, Ended> {
        let (answer, answered) = oneshot::channel();
        self.commands.send(command(answer)).await.map_err(|_| Ended)?;
        answered.await.map_err(|_| Ended)
    }
}
