//! What the host does with a disk's image beside the disk, as it was found at the attach: looked at again until it is over.

use super::local::blocking;
use crate::claims::Beside;

/// None when nothing was found, or nothing is there any more.
pub(super) struct UsedBeside(Option<Beside>);

impl UsedBeside {
    /// As it was found, and logged, at the attach.
    pub(super) fn found(beside: Option<Beside>, disk: &str) -> Self {
        if let Some(beside) = &beside {
            tracing::warn!(disk, "{beside}");
        }
        Self(beside)
    }

    /// What is told of it.
    pub(super) fn told(&self) -> Option<String> {
        self.0.as_ref().map(Beside::to_string)
    }

    /// Looks again, on a thread that may wait for storage.
    pub(super) async fn look(&mut self, disk: &str) {
        let Some(beside) = self.0.clone() else { return };
        // No look is no news.
        let Ok(now) = blocking(move || Ok(beside.again())).await else { return };
        if now.is_none() {
            tracing::info!(disk, "nothing else uses the image any more");
        }
        self.0 = now;
    }
}
