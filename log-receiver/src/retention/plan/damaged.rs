//! What of a log goes of which an index cannot be read: what lies before that.

use backtide_recovery::{LogError, Snapshot};
use backtide_units::Lsn;

use super::{Plan, PlanError, Reach};

/// What `plan` wants of what lies before the first segment whose index cannot be read, of which the lowest version and the error
/// are given.
///
/// # Errors
/// That one, when nothing before it is to be done, or else [`PlanError`].
pub(crate) fn before_damage(
    log: &Snapshot,
    (lowest, error): (Lsn, LogError),
    reach: Reach,
    plan: &dyn Fn(Reach) -> Result<Option<Plan>, PlanError>,
) -> Result<Plan, PlanError> {
    let Some(before) = lowest.0.checked_sub(1) else { return Err(error.into()) };
    let Some(last) = log.newest_point_at(Lsn(before))? else { return Err(error.into()) };
    let found = plan(Reach { until: Some(last.time), ..reach })?;
    let latest = log.timeline().latest();
    // By its time it may be one behind.
    let is_before = |plan: &Plan| plan.images_until(latest).is_none_or(|until| until < lowest);
    found.filter(is_before).ok_or(PlanError::Log(error))
}
