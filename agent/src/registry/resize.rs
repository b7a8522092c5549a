//! A disk that grows while it is attached.
//!
//! NBD tells a client the size once, when it connects. So a disk takes its new size over by a short
//! detach and attach inside the agent: it is let go of in good order, the receiver gets what it can,
//! and the attach finds a longer disk behind, whose new blocks are all that has to be looked at (see
//! [`crate::disk::trust`]). A QEMU with `reconnect-delay` connects again by itself and sends again what
//! was not answered.

use std::{
    fs::{File, OpenOptions},
    io::{ErrorKind, Seek},
    path::{Path, PathBuf},
    sync::Arc,
};

use backtide_agent_api::{DiskStatus, ImageFormat, ResizeReport, ResizeRequest};
use backtide_control::{ApiError, ErrorCode};
use backtide_tracking::DirtyBitmap;
use backtide_units::{ByteCount, DISK_SIZE_MAX, DiskName};

use super::{
    Attached, Registry,
    errors::{failed, refuse_taken_away},
    leave::end_unless_open,
    waiting,
};
use crate::{
    claims::{Claim, Standing},
    disk::{self, Leaving, awaited_text},
    qcow2::{self, format_of},
    record::{DiskRecord, ImageStamp},
};

/// The way out for who resizes a disk that is open.
const HANG_UP: &str =
    "resize it with --reconnect, which hangs up: QEMU with a reconnect-delay connects again by itself";

/// The unit disk sizes are multiples of.
const SECTOR_BYTES: u64 = 512;

/// What is behind a disk, as far as growing it is concerned.
enum Kind {
    /// Of this length now.
    RawFile(ByteCount),
    /// Of this length now.
    Device(ByteCount),
    /// Its size is known when its server has ended and serves again.
    Qcow2,
    /// Its size is known at the next connection.
    Nbd,
}

impl Registry {
    /// Takes over the size that the disk behind has grown to, after growing it where that was asked for.
    pub(crate) async fn resize(
        self: &Arc<Self>,
        name: &DiskName,
        request: ResizeRequest,
    ) -> Result<ResizeReport, ApiError> {
        let (name, _) = self.find(name).await?;
        let claim = self.claim(&name).await?;
        // It may have been detached while this waited.
        let (name, handle) = self.find(&name).await?;
        let record = self.records.load_aside(&name).await.map_err(|error| failed(&error))?;
        let record = record.ok_or_else(|| missing_record(&name))?;
        let status = handle.status().await.map_err(|error| failed(&error))?;
        refuse_taken_away(&status)?;
        if status.hydration.is_some() {
            let message =
                format!("disk {name} lacks blocks of the point it was set to: it cannot be resized now");
            return Err(
                ApiError::new(ErrorCode::Busy, message).with_hint("resize it when nothing is missing")
            );
        }
        let size_before = status.size;
        self.require_in_place(&name).await?;
        let image = record.image.clone();
        let format = record.format;
        let kind = waiting(move || kind_of(&image, format)).await??;
        let direct_block = self.disks.read().await.get(&name).and_then(|attached| attached.direct_block);
        let target = target(&name, &kind, request.size, size_before)?;
        if let Some(target) = target {
            whole_blocks(&name, target, direct_block)?;
        }
        if target == Some(size_before) {
            return Ok(ResizeReport { size_before, hung_up: 0, disk: status });
        }
        if (status.clients > 0 || status.awaited_clients > 0) && !request.reconnect {
            return Err(ApiError::new(ErrorCode::Busy, in_use(&status)).with_hint(HANG_UP));
        }
        self.require_room(&name, Some(&DirtyBitmap::new())).await?;
        if let (Kind::RawFile(_), Some(target)) = (&kind, target) {
            let image = record.image.clone();
            waiting(move || grow_file(Path::new(&image), target)).await??;
        }
        // For whoever asks meanwhile.
        let shown = disk::not_attached(&record, "it is being resized");
        self.failing.write().await.insert(name.clone(), shown);
        let attached = self.disks.write().await.remove(&name);
        let attached = attached.ok_or_else(|| missing_record(&name))?;
        let leaving = Leaving::Resized { reconnect: request.reconnect };
        let ended = end_unless_open(name.clone(), attached, self.records.clone(), leaving).await;
        if let Some((attached, open)) = ended {
            // Somebody has come meanwhile.
            self.keep_attached(&name, attached).await;
            let message = format!("disk {name} is in use: {open}");
            return Err(ApiError::new(ErrorCode::Busy, message).with_hint(HANG_UP));
        }
        let grown = match (&kind, target) {
            (Kind::Qcow2, Some(target)) => self.grow_qcow2(&name, target).await,
            _ => Ok(()),
        };
        let disk = self.attach_again(&claim, &name).await?;
        grown?;
        tracing::info!(disk = %name, before = %size_before, now = %disk.size, "the disk has another size");
        Ok(ResizeReport { size_before, hung_up: status.clients, disk })
    }

