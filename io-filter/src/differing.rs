//! What a verify has found to differ: blocks, and what is told of them while it goes on.
//!
//! Who waits for a verify asks how far it is many times a second, on the thread that serves the guest: what the answer has is
//! kept up to date chunk by chunk, and nothing is walked for it. Invariants: `count` and `stretches` are how many blocks and runs
//! `blocks` has, and `first` are the first of them, whole, up to [`STRETCHES_LISTED`].

use std::collections::BTreeMap;

use backtide_tracking::DirtyBitmap;
use backtide_units::{BlockCount, BlockIndex, BlockRange, ByteCount, ByteRange};

/// So many stretches are listed; further ones are counted.
pub const STRETCHES_LISTED: usize = 1000;

/// Blocks in which disk and receiver differ.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Differing {
    blocks: DirtyBitmap,
    count: BlockCount,
    stretches: u64,
    /// Where each begins, and its end.
    first: BTreeMap<BlockIndex, BlockIndex>,
}

/// Behind every block.
const END: BlockIndex = BlockIndex(u64::MAX);

impl Differing {
    /// None yet; they are kept in this bitmap, which is empty.
    pub(crate) fn within(blocks: DirtyBitmap) -> Self {
        Self { blocks, ..Self::default() }
    }

    /// Whether nothing differs.
    pub fn is_empty(&self) -> bool {
        self.blocks.is_empty()
    }

    /// The blocks.
    pub fn blocks(&self) -> &DirtyBitmap {
        &self.blocks
    }

    /// How many stretches differ.
    pub fn stretches(&self) -> u64 {
        self.stretches
    }

    /// The first [`STRETCHES_LISTED`] of them, in order; of a disk of `size`.
    pub fn first(&self, size: ByteCount) -> impl Iterator<Item = ByteRange> {
        self.first.iter().map(move |(start, end)| BlockRange::between(*start, *end).bytes(size))
    }

    /// How many bytes differ; of a disk of `size`.
    pub fn bytes(&self, size: ByteCount) -> ByteCount {
        let end = BlockRange::whole_disk(size).end();
        let last = BlockRange::between(BlockIndex(end.0.saturating_sub(1)), end);
        let beyond = last.count().bytes().0 - last.bytes(size).count().0;
        let ends_it = beyond > 0 && self.blocks.contains(last);
        ByteCount(self.count.bytes().0 - if ends_it { beyond } else { 0 })
    }

    /// Takes up the blocks of one chunk.
    pub(crate) fn insert(&mut self, chunk: BlockRange) {
        if chunk.is_empty() {
            return;
        }
        let joined = self.stretches_at(chunk);
        let expected = BlockCount(self.count.0 + self.blocks.insert(chunk).0);
        self.count = self.blocks.count();
        if self.count != expected {
            // It was too large and is coarser now, anywhere. That has cost as much, and is rare.
            return self.count_anew();
        }
        self.stretches = self.stretches + 1 - joined;
        self.list(chunk);
    }

    /// How many stretches are one when `chunk` is taken up.
    fn stretches_at(&self, chunk: BlockRange) -> u64 {
        let (mut at, end) = (BlockIndex(chunk.start().0.saturating_sub(1)), BlockIndex(chunk.end().0 + 1));
        let mut found = 0;
        while let Some(run) = self.run(at, end) {
            (at, found) = (run.end(), found + 1);
        }
        found
    }

    /// Keeps `first` what it is, now that `chunk` has been taken up.
    fn list(&mut self, chunk: BlockRange) {
        let last = self.first.last_key_value().map(|(_, end)| *end);
        if self.first.len() == STRETCHES_LISTED && last.is_some_and(|end| end < chunk.start()) {
            return;
        }
        let (mut start, mut end) = (chunk.start(), chunk.end());
        while let Some((other, its_end)) = self.first.range(..=end).next_back().map(|(at, to)| (*at, *to))
            && its_end >= start
        {
            self.first.remove(&other);
            (start, end) = (start.min(other), end.max(its_end));
        }
        if last.is_none_or(|last| end >= last) {
            // One that was not listed may go on from here.
            end = self.run(end, END).filter(|run| run.start() == end).map_or(end, BlockRange::end);
        }
        self.first.insert(start, end);
        if self.first.len() > STRETCHES_LISTED {
            self.first.pop_last();
        }
        self.list_further();
    }

    /// Takes up what has come to be one of the first.
    fn list_further(&mut self) {
        while self.first.len() < STRETCHES_LISTED && (self.first.len() as u64) < self.stretches {
            let from = self.first.last_key_value().map_or(BlockIndex(0), |(_, end)| *end);
            let run = self.run(from, END).expect("there are more stretches than are listed");
            self.first.insert(run.start(), run.end());
        }
    }

    fn count_anew(&mut self) {
        let mut at = BlockIndex(0);
        self.stretches = 0;
        while let Some(run) = self.run(at, END) {
            (at, self.stretches) = (run.end(), self.stretches + 1);
        }
        self.first.clear();
        self.list_further();
    }

