//! The live disk against the receiver, while the guest goes on: a job of the agent.
//!
//! Each run of blocks is compared at the LSN of the moment it is read, when no change of it is under
//! way; so a write in flight is never a difference.

use backtide_control::ApiError;
use backtide_units::{ByteCount, ByteOffset, CaptureTime, DiskName, Lsn};
use serde::{Deserialize, Serialize};

/// The most differing spans a report lists; more are counted only.
pub const DIFFERING_SPANS_MAX: usize = 1000;

/// Begin a verify.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct VerifyRequest {
    /// Send what differs anew when all is compared: the live disk is what the guest has.
    #[serde(default)]
    pub repair: bool,
}

/// A verify of one disk: running, or its result. The last one is kept until the next begins.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct VerifyStatus {
    /// The disk.
    pub disk: DiskName,
    /// Counts the verifies of this disk since it was attached; 1 is the first.
    pub id: u64,
    /// Where it stands.
    pub state: VerifyState,
    /// The LSN the last run so far was compared at.
    pub at: Option<Lsn>,
    /// The disk's last LSN when the verify began.
    pub from_lsn: Lsn,
    /// The disk's last LSN when it ended; none while it runs.
    pub to_lsn: Option<Lsn>,
    /// When it began.
    pub started: CaptureTime,
    /// When it ended.
    pub ended: Option<CaptureTime>,
    /// Bytes compared so far.
    pub compared_bytes: ByteCount,
    /// Bytes to compare.
    pub total_bytes: ByteCount,
    /// Bytes in spans that differ.
    pub differing_bytes: ByteCount,
    /// The spans that differ, ascending, at most [`DIFFERING_SPANS_MAX`].
    pub differing: Vec<ByteSpan>,
    /// How many spans differ.
    pub differing_count: u64,
    /// Why it failed, when it did.
    pub error: Option<ApiError>,
}

/// Where a verify stands.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum VerifyState {
    /// It is comparing.
    Running,
    /// Everything was compared; what differs is listed.
    Done,
    /// It could not compare everything.
    Failed,
}

/// Bytes of a disk.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub struct ByteSpan {
    /// The first one.
    pub offset: ByteOffset,
    /// How many.
    pub length: ByteCount,
}
