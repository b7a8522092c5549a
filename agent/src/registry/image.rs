//! The images in which a disk begins that lacks everything of a point, and those that are looked at before a disk goes on
//! with them: raw files, qcow2 files, and whatever an NBD server serves.
//!
//! Invariant: nothing that may be somebody's is written. A file is made here, or has no byte, also when it is made at last,
//! however long ago it was looked at; a server tells that all it has reads as zeroes.

use std::{
    fs::{File, Metadata, OpenOptions},
    io,
    os::unix::fs::MetadataExt,
    path::Path,
};

use backtide_agent_api::ImageFormat;
use backtide_control::{ApiError, ErrorCode};
use backtide_export::NbdUri;
use backtide_units::ByteCount;
use rustix::{fs::FlockOperation, io::Errno};

use super::{rewind::too_coarse, waiting};
use crate::{
    disk::{self, Served},
    qcow2::{self, Qcow2Error, format_of},
    record::{DiskRecord, ImageStamp},
};

/// The blocks of a file's metadata unit, in bytes.
const STAT_BLOCK: u64 = 512;

/// What was found where an image is to be.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Before {
    /// Nothing, or a file without a byte.
    Nothing,
    /// The same, or what an attempt has made of it that somebody ended.
    Begun,
    /// An image of this size, which is kept.
    Kept(ByteCount),
}

impl Before {
    fn kept(self) -> Option<ByteCount> {
        match self {
            Self::Kept(size) => Some(size),
            Self::Nothing | Self::Begun => None,
        }
    }

    /// Whether what is kept is shorter than `size`.
    pub(super) fn is_shorter_than(self, size: ByteCount) -> bool {
        self.kept().is_some_and(|kept| kept < size)
    }
}

/// What the image of a disk that has yet to be made is, or becomes: as asked for, else by what it looks like or its name ends
/// with; none of an NBD URI.
pub(super) async fn find_format(record: &DiskRecord) -> Result<Option<ImageFormat>, ApiError> {
    let (image, asked) = (record.image.clone(), record.format);
    waiting(move || format_of_new(&image, asked)).await
}

fn format_of_new(image: &str, asked: Option<ImageFormat>) -> Option<ImageFormat> {
    let path = disk::path_of(image)?;
    let is_new = path.metadata().map_or(true, |found| found.len() == 0);
    let is_named_so = path.extension().is_some_and(|extension| extension == "qcow2");
    match asked {
        None if is_new && is_named_so => Some(ImageFormat::Qcow2),
        asked => format_of(image, asked),
    }
}

/// Refuses an image that has a byte, or could be somebody's disk; `begun` when it was made for this one already.
pub(super) async fn refuse_used(
    image: &str,
    format: Option<ImageFormat>,
    begun: bool,
) -> Result<Before, ApiError> {
    let Some((path, format)) = disk::path_of(image).zip(format) else {
        return refuse_used_server(image).await.map(Before::Kept);
    };
    let before = if begun { Before::Begun } else { Before::Nothing };
    let looked_at = path.clone();
    // A link to nothing is somebody's mistake.
    let look = move || (looked_at.metadata(), looked_at.is_symlink());
    let found = match waiting(look).await? {
        (Err(error), false) if error.kind() == io::ErrorKind::NotFound => {
            let folder = path.parent().unwrap_or(Path::new("/")).to_owned();
            waiting(move || refuse_no_folder(&folder)).await??;
            return Ok(before);
        }
        (Err(error), _) => return Err(io_error(&format!("look at {image}"), &error)),
        (Ok(found), _) => found,
    };
    if !found.is_file() {
        let message =
            format!("{image} is no file: only a new one, or an NBD export, can begin as a point of a disk");
        return Err(ApiError::new(ErrorCode::Refused, message)
            .with_hint("`backtide restore` writes a point to a device"));
    }
    let is_blank = match format {
        ImageFormat::Raw => is_blank_file(&found, before),
        ImageFormat::Qcow2 => found.len() == 0 || begun && is_blank(&path).await?,
    };
    if is_blank { Ok(before) } else { Err(used(image)) }
}

/// Refuses a folder in which no file can be made.
fn refuse_no_folder(folder: &Path) -> Result<(), ApiError> {
    let wanted = rustix::fs::Access::WRITE_OK | rustix::fs::Access::EXEC_OK;
    rustix::fs::access(folder, wanted).map_err(|error| {
        io_error(&format!("make a file in {}", folder.display()), &error.into())
            .with_hint("make the folder, or name a file in another one")
    })
}