    /// Has a disk go on that was to be let go of and was not.
    pub(super) async fn keep_attached(&self, name: &DiskName, attached: Attached) {
        self.disks.write().await.insert(name.clone(), attached);
        self.failing.write().await.remove(name);
    }

    /// Has a disk again that was let go of and has its image still.
    pub(super) async fn attach_again(
        self: &Arc<Self>,
        claim: &Claim,
        name: &DiskName,
    ) -> Result<backtide_agent_api::DiskStatus, ApiError> {
        let record = match self.records.load_aside(name).await {
            Ok(Some(record)) => record,
            found => {
                self.leave_image(name).await;
                self.restore_beside();
                return Err(found.err().map_or_else(|| missing_record(name), |error| failed(&error)));
            }
        };
        match self.start(claim, record.clone(), Standing::Had).await {
            Ok(handle) => handle.status().await.map_err(|error| failed(&error)),
            Err(error) => {
                tracing::error!(disk = %name, error = %error.message, "cannot attach the disk again: will try again");
                let status = disk::not_attached(&record, &error.message);
                self.failing.write().await.insert(name.clone(), status);
                self.restore_beside();
                Err(error)
            }
        }
    }

    /// Nobody has the file now. What `qemu-img` writes there is no change of the disk's content.
    async fn grow_qcow2(&self, name: &DiskName, target: ByteCount) -> Result<(), ApiError> {
        let record = self.records.load_aside(name).await.map_err(|error| failed(&error))?;
        let record = record.ok_or_else(|| missing_record(name))?;
        let image = PathBuf::from(&record.image);
        let look = move || record.stamp_now().filter(|now| record.image_at_detach.as_ref() == Some(now));
        let as_left = waiting(look).await?;
        qcow2::grow(&image, target).await.map_err(|error| ApiError::from_error(ErrorCode::Failed, &error))?;
        let stamp = move |record: DiskRecord| {
            let is_it = |now: &ImageStamp| as_left.as_ref().is_some_and(|left| left.inode == now.inode);
            let image_at_detach = record.stamp_now().filter(is_it);
            Some(DiskRecord { image_at_detach, ..record })
        };
        self.records.change_aside(name, stamp).await.map_err(|error| failed(&error))
    }
}

pub(super) fn missing_record(name: &DiskName) -> ApiError {
    ApiError::new(ErrorCode::NotFound, format!("there is no record of disk {name}"))
}

fn in_use(disk: &DiskStatus) -> String {
    let name = &disk.name;
    let who = match disk.clients {
        0 => {
            let who = awaited_text(disk.awaited_clients);
            return format!("disk {name} is in use: {who}, and would find another size than it had");
        }
        1 => "an NBD client has".to_owned(),
        clients => format!("{clients} NBD clients have"),
    };
    format!("disk {name} is in use: {who} it open, and sees a new size only when it connects again")
}

fn kind_of(image: &str, format: Option<ImageFormat>) -> Result<Kind, ApiError> {
    let path = Path::new(image);
    if !path.is_absolute() {
        return Ok(Kind::Nbd);
    }
    if format_of(image, format) == Some(ImageFormat::Qcow2) {
        return Ok(Kind::Qcow2);
    }
    let length = || -> std::io::Result<Kind> {
        let mut file = File::open(path)?;
        // The end is the size of files and of block devices alike.
        let length = ByteCount(file.seek(std::io::SeekFrom::End(0))?);
        Ok(if file.metadata()?.is_file() { Kind::RawFile(length) } else { Kind::Device(length) })
    };
    length().map_err(|error| failed(&error))
}

/// The size to be reached; none where only the next connection tells.
fn target(
    name: &DiskName,
    kind: &Kind,
    wanted: Option<ByteCount>,
    before: ByteCount,
) -> Result<Option<ByteCount>, ApiError> {
    let target = match (kind, wanted) {
        (Kind::RawFile(found), wanted) => Some(wanted.unwrap_or(*found).max(*found)),
        (Kind::Device(found), None) => Some(*found),
        (Kind::Device(found), Some(wanted)) if wanted == *found => Some(wanted),
        (Kind::Device(found), Some(wanted)) => {
            let message = format!("the device behind disk {name} has {found} bytes, not {wanted}");
            return Err(
                ApiError::new(ErrorCode::Usage, message).with_hint("grow the device first, then resize")
            );
        }
        (Kind::Qcow2, Some(wanted)) => Some(wanted),
        (Kind::Qcow2, None) => {
            let message = format!("disk {name} is a qcow2 file, which only grows to a size that is named");
            return Err(ApiError::new(ErrorCode::Usage, message).with_hint("add --size"));
        }
        (Kind::Nbd, None) => None,
        (Kind::Nbd, Some(_)) => {
            let message =
                format!("disk {name} lies behind an NBD server, whose disk only the server can grow");
            return Err(ApiError::new(ErrorCode::Usage, message)
                .with_hint("grow it there, then resize without --size"));
        }
    };
    if let Some(larger) = wanted.into_iter().chain(target).max().filter(|size| *size > DISK_SIZE_MAX) {
        let message =
            format!("disk {name} cannot have {larger} bytes: a disk has {DISK_SIZE_MAX} at most (256 TiB)");
        return Err(ApiError::new(ErrorCode::Usage, message)
            .with_hint("attach another disk beside it, and let the guest join them (LVM, RAID 0)"));
    }
    let smallest = wanted.into_iter().chain(target).min();
    if let Some(smaller) = smallest.filter(|size| *size < before) {
        return Err(ApiError::new(
            ErrorCode::Refused,
            format!("disk {name} cannot shrink from {before} to {smaller} bytes"),
        )
        .with_hint("attach the smaller image under another name: it is a new disk"));
    }
    Ok(target)
}

