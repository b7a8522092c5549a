//! The log's files: segments of self-describing, checksummed records.
//!
//! On the path of a write this is where it becomes durable. FORMAT.md beside this crate describes
//! every byte; this crate reads and writes them, one file at a time, and knows nothing of order
//! between files, recovery points, sockets or clocks.

mod attach;
mod batch;
mod body;
mod bucket;
mod compress;
mod contents;
mod entry;
mod entry_header;
mod entry_reader;
mod error;
mod footer;
mod guide;
mod header;
mod ids;
mod index;
mod index_block;
mod inspect;
mod lost_body;
mod mend;
mod pieces;
mod read;
mod scan;
mod scan_batch;
mod sealed;
mod verdict;
mod writer;

pub use attach::{AttachFacts, AttachOrigin};
pub use backtide_units::DISK_SIZE_MAX;
pub use body::Body;
pub use bucket::{Bucket, LEVELS};
pub use compress::Compression;
pub use contents::{Contents, RecordRun, SegmentStats, Step, Stretch};
pub use entry::{Entry, PAYLOAD_MAX, PassContent, PassReason, TEXT_MAX};
pub use entry_header::{ENTRY_HEADER_LENGTH, EntryHeader, EntryKind};
pub use entry_reader::EntryReader;
pub use error::SegmentError;
pub use guide::Guide;
pub use header::{MAGIC, SEGMENT_HEADER_LENGTH, SegmentHeader, VERSION};
pub use ids::{Position, SegmentId, Seq};
pub use index::{COARSE_LEVEL, Extent, ExtentKey, OpenIndex};
pub use index_block::IndexBlock;
pub use inspect::inspect;
pub use mend::Rebuilt;
pub use pieces::{EntryParts, KnownBody, PartSums};
pub use read::{HeaderScan, SegmentFile};
pub use scan::{Scanned, claims, scan, scan_prefix};
pub use sealed::{SealedSegment, Summary};
pub use verdict::{HeaderState, PayloadState, Verdict, verdict};
pub use writer::{SegmentWriter, WriterOptions, seal};
