//! Recovery points: intervals, holes, and views of a disk at an LSN.
//!
//! On the path of a write this is the receiver's store: [`DiskLog`] takes the entries of one disk in
//! order and makes them durable, [`Timeline`] says which points they give, a [`View`] reads the disk at
//! one of them. It is a library: no sockets, no clock, no threads of its own.

mod base;
mod cache;
mod check;
mod chores;
mod density;
mod directory;
mod disk_log;
mod ended;
mod error;
mod fold;
mod image_cost;
mod mend;
mod merge;
mod open_extents;
mod origin;
mod point;
mod recover;
mod repair;
mod resident;
mod salvage;
mod segment;
mod segments;
mod snapshot;
mod sweep;
mod ticket;
mod timeline;
mod touched;
mod view;

pub use base::{
    Apart, BASE_MAGIC, Base, Doubt, Elsewhere, FoundBase, KeptPoint, forget_bases, inspect_base,
    settle_closed, sync_names,
};
pub use cache::{CacheLimits, LogCache};
pub use check::{Checked, damaged_place};
pub use chores::LastWork;
pub use density::{Density, DensityPart};
pub use disk_log::{
    DiskLog, FoldError, Foldable, LogIdentity, LogOptions, RebaseError, RebaseTicket, Rebased, Recovered,
    SettleTicket,
};
pub use ended::rebase_closed;
pub use error::{AppendError, InvalidEntry, LogError, Nearest, PointError, TimedLsn};
pub use image_cost::ImageCost;
pub use mend::AskDisk;
pub use origin::{Removed, remove_unused};
pub use point::{ParsePointError, Point, ago, time_text};
pub use repair::settle_base;
pub use salvage::{Salvage, Unreadable, salvage};
pub use snapshot::Snapshot;
pub use ticket::{Durable, SyncOutcome, SyncTicket};
pub use timeline::{
    Attached, Forgotten, Hole, INTERVALS_MAX, Interval, MARKS_MAX, Mark, OpenPass, Takeover, Timeline,
};
pub use touched::{Known, Touched, TouchedSpan};
pub use view::{Allocation, View};

pub use backtide_segment::{Compression, Entry, PassContent, PassReason, SegmentId, Seq, inspect};
