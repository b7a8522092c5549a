//! The state of one resync pass.

use std::{collections::BTreeMap, time::Duration};

use backtide_tracking::DirtyBitmap;
use backtide_units::{BlockCount, BlockIndex, BlockRange, ByteCount, Lsn, Reason};

use crate::{compare::PendingCompare, event::IoId, unreadable::Unreadable};

/// Where new writes go while a pass runs.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum NewWrites {
    /// To the receiver, as records above T.
    Forwarded,
    /// To the passive bitmap, for the next pass.
    Coalesced,
}

/// How far a pass has come.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Phase {
    /// Blocks are left to drain.
    Draining,
    /// Everything, the end included, is on its way.
    Ended,
}

/// One resync pass, frozen at `at`.
#[derive(Clone, Debug)]
pub(crate) struct Pass {
    /// The resync point T.
    pub(crate) at: Lsn,
    pub(crate) reason: Reason,
    pub(crate) new_writes: NewWrites,
    pub(crate) phase: Phase,
    /// Whether blocks are candidates only: the receiver is asked which of them differ.
    pub(crate) compare: bool,
    /// Whether some block's content at T was lost: the pass moves data but gives no point at T.
    pub(crate) forfeited: bool,
    /// Blocks whose content at T is still only on the local disk.
    pub(crate) active: DirtyBitmap,
    /// Blocks that were zeroes at T, of which the receiver has not been told.
    pub(crate) zeroes: DirtyBitmap,
    /// Where the drain goes on.
    pub(crate) cursor: BlockIndex,
    /// Drain reads under way.
    pub(crate) reads: BTreeMap<IoId, BlockRange>,
    /// Held while it waits its turn at the guard.
    pub(crate) queued: Option<BlockRange>,
    /// What could not be read, and how to go on.
    pub(crate) unreadable: Unreadable,
    /// Blocks that could not be read at all: they are left to the next pass, and this one gives no
    /// point.
    pub(crate) given_up: DirtyBitmap,
    /// Comparisons the receiver has not answered.
    pub(crate) compares: BTreeMap<u64, PendingCompare>,
    /// Bytes held for those comparisons, and of those what is held for zeroes that nobody has read.
    pub(crate) compare_bytes: u64,
    pub(crate) hole_bytes: u64,
    /// Bytes being read for the drain or copied before a write.
    pub(crate) reading_bytes: u64,
    pub(crate) started: Duration,
    pub(crate) total: ByteCount,
    /// Bytes that were read and are neither durable at the receiver nor found equal.
    pub(crate) moving: u64,
    /// While new writes are gathered: when it was last looked whether the pass gains on them, and how many
    /// blocks it had left and the next one had then.
    pub(crate) ground: Option<(Duration, BlockCount, BlockCount)>,
}

impl Pass {
    /// Whether nothing of the pass's T is left on the local disk only.
    pub(crate) fn is_drained(&self) -> bool {
        self.active.is_empty()
            && self.zeroes.is_empty()
            && self.reads.is_empty()
            && self.queued.is_none()
            && self.compares.is_empty()
    }

    /// The bytes of the pass that need nothing more: they are durable at the receiver, equal there, or
    /// another pass's by now.
    pub(crate) fn settled(&self) -> ByteCount {
        let left = self.active.count().bytes().0 + self.moving;
        ByteCount(self.total.0.saturating_sub(left))
    }

    /// When the drain may go on after something could not be read, or a block is to be tried again, if that lies ahead.
    pub(crate) fn next_retry(&self, now: Duration) -> Option<Duration> {
        if self.phase != Phase::Draining || self.active.is_empty() {
            return None;
        }
        self.unreadable.pause(now).or_else(|| self.unreadable.next_due(now))
    }

    /// The bytes of the pass that sit in memory, unsent window data aside.
    pub(crate) fn buffered(&self) -> u64 {
        self.compare_bytes + self.reading_bytes
    }
}
