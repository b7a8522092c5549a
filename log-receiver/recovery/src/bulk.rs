//! What a resync brings is let go from the page cache as soon as it is durable.
//!
//! A pass writes as much as the disk has data, at the speed of the device, and nobody reads it soon. Left in the
//! page cache it would push out what guests and readers have there, and each of its pages has to be found by the
//! system first, which can cost more than everything else that is done with the bytes. Let go of, the same few
//! pages take in the whole pass. What guests write stays: that is what is gone back to.
//!
//! Invariant: only advice about durable bytes; it is taken along by the ticket that makes them durable.

use std::sync::Arc;

use backtide_segment::{Entry, PassContent};
use backtide_storage::StorageFile;
use backtide_units::{ByteCount, ByteOffset, ByteRange};

/// Shorter payloads share their pages with other entries.
const PAYLOAD_MIN: ByteCount = ByteCount(64 << 10);

/// Stretches of segment files that passes wrote since the last ticket.
#[derive(Default)]
pub(crate) struct Bulk(Vec<BulkRange>);

/// One such stretch.
pub(crate) struct BulkRange {
    file: Arc<dyn StorageFile>,
    range: ByteRange,
}

impl Bulk {
    /// Whether the entry is one of those.
    pub(crate) fn is_bulk(entry: &Entry) -> bool {
        match entry {
            Entry::PassData { content: PassContent::Bytes { payload, .. }, .. } => {
                ByteCount::of(payload) >= PAYLOAD_MIN
            }
            Entry::PassData { content: PassContent::Zeroes, .. }
            | Entry::Unchanged { .. }
            | Entry::Write { .. }
            | Entry::Zero { .. }
            | Entry::Flush { .. }
            | Entry::PassBegin { .. }
            | Entry::PassEnd { .. }
            | Entry::Mark { .. }
            | Entry::Attach { .. } => false,
        }
    }

    /// Such an entry was appended to `file`, in `[start, end)`.
    pub(crate) fn note(&mut self, file: Arc<dyn StorageFile>, start: ByteOffset, end: ByteOffset) {
        match self.0.last_mut() {
            // What guests wrote between two of them goes along: one call for a ticket and a file.
            Some(last) if Arc::ptr_eq(&last.file, &file) && last.range.end() <= start => {
                last.range = ByteRange::between(last.range.start(), end);
            }
            Some(_) | None => self.0.push(BulkRange { file, range: ByteRange::between(start, end) }),
        }
    }

    /// For the ticket that covers all of them.
    pub(crate) fn take(&mut self) -> Vec<BulkRange> {
        std::mem::take(&mut self.0)
    }
}

impl BulkRange {
    pub(crate) fn let_go(&self) {
        self.file.let_go(self.range);
    }
}
