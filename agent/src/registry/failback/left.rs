//! The image that a disk had here before another agent had it: looked at, held, and what of it is to be trusted.

use std::path::{Path, PathBuf};

use backtide_agent_api::{Adopted, FailbackReport, ImageFormat};
use backtide_control::{ApiError, ErrorCode};
use backtide_hydration::SourcePoint;
use backtide_io_filter::Resume;
use backtide_storage::ImageFile;
use backtide_tracking::{DirtyBitmap, LoadError, Loaded};
use backtide_units::{BlockRange, ByteCount, ByteOffset, ByteRange, Epoch, LogPosition, Lsn};

use super::super::{
    Registry,
    errors::{failed, open_error},
    image,
    rewind::refuse_unfit,
    waiting,
};
use crate::{
    disk::{
        self, OpenError, Served,
        source::{FetchError, PointSource},
        trust,
    },
    qcow2::{Access, Qcow2Server, format_of},
    record::{DiskRecord, ImageStamp, Records},
};

/// An image that nobody else can have as long as this is there, and what serves it, where something does.
pub(in crate::registry) struct HeldImage {
    pub(in crate::registry) looked_at: LookedAt,
    /// The lock on a raw one. A qcow2 file is locked by its server; nobody is kept away from an NBD export.
    _lock: Option<ImageFile>,
}

/// An image as it was when it was looked at.
#[derive(Clone, Default)]
pub(in crate::registry) struct LookedAt {
    path: Option<PathBuf>,
    /// The files that have its content besides.
    data_files: Vec<PathBuf>,
    /// None of a device, and of an NBD export.
    pub(in crate::registry) stamp: Option<ImageStamp>,
}

/// What is found of an image.
pub(super) struct Found {
    held: HeldImage,
    /// As it was before anything was started for it.
    stamp: Option<ImageStamp>,
    size: ByteCount,
    /// Where it holds data.
    allocated: DirtyBitmap,
}

/// The image of a disk that another agent has had since, as it was left here.
pub(in crate::registry) struct LeftBehind {
    pub(in crate::registry) image: HeldImage,
    pub(in crate::registry) size: ByteCount,
    /// Where it holds data.
    allocated: DirtyBitmap,
    /// How it may differ from what the receiver had, or why nobody knows.
    known: Result<Known, String>,
}

/// What the saved tracking says.
struct Known {
    /// The last attach here.
    epoch: Epoch,
    /// So far the receiver had acknowledged everything as durable.
    durable: Lsn,
    /// So many entries of the log it had acknowledged.
    entries: LogPosition,
    /// What may have been changed here without the receiver.
    changed: DirtyBitmap,
    /// What the image lacked already.
    lacked: DirtyBitmap,
    /// A failback was begun since, and cut off.
    begun: bool,
}

impl Registry {
    /// Looks at the image that is here, and has it for itself, if it is opened as a disk; with what serves it, to be ended by whoever has that.
    pub(super) async fn find_left(
        &self,
        record: &DiskRecord,
        access: Access,
    ) -> Result<(Found, Option<Qcow2Server>), ApiError> {
        let image = record.image.clone();
        let known = record.clone();
        let look = move || refuse_unfit(&image).map(|_| known.stamp_now());
        let stamp = waiting(look).await??;
        let (image, known) = (record.image.clone(), record.format);
        match waiting(move || format_of(&image, known)).await? {
            Some(ImageFormat::Raw) => {
                let image = record.image.clone();
                waiting(move || find_raw(Path::new(&image))).await?.map(|found| (found, None))
            }
            Some(ImageFormat::Qcow2) => {
                let (path, socket) = (Path::new(&record.image), self.places.qcow2_socket(&record.name));
                let server = Qcow2Server::start(path, &record.name, socket, record.cache, access).await;
                let server = server.map_err(|error| image::qcow2_error(&error))?;
                let served = image::look_at(server.uri()).await;
                let (path, data_files) = (path.to_owned(), record.data_files.clone());
                // Opening it is a change of the file, and none of the disk.
                let opened = waiting(move || LookedAt::now(path, data_files));
                match (served, opened.await) {
                    (Ok(served), Ok(opened)) => Ok((Found::served(opened, stamp, served), Some(server))),
                    (Err(error), _) | (_, Err(error)) => {
                        server.stop_anyway().await;
                        Err(error)
                    }
                }
            }
            None => {
                let served = image::look_at(&record.image).await?;
                Ok((Found::served(LookedAt::default(), None, served), None))
            }
        }
    }
}

