//! The images in which a disk begins that lacks everything of a point, and those that are looked at before a disk goes on
//! with them: raw files, qcow2 files, and whatever an NBD server serves.
//!
//! Invariant: nothing that may be somebody's is written. A file is made here, or has no byte; a server tells that all it has
//! reads as zeroes.

use std::{
    fs::{File, OpenOptions},
    io,
    os::unix::fs::MetadataExt,
    path::Path,
};

use backtide_agent_api::ImageFormat;
use backtide_control::{ApiError, ErrorCode};
use backtide_export::NbdUri;
use backtide_units::ByteCount;

use super::{rewind::too_coarse, waiting};
use crate::{
    disk::{self, Served},
    qcow2::{self, Qcow2Error, format_of},
    record::DiskRecord,
};

/// The blocks of a file's metadata unit, in bytes.
const STAT_BLOCK: u64 = 512;

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

/// Refuses an image that has a byte, or could be somebody's disk; `begun` when it was made for this one already. The size of one
/// that has one and keeps it.
pub(super) async fn refuse_used(
    image: &str,
    format: Option<ImageFormat>,
    begun: bool,
) -> Result<Option<ByteCount>, ApiError> {
    let Some((path, format)) = disk::path_of(image).zip(format) else {
        return refuse_used_server(image).await.map(Some);
    };
    let looked_at = path.clone();
    // A link to nothing is somebody's mistake.
    let look = move || (looked_at.metadata(), looked_at.is_symlink());
    let found = match waiting(look).await? {
        (Err(error), false) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
        (Err(error), _) => return Err(io_error(&format!("look at {image}"), &error)),
        (Ok(found), _) => found,
    };
    if !found.is_file() {
        let message =
            format!("{image} is no file: only a new one, or an NBD export, can begin as a point of a disk");
        return Err(ApiError::new(ErrorCode::Refused, message)
            .with_hint("`backtide restore` writes a point to a device"));
    }
    let is_blank = found.len() == 0
        || begun
            && match format {
                ImageFormat::Raw => found.blocks() * STAT_BLOCK == 0,
                ImageFormat::Qcow2 => is_blank(&path).await?,
            };
    if is_blank {
        return Ok(None);
    }
    let message = format!("{image} exists and is not empty");
    Err(ApiError::new(ErrorCode::Exists, message).with_hint("name a new file, or remove that one first"))
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

/// Makes the image of a disk of `size`, where it has nothing yet a hole, durably; its inode, or 0 where it has none. `had`: the
/// size of an image that is kept.
pub(super) async fn make(
    image: &str,
    format: Option<ImageFormat>,
    size: ByteCount,
    had: Option<ByteCount>,
) -> Result<u64, ApiError> {
    let Some((path, format)) = disk::path_of(image).zip(format) else {
        return refuse_other_size(image, size, had).map(|()| 0);
    };
    match (format, had) {
        (ImageFormat::Raw, _) => {}
        (ImageFormat::Qcow2, None) => {
            qcow2::create(&path, size).await.map_err(|error| qcow2_error(&error))?
        }
        (ImageFormat::Qcow2, Some(had)) if had < size => {
            qcow2::grow(&path, size).await.map_err(|error| qcow2_error(&error))?;
        }
        (ImageFormat::Qcow2, Some(_)) => {}
    }
    let shown = image.to_owned();
    let length = (format == ImageFormat::Raw).then_some(size);
    let made = waiting(move || make_file(&path, length)).await?;
    made.map_err(|error| io_error(&format!("make the image {shown}"), &error))
}

/// Refuses a server whose disk has not the size that is needed: only the server can change it.
pub(super) fn refuse_other_size(
    image: &str,
    size: ByteCount,
    had: Option<ByteCount>,
) -> Result<(), ApiError> {
    match had {
        Some(had) if had != size => {
            let message = format!("{image} has {had} bytes, and the disk {size}");
            Err(ApiError::new(ErrorCode::Refused, message).with_hint("make it as large as the disk"))
        }
        Some(_) | None => Ok(()),
    }
}

/// Makes the file, `length` long if that is not for others to say, durably; its inode, or 0 of a device.
fn make_file(image: &Path, length: Option<ByteCount>) -> io::Result<u64> {
    let file = OpenOptions::new().write(true).create(true).truncate(false).open(image)?;
    let found = file.metadata()?;
    // One that is a disk already may be so long, or be a device, which has the size it has.
    if let Some(length) = length.filter(|length| found.is_file() && found.len() != length.0) {
        file.set_len(length.0)?;
    }
    file.sync_all()?;
    if let Some(parent) = image.parent() {
        File::open(parent)?.sync_all()?;
    }
    Ok(if found.is_file() { found.ino() } else { 0 })
}

pub(super) fn qcow2_error(error: &Qcow2Error) -> ApiError {
    ApiError::from_error(ErrorCode::Failed, error)
}

pub(super) fn io_error(what: &str, error: &io::Error) -> ApiError {
    ApiError::new(ErrorCode::Failed, format!("cannot {what}: {error}"))
}
