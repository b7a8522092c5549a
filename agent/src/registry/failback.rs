//! Back at the first host: a disk goes on there that another agent has had since, with the image it had, of which only
//! what differs is fetched.
//!
//! What the image holds is what the receiver had when the disk was taken over, but for the blocks that the saved
//! tracking says may differ: changes that never arrived, and whatever a guest wrote here afterwards. The receiver knows
//! which blocks got versions since. Both together are missing then, and the rest is trusted as an attach after a crash
//! trusts it (`disk/trust.rs`). Where one of the two is not known, everything is missing that the point or the image has.
//!
//! Invariants: from before it is looked at until the record says that the disk is here nobody else can have the image, and one
//! that was written nevertheless is noticed; nothing is changed here before the receiver has the higher epoch, and the image not before there is a
//! hydration file. Whoever dies in between leaves the image with what it had, and a failback begins anew.

use std::{
    path::{Path, PathBuf},
    sync::Arc,
    time::Duration,
};

use backtide_agent_api::{Adopted, FailbackReport, FailbackRequest, HydrationKind};
use backtide_control::{ApiError, ErrorCode};
use backtide_hydration::SourcePoint;
use backtide_io_filter::Resume;
use backtide_storage::ImageFile;
use backtide_tracking::{DirtyBitmap, LoadError, Loaded};
use backtide_units::{BlockRange, ByteCount, ByteOffset, ByteRange, DiskName, Epoch, LogPosition, Lsn};
use tokio::task::LocalSet;

use super::{
    Registry,
    errors::{failed, open_error},
    origin::fetch_error,
    rewind::refuse_unfit,
    waiting,
};
use crate::{
    claims::Claim,
    disk::{
        self, Dialer, DiskHandle, OpenError,
        source::{FetchError, PointSource},
        trust,
    },
    record::{DiskRecord, ImageStamp, Records},
};

/// How long the receiver may take to tell what differs.
const FIND_TIME: Duration = Duration::from_secs(60);

/// An image that nobody else can have as long as this is there.
pub(super) struct HeldImage {
    path: PathBuf,
    /// As it was when it was looked at; none of a device.
    stamp: Option<ImageStamp>,
    file: ImageFile,
}

/// The image of a disk that another agent has had since, as it was left here.
pub(super) struct LeftBehind {
    pub(super) image: HeldImage,
    size: ByteCount,
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
    /// Has a disk go on here with the image it had, from its latest point on.
    pub(crate) async fn failback(
        self: &Arc<Self>,
        name: &DiskName,
        request: FailbackRequest,
    ) -> Result<FailbackReport, ApiError> {
        let claim = self.claim(name).await?;
        let record = self.records.load(name).map_err(|error| failed(&error))?;
        let record = record.ok_or_else(|| {
            let message = format!("this agent has never had disk {name}");
            let hint = format!("`backtide failover {name} NEW_IMAGE` has it go on here");
            ApiError::new(ErrorCode::NotFound, message).with_hint(hint)
        })?;
        if let Ok((_, handle)) = self.find(name).await {
            return here_already(&record, &handle, request.adopt).await;
        }
        refuse_own(&record, request.adopt)?;
        // Until it is known to be the disk's again, and from then on by the disk itself.
        self.take_image(name, &record.image).await?;
        let back = self.come_back(&claim, record, request).await;
        if !self.disks.read().await.contains_key(name) {
            self.claims.leave_image(name);
        }
        back
    }

    async fn come_back(
        self: &Arc<Self>,
        claim: &Claim,
        record: DiskRecord,
        request: FailbackRequest,
    ) -> Result<FailbackReport, ApiError> {
        let FailbackRequest { adopt, receiver, dry_run, force } = request;
        let name = record.name.clone();
        let receiver = receiver.unwrap_or_else(|| record.receiver.clone());
        disk::check_tls(&receiver, record.stream_tls.as_ref().or(self.stream_tls.as_ref()))?;
        let record = DiskRecord { receiver, ..record };
        let (records, left_by) = (self.records.clone(), record.clone());
        let left = waiting(move || left_behind(&records, &left_by, adopt, force)).await??;
        let (left, report) = self.plan_failback(&record, adopt, left).await?;
        if dry_run {
            return Ok(report);
        }
        // From when the record is saved on the disk is here, whoever dies.
        let epoch = adopt.epoch.taken_over();
        let record = DiskRecord { epoch, paused: false, attached: true, ..record };
        let taken = self.take_over(&record, adopt, Some(left)).await?;
        let (point, point_time) = (taken.source.lsn, taken.source.time);
        let fetched_bytes = taken.missing.count().bytes();
        let record = self.begin_taken(record, taken).await?;
        let handle = match self.start(claim, record, Duration::ZERO).await {
            Ok(handle) => handle,
            Err(error) => {
                self.forget_attached(&name).await;
                return Err(error);
            }
        };
        tracing::info!(disk = %name, %point, %fetched_bytes, "the disk is back, and fetches what differs");
        let disk = handle.status().await.map_err(|error| failed(&error))?;
        Ok(FailbackReport { point, point_time, fetched_bytes, disk: Some(disk), ..report })
    }

