//! Keeping a bitmap small: above its bound the densest regions forget single blocks.
//!
//! A region takes an array of two bytes a block, or a bitmap of 8 KiB. In coarse stretches it becomes a
//! few runs of four bytes each, and as a whole next to nothing.

use backtide_units::{BlockIndex, ByteCount};

use super::{Bound, DirtyBitmap, REGION};

/// Blocks of a stretch: 64 KiB, 1 MiB, 16 MiB, a region.
const STRETCHES: [u64; 4] = [16, 256, 4096, REGION];

/// Coarsened to this part of the bound, so that it takes a while until it is needed again.
const ROOM: (u64, u64) = (3, 4);

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

    /// Coarsens what is above the bound.
    pub(super) fn keep_bound(&mut self) {
        let Some(bound) = &mut self.bound else { return };
        (bound.touched, bound.exceeded) = (0, false);
        let Bound { bytes, end, .. } = **bound;
        if self.memory() <= bytes {
            return;
        }
        self.compact();
        let enough = ByteCount(bytes.0 / ROOM.1 * ROOM.0);
        for stretch in STRETCHES {
            let mut memory = self.memory();
            if memory <= bytes {
                return;
            }
            for (cost, region) in self.costliest_regions(stretch) {
                if memory <= enough {
                    break;
                }
                let after = self.coarsen(region, stretch, end, cost);
                memory = ByteCount(memory.0.saturating_sub(cost - after));
            }
        }
    }

    /// The regions by what they take, the most first; without those that are as coarse already.
    fn costliest_regions(&self, stretch: u64) -> Vec<(u64, u64)> {
        let costs = self.regions().into_iter().map(|region| (self.cost_of(region), region));
        let mut regions: Vec<(u64, u64)> =
            costs.filter(|(cost, _)| *cost > (REGION / stretch).min(8) * RUN_BYTES).collect();
        regions.sort_unstable_by(|one, other| other.cmp(one));
        regions
    }

    /// What a region takes: of the three ways to hold it the cheapest, which `optimize` chose.
    fn cost_of(&self, region: u64) -> u64 {
        let blocks = self.blocks.range_cardinality(region * REGION..(region + 1) * REGION);
        let flat = (2 * blocks).min(REGION / 8);
        let mut runs = 0;
        let (start, end) = (BlockIndex(region * REGION), BlockIndex((region + 1) * REGION));
        for _ in self.runs((start.0..end.0).into(), backtide_units::BlockCount(REGION)) {
            runs += 1;
            if runs * RUN_BYTES >= flat {
                return flat;
            }
        }
        runs * RUN_BYTES
    }

    /// Marks every stretch of the region that has a dirty block, where that takes less than `cost`, which it takes now; returns
    /// what it takes then. Scattered blocks may take less than the stretches they lie in.
    fn coarsen(&mut self, region: u64, stretch: u64, end: BlockIndex, cost: u64) -> u64 {
        let (mut at, stop) = (region * REGION, (region + 1) * REGION);
        let mut stretches: Vec<(u64, u64)> = Vec::new();
        let mut blocks = self.blocks.iter();
        blocks.advance_to(at);
        while let Some(block) = blocks.next().filter(|block| *block < stop) {
            let first = block / stretch * stretch;
            at = first + stretch;
            match stretches.last_mut() {
                Some((_, end)) if *end == first => *end = at,
                Some(_) | None => stretches.push((first, at)),
            }
            blocks.advance_to(at);
        }
        let taken = (stretches.len() as u64 * RUN_BYTES).min(REGION / 8);
        if taken >= cost {
            return cost;
        }
        self.blocks.remove_range(region * REGION..stop);
        for (first, last) in stretches {
            if last - first == REGION && last <= end.0 {
                self.whole.insert(region);
            } else {
                self.blocks.insert_range(first..last.min(end.0));
            }
        }
        taken
    }
}

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
        assert!(bounded.contains((0..2 * REGION - 1).into()));
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
