//! Back at the first host: a disk goes on there that another agent has had since, with the image it had, of which only
//! what differs is fetched.
//!
//! What the image holds is what the receiver had when the disk was taken over, but for the blocks that the saved
//! tracking says may differ: changes that never arrived, and whatever a guest wrote here afterwards. The receiver knows
//! which blocks got versions since. Both together are missing then, and the rest is trusted as an attach after a crash
//! trusts it (`disk/trust.rs`). Where one of the two is not known, everything is missing that the point or the image has.
//!
//! Invariant: nothing is changed here before the receiver has the higher epoch, and the image not before there is a
//! hydration file. Whoever dies in between leaves the image with what it had, and a failback begins anew.

use std::{path::Path, sync::Arc, time::Duration};

use backtide_agent_api::{Adopted, FailbackReport, FailbackRequest};
use backtide_control::{ApiError, ErrorCode};
use backtide_hydration::SourcePoint;
use backtide_io_filter::Resume;
use backtide_storage::ImageFile;
use backtide_tracking::DirtyBitmap;
use backtide_units::{BlockRange, ByteCount, ByteOffset, ByteRange, DiskName, Epoch, Lsn};
use tokio::task::LocalSet;

use super::{
    Registry,
    errors::{failed, open_error},
    origin::fetch_error,
    rewind::refuse_unfit,
    waiting,
};
use crate::{
    disk::{
        self, Dialer, OpenError,
        source::{FetchError, PointSource},
        trust,
    },
    record::{DiskRecord, ImageStamp, Records},
};

/// How long the receiver may take to tell what differs.
const FIND_TIME: Duration = Duration::from_secs(60);

/// The image of a disk that another agent has had since, as it was left here.
pub(super) struct LeftBehind {
    size: ByteCount,
    /// Whether it can be made longer.
    is_file: bool,
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
    /// What may have been changed here without the receiver.
    changed: DirtyBitmap,
    /// What the image lacked already.
    lacked: DirtyBitmap,
}

impl Registry {
    /// Has a disk go on here with the image it had, from its latest point on.
    pub(crate) async fn failback(
        self: &Arc<Self>,
        name: &DiskName,
        request: FailbackRequest,
    ) -> Result<FailbackReport, ApiError> {
        let FailbackRequest { adopt, receiver, dry_run } = request;
        let claim = self.claim(name).await?;
        if self.disks.read().await.contains_key(name) {
            let message = format!("disk {name} is attached here");
            let hint = format!(
                "shut its virtual machine down and `backtide detach {name}` first: --force takes it from another agent, never from this one"
            );
            return Err(ApiError::new(ErrorCode::Busy, message).with_hint(hint));
        }
        let record = self.records.load(name).map_err(|error| failed(&error))?;
        let record = record.ok_or_else(|| {
            let message = format!("this agent has never had disk {name}");
            let hint = format!("`backtide failover {name} NEW_IMAGE` has it go on here");
            ApiError::new(ErrorCode::NotFound, message).with_hint(hint)
        })?;
        refuse_own(&record, adopt)?;
        let receiver = receiver.unwrap_or_else(|| record.receiver.clone());
        disk::check_tls(&receiver, record.stream_tls.as_ref().or(self.stream_tls.as_ref()))?;
        let record = DiskRecord { receiver, ..record };
        let (records, left_by) = (self.records.clone(), record.clone());
        let left = waiting(move || left_behind(&records, &left_by, adopt)).await??;
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
        let handle = match self.start(&claim, record, Duration::ZERO).await {
            Ok(handle) => handle,
            Err(error) => {
                self.forget_attached(name).await;
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

/// What is here of a disk that was taken over. Blocks.
fn left_behind(records: &Records, record: &DiskRecord, adopt: Adopted) -> Result<LeftBehind, ApiError> {
    let stamp = refuse_unfit(&record.image, record.format)?;
    let path = Path::new(&record.image);
    // Locked as long as it is looked at.
    let image = ImageFile::open(path).map_err(|error| open_error(&OpenError::Image(error)))?;
    let size = image.size();
    let whole = ByteRange::between(ByteOffset::ZERO, ByteOffset(size.0));
    let mut allocated = DirtyBitmap::new();
    for stretch in image.allocated(whole).map_err(|error| failed(&error))? {
        allocated.insert(BlockRange::touched_by(stretch));
    }
    let known = match record.history == Some(adopt.history) {
        true => known(records, record, stamp.as_ref(), size),
        false => Err("the receiver keeps another history of it than it did".to_owned()),
    };
    Ok(LeftBehind { size, is_file: stamp.is_some(), allocated, known })
}

fn known(
    records: &Records,
    record: &DiskRecord,
    stamp: Option<&ImageStamp>,
    size: ByteCount,
) -> Result<Known, String> {
    let lacked = match records.open_hydration(&record.name, trust::boot_id()) {
        Ok(None) if disk::has_note(Path::new(&record.image)) => {
            return Err("the image lacks blocks, and nobody knows which".to_owned());
        }
        Ok(None) => DirtyBitmap::new(),
        Ok(Some(file)) => {
            let inode = stamp.map_or(0, |stamp| stamp.inode);
            if file.header().disk != record.uuid || file.header().inode != inode {
                return Err("another image lacked blocks of it".to_owned());
            }
            file.missing()
        }
        Err(error) => return Err(format!("the image lacks blocks, and nobody knows which: {error}")),
    };
    let (durable, changed) = match trust::resume(record, records.load_tracking(&record.name), stamp, size) {
        Resume::Clean(mut saved) => {
            saved.dirty.union_with(&saved.zeroes);
            (saved.acked_durable, saved.dirty)
        }
        Resume::Crashed { acked_durable, candidates, .. } => (acked_durable, candidates),
        Resume::Lost { reason, .. } => {
            return Err(format!("this agent does not know what was changed here: {reason}"));
        }
        Resume::New => return Err("this agent has never reached a receiver with it".to_owned()),
    };
    Ok(Known { epoch: record.last_own_epoch(), durable, changed, lacked })
}

impl LeftBehind {
    /// Whether the image can become the disk at this point; it may have grown since.
    pub(super) fn fits(&self, point: &SourcePoint) -> Result<(), FetchError> {
        if self.size == point.size || (self.is_file && self.size < point.size) {
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
            Ok(known) => match source.left(known.epoch, known.durable).await {
                Ok(mut differing) => {
                    differing.union_with(&known.changed);
                    differing.union_with(&known.lacked);
                    return Ok((differing, None));
                }
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
            disk: None,
        }
    }
}
