//! How an image is left when its disk is let go of: what the next attach compares it with.
//!
//! A raw image was looked at by the disk itself, which had it locked. A qcow2 file is written by its server until that has
//! ended, so it is looked at then, at once.
//!
//! Invariant: of a file that somebody may still write, and of one that is not in its place, nothing is believed.

use super::waiting;
use crate::{
    disk::{Displaced, InPlace},
    qcow2::{NotEnded, Qcow2Server},
    record::{DiskRecord, ImageStamp},
};

/// What became of an image's server, and how it left the image.
#[derive(Debug)]
pub(super) enum Left {
    /// There was none: it is as the disk left it.
    ByItsDisk,
    /// It has ended.
    ByItsServer(Result<Option<ImageStamp>, Displaced>),
    /// It has the image open.
    StillOpen(NotEnded),
}

impl Left {
    /// Ends what serves an image, if anything does, and looks at it.
    pub(super) async fn end(server: Option<Qcow2Server>, image: Option<InPlace>) -> Self {
        let Some(server) = server else { return Self::ByItsDisk };
        if let Err(error) = server.stop().await {
            return Self::StillOpen(error);
        }
        let look = move || image.map_or(Ok(None), |image| image.look());
        // No look, no stamp.
        Self::ByItsServer(waiting(look).await.unwrap_or(Ok(None)))
    }

    /// Why it is still open, if it is.
    pub(super) fn still_open(&self) -> Option<&NotEnded> {
        match self {
            Self::StillOpen(error) => Some(error),
            Self::ByItsDisk | Self::ByItsServer(_) => None,
        }
    }

    /// Notes it in the record of a disk that has come to its end.
    pub(super) fn note(&self, record: &mut DiskRecord) {
        let as_disk_left = record.image_at_detach.take();
        match self {
            Self::ByItsDisk => record.image_at_detach = as_disk_left,
            // What the disk did not vouch for is no better now.
            Self::ByItsServer(Ok(stamp)) => record.image_at_detach = as_disk_left.and(stamp.clone()),
            Self::ByItsServer(Err(_)) => record.image_displaced = true,
            // Also of a device, which is believed when the agent has ended in good order.
            Self::StillOpen(_) => record.stopped = false,
        }
    }
}

#[cfg(test)]
mod tests {
    use std::path::Path;

    use backtide_units::ByteCount;

    use super::*;
    use crate::claims::Identity;

    const STILL: NotEnded = NotEnded::StandsStill { process: 7 };

    fn in_place(image: &Path) -> Option<InPlace> {
        let text = image.to_str().unwrap();
        InPlace::new(text, Identity::of(text), ByteCount::ZERO)
    }

    fn record(image: &Path) -> DiskRecord {
        let receiver = "unix:/run/r.sock".parse().unwrap();
        let record = DiskRecord::new("vm1".parse().unwrap(), image.display().to_string(), receiver);
        DiskRecord { image_at_detach: ImageStamp::of(image), stopped: true, ..record }
    }

    #[tokio::test]
    async fn a_served_image_is_believed_as_its_server_left_it() {
        let directory = tempfile::tempdir().unwrap();
        let image = directory.path().join("vm1.qcow2");
        std::fs::write(&image, "open").unwrap();
        let (mut by_server, mut by_disk) = (record(&image), record(&image));
        let before = by_disk.image_at_detach.clone();
        let mut unflushed = DiskRecord { image_at_detach: None, ..record(&image) };
        let place = in_place(&image);
        std::fs::write(&image, "open and closed").unwrap();
        Left::end(None, place.clone()).await.note(&mut by_disk);
        assert_eq!(by_disk.image_at_detach, before);
        let left = Left::end(Some(Qcow2Server::played(Ok(()))), place).await;
        left.note(&mut by_server);
        left.note(&mut unflushed);
        assert!(left.still_open().is_none());
        let after = ImageStamp::of(&image);
        assert!(after != before);
        assert_eq!((by_server.image_at_detach, unflushed.image_at_detach), (after, None));
        assert!(by_server.stopped && !by_server.image_displaced);
    }

    #[tokio::test]
    async fn what_is_still_open_or_not_in_its_place_is_not_believed() {
        let directory = tempfile::tempdir().unwrap();
        let image = directory.path().join("vm1.qcow2");
        std::fs::write(&image, "open").unwrap();
        let (mut open, mut displaced) = (record(&image), record(&image));
        let place = in_place(&image);
        let left = Left::end(Some(Qcow2Server::played(Err(STILL))), place.clone()).await;
        assert!(left.still_open().is_some());
        left.note(&mut open);
        assert!(open.image_at_detach.is_none() && !open.stopped);
        std::fs::copy(&image, directory.path().join("copy")).unwrap();
        std::fs::rename(directory.path().join("copy"), &image).unwrap();
        Left::end(Some(Qcow2Server::played(Ok(()))), place).await.note(&mut displaced);
        assert!(displaced.image_at_detach.is_none() && displaced.image_displaced);
    }
}
