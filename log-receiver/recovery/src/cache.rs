//! What readers of all disks share: index blocks and open files, both bounded.

use std::sync::Arc;

use backtide_units::ByteCount;

/// A bounded cache of index blocks and open segment files. Clones share it.
#[derive(Clone)]
pub struct LogCache {
    limits: Arc<CacheLimits>,
}

/// Limits of a [`LogCache`].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct CacheLimits {
    /// Memory for index blocks. Default 64 MiB.
    pub index_bytes_max: ByteCount,
    /// Sealed segment files kept open. Default 256.
    pub open_files_max: usize,
}

impl LogCache {
    /// An empty cache.
    pub fn new(limits: CacheLimits) -> Self {
        Self { limits: Arc::new(limits) }
    }

    /// Its limits.
    pub fn limits(&self) -> CacheLimits {
        *self.limits
    }
}

impl Default for CacheLimits {
    fn default() -> Self {
        Self { index_bytes_max: ByteCount(64 << 20), open_files_max: 256 }
    }
}
