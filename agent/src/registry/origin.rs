//! A new disk that begins as a point of another one, whose content comes while it is used.
//!
//! Its image is made sparse (`image.rs`), a hydration file says that all data of the point is missing, and it is attached as
//! any new disk: its first pass takes what is missing for allocated, so its own history is whole from the attach on.
//!
//! Invariant: the record is there before the image, and both before the hydration file, which names its disk, and that before
//! the disk is attached. Whoever dies in between leaves an empty image, and the same attach goes on from there.

use std::{cell::OnceCell, os::unix::fs::MetadataExt, path::Path, rc::Rc, sync::Arc, time::Duration};

use backtide_agent_api::{AttachRequest, FromPoint, ImageFormat, Origin};
use backtide_control::{ApiError, ErrorCode};
use backtide_hydration::{Header, Kind, SourcePoint};
use backtide_storage::KillPoint;
use backtide_tracking::DirtyBitmap;
use backtide_units::{BlockRange, Lsn};
use tokio::task::LocalSet;

use super::{
    Registry,
    errors::failed,
    image::{self, Before, io_error},
    rewind::{RELEASE_TIME, refuse_damaged},
    waiting,
};
use crate::{
    disk::{Dialer, hydrating::owner, source::FetchError, trust},
    record::{DiskRecord, Records},
};

/// How long the receiver may take to find the point and its data.
const FIND_TIME: Duration = Duration::from_secs(60);

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
        // Of an attempt that somebody ended.
        let begun = record.origin.is_some();
        record.format = image::find_format(&record).await?;
        let before = image::refuse_used(&record.image, record.format, begun).await?;
        let (source, missing) = self.data_of(&record, from).await?;
        record.origin = Some(Origin {
            receiver: source.receiver.clone(),
            disk: source.name.clone(),
            uuid: source.disk,
            lsn: source.lsn,
            time: source.time,
        });
        let held = source.clone();
        if let Err(error) = self.make_from(&record, source, missing, before).await {
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

    /// Makes the image, in the order of the invariant. `before`: what was found there.
    async fn make_from(
        &self,
        record: &DiskRecord,
        source: SourcePoint,
        missing: DirtyBitmap,
        before: Before,
    ) -> Result<(), ApiError> {
        image::refuse_other_size(&record.image, source.size, before)?;
        let (records, saved) = (self.records.clone(), record.clone());
        waiting(move || records.save(&saved)).await?.map_err(|error| failed(&error))?;
        let inode = image::make(&record.image, record.format, source.size, before).await?;
        if missing.is_empty() {
            return Ok(());
        }
        let header = Header {
            disk: record.uuid,
            kind: Kind::Origin,
            boot: trust::boot_id(),
            epoch: record.epoch,
            inode,
            before: Lsn::ZERO,
            total: missing.count(),
            compare: false,
            source,
        };
        let (records, name) = (self.records.clone(), record.name.clone());
        let noted = waiting(move || records.create_hydration(&name, header, missing)).await?;
        noted.map_err(|error| io_error(&format!("remember what disk {} lacks", record.name), &error))?;
        KillPoint::HydrationMade.reached();
        Ok(())
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
    let is_empty = match record.format {
        Some(ImageFormat::Raw) => {
            let found = Path::new(&request.image).metadata();
            found.is_ok_and(|found| found.is_file() && found.blocks() == 0)
        }
        // Nothing tells so cheaply whether somebody has filled it since.
        Some(ImageFormat::Qcow2) => Path::new(&request.image).exists(),
        None => true,
    };
    if record.image == request.image && is_empty {
        let name = &record.name;
        let message = format!(
            "disk {name} was to begin as a point of another one, and that was cut off: {} is empty",
            record.image
        );
        return Err(ApiError::new(ErrorCode::Refused, message).with_hint(
            "give --from again, or remove the image to begin a disk of your own; another name is another disk",
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

#[cfg(test)]
mod tests;
