//! The control API's answers: asks the threads that own disks and mounts, reads on the pool.

use std::{path::PathBuf, sync::Arc};

use backtide_control::Address;
use backtide_export::{NbdRule, NbdUri};
use backtide_images::Images;
use backtide_receiver_api::{
    ApiError, AroundReport, ByteSpan, CertificateStatus, CommitCounts, DiffReport, DiffRequest, DiskRef,
    Dismissed, ErrorCode, FindChangeRequest, ForgottenDisk, FoundChange, KeepRequest, KeptOverlay,
    LockRequest, Mount, MountRequest, Mounts, PointsReport, ReceiverDisk, ReceiverDisks, ReceiverService,
    ReceiverStatus, RemountRequest, ResolveRequest, ResolvedPoint, RetentionPreview, RetentionReport,
    RetentionRequest, ScrubRequest, ScrubStatus, UnmountRequest,
};
use backtide_recovery::{Point, PointError, Snapshot, TimedLsn};
use backtide_storage::Storage;
use backtide_tls::StreamServer;
use backtide_units::{ByteCount, DiskId, DiskName, HistoryId};
use tokio::sync::{mpsc, oneshot};
use uuid::Uuid;

mod alarms;
mod around;
mod dismiss;
mod forget;
mod kept;
mod locks;
mod preview;
mod retention;
mod scrubbing;

use crate::{
    Names, OnFull, StoreId, StoreWatch, changes,
    clock::{self, Came},
    committer::Committer,
    disk::Failure,
    facts::DiskFacts,
    findings::{DiskFindings, Findings},
    ingest::{Readable, Task},
    mounts::{Changed, Order, Plan, PlanOverlay},
    overlays::Overlays,
    points,
    pool::Pool,
    removal::Removal,
    retention::{KeeperWatch, Policies},
    scrub::Scrub,
};

/// What the control API is served from. Clones share it.
#[derive(Clone)]
pub(crate) struct Service {
    pub(crate) store: PathBuf,
    pub(crate) store_id: StoreId,
    pub(crate) storage: Arc<dyn Storage>,
    pub(crate) space_floor: ByteCount,
    pub(crate) watch: StoreWatch,
    pub(crate) scrub: Arc<Scrub>,
    pub(crate) scrub_rate: ByteCount,
    pub(crate) findings: Findings,
    pub(crate) listen: Vec<Address>,
    /// Where every mount is served.
    pub(crate) nbd_listen: Option<String>,
    pub(crate) tls: Option<Arc<StreamServer>>,
    pub(crate) images: Images,
    pub(crate) policies: Policies,
    /// Whoever promises that a point stays has it until that is sure.
    pub(crate) promising: Arc<tokio::sync::Mutex<()>>,
    pub(crate) keeper: KeeperWatch,
    pub(crate) on_full: OnFull,
    pub(crate) low_bytes: ByteCount,
    pub(crate) names: Arc<Names>,
    pub(crate) threads: Vec<mpsc::Sender<Task>>,
    pub(crate) mounts: mpsc::Sender<Order>,
    pub(crate) nbd_rule: NbdRule,
    pub(crate) overlays: Overlays,
    pub(crate) removal: Removal,
    pub(crate) readers: Pool,
    pub(crate) commits: Committer,
}

/// A disk as it was when somebody asked.
pub(crate) struct Found {
    pub(crate) disk: DiskRef,
    pub(crate) snapshot: Snapshot,
    /// Where damage is noted that whoever reads it meets.
    pub(crate) findings: DiskFindings,
    /// What is wrong with its log, when acknowledged bytes are not there any more.
    pub(crate) damage: Option<String>,
    /// Since when its agent is connected, if it is.
    pub(crate) came: Option<Came>,
}

