//! The control API's answers about retention.

use backtide_receiver_api::{
    ApiError, DiskRef, DiskRetention, ErrorCode, HeldPoint, KeepRequest, Mount, OverlayFate, ReceiverService,
    RetentionPreview, RetentionReport, RetentionRequest, UnmountRequest,
};
use backtide_recovery::{LogError, Point, TimedLsn};
use backtide_units::{ByteCount, DiskId, DiskName, Lsn};

use super::{
    Found, Service,
    preview::{LogPreview, single_points},
};
use crate::{
    OnFull,
    facts::DiskFacts,
    ingest::Task,
    past::EndedLog,
    points,
    retention::{
        Ladder, LadderError, NotChanged, Pin, PlanError, Policy, every_change_from, plan_all, plan_readable,
    },
};

impl Service {
    pub(super) async fn report_retention(&self, disk: Option<DiskName>) -> Result<RetentionReport, ApiError> {
        // First of all: what is told of disks and room is as new as the rounds that are counted.
        let keeper = self.keeper.status();
        let wanted = disk.map(|name| self.find(&name)).transpose()?;
        let mut facts = self.own_facts().await?;
        facts.retain(|facts| wanted.is_none_or(|wanted| wanted == facts.id));
        if let (true, Some(wanted)) = (facts.is_empty(), wanted) {
            return Err(self.unknown(&wanted.to_string()));
        }
        let mut disks = Vec::new();
        for facts in facts {
            disks.extend(self.disk_retention(facts).await?);
        }
        disks.sort_by(|a, b| a.disk.name.cmp(&b.disk.name));
        let images = self.images.clone();
        let image_bytes = self
            .read(move || images.size())
            .await?
            .map_err(|error| points::log_error(&LogError::from(error)))?;
        Ok(RetentionReport {
            default: self.policies.default_ladder().to_string(),
            on_full: match self.on_full {
                OnFull::Refuse => "refuse".to_owned(),
                OnFull::Shrink => "shrink".to_owned(),
            },
            low: keeper.low,
            error: self.policies.damage().or(keeper.error),
            image_bytes,
            freed_bytes: keeper.freed,
            rounds: keeper.rounds,
            disks,
        })
    }

    /// None when nothing can be read of it.
    async fn disk_retention(&self, facts: DiskFacts) -> Result<Option<DiskRetention>, ApiError> {
        let Some(Ok(readable)) = self.read_disk(facts.id).await? else { return Ok(None) };
        let (Some(name), snapshot) = (facts.name, readable.snapshot) else { return Ok(None) };
        let policy = self.policies.of(facts.id);
        let timeline = snapshot.timeline();
        let single = snapshot.logs().iter().flat_map(single_points).map(points::point).collect();
        let pinned = |(lsn, time): (&_, &_)| points::point(TimedLsn { lsn: *lsn, time: *time });
        let held = |(owner, held): (String, Pin)| HeldPoint { owner, lsn: held.lsn, time: held.time };
        let keeper = self.keeper.status();
        Ok(Some(DiskRetention {
            disk: DiskRef { name, uuid: facts.id, size: facts.size },
            ladder: self.policies.ladder(facts.id).to_string(),
            own: policy.ladder.is_some(),
            oldest: timeline.intervals().first().map(|interval| points::point(interval.from)),
            every_point_from: every_change_from(&snapshot).map(points::point),
            single_points: single,
            keep: policy.pins.iter().map(pinned).collect(),
            locks: self.locks(facts.id),
            held: policy.holds.into_iter().map(held).collect(),
            log_bytes: facts.log_bytes,
            shrunk: keeper.shrunk.get(&facts.id).copied().unwrap_or(0),
            error: keeper.errors.get(&facts.id).cloned(),
        }))
    }

