//! Asking an agent. Every method is the call of the same name in [`crate::AgentService`].

use std::time::Instant;

use backtide_control::{Address, ApiError, Client, ErrorCode, Peer, Tell};
use backtide_units::DiskName;
use serde::de::DeserializeOwned;

use crate::changes::{FOLLOW_TIME, GoesOn};
use crate::{
    AgentKeptOverlay, AgentMount, AgentMountRequest, AgentMounts, AgentOverlayFate, AgentRemountRequest,
    AgentStatus, AttachRequest, DetachRequest, DiskStatus, FailbackReport, FailbackRequest, LimitsChange,
    MarkReport, MarkRequest, ResizeReport, ResizeRequest, ResyncRequest, RewindReport, RewindRequest,
    VerifyRequest, VerifyStatus,
};

/// The agent, in the words of errors.
pub const AGENT: Peer =
    Peer { name: "agent", start: "backtide agent run", flag: "--agent", variable: "BACKTIDE_AGENT" };

const NO_QUERY: &[(&str, &str)] = &[];

/// An agent's control API. Cheap to clone.
#[derive(Clone, Debug)]
pub struct AgentClient {
    client: Client,
}

impl AgentClient {
    /// Of the agent at `address`.
    ///
    /// # Errors
    /// When the HTTP client cannot be made; an agent that is not there shows at the first call.
    pub fn new(address: &Address) -> Result<Self, ApiError> {
        Ok(Self { client: Client::new(address, AGENT)? })
    }

    /// The same, and `tell` hears of calls that take long.
    #[must_use]
    pub fn telling(self, tell: Tell) -> Self {
        Self { client: self.client.telling(tell) }
    }

    /// The same, with all the patience there is for every call: for whoever waits anyway.
    #[must_use]
    pub fn at_length(&self) -> Self {
        Self { client: self.client.at_length() }
    }

    /// Where the agent is asked.
    pub fn address(&self) -> &Address {
        self.client.address()
    }

    /// All disks, or the one named.
    ///
    /// # Errors
    /// The agent's own, or `unreachable`; so for every method here.
    pub async fn status(&self, disk: Option<&DiskName>) -> Result<AgentStatus, ApiError> {
        match disk {
            None => self.client.get("/v1/status", NO_QUERY).await,
            Some(disk) => self.client.get(&path(disk, ""), NO_QUERY).await,
        }
    }

    /// Has the program the agent was started from take over. Followed as a [rewind](Self::rewind); none when the agent has gone
    /// meanwhile, and its answer with it: whoever answers next says what became of it.
    ///
    /// # Errors
    /// As [`AgentClient::status`].
    pub async fn restart(&self) -> Result<Option<AgentStatus>, ApiError> {
        let client = self.client.at_length();
        let asked = client.post("/v1/restart", &()).await;
        let goes_on = asked.as_ref().is_err_and(|answer: &ApiError| GoesOn::of(answer).is_some());
        match followed(&client, asked).await {
            Err(ApiError { code: ErrorCode::Unreachable | ErrorCode::NotFound, .. }) if goes_on => Ok(None),
            answer => answer.map(Some),
        }
    }

    /// The status of one disk.
    ///
    /// # Errors
    /// As [`AgentClient::status`].
    pub async fn disk(&self, disk: &DiskName) -> Result<DiskStatus, ApiError> {
        let status = self.status(Some(disk)).await?;
        status.disks.into_iter().next().ok_or_else(|| {
            ApiError::new(
                ErrorCode::NotFound,
                format!("the agent answered nothing about disk {}", disk.as_str()),
            )
        })
    }

    /// Protects a disk. Followed as a [rewind](Self::rewind).
    ///
    /// # Errors
    /// As [`AgentClient::status`].
    pub async fn attach(&self, request: &AttachRequest) -> Result<DiskStatus, ApiError> {
        let client = self.client.at_length();
        followed(&client, client.post("/v1/disks", request).await).await
    }

    /// Ends protection cleanly. Followed as a [rewind](Self::rewind).
    ///
    /// # Errors
    /// As [`AgentClient::status`].
    pub async fn detach(&self, disk: &DiskName) -> Result<DiskStatus, ApiError> {
        self.detach_even(disk, DetachRequest::default()).await
    }

