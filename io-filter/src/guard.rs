//! The range guard: changes of the same block happen one after the other, and the drain reads a
//! block only while nobody changes it. Disjoint ranges run in parallel.
//!
//! First come, first served: a waiting range keeps later overlapping ones out, so none waits for ever.

use std::collections::{BTreeMap, VecDeque};

use backtide_units::{BlockIndex, BlockRange};

/// Who waits for a range.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) struct Ticket(pub(crate) u64);

/// The ranges held and waited for. Held ranges never overlap.
#[derive(Clone, Debug, Default)]
pub(crate) struct RangeGuard {
    /// Start to end.
    held: BTreeMap<u64, u64>,
    waiting: VecDeque<(Ticket, BlockRange)>,
}

impl RangeGuard {
    /// Takes the range now or, when somebody has or awaits a part of it, queues for it.
    /// Whether it was taken now.
    pub(crate) fn acquire(&mut self, ticket: Ticket, range: BlockRange) -> bool {
        let free = self.is_free(range);
        if free {
            self.hold(range);
        } else {
            self.waiting.push_back((ticket, range));
        }
        free
    }

    /// Takes the range if nobody has or awaits any of it.
    pub(crate) fn try_acquire(&mut self, range: BlockRange) -> bool {
        let free = self.is_free(range);
        if free {
            self.hold(range);
        }
        free
    }

    /// Gives a range back; returns who has theirs now, in the order they asked.
    pub(crate) fn release(&mut self, range: BlockRange) -> Vec<Ticket> {
        let end = self.held.remove(&range.start().0);
        assert_eq!(end, Some(range.end().0), "{range} was not held");
        if self.waiting.is_empty() {
            return Vec::new();
        }
        let mut admitted = Vec::new();
        let mut still: VecDeque<(Ticket, BlockRange)> = VecDeque::with_capacity(self.waiting.len());
        for (ticket, wanted) in std::mem::take(&mut self.waiting) {
            if self.overlaps_held(wanted) || still.iter().any(|(_, earlier)| earlier.overlaps(wanted)) {
                still.push_back((ticket, wanted));
            } else {
                self.hold(wanted);
                admitted.push(ticket);
            }
        }
        self.waiting = still;
        admitted
    }

    /// Whether nobody has or awaits any of it.
    pub(crate) fn is_free(&self, range: BlockRange) -> bool {
        !self.overlaps_held(range) && !self.waiting.iter().any(|(_, waiting)| waiting.overlaps(range))
    }

    /// Where the range that keeps the block from being free ends; that of a waiting one, too.
    pub(crate) fn busy_until(&self, block: BlockRange) -> BlockIndex {
        let held = self.held.range(..block.end().0).next_back().map(|(_, end)| *end);
        let waiting = self.waiting.iter().filter(|(_, waiting)| waiting.overlaps(block));
        let ends = held.into_iter().chain(waiting.map(|(_, waiting)| waiting.end().0));
        BlockIndex(ends.max().unwrap_or(0).max(block.end().0))
    }

    fn hold(&mut self, range: BlockRange) {
        assert!(!range.is_empty(), "an empty range cannot be held");
        self.held.insert(range.start().0, range.end().0);
    }

    fn overlaps_held(&self, range: BlockRange) -> bool {
        // Held ranges are disjoint, so the last one that starts before our end has the highest end.
        self.held.range(..range.end().0).next_back().is_some_and(|(_, end)| *end > range.start().0)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn overlapping_ranges_take_turns_in_order() {
        let mut guard = RangeGuard::default();
        assert!(guard.acquire(Ticket(1), (0..4).into()));
        assert!(!guard.acquire(Ticket(2), (3..6).into()));
        assert!(!guard.acquire(Ticket(3), (5..8).into()), "behind 2, although nobody holds 5..8");
        assert!(guard.acquire(Ticket(4), (8..9).into()));
        assert_eq!(guard.release((0..4).into()), [Ticket(2)]);
        assert_eq!(guard.release((3..6).into()), [Ticket(3)]);
    }

    #[test]
    fn a_waiting_range_keeps_the_drain_out() {
        let mut guard = RangeGuard::default();
        assert!(guard.acquire(Ticket(1), (0..4).into()));
        assert!(!guard.acquire(Ticket(2), (0..10).into()));
        assert!(!guard.try_acquire((9..10).into()));
        assert!(guard.try_acquire((10..11).into()));
    }

    #[test]
    fn who_is_in_the_way_says_until_where() {
        let mut guard = RangeGuard::default();
        assert!(guard.acquire(Ticket(1), (4..4000).into()));
        assert!(!guard.acquire(Ticket(2), (3990..5000).into()));
        assert_eq!(guard.busy_until((10..11).into()), BlockIndex(4000));
        assert_eq!(guard.busy_until((3995..3996).into()), BlockIndex(5000));
        assert_eq!(guard.busy_until((9000..9001).into()), BlockIndex(9001));
    }

    #[test]
    fn one_release_admits_all_that_fit() {
        let mut guard = RangeGuard::default();
        assert!(guard.acquire(Ticket(1), (0..100).into()));
        assert!(!guard.acquire(Ticket(2), (0..10).into()));
        assert!(!guard.acquire(Ticket(3), (20..30).into()));
        assert!(!guard.acquire(Ticket(4), (5..25).into()));
        assert_eq!(guard.release((0..100).into()), [Ticket(2), Ticket(3)]);
    }
}
