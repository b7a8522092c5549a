//! What a ladder would do to one log of a disk.

use backtide_receiver_api::MarkPoint;
use backtide_recovery::{Base, ImageCost, LogError, Snapshot, TimedLsn};
use backtide_units::{ByteCount, Lsn};

use crate::{
    points,
    retention::{Plan, PlanError, every_change_from},
};

/// Images of a plan whose cost is looked up; that of others is taken to be like theirs.
const COSTS_MAX: usize = 128;

/// What it would do to one log.
pub(super) struct LogPreview {
    log: Snapshot,
    /// From here on every point would be kept; none when single points would be left at most.
    pub(super) floor: Option<TimedLsn>,
    /// Single points that would be kept.
    pub(super) keep: Vec<TimedLsn>,
    /// Single points that would go.
    pub(super) drop: Vec<TimedLsn>,
    /// Bytes of segments that would go.
    pub(super) freed: ByteCount,
    pub(super) cost: ImageCost,
    /// Whether anything would happen.
    pub(super) changes: bool,
}

impl LogPreview {
    /// Of a log that stands alone, with its plan if there is one; blocks.
    pub(super) fn of(log: Snapshot, plan: Option<Plan>) -> Result<Self, PlanError> {
        let floor = match &plan {
            Some(Plan { ends: true, .. }) => None,
            Some(Plan { fold: Some((_, floor)), .. }) => Some(*floor),
            Some(_) | None => every_change_from(&log),
        };
        let freed = match &plan {
            Some(Plan { ends: true, .. }) => log.segment_bytes(),
            Some(Plan { fold: Some((fold, _)), .. }) => fold.bytes,
            Some(_) | None => ByteCount::ZERO,
        };
        let (cost, changes) = (cost(&log, plan.as_ref())?, plan.is_some());
        let (keep, drop) =
            plan.map_or_else(|| (single_points(&log), Vec::new()), |plan| (plan.kept, plan.dropped));
        Ok(Self { log, floor, keep, drop, freed, cost, changes })
    }

    /// Marks that would go.
    pub(super) fn drop_marks(&self) -> Vec<MarkPoint> {
        let is_below = |mark: &MarkPoint| self.floor.is_none_or(|floor| mark.lsn < floor.lsn);
        let goes = |mark: &MarkPoint| {
            mark.recoverable && is_below(mark) && !self.keep.iter().any(|kept| kept.lsn == mark.lsn)
        };
        points::marks(self.log.timeline()).into_iter().filter(goes).collect()
    }
}

/// The single points of a log that stands alone.
pub(super) fn single_points(log: &Snapshot) -> Vec<TimedLsn> {
    log.base().iter().flat_map(|base| base.kept()).map(|kept| kept.at).collect()
}

/// About what it costs to make the images of a plan: of many of them it looks at some.
fn cost(log: &Snapshot, plan: Option<&Plan>) -> Result<ImageCost, LogError> {
    let Some(plan) = plan.filter(|plan| plan.ends || plan.fold.is_some()) else {
        return Ok(ImageCost::default());
    };
    let floor = plan.fold.map(|(_, floor)| floor);
    let old = log.base().and_then(Base::floor).map_or(Lsn::ZERO, |floor| floor.at.lsn);
    let new = plan.kept.iter().chain(&floor).map(|point| point.lsn).filter(|lsn| *lsn > old);
    let points: Vec<Lsn> = [old].into_iter().chain(new).collect();
    let steps = points.len().saturating_sub(1);
    let (tried, mut known) = (steps.min(COSTS_MAX), 0);
    let mut cost = ImageCost::default();
    for nth in 0..tried {
        let step = nth * steps / tried;
        let one = match log.image_cost(points[step], points[step + 1]) {
            Ok(one) => one,
            // It is not made before that is mended; what is told is about the others.
            Err(LogError::Damaged { .. }) => continue,
            Err(error) => return Err(error),
        };
        known += 1;
        cost.read.0 += one.read.0;
        cost.written_max.0 += one.written_max.0;
    }
    let scaled = |bytes: ByteCount| {
        let all = u128::from(bytes.0) * steps as u128 / known.max(1);
        ByteCount(u64::try_from(all).unwrap_or(u64::MAX))
    };
    Ok(ImageCost { read: scaled(cost.read), written_max: scaled(cost.written_max) })
}
