//! Setting a disk back to a point of its own history.
//!
//! The disk is let go of as at a detach, a hydration file says which of its blocks are missing - those that
//! differ between the point and what it was - and it is attached again. Its first attach takes these blocks
//! for changed (`disk/incomplete.rs`), so they reach the receiver again as the newest content: everything up to
//! the rewind stays, and a rewind to there undoes it.
//!
//! A disk that still lacks blocks of another point is set back in the same way, and the new file takes the place of the
//! old one: what was missing is missing still, of the new point. Where the receiver does not have everything - blocks that
//! are damaged there keep a disk from ever being in sync - what it lacks is given up, if that is asked for.
//!
//! Invariant: the hydration file is the only thing that is changed. Whoever dies before it is there leaves the
//! disk as it was, whoever dies after it a disk that is set back. Who lives, and cannot attach it with that file, takes the file
//! back (`rewind/again.rs`): what failed does not happen later. The point that a disk lacks blocks of is kept at the
//! receiver until it lacks those of another one.

mod again;
mod plan;

use std::{sync::Arc, time::Duration};

use backtide_agent_api::{DiskStatus, Mode, RewindReport, RewindRequest};
use backtide_control::{ApiError, ErrorCode};
use backtide_hydration::{Header, Kind, Since, SourcePoint, lacking, may_be_set_back};
use backtide_io_filter::Resume;
use backtide_storage::KillPoint;
use backtide_tracking::{DirtyBitmap, SavedTracking};
use backtide_units::{BlockCount, DiskName, Epoch, Lsn};
use tokio::time::Instant;

use self::plan::{Goal, Plan};
pub(super) use self::plan::{RELEASE_TIME, refuse_damaged};
use super::{
    Registry,
    errors::{failed, refuse_taken_away},
    leave::end_unless_open,
    resize::missing_record,
    waiting,
};
use crate::{
    claims::Claim,
    disk::{self, DiskHandle, Leaving, awaited_text, trust},
    marks,
    record::{DiskRecord, ImageStamp, Records},
};

/// How long the receiver may take to have everything, and how often it is looked at.
const SETTLE_TIME: Duration = Duration::from_secs(10);
const SETTLE_POLL: Duration = Duration::from_millis(10);

/// The label of the moment before: a rewind to it undoes the last one.
const MARK: &str = "before-rewind";

