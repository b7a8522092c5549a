//! What a receiver must be able to do to be served.

use backtide_control::ApiError;
use backtide_units::DiskName;

use crate::{
    AroundReport, DiffReport, DiffRequest, Dismissed, FindChangeRequest, ForgottenDisk, FoundChange,
    KeepRequest, KeptOverlay, LockRequest, Mount, MountRequest, Mounts, PointsReport, ReceiverDisks,
    ReceiverStatus, RemountRequest, ResolveRequest, ResolvedPoint, RetentionPreview, RetentionReport,
    RetentionRequest, ScrubRequest, ScrubStatus, UnmountRequest,
};

/// The receiver's side of the control API. A disk may be named by its name or its UUID.
///
/// An unknown disk is `not-found`. A point that cannot be read is `usage`, one outside the
/// timeline `point-not-found`, one in a hole `point-in-hole`; the last two with
/// [`crate::UnavailablePoint`] as details. Damage of the store is `damaged`.
pub trait ReceiverService: Send + Sync + 'static {
    /// The receiver as a whole.
    fn status(&self) -> impl Future<Output = Result<ReceiverStatus, ApiError>> + Send;

    /// All disks, or the one named.
    fn disks(&self, disk: Option<DiskName>) -> impl Future<Output = Result<ReceiverDisks, ApiError>> + Send;

    /// Removes a disk with all its history, for good. `busy` while somebody uses it, `refused` while a point of it is
    /// locked.
    fn forget(&self, disk: DiskName) -> impl Future<Output = Result<ForgottenDisk, ApiError>> + Send;

    /// Tells no more what the store once had less of, of a disk whose agent has brought everything anew since. `refused` when there
    /// is nothing of that.
    fn dismiss(&self, disk: DiskName) -> impl Future<Output = Result<Dismissed, ApiError>> + Send;

    /// A disk's timeline.
    fn points(&self, disk: DiskName) -> impl Future<Output = Result<PointsReport, ApiError>> + Send;

    /// The points around a time, or around the time of a point.
    fn around(
        &self,
        disk: DiskName,
        request: ResolveRequest,
    ) -> impl Future<Output = Result<AroundReport, ApiError>> + Send;

    /// Which LSN a point is.
    fn resolve(
        &self,
        disk: DiskName,
        request: ResolveRequest,
    ) -> impl Future<Output = Result<ResolvedPoint, ApiError>> + Send;

    /// What changed between two points.
    fn diff(
        &self,
        disk: DiskName,
        request: DiffRequest,
    ) -> impl Future<Output = Result<DiffReport, ApiError>> + Send;

    /// When a block last changed before a point.
    fn find_change(
        &self,
        disk: DiskName,
        request: FindChangeRequest,
    ) -> impl Future<Output = Result<FoundChange, ApiError>> + Send;

    /// How long history is kept: of all disks, or of the one named.
    fn retention(
        &self,
        disk: Option<DiskName>,
    ) -> impl Future<Output = Result<RetentionReport, ApiError>> + Send;

    /// Gives a disk another ladder. What goes by it goes soon.
    fn set_retention(
        &self,
        disk: DiskName,
        request: RetentionRequest,
    ) -> impl Future<Output = Result<RetentionReport, ApiError>> + Send;

    /// What a ladder would do to a disk now.
    fn preview_retention(
        &self,
        disk: DiskName,
        request: RetentionRequest,
    ) -> impl Future<Output = Result<RetentionPreview, ApiError>> + Send;

    /// Keeps a point whatever the ladder says, or does so no longer.
    fn keep(&self, request: KeepRequest) -> impl Future<Output = Result<RetentionReport, ApiError>> + Send;

    /// Locks a point, or every point of a disk, until a time. One that would end a lock earlier is `refused`.
    fn lock(&self, request: LockRequest) -> impl Future<Output = Result<RetentionReport, ApiError>> + Send;

    /// Serves a point over NBD; ready for clients when this answers.
    fn mount(&self, request: MountRequest) -> impl Future<Output = Result<Mount, ApiError>> + Send;

    /// What is served.
    fn mounts(&self) -> impl Future<Output = Result<Mounts, ApiError>> + Send;

    /// Starts to read everything that is kept, or one disk, against its checksums.
    fn scrub(&self, request: ScrubRequest) -> impl Future<Output = Result<ScrubStatus, ApiError>> + Send;

    /// The scrub that runs, or ran last.
    fn scrub_status(&self) -> impl Future<Output = Result<ScrubStatus, ApiError>> + Send;

    /// Calls the scrub off; it ends soon.
    fn cancel_scrub(&self) -> impl Future<Output = Result<ScrubStatus, ApiError>> + Send;

    /// Serves an overlay again that was kept.
    fn remount(
        &self,
        id: String,
        request: RemountRequest,
    ) -> impl Future<Output = Result<Mount, ApiError>> + Send;

    /// Removes an overlay that is not served, for good. Answers with what it was.
    fn discard(&self, id: String) -> impl Future<Output = Result<KeptOverlay, ApiError>> + Send;

    /// Ends a mount and closes its connections. Answers with what it was.
    fn unmount(
        &self,
        id: String,
        request: UnmountRequest,
    ) -> impl Future<Output = Result<Mount, ApiError>> + Send;
}
