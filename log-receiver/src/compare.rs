//! Answers compare questions: which ranges hold something else here?
//!
//! A question is answered from a snapshot of the log taken when it came, so records that arrive
//! while it is being answered change nothing. It may read and hash much, so a driver runs it
//! on a thread that may block and goes on receiving; the answers of a connection keep their order.

use backtide_protocol::{Compare, CompareItem, CompareResult, Content};
use backtide_recovery::{Allocation, LogError, View};
use backtide_units::{ByteCount, ByteRange};

/// Extents are asked for in windows of this size: bounds memory on long ranges of zeroes.
const EXTENTS_WINDOW: ByteCount = ByteCount(1 << 30);

/// Bytes are read in pieces of at most this size.
const READ_PIECE: ByteCount = ByteCount(1 << 20);

/// A question with everything that is needed to answer it.
pub struct CompareJob {
    question: Compare,
    view: View,
}

impl CompareJob {
    pub(crate) fn new(question: Compare, view: View) -> Self {
        Self { question, view }
    }

    /// Reads and hashes; blocks. Damaged ranges count as different, so that the agent sends them
    /// again: that mends the newest version.
    ///
    /// # Errors
    /// When the log cannot be read for any other reason.
    pub fn run(self) -> Result<CompareResult, LogError> {
        let mut differing = Vec::new();
        for (position, item) in (0u32..).zip(&self.question.items) {
            if self.differs(item)? {
                differing.push(position);
            }
        }
        Ok(CompareResult { id: self.question.id, differing })
    }

    fn differs(&self, item: &CompareItem) -> Result<bool, LogError> {
        let same = match item.content {
            Content::Hash(hash) => {
                self.view.read(item.range).map(|bytes| *blake3::hash(&bytes).as_bytes() == hash)
            }
            Content::Zeroes => self.is_zero(item.range),
        };
        match same {
            Ok(same) => Ok(!same),
            Err(error @ LogError::Damaged { .. }) => {
                tracing::error!(%error, range = %item.range, "damaged data found by a compare, the agent sends it again");
                Ok(true)
            }
            Err(
                error @ (LogError::NoLog { .. }
                | LogError::LogExists { .. }
                | LogError::UnknownVersion { .. }
                | LogError::Poisoned
                | LogError::Full { .. }
                | LogError::Io { .. }),
            ) => Err(error),
        }
    }

    /// Whether the log has only zeroes in `range`. Reads nothing where the index knows so, and
    /// bounded pieces where it does not.
    fn is_zero(&self, range: ByteRange) -> Result<bool, LogError> {
        for window in range.split_at_multiples(EXTENTS_WINDOW) {
            for (extent, allocation) in self.view.extents(window)? {
                let sound = match allocation {
                    Allocation::Zero => true,
                    Allocation::Data => self.reads_zero(extent)?,
                };
                if !sound {
                    return Ok(false);
                }
            }
        }
        Ok(true)
    }

    fn reads_zero(&self, range: ByteRange) -> Result<bool, LogError> {
        for piece in range.split_at_multiples(READ_PIECE) {
            if self.view.read(piece)?.iter().any(|byte| *byte != 0) {
                return Ok(false);
            }
        }
        Ok(true)
    }
}