fn used(image: &str) -> ApiError {
    let message = format!("{image} exists and is not empty");
    ApiError::new(ErrorCode::Exists, message).with_hint("name a new file, or remove that one first")
}

/// Whether a raw image has no byte.
fn is_blank_file(found: &Metadata, before: Before) -> bool {
    found.len() == 0 || before == Before::Begun && found.blocks() * STAT_BLOCK == 0
}

async fn is_blank(path: &Path) -> Result<bool, ApiError> {
    qcow2::is_blank(path).await.map_err(|error| qcow2_error(&error))
}

async fn refuse_used_server(image: &str) -> Result<ByteCount, ApiError> {
    let served = look_at(image).await?;
    if served.allocated.is_empty() {
        return Ok(served.size);
    }
    let message = format!("{image} does not tell that all of it reads as zeroes: it may be somebody's disk");
    Err(ApiError::new(ErrorCode::Exists, message)
        .with_hint("name a new export that is empty, such as that of a new qcow2 file or logical volume"))
}

/// What the server at a URI serves, which single blocks of can be written.
pub(super) async fn look_at(image: &str) -> Result<Served, ApiError> {
    let uri: NbdUri = image.parse().map_err(|error: backtide_export::ParseUriError| {
        let message = format!("{image} is neither an absolute path nor an NBD URI: {error}");
        ApiError::new(ErrorCode::Usage, message)
    })?;
    let served = disk::look_at(&uri).await.map_err(|error| disk::behind_error(&error))?;
    match served.takes_blocks {
        true => Ok(served),
        false => Err(too_coarse(image)),
    }
}

/// Makes the image of a disk of `size`, where it has nothing yet a hole, durably; its inode, or 0 where it has none.
/// `before`: what was found there, perhaps long ago.
///
/// # Errors
/// `exists` or `locked` when it is somebody's by now.
pub(super) async fn make(
    image: &str,
    format: Option<ImageFormat>,
    size: ByteCount,
    before: Before,
) -> Result<u64, ApiError> {
    let Some((path, format)) = disk::path_of(image).zip(format) else {
        return refuse_other_size(image, size, before).map(|()| 0);
    };
    let shown = image.to_owned();
    match (format, before) {
        (ImageFormat::Raw, before) => waiting(move || make_raw(&path, &shown, size, before)).await?,
        (ImageFormat::Qcow2, before) => {
            match before.kept() {
                // One that somebody has open is kept from others by QEMU's own lock, which would mind ours on NFS.
                None => {
                    refuse_used(image, Some(format), before == Before::Begun).await?;
                    qcow2::create(&path, size).await.map_err(|error| qcow2_error(&error))?;
                }
                Some(kept) if kept < size => {
                    qcow2::grow(&path, size).await.map_err(|error| qcow2_error(&error))?;
                }
                Some(_) => {}
            }
            let sync =
                move || OpenOptions::new().write(true).open(&path).and_then(|file| settle(&file, &path));
            waiting(sync).await?.map_err(|error| cannot_make(&shown, &error))
        }
    }
}

/// Refuses a server whose disk has not the size that is needed: only the server can change it.
pub(super) fn refuse_other_size(image: &str, size: ByteCount, before: Before) -> Result<(), ApiError> {
    match before.kept() {
        Some(kept) if kept != size => {
            let message = format!("{image} has {kept} bytes, and the disk {size}");
            Err(ApiError::new(ErrorCode::Refused, message).with_hint("make it as large as the disk"))
        }
        Some(_) | None => Ok(()),
    }
}

/// Makes a raw image, `shown` to people; one that is kept is locked by whoever keeps it. Blocks.
fn make_raw(path: &Path, shown: &str, size: ByteCount, before: Before) -> Result<u64, ApiError> {
    let cannot = |error: io::Error| cannot_make(shown, &error);
    let is_new = before.kept().is_none();
    let mut options = OpenOptions::new();
    let file = options.write(true).create(is_new).truncate(false).open(path).map_err(cannot)?;
    if is_new {
        lock(&file, shown)?;
    }
    // Under the lock: another disk may have begun here, and written, since it was looked at.
    let (found, named) = (file.metadata().map_err(cannot)?, path.metadata().map_err(cannot)?);
    if is_new && (found.ino() != named.ino() || !is_blank_file(&found, before)) {
        return Err(used(shown));
    }
    // A device has the size it has.
    if found.is_file() && found.len() != size.0 {
        file.set_len(size.0).map_err(cannot)?;
    }
    settle(&file, path).map_err(cannot)
}

