//! Setting a disk back to a point of its own history.
//!
//! The disk is let go of as at a detach, a hydration file says which of its blocks are missing - those that
//! differ between the point and what it was - and it is attached again. Its first attach takes these blocks
//! for changed (`disk/incomplete.rs`), so they reach the receiver again as the newest content: everything up to
//! the rewind stays, and a rewind to there undoes it.
//!
//! Invariant: the hydration file is the only thing that is changed. Whoever dies before it is there leaves the
//! disk as it was, whoever dies after it a disk that is set back.

use std::{cell::OnceCell, path::Path, rc::Rc, sync::Arc, time::Duration};

use backtide_agent_api::{DiskStatus, ImageFormat, Mode, RewindReport, RewindRequest};
use backtide_control::{ApiError, ErrorCode};
use backtide_hydration::{Header, Kind, SourcePoint};
use backtide_io_filter::Resume;
use backtide_storage::KillPoint;
use backtide_tracking::{DirtyBitmap, SavedTracking};
use backtide_units::{BlockRange, DiskName, HistoryId, Lsn};
use tokio::{task::LocalSet, time::Instant};

use super::{Registry, errors::failed, leave::end, resize::missing_record, waiting};
use crate::{
    disk::{self, Dialer, DiskHandle, Leaving, hydrating::owner, source::FetchError, trust},
    marks,
    record::{DiskRecord, ImageStamp},
};

/// How long the receiver may take to have everything, and how often it is looked at.
const SETTLE_TIME: Duration = Duration::from_secs(10);
const SETTLE_POLL: Duration = Duration::from_millis(10);

/// How long the receiver may take to find the point, and what differs.
const FIND_TIME: Duration = Duration::from_secs(60);

/// The label of the moment before: a rewind to it undoes the last one.
const MARK: &str = "before-rewind";

/// What a rewind is going to do.
struct Plan {
    source: SourcePoint,
    /// What it was made for.
    since: Lsn,
    changed: DirtyBitmap,
}

impl Registry {
    /// Sets a disk back to an earlier point. It is served again at once; what it lacks of the point comes when it
    /// is touched, and in the background.
    pub(crate) async fn rewind(
        self: &Arc<Self>,
        name: &DiskName,
        request: RewindRequest,
    ) -> Result<RewindReport, ApiError> {
        let (name, _) = self.find(name).await?;
        let claim = self.claim(&name).await?;
        // It may have been detached while this waited.
        let (name, handle) = self.find(&name).await?;
        let record = self.records.load(&name).map_err(|error| failed(&error))?;
        let record = record.ok_or_else(|| missing_record(&name))?;
        let (image, format) = (record.image.clone(), record.format);
        let stamp = waiting(move || refuse_unfit(&image, format)).await??;
        let status = settled(&handle, request).await?;
        let history = status.history.ok_or_else(|| not_in_sync(&status))?;
        if request.to >= status.lsn.last {
            let message =
                format!("disk {name} is at LSN {}: LSN {} is no point before", status.lsn.last, request.to);
            return Err(ApiError::new(ErrorCode::Usage, message));
        }
        let plan = self.plan(&record, history, request.to, status.lsn.last).await?;
        // So that whoever looks at the timeline finds what was left; the rewind goes on without it.
        if let Err(error) = marks::mark(MARK, &[(name.clone(), handle.clone())]).await {
            tracing::warn!(disk = %name, %error, "the moment before the rewind is not marked");
        }
        // Clients may have come meanwhile.
        let status = match settled(&handle, request).await {
            Ok(status) => status,
            Err(error) => {
                self.release(&record, plan.source).await;
                return Err(error);
            }
        };
        let began = Instant::now();
        // For whoever asks meanwhile.
        let shown = disk::not_attached(&record, "it is being set back to an earlier point");
        self.failing.write().await.insert(name.clone(), shown);
        let attached = self.disks.write().await.remove(&name);
        let attached = attached.ok_or_else(|| missing_record(&name))?;
        end(name.clone(), attached, self.records.clone(), Leaving::Stopped).await;
        self.claims.leave_image(&name);
        KillPoint::RewindDetached.reached();
        let source = plan.source.clone();
        let set_back = self.set_back(&name, plan, stamp).await;
        if set_back.as_ref().map_or(true, |(_, _, changed)| changed.0 == 0) {
            self.release(&record, source).await;
        }
        let attached = self.attach_again(&claim, &name).await;
        let (from, source, changed_blocks) = set_back?;
        let disk = attached?;
        let blocked = began.elapsed();
        tracing::info!(disk = %name, %from, to = %source.lsn, %changed_blocks, ?blocked, "the disk is set back");
        Ok(RewindReport {
            from,
            to: source.lsn,
            to_time: source.time,
            changed_blocks,
            changed_bytes: changed_blocks.bytes(),
            blocked_ms: u64::try_from(blocked.as_millis()).unwrap_or(u64::MAX),
            hung_up: status.clients,
            disk,
        })
    }