impl ReceiverService for Service {
    async fn status(&self) -> Result<ReceiverStatus, ApiError> {
        backtide_tls::look_again().await;
        let facts = self.facts().await?;
        let mounts = self.mounts().await?;
        let store_error = self.watch.check().err();
        let free = self.free(store_error.is_some())?;
        let free_there = free.filter(|_| store_error.is_none());
        let alarms = self.alarms(&facts, free_there);
        let scrub_next = self.next_scrub(&facts, free_there);
        Ok(ReceiverStatus {
            version: env!("CARGO_PKG_VERSION").to_owned(),
            now: Some(clock::now()),
            store: self.store.display().to_string(),
            store_id: self.store_id.0.to_string(),
            listen: self.listen.clone(),
            nbd_listen: self.nbd_listen.clone(),
            certificate: self.tls.as_ref().and_then(|tls| certificate(tls)),
            certificate_warnings: backtide_tls::warnings(),
            log_bytes: ByteCount(facts.iter().map(|facts| facts.log_bytes.0).sum()),
            free_bytes: free.unwrap_or_default(),
            store_error,
            free_bytes_min: self.space_floor,
            growth: self.growth(),
            disks: facts.len() as u64,
            connected: facts.iter().filter(|facts| facts.connected).count() as u64,
            mounts: mounts.mounts.len() as u64,
            overlays: self.overlays.count() as u64,
            overlay_bytes: self.overlays.all_file_bytes(),
            commits: CommitCounts { disks: self.commits.commits(), flushes: self.commits.flushes() },
            alarms,
            scrub: self.scrub.status(),
            scrub_next,
        })
    }

    async fn disks(&self, disk: Option<DiskName>) -> Result<ReceiverDisks, ApiError> {
        let wanted = disk.map(|name| self.find(&name)).transpose()?;
        let mut disks: Vec<_> = self
            .facts()
            .await?
            .into_iter()
            .filter(|facts| wanted.is_none_or(|wanted| wanted == facts.id))
            .map(|facts| self.describe(facts))
            .collect();
        disks.sort_by(|a, b| a.name.cmp(&b.name));
        if disks.is_empty()
            && let Some(wanted) = wanted
        {
            return Err(self.unknown(&wanted.to_string()));
        }
        Ok(ReceiverDisks { disks })
    }

    async fn forget(&self, disk: DiskName) -> Result<ForgottenDisk, ApiError> {
        self.forget_disk(disk).await
    }

    async fn dismiss(&self, disk: DiskName) -> Result<Dismissed, ApiError> {
        self.dismiss_past(disk).await
    }

    async fn points(&self, disk: DiskName) -> Result<PointsReport, ApiError> {
        self.points_of(&disk).await
    }

    async fn around(&self, disk: DiskName, request: ResolveRequest) -> Result<AroundReport, ApiError> {
        self.points_around(&disk, request).await
    }

    async fn resolve(&self, disk: DiskName, request: ResolveRequest) -> Result<ResolvedPoint, ApiError> {
        let found = self.look_at(&disk).await?;
        let at = self.resolve_on(&found.disk, &found.snapshot, &request.point).await?;
        Ok(points::resolved(&found.disk, &found.snapshot, request.point, at, found.came))
    }

    async fn diff(&self, disk: DiskName, request: DiffRequest) -> Result<DiffReport, ApiError> {
        let Found { disk, snapshot, came, .. } = self.look_at(&disk).await?;
        let from = self.resolve_on(&disk, &snapshot, &request.from).await?;
        let to = self.resolve_on(&disk, &snapshot, &request.to).await?;
        let (after, through) = (from.lsn.min(to.lsn), from.lsn.max(to.lsn));
        let from = points::resolved(&disk, &snapshot, request.from, from, came);
        let to = points::resolved(&disk, &snapshot, request.to, to, came);
        let size = disk.size;
        let changes = self
            .read(move || {
                let blocks = snapshot.changed_blocks(after, through)?;
                Ok(changes::spans(&blocks, size, changes::SPANS_MAX))
            })
            .await?
            .map_err(|error| points::log_error(&error))?;
        Ok(DiffReport {
            from,
            to,
            granularity: changes.granularity,
            bytes: ByteCount(changes.spans.iter().map(|span| span.length.0).sum()),
            ranges: changes.spans,
        })
    }