    /// The same of a disk that is not detached otherwise.
    ///
    /// # Errors
    /// As [`AgentClient::status`].
    pub async fn detach_even(&self, disk: &DiskName, request: DetachRequest) -> Result<DiskStatus, ApiError> {
        let DetachRequest { incomplete, force, nobody_returns } = request;
        let asked = [("incomplete", incomplete), ("force", force), ("nobody_returns", nobody_returns)];
        let asked: Vec<String> =
            asked.iter().filter(|(_, asked)| *asked).map(|(name, _)| format!("{name}=true")).collect();
        let query = if asked.is_empty() { String::new() } else { format!("?{}", asked.join("&")) };
        let client = self.client.at_length();
        followed(&client, client.delete(&path(disk, &query)).await).await
    }

    /// Takes over the size that the disk behind has grown to. Followed as a [rewind](Self::rewind).
    ///
    /// # Errors
    /// As [`AgentClient::status`].
    pub async fn resize(&self, disk: &DiskName, request: ResizeRequest) -> Result<ResizeReport, ApiError> {
        let client = self.client.at_length();
        followed(&client, client.post(&path(disk, "/resize"), &request).await).await
    }

    /// Sets a disk back to an earlier point of its history. An agent that takes longer than a call is followed to the end
    /// of it, for ten minutes at most.
    ///
    /// # Errors
    /// As [`AgentClient::status`].
    pub async fn rewind(&self, disk: &DiskName, request: RewindRequest) -> Result<RewindReport, ApiError> {
        let client = self.client.at_length();
        followed(&client, client.post(&path(disk, "/rewind"), &request).await).await
    }

    /// Has a disk go on with the image it had here before another agent had it. Followed as a [rewind](Self::rewind).
    ///
    /// # Errors
    /// As [`AgentClient::status`].
    pub async fn failback(
        &self,
        disk: &DiskName,
        request: &FailbackRequest,
    ) -> Result<FailbackReport, ApiError> {
        let client = self.client.at_length();
        followed(&client, client.post(&path(disk, "/failback"), request).await).await
    }

    /// Stops forwarding.
    ///
    /// # Errors
    /// As [`AgentClient::status`].
    pub async fn pause(&self, disk: &DiskName) -> Result<DiskStatus, ApiError> {
        self.client.post(&path(disk, "/pause"), &()).await
    }

    /// Forwards again.
    ///
    /// # Errors
    /// As [`AgentClient::status`].
    pub async fn resume(&self, disk: &DiskName) -> Result<DiskStatus, ApiError> {
        self.client.post(&path(disk, "/resume"), &()).await
    }

    /// Forces a resync.
    ///
    /// # Errors
    /// As [`AgentClient::status`].
    pub async fn resync(&self, disk: &DiskName, request: ResyncRequest) -> Result<DiskStatus, ApiError> {
        self.client.post(&path(disk, "/resync"), &request).await
    }

    /// Changes bounds of an attached disk.
    ///
    /// # Errors
    /// As [`AgentClient::status`].
    pub async fn set_limits(&self, disk: &DiskName, change: LimitsChange) -> Result<DiskStatus, ApiError> {
        self.client.post(&path(disk, "/limits"), &change).await
    }

    /// Marks disks at one instant.
    ///
    /// # Errors
    /// As [`AgentClient::status`].
    pub async fn mark(&self, request: &MarkRequest) -> Result<MarkReport, ApiError> {
        self.client.at_length().post("/v1/marks", request).await
    }

    /// Serves a point of a disk on the agent's host. Followed as a [rewind](Self::rewind), as all that is done with mounts.
    ///
    /// # Errors
    /// As [`AgentClient::status`].
    pub async fn mount(&self, request: &AgentMountRequest) -> Result<AgentMount, ApiError> {
        let client = self.client.at_length();
        followed(&client, client.post("/v1/mounts", request).await).await
    }

    /// What is served so.
    ///
    /// # Errors
    /// As [`AgentClient::status`].
    pub async fn mounts(&self) -> Result<AgentMounts, ApiError> {
        self.client.get("/v1/mounts", NO_QUERY).await
    }

