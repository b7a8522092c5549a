//! Keeping a bitmap small: near its bound regions are written as runs, and above it the densest forget single blocks.
//!
//! A region takes an array of two bytes a block, or a bitmap of 8 KiB. In coarse stretches it becomes a
//! few runs of four bytes each, and as a whole next to nothing. A bitmap of tens of MiB has tens of thousands of regions, which
//! takes seconds to go through, and its owner has a guest to serve: so a *sweep* goes from one end to the other a few regions at
//! a time, as blocks are marked, well ahead of them.

use std::ops::Range;

use backtide_units::{BlockIndex, ByteCount};
use roaring::RoaringTreemap;

use super::{Bound, DirtyBitmap, REGION};

/// Blocks of a stretch: 64 KiB, 1 MiB, 16 MiB, a region.
const STRETCHES: [u64; 4] = [16, 256, 4096, REGION];

/// What takes this part of the bound is written as runs where that is shorter, which forgets nothing.
const NEAR: (u64, u64) = (7, 8);

/// Above this part single blocks are forgotten.
const FULL: (u64, u64) = (31, 32);

/// Until no more is taken than this part, so that it takes a while until it is needed again.
const ENOUGH: (u64, u64) = (3, 4);

/// This is more than marks between two looks can bring: then all is done at once.
const TOO_MUCH: (u64, u64) = (9, 8);

/// Marks between two looks, far below the bound and near it. A mark costs at most a few bytes more, and looking costs more.
const MARKS_BETWEEN_LOOKS: u32 = 16 * 1024;
const MARKS_BETWEEN_LOOKS_NEAR: u32 = 1024;

/// Regions that are looked at, and written anew, in one look: a few milliseconds of a processor.
const PART: Work = Work { looked_at: 128, written: 8 };
const ALL: Work = Work { looked_at: u64::MAX, written: u64::MAX };

/// Regions that may be looked at, and written anew.
#[derive(Clone, Copy)]
struct Work {
    looked_at: u64,
    written: u64,
}

/// On the way from the first region to the last.
#[derive(Clone, Copy, Debug)]
pub(super) struct Sweep {
    /// The next region, or a later one.
    at: u64,
    /// Single blocks are forgotten.
    forgets: bool,
    /// Regions that take less are left.
    at_least: ByteCount,
    /// Some region was written anew.
    did: bool,
}

impl Bound {
    pub(super) fn new(bytes: ByteCount, end: BlockIndex) -> Self {
        Self {
            bytes,
            end,
            touched: 0,
            taken: ByteCount::ZERO,
            unmeasured: 0,
            between: MARKS_BETWEEN_LOOKS,
            exceeded: false,
            sweep: None,
            has_runs: false,
            as_runs: RoaringTreemap::new(),
        }
    }

    /// What is measured walks through all runs there are; in between it is reckoned.
    fn marks_between_measures(&self) -> u32 {
        let few = self.bytes.0 / MARK_BYTES / 64;
        (few.min(u64::from(MARKS_BETWEEN_LOOKS)) as u32).max(MARKS_BETWEEN_LOOKS_NEAR)
    }

    fn part(&self, (of, parts): (u64, u64)) -> ByteCount {
        ByteCount((u128::from(self.bytes.0) * u128::from(of) / u128::from(parts)) as u64)
    }
}

impl DirtyBitmap {
    /// The memory the blocks take, about.
    pub fn memory(&self) -> ByteCount {
        let of = |bitmap: &roaring::RoaringBitmap| {
            let numbers = bitmap.statistics();
            // Counted here: what the library gives as bytes is something else for two of the kinds.
            u64::from(numbers.n_containers) * CONTAINER_BYTES
                + 2 * u64::from(numbers.n_values_array_containers)
                + u64::from(numbers.n_bitset_containers) * (REGION / 8)
                + numbers.n_bytes_run_containers
        };
        ByteCount(
            [&self.whole, &self.blocks]
                .into_iter()
                .flat_map(|map| map.bitmaps())
                .map(|(_, bitmap)| of(bitmap))
                .sum(),
        )
    }

