//! Which slots of the data file are free.
//!
//! Invariant: a slot is given out only when no map that could be found after a power cut names it. So
//! one that a write has emptied waits until the map's record of that write is durable.

use std::collections::VecDeque;

use roaring::RoaringBitmap;

use crate::{blocks::Slot, format::RecordNumber};

/// The slots of one data file.
#[derive(Debug, Default)]
pub(crate) struct Slots {
    /// How many the file has.
    total: u32,
    free: RoaringBitmap,
    /// Emptied by the record, which is not durable yet.
    waiting: VecDeque<(RecordNumber, Slot)>,
}

/// Adjoining slots.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct SlotRun {
    pub(crate) first: Slot,
    pub(crate) count: u32,
}

impl Slots {
    /// A file of `total` slots of which `used` are not free.
    pub(crate) fn new(total: u32, used: &RoaringBitmap) -> Self {
        let mut free = RoaringBitmap::new();
        free.insert_range(0..total);
        free -= used;
        Self { total, free, waiting: VecDeque::new() }
    }

    /// How many the file has.
    pub(crate) fn total(&self) -> u32 {
        self.total
    }

    /// How many wait to be free.
    pub(crate) fn waiting(&self) -> usize {
        self.waiting.len()
    }

    /// By how many slots the file has to grow for `count` more.
    pub(crate) fn growth_for(&self, count: u32) -> u32 {
        count.saturating_sub(u32::try_from(self.free.len()).unwrap_or(u32::MAX))
    }

    /// Gives out `count` slots, in as few runs as there are; none when the file would have more than
    /// `total_max`.
    pub(crate) fn take(&mut self, count: u32, total_max: u32) -> Option<Vec<SlotRun>> {
        let growth = self.growth_for(count);
        if self.total.checked_add(growth).is_none_or(|total| total > total_max) {
            return None;
        }
        let mut runs = Vec::new();
        let mut left = count - growth;
        while left > 0 {
            let run = self.free.iter().next_range().expect("so many slots are free");
            let available = run.end() - run.start() + 1;
            let taken = SlotRun { first: Slot(*run.start()), count: available.min(left) };
            self.free.remove_range(taken.first.0..taken.first.0 + taken.count);
            left -= taken.count;
            runs.push(taken);
        }
        if growth > 0 {
            runs.push(SlotRun { first: Slot(self.total), count: growth });
            self.total += growth;
        }
        Some(runs)
    }

    /// Takes slots back that nothing names.
    pub(crate) fn put_back(&mut self, runs: &[SlotRun]) {
        for run in runs {
            self.free.insert_range(run.first.0..run.first.0 + run.count);
        }
    }

    /// Notes slots that `record` emptied.
    pub(crate) fn emptied(&mut self, record: RecordNumber, slots: Vec<Slot>) {
        self.waiting.extend(slots.into_iter().map(|slot| (record, slot)));
    }

    /// Frees what records up to `durable` emptied.
    pub(crate) fn free_through(&mut self, durable: RecordNumber) {
        while let Some((_, slot)) = self.waiting.pop_front_if(|(record, _)| *record <= durable) {
            self.free.insert(slot.0);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_emptied_slot_is_given_out_when_its_record_is_durable() {
        let mut slots = Slots::default();
        let run = |first, count| SlotRun { first: Slot(first), count };
        assert_eq!(slots.take(3, 4), Some(vec![run(0, 3)]));
        slots.emptied(RecordNumber(1), vec![Slot(1)]);
        slots.emptied(RecordNumber(2), vec![Slot(0)]);
        assert_eq!(slots.take(2, 4), None);
        slots.free_through(RecordNumber(1));
        assert_eq!(slots.take(2, 4), Some(vec![run(1, 1), run(3, 1)]));
        assert_eq!((slots.total(), slots.waiting()), (4, 1));
        slots.put_back(&[run(3, 1)]);
        slots.free_through(RecordNumber(2));
        assert_eq!(slots.take(2, 4), Some(vec![run(0, 1), run(3, 1)]));
    }
}
