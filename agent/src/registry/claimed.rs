//! The images of this agent's disks: each for one disk only, and kept from whatever else the host would do with it.

use std::{path::Path, time::Duration};

use backtide_agent_api::ImageFormat;
use backtide_control::{ApiError, ErrorCode};
use backtide_units::DiskName;
use tokio::time::Instant;

use super::{PREDECESSOR_POLL, Registry, patience_of, waiting};
use crate::{
    claims::{Behind, Hold, Identity, InUse, Shared, Standing, TakenImage},
    qcow2::{files_behind, format_of},
};

/// How long a device may take to be let go of: the last who closes one waits for what the page cache has of it.
const CLOSE_TIME: Duration = Duration::from_secs(10);

impl Registry {
    /// Sees that nobody else has the image, and keeps it for this disk; with patience for a predecessor, which may still
    /// have what the disk had. The files that the image names as parts of its content.
    pub(super) async fn take_image(
        &self,
        name: &DiskName,
        image: &str,
        format: Option<ImageFormat>,
        standing: Standing,
    ) -> Result<Vec<Behind>, ApiError> {
        let until = Instant::now() + patience_of(standing);
        let looked_at = image.to_owned();
        let behind = match waiting(move || format_of(&looked_at, format)).await? {
            Some(ImageFormat::Qcow2) => files_behind(Path::new(image)).await,
            Some(ImageFormat::Raw) | None => Ok(Vec::new()),
        };
        let behind = behind.map_err(|error| ApiError::from_error(ErrorCode::Failed, &error))?;
        let (looked_at, named) = (image.to_owned(), behind.clone());
        let identity = waiting(move || Identity::with(&looked_at, &named)).await?;
        match self.claims.take_image(name, identity.clone()).map_err(|shared| shares(image, shared))? {
            TakenImage::Kept => return Ok(behind),
            TakenImage::ToHold { before } => close(name, before.map(|hold| *hold)).await,
        }
        let held = loop {
            let identity = identity.clone();
            match waiting(move || Hold::of(&identity, standing)).await {
                Ok(Err(_)) if Instant::now() < until => tokio::time::sleep(PREDECESSOR_POLL).await,
                Ok(held) => break held.map_err(|in_use| refusal(&in_use)),
                Err(error) => break Err(error),
            }
        };
        match held {
            Ok(hold) => {
                self.claims.hold_image(name, hold);
                Ok(behind)
            }
            Err(error) => {
                self.leave_image(name).await;
                Err(error)
            }
        }
    }

    /// Refuses to let go of images that a disk would not get again.
    ///
    /// # Errors
    /// `locked`, with who uses one.
    pub(super) async fn require_unused(&self) -> Result<(), ApiError> {
        for (name, identity) in self.claims.images() {
            let looked = waiting(move || Hold::could_be_had_again(&identity)).await?;
            looked.map_err(|in_use| {
                let message = format!("disk {name} could not be attached again: {in_use}");
                ApiError::new(ErrorCode::Locked, message).with_hint(in_use.hint())
            })?;
        }
        Ok(())
    }

    /// The disk has no image any more, and others may use it.
    pub(super) async fn leave_image(&self, name: &DiskName) {
        close(name, self.claims.leave_image(name)).await;
    }
}

/// Lets go of what held an image, where that may wait for its device.
async fn close(name: &DiskName, hold: Option<Hold>) {
    let Some(hold) = hold else { return };
    let closing = tokio::task::spawn_blocking(move || drop(hold));
    if tokio::time::timeout(CLOSE_TIME, closing).await.is_err() {
        tracing::warn!(disk = %name, "the disk's device stands still, and is not let go of yet");
    }
}

fn shares(image: &str, shared: Shared) -> ApiError {
    let Shared { disk, image: other } = shared;
    let message = match other {
        None => format!("{image} is protected already: it is disk {disk} of this agent"),
        Some(other) => format!(
            "{image} is protected already: it has bytes of {other}, which is disk {disk} of this agent"
        ),
    };
    ApiError::new(ErrorCode::Locked, message).with_hint(format!("use disk {disk}, or detach it first"))
}

fn refusal(in_use: &InUse) -> ApiError {
    ApiError::new(ErrorCode::Locked, in_use.to_string()).with_hint(in_use.hint())
}
