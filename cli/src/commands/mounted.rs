//! What a command reads of a point that the receiver has mounted for it.

use backtide_control::{ApiError, ErrorCode};
use backtide_export::{Client, NbdUri};
use backtide_receiver_api::Mount;

use crate::{ending::Failure, quantity::size_both};

/// Connects to `mount`, and to no other.
///
/// # Errors
/// `unreachable` when nobody serves it here; `failed` when what is served has another size than the point.
pub(crate) async fn connect(mount: &Mount) -> Result<Client, Failure> {
    let uri: NbdUri = mount.uri.parse().map_err(|error| ApiError::from_error(ErrorCode::Failed, &error))?;
    let client =
        Client::connect(&uri).await.map_err(|error| ApiError::from_error(ErrorCode::Unreachable, &error))?;
    if client.size() != mount.size {
        let message = format!(
            "what is served at {} has {}, and the point has {}: it is another disk",
            mount.uri,
            size_both(client.size()),
            size_both(mount.size)
        );
        return Err(ApiError::new(ErrorCode::Failed, message)
            .with_hint("run the command on the receiver's host")
            .into());
    }
    Ok(client)
}
