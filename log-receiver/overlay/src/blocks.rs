//! Which blocks an overlay has, and where: in memory, for reads.
//!
//! Blocks with data are a tree of 16 bytes an entry, zeroed ones a compressed bitmap: zeroing a whole
//! disk costs next to nothing. A block is in one of the two or in neither, which is the disk below.

use std::collections::BTreeMap;

use backtide_units::{BlockIndex, BlockRange};
use roaring::RoaringTreemap;

/// A place for one block in the data file.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) struct Slot(pub(crate) u32);

/// Where a block's bytes are, and their CRC32C.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Stored {
    pub(crate) slot: Slot,
    pub(crate) crc: u32,
}

/// What became of some blocks.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Change {
    /// Written: adjoining blocks in adjoining slots.
    Data { first: BlockIndex, slot: Slot, crcs: Vec<u32> },
    /// Zeroed.
    Zero(BlockRange),
}

/// What an overlay knows of a block.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Lookup {
    Stored(Stored),
    Zero,
    /// The disk below has it.
    Below,
}

/// All blocks of an overlay.
#[derive(Clone, Debug, Default)]
pub(crate) struct Blocks {
    stored: BTreeMap<u64, Stored>,
    zeroes: RoaringTreemap,
}

impl Blocks {
    /// Carries out a change and gives the slots that no block is in any more.
    pub(crate) fn apply(&mut self, change: &Change) -> Vec<Slot> {
        match change {
            Change::Data { first, slot, crcs } => {
                let mut freed = Vec::new();
                let count = crcs.len() as u64;
                for (place, crc) in (0..).zip(crcs) {
                    let stored = Stored { slot: Slot(slot.0 + place), crc: *crc };
                    let before = self.stored.insert(first.0 + u64::from(place), stored);
                    freed.extend(before.map(|before| before.slot));
                }
                self.zeroes.remove_range(first.0..first.0 + count);
                freed
            }
            Change::Zero(blocks) => {
                let gone: Vec<u64> = self.stored.range(blocks.indices()).map(|(block, _)| *block).collect();
                self.zeroes.insert_range(blocks.indices());
                gone.iter().filter_map(|block| self.stored.remove(block)).map(|stored| stored.slot).collect()
            }
        }
    }

    pub(crate) fn find(&self, block: BlockIndex) -> Lookup {
        match self.stored.get(&block.0) {
            Some(stored) => Lookup::Stored(*stored),
            None if self.zeroes.contains(block.0) => Lookup::Zero,
            None => Lookup::Below,
        }
    }

    /// How many blocks have data.
    pub(crate) fn stored(&self) -> u64 {
        self.stored.len() as u64
    }

    /// How many of `blocks` have data.
    pub(crate) fn stored_in(&self, blocks: BlockRange) -> u64 {
        self.stored.range(blocks.indices()).count() as u64
    }

