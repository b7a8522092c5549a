//! What differs between a disk and the receiver's copy: dirty bitmaps and the activity log in
//! memory, and the tracking file that makes both outlive the agent and the host.

mod activity;
mod bitmap;
mod extents;
mod file;
mod record;
mod saved;
mod snapshot;

pub use activity::{ActivityLog, Captured, Sequence};
pub use bitmap::DirtyBitmap;
pub use extents::{ActivityLimits, ExtentRun};
pub use file::{ImageSeen, LoadError, Loaded, SignOfLife, TrackingFile};
pub use record::LogRecord;
pub use saved::{SavedError, SavedTracking};
pub use snapshot::Snapshot;
