//! What a pass knows of the local disk's failures: blocks to be tried again, stretches that are read with care, and a pause
//! for the disk to come back.
//!
//! Invariants: a disk that fails is read at a bounded rate, however fast it fails, and one that works is not held up by a few
//! bad blocks: the pause grows from failure to failure and ends with a read that succeeds. As many blocks as
//! [`BLOCKS_MAX`] wait to be tried again, and those of the reads that were under way. What is asked at every event takes no
//! longer for many of them.

use std::{
    collections::{BTreeMap, BTreeSet},
    time::Duration,
};

use backtide_units::{BlockCount, BlockIndex, BlockRange};

use crate::drain::RUN_BLOCKS_MAX;

/// So many blocks wait to be tried again at most: nothing else is read before some were read, or given up.
const BLOCKS_MAX: usize = 1024;

/// Pauses are parts of a retry's: from 1 ms to 4 ms of a second. So a disk that fails at once is read a thousand times a second,
/// which is little for a thread, and still a bad area of 16 MiB holds up its pass by no more than half a minute.
const PAUSE_FIRST_PART: u32 = 1024;
const PAUSE_LONGEST_PART: u32 = 256;

/// See the module's description.
#[derive(Clone, Debug, Default)]
pub(crate) struct Unreadable {
    /// When to try each again, and how often it was tried.
    blocks: BTreeMap<BlockIndex, (Duration, u32)>,
    by_time: BTreeSet<(Duration, BlockIndex)>,
    /// The longest that is read at once of stretches that could not be read whole.
    careful: BTreeMap<u64, Care>,
    /// Failures since a read succeeded.
    failures: u32,
    paused_until: Duration,
}

#[derive(Clone, Copy, Debug)]
struct Care {
    longest: BlockCount,
    /// Of one that gave way to the guest every block is read alone: that one comes to an end.
    grows: bool,
}

/// The stretch of a block; no read goes beyond it.
fn stretch_of(block: BlockIndex) -> u64 {
    block.0 / RUN_BLOCKS_MAX.0
}

/// All of it.
pub(crate) fn stretch_around(block: BlockIndex) -> BlockRange {
    let stretch = stretch_of(block);
    BlockRange::from(stretch * RUN_BLOCKS_MAX.0..(stretch + 1) * RUN_BLOCKS_MAX.0)
}

impl Unreadable {
    /// A read has failed: nothing is read for a while.
    pub(crate) fn failed(&mut self, run: BlockRange, now: Duration, retry: Duration) {
        let doubled = (PAUSE_FIRST_PART / PAUSE_LONGEST_PART).ilog2();
        let pause = retry / PAUSE_FIRST_PART * (1 << self.failures.min(doubled));
        self.failures = self.failures.saturating_add(1);
        self.paused_until = self.paused_until.max(now + pause);
        let care = self.careful.entry(stretch_of(run.start()));
        care.or_insert(Care { longest: BlockCount(1), grows: true }).longest = BlockCount(1);
    }

    /// One has succeeded; `more` of its stretch is to be read.
    pub(crate) fn succeeded(&mut self, run: BlockRange, more: bool) {
        (self.failures, self.paused_until) = (0, Duration::ZERO);
        self.forget(run.start());
        let stretch = stretch_of(run.start());
        let Some(care) = self.careful.get_mut(&stretch) else { return };
        if care.grows {
            care.longest = BlockCount(care.longest.0.max(run.count().0 * 2));
        }
        if !more || care.longest >= RUN_BLOCKS_MAX {
            self.careful.remove(&stretch);
        }
    }

    /// A read gave way to the guest.
    pub(crate) fn gave_way(&mut self, run: BlockRange) {
        let care = Care { longest: BlockCount(1), grows: false };
        self.careful.insert(stretch_of(run.start()), care);
    }

    /// A block could not be read, alone, and is to be tried again then; how often it was tried by now.
    pub(crate) fn try_again(&mut self, block: BlockIndex, at: Duration) -> u32 {
        let tries = self.forget(block).map_or(1, |tries| tries + 1);
        self.blocks.insert(block, (at, tries));
        self.by_time.insert((at, block));
        tries
    }

    /// It is not to be tried again; how often it was tried.
    pub(crate) fn forget(&mut self, block: BlockIndex) -> Option<u32> {
        let (at, tries) = self.blocks.remove(&block)?;
        self.by_time.remove(&(at, block));
        Some(tries)
    }

    /// Until when nothing is read, if that lies ahead.
    pub(crate) fn pause(&self, now: Duration) -> Option<Duration> {
        Some(self.paused_until).filter(|until| *until > now)
    }

