//! A new disk that begins as a point of another one, whose content comes while it is used.
//!
//! Its image is made sparse, a hydration file says that all data of the point is missing, and it is attached as
//! any new disk: its first pass takes what is missing for allocated, so its own history is whole from the attach on.
//!
//! Invariants: nothing that may be somebody's is written, for the image is made here or has no byte; the record is
//! there before the hydration file, which names its disk, and that before the disk is attached. Whoever dies in
//! between leaves an empty image, and the same attach goes on from there.

use std::{
    cell::OnceCell,
    fs::{File, OpenOptions},
    io,
    os::unix::fs::MetadataExt,
    path::Path,
    rc::Rc,
    sync::Arc,
    time::Duration,
};

use backtide_agent_api::{AttachRequest, FromPoint, Origin};
use backtide_control::{ApiError, ErrorCode};
use backtide_hydration::{Header, Kind, SourcePoint};
use backtide_storage::KillPoint;
use backtide_tracking::DirtyBitmap;
use backtide_units::{BlockRange, ByteCount, Lsn};
use tokio::task::LocalSet;

use super::{
    Registry,
    errors::failed,
    rewind::{RELEASE_TIME, refuse_damaged},
    waiting,
};
use crate::{
    disk::{Dialer, hydrating::owner, source::FetchError, trust},
    record::{DiskRecord, Records},
};

/// How long the receiver may take to find the point and its data.
const FIND_TIME: Duration = Duration::from_secs(60);

/// The blocks of a file's metadata unit, in bytes.
const STAT_BLOCK: u64 = 512;

impl Registry {
    /// The record of a new disk that lacks everything of a point.
    pub(super) async fn begin_from(
        &self,
        mut record: DiskRecord,
        from: FromPoint,
    ) -> Result<DiskRecord, ApiError> {
        if record.history.is_some() || record.epoch.0 > 0 {
            let message = format!("disk {} is known here and has a history of its own", record.name);
            return Err(ApiError::new(ErrorCode::Exists, message).with_hint("choose another name"));
        }
        let image = record.image.clone();
        // Of an attempt that somebody ended.
        let begun = record.origin.is_some();
        waiting(move || refuse_used(&image, begun)).await??;
        let (source, missing) = self.data_of(&record, from).await?;
        record.origin = Some(Origin {
            receiver: source.receiver.clone(),
            disk: source.name.clone(),
            uuid: source.disk,
            lsn: source.lsn,
            time: source.time,
        });
        let (records, saved, held) = (self.records.clone(), record.clone(), source.clone());
        let begun = move || {
            records.save(&saved).map_err(|error| failed(&error))?;
            let inode = make_image(Path::new(&saved.image), source.size)
                .map_err(|error| io_error(&format!("make the image {}", saved.image), &error))?;
            if missing.is_empty() {
                return Ok(());
            }
            let header = Header {
                disk: saved.uuid,
                kind: Kind::Origin,
                boot: trust::boot_id(),
                epoch: saved.epoch,
                inode,
                before: Lsn::ZERO,
                total: missing.count(),
                source,
            };
            records
                .create_hydration(&saved.name, header, missing)
                .map_err(|error| io_error(&format!("remember what disk {} lacks", saved.name), &error))?;
            KillPoint::HydrationMade.reached();
            Ok::<_, ApiError>(())
        };
        if let Err(error) = waiting(begun).await? {
            let (records, name, uuid) = (self.records.clone(), record.name.clone(), record.uuid);
            let lacks = move || match records.open_hydration(&name, trust::boot_id()) {
                Ok(found) => found.is_some_and(|found| found.header().disk == uuid),
                Err(_) => true,
            };
            let lacks = waiting(lacks).await?;
            self.settle_hold(&record, held, owner(uuid, record.epoch), lacks).await;
            return Err(error);
        }
        Ok(record)
    }

    /// Finds the point at the receiver, has it kept, and finds out where it has data.
    async fn data_of(
        &self,
        record: &DiskRecord,
        from: FromPoint,
    ) -> Result<(SourcePoint, DirtyBitmap), ApiError> {
        let tls = record.stream_tls.clone().or_else(|| self.stream_tls.clone());
        let (receiver, keeper) = (record.receiver.clone(), owner(record.uuid, record.epoch));
        let (sources, runtime) = (Arc::clone(&self.sources), tokio::runtime::Handle::current());
        let looking = move || {
            let holding = OnceCell::new();
            // A source belongs to one thread.
            let local = LocalSet::new();
            let look = async {
                let source =
                    sources.find(Dialer::new(receiver, tls), from.disk, None, Some(from.lsn)).await?;
                if !from.force {
                    refuse_damaged(&*source, None).await?;
                }
                let mut missing = source.data().await?;
                missing.keep_only(BlockRange::whole_disk(source.point().size));
                if !missing.is_empty() {
                    let _ = holding.set(Rc::clone(&source));
                    source.hold(&keeper).await?;
                }
                Ok::<_, FetchError>((source.point().clone(), missing))
            };
            let looked = async {
                let looked = tokio::time::timeout(FIND_TIME, look).await;
                // Nothing comes of the point then.
                if let (Some(source), false) = (holding.get(), matches!(looked, Ok(Ok(_)))) {
                    let _ = tokio::time::timeout(RELEASE_TIME, source.release(&keeper)).await;
                }
                looked
            };
            runtime.block_on(local.run_until(looked))
        };
        let silent = |_| FetchError::Unreachable("the receiver does not answer".to_owned());
        let found = waiting(looking).await?.unwrap_or_else(|late| Err(silent(late)));
        found.map_err(|error| {
            let what = format!("disk {} cannot begin at LSN {} of {}", record.name, from.lsn, from.disk);
            let damaged = matches!(error, FetchError::Damaged(_));
            let error = fetch_error(&what, error);
            match damaged {
                true => error.with_hint(
                    "choose a point before the damage; with --force its blocks cannot be read until they are written",
                ),
                false => error,
            }
        })
    }
}