impl Found {
    fn served(looked_at: LookedAt, stamp: Option<ImageStamp>, served: Served) -> Self {
        let Served { size, allocated, takes_blocks: _ } = served;
        Self { held: HeldImage { looked_at, _lock: None }, stamp, size, allocated }
    }
}

/// A raw file or block device. Blocks.
fn find_raw(path: &Path) -> Result<Found, ApiError> {
    let image = ImageFile::open(path).map_err(|error| open_error(&OpenError::Image(error)))?;
    let (size, stamp) = (image.size(), ImageStamp::of(path));
    let whole = ByteRange::between(ByteOffset::ZERO, ByteOffset(size.0));
    let mut allocated = DirtyBitmap::new();
    for stretch in image.allocated(whole).map_err(|error| failed(&error))? {
        allocated.insert(BlockRange::touched_by(stretch));
    }
    let looked_at = LookedAt { path: Some(path.to_owned()), data_files: Vec::new(), stamp: stamp.clone() };
    Ok(Found { held: HeldImage { looked_at, _lock: Some(image) }, stamp, size, allocated })
}

/// What is here of a disk that was taken over. Blocks.
pub(super) fn left_behind(
    records: &Records,
    record: &DiskRecord,
    adopt: Adopted,
    force: bool,
    found: Found,
) -> Result<LeftBehind, ApiError> {
    let Found { held: image, stamp, size, allocated } = found;
    let left = records.load_tracking(&record.name);
    let other = another_image(record, left.as_ref().ok().and_then(Option::as_ref), stamp.as_ref(), size);
    if let Some(why) = other.as_ref().filter(|_| !force) {
        return Err(ApiError::new(ErrorCode::Refused, why.clone()).with_hint(format!(
            "bring back the image that disk {} had; with --force all of this one is overwritten with the disk",
            record.name
        )));
    }
    let known = match other {
        Some(why) => Err(why),
        None if record.history != Some(adopt.history) => {
            Err("the receiver keeps another history of it than it did".to_owned())
        }
        None => known(records, record, left, stamp.as_ref(), size),
    };
    Ok(LeftBehind { image, size, allocated, known })
}

/// Why this cannot be the image that the disk had here, if so.
fn another_image(
    record: &DiskRecord,
    left: Option<&Loaded>,
    stamp: Option<&ImageStamp>,
    size: ByteCount,
) -> Option<String> {
    let DiskRecord { name, image, .. } = record;
    if size < record.size {
        return Some(format!(
            "{image} has {size} bytes, and the image of disk {name} had {} here: it is not that one",
            record.size
        ));
    }
    let number = |stamp: &ImageStamp| trust::seen(stamp).inode;
    let detached = record.image_at_detach.as_ref().map(number);
    let seen = left.and_then(|left| left.alive?.image).map(|seen| seen.inode);
    let was = detached.filter(|inode| *inode > 0).or(seen.filter(|inode| *inode > 0))?;
    let is = stamp.map_or(0, number);
    (was != is).then(|| format!("{image} is another file than the image that disk {name} had here"))
}

fn known(
    records: &Records,
    record: &DiskRecord,
    left: Result<Option<Loaded>, LoadError>,
    stamp: Option<&ImageStamp>,
    size: ByteCount,
) -> Result<Known, String> {
    let (lacked, begun) = match records.open_hydration(&record.name, trust::boot_id()) {
        Ok(None) if disk::has_note(Path::new(&record.image)) => {
            return Err("the image lacks blocks, and nobody knows which".to_owned());
        }
        Ok(None) => (DirtyBitmap::new(), false),
        Ok(Some(file)) => {
            let inode = stamp.map_or(0, |stamp| stamp.inode);
            let header = file.header();
            if header.disk != record.uuid || header.inode != inode {
                return Err("another image lacked blocks of it".to_owned());
            }
            (file.missing(), header.epoch > record.last_own_epoch())
        }
        Err(error) => return Err(format!("the image lacks blocks, and nobody knows which: {error}")),
    };
    let (durable, entries, changed) = match trust::resume(record, left, stamp, size) {
        Resume::Clean(mut saved) => {
            saved.dirty.union_with(&saved.zeroes);
            (saved.acked_durable, saved.acked_position, saved.dirty)
        }
        Resume::Crashed { acked_durable, acked_position, candidates, .. } => {
            (acked_durable, acked_position, candidates)
        }
        Resume::Lost { reason, .. } => {
            return Err(format!("this agent does not know what was changed here: {reason}"));
        }
        Resume::New => return Err("this agent has never reached a receiver with it".to_owned()),
    };
    Ok(Known { epoch: record.last_own_epoch(), durable, entries, changed, lacked, begun })
}

