//! The control API's answers about locks: points that nobody lets go before a time.

use backtide_receiver_api::{ApiError, ErrorCode, Lock, LockRequest, RetentionReport};
use backtide_recovery::{Point, TimedLsn, time_text};
use backtide_units::{CaptureTime, DiskId, DiskName, Lsn};

use super::{Found, Service};
use crate::{
    points,
    retention::{self, Ladder, Moment, Span, plan_all},
};

impl Service {
    pub(super) async fn lock_points(&self, request: LockRequest) -> Result<RetentionReport, ApiError> {
        let LockRequest { name, at, until } = request;
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
        let policies = self.policies.clone();
        let timed = point.map(|point| (point.lsn, point.time));
        let locked = self.read(move || policies.add_lock(disk.uuid, timed, lock)).await?;
        locked.map_err(|error| super::retention::not_changed(&error))?;
        tracing::info!(disk = %disk.uuid, at = at.as_deref().unwrap_or("every point"), until = time_text(until), "locked");
        if let (Some(at), Some(point)) = (at, point) {
            // It may have gone while it was asked for; from now on it stays.
            let Found { snapshot, .. } = self.look_at(&name).await?;
            let there = snapshot.view(point.lsn).map(|_| ());
            there.map_err(|error| points::unavailable(&at, &error))?;
        }
        self.report_retention(Some(name)).await
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