/// What a disk is before it is set back.
struct Standing {
    status: DiskStatus,
    /// Whether the receiver has everything of it.
    settled: bool,
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
        let record = self.records.load_aside(&name).await.map_err(|error| failed(&error))?;
        let record = record.ok_or_else(|| missing_record(&name))?;
        let takes_blocks = self.disks.read().await.get(&name).is_some_and(|attached| attached.takes_blocks);
        if !takes_blocks {
            return Err(too_coarse(&format!("disk {name}")));
        }
        let image = record.image.clone();
        let stamp = waiting(move || refuse_unfit(&image)).await??;
        let now = handle.status().await.map_err(|error| failed(&error))?;
        if let Some(report) = RewindReport::under_way(&now, request.to).filter(|_| !request.force) {
            return Ok(report);
        }
        let Standing { status, settled } = standing(&handle, request).await?;
        let history = status.history.ok_or_else(|| not_in_sync(&status))?;
        if request.to >= status.lsn.last {
            let message =
                format!("disk {name} is at LSN {}: LSN {} is no point before", status.lsn.last, request.to);
            return Err(ApiError::new(ErrorCode::Usage, message));
        }
        // Whatever the receiver has above the point, and what the image lacks already.
        let since = match settled && status.hydration.is_none() {
            true => Since::Lsn(status.lsn.last),
            false => Since::Everything,
        };
        let keeper = plan::keeper(&record, status.hydration.is_some());
        let (to, force, epoch) = (request.to, request.force, record.epoch);
        let goal = Goal { history, to, force, keeper, epoch };
        let plan = self.plan(&record, &goal, since, None).await?;
        let held = plan.source.clone();
        let mut lacks = false;
        let set_back = match self.require_room(&name, Some(&plan.changed)).await {
            Ok(()) => {
                // So that whoever looks at the timeline finds what was left; the rewind goes on without it.
                if let Err(error) = marks::mark(MARK, &[(name.clone(), handle.clone())]).await {
                    tracing::warn!(disk = %name, %error, "the moment before the rewind is not marked");
                }
                self.exchange(&claim, &name, request, &goal, plan, stamp, &mut lacks).await
            }
            Err(full) => Err(full),
        };
        self.settle_hold(&record, held, goal.keeper, lacks).await;
        let SetBack { from, source, changed, blocked, hung_up, disk } = set_back?;
        tracing::info!(disk = %name, %from, to = %source.lsn, changed_blocks = %changed, ?blocked, "the disk is set back");
        Ok(RewindReport {
            from,
            to: source.lsn,
            to_time: source.time,
            changed_blocks: changed,
            changed_bytes: changed.bytes(),
            blocked_ms: u64::try_from(blocked.as_millis()).unwrap_or(u64::MAX),
            hung_up,
            under_way: false,
            disk,
        })
    }

    /// Lets go of the disk, sets it back, and has it again; `lacks`, also of one that cannot be attached then, whether it
    /// lacks blocks of the point.
    #[expect(clippy::too_many_arguments, reason = "all of it is the one rewind")]
    async fn exchange(
        self: &Arc<Self>,
        claim: &Claim,
        name: &DiskName,
        request: RewindRequest,
        goal: &Goal,
        plan: Plan,
        stamp: Option<ImageStamp>,
        lacks: &mut bool,
    ) -> Result<SetBack, ApiError> {
        let (_, handle) = self.find(name).await?;
        // Clients may have come meanwhile.
        let Standing { status, .. } = standing(&handle, request).await?;
        self.require_in_place(name).await?;
        let record = self.records.load_aside(name).await.map_err(|error| failed(&error))?;
        let record = record.ok_or_else(|| missing_record(name))?;
        let began = Instant::now();
        // For whoever asks meanwhile.
        let shown = disk::not_attached(&record, "it is being set back to an earlier point");
        let attached = self.disks.write().await.remove(name);
        let attached = attached.ok_or_else(|| missing_record(name))?;
        self.failing.write().await.insert(name.clone(), shown);
        let leaving = Leaving::SetBack { clients_max: request.hangs_up_on() };
        let ended = end_unless_open(name.clone(), attached, self.records.clone(), leaving).await;
        if let Some((attached, open)) = ended {
            // Somebody has come meanwhile.
            self.keep_attached(name, attached).await;
            let message =
                format!("disk {name} is in use: {open}, and would see another content under its feet");
            // A guest that is paused for it may go on: this will not happen later.
            let code = if request.reconnect { ErrorCode::Refused } else { ErrorCode::Busy };
            return Err(ApiError::new(code, message)
                .with_hint("shut the virtual machine down first, or take the disk out of it"));
        }
        KillPoint::RewindDetached.reached();
        let set_back = self.set_back(name, goal, plan, stamp).await;
        let (made, disk) = self.has_again(claim, name, set_back, lacks).await?;
        let Made { from, source, changed, .. } = made;
        let (blocked, hung_up) = (began.elapsed(), status.clients);
        Ok(SetBack { from, source, changed, blocked, hung_up, disk })
    }

    /// Nobody has the disk now: says which blocks are missing, if it was left as it has to be.
    async fn set_back(
        &self,
        name: &DiskName,
        goal: &Goal,
        plan: Plan,
        stamp: Option<ImageStamp>,
    ) -> Result<Made, ApiError> {
        let (records, disk, force, epoch) = (self.records.clone(), name.clone(), goal.force, goal.epoch);
        let (record, saved, as_it_was) = waiting(move || {
            let record = records.load(&disk).map_err(|error| failed(&error))?;
            let record = record.ok_or_else(|| missing_record(&disk))?;
            refuse_taken(&record, epoch)?;
            let saved = as_left(&record, records.load_tracking(&disk), force);
            let saved = saved.ok_or_else(|| {
                let message = format!("disk {disk} was not let go of in sync: it is as it was");
                ApiError::new(ErrorCode::Busy, message).with_hint("try again when it is in sync")
            })?;
            let lacked = records.open_hydration(&disk, trust::boot_id()).map_err(|error| failed(&error))?;
            // One that says less than is known cannot be put back as it was.
            let as_it_was =
                lacked.as_ref().map(|file| (file.header().clone(), file.missing(), file.is_settled()));
            Ok::<_, ApiError>((record, saved, as_it_was))
        })
        .await??;
        // Whatever a client has changed at the last moment is among it, or the receiver has got meanwhile.
        let plan = match Since::of(&saved, as_it_was.is_some()) {
            since @ Since::Lsn(_) if since == plan.since => plan,
            since => self.plan(&record, goal, since, Some(&saved)).await?,
        };
        let Plan { source, changed, .. } = plan;
        let lacked = as_it_was.as_ref().map(|(_, missing, _)| missing);
        let changed = lacking(changed, &saved, lacked, record.size);
        let (blocks, from) = (changed.count(), saved.last_lsn);
        if changed.is_empty() {
            return Ok(Made { from, source, changed: blocks, noted: None });
        }
        let header = Header {
            disk: record.uuid,
            kind: Kind::Rewind,
            boot: trust::boot_id(),
            epoch: record.epoch,
            inode: stamp.map_or(0, |stamp| stamp.inode),
            before: saved.last_lsn,
            total: blocks,
            compare: false,
            source: source.clone(),
        };
        let records = self.records.clone();
        let noted = move || {
            let reserved =
                disk::reserve_note(&record, &header).map_err(|error| no_note(&record.image, &error))?;
            have_hydration(&records, &record.name, header.clone(), changed).map_err(|error| {
                let message = format!("cannot remember what disk {} lacks: {error}", record.name);
                ApiError::new(ErrorCode::Failed, message)
            })?;
            Ok::<_, ApiError>(Noted { record, header, as_it_was, _reserved: reserved })
        };
        let noted = waiting(noted).await??;
        KillPoint::HydrationMade.reached();
        Ok(Made { from, source, changed: blocks, noted: Some(noted) })
    }
}