/// Keeps a raw image from every disk and every restore as long as the file is open.
fn lock(file: &File, shown: &str) -> Result<(), ApiError> {
    rustix::fs::flock(file, FlockOperation::NonBlockingLockExclusive).map_err(|errno| match errno {
        Errno::WOULDBLOCK => {
            let message = format!("{shown} is locked: another disk has it by now, or a restore writes to it");
            ApiError::new(ErrorCode::Locked, message).with_hint("name a new file")
        }
        errno => io_error(&format!("lock {shown}"), &errno.into()),
    })
}

/// Makes an image and its name durable; its inode, or 0 of a device. Blocks.
fn settle(file: &File, path: &Path) -> io::Result<u64> {
    file.sync_all()?;
    if let Some(parent) = path.parent() {
        File::open(parent)?.sync_all()?;
    }
    let found = file.metadata()?;
    Ok(if found.is_file() { found.ino() } else { 0 })
}

/// Empties an image that was made and not begun with, so that the next attempt may use it: only as it was made. Blocks.
pub(super) fn empty_again(path: &Path, made: Option<&ImageStamp>) {
    let empty = || {
        let file = File::options().write(true).open(path)?;
        rustix::fs::flock(&file, FlockOperation::NonBlockingLockExclusive)?;
        match ImageStamp::found(&file.metadata()?) {
            Some(now) if made == Some(&now) => file.set_len(0),
            _ => Err(io::Error::other("somebody has written it since")),
        }
    };
    if let Err(error) = empty() {
        tracing::warn!(image = %path.display(), %error, "cannot empty the image that was made");
    }
}

fn cannot_make(shown: &str, error: &io::Error) -> ApiError {
    io_error(&format!("make the image {shown}"), error)
}

pub(super) fn qcow2_error(error: &Qcow2Error) -> ApiError {
    ApiError::from_error(ErrorCode::Failed, error)
}

pub(super) fn io_error(what: &str, error: &io::Error) -> ApiError {
    ApiError::new(ErrorCode::Failed, format!("cannot {what}: {error}"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn what_somebody_has_written_since_it_was_looked_at_is_not_made_anew() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("new");
        let image = path.display().to_string();
        for format in [ImageFormat::Raw, ImageFormat::Qcow2] {
            let before = refuse_used(&image, Some(format), false).await.unwrap();
            std::fs::write(&path, "written").unwrap();
            let refused = make(&image, Some(format), ByteCount(1 << 20), before).await.unwrap_err();
            assert_eq!(refused.code, ErrorCode::Exists, "{refused}");
            assert_eq!(std::fs::read(&path).unwrap(), b"written");
            std::fs::remove_file(&path).unwrap();
        }
    }

    #[tokio::test]
    async fn a_folder_that_is_not_there_is_told_before_a_file_is_made_in_it() {
        let directory = tempfile::tempdir().unwrap();
        let image = directory.path().join("nowhere/new").display().to_string();
        let refused = refuse_used(&image, Some(ImageFormat::Raw), false).await.unwrap_err();
        assert!(
            refused.message.contains("make a file in") && refused.message.contains("/nowhere"),
            "{refused}"
        );
    }

    #[test]
    fn an_image_that_was_made_is_emptied_only_as_it_was_made() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("new");
        let made = || {
            let shown = path.display().to_string();
            make_raw(&path, &shown, ByteCount(1 << 20), Before::Begun).unwrap();
            ImageStamp::of(&path)
        };
        let length = || std::fs::metadata(&path).unwrap().len();
        let stamp = made();
        empty_again(&path, None);
        assert_eq!(length(), 1 << 20);
        let held = File::open(&path).unwrap();
        lock(&held, "new").unwrap();
        empty_again(&path, stamp.as_ref());
        assert_eq!(length(), 1 << 20, "somebody has it");
        drop(held);
        empty_again(&path, stamp.as_ref());
        assert_eq!(length(), 0);
        let stamp = made();
        std::fs::write(&path, "written").unwrap();
        empty_again(&path, stamp.as_ref());
        assert_eq!(std::fs::read(&path).unwrap(), b"written");
    }
}
