//! The control API's answers about a disk's timeline: all of it, and what is around a time.

use backtide_receiver_api::{
    ApiError, AroundReport, DiskRef, ErrorCode, PointsReport, ResolveRequest, Touched,
};
use backtide_recovery::{Point, PointError, Snapshot, TimedLsn, ago};
use backtide_units::{DiskName, Lsn};

use super::{Found, Service};
use crate::{clock, points, touched};

/// Parts of the time in which a report says how much was written.
const DENSITY_PARTS: usize = 60;

impl Service {
    /// Everything a timeline tells. How much was written when is left out when the log cannot be read
    /// for it: then something worse is told.
    pub(super) async fn points_of(&self, disk: &DiskName) -> Result<PointsReport, ApiError> {
        let found = self.look_at(disk).await?;
        let (locks, connected) = (self.locks(found.disk.uuid), Some(found.came.is_some()));
        let snapshot = found.snapshot.clone();
        let density = self.read(move || snapshot.density(DENSITY_PARTS)).await?;
        let density = density.ok().flatten().map(points::density);
        let touched = touched_of(&found);
        let mut report = points::report(found.disk, found.snapshot.timeline(), found.damage);
        // A flush that was sent before a pass may tell of an LSN below the pass's, or history may have gone since.
        let timeline = found.snapshot.timeline();
        if report.flush_points.last.is_some_and(|last| !timeline.offers(last.lsn)) {
            let snapshot = found.snapshot.clone();
            let flushes = self.read(move || snapshot.flush_points(Lsn::MAX, 1)).await?;
            report.flush_points.last =
                flushes.ok().and_then(|found| found.first().copied()).map(points::point);
        }
        Ok(PointsReport { locks, density, touched, connected, ..report })
    }

    /// As [`Service::resolve_in`], with the disk's name in what it says, and why a time may be another moment than was meant.
    pub(super) async fn resolve_on(
        &self,
        disk: &DiskRef,
        snapshot: &Snapshot,
        asked: &str,
    ) -> Result<TimedLsn, ApiError> {
        let at = self.resolve_in(snapshot, asked).await;
        at.map_err(|error| points::told_for(error, asked, &disk.name, snapshot.timeline()))
    }

    /// The points around a time, or around that of a point.
    pub(super) async fn points_around(
        &self,
        disk: &DiskName,
        request: ResolveRequest,
    ) -> Result<AroundReport, ApiError> {
        let point: Point =
            request.point.parse().map_err(|error| ApiError::from_error(ErrorCode::Usage, &error))?;
        let found = self.look_at(disk).await?;
        let touched = touched_of(&found);
        let Found { disk, snapshot, damage, came, .. } = found;
        let time = match point {
            Point::Time(time) => {
                let now = snapshot.refuse_future(time, clock::now());
                now.map_err(|error| points::unavailable(&request.point, &error))?;
                time
            }
            Point::Ago(duration) => ago(clock::now(), duration),
            Point::Latest | Point::Lsn(_) | Point::Mark(_) => {
                self.resolve_on(&disk, &snapshot, &request.point).await?.time
            }
        };
        let asked = request.point.clone();
        let warning = points::of_time(&asked, &disk.name, snapshot.timeline(), came);
        let found = self.read(move || points::around(disk, request.point, &snapshot, time)).await?;
        let report = found.map_err(|error: PointError| points::unavailable(&asked, &error))?;
        Ok(AroundReport { warning, damage, touched, ..report })
    }
}

/// What the damage of a disk's log touches, as far as it is known.
fn touched_of(found: &Found) -> Vec<Touched> {
    let lost = found.damage.iter().map(|why| (why, found.snapshot.lost_with(why)));
    let lost = lost.filter(|(_, lost)| !lost.spans.is_empty());
    let mut touched: Vec<_> = lost.map(|(why, lost)| touched::touched(why, &lost)).collect();
    touched.extend(found.findings.all().into_iter().filter_map(|finding| finding.touched));
    touched.dedup_by(|next, one| next.place == one.place);
    touched
}
