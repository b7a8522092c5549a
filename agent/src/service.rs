//! The control API's calls.

mod changes;

use std::{
    sync::Arc,
    time::{Duration, SystemTime},
};

use backtide_agent_api::{
    AgentKeptOverlay, AgentMount, AgentMountRequest, AgentMounts, AgentRemountRequest, AgentService,
    AgentStatus, AgentUnmountRequest, AttachRequest, DetachRequest, DiskStatus, FailbackReport,
    FailbackRequest, LimitsChange, MARK_WAIT_MS_MAX, MarkReport, MarkRequest, Mode, ResizeReport,
    ResizeRequest, ResyncExtent, ResyncRequest, RewindReport, RewindRequest, VerifyRequest, VerifyStatus,
};
use backtide_control::{ApiError, ErrorCode};
use backtide_export::NbdUri;
use backtide_io_filter::{MarkError, ResyncKind, VerifyError};
use backtide_protocol::message::LABEL_BYTES_MAX;
use backtide_units::DiskName;
use tokio::{
    sync::{Mutex, oneshot},
    task::JoinSet,
};

use self::changes::Changes;
use crate::{
    disk::{self, Command, NoAnswer},
    marks::{self, MarksError},
    mounts::{Mounts, Wanted},
    registry::{Registry, refuse_taken_away},
    restart::Restart,
};

/// Serves the calls out of the registry.
pub(crate) struct Service {
    registry: Arc<Registry>,
    mounts: Arc<Mounts>,
    restart: Arc<Restart>,
    /// One mark at a time: two that hold disks in different orders would wait for each other.
    marking: Arc<Mutex<()>>,
    changes: Changes,
    /// Where every disk is served.
    nbd_listen: Option<String>,
}

impl Service {
    pub(crate) fn new(
        registry: Arc<Registry>,
        mounts: Arc<Mounts>,
        restart: Arc<Restart>,
        nbd_listen: Option<String>,
    ) -> Arc<Self> {
        let (marking, changes) = (Arc::default(), Changes::default());
        Arc::new(Self { registry, mounts, restart, marking, changes, nbd_listen })
    }

    async fn ask<T>(
        &self,
        disk: &DiskName,
        command: impl FnOnce(oneshot::Sender<T>) -> Command,
    ) -> Result<T, ApiError> {
        let (name, handle) = self.registry.find(disk).await?;
        handle.ask(command).await.map_err(|error| no_answer(&name, error))
    }

    /// Why nothing was marked, and the way out.
    async fn unmarked(&self, error: &MarksError) -> ApiError {
        let refused = || ApiError::from_error(ErrorCode::Refused, error);
        let waiting = || refused().with_hint("wait until every disk is in sync");
        match error {
            MarksError::NotForwarding { disk, .. } => {
                let status = self.status(Some(disk.clone())).await;
                let paused =
                    status.is_ok_and(|status| status.disks.iter().any(|disk| disk.mode == Mode::Paused));
                match paused {
                    true => refused().with_hint(format!("`backtide resume {disk}` first")),
                    false => waiting(),
                }
            }
            MarksError::Mark(_) => waiting(),
            MarksError::NoAnswer { .. } => ApiError::from_error(ErrorCode::Busy, error),
        }
    }

    /// Of all disks; one that is being detached, which storage may hold up, says so.
    async fn status_of_all(&self) -> Vec<DiskStatus> {
        let mut asking = JoinSet::new();
        for handle in self.registry.handles().await {
            asking.spawn(async move { handle.status().await.ok().or_else(|| handle.leaving()) });
        }
        let mut disks: Vec<DiskStatus> = asking.join_all().await.into_iter().flatten().collect();
        for failing in self.registry.failing().await {
            // It may have been attached since its disks were asked.
            if disks.iter().all(|disk| disk.name != failing.name) {
                disks.push(failing);
            }
        }
        disks.sort_by(|one, other| one.name.cmp(&other.name));
        disks
    }
}

fn no_answer(disk: &DiskName, error: NoAnswer) -> ApiError {
    let message = match error {
        NoAnswer::Ended => format!("disk {disk} is being detached"),
        NoAnswer::Silent => {
            format!("disk {disk} is not answering: its image may be on storage that stands still")
        }
    };
    ApiError::new(ErrorCode::Busy, message)
}

impl AgentService for Service {
    async fn status(&self, disk: Option<DiskName>) -> Result<AgentStatus, ApiError> {
        // What a disk's thread says of its certificates is what was seen last.
        backtide_tls::look_again().await;
        let status = |disks| AgentStatus {
            version: env!("CARGO_PKG_VERSION").to_owned(),
            now: Some(SystemTime::now().into()),
            instance: self.restart.instance.to_string(),
            restart_failure: self.restart.failure(),
            nbd_listen: self.nbd_listen.clone(),
            certificate_warnings: backtide_tls::warnings(),
            disks,
        };
        let disks = match disk {
            Some(name) => {
                let failing = self.registry.failing().await;
                if let Some(disk) = failing
                    .into_iter()
                    .find(|disk| disk.name == name || disk.uuid.to_string() == name.as_str())
                {
                    return Ok(status(vec![disk]));
                }
                let (name, handle) = self.registry.find(&name).await?;
                vec![handle.status().await.map_err(|error| no_answer(&name, error))?]
            }
            None => self.status_of_all().await,
        };
        Ok(status(disks))
    }

