//! Overlays that are served again: when the receiver starts, and when somebody asks.
//!
//! Invariant: what is served belongs to the receiver that serves it. A socket that another process answers on is not touched, and
//! what another store serves, of which this one is a copy, is not served here before somebody says so.

use std::time::Duration;

use backtide_export::NbdUri;
use backtide_receiver_api::{ApiError, ErrorCode, Mount};
use backtide_recovery::TimedLsn;
use backtide_units::DiskName;

use super::{Found, Service};
use crate::{
    mounts::{Plan, PlanOverlay},
    overlays::record::Record,
    points,
};

/// How often it is tried again.
const SERVE_LOOK: Duration = Duration::from_secs(2);

impl Service {
    /// Serves the overlays that were served when the receiver ended. One that cannot be is told as an alarm, and tried again.
    pub(crate) async fn serve_again(&self) {
        let overlays = self.overlays.clone();
        if let Err(error) = self.read(move || overlays.leave_to_the_original()).await {
            tracing::error!(why = error.message, "it is not known which mounts are another store's");
            return;
        }
        for record in self.overlays.served() {
            self.try_to_serve(record).await;
        }
    }

    /// Goes on trying what could not be served; never ends.
    pub(crate) async fn keep_serving(&self) {
        loop {
            tokio::time::sleep(SERVE_LOOK).await;
            for record in self.overlays.waiting() {
                self.try_to_serve(record).await;
            }
        }
    }

    async fn try_to_serve(&self, record: Record) {
        let (id, uri) = (record.id.clone(), record.uri.clone().unwrap_or_default());
        let served = match self.allowed_place(record.uri) {
            Ok(uri) => self.serve_overlay(id.clone(), uri).await.map(drop),
            Err(error) => Err(error),
        };
        let Err(error) = served else { return };
        let why = format!("it is not served at {uri}, which is tried again: {}", error.message);
        if self.overlays.wait(&id, &why) {
            tracing::error!(overlay = id, why, "a writable mount is not served");
        }
    }

    pub(super) async fn serve_overlay(&self, id: String, uri: Option<NbdUri>) -> Result<Mount, ApiError> {
        let record = self.overlays.record(&id)?;
        // By its identity: the disk may have another name by now.
        let uuid: DiskName = record.disk.uuid.to_string().parse().expect("a UUID is a good name");
        let Found { snapshot, findings, .. } = self.look_at(&uuid).await?;
        let asked = format!("lsn:{}", record.lsn);
        let view = snapshot.view(record.lsn).map_err(|error| points::unavailable(&asked, &error))?;
        if view.disk_size() != record.disk.size {
            let why = format!(
                "overlay {id} is of a disk of {} bytes, at {asked} it has {}",
                record.disk.size,
                view.disk_size()
            );
            return Err(ApiError::new(ErrorCode::Damaged, why));
        }
        let at = TimedLsn { lsn: record.lsn, time: record.time };
        let overlay = Some(PlanOverlay::Kept(id));
        let (temporary, changed) = (false, None);
        self.serve(Plan { disk: record.disk, at, view, findings, uri, temporary, overlay, changed }).await
    }
}