    /// Looks how much memory the blocks take after some were marked, and goes on to make that less where it is too much.
    pub(super) fn look(&mut self) {
        let Some(bound) = &mut self.bound else { return };
        let marks = std::mem::take(&mut bound.touched);
        bound.unmeasured += marks;
        let is_measured = bound.unmeasured >= bound.marks_between_measures();
        let reckoned = ByteCount(bound.taken.0 + u64::from(marks) * MARK_BYTES);
        let memory = if is_measured { self.memory() } else { reckoned };
        let Some(bound) = &mut self.bound else { return };
        if is_measured {
            bound.unmeasured = 0;
        }
        bound.exceeded = false;
        let is_near = memory > bound.part(ENOUGH);
        bound.between = if is_near { MARKS_BETWEEN_LOOKS_NEAR } else { MARKS_BETWEEN_LOOKS };
        if memory > bound.part(TOO_MUCH) {
            return self.keep_bound();
        }
        // One of both at a time, where measuring takes long.
        let is_enough = is_measured && bound.marks_between_measures() > MARKS_BETWEEN_LOOKS_NEAR;
        let left = if is_enough { memory } else { self.shrink(memory, PART) };
        self.took(left);
    }

    /// The same after some were marked clean: that is no time to forget which.
    pub(super) fn look_at_what_is_left(&mut self) {
        let Some(most) = self.bound.as_ref().map(|bound| bound.part(TOO_MUCH)) else { return };
        let mut memory = self.memory();
        if memory > most {
            // It takes long, and is of use only then.
            self.compact();
            memory = self.memory();
        }
        if let Some(bound) = &mut self.bound {
            (bound.touched, bound.unmeasured, bound.between) = (0, 0, MARKS_BETWEEN_LOOKS);
            (bound.taken, bound.exceeded) = (memory, memory > most);
        }
    }

    fn took(&mut self, memory: ByteCount) {
        if let Some(bound) = &mut self.bound {
            bound.taken = memory;
        }
    }

    /// Coarsens what is above the bound, all at once.
    pub(super) fn keep_bound(&mut self) {
        let memory = self.memory();
        let Some(bound) = &mut self.bound else { return };
        (bound.touched, bound.exceeded) = (0, false);
        (bound.sweep, bound.unmeasured, bound.taken) = (None, 0, memory);
        let (mut before, bytes) = (memory, bound.bytes);
        while before > bytes {
            self.shrink(before, ALL);
            // What regions cost is known about, unless a sweep has been there.
            let after = self.memory();
            self.took(after);
            if after >= before {
                return;
            }
            before = after;
        }
    }

    /// Goes on with a sweep, or begins one where `memory`, which the blocks take, is too much, as far as the work may be. Returns what
    /// they take then, about.
    fn shrink(&mut self, mut memory: ByteCount, mut work: Work) -> ByteCount {
        while let Some(mut sweep) = self.sweep_at(memory) {
            if work.looked_at == 0 || work.written == 0 {
                break;
            }
            if let Some(region) = self.region_from(sweep.at) {
                (sweep.at, work.looked_at) = (region + 1, work.looked_at - 1);
                let before = self.cost_of(region);
                if before >= sweep.at_least
                    && let Some(after) = self.write_anew(region, before, sweep.forgets)
                {
                    memory = ByteCount(memory.0.saturating_sub(before.0 - after.0));
                    (sweep.did, work.written) = (true, work.written - 1);
                }
                self.set_sweep(Some(sweep));
                continue;
            }
            // Single blocks that lie far apart may be all there is: they stay.
            let is_over = sweep.forgets && !sweep.did;
            self.set_sweep(None);
            if let Some(bound) = &mut self.bound {
                bound.has_runs = true;
            }
            if is_over {
                break;
            }
        }
        memory
    }