    /// Whether nothing new is read.
    pub(crate) fn is_full(&self) -> bool {
        self.blocks.len() >= BLOCKS_MAX
    }

    /// The blocks that may be tried again, the longest due first.
    pub(crate) fn due(&self, now: Duration) -> impl Iterator<Item = BlockIndex> {
        self.by_time.range(..=(now, BlockIndex(u64::MAX))).map(|(_, block)| *block)
    }

    /// When the next may be, if that lies ahead.
    pub(crate) fn next_due(&self, now: Duration) -> Option<Duration> {
        self.by_time.range((now, BlockIndex(u64::MAX))..).map(|(at, _)| *at).find(|at| *at > now)
    }

    /// How much of the run may be read now, from its first block: none of one that is not to be tried yet.
    pub(crate) fn readable(&self, run: BlockRange, now: Duration) -> Option<BlockRange> {
        let start = run.start();
        let first = BlockIndex(start.0 + 1);
        if let Some((at, _)) = self.blocks.get(&start) {
            return (*at <= now).then(|| BlockRange::between(start, first));
        }
        let care = self.careful.get(&stretch_of(start)).map_or(RUN_BLOCKS_MAX, |care| care.longest);
        let known = self.blocks.range(first..run.end()).next().map_or(run.end(), |(block, _)| *block);
        let end = known.min(stretch_around(start).end()).min(BlockIndex(start.0 + care.0));
        Some(BlockRange::between(start, end))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const RETRY: Duration = Duration::from_secs(1);

    fn run(start: u64, end: u64) -> BlockRange {
        (start..end).into()
    }

    #[test]
    fn a_stretch_is_read_with_care_for_as_long_as_that_is_needed() {
        let mut disk = Unreadable::default();
        disk.failed(run(256, 512), RETRY, RETRY);
        let mut reads = Vec::new();
        let mut at = 256;
        while at < 512 {
            let read = disk.readable(run(at, 600), RETRY).unwrap();
            at = read.end().0;
            reads.push(read.count().0);
            disk.succeeded(read, at < 512);
        }
        assert_eq!(reads, [1, 2, 4, 8, 16, 32, 64, 128, 1]);
        assert!(disk.careful.is_empty());
        assert_eq!(disk.readable(run(256, 600), RETRY), Some(run(256, 512)));
        // Where it gave way to the guest each block is read alone.
        disk.gave_way(run(256, 512));
        disk.succeeded(run(256, 257), true);
        assert_eq!(disk.readable(run(257, 512), RETRY), Some(run(257, 258)));
        disk.succeeded(run(511, 512), false);
        assert!(disk.careful.is_empty(), "nothing of it is left");
    }

    #[test]
    fn no_read_takes_a_block_along_that_is_tried_again_later() {
        let mut disk = Unreadable::default();
        assert_eq!(disk.try_again(BlockIndex(5), RETRY), 1);
        assert_eq!(disk.readable(run(0, 9), Duration::ZERO), Some(run(0, 5)));
        assert_eq!(disk.readable(run(5, 9), Duration::ZERO), None);
        assert_eq!(disk.readable(run(5, 9), RETRY), Some(run(5, 6)), "and then alone");
        assert_eq!(disk.readable(run(6, 9), Duration::ZERO), Some(run(6, 9)));
        assert_eq!((disk.next_due(Duration::ZERO), disk.next_due(RETRY)), (Some(RETRY), None));
        assert_eq!(disk.try_again(BlockIndex(5), RETRY * 2), 2);
        assert_eq!(disk.due(RETRY).count(), 0);
        disk.succeeded(run(5, 6), false);
        assert!(disk.blocks.is_empty() && disk.by_time.is_empty());
    }

    #[test]
    fn the_pause_grows_up_to_its_bound_and_ends_with_a_success() {
        let mut disk = Unreadable::default();
        let now = RETRY * 10;
        let mut last = Duration::ZERO;
        for _ in 0..100 {
            disk.failed(run(0, 1), now, RETRY);
            let pause = disk.pause(now).unwrap() - now;
            assert!(pause >= last && pause <= RETRY / PAUSE_LONGEST_PART, "{pause:?} after {last:?}");
            last = pause;
        }
        assert!(last > RETRY / (PAUSE_LONGEST_PART + 1), "{last:?}");
        disk.succeeded(run(1, 2), true);
        assert_eq!(disk.pause(now), None);
        disk.failed(run(0, 1), now, RETRY);
        assert!(disk.pause(now).unwrap() < now + RETRY / 50, "one bad block holds up nobody for long");
    }
}