    pub(super) async fn change_retention(
        &self,
        disk: DiskName,
        request: RetentionRequest,
    ) -> Result<RetentionReport, ApiError> {
        let id = self.find(&disk)?;
        let ladder = request.ladder.as_deref().map(parse).transpose()?;
        self.unless_locked(&disk, ladder.as_ref()).await?;
        self.unless_too_many(&disk, ladder.as_ref()).await?;
        let policies = self.policies.clone();
        let changed = self.read(move || policies.change(id, |policy| policy.ladder = ladder)).await?;
        changed.map_err(|error| not_changed(&error))?;
        tracing::info!(disk = %id, ladder = request.ladder.as_deref().unwrap_or("default"), "another retention");
        self.keeper.wake();
        self.report_retention(Some(disk)).await
    }

    /// Refuses a ladder that keeps more single points of a disk than there can be.
    async fn unless_too_many(&self, name: &DiskName, ladder: Option<&Ladder>) -> Result<(), ApiError> {
        let Ok(Found { disk, snapshot, .. }) = self.look_at(name).await else { return Ok(()) };
        let ladder = ladder.unwrap_or_else(|| self.policies.default_ladder()).clone();
        let now = self.policies.moment();
        let staying = self.policies.of(disk.uuid).staying(now);
        let planned = self.read(move || plan_all(&snapshot, &ladder, &staying, now.wall)).await?;
        match planned {
            Err(error @ PlanError::TooMany { .. }) => Err(plan_error(&error)),
            // Where its log cannot be read now, the rounds of retention tell.
            Ok(_) | Err(PlanError::Log(_)) => Ok(()),
        }
    }

    pub(super) async fn preview(
        &self,
        name: DiskName,
        request: RetentionRequest,
    ) -> Result<RetentionPreview, ApiError> {
        let Found { disk, snapshot, .. } = self.look_at(&name).await?;
        let ladder = match request.ladder.as_deref() {
            Some(text) => parse(text)?,
            None => self.policies.ladder(disk.uuid),
        };
        let (now, policy) = (self.policies.moment(), self.policies.of(disk.uuid));
        let mut staying = policy.staying(now);
        staying.extend(self.overlays.points(disk.uuid));
        let locked_until = policy.all_locked(now).map(|lock| lock.ends(now));
        let (wanted, may_go) = (ladder.clone(), locked_until.is_none());
        let ended: Vec<EndedLog> = self.ask_owner(disk.uuid, |answer| Task::Ended(disk.uuid, answer)).await?;
        let (parts_away, away) = away_of(&ended);
        let planned: Result<Vec<LogPreview>, PlanError> = self
            .read(move || {
                let plans = plan_readable(&snapshot, &wanted, &staying, now.wall, &parts_away)?;
                plans.into_iter().map(|(log, plan)| LogPreview::of(log, plan.filter(|_| may_go))).collect()
            })
            .await?;
        let logs = planned.map_err(|error| plan_error(&error))?;
        let list = |points: fn(&LogPreview) -> &Vec<TimedLsn>| {
            logs.iter().flat_map(points).copied().map(points::point).collect()
        };
        let sum = |bytes: fn(&LogPreview) -> ByteCount| ByteCount(logs.iter().map(|log| bytes(log).0).sum());
        Ok(RetentionPreview {
            every_point_from: logs.iter().find_map(|log| log.floor).map(points::point),
            keep: list(|log| &log.keep),
            drop: list(|log| &log.drop),
            drop_marks: logs.iter().flat_map(LogPreview::drop_marks).collect(),
            locked_until,
            log_bytes_freed: sum(|log| log.freed),
            fold_read_bytes: sum(|log| log.cost.read),
            fold_write_bytes_max: sum(|log| log.cost.written_max),
            changes: logs.iter().any(|log| log.changes),
            away,
            disk,
            ladder: ladder.to_string(),
        })
    }

