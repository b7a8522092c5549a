//! Asking a receiver. Every method is the call of the same name in [`crate::ReceiverService`].

use backtide_control::{Address, ApiError, Client, ErrorCode, Peer, Tell};
use backtide_units::DiskName;

use crate::{
    AroundReport, DiffReport, DiffRequest, Dismissed, FindChangeRequest, ForgottenDisk, FoundChange,
    KeepRequest, KeptOverlay, LockRequest, Mount, MountRequest, Mounts, OverlayFate, PointsReport,
    ReceiverDisks, ReceiverStatus, RemountRequest, ResolveRequest, ResolvedPoint, RetentionPreview,
    RetentionReport, RetentionRequest, ScrubRequest, ScrubStatus,
};

/// The receiver, in the words of errors.
pub const RECEIVER: Peer = Peer {
    name: "receiver",
    start: "backtide receiver run",
    flag: "--receiver",
    variable: "BACKTIDE_RECEIVER",
};

const NO_QUERY: &[(&str, &str)] = &[];

/// A receiver's control API. Cheap to clone.
#[derive(Clone, Debug)]
pub struct ReceiverClient {
    client: Client,
}

impl ReceiverClient {
    /// Of the receiver at `address`.
    ///
    /// # Errors
    /// When the HTTP client cannot be made; a receiver that is not there shows at the first call.
    pub fn new(address: &Address) -> Result<Self, ApiError> {
        Ok(Self { client: Client::new(address, RECEIVER)? })
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

    /// Where the receiver is asked.
    pub fn address(&self) -> &Address {
        self.client.address()
    }

    /// The receiver as a whole.
    ///
    /// # Errors
    /// The receiver's own, or `unreachable`; so for every method here.
    pub async fn status(&self) -> Result<ReceiverStatus, ApiError> {
        self.client.get("/v1/status", NO_QUERY).await
    }

    /// All disks, or the one named.
    ///
    /// # Errors
    /// As [`ReceiverClient::status`].
    pub async fn disks(&self, disk: Option<&DiskName>) -> Result<ReceiverDisks, ApiError> {
        match disk {
            None => self.client.get("/v1/disks", NO_QUERY).await,
            Some(disk) => self.client.get(&path(disk, ""), NO_QUERY).await,
        }
    }

    /// Removes a disk with all its history.
    ///
    /// # Errors
    /// As [`ReceiverClient::status`].
    pub async fn forget(&self, disk: &DiskName) -> Result<ForgottenDisk, ApiError> {
        self.client.at_length().delete(&path(disk, "")).await
    }

    /// Has it tell no more what the store once had less of.
    ///
    /// # Errors
    /// As [`ReceiverClient::status`].
    pub async fn dismiss(&self, disk: &DiskName) -> Result<Dismissed, ApiError> {
        self.client.delete(&path(disk, "/shortfalls")).await
    }

    /// A disk's timeline.
    ///
    /// # Errors
    /// As [`ReceiverClient::status`].
    pub async fn points(&self, disk: &DiskName) -> Result<PointsReport, ApiError> {
        self.client.get(&path(disk, "/points"), NO_QUERY).await
    }

    /// The points around a time.
    ///
    /// # Errors
    /// As [`ReceiverClient::status`].
    pub async fn around(&self, disk: &DiskName, time: &str) -> Result<AroundReport, ApiError> {
        self.client.at_length().post(&path(disk, "/around"), &ResolveRequest { point: time.to_owned() }).await
    }

    /// Which LSN a point is.
    ///
    /// # Errors
    /// As [`ReceiverClient::status`].
    pub async fn resolve(&self, disk: &DiskName, point: &str) -> Result<ResolvedPoint, ApiError> {
        self.client
            .at_length()
            .post(&path(disk, "/resolve"), &ResolveRequest { point: point.to_owned() })
            .await
    }

    /// What changed between two points.
    ///
    /// # Errors
    /// As [`ReceiverClient::status`].
    pub async fn diff(&self, disk: &DiskName, request: &DiffRequest) -> Result<DiffReport, ApiError> {
        self.client.at_length().post(&path(disk, "/diff"), request).await
    }

    /// When a block last changed before a point.
    ///
    /// # Errors
    /// As [`ReceiverClient::status`].
    pub async fn find_change(
        &self,
        disk: &DiskName,
        request: &FindChangeRequest,
    ) -> Result<FoundChange, ApiError> {
        self.client.at_length().post(&path(disk, "/find-change"), request).await
    }

    /// How long history is kept.
    ///
    /// # Errors
    /// As [`ReceiverClient::status`].
    pub async fn retention(&self, disk: Option<&DiskName>) -> Result<RetentionReport, ApiError> {
        match disk {
            None => self.client.get("/v1/retention", NO_QUERY).await,
            Some(disk) => self.client.get(&path(disk, "/retention"), NO_QUERY).await,
        }
    }

    /// Gives a disk another ladder.
    ///
    /// # Errors
    /// As [`ReceiverClient::status`].
    pub async fn set_retention(
        &self,
        disk: &DiskName,
        request: &RetentionRequest,
    ) -> Result<RetentionReport, ApiError> {
        self.client.at_length().post(&path(disk, "/retention"), request).await
    }

    /// What a ladder would do to a disk now.
    ///
    /// # Errors
    /// As [`ReceiverClient::status`].
    pub async fn preview_retention(
        &self,
        disk: &DiskName,
        request: &RetentionRequest,
    ) -> Result<RetentionPreview, ApiError> {
        self.client.at_length().post(&path(disk, "/retention/preview"), request).await
    }

    /// Keeps a point whatever the ladder says, or does so no longer.
    ///
    /// # Errors
    /// As [`ReceiverClient::status`].
    pub async fn keep(&self, request: &KeepRequest) -> Result<RetentionReport, ApiError> {
        self.client.at_length().post("/v1/retention/keep", request).await
    }

    /// Locks a point, or every point of a disk, until a time.
    ///
    /// # Errors
    /// As [`ReceiverClient::status`].
    pub async fn lock(&self, request: &LockRequest) -> Result<RetentionReport, ApiError> {
        self.client.at_length().post("/v1/retention/lock", request).await
    }

    /// Serves a point over NBD.
    ///
    /// # Errors
    /// As [`ReceiverClient::status`].
    pub async fn mount(&self, request: &MountRequest) -> Result<Mount, ApiError> {
        self.client.at_length().post("/v1/mounts", request).await
    }

    /// What is served.
    ///
    /// # Errors
    /// As [`ReceiverClient::status`].
    pub async fn mounts(&self) -> Result<Mounts, ApiError> {
        self.client.get("/v1/mounts", NO_QUERY).await
    }

    /// Starts a scrub.
    ///
    /// # Errors
    /// As [`ReceiverClient::status`].
    pub async fn scrub(&self, request: &ScrubRequest) -> Result<ScrubStatus, ApiError> {
        self.client.at_length().post("/v1/scrub", request).await
    }

    /// The scrub that runs, or ran last.
    ///
    /// # Errors
    /// As [`ReceiverClient::status`].
    pub async fn scrub_status(&self) -> Result<ScrubStatus, ApiError> {
        self.client.get("/v1/scrub", NO_QUERY).await
    }

    /// Calls the scrub off.
    ///
    /// # Errors
    /// As [`ReceiverClient::status`].
    pub async fn cancel_scrub(&self) -> Result<ScrubStatus, ApiError> {
        self.client.at_length().delete("/v1/scrub").await
    }

    /// Ends a mount; `overlay` says what becomes of its overlay, if it has one.
    ///
    /// # Errors
    /// As [`ReceiverClient::status`].
    pub async fn unmount(&self, id: &str, overlay: Option<OverlayFate>) -> Result<Mount, ApiError> {
        let query = match overlay {
            None => "",
            Some(OverlayFate::Keep) => "?overlay=keep",
            Some(OverlayFate::Discard) => "?overlay=discard",
        };
        self.end_mount(id, query).await
    }

    /// The same of a mount that NBD clients may have open: it is taken from them.
    ///
    /// # Errors
    /// As [`ReceiverClient::status`].
    pub async fn unmount_by_force(&self, id: &str, overlay: Option<OverlayFate>) -> Result<Mount, ApiError> {
        let query = match overlay {
            None => "?force=true",
            Some(OverlayFate::Keep) => "?overlay=keep&force=true",
            Some(OverlayFate::Discard) => "?overlay=discard&force=true",
        };
        self.end_mount(id, query).await
    }

    async fn end_mount(&self, id: &str, query: &str) -> Result<Mount, ApiError> {
        self.client.at_length().delete(&format!("/v1/mounts/{}{query}", mount_id(id)?)).await
    }

    /// Serves an overlay again that was kept.
    ///
    /// # Errors
    /// As [`ReceiverClient::status`].
    pub async fn remount(&self, id: &str, request: &RemountRequest) -> Result<Mount, ApiError> {
        self.client.at_length().post(&format!("/v1/overlays/{}/mount", mount_id(id)?), request).await
    }

    /// Removes an overlay that is not served.
    ///
    /// # Errors
    /// As [`ReceiverClient::status`].
    pub async fn discard(&self, id: &str) -> Result<KeptOverlay, ApiError> {
        self.client.at_length().delete(&format!("/v1/overlays/{}", mount_id(id)?)).await
    }
}

/// Mount ids are a disk's name and a number; anything else would change the path.
fn mount_id(id: &str) -> Result<&str, ApiError> {
    let allowed = |c: char| c.is_ascii_alphanumeric() || matches!(c, '-' | '_' | '.');
    let good = !id.is_empty() && !id.starts_with('.') && id.chars().all(allowed);
    if good { Ok(id) } else { Err(ApiError::new(ErrorCode::NotFound, format!("there is no mount {id:?}"))) }
}

/// Disk names need no escaping in a path: that is what they are restricted for.
fn path(disk: &DiskName, call: &str) -> String {
    format!("/v1/disks/{}{call}", disk.as_str())
}