    async fn restart(&self) -> Result<AgentStatus, ApiError> {
        let before = self.status(None).await?;
        let (restart, registry) = (Arc::clone(&self.restart), Arc::clone(&self.registry));
        self.changes.to_its_end(async move { restart.ask(&registry).await.map(|()| before) }).await
    }

    async fn attach(&self, request: AttachRequest) -> Result<DiskStatus, ApiError> {
        refuse_identity(&request.name)?;
        self.registry.check_place(nbd_uri(request.nbd.clone())?.as_ref())?;
        let registry = Arc::clone(&self.registry);
        self.changes.to_its_end(async move { registry.attach(request).await }).await
    }

    async fn detach(&self, disk: DiskName, request: DetachRequest) -> Result<DiskStatus, ApiError> {
        let registry = Arc::clone(&self.registry);
        self.changes.to_its_end(async move { registry.detach(&disk, request).await }).await
    }

    async fn resize(&self, disk: DiskName, request: ResizeRequest) -> Result<ResizeReport, ApiError> {
        let registry = Arc::clone(&self.registry);
        self.changes.to_its_end(async move { registry.resize(&disk, request).await }).await
    }

    async fn rewind(&self, disk: DiskName, request: RewindRequest) -> Result<RewindReport, ApiError> {
        let registry = Arc::clone(&self.registry);
        self.changes.to_its_end(async move { registry.rewind(&disk, request).await }).await
    }

    async fn failback(&self, disk: DiskName, request: FailbackRequest) -> Result<FailbackReport, ApiError> {
        let registry = Arc::clone(&self.registry);
        self.changes.to_its_end(async move { registry.failback(&disk, request).await }).await
    }

    async fn pause(&self, disk: DiskName) -> Result<DiskStatus, ApiError> {
        self.ask(&disk, Command::Pause).await
    }

    async fn resume(&self, disk: DiskName) -> Result<DiskStatus, ApiError> {
        self.ask(&disk, Command::Resume).await
    }

    async fn resync(&self, disk: DiskName, request: ResyncRequest) -> Result<DiskStatus, ApiError> {
        let kind = match request.extent {
            ResyncExtent::Changed => ResyncKind::Changed,
            ResyncExtent::Compare => ResyncKind::Compare,
            ResyncExtent::Full => ResyncKind::Full,
        };
        self.ask(&disk, |answer| Command::Resync(kind, answer)).await
    }

    async fn set_limits(&self, disk: DiskName, change: LimitsChange) -> Result<DiskStatus, ApiError> {
        self.ask(&disk, |answer| Command::Limits(change, answer)).await
    }

    async fn mark(&self, request: MarkRequest) -> Result<MarkReport, ApiError> {
        let MarkRequest { label, disks: names, wait_ms } = request;
        if wait_ms > MARK_WAIT_MS_MAX {
            let message = format!("a mark is waited for {MARK_WAIT_MS_MAX} ms at most, found {wait_ms}");
            return Err(ApiError::new(ErrorCode::Usage, message));
        }
        if label.is_empty() || label.len() > LABEL_BYTES_MAX {
            let error = MarkError::Label { found: label.len() };
            return Err(ApiError::from_error(ErrorCode::Usage, &error));
        }
        if label.chars().any(char::is_control) {
            return Err(ApiError::new(ErrorCode::Usage, "a label has no control characters"));
        }
        if names.is_empty() {
            return Err(ApiError::new(ErrorCode::Usage, "a mark needs at least one disk"));
        }
        let mut disks = Vec::with_capacity(names.len());
        for name in &names {
            let found = self.registry.find(name).await?;
            if disks.iter().any(|(known, _)| *known == found.0) {
                return Err(ApiError::new(ErrorCode::Usage, format!("disk {} is named twice", found.0)));
            }
            refuse_taken_away(&found.1.status().await.map_err(|error| no_answer(&found.0, error))?)?;
            disks.push(found);
        }
        // A task of its own: an asker that goes away must not leave the disks held.
        let marking = Arc::clone(&self.marking);
        let (named, marked_on) = (label.clone(), disks.clone());
        let marked = tokio::spawn(async move {
            let _only = marking.lock().await;
            marks::mark(&named, &marked_on).await
        });
        let marked = marked.await.map_err(|error| ApiError::from_error(ErrorCode::Failed, &error))?;
        let mut marks = match marked {
            Ok(marks) => marks,
            Err(error) => return Err(self.unmarked(&error).await),
        };
        marks::confirm(&label, disks, &mut marks, Duration::from_millis(wait_ms.into())).await;
        Ok(MarkReport { label, marks })
    }

