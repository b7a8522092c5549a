//! What an overlay is told from outside: its limits, and the disk below.

use std::sync::{
    Arc,
    atomic::{AtomicU64, Ordering},
};

use backtide_units::{BlockCount, ByteCount, ByteRange};

use crate::BaseError;

/// The disk below an overlay; it never changes.
pub trait Base {
    /// The bytes of `range`, which is inside the disk.
    ///
    /// # Errors
    /// When they cannot be read.
    fn read(&self, range: ByteRange) -> Result<bytes::Bytes, BaseError>;
}

/// Limits of an overlay.
#[derive(Clone)]
pub struct OverlayOptions {
    /// The most it may hold, in bytes of blocks that were written.
    pub bytes_max: ByteCount,
    /// What all overlays together may hold.
    pub budget: Budget,
    /// The map is written anew when it is twice as long as it then was, and this much longer.
    pub map_slack: ByteCount,
    /// Asked before its files grow by so many bytes; answers why not.
    pub room: Arc<dyn Fn(ByteCount) -> Result<(), String> + Send + Sync>,
}

impl OverlayOptions {
    /// An overlay of `bytes_max` on its own, in a store that never fills.
    pub fn alone(bytes_max: ByteCount) -> Self {
        let map_slack = ByteCount(16 << 20);
        Self { bytes_max, budget: Budget::new(bytes_max), map_slack, room: Arc::new(|_| Ok(())) }
    }
}

/// What all overlays together may hold: it bounds the memory of their maps. Clones share it.
#[derive(Clone, Debug)]
pub struct Budget {
    max: BlockCount,
    used: Arc<AtomicU64>,
}

impl Budget {
    /// A budget of so many bytes.
    pub fn new(max: ByteCount) -> Self {
        Self { max: BlockCount(max.0 / backtide_units::BLOCK_SIZE), used: Arc::default() }
    }

    /// The bytes that are left.
    pub fn left(&self) -> ByteCount {
        BlockCount(self.max.0.saturating_sub(self.used.load(Ordering::Relaxed))).bytes()
    }

    pub(crate) fn take(&self, blocks: u64) -> bool {
        let fits = |used: u64| used.checked_add(blocks).filter(|used| *used <= self.max.0);
        self.used.fetch_update(Ordering::Relaxed, Ordering::Relaxed, fits).is_ok()
    }

    pub(crate) fn give_back(&self, blocks: u64) {
        self.used.fetch_sub(blocks, Ordering::Relaxed);
    }
}