    pub(super) async fn keep_point(&self, request: KeepRequest) -> Result<RetentionReport, ApiError> {
        let KeepRequest { name, at, release, held } = request;
        if held.is_some() && !release {
            let why = "a hold is an agent's: it can be released, and taken by the agent alone";
            return Err(ApiError::new(ErrorCode::Usage, why));
        }
        let Found { disk, snapshot, .. } = self.look_at(&name).await?;
        let point = match self.resolve_in(&snapshot, &at).await {
            Ok(point) => point,
            // What cannot be had any more is released all the same.
            Err(error) => self.kept_as(&at, disk.uuid).filter(|_| release).ok_or(error)?,
        };
        let (policies, owner) = (self.policies.clone(), held.clone());
        // Two that keep one point would take that of the other back.
        let promising = self.promising.lock().await;
        let changed = self
            .read(move || {
                let mut done = true;
                let changed = policies.change(disk.uuid, |policy| match (release, owner) {
                    (false, _) => done = policy.pins.insert(point.lsn, point.time).is_none(),
                    (true, None) => done = policy.pins.remove(&point.lsn).is_some(),
                    (true, Some(owner)) => {
                        done = policy.holds.get(&owner).is_some_and(|held| held.lsn == point.lsn);
                        if done {
                            policy.holds.remove(&owner);
                        }
                    }
                });
                changed.map(|()| done)
            })
            .await?;
        let done = changed.map_err(|error| not_changed(&error))?;
        if release && !done {
            return Err(self.nothing_released(&disk, &at, point.lsn, held.as_deref()));
        }
        match (release, held) {
            (true, Some(owner)) => {
                tracing::warn!(disk = %disk.uuid, lsn = %point.lsn, owner, "a person has released what an agent held");
            }
            (true, None) => {}
            (false, _) => {
                if let Err(error) = self.still_there(&name, &at, point.lsn).await {
                    let take_back = move |policy: &mut Policy| {
                        if done && policy.pins.get(&point.lsn) == Some(&point.time) {
                            policy.pins.remove(&point.lsn);
                        }
                    };
                    return Err(self.promised_in_vain(disk.uuid, "kept point", take_back, error).await);
                }
            }
        }
        drop(promising);
        self.report_retention(Some(name)).await
    }

    /// Whether a point that stays from now on had not gone while it was asked for.
    pub(super) async fn still_there(&self, name: &DiskName, asked: &str, lsn: Lsn) -> Result<(), ApiError> {
        let Found { snapshot, .. } = self.look_at(name).await?;
        snapshot.view(lsn).map(|_| ()).map_err(|error| points::unavailable(asked, &error))
    }

    /// Takes back what was added for a point that whoever asked does not get: what is said to have failed is not in the way of
    /// others.
    pub(super) async fn promised_in_vain(
        &self,
        disk: DiskId,
        what: &str,
        take_back: impl FnOnce(&mut Policy) + Send + 'static,
        error: ApiError,
    ) -> ApiError {
        let policies = self.policies.clone();
        let why = match self.read(move || policies.change(disk, take_back)).await {
            Ok(Ok(())) => return error,
            Ok(Err(why)) => why.to_string(),
            Err(why) => why.message,
        };
        tracing::error!(%disk, why, "what was promised of a point in vain cannot be taken back");
        let hint = format!("the {what} could not be taken back, and may still be shown: {why}");
        error.with_hint(hint)
    }

    /// What is said when there is nothing to release at a point, or not what was named.
    fn nothing_released(&self, disk: &DiskRef, at: &str, lsn: Lsn, owner: Option<&str>) -> ApiError {
        let name = disk.name.as_str();
        let why = match owner {
            None => format!("no point of disk {name} is kept at {at}, so none was released"),
            Some(owner) => {
                format!("\"{owner}\" holds nothing at {at} of disk {name}, so nothing was released")
            }
        };
        let holds = self.policies.of(disk.uuid).holds;
        let holder = holds.into_iter().find(|(_, held)| held.lsn == lsn).filter(|_| owner.is_none());
        let hint = match holder {
            Some((holder, _)) => format!(
                "an agent holds it and takes that back when it is done; if it never comes back, `backtide retention release \
                 {name} --at lsn:{lsn} --held '{holder}'` does"
            ),
            None => "`backtide retention show NAME` lists the points that are kept until released, and those that are held"
                .to_owned(),
        };
        ApiError::new(ErrorCode::NotFound, why).with_hint(hint)
    }