    /// What a failback would do, by what the receiver has now; nothing is changed there.
    async fn plan_failback(
        &self,
        record: &DiskRecord,
        adopt: Adopted,
        left: LeftBehind,
    ) -> Result<(LeftBehind, FailbackReport), ApiError> {
        let tls = record.stream_tls.clone().or_else(|| self.stream_tls.clone());
        let (receiver, uuid) = (record.receiver.clone(), record.uuid);
        let (sources, runtime) = (Arc::clone(&self.sources), tokio::runtime::Handle::current());
        let planning = move || {
            // A source belongs to one thread.
            let local = LocalSet::new();
            let plan = async {
                let dialer = Dialer::new(receiver, tls);
                let source = sources.find(dialer, uuid, Some(adopt.history), None).await?;
                left.fits(source.point())?;
                let (missing, why) = left.missing(&*source).await?;
                let report = left.report(source.point(), missing, why);
                Ok::<_, FetchError>((left, report))
            };
            runtime.block_on(local.run_until(tokio::time::timeout(FIND_TIME, plan)))
        };
        let silent = |_| Err(FetchError::Unreachable("the receiver does not answer".to_owned()));
        let planned = waiting(planning).await?.unwrap_or_else(silent);
        planned.map_err(|error| fetch_error(&format!("disk {} cannot go on here", record.name), error))
    }
}

/// Only what somebody else has had since is gone back to.
fn refuse_own(record: &DiskRecord, adopt: Adopted) -> Result<(), ApiError> {
    let name = &record.name;
    if record.uuid != adopt.uuid {
        let message = format!(
            "disk {name} of this agent is {}, and that of the receiver {}: they are two disks",
            record.uuid, adopt.uuid
        );
        return Err(ApiError::new(ErrorCode::Refused, message));
    }
    if adopt.epoch <= record.last_own_epoch() {
        let message = format!("no other agent has had disk {name} since this one");
        let hint = format!(
            "`backtide attach {name} {} --receiver {}` goes on with it",
            record.image, record.receiver
        );
        return Err(ApiError::new(ErrorCode::Refused, message).with_hint(hint));
    }
    Ok(())
}

/// The answer when the disk is attached: it may have come back already, by the same failback that was cut off from its answer.
async fn here_already(
    record: &DiskRecord,
    handle: &DiskHandle,
    adopt: Adopted,
) -> Result<FailbackReport, ApiError> {
    let name = &record.name;
    if record.fenced || record.history != Some(adopt.history) || adopt.epoch > record.epoch {
        let message = format!("disk {name} is attached here");
        let hint = format!(
            "shut its virtual machine down and `backtide detach {name}` first: --force takes it from another agent, never from this one"
        );
        return Err(ApiError::new(ErrorCode::Busy, message).with_hint(hint));
    }
    let disk = handle.status().await.map_err(|error| failed(&error))?;
    let brought = disk.hydration.as_ref().filter(|found| found.kind == HydrationKind::Failover);
    Ok(FailbackReport {
        point: brought.map_or(disk.lsn.last, |found| found.point),
        point_time: brought.map(|found| found.point_time).or(adopt.last_time).unwrap_or_default(),
        fetched_bytes: brought.map_or(ByteCount::ZERO, |found| found.total_bytes),
        kept_bytes: ByteCount::ZERO,
        lost_bytes: ByteCount::ZERO,
        everything_because: None,
        here_already: true,
        disk: Some(disk),
    })
}

/// What is here of a disk that was taken over. Blocks.
fn left_behind(
    records: &Records,
    record: &DiskRecord,
    adopt: Adopted,
    force: bool,
) -> Result<LeftBehind, ApiError> {
    refuse_unfit(&record.image, record.format)?;
    let path = Path::new(&record.image);
    let image = ImageFile::open(path).map_err(|error| open_error(&OpenError::Image(error)))?;
    let size = image.size();
    let image = HeldImage { stamp: ImageStamp::of(path), path: path.to_owned(), file: image };
    let left = records.load_tracking(&record.name);
    let other =
        another_image(record, left.as_ref().ok().and_then(Option::as_ref), image.stamp.as_ref(), size);
    if let Some(why) = other.as_ref().filter(|_| !force) {
        return Err(ApiError::new(ErrorCode::Refused, why.clone()).with_hint(format!(
            "bring back the image that disk {} had; with --force all of this one is overwritten with the disk",
            record.name
        )));
    }
    let whole = ByteRange::between(ByteOffset::ZERO, ByteOffset(size.0));
    let mut allocated = DirtyBitmap::new();
    for stretch in image.file.allocated(whole).map_err(|error| failed(&error))? {
        allocated.insert(BlockRange::touched_by(stretch));
    }
    let known = match other {
        Some(why) => Err(why),
        None if record.history != Some(adopt.history) => {
            Err("the receiver keeps another history of it than it did".to_owned())
        }
        None => known(records, record, left, image.stamp.as_ref(), size),
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
    let detached = record.image_at_detach.as_ref().map(|stamp| stamp.inode);
    let seen = left.and_then(|left| left.alive?.image).map(|seen| seen.inode);
    let was = detached.filter(|inode| *inode > 0).or(seen.filter(|inode| *inode > 0))?;
    let is = stamp.map_or(0, |stamp| stamp.inode);
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

impl HeldImage {
    /// Refuses an image that somebody has written, or replaced, since it was looked at: such a one need not know of the lock.
    pub(super) fn refuse_changed(&self) -> Result<(), ApiError> {
        if ImageStamp::of(&self.path) == self.stamp {
            return Ok(());
        }
        let message = format!("{} was changed while the disk was being taken back", self.path.display());
        let hint = "see who writes it, then try again: it was not touched";
        Err(ApiError::new(ErrorCode::Busy, message).with_hint(hint))
    }
}

impl LeftBehind {
    /// Whether the image can become the disk at this point; it may have grown since.
    pub(super) fn fits(&self, point: &SourcePoint) -> Result<(), FetchError> {
        if self.size == point.size || (self.image.stamp.is_some() && self.size < point.size) {
            return Ok(());
        }
        Err(FetchError::Refused(format!("the image has {} bytes, and the disk {}", self.size, point.size)))
    }

    /// What the image lacks of the point, and why that is everything, if so.
    pub(super) async fn missing(
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

    fn report(
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