    async fn find_change(&self, disk: DiskName, request: FindChangeRequest) -> Result<FoundChange, ApiError> {
        let Found { disk, snapshot, came, .. } = self.look_at(&disk).await?;
        let at = self.resolve_on(&disk, &snapshot, &request.at).await?;
        let view = snapshot.view(at.lsn).map_err(|error| points::unavailable(&request.at, &error))?;
        let block = changes::block_at(request.offset, view.disk_size())?;
        let at = points::resolved(&disk, &snapshot, request.at, at, came);
        let change = self
            .read(move || changes::last_change(&snapshot, &view, block))
            .await?
            .map_err(|error| points::log_error(&error))?;
        let block = ByteSpan { offset: block.start(), length: block.count() };
        Ok(FoundChange { at, block, change })
    }

    async fn retention(&self, disk: Option<DiskName>) -> Result<RetentionReport, ApiError> {
        self.report_retention(disk).await
    }

    async fn set_retention(
        &self,
        disk: DiskName,
        request: RetentionRequest,
    ) -> Result<RetentionReport, ApiError> {
        self.change_retention(disk, request).await
    }

    async fn preview_retention(
        &self,
        disk: DiskName,
        request: RetentionRequest,
    ) -> Result<RetentionPreview, ApiError> {
        self.preview(disk, request).await
    }

    async fn lock(&self, request: LockRequest) -> Result<RetentionReport, ApiError> {
        self.lock_points(request).await
    }

    async fn keep(&self, request: KeepRequest) -> Result<RetentionReport, ApiError> {
        self.keep_point(request).await
    }

    async fn mount(&self, request: MountRequest) -> Result<Mount, ApiError> {
        let uri = self.allowed_place(request.nbd)?;
        if request.writable && request.temporary {
            let why = "a temporary mount cannot be writable: its overlay is kept until it is discarded";
            return Err(ApiError::new(ErrorCode::Usage, why));
        }
        let Found { disk, snapshot, findings, damage: _, came } = self.look_at(&request.name).await?;
        let at = self.resolve_on(&disk, &snapshot, &request.at).await?;
        let view = snapshot.view(at.lsn).map_err(|error| points::unavailable(&request.at, &error))?;
        let overlay = request.writable.then_some(PlanOverlay::New);
        let changed = match &request.changed_since {
            Some(_) if request.writable => {
                let why =
                    "what changed since a point is told of a read-only mount: clients write to this one";
                return Err(ApiError::new(ErrorCode::Usage, why));
            }
            Some(since) => Some(self.changed_since(&snapshot, since, at).await?),
            None => None,
        };
        let warning_of = |asked: &String| points::warning(asked, &disk.name, snapshot.timeline(), came);
        let warning = warning_of(&request.at);
        let warning_since = request.changed_since.as_ref().and_then(warning_of);
        let temporary = request.temporary;
        let plan = Plan { disk, at, view, findings, uri, temporary, overlay, changed };
        let mut mount = Mount { warning, ..self.serve(plan).await? };
        if let Some(since) = &mut mount.changed_since {
            since.warning = warning_since;
        }
        if request.writable { self.unless_its_point_goes(&request.at, mount).await } else { Ok(mount) }
    }

    async fn remount(&self, id: String, request: RemountRequest) -> Result<Mount, ApiError> {
        let uri = self.allowed_place(request.nbd)?;
        self.serve_overlay(id, uri).await
    }

    async fn discard(&self, id: String) -> Result<KeptOverlay, ApiError> {
        let mounts = self.mounts().await?;
        let Some(kept) = mounts.kept.into_iter().find(|kept| kept.id == id) else {
            self.overlays.record(&id)?;
            let busy = ApiError::new(ErrorCode::Busy, format!("overlay {id} is mounted"));
            return Err(busy.with_hint(format!("backtide unmount {id} --discard")));
        };
        let overlays = self.overlays.clone();
        self.read(move || overlays.discard(&id, false)).await??;
        Ok(kept)
    }

    async fn mounts(&self) -> Result<Mounts, ApiError> {
        let (answer, mounts) = oneshot::channel();
        self.mounts.send(Order::List(answer)).await.map_err(|_| ending())?;
        mounts.await.map_err(|_| ending())
    }

