//! The one error shape of every control API, and what each kind means to a caller.
//!
//! Invariant: codes are stable. A new one may be added, none changes its meaning, exit code or
//! HTTP status.

use std::{fmt, process::ExitCode};

use axum::{
    Json,
    http::StatusCode,
    response::{IntoResponse, Response},
};
use serde::{Deserialize, Serialize};

/// What kind of error it is: decides the exit code, and what a script can do about it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum ErrorCode {
    /// It was tried and did not work.
    Failed,
    /// The request itself is wrong; asking again the same way cannot help.
    Usage,
    /// The disk, mount or path does not exist.
    NotFound,
    /// The point is no point of this disk's timeline.
    PointNotFound,
    /// The point lies in a hole of the timeline; `details` names the hole and its neighbors.
    PointInHole,
    /// Something of that name exists already.
    Exists,
    /// Not now, because of something else that is going on.
    Busy,
    /// Another writer with a higher epoch owns the disk.
    Fenced,
    /// Another process holds the image or the store.
    Locked,
    /// Policy or state forbids it.
    Refused,
    /// The daemon, receiver or NBD server does not answer.
    Unreachable,
    /// Stored data does not match its checksum.
    Damaged,
    /// A signal asked the command to stop. No daemon answers this.
    Interrupted,
}

/// The field of the details of a silent daemon.
const SILENT_SECONDS: &str = "silent_seconds";

/// An error as control APIs answer it and as `--json` prints it.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct ApiError {
    /// The kind.
    pub code: ErrorCode,
    /// One sentence: what, then why. Lower case, no period.
    pub message: String,
    /// What to do about it, when there is something.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub hint: Option<String>,
    /// More for machines; its shape belongs to the code.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub details: Option<serde_json::Value>,
}

impl ErrorCode {
    /// All codes.
    pub const ALL: [Self; 13] = [
        Self::Failed,
        Self::Usage,
        Self::NotFound,
        Self::PointNotFound,
        Self::PointInHole,
        Self::Exists,
        Self::Busy,
        Self::Fenced,
        Self::Locked,
        Self::Refused,
        Self::Unreachable,
        Self::Damaged,
        Self::Interrupted,
    ];

    /// The exit code of a command that ends with this error.
    pub fn exit_code(self) -> u8 {
        match self {
            Self::Failed => 1,
            Self::Usage => 2,
            Self::NotFound | Self::PointNotFound | Self::PointInHole => 4,
            Self::Exists | Self::Busy | Self::Fenced | Self::Locked | Self::Refused => 5,
            Self::Unreachable => 6,
            Self::Damaged => 8,
            Self::Interrupted => 130,
        }
    }

    /// The HTTP status of an answer with this error.
    pub fn http_status(self) -> StatusCode {
        match self {
            Self::Failed | Self::Damaged => StatusCode::INTERNAL_SERVER_ERROR,
            Self::Usage => StatusCode::BAD_REQUEST,
            Self::NotFound | Self::PointNotFound | Self::PointInHole => StatusCode::NOT_FOUND,
            Self::Exists | Self::Busy | Self::Fenced | Self::Locked => StatusCode::CONFLICT,
            Self::Refused => StatusCode::FORBIDDEN,
            Self::Unreachable => StatusCode::BAD_GATEWAY,
            Self::Interrupted => StatusCode::SERVICE_UNAVAILABLE,
        }
    }
}

impl From<ErrorCode> for ExitCode {
    fn from(code: ErrorCode) -> Self {
        Self::from(code.exit_code())
    }
}

impl ApiError {
    /// An error of this kind; `message` is one sentence, lower case, no period.
    pub fn new(code: ErrorCode, message: impl Into<String>) -> Self {
        Self { code, message: message.into(), hint: None, details: None }
    }

    /// A daemon is there and has said nothing for so many seconds.
    pub(crate) fn silence(message: String, seconds: u64) -> Self {
        Self::new(ErrorCode::Unreachable, message)
            .with_details(serde_json::json!({ SILENT_SECONDS: seconds }))
    }

    /// Whether the daemon is there and says nothing, other than one that does not run.
    pub fn is_silence(&self) -> bool {
        self.code == ErrorCode::Unreachable
            && self.details.as_ref().is_some_and(|details| details.get(SILENT_SECONDS).is_some())
    }

    /// The same with what to do about it.
    #[must_use]
    pub fn with_hint(self, hint: impl Into<String>) -> Self {
        Self { hint: Some(hint.into()), ..self }
    }

    /// The same with more for machines.
    ///
    /// # Panics
    /// When `details` cannot be JSON, as a map with keys that are no strings.
    #[must_use]
    pub fn with_details(self, details: impl Serialize) -> Self {
        let details = serde_json::to_value(details).expect("details of an API error are plain data");
        Self { details: Some(details), ..self }
    }

    /// An error with `error` and all its sources as one sentence: `what: why: why`.
    pub fn from_error(code: ErrorCode, error: &dyn std::error::Error) -> Self {
        let mut message = error.to_string();
        let mut source = error.source();
        while let Some(cause) = source {
            let text = cause.to_string();
            // Some errors of libraries end with their cause already: once is enough.
            if !message.ends_with(&text) {
                message.push_str(": ");
                message.push_str(&text);
            }
            source = cause.source();
        }
        Self::new(code, message)
    }
}

impl fmt::Display for ApiError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.message)
    }
}

impl std::error::Error for ApiError {}

impl IntoResponse for ApiError {
    fn into_response(self) -> Response {
        (self.code.http_status(), Json(self)).into_response()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_code_exits_as_documented() {
        let exits: Vec<u8> = ErrorCode::ALL.iter().map(|code| code.exit_code()).collect();
        assert_eq!(exits, [1, 2, 4, 4, 4, 5, 5, 5, 5, 5, 6, 8, 130]);
        assert!(ErrorCode::ALL.iter().all(|code| !code.http_status().is_success()));
    }

    #[test]
    fn the_json_shape_is_stable() {
        let error = ApiError::new(ErrorCode::PointInHole, "no point there").with_hint("take lsn:4");
        assert_eq!(
            serde_json::to_string(&error).unwrap(),
            r#"{"code":"point-in-hole","message":"no point there","hint":"take lsn:4"}"#
        );
    }

    #[test]
    fn a_chain_becomes_one_sentence() {
        #[derive(Debug, thiserror::Error)]
        #[error("open store")]
        struct Outer(#[source] std::io::Error);
        let error = Outer(std::io::Error::other("no such directory"));
        assert_eq!(ApiError::from_error(ErrorCode::Failed, &error).message, "open store: no such directory");

        #[derive(Debug, thiserror::Error)]
        #[error("start: {0}")]
        struct Repeats(#[source] Outer);
        let error = Repeats(Outer(std::io::Error::other("no such directory")));
        let message = ApiError::from_error(ErrorCode::Failed, &error).message;
        assert_eq!(message, "start: open store: no such directory");
    }
}
