//! What an agent must be able to do to be served.

use backtide_control::ApiError;
use backtide_units::DiskName;

use crate::{
    AgentKeptOverlay, AgentMount, AgentMountRequest, AgentMounts, AgentRemountRequest, AgentStatus,
    AgentUnmountRequest, AttachRequest, DetachRequest, DiskStatus, FailbackReport, FailbackRequest,
    LimitsChange, MarkReport, MarkRequest, ResizeReport, ResizeRequest, ResyncRequest, RewindReport,
    RewindRequest, VerifyRequest, VerifyStatus,
};

/// The agent's side of the control API. A disk may be named by its name or its UUID.
///
/// Every call answers in a bounded time, whatever the receiver does: a change that takes longer is answered with `busy` and
/// [`GoesOn`](crate::GoesOn), goes on, and can be followed. An unknown disk is `not-found`.
pub trait AgentService: Send + Sync + 'static {
    /// All disks, or the one named.
    fn status(&self, disk: Option<DiskName>) -> impl Future<Output = Result<AgentStatus, ApiError>> + Send;

    /// Has the program the agent was started from, perhaps a newer one, take over. Answers when that
    /// program has passed a check and begins to follow, with the status of before: a status with
    /// another `instance` is the new one's, one with the same and a `restart_failure` says why not.
    ///
    /// `refused`: the program cannot start, or the agent runs inside of another command; `busy`: a
    /// disk stands still.
    fn restart(&self) -> impl Future<Output = Result<AgentStatus, ApiError>> + Send;

    /// Protects a disk. Succeeds also when its receiver is away: the status says so then.
    ///
    /// `exists`: a disk of that name is attached; `locked`: another process holds the image;
    /// `usage`: the image's size is no multiple of 512; `not-found`: there is no such image.
    fn attach(&self, request: AttachRequest) -> impl Future<Output = Result<DiskStatus, ApiError>> + Send;

    /// Ends protection cleanly and saves what is not at the receiver. Answers with the last status. `busy`:
    /// clients have it open; `refused`: its image lacks blocks, and that was not asked for.
    fn detach(
        &self,
        disk: DiskName,
        request: DetachRequest,
    ) -> impl Future<Output = Result<DiskStatus, ApiError>> + Send;

    /// Stops forwarding; changes are tracked. Nothing changes when it is paused already.
    fn pause(&self, disk: DiskName) -> impl Future<Output = Result<DiskStatus, ApiError>> + Send;

    /// Forwards again. Nothing changes when it is not paused.
    fn resume(&self, disk: DiskName) -> impl Future<Output = Result<DiskStatus, ApiError>> + Send;

    /// Begins a resync, or notes that one begins as soon as the receiver is there.
    fn resync(
        &self,
        disk: DiskName,
        request: ResyncRequest,
    ) -> impl Future<Output = Result<DiskStatus, ApiError>> + Send;

    /// Takes over the size that the disk behind has grown to. `busy`: clients have it open, which see the
    /// new size only once they connect again; `refused`: a disk cannot shrink.
    fn resize(
        &self,
        disk: DiskName,
        request: ResizeRequest,
    ) -> impl Future<Output = Result<ResizeReport, ApiError>> + Send;

    /// Sets a disk back to an earlier point of its history. `busy`: clients have it open, or it lacks blocks of
    /// the last such point; `refused`: it is not in sync, or the receiver has no such point; `unreachable`.
    fn rewind(
        &self,
        disk: DiskName,
        request: RewindRequest,
    ) -> impl Future<Output = Result<RewindReport, ApiError>> + Send;

    /// Has a disk go on here that another agent has had since: at its latest point, with the image it had, of which only
    /// what differs is fetched. `busy`: it is attached here; `not-found`: this agent has never had it; `refused`: nobody else
    /// has had it since, or the image cannot be the disk's.
    fn failback(
        &self,
        disk: DiskName,
        request: FailbackRequest,
    ) -> impl Future<Output = Result<FailbackReport, ApiError>> + Send;

    /// Changes bounds of an attached disk, now and for its next attach.
    fn set_limits(
        &self,
        disk: DiskName,
        change: LimitsChange,
    ) -> impl Future<Output = Result<DiskStatus, ApiError>> + Send;

    /// Marks all disks named at one instant: no write that began after one disk's mark was
    /// acknowledged before another's. All of them or none.
    fn mark(&self, request: MarkRequest) -> impl Future<Output = Result<MarkReport, ApiError>> + Send;

    /// Begins to compare the live disk with the receiver. `busy` when one is running, `refused`
    /// when the disk is not in sync mode and connected.
    fn start_verify(
        &self,
        disk: DiskName,
        request: VerifyRequest,
    ) -> impl Future<Output = Result<VerifyStatus, ApiError>> + Send;

    /// The verify that is running or, else, the last one. `not-found` when there was none.
    fn verify_status(&self, disk: DiskName) -> impl Future<Output = Result<VerifyStatus, ApiError>> + Send;

    /// Ends the verify that is running, if one is; its status, or the last one's. `not-found` when
    /// there was none.
    fn cancel_verify(&self, disk: DiskName) -> impl Future<Output = Result<VerifyStatus, ApiError>> + Send;

    /// Serves a point of a disk over NBD, read from its receiver. `unreachable`: the receiver is away; `refused`: it has no
    /// such point or does not give it to this agent; `usage`: nobody said which receiver.
    fn mount(&self, request: AgentMountRequest) -> impl Future<Output = Result<AgentMount, ApiError>> + Send;

    /// What is served so.
    fn mounts(&self) -> impl Future<Output = Result<AgentMounts, ApiError>> + Send;

    /// Serves it no longer, and answers with what it was. `not-found` when there is no such mount; `usage` when it is
    /// writable and nobody says what becomes of its overlay, or somebody does and it is not.
    fn unmount(
        &self,
        id: String,
        request: AgentUnmountRequest,
    ) -> impl Future<Output = Result<AgentMount, ApiError>> + Send;

    /// Serves an overlay again that was kept. `not-found` when there is none; `busy` when it is served; `damaged` when it
    /// cannot be read.
    fn remount(
        &self,
        id: String,
        request: AgentRemountRequest,
    ) -> impl Future<Output = Result<AgentMount, ApiError>> + Send;

    /// Removes an overlay for good that is only kept, and answers with what it was. `not-found` when there is none; `busy`
    /// when it is served.
    fn discard(&self, id: String) -> impl Future<Output = Result<AgentKeptOverlay, ApiError>> + Send;

    /// The answer of a call that was answered with [`GoesOn`](crate::GoesOn), when its change has ended. `busy` with the same
    /// when that goes on for longer; `not-found`: no such change is known, since the agent's start.
    fn change(&self, id: String) -> impl Future<Output = Result<serde_json::Value, ApiError>> + Send;
}