    async fn start_verify(&self, disk: DiskName, request: VerifyRequest) -> Result<VerifyStatus, ApiError> {
        let now = self.ask(&disk, Command::Status).await?;
        refuse_taken_away(&now)?;
        self.ask(&disk, |answer| Command::StartVerify(request.repair, answer)).await?.map_err(|error| {
            let code = match error {
                VerifyError::Running => ErrorCode::Busy,
                VerifyError::NotInSync => ErrorCode::Refused,
                VerifyError::Interrupted | VerifyError::Cancelled | VerifyError::Read { .. } => {
                    ErrorCode::Failed
                }
            };
            let refused = ApiError::from_error(code, &error);
            match error {
                VerifyError::NotInSync if now.mode == Mode::Paused => refused.with_hint(format!(
                    "`backtide resume {disk}` first, then `backtide wait {disk} --for sync`"
                )),
                VerifyError::NotInSync => {
                    refused.with_hint(format!("`backtide wait {disk} --for sync` first"))
                }
                _ => refused,
            }
        })
    }

    async fn verify_status(&self, disk: DiskName) -> Result<VerifyStatus, ApiError> {
        self.ask(&disk, Command::VerifyStatus).await?.ok_or_else(|| not_verified(&disk))
    }

    async fn mount(&self, request: AgentMountRequest) -> Result<AgentMount, ApiError> {
        let AgentMountRequest { disk, lsn, receiver, stream_tls, changed_since, nbd, cache_bytes, writable } =
            request;
        if writable && changed_since.is_some() {
            let why = "a mount that tells what changed cannot be written: what is written changes it";
            return Err(ApiError::new(ErrorCode::Usage, why));
        }
        let nbd = nbd_uri(nbd)?;
        self.registry.check_place(nbd.as_ref())?;
        let (known, tls) = self.registry.receiver_of(disk).await?;
        let receiver = receiver.or(known).ok_or_else(|| {
            ApiError::new(ErrorCode::Usage, format!("this agent does not know the receiver of disk {disk}"))
                .with_hint("say where it takes streams: --stream ADDR")
        })?;
        let stream_tls = stream_tls.or(tls);
        disk::check_tls(&receiver, stream_tls.as_ref()).await?;
        let wanted = Wanted { disk, lsn, receiver, stream_tls, changed_since, nbd, cache_bytes, writable };
        let mounts = Arc::clone(&self.mounts);
        self.changes.to_its_end(async move { mounts.mount(wanted).await }).await
    }

    async fn mounts(&self) -> Result<AgentMounts, ApiError> {
        self.mounts.list().await
    }

    async fn unmount(&self, id: String, request: AgentUnmountRequest) -> Result<AgentMount, ApiError> {
        let mounts = Arc::clone(&self.mounts);
        self.changes.to_its_end(async move { mounts.unmount(id, request).await }).await
    }

    async fn remount(&self, id: String, request: AgentRemountRequest) -> Result<AgentMount, ApiError> {
        let nbd = nbd_uri(request.nbd)?;
        self.registry.check_place(nbd.as_ref())?;
        let mounts = Arc::clone(&self.mounts);
        self.changes.to_its_end(async move { mounts.remount(id, nbd).await }).await
    }

    async fn discard(&self, id: String) -> Result<AgentKeptOverlay, ApiError> {
        let mounts = Arc::clone(&self.mounts);
        self.changes.to_its_end(async move { mounts.discard(id).await }).await
    }

    async fn change(&self, id: String) -> Result<serde_json::Value, ApiError> {
        self.changes.follow(&id).await
    }

    async fn cancel_verify(&self, disk: DiskName) -> Result<VerifyStatus, ApiError> {
        self.ask(&disk, Command::CancelVerify).await?.ok_or_else(|| not_verified(&disk))
    }
}

fn nbd_uri(text: Option<String>) -> Result<Option<NbdUri>, ApiError> {
    let uri = text.map(|uri| uri.parse()).transpose();
    uri.map_err(|error| ApiError::from_error(ErrorCode::Usage, &error))
}

fn not_verified(disk: &DiskName) -> ApiError {
    ApiError::new(ErrorCode::NotFound, format!("disk {disk} has not been verified since its attach"))
}

/// A disk may be named by its UUID: no other disk's name may be written so.
fn refuse_identity(name: &DiskName) -> Result<(), ApiError> {
    if name.is_written_as_id() {
        let message = format!("{name} is written as a disk's UUID, which names another disk");
        return Err(ApiError::new(ErrorCode::Usage, message).with_hint("take another name"));
    }
    Ok(())
}

#[cfg(test)]
mod tests;