    /// Nobody has the disk now: says which blocks are missing, if it was left as it has to be.
    async fn set_back(
        &self,
        name: &DiskName,
        plan: Plan,
        stamp: Option<ImageStamp>,
    ) -> Result<(Lsn, SourcePoint, backtide_units::BlockCount), ApiError> {
        let (records, disk) = (self.records.clone(), name.clone());
        let (record, saved) = waiting(move || {
            let record = records.load(&disk).map_err(|error| failed(&error))?;
            let record = record.ok_or_else(|| missing_record(&disk))?;
            let saved = as_left(&record, records.load_tracking(&disk));
            let saved = saved.ok_or_else(|| {
                let message = format!("disk {disk} was not let go of in sync: it is as it was");
                ApiError::new(ErrorCode::Busy, message).with_hint("try again when it is in sync")
            })?;
            Ok::<_, ApiError>((record, saved))
        })
        .await??;
        // Whatever a client has changed at the last moment is among it.
        let plan = match plan.since == saved.last_lsn {
            true => plan,
            false => self.plan(&record, plan.source.history, plan.source.lsn, saved.last_lsn).await?,
        };
        let Plan { source, mut changed, .. } = plan;
        changed.keep_only(BlockRange::whole_disk(record.size));
        let blocks = changed.count();
        let report = (saved.last_lsn, source.clone(), blocks);
        if changed.is_empty() {
            return Ok(report);
        }
        let header = Header {
            disk: record.uuid,
            kind: Kind::Rewind,
            boot: trust::boot_id(),
            epoch: record.epoch,
            inode: stamp.map_or(0, |stamp| stamp.inode),
            before: saved.last_lsn,
            total: blocks,
            source,
        };
        let (records, disk) = (self.records.clone(), name.clone());
        waiting(move || records.create_hydration(&disk, header, changed)).await?.map_err(|error| {
            let message = format!("cannot remember what disk {name} lacks: {error}");
            ApiError::new(ErrorCode::Failed, message)
        })?;
        KillPoint::HydrationMade.reached();
        Ok(report)
    }

    /// The receiver need not keep the point that nothing has come of.
    async fn release(&self, record: &DiskRecord, source: SourcePoint) {
        let tls = record.stream_tls.clone().or_else(|| self.stream_tls.clone());
        let (receiver, uuid) = (record.receiver.clone(), record.uuid);
        let (sources, runtime) = (Arc::clone(&self.sources), tokio::runtime::Handle::current());
        let releasing = move || {
            let source = sources.open(source, Dialer::new(receiver, tls));
            let owner = owner(uuid);
            let released = tokio::time::timeout(SETTLE_TIME, source.release(&owner));
            runtime.block_on(LocalSet::new().run_until(released))
        };
        match waiting(releasing).await {
            Ok(Ok(Ok(()))) => {}
            _ => {
                tracing::warn!(disk = %record.name, "the receiver was not told that the point is needed no more: release it there")
            }
        }
    }

    /// Finds the point at the receiver, has it kept, and finds out what differs from `since`.
    async fn plan(
        &self,
        record: &DiskRecord,
        history: HistoryId,
        to: Lsn,
        since: Lsn,
    ) -> Result<Plan, ApiError> {
        let tls = record.stream_tls.clone().or_else(|| self.stream_tls.clone());
        let (receiver, uuid, size) = (record.receiver.clone(), record.uuid, record.size);
        let (sources, runtime) = (Arc::clone(&self.sources), tokio::runtime::Handle::current());
        let planning = move || {
            // A source belongs to one thread.
            let local = LocalSet::new();
            let holding = OnceCell::new();
            let plan = async {
                let source = sources.find(Dialer::new(receiver, tls), uuid, Some(history), Some(to)).await?;
                let point = source.point().clone();
                if point.size != size {
                    let why = format!("the disk had {} bytes then and has {size} now", point.size);
                    return Err(FetchError::Refused(why));
                }
                let _ = holding.set(Rc::clone(&source));
                source.hold(&owner(uuid)).await?;
                let changed = source.changed(since).await?;
                Ok(Plan { source: point, since, changed })
            };
            let planned = async {
                let planned = tokio::time::timeout(FIND_TIME, plan).await;
                // Nothing comes of the point then.
                if !matches!(planned, Ok(Ok(_)))
                    && let Some(source) = holding.get()
                {
                    let _ = tokio::time::timeout(SETTLE_TIME, source.release(&owner(uuid))).await;
                }
                planned
            };
            runtime.block_on(local.run_until(planned))
        };
        let planned = waiting(planning).await?;
        planned.unwrap_or_else(|_| Err(FetchError::Unreachable(silent()))).map_err(|error| {
            let message = format!("disk {} cannot be set back to LSN {to}: {error}", record.name);
            match error {
                FetchError::Unreachable(_) => ApiError::new(ErrorCode::Unreachable, message),
                FetchError::Damaged(_) => ApiError::new(ErrorCode::Damaged, message),
                FetchError::Refused(_) => ApiError::new(ErrorCode::Refused, message),
            }
        })
    }
}

