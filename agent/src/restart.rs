//! What is known of restarts: who follows, who asked, and why the last came to nothing.

use std::sync::{Mutex, PoisonError};

use backtide_control::{ApiError, ErrorCode};
use tokio::sync::Notify;
use uuid::Uuid;

use crate::{Successor, registry::Registry};

/// The restarts of one agent.
pub(crate) struct Restart {
    /// Another one after every restart.
    pub(crate) instance: Uuid,
    successor: Option<Successor>,
    failure: Mutex<Option<String>>,
    /// Somebody asked, and the successor has passed its check.
    pub(crate) asked: Notify,
}

impl Restart {
    pub(crate) fn new(successor: Option<Successor>, failure: Option<String>) -> Self {
        Self { instance: Uuid::new_v4(), successor, failure: Mutex::new(failure), asked: Notify::new() }
    }

    /// Does everything that can be done while the disks are served, and asks for the rest.
    pub(crate) async fn ask(&self, registry: &Registry) -> Result<(), ApiError> {
        let Some(successor) = &self.successor else {
            let message = "this agent cannot be restarted: it runs inside of another command";
            return Err(ApiError::new(ErrorCode::Refused, message)
                .with_hint("run it by itself, with backtide agent run"));
        };
        successor.check(&registry.lost().await?).await?;
        registry.prepare_to_hand_over().await?;
        self.note(None);
        tracing::info!(program = %successor.program().display(), "the agent restarts");
        self.asked.notify_one();
        Ok(())
    }

    /// The agent goes on, for this reason.
    pub(crate) fn failed(&self, why: &str) {
        self.note(Some(why.to_owned()));
    }

    /// Why the last restart came to nothing, if it did.
    pub(crate) fn failure(&self) -> Option<String> {
        self.failure.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }

    fn note(&self, failure: Option<String>) {
        *self.failure.lock().unwrap_or_else(PoisonError::into_inner) = failure;
    }
}