    /// Serves a point no longer; `overlay` says what becomes of its overlay, if it has one.
    ///
    /// # Errors
    /// As [`AgentClient::status`].
    pub async fn unmount(&self, id: &str, overlay: Option<AgentOverlayFate>) -> Result<AgentMount, ApiError> {
        let query = match overlay {
            None => "",
            Some(AgentOverlayFate::Keep) => "?overlay=keep",
            Some(AgentOverlayFate::Discard) => "?overlay=discard",
        };
        self.end_mount(id, query).await
    }

    /// The same of a mount that NBD clients may have open: it is taken from them.
    ///
    /// # Errors
    /// As [`AgentClient::status`].
    pub async fn unmount_by_force(
        &self,
        id: &str,
        overlay: Option<AgentOverlayFate>,
    ) -> Result<AgentMount, ApiError> {
        let query = match overlay {
            None => "?force=true",
            Some(AgentOverlayFate::Keep) => "?overlay=keep&force=true",
            Some(AgentOverlayFate::Discard) => "?overlay=discard&force=true",
        };
        self.end_mount(id, query).await
    }

    async fn end_mount(&self, id: &str, query: &str) -> Result<AgentMount, ApiError> {
        let client = self.client.at_length();
        followed(&client, client.delete(&format!("/v1/mounts/{}{query}", mount_id(id)?)).await).await
    }

    /// Serves an overlay again that was kept.
    ///
    /// # Errors
    /// As [`AgentClient::status`].
    pub async fn remount(&self, id: &str, request: &AgentRemountRequest) -> Result<AgentMount, ApiError> {
        let client = self.client.at_length();
        followed(&client, client.post(&format!("/v1/overlays/{}/mount", mount_id(id)?), request).await).await
    }

    /// Removes an overlay that is not served.
    ///
    /// # Errors
    /// As [`AgentClient::status`].
    pub async fn discard(&self, id: &str) -> Result<AgentKeptOverlay, ApiError> {
        let client = self.client.at_length();
        followed(&client, client.delete(&format!("/v1/overlays/{}", mount_id(id)?)).await).await
    }

    /// Begins a verify.
    ///
    /// # Errors
    /// As [`AgentClient::status`].
    pub async fn start_verify(
        &self,
        disk: &DiskName,
        request: VerifyRequest,
    ) -> Result<VerifyStatus, ApiError> {
        self.client.post(&path(disk, "/verify"), &request).await
    }

    /// The verify that is running, or the last one.
    ///
    /// # Errors
    /// As [`AgentClient::status`].
    pub async fn verify_status(&self, disk: &DiskName) -> Result<VerifyStatus, ApiError> {
        self.client.get(&path(disk, "/verify"), NO_QUERY).await
    }

    /// Ends the verify that is running.
    ///
    /// # Errors
    /// As [`AgentClient::status`].
    pub async fn cancel_verify(&self, disk: &DiskName) -> Result<VerifyStatus, ApiError> {
        self.client.delete(&path(disk, "/verify")).await
    }
}

/// The answer at the end of a change that goes on.
async fn followed<A: DeserializeOwned>(client: &Client, answer: Result<A, ApiError>) -> Result<A, ApiError> {
    let (began, mut answer) = (Instant::now(), answer);
    loop {
        let goes_on = answer.as_ref().err().and_then(GoesOn::of);
        let Some(GoesOn { change, .. }) = goes_on.filter(|_| began.elapsed() < FOLLOW_TIME) else {
            return answer;
        };
        answer = client.get(&format!("/v1/changes/{change}"), NO_QUERY).await;
    }
}

/// Disk names need no escaping in a path: that is what they are restricted for.
fn path(disk: &DiskName, call: &str) -> String {
    format!("/v1/disks/{}{call}", disk.as_str())
}

/// It goes into a path.
fn mount_id(id: &str) -> Result<&str, ApiError> {
    if id.is_empty() || !id.bytes().all(|byte| byte.is_ascii_alphanumeric() || b"-_.".contains(&byte)) {
        return Err(ApiError::new(ErrorCode::NotFound, format!("there is no mount {id:?} at the agent")));
    }
    Ok(id)
}