    /// The sweep that is under way, or is to begin, where so much memory is taken; none when that is little enough.
    fn sweep_at(&mut self, memory: ByteCount) -> Option<Sweep> {
        let bound = self.bound.as_mut()?;
        if memory <= bound.part(ENOUGH) {
            (bound.sweep, bound.has_runs) = (None, false);
        }
        let forgets = bound.has_runs;
        if bound.sweep.is_none() && memory > bound.part(if forgets { FULL } else { NEAR }) {
            let regions =
                self.blocks.bitmaps().map(|(_, bitmap)| bitmap.statistics().n_containers).sum::<u32>();
            // Those that take half of the mean and more take half of all at least.
            let mean = (memory.0 / u64::from(regions.max(1))).min(REGION / 8);
            let at_least = ByteCount((mean / 2).max(3 * RUN_BYTES));
            bound.sweep = Some(Sweep { at: 0, forgets, at_least, did: false });
        }
        bound.sweep
    }

    fn set_sweep(&mut self, sweep: Option<Sweep>) {
        if let Some(bound) = &mut self.bound {
            bound.sweep = sweep;
        }
    }

    /// The first region from this one on that has something in `blocks`.
    fn region_from(&self, region: u64) -> Option<u64> {
        let mut blocks = self.blocks.iter();
        blocks.advance_to(region.checked_mul(REGION)?);
        blocks.next().map(|block| block / REGION)
    }

    /// What a region takes; more than that where it could be runs and is not yet.
    fn cost_of(&self, region: u64) -> ByteCount {
        let as_runs = self.bound.as_ref().is_some_and(|bound| bound.as_runs.contains(region));
        // Runs stay what they are, also where single blocks that were marked since make that many.
        let runs = if as_runs { self.stretches(region, 1, REGION) } else { None };
        runs.map_or_else(|| self.flat_cost_of(region), |runs| ByteCount(runs.len() as u64 * RUN_BYTES))
    }

    /// What it takes as an array or a bitmap.
    fn flat_cost_of(&self, region: u64) -> ByteCount {
        let blocks = self.blocks.range_cardinality(region * REGION..(region + 1) * REGION);
        ByteCount((2 * blocks).min(REGION / 8))
    }

    /// Holds a region another way: as single blocks where that takes three quarters of `before` at most, else, where it may forget them, in
    /// the finest stretches in which it takes half. Returns what it takes then, or nothing where it stays as it is. Scattered blocks
    /// may take less than the stretches they lie in.
    fn write_anew(&mut self, region: u64, before: ByteCount, forgets: bool) -> Option<ByteCount> {
        let flat = self.flat_cost_of(region);
        let (exact_most, most) = (before.0 / 4 * 3, before.0 / 2 / RUN_BYTES);
        let runs_most = if flat.0 <= exact_most { REGION } else { exact_most / RUN_BYTES };
        let exact = self.stretches(region, 1, runs_most);
        let coarser = || STRETCHES.iter().find_map(|stretch| self.stretches(region, *stretch, most));
        let stretches = exact.or_else(|| if forgets { coarser() } else { None })?;
        let runs = ByteCount(stretches.len() as u64 * RUN_BYTES);
        let (start, stop) = (region * REGION, (region + 1) * REGION);
        let bound = self.bound.as_mut()?;
        self.blocks.remove_range(start..stop);
        bound.as_runs.remove(region);
        let is_whole = stretches.first() == Some(&(start..stop)) && stop <= bound.end.0;
        if is_whole {
            self.whole.insert(region);
            return Some(runs);
        }
        if runs < flat {
            bound.as_runs.insert(region);
        }
        let mut anew = RoaringTreemap::new();
        for stretch in stretches {
            anew.insert_range(stretch.start..stretch.end.min(bound.end.0));
        }
        // Of this region alone: of all of them it takes long.
        anew.optimize();
        self.blocks |= &anew;
        Some(runs.min(flat))
    }

    /// The stretches of so many blocks of a region that have a dirty block, those that touch as one; none when that makes more than
    /// `most`.
    fn stretches(&self, region: u64, stretch: u64, most: u64) -> Option<Vec<Range<u64>>> {
        let (start, stop) = (region * REGION, (region + 1) * REGION);
        // The library has runs of what 32 bits number.
        let (high, base) = ((start >> 32) as u32, start >> 32 << 32);
        let mut found: Vec<Range<u64>> = Vec::new();
        let Some((_, bitmap)) = self.blocks.bitmaps().find(|(key, _)| *key == high) else {
            return Some(found);
        };
        let mut blocks = bitmap.iter();
        blocks.advance_to(start as u32);
        while let Some(run) = blocks.next_range() {
            let (from, to) = (base + u64::from(*run.start()), (base + u64::from(*run.end()) + 1).min(stop));
            if from >= stop {
                break;
            }
            let (from, to) = (from / stretch * stretch, to.div_ceil(stretch) * stretch);
            let is_full = found.len() as u64 == most;
            match found.last_mut() {
                Some(last) if last.end >= from => last.end = to.max(last.end),
                Some(_) | None if is_full => return None,
                Some(_) | None => found.push(from..to),
            }
        }
        Some(found)
    }
}