/// What an attach goes on with that does not begin as a point itself: nothing of one that was to and was cut off before its
/// image lacked anything. Blocks.
pub(super) fn begun(
    records: &Records,
    request: &AttachRequest,
    known: Option<DiskRecord>,
) -> Result<Option<DiskRecord>, ApiError> {
    let Some(record) = known else { return Ok(None) };
    let never_attached = record.epoch.0 == 0 && record.history.is_none();
    if record.origin.is_none() || request.from.is_some() || !never_attached {
        return Ok(Some(record));
    }
    let left = records.open_hydration(&record.name, trust::boot_id());
    if left.is_ok_and(|left| left.is_some_and(|left| left.header().disk == record.uuid)) {
        return Ok(Some(record));
    }
    let found = Path::new(&request.image).metadata();
    if record.image == request.image && found.is_ok_and(|found| found.is_file() && found.blocks() == 0) {
        let name = &record.name;
        let message = format!(
            "disk {name} was to begin as a point of another one, and that was cut off: {} is empty",
            record.image
        );
        return Err(ApiError::new(ErrorCode::Refused, message).with_hint(
            "give --from again, or remove the image to begin a disk of your own under this name",
        ));
    }
    tracing::warn!(disk = %record.name, "the disk never became the point it was to begin as: it begins anew");
    Ok(None)
}

/// Why a point cannot be had, in the control API's words.
pub(crate) fn fetch_error(what: &str, error: FetchError) -> ApiError {
    let message = format!("{what}: {error}");
    match error {
        FetchError::Unreachable(_) => ApiError::new(ErrorCode::Unreachable, message),
        FetchError::Damaged(_) => ApiError::new(ErrorCode::Damaged, message),
        FetchError::Refused(_) => ApiError::new(ErrorCode::Refused, message),
    }
}

pub(super) fn io_error(what: &str, error: &io::Error) -> ApiError {
    ApiError::new(ErrorCode::Failed, format!("cannot {what}: {error}"))
}

/// Refuses an image that has a byte, or could be somebody's disk; `begun` when it was made for this one already.
pub(super) fn refuse_used(image: &str, begun: bool) -> Result<(), ApiError> {
    let path = Path::new(image);
    if !path.is_absolute() {
        let message = format!("{image} is no raw file, and only that can begin as a point of another disk");
        return Err(ApiError::new(ErrorCode::Usage, message));
    }
    let found = match path.metadata() {
        Err(error) if error.kind() == io::ErrorKind::NotFound && !path.is_symlink() => return Ok(()),
        Err(error) => return Err(io_error(&format!("look at {image}"), &error)),
        Ok(found) => found,
    };
    if !found.is_file() {
        let message = format!("{image} is no file: only a new raw file can begin as a point of another disk");
        return Err(ApiError::new(ErrorCode::Refused, message)
            .with_hint("`backtide restore` writes a point to a device"));
    }
    let empty = found.len() == 0 || (begun && found.blocks() * STAT_BLOCK == 0);
    if empty {
        return Ok(());
    }
    let message = format!("{image} exists and is not empty");
    Err(ApiError::new(ErrorCode::Exists, message).with_hint("name a new file, or remove that one first"))
}

/// Makes the image, where it has nothing yet a hole, durably; its inode, or 0 of a device.
pub(super) fn make_image(image: &Path, size: ByteCount) -> io::Result<u64> {
    let file = OpenOptions::new().write(true).create(true).truncate(false).open(image)?;
    let found = file.metadata()?;
    // One that is a disk already may be so long, or be a device, which has the size it has.
    if found.is_file() && found.len() != size.0 {
        file.set_len(size.0)?;
    }
    file.sync_all()?;
    if let Some(parent) = image.parent() {
        File::open(parent)?.sync_all()?;
    }
    Ok(if found.is_file() { found.ino() } else { 0 })
}
