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
        StartError::Behind(BehindError::Client { .. }) => ErrorCode::Unreachable,
        StartError::Behind(BehindError::Silent { .. }) => ErrorCode::Unreachable,
        StartError::Behind(BehindError::Size { .. }) => ErrorCode::Failed,
    };
    ApiError::from_error(code, error)
}