/// What a lone block adds to an array; to runs it adds one.
const MARK_BYTES: u64 = 2;

/// What a run takes.
const RUN_BYTES: u64 = 4;

/// What a container takes beside its content.
const CONTAINER_BYTES: u64 = 32;

#[cfg(test)]
mod tests {
    use backtide_units::BlockCount;

    use super::*;

    const END: BlockIndex = BlockIndex(40 * REGION - 7);

    /// Scattered blocks, more in the lower regions; always the same.
    fn scattered(count: u64) -> Vec<u64> {
        let mut state = 1_u64;
        let mut next = || {
            state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
            state >> 33
        };
        (0..count).map(|_| next() % END.0 * (next() % 1000) / 1000).collect()
    }

    #[test]
    fn a_bounded_bitmap_keeps_its_bound_and_every_block() {
        for bytes in [4 << 10, 16 << 10, 64 << 10] {
            let mut bounded = DirtyBitmap::bounded(ByteCount(bytes), END);
            let mut exact = DirtyBitmap::new();
            for block in scattered(200_000) {
                bounded.insert((block..block + 1).into());
                exact.insert((block..block + 1).into());
            }
            bounded.keep_bound();
            let written = bounded.to_bytes().len() as u64;
            assert!(bounded.memory().0 <= bytes, "{} of {bytes} bytes", bounded.memory());
            // The serialization takes what the containers do, but for their headers.
            assert!(written <= bytes, "{written} bytes written, the bound is {bytes}");
            let mut missing = exact.clone();
            missing.subtract(&bounded);
            assert!(missing.is_empty(), "no block is forgotten");
            assert!(!bounded.touches((END.0..END.0 + REGION).into()), "nothing beyond the disk");
        }
    }

    #[test]
    fn blocks_that_take_less_than_their_stretches_stay_exact_while_others_give_room() {
        let mut bounded = DirtyBitmap::bounded(ByteCount(40 << 10), END);
        let mut exact = DirtyBitmap::new();
        // One block in a hundred, all over the disk: 1.3 KB a region, and 2.4 KB in stretches of 64 KiB.
        let mut state = 1_u64;
        for _ in 0..END.0 / 100 {
            state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
            let block = (state >> 33) % END.0;
            bounded.insert((block..block + 1).into());
            exact.insert((block..block + 1).into());
        }
        bounded.keep_bound();
        assert!(exact.memory().0 > 50 << 10 && bounded.memory().0 <= 40 << 10);
        let regions = END.0.div_ceil(REGION);
        let same = |region: &u64| {
            let range = region * REGION..(region + 1) * REGION;
            bounded.blocks.range_cardinality(range.clone()) == exact.blocks.range_cardinality(range)
        };
        let exact_ones = (0..regions).filter(same).count() as u64;
        assert!(exact_ones >= regions / 3, "{exact_ones} of {regions} regions are exact");
    }

    #[test]
    fn below_its_bound_a_bitmap_is_exact() {
        let mut bounded = DirtyBitmap::bounded(ByteCount(1 << 20), END);
        let mut exact = DirtyBitmap::new();
        for block in scattered(100_000) {
            bounded.insert((block..block + 1).into());
            exact.insert((block..block + 1).into());
        }
        assert!(exact.memory().0 < 1 << 20);
        assert_eq!(bounded, exact);
    }

