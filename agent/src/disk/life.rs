//! The sign of life of an agent that has a disk: renewed while the disk may change, it tells the next attach
//! until when the image was written by nobody else.

use std::path::PathBuf;

use backtide_tracking::TrackingFile;
use backtide_units::CaptureTime;

use super::{local::blocking, trust};

/// The tracking file's sign of life, renewed as long as clients may change something.
pub(super) struct Life {
    pub(super) file: TrackingFile,
    pub(super) image: PathBuf,
    /// As counted at the last sign.
    pub(super) changes: u64,
    /// The last capture time at the last sign.
    pub(super) captured: CaptureTime,
}

impl Life {
    pub(super) async fn renew(&self, disk: &str) {
        let (file, image, captured) = (self.file.clone(), self.image.clone(), self.captured);
        // An old sign is a doubt the next attach settles by comparing everything.
        if let Err(error) = blocking(move || file.sign(trust::alive_now(&image, captured))).await {
            tracing::warn!(disk, %error, "cannot renew the sign of life in the tracking file");
        }
    }
}
