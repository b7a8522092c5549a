//! The log's files: segments of self-describing, checksummed records.

mod entry;
mod error;
mod ids;

pub use entry::{Entry, PAYLOAD_MAX, PassContent, PassReason, TEXT_MAX};
pub use error::SegmentError;
pub use ids::{Position, SegmentId, Seq};