    async fn unmount(&self, id: String, request: UnmountRequest) -> Result<Mount, ApiError> {
        let (answer, ended) = oneshot::channel();
        let order = Order::Unmount(id, request, answer);
        self.mounts.send(order).await.map_err(|_| ending())?;
        ended.await.map_err(|_| ending())?
    }

    async fn scrub(&self, request: ScrubRequest) -> Result<ScrubStatus, ApiError> {
        self.begin_scrub(request).await
    }

    async fn scrub_status(&self) -> Result<ScrubStatus, ApiError> {
        self.scrub.status().ok_or_else(|| {
            ApiError::new(ErrorCode::NotFound, "no scrub has run in this store")
                .with_hint("backtide scrub runs one")
        })
    }

    async fn cancel_scrub(&self) -> Result<ScrubStatus, ApiError> {
        let scrub = Arc::clone(&self.scrub);
        // It is noted durably.
        self.read(move || scrub.cancel()).await?;
        self.scrub_status().await
    }
}

impl Service {
    /// The blocks that may differ between a point that a person named and `at`.
    async fn changed_since(
        &self,
        snapshot: &Snapshot,
        since: &str,
        at: TimedLsn,
    ) -> Result<Changed, ApiError> {
        let since = self.resolve_in(snapshot, since).await?;
        let snapshot = snapshot.clone();
        let (after, through) = (since.lsn.min(at.lsn), since.lsn.max(at.lsn));
        let blocks = self.read(move || snapshot.changed_blocks(after, through)).await?;
        let blocks = blocks.map_err(|error| points::log_error(&error))?;
        Ok(Changed { since, blocks: Arc::new(blocks) })
    }

    /// Where something is to be served, or is again: what is allowed may be another than when it was asked for.
    fn allowed_place(&self, uri: Option<String>) -> Result<Option<NbdUri>, ApiError> {
        let uri = nbd_uri(uri)?;
        let checked = uri.as_ref().map_or(Ok(()), |uri| self.nbd_rule.check(uri));
        checked.map_err(|error| {
            let code = if error.is_open() { ErrorCode::Refused } else { ErrorCode::Usage };
            ApiError::from_error(code, &error)
        })?;
        Ok(uri)
    }

    async fn serve(&self, plan: Plan) -> Result<Mount, ApiError> {
        let (answer, mounted) = oneshot::channel();
        self.mounts.send(Order::Mount(Box::new(plan), answer)).await.map_err(|_| ending())?;
        mounted.await.map_err(|_| ending())?
    }

    pub(crate) fn find(&self, name: &DiskName) -> Result<DiskId, ApiError> {
        let text = name.as_str();
        let by_name = self.names.find(text);
        by_name.or_else(|| text.parse().ok().map(DiskId)).ok_or_else(|| self.unknown(text))
    }

    fn unknown(&self, name: &str) -> ApiError {
        let known: Vec<String> = self.names.all().into_iter().map(String::from).collect();
        let hint = if known.is_empty() {
            "the receiver keeps no disk yet".to_owned()
        } else {
            format!("the receiver keeps {}", known.join(", "))
        };
        ApiError::new(ErrorCode::NotFound, format!("there is no disk {name:?}")).with_hint(hint)
    }

    async fn read_disk(&self, disk: DiskId) -> Result<Option<Result<Readable, Failure>>, ApiError> {
        self.ask_owner(disk, |answer| Task::Read(disk, answer)).await
    }

    pub(crate) async fn look_at(&self, name: &DiskName) -> Result<Found, ApiError> {
        let disk = self.find(name)?;
        if self.removal.shelf.forgotten.is_leaving(disk) {
            return Err(ApiError::new(ErrorCode::Busy, format!("disk {name} is being forgotten")));
        }
        let findings = self.findings.of_life(disk);
        let readable = self.read_disk(disk).await?.ok_or_else(|| self.unknown(name.as_str()))?;
        let readable = readable.map_err(|Failure { why, damaged }| {
            let code = if damaged { ErrorCode::Damaged } else { ErrorCode::Failed };
            ApiError::new(code, format!("disk {name} cannot be read: {why}"))
        })?;
        let Readable { snapshot, attached, damage, came } = readable;
        let damage = damage.or_else(|| findings.known().into_iter().next());
        let Some(attached) = attached else {
            return Err(match damage {
                Some(why) => {
                    ApiError::new(ErrorCode::Damaged, format!("nothing can be read of disk {name}: {why}"))
                }
                None => self.unknown(name.as_str()),
            });
        };
        let disk = DiskRef { name: attached.name.clone(), uuid: disk, size: attached.size };
        Ok(Found { disk, snapshot, findings, damage, came })
    }

