//! Whether a disk can be let go of and had again: what the agent keeps of it has to fit into the state directory.

use backtide_control::{ApiError, ErrorCode};
use backtide_tracking::DirtyBitmap;
use backtide_units::DiskName;

use super::Registry;

impl Registry {
    /// Refuses to let go of a disk, which is to lack `missing` then - nobody knows what, where that is none -, where the state
    /// directory has no room for what is written of it before it is served again, and until nothing is missing.
    ///
    /// # Errors
    /// `refused`, with the way out.
    pub(super) async fn require_room(
        &self,
        name: &DiskName,
        missing: Option<&DirtyBitmap>,
    ) -> Result<(), ApiError> {
        let (disk, missing) = (name.clone(), missing.cloned());
        let tried = self
            .records
            .aside(move |records| records.try_room(&disk, records.room_for(&disk, missing.as_ref())));
        tried.await.map_err(|error| {
            let directory = self.records.directory();
            let message = format!(
                "what is kept of disk {name} cannot be written in the state directory {}: {error}",
                directory.display()
            );
            ApiError::new(ErrorCode::Refused, message)
                .with_hint("nothing has changed: make room there, or have it written to again")
        })
    }
}

#[cfg(test)]
mod tests;