fn silent() -> String {
    format!("the receiver has not answered for {} s", FIND_TIME.as_secs())
}

/// The image as it is; refuses what cannot lack blocks.
fn refuse_unfit(image: &str, format: Option<ImageFormat>) -> Result<Option<ImageStamp>, ApiError> {
    let path = Path::new(image);
    if crate::qcow2::format_of(image, format) != Some(ImageFormat::Raw) {
        let message = format!("{image} is neither a raw file nor a block device: only these can be set back");
        return Err(ApiError::new(ErrorCode::Refused, message)
            .with_hint("restore the point into a new image instead"));
    }
    disk::try_note(path).map_err(|error| {
        let message =
            format!("cannot write beside {image}, where the agent says that an image is incomplete: {error}");
        ApiError::new(ErrorCode::Failed, message)
    })?;
    Ok(ImageStamp::of(path))
}

/// Waits until the receiver has everything; refuses a disk that is in use, or not in sync.
async fn settled(handle: &DiskHandle, request: RewindRequest) -> Result<DiskStatus, ApiError> {
    let until = Instant::now() + SETTLE_TIME;
    loop {
        let status = handle.status().await.map_err(|error| failed(&error))?;
        let name = &status.name;
        if status.hydration.is_some() {
            let message = format!("disk {name} lacks blocks of the point it was set to already");
            return Err(ApiError::new(ErrorCode::Busy, message).with_hint(format!(
                "`backtide status {name}` says how far it is; try again when nothing is missing"
            )));
        }
        if status.clients > 0 && !request.reconnect {
            let message =
                format!("disk {name} is in use: its guest would see another content under its feet");
            return Err(ApiError::new(ErrorCode::Busy, message)
                .with_hint("shut the virtual machine down first, or take the disk out of it"));
        }
        let in_sync = status.mode == Mode::Sync && status.dirty.blocks.0 == 0;
        let durable = status.connected && status.lag.records == 0 && status.window.bytes.is_zero();
        if in_sync && durable && status.resync.is_none() {
            return Ok(status);
        }
        if !status.connected && Instant::now() >= until {
            let message = format!("disk {name} cannot be set back: {}", status.reason);
            return Err(
                ApiError::new(ErrorCode::Unreachable, message).with_hint("the receiver has the point")
            );
        }
        if Instant::now() >= until || !in_sync {
            return Err(not_in_sync(&status));
        }
        tokio::time::sleep(SETTLE_POLL).await;
    }
}

fn not_in_sync(status: &DiskStatus) -> ApiError {
    let name = &status.name;
    let message = format!("disk {name} is not in sync: {}", status.reason);
    ApiError::new(ErrorCode::Refused, message).with_hint(format!(
        "what the receiver lacks could not be gone back to: `backtide wait {name} --for sync` first"
    ))
}

/// What a clean detach in sync has left; none when there was none.
fn as_left(
    record: &DiskRecord,
    left: Result<Option<backtide_tracking::Loaded>, backtide_tracking::LoadError>,
) -> Option<SavedTracking> {
    let stamp = ImageStamp::of(Path::new(&record.image));
    match trust::resume(record, left, stamp.as_ref(), record.size) {
        Resume::Clean(saved) => Some(saved).filter(|saved| {
            let nothing = saved.dirty.is_empty() && saved.zeroes.is_empty() && saved.spilled_to.is_none();
            nothing && saved.reason.is_none()
        }),
        Resume::New | Resume::Lost { .. } | Resume::Crashed { .. } => None,
    }
}
