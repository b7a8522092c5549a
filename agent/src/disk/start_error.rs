//! What is said of a disk that could not be started.

use backtide_control::{ApiError, ErrorCode};
use backtide_export::BindError;

use super::{image_disk::EngineError, nbd_disk::BehindError, thread::StartError};

/// What the control API says of a disk whose thread did not start.
pub(crate) fn start_error(error: &StartError) -> ApiError {
    let code = match error {
        StartError::Bind(BindError::InUse(_)) => ErrorCode::Locked,
        StartError::Bind(_) | StartError::Thread(_) => ErrorCode::Failed,
        StartError::Engine(EngineError::Ring(_)) => ErrorCode::Failed,
        StartError::Behind(error) => behind_code(error),
    };
    ApiError::from_error(code, error)
}

/// The same of a server that cannot be the disk behind.
pub(crate) fn behind_error(error: &BehindError) -> ApiError {
    ApiError::from_error(behind_code(error), error)
}

fn behind_code(error: &BehindError) -> ErrorCode {
    match error {
        BehindError::Client { .. } | BehindError::Silent { .. } | BehindError::Untold { .. } => {
            ErrorCode::Unreachable
        }
        BehindError::Size { .. } | BehindError::ReadOnly { .. } => ErrorCode::Failed,
    }
}
