//! Back at the first host: a disk goes on there that another agent has had since, with the image it had, of which only
//! what differs is fetched.
//!
//! What the image holds is what the receiver had when the disk was taken over, but for the blocks that the saved
//! tracking says may differ: changes that never arrived, and whatever a guest wrote here afterwards. The receiver knows
//! which blocks got versions since. Both together are missing then, and the rest is trusted as an attach after a crash
//! trusts it (`disk/trust.rs`). Where one of the two is not known, everything is missing that the point or the image has.
//!
//! Invariants: from before it is looked at until the record says that the disk is here nobody else can have the image - a raw one
//! by our lock, a qcow2 file by QEMU's; an NBD export cannot be kept from others - and one that was written nevertheless is noticed, where it tells; nothing is changed here before the receiver has the higher epoch, and the image not before there is a
//! hydration file. Whoever dies in between leaves the image with what it had, and a failback begins anew.

mod left;

use std::{sync::Arc, time::Duration};

use backtide_agent_api::{Adopted, FailbackReport, FailbackRequest, HydrationKind};
use backtide_control::{ApiError, ErrorCode};
use backtide_units::{ByteCount, DiskName};
use tokio::task::LocalSet;

use self::left::left_behind;
pub(super) use self::left::{HeldImage, LeftBehind};
use super::{
    Registry,
    errors::{failed, refuse_implausible},
    failover::{Target, not_served},
    origin::fetch_error,
    waiting,
};
use crate::{
    claims::{Claim, Standing},
    disk::{self, Dialer, DiskHandle, source::FetchError},
    qcow2::Access,
    record::DiskRecord,
};

/// How long the receiver may take to tell what differs.
const FIND_TIME: Duration = Duration::from_secs(60);

impl Registry {
    /// Has a disk go on here with the image it had, from its latest point on.
    pub(crate) async fn failback(
        self: &Arc<Self>,
        name: &DiskName,
        request: FailbackRequest,
    ) -> Result<FailbackReport, ApiError> {
        let claim = self.claim(name).await?;
        let record = self.records.load_aside(name).await.map_err(|error| failed(&error))?;
        let record = record.ok_or_else(|| {
            let message = format!("this agent has never had disk {name}");
            let hint = format!("`backtide failover {name} NEW_IMAGE` has it go on here");
            ApiError::new(ErrorCode::NotFound, message).with_hint(hint)
        })?;
        if let Ok((_, handle)) = self.find(name).await {
            return here_already(&record, &handle, request.adopt).await;
        }
        refuse_implausible(&record.name, Some(&request.adopt))?;
        refuse_own(&record, request.adopt)?;
        // Until it is known to be the disk's again, and from then on by the disk itself.
        self.take_image(name, &record.image, record.format, Standing::New).await?;
        let back = self.come_back(&claim, record, request).await;
        if !self.disks.read().await.contains_key(name) {
            self.leave_image(name).await;
        }
        back
    }

    async fn come_back(
        self: &Arc<Self>,
        claim: &Claim,
        record: DiskRecord,
        request: FailbackRequest,
    ) -> Result<FailbackReport, ApiError> {
        let FailbackRequest { adopt, receiver, dry_run, force, ack, on_outage } = request;
        let name = record.name.clone();
        let receiver = receiver.unwrap_or_else(|| record.receiver.clone());
        disk::check_tls(&receiver, record.stream_tls.as_ref().or(self.stream_tls.as_ref())).await?;
        let record = DiskRecord { receiver, ..record };
        let access = if dry_run { Access::Look } else { Access::Disk };
        let (found, server) = self.find_left(&record, access).await?;
        let (records, left_by) = (self.records.clone(), record.clone());
        let left = move || left_behind(&records, &left_by, adopt, force, found);
        // From when the record is saved on the disk is here, whoever dies.
        let taking = DiskRecord {
            epoch: adopt.epoch.taken_over(),
            paused: false,
            attached: true,
            // As the disk had it last, wherever that was.
            ack: ack.unwrap_or(record.ack),
            on_outage: on_outage.unwrap_or(record.on_outage),
            ..record.clone()
        };
        let taken = async {
            self.refuse_unserved(&record).await?;
            let (left, report) = self.plan_failback(&record, adopt, waiting(left).await??).await?;
            match dry_run {
                true => Ok((report, None)),
                false => {
                    let taken = self.take_over(&taking, adopt, Target::Left(Box::new(left))).await?;
                    Ok((report, Some(taken)))
                }
            }
        };
        let (report, taken) = match taken.await {
            Ok((report, Some(taken))) => (report, taken),
            ended => {
                if let Some(server) = server {
                    server.stop_anyway().await;
                }
                return ended.map(|(report, _)| report);
            }
        };
        let (point, point_time) = (taken.source.lsn, taken.source.time);
        let fetched_bytes = taken.missing.count().bytes();
        let record = self.begin_taken(taking, taken, server).await?;
        let handle = match self.start(claim, record.clone(), Standing::New).await {
            Ok(handle) => handle,
            Err(error) => {
                self.forget_attached(&name).await;
                return Err(not_served(&record, error));
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
                let report = left.report(source.point(), missing.clone(), why);
                Ok::<_, FetchError>((left, report, missing))
            };
            runtime.block_on(local.run_until(tokio::time::timeout(FIND_TIME, plan)))
        };
        let silent = |_| Err(FetchError::Unreachable("the receiver does not answer".to_owned()));
        let planned = waiting(planning).await?.unwrap_or_else(silent);
        let planned =
            planned.map_err(|error| fetch_error(&format!("disk {} cannot go on here", record.name), error));
        let (left, report, missing) = planned?;
        // Nobody is fenced for a disk that could not be kept here either.
        self.require_room(&record.name, Some(&missing)).await?;
        Ok((left, report))
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