impl LookedAt {
    /// Refuses an image that somebody has written, or replaced, since it was looked at: such a one need not know of the lock.
    /// Blocks.
    pub(in crate::registry) fn refuse_changed(&self) -> Result<(), ApiError> {
        match &self.path {
            Some(path) if self.look() != self.stamp => Err(changed(path)),
            Some(_) | None => Ok(()),
        }
    }

    /// How what served it has left it, just now. Refuses another file in its place. Blocks.
    pub(in crate::registry) fn left(&self) -> Result<Self, ApiError> {
        let stamp = self.look();
        let inode = |stamp: &Option<ImageStamp>| stamp.as_ref().map(|stamp| stamp.inode);
        match &self.path {
            Some(path) if inode(&stamp) != inode(&self.stamp) => Err(changed(path)),
            _ => Ok(Self { stamp, ..self.clone() }),
        }
    }

    fn now(path: PathBuf, data_files: Vec<PathBuf>) -> Self {
        let unseen = Self { path: Some(path), data_files, stamp: None };
        Self { stamp: unseen.look(), ..unseen }
    }

    fn look(&self) -> Option<ImageStamp> {
        ImageStamp::with(self.path.as_deref()?, &self.data_files)
    }
}

fn changed(path: &Path) -> ApiError {
    let message = format!("{} was changed while the disk was being taken back", path.display());
    let hint = "see who writes it, then try again: it was not touched";
    ApiError::new(ErrorCode::Busy, message).with_hint(hint)
}

impl LeftBehind {
    /// Whether the image can become the disk at this point; it may have grown since.
    pub(in crate::registry) fn fits(&self, point: &SourcePoint) -> Result<(), FetchError> {
        // A file can be made longer.
        let grows = self.image.looked_at.stamp.is_some();
        if self.size == point.size || (grows && self.size < point.size) {
            return Ok(());
        }
        Err(FetchError::Refused(format!("the image has {} bytes, and the disk {}", self.size, point.size)))
    }

    /// What the image lacks of the point, and why that is everything, if so.
    pub(in crate::registry) async fn missing(
        &self,
        source: &dyn PointSource,
    ) -> Result<(DirtyBitmap, Option<String>), FetchError> {
        let why = match &self.known {
            Ok(known) => match source.left(known.epoch, known.durable, known.entries).await {
                Ok(mut differing) => {
                    differing.union_with(&known.changed);
                    differing.union_with(&known.lacked);
                    return Ok((differing, None));
                }
                Err(FetchError::Refused(_)) if known.begun => "an earlier failback was cut off".to_owned(),
                Err(FetchError::Refused(why)) => why,
                Err(error @ (FetchError::Unreachable(_) | FetchError::Damaged(_))) => return Err(error),
            },
            Err(why) => why.clone(),
        };
        let mut missing = source.data().await?;
        missing.union_with(&self.allocated);
        Ok((missing, Some(why)))
    }

    pub(super) fn report(
        &self,
        point: &SourcePoint,
        mut missing: DirtyBitmap,
        everything_because: Option<String>,
    ) -> FailbackReport {
        missing.keep_only(BlockRange::whole_disk(point.size));
        let mut kept = self.allocated.clone();
        kept.subtract(&missing);
        let lost = match &self.known {
            Ok(known) => known.changed.count(),
            Err(_) => self.allocated.count(),
        };
        FailbackReport {
            point: point.lsn,
            point_time: point.time,
            fetched_bytes: missing.count().bytes(),
            kept_bytes: kept.count().bytes(),
            lost_bytes: lost.bytes(),
            everything_because,
            here_already: false,
            disk: None,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn another_file_in_the_place_of_the_one_that_was_served_is_refused() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("vm1.qcow2");
        std::fs::write(&path, "open").unwrap();
        let looked_at = LookedAt::now(path.clone(), Vec::new());
        std::fs::write(&path, "open and closed").unwrap();
        looked_at.refuse_changed().unwrap_err();
        let left = looked_at.left().unwrap();
        assert_eq!(left.stamp, ImageStamp::of(&path));
        left.refuse_changed().unwrap();
        std::fs::copy(&path, directory.path().join("copy")).unwrap();
        std::fs::rename(directory.path().join("copy"), &path).unwrap();
        assert!(looked_at.left().is_err());
        std::fs::remove_file(&path).unwrap();
        assert!(looked_at.left().is_err());
    }
}
