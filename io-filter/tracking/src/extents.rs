//! Extents: the coarse stretches of a disk that the activity log speaks of.

use std::time::Duration;

use backtide_units::{BlockCount, BlockIndex, BlockRange, ByteCount};

/// How the activity log divides a disk, and how much of it may be hot.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ActivityLimits {
    /// Blocks of an extent: 1 024 are 4 MiB.
    pub extent: BlockCount,
    /// Extents that stay hot when a snapshot is taken: what is compared after a crash is about this
    /// much and half as much again. Zero keeps no activity log, and everything is compared.
    pub hot: u32,
    /// Sectors of 4 KiB in the log. Each takes one durable write, so many can follow one snapshot.
    pub sectors: u32,
    /// How often extents that nobody used since the last time go cold.
    pub idle: Duration,
    /// How long after a tracking file was given up a new one is begun, at first. Where that fails it is tried less and less
    /// often.
    pub anew: Duration,
}

impl Default for ActivityLimits {
    fn default() -> Self {
        Self {
            extent: BlockCount(1024),
            hot: 1024,
            sectors: 2048,
            idle: Duration::from_secs(60),
            anew: Duration::from_secs(5),
        }
    }
}

impl ActivityLimits {
    /// How many extents a disk of `size` has.
    pub fn extents_of(&self, size: ByteCount) -> u32 {
        let blocks = BlockRange::whole_disk(size).count().0;
        u32::try_from(blocks.div_ceil(self.extent.0.max(1))).unwrap_or(u32::MAX)
    }

    /// The extents that `blocks` lie in.
    pub(crate) fn touched_by(&self, blocks: BlockRange) -> ExtentRun {
        let first = blocks.start().0 / self.extent.0;
        let end = blocks.end().0.div_ceil(self.extent.0);
        let narrow = |index: u64| u32::try_from(index).unwrap_or(u32::MAX);
        ExtentRun { first: narrow(first), count: narrow(end - first) }
    }
}

/// Extents `first..first + count`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ExtentRun {
    /// The index of the first: block index divided by an extent's blocks.
    pub first: u32,
    /// How many.
    pub count: u32,
}

impl ExtentRun {
    /// Of one extent.
    pub(crate) fn of(extent: u32) -> Self {
        Self { first: extent, count: 1 }
    }

    pub(crate) fn end(self) -> u32 {
        self.first.saturating_add(self.count)
    }

    /// The blocks of the extents, where each has `extent` of them; the last extent of a disk may
    /// reach beyond its end.
    pub fn blocks(self, extent: BlockCount) -> BlockRange {
        let at = |index: u32| BlockIndex(u64::from(index).saturating_mul(extent.0));
        BlockRange::between(at(self.first), at(self.end()))
    }
}

/// Sorted extents as runs.
pub(crate) fn runs_of(extents: impl IntoIterator<Item = u32>) -> Vec<ExtentRun> {
    let mut runs: Vec<ExtentRun> = Vec::new();
    for extent in extents {
        match runs.last_mut() {
            Some(run) if run.end() == extent => run.count += 1,
            Some(_) | None => runs.push(ExtentRun::of(extent)),
        }
    }
    runs
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn extents_cover_their_blocks() {
        let limits = ActivityLimits { extent: BlockCount(8), ..ActivityLimits::default() };
        assert_eq!(limits.touched_by((7..9).into()), ExtentRun { first: 0, count: 2 });
        assert_eq!(limits.touched_by((8..16).into()), ExtentRun { first: 1, count: 1 });
        assert_eq!(ExtentRun { first: 1, count: 2 }.blocks(limits.extent), (8..24).into());
        assert_eq!(limits.extents_of(ByteCount(8 * 4096 + 1)), 2);
    }

    #[test]
    fn neighbours_join() {
        let runs = runs_of([1, 2, 3, 7, 9, 10]);
        let pairs: Vec<_> = runs.iter().map(|run| (run.first, run.count)).collect();
        assert_eq!(pairs, [(1, 3), (7, 1), (9, 2)]);
    }
}
