//! What is appended to a disk's log, and how much of it is not durable yet.

use backtide_recovery::{AppendError, LogError};
use backtide_segment::{Bucket, DISK_SIZE_MAX, Entry, PassContent, Seq};
use backtide_units::ByteCount;

use super::{Disk, DiskError, Failure, Log, chain};
use crate::log_mark::Followed;

/// What an entry costs beside its payload.
const ENTRY_HEADER_BYTES: u64 = 64;

/// What an extent costs in the index of a segment that is written: an entry without a payload may have many.
const EXTENT_BYTES: u64 = 64;

/// So many times as much of a pass is gathered for a sync as of what guests write.
const PASS_GATHERS_LONGER: u64 = 8;

/// Undurable bytes are counted in groups of about this size.
const WAITING_GROUP_BYTES: u64 = 64 * 1024;

impl Disk {
    pub(crate) fn append(&mut self, entry: Entry, payload: ByteCount) -> Result<Seq, DiskError> {
        let (log, mark) = match &mut self.log {
            Log::Open(log, mark) => (log, mark),
            Log::Failed(failed) => return Err(DiskError::Store(failed.failure.why.clone())),
        };
        let followed = Followed::of(&entry);
        let ends_pass = matches!(entry, Entry::PassEnd { .. });
        let parts = if matches!(entry, Entry::PassData { .. }) { PASS_GATHERS_LONGER } else { 1 };
        let cost = ByteCount(payload.0 + ENTRY_HEADER_BYTES + EXTENT_BYTES * bare_extents(&entry));
        match log.append(entry) {
            Ok(seq) => {
                if let Some(loss) = &mut mark.loss {
                    loss.follow(seq, followed);
                }
                self.note_waiting(seq, cost);
                self.gathered += cost.0 / parts;
                self.pass_end = ends_pass.then_some(seq).or(self.pass_end);
                Ok(seq)
            }
            Err(AppendError::Invalid(invalid)) => Err(DiskError::Invalid(invalid.to_string())),
            // Nothing was written: the log itself is sound and goes on when there is space again. Where
            // a segment could not be closed that is not so, and only opening it again helps.
            Err(AppendError::Log(error @ LogError::Full { .. })) if !log.is_poisoned() => {
                Err(DiskError::Store(chain(&error)))
            }
            Err(AppendError::Log(error)) => {
                let failure = Failure::from(&error);
                self.fail(failure.clone());
                Err(DiskError::Store(failure.why))
            }
        }
    }

    /// Counts what is not durable yet, in groups: a group counts until its last entry is durable.
    fn note_waiting(&mut self, seq: Seq, bytes: ByteCount) {
        self.waiting_bytes += bytes.0;
        match self.waiting.back_mut() {
            Some((last, group)) if group.0 < WAITING_GROUP_BYTES => {
                *last = seq;
                group.0 += bytes.0;
            }
            Some(_) | None => self.waiting.push_back((seq, bytes)),
        }
    }
}

/// How many extents an entry without a payload becomes; those of a payload are little beside it.
fn bare_extents(entry: &Entry) -> u64 {
    match entry {
        Entry::Zero { range, .. } | Entry::PassData { range, content: PassContent::Zeroes, .. } => {
            // A range that no log takes is refused when it is appended.
            let known = range.end().0 <= DISK_SIZE_MAX.0;
            if known { Bucket::split(*range).len() as u64 } else { 0 }
        }
        Entry::Write { .. }
        | Entry::PassData { content: PassContent::Bytes { .. }, .. }
        | Entry::Flush { .. }
        | Entry::Unchanged { .. }
        | Entry::PassBegin { .. }
        | Entry::PassEnd { .. }
        | Entry::Mark { .. }
        | Entry::Attach { .. } => 0,
    }
}