/// Refuses a size that the disk could not be attached with again.
fn whole_blocks(name: &DiskName, target: ByteCount, direct_block: Option<u32>) -> Result<(), ApiError> {
    if !target.0.is_multiple_of(SECTOR_BYTES) {
        let message = format!("{target} bytes are no multiple of 512");
        return Err(ApiError::new(ErrorCode::Usage, message));
    }
    match direct_block.filter(|block| !target.0.is_multiple_of((*block).into())) {
        Some(block) => {
            let message =
                format!("{target} bytes are no multiple of the {block} that direct I/O to disk {name} needs");
            Err(ApiError::new(ErrorCode::Usage, message))
        }
        None => Ok(()),
    }
}

fn grow_file(image: &Path, target: ByteCount) -> Result<(), ApiError> {
    let grow = || {
        let file = OpenOptions::new().write(true).open(image)?;
        if file.metadata()?.len() < target.0 {
            file.set_len(target.0)?;
            file.sync_all()?;
        }
        Ok(())
    };
    grow().map_err(|error: std::io::Error| cannot_grow(image, target, &error))
}

fn cannot_grow(image: &Path, target: ByteCount, error: &std::io::Error) -> ApiError {
    match error.kind() {
        // The latter is longer than any file can be.
        ErrorKind::FileTooLarge | ErrorKind::InvalidInput => {
            let message = format!(
                "{target} bytes are more than the file system of {} lets a file have",
                image.display()
            );
            ApiError::new(ErrorCode::Usage, message).with_hint("nothing has changed: name a smaller size")
        }
        // The rest has no way out of its own.
        _ => {
            let message = format!("cannot grow {} to {target} bytes: {error}", image.display());
            ApiError::new(ErrorCode::Failed, message)
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_size_that_no_file_can_have_is_refused_and_the_file_stays() {
        let directory = tempfile::tempdir().unwrap();
        let image = directory.path().join("vm1.img");
        std::fs::write(&image, [0; 512]).unwrap();
        let error = grow_file(&image, ByteCount(u64::MAX - 511)).unwrap_err();
        assert_eq!(error.code, ErrorCode::Usage, "{error}");
        assert!(error.message.contains("more than the file system of "), "{error}");
        assert_eq!(std::fs::metadata(&image).unwrap().len(), 512);
    }

    #[test]
    fn no_disk_grows_beyond_what_a_log_can_name() {
        let name: DiskName = "vm1".parse().unwrap();
        let (before, most, more) = (ByteCount(1 << 20), DISK_SIZE_MAX, ByteCount(DISK_SIZE_MAX.0 + 512));
        let reached = |kind, wanted| target(&name, &kind, wanted, before);
        for kind in [Kind::RawFile(before), Kind::Qcow2] {
            assert_eq!(reached(kind, Some(most)), Ok(Some(most)));
        }
        // Also where nobody asked for so much: the image was grown by somebody else.
        for (kind, wanted) in [
            (Kind::RawFile(before), Some(more)),
            (Kind::RawFile(more), None),
            (Kind::RawFile(more), Some(before)),
            (Kind::Device(more), None),
            (Kind::Qcow2, Some(more)),
        ] {
            let error = reached(kind, wanted).unwrap_err();
            assert_eq!(error.code, ErrorCode::Usage, "{error}");
            let why =
                "disk vm1 cannot have 281474976711168 bytes: a disk has 281474976710656 at most (256 TiB)";
            assert_eq!(error.message, why);
        }
    }

    #[test]
    fn a_size_that_direct_io_cannot_serve_is_refused_before_anything_is_done() {
        let name: DiskName = "vm1".parse().unwrap();
        let said = |bytes, block| whole_blocks(&name, ByteCount(bytes), block).map_err(|error| error.message);
        let grown = (1 << 20) + 512;
        assert_eq!(said(grown, None), Ok(()));
        assert_eq!(said(grown, Some(512)), Ok(()));
        assert_eq!(said(1 << 20, Some(4096)), Ok(()));
        let why = "1049088 bytes are no multiple of the 4096 that direct I/O to disk vm1 needs";
        assert_eq!(said(grown, Some(4096)), Err(why.to_owned()));
        assert_eq!(said(1000, None), Err("1000 bytes are no multiple of 512".to_owned()));
    }
}
