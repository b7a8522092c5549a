//! The sign of life of an agent that has a disk: renewed while the disk may change, it tells the next attach
//! until when the image was written by nobody else.
//!
//! Invariant: while nothing of this agent may write the image, the sign goes on telling of the image as this agent left
//! it, whatever the time: somebody else's write is noticed after a crash.

use std::path::PathBuf;

use backtide_tracking::{SignOfLife, TrackingFile};
use backtide_units::CaptureTime;

use super::{local::blocking, trust};

/// The tracking file's sign of life, renewed as long as clients may change something.
pub(super) struct Life {
    pub(super) file: TrackingFile,
    pub(super) image: PathBuf,
    /// As counted when the image was last looked at.
    pub(super) changes: u64,
    /// As it is in the file.
    pub(super) sign: SignOfLife,
}

impl Life {
    /// Looks whether something has changed, and says so; `may_change` when something may have that is not counted.
    pub(super) async fn keep(&mut self, changes: u64, captured: CaptureTime, may_change: bool, disk: &str) {
        if may_change || changes != self.changes {
            self.changes = changes;
            self.sign = trust::alive_now(&self.image, captured);
        } else if captured != self.sign.captured {
            // That an idle disk has not changed is captured too, and changes no image.
            self.sign.captured = captured;
        } else {
            return;
        }
        let (file, sign) = (self.file.clone(), self.sign);
        // An old sign is a doubt the next attach settles by comparing everything.
        if let Err(error) = blocking(move || file.sign(sign)).await {
            tracing::warn!(disk, %error, "cannot renew the sign of life in the tracking file");
        }
    }
}

#[cfg(test)]
mod tests {
    use std::{path::Path, sync::Arc};

    use backtide_storage::{MemoryStorage, Storage};
    use backtide_tracking::{ActivityLimits, Loaded, SavedTracking, Snapshot};
    use backtide_units::{ByteCount, DiskId};

    use super::*;
    use crate::record::ImageStamp;

    #[tokio::test]
    async fn a_foreign_write_while_the_disk_is_idle_is_not_taken_for_its_own() {
        let directory = tempfile::tempdir().unwrap();
        let image = directory.path().join("vm1.img");
        std::fs::write(&image, "content").unwrap();
        let storage: Arc<dyn Storage> = Arc::new(MemoryStorage::new());
        let snapshot = Snapshot::first(SavedTracking::unknown(DiskId::random()), false, true);
        let (path, limits) = (Path::new("vm1.tracking"), ActivityLimits::default());
        let file = TrackingFile::create(&*storage, path, limits, ByteCount(1 << 20), &snapshot).unwrap();
        let sign = trust::alive_since(ImageStamp::of(&image).as_ref(), CaptureTime(1));
        let mut life = Life { file, image: image.clone(), changes: 0, sign };
        let told = || Loaded::from_file(&*storage, path).unwrap().unwrap().alive.unwrap();
        life.keep(1, CaptureTime(2), false, "vm1").await;
        let own = told();
        let touch = |seconds| {
            let time = std::time::UNIX_EPOCH + std::time::Duration::from_secs(seconds);
            std::fs::File::options().write(true).open(&image).unwrap().set_modified(time).unwrap();
        };
        touch(1000);
        life.keep(1, CaptureTime(30), false, "vm1").await;
        assert_eq!(
            told(),
            SignOfLife { captured: CaptureTime(30), ..own },
            "it says nothing new of the image"
        );
        // A client, or a change of its own, may have been what changed it.
        life.keep(1, CaptureTime(30), true, "vm1").await;
        assert_eq!(told().image.unwrap().modified_ns, 1000 * 1_000_000_000);
        touch(2000);
        life.keep(2, CaptureTime(31), false, "vm1").await;
        assert_eq!(told().image.unwrap().modified_ns, 2000 * 1_000_000_000);
    }
}