    /// What is kept or held of a disk under `lsn:NUMBER`, wherever its history has got to.
    fn kept_as(&self, at: &str, disk: DiskId) -> Option<TimedLsn> {
        let Ok(Point::Lsn(lsn)) = at.parse() else { return None };
        let policy = self.policies.of(disk);
        let held = policy.holds.values().map(|held| (held.lsn, held.time));
        let mut kept = policy.pins.into_iter().chain(held);
        kept.find(|(kept, _)| *kept == lsn).map(|(lsn, time)| TimedLsn { lsn, time })
    }

    /// A new writable mount, when its point stays for it. That may have gone while the mount was made; from now on it does
    /// not.
    pub(super) async fn unless_its_point_goes(&self, asked: &str, mount: Mount) -> Result<Mount, ApiError> {
        let policies = self.policies.clone();
        let (disk, lsn) = (mount.disk.uuid, mount.lsn);
        if let Some(why) = self.read(move || policies.doubt_of(disk, lsn)).await? {
            return self.take_back(mount, ApiError::new(ErrorCode::Refused, why)).await;
        }
        let uuid: DiskName = mount.disk.uuid.to_string().parse().expect("a UUID is a good name");
        let there = match self.look_at(&uuid).await {
            Ok(Found { snapshot, .. }) => snapshot.view(mount.lsn).map(|_| ()),
            Err(error) => return self.take_back(mount, error).await,
        };
        match there {
            Ok(()) => Ok(mount),
            Err(error) => self.take_back(mount, points::unavailable(asked, &error)).await,
        }
    }

    async fn take_back(&self, mount: Mount, why: ApiError) -> Result<Mount, ApiError> {
        tracing::warn!(mount = mount.id, why = why.message, "the mount's point went while it was made");
        let how = UnmountRequest { overlay: Some(OverlayFate::Discard), force: true };
        self.unmount(mount.id, how).await?;
        Err(why)
    }
}

pub(super) fn not_changed(error: &NotChanged) -> ApiError {
    let code = match error {
        NotChanged::InDoubt(_) => ErrorCode::Refused,
        NotChanged::Full(_) | NotChanged::Failed(_) => ErrorCode::Failed,
    };
    let failed = ApiError::new(code, error.to_string());
    match error {
        NotChanged::Full(_) => failed.with_hint(
            "the store has no room for it: make the file system larger or remove other files from it; history goes as the \
             ladders say, and by itself where the receiver's configuration has `on_full = \"shrink\"`",
        ),
        NotChanged::InDoubt(_) | NotChanged::Failed(_) => failed,
    }
}

pub(super) fn plan_error(error: &PlanError) -> ApiError {
    match error {
        PlanError::Log(error) => points::log_error(error),
        PlanError::TooMany { .. } => ApiError::new(ErrorCode::Refused, error.to_string())
            .with_hint("name rungs that are further apart, such as hourly instead of per-10m, or that keep for less long"),
    }
}

/// Of which logs that can be read a part is away, the oldest first, and a sentence when it is of any.
fn away_of(ended: &[EndedLog]) -> (Vec<bool>, Option<String>) {
    let readable = || ended.iter().filter(|log| log.snapshot.is_some());
    let told = readable().find_map(|log| log.away.as_deref()).map(|away| {
        format!(
            "a part of an older log of the disk is away, and which of its points stay nobody knows: {away}; that log goes \
             no further than up to there until the part is there again, or `backtide fsck --repair` has cut the log there"
        )
    });
    (readable().map(|log| log.away.is_some()).collect(), told)
}

fn parse(text: &str) -> Result<Ladder, ApiError> {
    text.parse().map_err(|error: LadderError| ApiError::from_error(ErrorCode::Usage, &error))
}
