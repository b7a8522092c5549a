//! Recovery points: intervals, holes, and views of a disk at an LSN.

mod cache;
mod disk_log;
mod error;
mod point;
mod snapshot;
mod timeline;

pub use cache::{CacheLimits, LogCache};
pub use disk_log::{DiskLog, Durable, LogIdentity, LogOptions, Recovered, SyncOutcome, SyncTicket};
pub use error::{AppendError, InvalidEntry, LogError, Nearest, PointError, TimedLsn};
pub use point::{ParsePointError, Point, time_text};
pub use snapshot::{Allocation, Snapshot, View};
pub use timeline::{Attached, Hole, Interval, Mark, OpenPass, Timeline};

pub use backtide_segment::{Entry, PassContent, PassReason, SegmentId, Seq};
