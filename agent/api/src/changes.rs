//! Changes that take longer than whoever asks for them waits: the agent goes on with them, and says how to follow.
//!
//! Invariant: whoever is answered so must not ask for the change again, but for its end.

use std::time::Duration;

use backtide_control::{ApiError, ErrorCode};
use serde::{Deserialize, Serialize};

/// How long a command follows a change that may take long: longer than receivers are waited for in the course of one.
pub(crate) const FOLLOW_TIME: Duration = Duration::from_secs(10 * 60);

/// The details of a `busy` answer to a call whose change goes on.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct GoesOn {
    /// Names the change: `GET /v1/changes/{change}` waits for its end.
    pub change: String,
    /// Seconds since it was begun.
    pub seconds: u64,
}

impl GoesOn {
    /// The answer.
    pub fn answer(&self) -> ApiError {
        let message = format!("this has not ended after {} s, and the agent goes on with it", self.seconds);
        let hint = "a receiver takes long, or storage stands still; do not ask for it again: `backtide status` shows what became of it";
        ApiError::new(ErrorCode::Busy, message).with_hint(hint).with_details(self)
    }

    /// What an answer says of a change that goes on, if it does.
    pub fn of(answer: &ApiError) -> Option<Self> {
        let details = answer.details.as_ref().filter(|_| answer.code == ErrorCode::Busy)?;
        Self::deserialize(details).ok()
    }
}