    /// The first run in `[from, end)`.
    fn run(&self, from: BlockIndex, end: BlockIndex) -> Option<BlockRange> {
        let run = self.blocks.next_run(from, end, BlockCount(u64::MAX));
        #[cfg(test)]
        tests::WALKED.with(|walked| walked.set(walked.get() + 1 + run.map_or(0, |run| run.count().0)));
        run
    }
}

#[cfg(test)]
mod tests {
    use std::cell::Cell;

    use super::*;

    thread_local! {
        /// Runs that were looked for, and blocks of those that were found.
        pub(super) static WALKED: Cell<u64> = const { Cell::new(0) };
    }

    const BLOCKS: u64 = 30_000;
    const SIZE: ByteCount = ByteCount(BLOCKS * 4096 - 512);

    fn is_as_walked(differing: &Differing) {
        let runs: Vec<ByteRange> = differing
            .blocks
            .runs((0..BLOCKS).into(), BlockCount(BLOCKS))
            .map(|run| run.bytes(SIZE))
            .collect();
        assert_eq!(differing.stretches(), runs.len() as u64);
        assert_eq!(differing.bytes(SIZE).0, runs.iter().map(|run| run.count().0).sum::<u64>());
        let listed = &runs[..runs.len().min(STRETCHES_LISTED)];
        assert_eq!(differing.first(SIZE).collect::<Vec<_>>(), listed);
    }

    /// Chunks of up to 16 blocks, anywhere; always the same.
    fn chunks(count: usize) -> impl Iterator<Item = BlockRange> {
        let mut state = 1_u64;
        let mut next = move |below: u64| {
            state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
            (state >> 33) % below
        };
        (0..count).map(move |_| {
            let start = next(BLOCKS);
            (start..(start + next(17)).min(BLOCKS)).into()
        })
    }

    #[test]
    fn what_is_told_is_what_a_walk_finds() {
        let mut differing = Differing::default();
        let mut most = 0;
        for (number, chunk) in chunks(12_000).enumerate() {
            differing.insert(chunk);
            most = most.max(differing.stretches());
            if number % 16 == 0 {
                is_as_walked(&differing);
            }
        }
        assert!(most > STRETCHES_LISTED as u64 + 200, "{most} stretches at the most");
        differing.insert((0..BLOCKS).into());
        is_as_walked(&differing);
        assert_eq!((differing.stretches(), differing.bytes(SIZE)), (1, SIZE));
    }

    #[test]
    fn the_last_one_listed_is_listed_whole() {
        let mut differing = Differing::default();
        let at = |stretch: u64| stretch * 8;
        let listed = STRETCHES_LISTED as u64;
        for stretch in 0..listed + 3 {
            differing.insert((at(stretch)..at(stretch) + 4).into());
        }
        differing.insert((at(listed) - 4..at(listed)).into());
        is_as_walked(&differing);
        differing.insert((at(9) + 4..at(10)).into());
        is_as_walked(&differing);
        differing.insert((at(listed) - 20..at(listed) + 20).into());
        is_as_walked(&differing);
    }

    #[test]
    fn one_that_becomes_coarser_is_counted_anew() {
        let bound = DirtyBitmap::bounded(ByteCount(2048), BlockIndex(BLOCKS));
        let mut differing = Differing::within(bound);
        let lone = (0..BLOCKS).step_by(3).chain((1..BLOCKS).step_by(3));
        for block in lone {
            differing.insert((block..block + 1).into());
        }
        assert!(differing.blocks.count().0 > BLOCKS * 2 / 3, "{} blocks", differing.blocks.count());
        is_as_walked(&differing);
    }

    #[test]
    fn whoever_asks_how_far_it_is_walks_nothing_and_whoever_finds_something_little() {
        let walked = || WALKED.with(Cell::get);
        let mut differing = Differing::default();
        let size = ByteCount(1 << 40);
        let chunks = 20_000_u64;
        let before = walked();
        for chunk in 0..chunks {
            differing.insert((chunk * 32..chunk * 32 + 16).into());
            let so_far = walked();
            assert_eq!((differing.stretches(), differing.bytes(size).0), (chunk + 1, (chunk + 1) << 16));
            if chunk % 1000 == 0 {
                assert_eq!(differing.first(size).count() as u64, (chunk + 1).min(1000));
            }
            assert_eq!(walked(), so_far);
        }
        // From here on everything differs, and a walk would be of every block.
        for chunk in 0..chunks {
            differing.insert((chunk * 32 + 16..chunk * 32 + 32).into());
        }
        assert_eq!((differing.stretches(), differing.first(size).count()), (1, 1));
        let (looks, a_chunk) = (2 * chunks, 64);
        assert!(walked() - before < looks * a_chunk, "{} for {looks} chunks", walked() - before);
    }
}