/// What is missing from now on, of a disk that nobody has.
struct Made {
    from: Lsn,
    source: SourcePoint,
    changed: BlockCount,
    /// None where nothing is.
    noted: Option<Noted>,
}

/// What says so, and how the disk was before.
struct Noted {
    record: DiskRecord,
    header: Header,
    /// What it lacked already, and whether that file said all there was to say.
    as_it_was: Option<(Header, DirtyBitmap, bool)>,
    /// Until the disk is attached.
    _reserved: disk::ReservedNote,
}

/// A disk that was set back, and is there again.
struct SetBack {
    from: Lsn,
    source: SourcePoint,
    changed: BlockCount,
    blocked: Duration,
    hung_up: u32,
    disk: DiskStatus,
}

/// The image as it is, if that can be told; refuses one beside which no note can say that it lacks blocks, where there is a
/// place for one.
pub(super) fn refuse_unfit(image: &str) -> Result<Option<ImageStamp>, ApiError> {
    let Some(path) = disk::path_of(image) else { return Ok(None) };
    disk::try_note(&path).map_err(|error| no_note(image, &error))?;
    Ok(ImageStamp::of(&path))
}

fn no_note(image: &str, error: &std::io::Error) -> ApiError {
    let message =
        format!("cannot write beside {image}, where the agent says that an image is incomplete: {error}");
    ApiError::new(ErrorCode::Refused, message).with_hint("make room there, or have it written to again")
}

/// What only takes whole requests of more than a block cannot be brought block by block.
pub(super) fn too_coarse(what: &str) -> ApiError {
    let message = format!("the NBD server behind {what} takes no requests as small as 4096 bytes");
    ApiError::new(ErrorCode::Refused, message).with_hint("restore the point into a new image instead")
}

/// From when this has succeeded the disk lacks `missing`. A file that failed after it got its name counts: the next attach
/// sees that it is durable, or is none.
pub(super) fn have_hydration(
    records: &Records,
    disk: &DiskName,
    header: Header,
    missing: DirtyBitmap,
) -> Result<(), String> {
    let Err(error) = records.create_hydration(disk, header.clone(), missing) else { return Ok(()) };
    let there = records.open_hydration(disk, trust::boot_id());
    let is_it = there.is_ok_and(|there| there.is_some_and(|file| *file.header() == header));
    if !is_it {
        return Err(error.to_string());
    }
    tracing::warn!(%disk, %error, "what the disk lacks is noted, and not yet durably");
    Ok(())
}

