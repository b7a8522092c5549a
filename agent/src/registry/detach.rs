//! The end of one disk that somebody asks for: its record stays, so that an attach under its name goes on.

use backtide_agent_api::{DetachRequest, DiskStatus};
use backtide_control::{ApiError, ErrorCode};
use backtide_io_filter::Resume;
use backtide_tracking::Snapshot;
use backtide_units::DiskName;

use super::{
    Attached, Registry,
    errors::{self, failed, not_saved, refuse_incomplete},
    left::Left,
    place::Place,
};
use crate::{
    disk::{self, Clientele, Command, Leaving},
    qcow2::NotEnded,
    record::DiskRecord,
};

impl Registry {
    /// Detaches a disk.
    pub(crate) async fn detach(
        &self,
        name: &DiskName,
        request: DetachRequest,
    ) -> Result<DiskStatus, ApiError> {
        let name = match self.find(name).await {
            Ok((name, _)) => name,
            Err(unknown) => return self.detach_failing(name, request).await?.ok_or(unknown),
        };
        let _claim = self.claim(&name).await?;
        // It may have been detached while this waited.
        let (name, handle) = self.find(&name).await?;
        if !request.incomplete {
            refuse_incomplete(&handle).await?;
        }
        if !request.force {
            self.require_in_place(&name).await?;
        }
        let nobody_returns = request.nobody_returns;
        let leaving = if request.force { Leaving::Forced } else { Leaving::Asked { nobody_returns } };
        let answer = handle.ask_at_length(|answer| Command::Detach { leaving, answer }).await;
        let result = match answer.map_err(|error| failed(&error)) {
            // Its thread has ended without us: what is left of it goes all the same.
            Err(ended) => Err(ended),
            Ok(Err(error @ disk::DetachError::Open { .. })) => {
                return Err(errors::in_use(&name, &error));
            }
            Ok(Err(error @ disk::DetachError::Save { .. })) => Err(not_saved(&error)),
            Ok(Ok(status)) => Ok(status),
        };
        let attached = self.disks.write().await.remove(&name);
        self.forget_sockets(&name);
        let left = match attached {
            Some(Attached { qcow2, place, .. }) => Left::end(qcow2, place.map(Place::into_image)).await,
            None => Left::ByItsDisk,
        };
        let still_open = left.still_open().map(|error| still_open(&name, error));
        self.leave_image(&name).await;
        let saved = self.note_detached(&name, left, result.is_ok()).await;
        // What the disk's own thread could not save says more.
        let status = result?;
        saved?;
        still_open.map_or(Ok(status), Err)
    }

    /// Notes that a disk is not to be attached at the next start, and what its image looks like now.
    async fn note_detached(&self, name: &DiskName, left: Left, clean: bool) -> Result<(), ApiError> {
        let note = move |mut record: DiskRecord| {
            record.attached = false;
            record.clientele = Clientele::default();
            left.note(&mut record);
            record.image_at_detach.take_if(|_| !clean);
            Some(record)
        };
        self.records.change_aside(name, note).await.map_err(|source| {
            let path = self.records.directory();
            not_saved(&disk::DetachError::Save { path, source })
        })
    }

    /// A disk that was to be attached again before somebody asked for it, and whose attach failed, is tried on the terms of
    /// before. Nothing else of it changes: its guest waits at its socket.
    pub(super) async fn go_on_waiting(&self, as_it_was: DiskRecord) {
        let name = as_it_was.name.clone();
        let put_back = move |now: DiskRecord| {
            Some(now).filter(|now| *now != as_it_was).map(|now| now.on_terms_of(as_it_was))
        };
        if let Err(error) = self.records.change_aside(&name, put_back).await {
            tracing::error!(disk = %name, %error, "cannot save the disk's record: it is tried with what was asked for last");
        }
    }

    /// A disk whose attach failed is not attached again at the next start, and anybody's until the next attach.
    pub(super) async fn forget_attached(&self, name: &DiskName) {
        self.failing.write().await.remove(name);
        self.forget_sockets(name);
        let forget = |record: DiskRecord| {
            let is_kept = record.attached || record.stopped;
            is_kept.then(|| record.given_up())
        };
        if let Err(error) = self.records.change_aside(name, forget).await {
            tracing::error!(disk = %name, %error, "cannot save the disk's record");
        }
    }

    /// Nothing was written since the tracking file was taken: it is as good as before.
    pub(super) async fn put_back(&self, record: DiskRecord, resume: &Resume) {
        let Resume::Clean(saved) = resume else { return };
        let snapshot = Snapshot::first(saved.clone(), true, false);
        let name = record.name.clone();
        let put_back = self.records.aside(move |records| {
            let limits = disk::activity_limits(&record, record.size);
            records.create_tracking(&record.name, limits, record.size, &snapshot)?;
            records.save(&record)
        });
        if let Err(error) = put_back.await {
            tracing::error!(disk = %name, %error, "cannot put the tracking file back: everything will be compared");
        }
    }
}

/// A disk that is detached, and whose qcow2 file is not free.
fn still_open(name: &DiskName, error: &NotEnded) -> ApiError {
    let message = format!("disk {name} is detached, and its qcow2 file is still open: {error}");
    ApiError::new(ErrorCode::Busy, message).with_hint("nobody can have the file until that process has ended")
}
