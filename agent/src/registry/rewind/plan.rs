//! What a rewind asks the receiver before anything is changed: for the point, for what differs from it, and that it is kept.
//!
//! Invariant: a disk that lacks blocks of another point keeps that one until it lacks those of the new one: the new one is
//! kept in a name of its own so long.

use std::{cell::OnceCell, rc::Rc, sync::Arc, time::Duration};

use backtide_control::ApiError;
use backtide_hydration::{Since, SourcePoint};
use backtide_tracking::{DirtyBitmap, SavedTracking};
use backtide_units::{BlockRange, Epoch, HistoryId, Lsn};
use tokio::task::LocalSet;

use super::super::{Registry, origin::fetch_error, waiting};
use crate::{
    disk::{
        Dialer,
        hydrating::{owner, rewinding},
        source::{FetchError, PointSource},
    },
    record::DiskRecord,
};

/// How long the receiver may take to find the point, and what differs.
const FIND_TIME: Duration = Duration::from_secs(60);

/// How long it may look for damage in what differs; what it has not looked at then counts as whole.
const LOOK_TIME: Duration = Duration::from_secs(20);

/// How long it may take to give up a point.
pub(in crate::registry) const RELEASE_TIME: Duration = Duration::from_secs(10);

/// Where a disk is to be set.
#[derive(Clone)]
pub(super) struct Goal {
    pub(super) history: HistoryId,
    pub(super) to: Lsn,
    /// Also to a point of which blocks are damaged.
    pub(super) force: bool,
    /// In whose name the receiver keeps the point.
    pub(super) keeper: String,
    /// The disk's epoch, which that name has: what the disk lacks is noted of the same one.
    pub(super) epoch: Epoch,
}

/// What a rewind is going to do.
pub(super) struct Plan {
    pub(super) source: SourcePoint,
    /// What it was made for.
    pub(super) since: Since,
    pub(super) changed: DirtyBitmap,
}

/// In whose name the receiver keeps a point while a disk is being set to it.
pub(super) fn keeper(record: &DiskRecord, lacks_another: bool) -> String {
    let named = if lacks_another { rewinding } else { owner };
    named(record.uuid, record.epoch)
}

impl Registry {
    /// Finds the point at the receiver, has it kept, and finds out what differs from `since`. With `left`, what a detach has left, the
    /// receiver has to have all that it has acknowledged: it may have been put back from a copy since.
    pub(super) async fn plan(
        &self,
        record: &DiskRecord,
        goal: &Goal,
        since: Since,
        left: Option<&SavedTracking>,
    ) -> Result<Plan, ApiError> {
        let acknowledged = left.map(|saved| (saved.acked_durable, saved.acked_position));
        let tls = record.stream_tls.clone().or_else(|| self.stream_tls.clone());
        let (receiver, uuid, size) = (record.receiver.clone(), record.uuid, record.size);
        let (sources, runtime) = (Arc::clone(&self.sources), tokio::runtime::Handle::current());
        let Goal { history, to, force, keeper, epoch: _ } = goal.clone();
        let planning = move || {
            // A source belongs to one thread.
            let local = LocalSet::new();
            let holding = OnceCell::new();
            let plan = async {
                let dialer = Dialer::new(receiver, tls);
                let source = sources.find(dialer, uuid, Some(history), Some(to)).await?;
                let point = source.point().clone();
                if point.size != size {
                    let why = format!("the disk had {} bytes then and has {size} now", point.size);
                    return Err(FetchError::Refused(why));
                }
                let _ = holding.set(Rc::clone(&source));
                source.hold(&keeper).await?;
                // Above what a disk was let go of at is nothing of it, and what it may have is among everything above the point.
                let (changed, until) = match acknowledged {
                    Some((durable, entries)) => (source.after(durable, entries).await?, Lsn::MAX),
                    None => (source.changed(since.lsn()).await?, since.lsn()),
                };
                if !force {
                    refuse_damaged(&*source, Some(until)).await?;
                }
                Ok(Plan { source: point, since, changed })
            };
            let planned = async {
                let planned = tokio::time::timeout(FIND_TIME, plan).await;
                // Nothing comes of the point then.
                if !matches!(planned, Ok(Ok(_)))
                    && let Some(source) = holding.get()
                {
                    let _ = tokio::time::timeout(RELEASE_TIME, source.release(&keeper)).await;
                }
                planned
            };
            runtime.block_on(local.run_until(planned))
        };
        let planned = waiting(planning).await?;
        let what = format!("disk {} cannot be set back to LSN {}", record.name, to);
        planned.unwrap_or_else(|_| Err(FetchError::Unreachable(silent()))).map_err(|error| {
            let damaged = matches!(error, FetchError::Damaged(_));
            let error = fetch_error(&what, error);
            match damaged {
                true => error.with_hint(format!(
                    "`backtide find-change {}` names the write that is damaged: points before it, and after the next one there, do not have it; with --force its blocks cannot be read until they are written",
                    record.name
                )),
                false => error,
            }
        })
    }

    /// From now on the point is kept for the blocks that the disk lacks of it, if it does, and else not at all.
    pub(in crate::registry) async fn settle_hold(
        &self,
        record: &DiskRecord,
        source: SourcePoint,
        keeper: String,
        lacks: bool,
    ) {
        let kept_as = owner(record.uuid, record.epoch);
        if lacks && keeper == kept_as {
            return;
        }
        let tls = record.stream_tls.clone().or_else(|| self.stream_tls.clone());
        let receiver = record.receiver.clone();
        let (sources, runtime) = (Arc::clone(&self.sources), tokio::runtime::Handle::current());
        let settling = move || {
            let source = sources.open(source, Dialer::new(receiver, tls));
            let settled = async {
                if lacks {
                    source.hold(&kept_as).await?;
                }
                source.release(&keeper).await
            };
            let settled = tokio::time::timeout(RELEASE_TIME, settled);
            runtime.block_on(LocalSet::new().run_until(settled))
        };
        match waiting(settling).await {
            Ok(Ok(Ok(()))) => {}
            Ok(Ok(Err(_)) | Err(_)) | Err(_) => {
                tracing::warn!(disk = %record.name, "the receiver was not told that the point is needed no more: release it there")
            }
        }
    }
}

/// Refuses a point of which something is known to be damaged that would be fetched.
pub(in crate::registry) async fn refuse_damaged(
    source: &dyn PointSource,
    since: Option<Lsn>,
) -> Result<(), FetchError> {
    // What is not known in time is found out when it is fetched.
    let Ok(damaged) = tokio::time::timeout(LOOK_TIME, source.damaged(since)).await else { return Ok(()) };
    let damaged = damaged?;
    let point = source.point();
    let whole = BlockRange::whole_disk(point.size);
    let Some(first) = damaged.next_run(whole.start(), whole.end(), whole.count()) else { return Ok(()) };
    Err(FetchError::Damaged(format!(
        "{} bytes of that point are damaged at the receiver, the first at offset {}",
        damaged.count().bytes(),
        first.start().start()
    )))
}

fn silent() -> String {
    format!("the receiver has not answered for {} s", FIND_TIME.as_secs())
}
