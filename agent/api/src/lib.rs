//! Request and response types of the agent's control API, the service behind it, and its client.
//!
//! The daemon implements [`AgentService`] and serves [`router`] of it; commands ask with
//! [`AgentClient`]. The types are the JSON, field by field: they are published in `docs/api.md`,
//! fields may be added and never change their meaning. Sizes are bytes, times microseconds since
//! the Unix epoch, unless a field's name says otherwise.

mod attach;
mod cache;
mod changes;
mod client;
mod format;
mod hydration;
mod mounts;
mod requests;
mod routes;
mod service;
mod status;
mod verify;

pub use attach::{AckPolicy, Adopted, AttachRequest, FromPoint, Limits, LimitsRequest, OnOutage, StreamTls};
pub use backtide_control::{Address, ApiError, ErrorCode};
pub use cache::CacheMode;
pub use changes::GoesOn;
pub use client::{AGENT, AgentClient};
pub use format::ImageFormat;
pub use hydration::{
    FailbackReport, FailbackRequest, HydrationKind, HydrationStatus, Origin, RewindReport, RewindRequest,
    Rewound,
};
pub use mounts::{
    AgentCache, AgentChangedSince, AgentKeptOverlay, AgentMount, AgentMountRequest, AgentMounts,
    AgentOverlay, AgentOverlayFate, AgentRemountRequest, AgentUnmountRequest,
};
pub use requests::{
    DetachRequest, DiskMark, LimitsChange, MARK_WAIT_MS, MARK_WAIT_MS_MAX, MarkReport, MarkRequest,
    MarkState, ResizeReport, ResizeRequest, ResyncExtent, ResyncRequest,
};
pub use routes::router;
pub use service::AgentService;
pub use status::{
    AgentStatus, Counters, Dirty, DiskStatus, GuestWaits, Lag, LsnStatus, Mode, PassKind, PeerError,
    ResyncStatus, Spill, StreamTlsStatus, Unreadable, Window,
};
pub use verify::{ByteSpan, DIFFERING_SPANS_MAX, VerifyRequest, VerifyState, VerifyStatus};

#[cfg(test)]
mod tests;
