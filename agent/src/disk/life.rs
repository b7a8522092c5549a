//! The sign of life of an agent that has a disk: renewed while the disk may change, it tells the next attach
//! until when the image was written by nobody else.
//!
//! Invariant: while nothing of this agent may write the image, the sign goes on telling of the image as this agent left
//! it, whatever the time: somebody else's write is noticed after a crash.

use backtide_tracking::{SignOfLife, TrackingFile};
use backtide_units::CaptureTime;

use super::{
    in_place::{Displaced, InPlace},
    local::blocking,
    trust,
};
use crate::record::ImageStamp;

/// The tracking file's sign of life, renewed as long as clients may change something.
pub(super) struct Life {
    pub(super) file: TrackingFile,
    /// None where the image is no file.
    pub(super) image: Option<InPlace>,
    /// What became of it, as of the last look.
    pub(super) displaced: Option<Displaced>,
    /// It was cut short once: what it had behind that is nowhere any more, however long it is now.
    pub(super) was_cut: bool,
    /// As counted when the image was last looked at.
    pub(super) changes: u64,
    /// As it is in the file.
    pub(super) sign: SignOfLife,
}

impl Life {
    /// Looks whether something has changed, and says so; `may_change` when something may have that is not counted.
    pub(super) async fn keep(&mut self, changes: u64, captured: CaptureTime, may_change: bool, disk: &str) {
        let stamp = self.look(disk).await;
        if may_change || changes != self.changes {
            self.changes = changes;
            self.sign = trust::alive_now(stamp.as_ref(), captured);
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

    /// Looks whether the image is where it was, on a thread that may wait for the file system. The image as it is now; none
    /// of one that is not a file, or not in its place.
    pub(super) async fn look(&mut self, disk: &str) -> Option<ImageStamp> {
        let image = self.image.clone()?;
        // No look is no news.
        let (displaced, stamp) = match blocking(move || Ok(image.look())).await.ok()? {
            Ok(stamp) => (None, stamp),
            Err(displaced) => (Some(displaced), None),
        };
        match &displaced {
            found if *found == self.displaced => {}
            Some(error) => tracing::error!(disk, %error, "the image is not where it was"),
            None => tracing::info!(disk, "the image is where it was again"),
        }
        self.was_cut |= matches!(displaced, Some(Displaced::Shorter { .. }));
        self.displaced = displaced;
        stamp
    }

    /// Whether what the guest wrote need not be where the image's path leads to.
    pub(super) fn has_lost_its_image(&self) -> bool {
        self.displaced.is_some() || self.was_cut
    }
}

#[cfg(test)]
mod tests {
    use std::path::Path;

    use backtide_storage::{MemoryStorage, Storage};
    use backtide_tracking::{ActivityLimits, Loaded, SavedTracking, Snapshot};
    use backtide_units::{ByteCount, DiskId};

    use super::*;
    use crate::claims::Identity;

    const TRACKING: &str = "vm1.tracking";

    /// Of an image that is as long as it has to be, in a storage of its own.
    fn life_of(image: &Path) -> Life {
        life_in(&MemoryStorage::new(), image)
    }

    fn life_in(storage: &dyn Storage, image: &Path) -> Life {
        let snapshot = Snapshot::first(SavedTracking::unknown(DiskId::random()), false, true);
        let (path, limits) = (Path::new(TRACKING), ActivityLimits::default());
        let file = TrackingFile::create(storage, path, limits, ByteCount(1 << 20), &snapshot).unwrap();
        let stamp = ImageStamp::of(image).unwrap();
        let sign = trust::alive_since(Some(&stamp), CaptureTime(1));
        let text = image.to_str().unwrap();
        let image = InPlace::new(text, Identity::of(text), stamp.size);
        Life { file, image, displaced: None, was_cut: false, changes: 0, sign }
    }

    #[tokio::test]
    async fn a_foreign_write_while_the_disk_is_idle_is_not_taken_for_its_own() {
        let directory = tempfile::tempdir().unwrap();
        let image = directory.path().join("vm1.img");
        std::fs::write(&image, "content").unwrap();
        let storage = MemoryStorage::new();
        let mut life = life_in(&storage, &image);
        assert!(!life.has_lost_its_image());
        let told = || Loaded::from_file(&storage, Path::new(TRACKING)).unwrap().unwrap().alive.unwrap();
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
        // Another file by that name: nothing is known of it.
        std::fs::copy(&image, directory.path().join("copy")).unwrap();
        std::fs::rename(directory.path().join("copy"), &image).unwrap();
        life.keep(3, CaptureTime(32), true, "vm1").await;
        assert_eq!((told().image, life.look("vm1").await), (None, None));
        assert_eq!(life.displaced, Some(Displaced::Other(image)));
        assert!(life.has_lost_its_image());
    }

    #[tokio::test]
    async fn what_was_cut_off_does_not_come_back_and_what_was_renamed_does() {
        let directory = tempfile::tempdir().unwrap();
        let image = directory.path().join("vm1.img");
        std::fs::write(&image, [1; 8192]).unwrap();
        let mut life = life_of(&image);
        let kept = directory.path().join("kept");
        std::fs::rename(&image, &kept).unwrap();
        assert_eq!((life.look("vm1").await, life.has_lost_its_image()), (None, true));
        std::fs::rename(&kept, &image).unwrap();
        assert_eq!((life.look("vm1").await, life.has_lost_its_image()), (ImageStamp::of(&image), false));
        let file = std::fs::File::options().write(true).open(&image).unwrap();
        for length in [4096, 8192] {
            file.set_len(length).unwrap();
            life.look("vm1").await;
            assert!(life.has_lost_its_image(), "{length}");
        }
        assert_eq!(life.displaced, None);
    }
}