    /// The blocks with data from `from` on, in order.
    pub(crate) fn each_stored(&self, from: BlockIndex) -> impl Iterator<Item = (BlockIndex, Stored)> + '_ {
        self.stored.range(from.0..).map(|(block, stored)| (BlockIndex(*block), *stored))
    }

    /// The runs of blocks in `within` that the overlay has, in order: with data (true) or zeroed.
    pub(crate) fn runs(&self, within: BlockRange) -> Vec<(BlockRange, bool)> {
        let mut runs: Vec<(BlockRange, bool)> = Vec::new();
        let mut stored = self.stored.range(within.indices()).map(|(block, _)| *block).peekable();
        let mut zeroes = self.zeroes.iter();
        zeroes.advance_to(within.start().0);
        let mut zeroes = zeroes.take_while(|block| *block < within.end().0).peekable();
        loop {
            let (block, data) = match (stored.peek().copied(), zeroes.peek().copied()) {
                (Some(data), Some(zero)) if data < zero => (data, true),
                (Some(data), None) => (data, true),
                (_, Some(zero)) => (zero, false),
                (None, None) => return runs,
            };
            if data {
                stored.next()
            } else {
                zeroes.next()
            };
            match runs.last_mut() {
                Some((run, kind)) if *kind == data && run.end().0 == block => {
                    *run = BlockRange::from(run.start().0..block + 1);
                }
                Some(_) | None => runs.push((BlockRange::from(block..block + 1), data)),
            }
        }
    }

    /// The fewest changes that make an empty overlay this one, each of at most `blocks_max` stored blocks.
    pub(crate) fn changes(&self, blocks_max: usize) -> impl Iterator<Item = Change> + '_ {
        let mut stored = self.stored.iter().peekable();
        let data = std::iter::from_fn(move || {
            let (first, at) = stored.next()?;
            let mut crcs = vec![at.crc];
            let follows = |(block, next): &(&u64, &Stored), count: usize| {
                let count = count as u64;
                **block == first + count && u64::from(next.slot.0) == u64::from(at.slot.0) + count
            };
            while crcs.len() < blocks_max
                && let Some((_, next)) = stored.next_if(|next| follows(next, crcs.len()))
            {
                crcs.push(next.crc);
            }
            Some(Change::Data { first: BlockIndex(*first), slot: at.slot, crcs })
        });
        data.chain(self.zero_runs().map(Change::Zero))
    }

    /// The runs of zeroed blocks.
    fn zero_runs(&self) -> impl Iterator<Item = BlockRange> + '_ {
        self.zeroes.bitmaps().flat_map(|(high, bitmap)| {
            let mut blocks = bitmap.iter();
            let whole = move |low: u32| u64::from(high) << 32 | u64::from(low);
            std::iter::from_fn(move || {
                let run = blocks.next_range()?;
                Some(BlockRange::from(whole(*run.start())..whole(*run.end()) + 1))
            })
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn data(first: u64, slot: u32, count: usize) -> Change {
        Change::Data { first: BlockIndex(first), slot: Slot(slot), crcs: vec![7; count] }
    }

    fn zero(start: u64, end: u64) -> Change {
        Change::Zero(BlockRange::from(start..end))
    }

    #[test]
    fn what_is_written_over_frees_its_slot() {
        let mut blocks = Blocks::default();
        assert_eq!(blocks.apply(&data(10, 0, 4)), []);
        assert_eq!(blocks.apply(&data(12, 4, 1)), [Slot(2)]);
        assert_eq!(blocks.apply(&zero(0, 12)), [Slot(0), Slot(1)]);
        assert_eq!(blocks.apply(&data(5, 0, 1)), []);
        assert_eq!(blocks.find(BlockIndex(4)), Lookup::Zero);
        assert_eq!(blocks.find(BlockIndex(5)), Lookup::Stored(Stored { slot: Slot(0), crc: 7 }));
        assert_eq!(blocks.find(BlockIndex(14)), Lookup::Below);
        assert_eq!(blocks.stored(), 3);
    }

    #[test]
    fn runs_and_changes_tell_all_of_it() {
        let mut blocks = Blocks::default();
        for change in [data(10, 0, 4), data(14, 9, 1), zero(20, 30), data(25, 4, 1)] {
            blocks.apply(&change);
        }
        let run = |start: u64, end: u64, data| (BlockRange::from(start..end), data);
        let all = blocks.runs(BlockRange::from(0..100));
        assert_eq!(all, [run(10, 15, true), run(20, 25, false), run(25, 26, true), run(26, 30, false)]);
        assert_eq!(blocks.runs(BlockRange::from(12..21)), [run(12, 15, true), run(20, 21, false)]);
        let mut again = Blocks::default();
        for change in blocks.changes(3) {
            assert_eq!(again.apply(&change), []);
        }
        assert_eq!((again.stored, again.zeroes), (blocks.stored, blocks.zeroes));
    }
}