    #[test]
    fn sparse_regions_stay_exact_as_long_as_dense_ones_give_room() {
        let mut bounded = DirtyBitmap::bounded(ByteCount(6 << 10), END);
        // Every other block of two regions, and three lone blocks of another.
        for block in (0..2 * REGION).step_by(2) {
            bounded.insert((block..block + 1).into());
        }
        for lone in [10 * REGION, 10 * REGION + 500, 10 * REGION + 9000] {
            bounded.insert((lone..lone + 1).into());
        }
        bounded.keep_bound();
        let far: Vec<_> = bounded.runs((10 * REGION..11 * REGION).into(), BlockCount(REGION)).collect();
        assert_eq!(far.len(), 3);
        assert!(far.iter().all(|run| run.count() == BlockCount(1)), "{far:?}");
        assert!(bounded.memory() <= ByteCount(6 << 10), "{}", bounded.memory());
        assert!((0..2 * REGION).step_by(2).all(|block| bounded.contains((block..block + 1).into())));
    }

    #[test]
    fn no_mark_waits_until_all_of_a_large_bitmap_is_smaller() {
        const REGIONS: u64 = 2048;
        let bytes = ByteCount(1 << 20);
        let mut bounded = DirtyBitmap::bounded(bytes, BlockIndex(REGIONS * REGION));
        let mut exact = DirtyBitmap::new();
        let anew = |bitmap: &DirtyBitmap| {
            let as_runs = bitmap.bound.as_ref().map_or(0, |bound| bound.as_runs.len());
            as_runs + bitmap.whole.len()
        };
        let (mut state, mut written) = (1_u64, 0);
        // One block in a hundred, all over the disk: twice and a half what may be taken.
        for number in 0..REGIONS * REGION / 100 {
            state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
            let block = (state >> 33) % (REGIONS * REGION);
            bounded.insert((block..block + 1).into());
            exact.insert((block..block + 1).into());
            let now = anew(&bounded);
            assert!(now <= written + PART.written, "one mark has written {} regions anew", now - written);
            written = now;
            if number % 1000 == 0 {
                let most = bytes.0 / 100 * 103;
                assert!(bounded.memory().0 <= most, "{} after {number} marks", bounded.memory());
            }
        }
        assert!(written > REGIONS / 4, "it took {} of {bytes}", exact.memory());
        exact.subtract(&bounded);
        assert!(exact.is_empty(), "no block is forgotten");
    }

    #[test]
    fn single_blocks_among_what_were_runs_are_no_reason_to_forget_any() {
        let mut bounded = DirtyBitmap::bounded(ByteCount(1 << 20), BlockIndex(64 * REGION));
        let mut exact = DirtyBitmap::new();
        let regions = || (0..64).map(|region| region * REGION);
        let ranges = regions().map(|start| start..start + 3);
        let singles = (2..REGION / 2).flat_map(|block| regions().map(move |start| start + 2 * block));
        for range in ranges.chain(singles.map(|block| block..block + 1)) {
            bounded.insert(range.clone().into());
            exact.insert(range.into());
        }
        assert_eq!(bounded, exact, "half of each region is a bitmap of 8 KiB: {}", bounded.memory());
    }

    #[test]
    fn runs_are_no_reason_to_forget_single_blocks() {
        let mut bounded = DirtyBitmap::bounded(ByteCount(256 << 10), BlockIndex(100 * REGION));
        let mut exact = DirtyBitmap::new();
        // Half of each region, block by block: a bitmap of 8 KiB until it is written as a run.
        for block in (0..100).flat_map(|region| region * REGION..region * REGION + REGION / 2) {
            bounded.insert((block..block + 1).into());
            exact.insert((block..block + 1).into());
        }
        assert!(exact.memory().0 > 800 << 10 && bounded.memory().0 < 256 << 10);
        assert_eq!(bounded, exact);
    }

    #[test]
    fn a_fully_dirty_disk_takes_next_to_nothing() {
        // 16 TiB.
        let end = BlockIndex(1 << 32);
        let mut bitmap = DirtyBitmap::bounded(ByteCount(4 << 20), end);
        bitmap.insert((0..end.0).into());
        bitmap.keep_bound();
        assert_eq!(bitmap.count(), BlockCount(end.0));
        assert!(bitmap.to_bytes().len() < 1 << 20, "{} bytes saved", bitmap.to_bytes().len());
    }
}