    async fn facts(&self) -> Result<Vec<DiskFacts>, ApiError> {
        let mut all = self.own_facts().await?;
        for facts in &mut all {
            facts.add_findings(self.findings.of(facts.id));
        }
        Ok(all)
    }

    /// What the disks' owners know, without what was found beside them.
    async fn own_facts(&self) -> Result<Vec<DiskFacts>, ApiError> {
        let mut all = Vec::new();
        for thread in &self.threads {
            let (answer, facts) = oneshot::channel();
            thread.send(Task::Facts(answer)).await.map_err(|_| ending())?;
            all.extend(facts.await.map_err(|_| ending())?);
        }
        // A disk whose first claim failed was never welcomed: there is nothing of it.
        all.retain(|facts| facts.name.is_some() || facts.error.is_some());
        Ok(all)
    }

    fn describe(&self, facts: DiskFacts) -> ReceiverDisk {
        let fallback = || facts.id.to_string().parse().expect("a UUID is a good name");
        ReceiverDisk {
            name: facts.name.clone().or_else(|| self.names.name_of(facts.id)).unwrap_or_else(fallback),
            uuid: facts.id,
            size: facts.size,
            history: facts.history.unwrap_or(HistoryId(Uuid::nil())),
            epoch: facts.epoch,
            connected: facts.connected,
            in_pass: facts.in_pass,
            received: facts.received,
            durable: facts.durable,
            last_time: facts.last_time,
            clock: facts.clock.zip(facts.name.as_ref()).map(|(clock, name)| clock.sentence(name)),
            ack: facts.ack,
            on_outage: facts.on_outage,
            origin: facts.origin,
            log_bytes: facts.log_bytes,
            segments: facts.segments,
            error: facts.error,
            damage: facts.damage,
            touched: facts.touched,
        }
    }

    pub(crate) async fn resolve_in(&self, snapshot: &Snapshot, asked: &str) -> Result<TimedLsn, ApiError> {
        let point: Point = asked.parse().map_err(|error| ApiError::from_error(ErrorCode::Usage, &error))?;
        let snapshot = snapshot.clone();
        let now = clock::now();
        let at = self
            .read(move || {
                let lsn = snapshot.resolve(&point, now)?;
                let record = snapshot.time_of(lsn).map_err(PointError::Log)?;
                // An interval can begin without a record: then it is the pass that gives the time.
                let begun = points::interval_of(snapshot.timeline(), lsn).map(|interval| interval.from.time);
                Ok(TimedLsn { lsn, time: record.max(begun).unwrap_or_default() })
            })
            .await?;
        at.map_err(|error: PointError| points::unavailable(asked, &error))
    }

    pub(crate) async fn read<T: Send + 'static>(
        &self,
        work: impl FnOnce() -> T + Send + 'static,
    ) -> Result<T, ApiError> {
        self.readers.run(work).await.map_err(|error| ApiError::new(ErrorCode::Failed, error.to_string()))
    }
}

fn nbd_uri(uri: Option<String>) -> Result<Option<NbdUri>, ApiError> {
    let parsed = uri.map(|uri| uri.parse()).transpose();
    parsed.map_err(|error| ApiError::from_error(ErrorCode::Usage, &error))
}

fn certificate(tls: &StreamServer) -> Option<CertificateStatus> {
    let own = tls.certificate()?;
    let folder = tls.folder().display().to_string();
    let warnings = tls.warnings();
    Some(CertificateStatus {
        subject: own.subject,
        names: own.hosts,
        not_after: own.not_after,
        folder,
        warnings,
    })
}

fn ending() -> ApiError {
    ApiError::new(ErrorCode::Unreachable, "the receiver is shutting down")
}
