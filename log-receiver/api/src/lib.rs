//! Request and response types of the receiver's control API, the service behind it, and its client.
//!
//! The daemon implements [`ReceiverService`] and serves [`router`] of it; commands ask with
//! [`ReceiverClient`]. The types are the JSON, field by field: they are published in
//! `docs/api.md`, fields may be added and never change their meaning. Sizes are bytes, times
//! microseconds since the Unix epoch, unless a field's name says otherwise. Points are taken as
//! people write them (`latest`, `lsn:N`, an RFC 3339 time, `-5m`, `mark:NAME`): the receiver reads them.

mod check;
mod client;
mod going_back;
mod points;
mod retention;
mod routes;
mod service;
mod status;

pub use backtide_control::{Address, ApiError, ErrorCode};
pub use check::{
    DiskCheck, OverlayCheck, ScrubRequest, ScrubStatus, StoreCheck, Touched, TouchedKnown, TouchedPoints,
};
pub use client::{RECEIVER, ReceiverClient};
pub use going_back::{
    BlockChange, ByteSpan, ChangedBy, ChangedSince, DiffReport, DiffRequest, FindChangeRequest, FoundChange,
    KeptOverlay, Mount, MountOverlay, MountRequest, Mounts, OverlayFate, RemountRequest, ResolveRequest,
    ResolvedPoint, UnmountRequest,
};
pub use points::{
    AroundReport, Density, DensityPart, DiskRef, FlushPoints, Hole, Interval, MarkPoint, Point, PointsReport,
    UnavailablePoint,
};
pub use retention::{
    DiskRetention, HeldPoint, KeepRequest, Lock, LockRequest, RetentionPreview, RetentionReport,
    RetentionRequest,
};
pub use routes::router;
pub use service::ReceiverService;
pub use status::{
    CertificateStatus, CommitCounts, DiskOrigin, Dismissed, ForgottenDisk, ReceiverDisk, ReceiverDisks,
    ReceiverStatus, ScrubNext, StoreGrowth,
};

#[cfg(test)]
mod tests;
