//! The control API's answers about locks: points that nobody lets go before a time.

use backtide_receiver_api::{ApiError, ErrorCode, Lock, LockRequest, RetentionReport};
use backtide_recovery::{Point, TimedLsn, time_text};
use backtide_units::{CaptureTime, DiskId, DiskName, Lsn};

use super::{Found, Service, retention::not_changed};
use crate::{
    points,
    retention::{self, Ladder, Moment, Policy, Span, plan_all},
};

impl Service {
    pub(super) async fn lock_points(&self, request: LockRequest) -> Result<RetentionReport, ApiError> {
        let LockRequest { name, at, until } = request;
        // Two that lock one point would take that of the other back.
        let promising = self.promising.lock().await;
        let Found { disk, snapshot, .. } = self.look_at(&name).await?;
        let point = match &at {
            Some(at) => Some(self.resolve_in(&snapshot, at).await?),
            None => None,
        };
        let now = self.policies.moment();
        let until = time_of(&until, now)?;
        let lock = retention::Lock::new(until, now).ok_or_else(|| {
            ApiError::new(ErrorCode::Usage, format!("{} has been: a lock ends later", time_text(until)))
        })?;
        let known = self.policies.of(disk.uuid).locks.of(point.map(|point| point.lsn));
        if let Some(known) = known.filter(|known| known.holds(now) && known.ends(now) > until) {
            return Err(ApiError::new(
                ErrorCode::Refused,
                format!("it is locked until {}: a lock never becomes shorter", time_text(known.ends(now))),
            ));
        }
        match (&at, point) {
            (Some(at), Some(point)) => self.lock_point(&name, disk.uuid, at, point, lock).await?,
            (Some(_) | None, _) => self.lock_all(&name, disk.uuid, lock).await?,
        }
        drop(promising);
        tracing::info!(disk = %disk.uuid, at = at.as_deref().unwrap_or("every point"), until = time_text(until), "locked");
        self.report_retention(Some(name)).await
    }

    async fn lock_point(
        &self,
        name: &DiskName,
        disk: DiskId,
        at: &str,
        point: TimedLsn,
        lock: retention::Lock,
    ) -> Result<(), ApiError> {
        let TimedLsn { lsn, time } = point;
        let policies = self.policies.clone();
        let locked = self.read(move || {
            let mut known = (None, None);
            let changed = policies.change(disk, |policy| {
                let before = policy.locks.points.get(&lsn).copied();
                policy.locks.add(Some((lsn, time)), lock);
                known = (before, policy.locks.points.get(&lsn).copied());
            });
            changed.map(|()| known)
        });
        let (before, added) = locked.await?.map_err(|error| not_changed(&error))?;
        let Err(error) = self.still_there(name, at, lsn).await else { return Ok(()) };
        let take_back = move |policy: &mut Policy| {
            if let Some(added) = added {
                policy.locks.take_back(lsn, added, before);
            }
        };
        Err(self.promised_in_vain(disk, "lock", take_back, error).await)
    }

    async fn lock_all(&self, name: &DiskName, disk: DiskId, lock: retention::Lock) -> Result<(), ApiError> {
        let policies = self.policies.clone();
        let locked = self.read(move || {
            let mut known = (None, None);
            let changed = policies.change(disk, |policy| {
                let before = policy.locks.all;
                policy.locks.add(None, lock);
                known = (before, policy.locks.all);
            });
            changed.map(|()| known)
        });
        let (before, added) = locked.await?.map_err(|error| not_changed(&error))?;
        let Err(error) = self.look_at(name).await else { return Ok(()) };
        let take_back = move |policy: &mut Policy| {
            if let Some(added) = added {
                policy.locks.take_all_back(added, before);
            }
        };
        Err(self.promised_in_vain(disk, "lock", take_back, error).await)
    }

    /// The locks of a disk that hold: of every point first, then by LSN.
    pub(super) fn locks(&self, disk: DiskId) -> Vec<Lock> {
        let now = self.policies.moment();
        let locks = self.policies.of(disk).locks;
        let all = locks.all.map(|lock| (None, lock));
        let single = locks.points.iter().map(|(lsn, locked)| (Some((*lsn, locked.time)), locked.lock));
        let holding = all.into_iter().chain(single).filter(|(_, lock)| lock.holds(now));
        let timed = |(lsn, time): (Lsn, CaptureTime)| points::point(TimedLsn { lsn, time });
        holding
            .map(|(point, lock)| Lock { point: point.map(timed), until: lock.until, ends: lock.ends(now) })
            .collect()
    }

    /// Refuses a ladder by which points would go of a disk that is locked as a whole.
    pub(super) async fn unless_locked(
        &self,
        name: &DiskName,
        ladder: Option<&Ladder>,
    ) -> Result<(), ApiError> {
        let id = self.find(name)?;
        let now = self.policies.moment();
        let policy = self.policies.of(id);
        let Some(lock) = policy.all_locked(now) else { return Ok(()) };
        let Found { snapshot, .. } = self.look_at(name).await?;
        let ladder = ladder.unwrap_or_else(|| self.policies.default_ladder()).clone();
        let staying = policy.staying(now);
        let plans = self.read(move || plan_all(&snapshot, &ladder, &staying, now.wall)).await?;
        let plans = plans.map_err(|error| super::retention::plan_error(&error))?;
        if plans.iter().all(|(_, plan)| plan.is_none()) {
            return Ok(());
        }
        let why = format!(
            "history of disk {name} would go, and every point of it is locked until {}",
            time_text(lock.ends(now))
        );
        Err(ApiError::new(ErrorCode::Refused, why).with_hint("backtide retention show lists the locks"))
    }
}

/// A time, or a duration from now on.
fn time_of(text: &str, now: Moment) -> Result<CaptureTime, ApiError> {
    match (Span::parse(text), text.parse()) {
        (Some(span), _) => Ok(CaptureTime(now.wall.0.saturating_add(span.0))),
        (None, Ok(Point::Time(time))) => Ok(time),
        (None, Ok(Point::Latest | Point::Lsn(_) | Point::Ago(_) | Point::Mark(_)) | Err(_)) => {
            Err(ApiError::new(
                ErrorCode::Usage,
                format!(
                    "{text:?} is no time: expected one such as 2027-03-01T12:00:00Z, or a duration such as 30d"
                ),
            ))
        }
    }
}
