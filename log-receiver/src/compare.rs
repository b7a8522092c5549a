//! Answers compare questions: which ranges hold something else here?
//!
//! A question is answered from a snapshot of the log taken when it came, so records that arrive
//! while it is being answered change nothing. It may read and hash much, so a driver runs it
//! on a thread that may block and goes on receiving; the answers of a connection keep their order.

use backtide_protocol::{Compare, CompareItem, CompareResult, Content};
use backtide_recovery::{Allocation, LogError, View};
use backtide_units::{ByteCount, ByteRange, is_zeroes};

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
        Ok(self.run_while(|| true)?.expect("an answer that is always wanted is always given"))
    }

    /// As [`CompareJob::run`], but gives up with `None` soon after `wanted` says no: it is asked
    /// before each item, and within long ranges of zeroes.
    ///
    /// # Errors
    /// As [`CompareJob::run`].
    pub fn run_while(self, wanted: impl Fn() -> bool) -> Result<Option<CompareResult>, LogError> {
        let mut differing = Vec::new();
        for (position, item) in (0u32..).zip(&self.question.items) {
            if !wanted() {
                return Ok(None);
            }
            match self.differs(item, &wanted)? {
                Some(true) => differing.push(position),
                Some(false) => {}
                None => return Ok(None),
            }
        }
        Ok(Some(CompareResult { id: self.question.id, differing }))
    }

    /// `None` when the answer is not wanted any more.
    fn differs(&self, item: &CompareItem, wanted: &impl Fn() -> bool) -> Result<Option<bool>, LogError> {
        let same = match item.content {
            Content::Hash(hash) => {
                self.view.read(item.range).map(|bytes| Some(*blake3::hash(&bytes).as_bytes() == hash))
            }
            Content::Zeroes => self.is_zero(item.range, wanted),
        };
        match same {
            Ok(same) => Ok(same.map(|same| !same)),
            Err(error @ LogError::Damaged { .. }) => {
                tracing::error!(%error, range = %item.range, "damaged data found by a compare, the agent sends it again");
                Ok(Some(true))
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

    /// Whether the log has only zeroes in `range`; `None` when nobody wants to know any more. Reads
    /// nothing where the index knows so, and bounded pieces where it does not.
    fn is_zero(&self, range: ByteRange, wanted: &impl Fn() -> bool) -> Result<Option<bool>, LogError> {
        for window in range.split_at_multiples(EXTENTS_WINDOW) {
            if !wanted() {
                return Ok(None);
            }
            for (extent, allocation) in self.view.extents(window)? {
                let sound = match allocation {
                    Allocation::Zero => Some(true),
                    Allocation::Data => self.reads_zero(extent, wanted)?,
                };
                if sound != Some(true) {
                    return Ok(sound);
                }
            }
        }
        Ok(Some(true))
    }

    fn reads_zero(&self, range: ByteRange, wanted: &impl Fn() -> bool) -> Result<Option<bool>, LogError> {
        for piece in range.split_at_multiples(READ_PIECE) {
            if !wanted() {
                return Ok(None);
            }
            if !is_zeroes(&self.view.read(piece)?) {
                return Ok(Some(false));
            }
        }
        Ok(Some(true))
    }
}
