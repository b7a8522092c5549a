//! The store against its checksums: what a scrub found, and how far it is.

use backtide_units::{ByteCount, CaptureTime, DiskId, DiskName, Lsn};
use serde::{Deserialize, Serialize};

use crate::{ByteSpan, ForgottenDisk, Point};

/// Read everything that is kept and check it.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct ScrubRequest {
    /// One disk's name or UUID. None: all disks.
    #[serde(default)]
    pub name: Option<DiskName>,
    /// The most that is read in a second; 0 is without limit. None: what the receiver is configured with.
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
    /// What was damaged outside the disks and overlays when it began: a sentence each with the file. Only of all disks.
    #[serde(default)]
    pub damage: Vec<String>,
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
    /// Which points the damaged places touch; nothing of those of which nobody can tell.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub touched: Vec<Touched>,
    /// What a scrub or a repair found damaged and has mended: it is whole again.
    #[serde(default)]
    pub mended: Vec<String>,
    /// What a repair has cut off, since nothing gives it back: a sentence each with the points that are lost.
    #[serde(default)]
    pub cut: Vec<String>,
    /// Why it could not be read to its end, when it could not.
    pub error: Option<String>,
    /// Whether all of it was read and nothing is damaged.
    pub sound: bool,
}

impl DiskCheck {
    /// Of a disk of which nothing has been read.
    pub fn unread(disk: DiskId) -> Self {
        Self {
            name: None,
            uuid: disk,
            segments: 0,
            entries: 0,
            bytes: ByteCount::ZERO,
            damage: Vec::new(),
            more_damage: 0,
            touched: Vec::new(),
            mended: Vec::new(),
            cut: Vec::new(),
            error: None,
            sound: false,
        }
    }
}

/// Which points of a disk a damaged place touches: those at which some byte cannot be read because of it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Touched {
    /// The place: its sentence in `damage`, without why it could not be mended.
    pub place: String,
    /// The points, and the bytes at them; empty when every point reads as before.
    pub points: Vec<TouchedPoints>,
    /// How well that is known.
    pub known: TouchedKnown,
    /// The same in a few words.
    pub text: String,
}

impl Touched {
    /// What damage touches, of all that is known of it: a sentence of `damage`, whatever it says of mending.
    pub fn by<'a>(all: &'a [Self], damage: &str) -> Option<&'a Self> {
        let is_of_it = |touched: &&Self| {
            let rest = damage.strip_prefix(&touched.place);
            rest.is_some_and(|rest| rest.is_empty() || rest.starts_with(": "))
        };
        all.iter().find(is_of_it)
    }

    /// Whether it is points of the past only: the newest one, and those to come, read as if nothing were damaged.
    pub fn is_past(&self) -> bool {
        self.known == TouchedKnown::Exact && self.points.iter().all(|points| !points.open && !points.lost)
    }

    /// Whether some byte of the point at `lsn` cannot be read because of the place, or may not.
    pub fn touches(&self, lsn: Lsn) -> bool {
        self.points.iter().filter(|points| !points.lost).any(|points| {
            let begun = points.from.is_none_or(|from| from.lsn <= lsn);
            begun && (points.open || points.to.is_none_or(|to| lsn <= to.lsn))
        })
    }
}

/// How well it is known which points a damaged place touches.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum TouchedKnown {
    /// Those, and no others: at each of them some byte of those that are named cannot be read.
    Exact,
    /// No others, and perhaps not all of those.
    AtMost,
    /// Those, and perhaps others: a read met it, and the next scrub looks for all of them.
    AtLeast,
}

/// Points one after the other, and bytes at them.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct TouchedPoints {
    /// The bytes of the disk; none when it may be any.
    pub bytes: Option<ByteSpan>,
    /// The first point; none when the first is still to come. Of lost points the last one before them, none when there is none.
    pub from: Option<Point>,
    /// The last point when this was found. Of lost points the first one behind them, none when there is none.
    pub to: Option<Point>,
    /// Whether points that come later need it too, until the bytes are written again.
    pub open: bool,
    /// Whether the points between `from` and `to`, without those two, are lost with the place: the timeline has a hole there.
    pub lost: bool,
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
    /// What of that a repair has written anew: a sentence each.
    #[serde(default)]
    pub repaired: Vec<String>,
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
