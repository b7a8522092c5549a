//! What bounds a log.

use backtide_segment::{Compression, WriterOptions};
use backtide_units::ByteCount;

/// Limits of one log.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct LogOptions {
    /// A segment is sealed when it would grow beyond this. Default 64 MiB, at most 2 GiB.
    pub segment_bytes_max: ByteCount,
    /// A segment is sealed at so many index extents: bounds memory. Default 262,144.
    pub segment_extents_max: u32,
    /// Entries are held back until so many bytes are waiting, a ticket is taken, or a view.
    /// Default 1 MiB.
    pub buffer_bytes_max: ByteCount,
    /// Space is reserved in steps of this, so that a sync need not grow the file; in smaller ones while a segment is
    /// small. Default 8 MiB.
    pub allocation_step: ByteCount,
    /// Memory of the directory that finds segments by the buckets they touch; beyond it, and beyond 1.75 bytes
    /// a record, look-ups look into more segments than have what is looked for. Default 64 MiB.
    pub directory_bytes_max: ByteCount,
    /// How payloads are stored. Default: as they came.
    pub compression: Compression,
}

impl LogOptions {
    pub(super) fn writer(&self) -> WriterOptions {
        WriterOptions {
            buffer_bytes_max: self.buffer_bytes_max,
            allocation_step: self.allocation_step,
            compression: self.compression,
        }
    }
}

impl Default for LogOptions {
    fn default() -> Self {
        Self {
            segment_bytes_max: ByteCount(64 << 20),
            segment_extents_max: 1 << 18,
            buffer_bytes_max: ByteCount(1 << 20),
            allocation_step: ByteCount(8 << 20),
            directory_bytes_max: ByteCount(64 << 20),
            compression: Compression::None,
        }
    }
}