/// Waits until the receiver has everything; refuses a disk that is in use or, without force, one of which it never will.
async fn standing(handle: &DiskHandle, request: RewindRequest) -> Result<Standing, ApiError> {
    let until = Instant::now() + SETTLE_TIME;
    loop {
        let status = handle.status().await.map_err(|error| failed(&error))?;
        refuse_taken_away(&status)?;
        let name = &status.name;
        if status.clients > 0 && !request.reconnect {
            let message =
                format!("disk {name} is in use: its guest would see another content under its feet");
            return Err(ApiError::new(ErrorCode::Busy, message)
                .with_hint("shut the virtual machine down first, or take the disk out of it"));
        }
        if status.awaited_clients > 0 && !request.reconnect {
            let who = awaited_text(status.awaited_clients);
            let message =
                format!("disk {name} is in use: {who}, and would see another content under its feet");
            return Err(ApiError::new(ErrorCode::Busy, message).with_hint(format!(
                "shut the virtual machine down first, or take the disk out of it; where nobody comes back, `backtide detach {name} --nobody-returns`, attach it again, then rewind"
            )));
        }
        let clients = status.clients.saturating_add(status.awaited_clients);
        if request.hangs_up_on().is_some_and(|max| clients > max) {
            let message = format!("disk {name} has {clients} clients, and one of them is not known of");
            return Err(ApiError::new(ErrorCode::Refused, message)
                .with_hint("see that the virtual machine, and nobody else, has the disk open"));
        }
        let in_sync = status.mode == Mode::Sync && status.dirty.blocks.0 == 0 && !status.resync_due;
        let durable = status.connected && status.lag.records == 0 && status.window.bytes.is_zero();
        if in_sync && durable && status.resync.is_none() {
            return Ok(Standing { status, settled: true });
        }
        if status.hydration.is_some() {
            if request.force {
                return Ok(Standing { status, settled: false });
            }
            let lacks = status.hydration.as_ref().is_some_and(|lacks| lacks.point == request.to);
            let message = match lacks {
                true => format!(
                    "disk {name} was set to LSN {} before, lacks blocks of it still, and may have been written to since: what was written stays, for not all of it has reached the receiver",
                    request.to
                ),
                false => format!("disk {name} lacks blocks of the point it was set to already"),
            };
            return Err(ApiError::new(ErrorCode::Busy, message).with_hint(format!(
                "`backtide status {name}` says how far it is; try again when it is in sync, or give up with --force what has not reached the receiver"
            )));
        }
        if !status.connected && Instant::now() >= until {
            let message = format!("disk {name} cannot be set back: {}", status.reason);
            return Err(
                ApiError::new(ErrorCode::Unreachable, message).with_hint("the receiver has the point")
            );
        }
        if in_sync && status.clients > 0 && Instant::now() >= until {
            let message = format!(
                "disk {name} is in sync, and its clients go on writing: there is no moment to go back from"
            );
            return Err(ApiError::new(ErrorCode::Busy, message).with_hint("pause or stop them first"));
        }
        if Instant::now() >= until || !in_sync {
            return Err(not_in_sync(&status));
        }
        tokio::time::sleep(SETTLE_POLL).await;
    }
}

fn not_in_sync(status: &DiskStatus) -> ApiError {
    let name = &status.name;
    // Of a disk in sync mode the reason says that every write is forwarded.
    let why = match (status.mode, &status.local_error) {
        (Mode::Sync, Some(trouble)) => trouble,
        (_, Some(trouble)) if status.reason_code == "written-past-agent" => trouble,
        (Mode::Sync, None) if status.resync_due => "what else differs is being found",
        (_, _) => &status.reason,
    };
    let message = format!("disk {name} is not in sync: {why}");
    if status.mode == Mode::Paused {
        return ApiError::new(ErrorCode::Refused, message)
            .with_hint(format!("`backtide resume {name}` first, then `backtide wait {name} --for sync`"));
    }
    ApiError::new(ErrorCode::Refused, message).with_hint(format!(
        "what the receiver lacks could not be gone back to: `backtide wait {name} --for sync` first"
    ))
}

/// Refuses a disk that another agent has taken since this began in `epoch`: the point is kept in the name of that.
fn refuse_taken(record: &DiskRecord, epoch: Epoch) -> Result<(), ApiError> {
    if record.epoch == epoch {
        return Ok(());
    }
    let message = format!("another agent has taken disk {} meanwhile: it is as it was", record.name);
    Err(ApiError::new(ErrorCode::Fenced, message))
}

/// What a clean detach has left, in sync unless `force`; none when there was none.
fn as_left(
    record: &DiskRecord,
    left: Result<Option<backtide_tracking::Loaded>, backtide_tracking::LoadError>,
    force: bool,
) -> Option<SavedTracking> {
    let stamp = record.stamp_now();
    match trust::resume(record, left, stamp.as_ref(), record.size) {
        Resume::Clean(saved) => Some(saved).filter(|saved| may_be_set_back(saved, force)),
        Resume::New | Resume::Lost { .. } | Resume::Crashed { .. } => None,
    }
}

#[cfg(test)]
mod tests;
