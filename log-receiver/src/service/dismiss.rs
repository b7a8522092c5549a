//! The control API's answer when a person has seen what the store once had less of.

use backtide_receiver_api::{ApiError, Dismissed, ErrorCode};
use backtide_units::DiskName;

use super::Service;
use crate::{clock, ingest::Task, shortfalls::Shortfalls};

impl Service {
    /// Tells no more what is past of a disk. What its agent has not brought anew yet is told until it has.
    pub(super) async fn dismiss_past(&self, name: DiskName) -> Result<Dismissed, ApiError> {
        let disk = self.find(&name)?;
        let shortfalls: Option<Shortfalls> =
            self.ask_owner(disk, |answer| Task::Shortfalls(disk, answer)).await?;
        let shortfalls = shortfalls.ok_or_else(|| self.unknown(name.as_str()))?;
        let dismissed = self.read(move || shortfalls.dismiss(clock::now())).await?;
        let dismissed = dismissed.map_err(|error| {
            let message = format!("what is past of disk {name} cannot be forgotten: {error}");
            ApiError::new(ErrorCode::Failed, message)
        })?;
        if dismissed.is_empty() {
            let message = format!("of disk {name} nothing is told that is past");
            return Err(ApiError::new(ErrorCode::Refused, message).with_hint(
                "`backtide receiver status` says of each alarm until when it lasts, or what ends it",
            ));
        }
        for what in &dismissed {
            tracing::warn!(%disk, name = name.as_str(), what, "a person has seen it, and it is told no more");
        }
        Ok(Dismissed { uuid: disk, shortfalls: dismissed })
    }
}
