//! A disk whose host is gone goes on here: the same disk and the same history, at its latest point.
//!
//! The receiver is told of a higher epoch first. From then on whoever had the disk is fenced, and its history stands
//! still; so its latest point is the last, and a sparse image that lacks all data of it is the disk. The tracking file
//! says that it is in sync, but for what the receiver has of a pass that never ended.
//!
//! Invariant: the record is written last. Whoever dies before leaves an empty image and a hydration file of a disk
//! that no record knows, which nothing takes for a disk; a failover begins anew then, with a higher epoch. A failback
//! (`failback.rs`) ends in the same way, with an image that has most of it.

use std::{path::Path, sync::Arc, time::Duration};

use backtide_agent_api::Adopted;
use backtide_control::{ApiError, ErrorCode};
use backtide_hydration::{Header, Kind, SourcePoint};
use backtide_protocol::{Hello, PROTOCOL_VERSION, ReceiverState, Tracking, Welcome};
use backtide_storage::KillPoint;
use backtide_tracking::{DirtyBitmap, SavedTracking, Snapshot};
use backtide_units::{BlockRange, Lsn, Reason};
use tokio::task::LocalSet;
use uuid::Uuid;

use super::{
    Registry,
    errors::failed,
    failback::LeftBehind,
    origin::{fetch_error, io_error, make_image, refuse_used},
    waiting,
};
use crate::{
    disk::{self, Dialer, claim, hydrating::owner, source::FetchError, trust},
    record::{DiskRecord, ImageStamp, Records},
};

/// How long the receiver may take for all of it.
const TAKE_OVER_TIME: Duration = Duration::from_secs(120);

/// A disk that was taken over at its receiver.
pub(super) struct TakenOver {
    pub(super) welcome: Welcome,
    pub(super) source: SourcePoint,
    /// What the image lacks of the point.
    pub(super) missing: DirtyBitmap,
    /// Where the receiver has something newer that is no point.
    newer: DirtyBitmap,
}

impl Registry {
    /// The record of a disk that goes on here: `record` is what its receiver knows of it.
    pub(super) async fn begin_failover(
        &self,
        record: DiskRecord,
        adopted: Adopted,
    ) -> Result<DiskRecord, ApiError> {
        let (records, image) = (self.records.clone(), record.image.clone());
        let (name, uuid) = (record.name.clone(), record.uuid);
        let begun = move || {
            let left = records.open_hydration(&name, trust::boot_id());
            // Of an attempt that somebody ended.
            let begun = left.is_ok_and(|left| left.is_some_and(|left| left.header().disk == uuid));
            refuse_used(&image, begun)
        };
        waiting(begun).await??;
        let record = DiskRecord { epoch: adopted.epoch.taken_over(), ..record };
        let taken = self.take_over(&record, adopted, None).await?;
        self.begin_taken(record, taken).await
    }

    /// Makes the image, says what it lacks, and saves the record of a disk that was taken over.
    pub(super) async fn begin_taken(
        &self,
        record: DiskRecord,
        taken: TakenOver,
    ) -> Result<DiskRecord, ApiError> {
        let (records, source, held) = (self.records.clone(), taken.source.clone(), record.clone());
        let begun = waiting(move || begin(&records, record, taken)).await?;
        if begun.is_err() {
            let keeper = owner(held.uuid);
            self.settle_hold(&held, source, keeper, false).await;
        }
        begun
    }

