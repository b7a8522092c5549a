//! The store against its checksums: what a scrub found, and how far it is.

use backtide_units::{ByteCount, CaptureTime, DiskId, DiskName};
use serde::{Deserialize, Serialize};

use crate::ForgottenDisk;

/// Read everything that is kept and check it.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct ScrubRequest {
    /// One disk's name or UUID. None: all disks.
    #[serde(default)]
    pub name: Option<DiskName>,
    /// The most that is read in a second; 0 is without limit. None: 64 MiB.
    #[serde(default)]
    pub bytes_per_second_max: Option<ByteCount>,
}

/// A scrub that runs, or the last one that ran.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct ScrubStatus {
    /// Whether it runs.
    pub running: bool,
    /// Whether it was called off before its end; while it runs, that it ends soon.
    pub cancelled: bool,
    /// When it began.
    pub started: CaptureTime,
    /// When it ended; none while it runs.
    pub ended: Option<CaptureTime>,
    /// Bytes read so far.
    pub done_bytes: ByteCount,
    /// Bytes to read, as far as that is known beforehand.
    pub total_bytes: ByteCount,
    /// The most that is read in a second; 0 is without limit.
    pub bytes_per_second_max: ByteCount,
    /// The disks that are done, in the order in which they were read: who was read longest ago comes first.
    pub disks: Vec<DiskCheck>,
    /// The overlays of mounts, after the disks.
    #[serde(default)]
    pub overlays: Vec<OverlayCheck>,
    /// Whether nothing is damaged in what was read so far.
    pub sound: bool,
}

/// One disk against its checksums.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct DiskCheck {
    /// Its name; none when nothing tells it any more.
    pub name: Option<DiskName>,
    /// Its identity.
    pub uuid: DiskId,
    /// Segment files read.
    pub segments: u64,
    /// Entries that are whole.
    pub entries: u64,
    /// Bytes read.
    pub bytes: ByteCount,
    /// What is damaged: a sentence each with file and place.
    pub damage: Vec<String>,
    /// Damaged places beyond those.
    pub more_damage: u64,
    /// What a scrub found damaged and has mended: it is whole again.
    #[serde(default)]
    pub mended: Vec<String>,
    /// Why it could not be read to its end, when it could not.
    pub error: Option<String>,
    /// Whether all of it was read and nothing is damaged.
    pub sound: bool,
}

/// What was written to a mounted point, against its checksums.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct OverlayCheck {
    /// Its id.
    pub id: String,
    /// The disk it lies over; none when its record is damaged.
    pub disk: Option<DiskName>,
    /// Bytes of blocks read.
    pub bytes: ByteCount,
    /// What is damaged: a sentence each with file and place.
    pub damage: Vec<String>,
    /// Damaged places beyond those.
    pub more_damage: u64,
    /// Why it could not be read, when it could not.
    pub error: Option<String>,
    /// Whether all of it was read and nothing is damaged.
    pub sound: bool,
}

/// A whole store against its checksums.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct StoreCheck {
    /// The store's directory.
    pub store: String,
    /// What is damaged outside the disks.
    pub damage: Vec<String>,
    /// Its disks.
    pub disks: Vec<DiskCheck>,
    /// Its overlays of mounts.
    #[serde(default)]
    pub overlays: Vec<OverlayCheck>,
    /// Disks that were forgotten; the next start of a receiver removes the rest of them, and nothing of it was read.
    #[serde(default)]
    pub forgotten: Vec<ForgottenDisk>,
    /// Whether nothing is damaged.
    pub sound: bool,
}
