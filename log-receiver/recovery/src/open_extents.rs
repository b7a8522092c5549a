//! How much memory all logs together use for the indexes of segments that are still written.
//!
//! A log alone may hold as many extents as one segment has at most. With many logs that would be too much together, so
//! they share a limit: beyond it a log seals its segment early, unless it has next to nothing there. So what all hold is
//! bounded by the limit and that little of each.

use std::sync::{
    Arc,
    atomic::{AtomicU64, Ordering},
};

/// A segment with fewer extents is not sealed early: footers would outgrow what they save.
const LITTLE: u64 = 1024;

/// The extents of all logs that share a cache. Clones count the same.
#[derive(Clone, Debug)]
pub(crate) struct OpenExtents {
    all: Arc<AtomicU64>,
    max: u64,
}

/// Those of one segment; gone when it is dropped.
#[derive(Debug)]
pub(crate) struct Counted {
    all: OpenExtents,
    here: u64,
}

impl OpenExtents {
    pub(crate) fn new(max: u64) -> Self {
        Self { all: Arc::default(), max }
    }

    pub(crate) fn all(&self) -> u64 {
        self.all.load(Ordering::Relaxed)
    }

    /// Counts a segment with so many.
    pub(crate) fn count(&self, extents: usize) -> Counted {
        let mut counted = Counted { all: self.clone(), here: 0 };
        counted.note(extents);
        counted
    }

    /// Whether a segment with so many is to be sealed.
    pub(crate) fn asks_to_seal(&self, here: usize) -> bool {
        here as u64 >= LITTLE && self.all() > self.max
    }
}

impl Counted {
    /// The segment has so many now; never fewer than before.
    pub(crate) fn note(&mut self, extents: usize) {
        let more = (extents as u64).saturating_sub(self.here);
        self.all.all.fetch_add(more, Ordering::Relaxed);
        self.here += more;
    }
}

impl Drop for Counted {
    fn drop(&mut self) {
        self.all.all.fetch_sub(self.here, Ordering::Relaxed);
    }
}