    /// Claims the disk at its receiver, and finds out what it was then. `left`: the image it had here.
    pub(super) async fn take_over(
        &self,
        record: &DiskRecord,
        adopted: Adopted,
        left: Option<LeftBehind>,
    ) -> Result<TakenOver, ApiError> {
        let tls = record.stream_tls.clone().or_else(|| self.stream_tls.clone());
        let (sources, runtime) = (Arc::clone(&self.sources), tokio::runtime::Handle::current());
        let known = record.clone();
        let taking = move || {
            let (uuid, history) = (known.uuid, Some(adopted.history));
            let dialer = || Dialer::new(known.receiver.clone(), tls.clone());
            // A source belongs to one thread.
            let local = LocalSet::new();
            let take = async {
                // Nobody is fenced for a disk that has no point.
                let before = sources.find(dialer(), uuid, history, None).await?.point().clone();
                if let Some(left) = &left {
                    left.fits(&before)?;
                }
                let hello = Hello {
                    version: PROTOCOL_VERSION,
                    disk: uuid,
                    name: known.name.clone(),
                    size: before.size,
                    epoch: known.epoch,
                    attach: Uuid::new_v4(),
                    history,
                    tracking: Tracking::Window { base: adopted.durable },
                    next_lsn: adopted.durable.next(),
                    acked_durable: adopted.durable,
                };
                let welcome = claim::claim(&dialer(), hello).await?;
                if welcome.state != ReceiverState::Known || welcome.durable < adopted.durable {
                    let why = "the receiver keeps another history than it has told".to_owned();
                    return Err(FetchError::Refused(why));
                }
                KillPoint::TakenOver.reached();
                // Whatever came until the claim is in it, and nothing follows.
                let source = sources.find(dialer(), uuid, history, None).await?;
                let all = BlockRange::whole_disk(source.point().size);
                let mut missing = match &left {
                    Some(left) => left.missing(&*source).await?.0,
                    None => source.data().await?,
                };
                let mut newer = source.changed(Lsn::MAX).await?;
                missing.keep_only(all);
                newer.keep_only(all);
                if !missing.is_empty() {
                    source.hold(&owner(uuid)).await?;
                }
                Ok::<_, FetchError>(TakenOver { welcome, source: source.point().clone(), missing, newer })
            };
            runtime.block_on(local.run_until(tokio::time::timeout(TAKE_OVER_TIME, take)))
        };
        let silent = || FetchError::Unreachable("the receiver does not answer".to_owned());
        let taken = waiting(taking).await?.unwrap_or_else(|_| Err(silent()));
        taken.map_err(|error| fetch_error(&format!("disk {} cannot go on here", record.name), error))
    }
}

/// In the order of the invariant. Blocks.
fn begin(records: &Records, mut record: DiskRecord, taken: TakenOver) -> Result<DiskRecord, ApiError> {
    let TakenOver { welcome, source, missing, newer } = taken;
    let whole = newer.is_empty() && !welcome.in_pass;
    let saved = SavedTracking {
        history: Some(welcome.history),
        last_lsn: welcome.highest,
        gap_from: welcome.durable,
        acked_durable: welcome.durable,
        acked_position: welcome.position,
        reason: (!whole).then_some(Reason::ResyncInterrupted),
        dirty: newer,
        ..SavedTracking::unknown(record.uuid)
    };
    if let Some(place) = records.spill() {
        // Of an earlier attach here, whose records the history has gone on without.
        place.discard(record.uuid).map_err(|why| ApiError::new(ErrorCode::Failed, why))?;
    }
    let image = Path::new(&record.image);
    let inode = make_image(image, source.size)
        .map_err(|error| io_error(&format!("make the image {}", record.image), &error))?;
    let stamp = ImageStamp::of(image);
    record.history = Some(welcome.history);
    record.lsn_bound = record.lsn_bound.max(welcome.highest);
    record.acked_durable = welcome.durable;
    record.last_time = record.last_time.max(welcome.last_time.unwrap_or_default());
    record.size = source.size;
    record.image_changed = false;
    // A device tells no time; nobody but this agent has it.
    record.stopped = stamp.is_none();
    record.image_at_detach = stamp;
    record.fenced = false;
    let name = record.name.clone();
    let lacks = |error| io_error(&format!("remember what disk {name} lacks"), &error);
    if !missing.is_empty() {
        let header = Header {
            disk: record.uuid,
            kind: Kind::Failover,
            boot: trust::boot_id(),
            epoch: record.epoch,
            inode,
            before: Lsn::ZERO,
            total: missing.count(),
            source,
        };
        records.create_hydration(&name, header, missing).map_err(lacks)?;
    }
    KillPoint::HydrationMade.reached();
    let snapshot = Snapshot::first(saved, true, false);
    let limits = disk::activity_limits(&record);
    records.create_tracking(&name, limits, record.size, &snapshot).map_err(lacks)?;
    records.save(&record).map_err(|error| failed(&error))?;
    Ok(record)
}
