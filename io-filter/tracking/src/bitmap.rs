//! A set of blocks, compressed: the passive and the active bitmap of a disk are two of these.

use std::{io, ops::Range};

use backtide_units::{BlockCount, BlockIndex, BlockRange, ByteCount};
use roaring::RoaringTreemap;

mod coarse;

use coarse::Sweep;

/// A set of dirty blocks.
///
/// Two Roaring treemaps. One has the regions of 256 MiB that are dirty as a whole: a disk dirty from end
/// to end is one run there. The other has the blocks of all other regions: a few bytes for a run of
/// any length, two bytes for a lone block among scattered ones, and never more than one bit a block.
///
/// A set with a [`bound`](Self::bounded) becomes coarser above it: then it holds more than was marked,
/// and never less.
///
/// Invariant: a region that is in `whole` has nothing in `blocks`.
#[derive(Clone, Debug, Default)]
pub struct DirtyBitmap {
    whole: RoaringTreemap,
    blocks: RoaringTreemap,
    bound: Option<Box<Bound>>,
}

/// What a bitmap may take, and of how large a disk it is.
#[derive(Clone, Debug)]
struct Bound {
    bytes: ByteCount,
    end: BlockIndex,
    /// Ranges marked or unmarked since the size was looked at, and how many may be.
    touched: u32,
    between: u32,
    /// What it took at the last look, about, and ranges marked since that was measured.
    taken: ByteCount,
    unmeasured: u32,
    /// It took more than that when blocks were marked clean, which cannot be mended.
    exceeded: bool,
    /// What makes it smaller, while it does.
    sweep: Option<Sweep>,
    /// A sweep has written as runs what is shorter so, since there was room in plenty.
    has_runs: bool,
    /// Regions that are runs, or may be: none other is.
    as_runs: RoaringTreemap,
}

/// Of so many blocks in one range, where there is none, the library makes a run.
const RUN_MIN: u64 = 3;

/// Blocks of a region: 256 MiB, what one Roaring container holds.
const REGION: u64 = 1 << 16;

/// Two bitmaps are equal when the same blocks are dirty.
impl PartialEq for DirtyBitmap {
    fn eq(&self, other: &Self) -> bool {
        let (mut one, mut other) = (self.unbounded(), other.unbounded());
        one.compact();
        other.compact();
        one.whole == other.whole && one.blocks == other.blocks
    }
}

impl DirtyBitmap {
    /// No dirty block.
    pub fn new() -> Self {
        Self::default()
    }

    /// No dirty block, of a disk that ends at `end`. Above about `bytes` of memory the densest regions
    /// are marked in stretches of 64 KiB, then of 1 MiB and more, instead of blocks.
    pub fn bounded(bytes: ByteCount, end: BlockIndex) -> Self {
        Self { bound: Some(Box::new(Bound::new(bytes, end))), ..Self::default() }
    }

    /// The same blocks, without the bound.
    #[must_use]
    pub fn unbounded(&self) -> Self {
        Self { whole: self.whole.clone(), blocks: self.blocks.clone(), bound: None }
    }

    /// Takes all blocks out; the bound stays.
    #[must_use]
    pub fn take(&mut self) -> Self {
        let empty = match &self.bound {
            Some(bound) => Self::bounded(bound.bytes, bound.end),
            None => Self::new(),
        };
        std::mem::replace(self, empty)
    }

    /// Exactly these blocks.
    pub fn of(range: BlockRange) -> Self {
        let mut bitmap = Self::new();
        bitmap.insert(range);
        bitmap
    }

    /// Whether no block is dirty.
    pub fn is_empty(&self) -> bool {
        self.whole.is_empty() && self.blocks.is_empty()
    }

    /// How many blocks are dirty.
    pub fn count(&self) -> BlockCount {
        BlockCount(self.whole.len() * REGION + self.blocks.len())
    }

    /// Whether marking blocks clean has made it larger than its bound: single clean blocks among dirty
    /// ones take memory too, and cannot be given up as single dirty ones can.
    pub fn exceeds_bound(&self) -> bool {
        self.bound.as_ref().is_some_and(|bound| bound.exceeded)
    }

    /// Marks blocks dirty; returns how many were not.
    pub fn insert(&mut self, range: BlockRange) -> BlockCount {
        let (start, end) = (range.start().0, range.end().0);
        self.reach(end);
        let regions = start.div_ceil(REGION)..end / REGION;
        let mut news = 0;
        if regions.start < regions.end {
            let covered = regions.start * REGION..regions.end * REGION;
            let before = self.blocks.range_cardinality(covered.clone());
            self.blocks.remove_range(covered);
            news += self.whole.insert_range(regions.clone()) * REGION - before;
            news += self.insert_within(start..regions.start * REGION);
            news += self.insert_within(regions.end * REGION..end);
        } else {
            let middle = (start / REGION + 1) * REGION;
            news += self.insert_within(start..end.min(middle));
            news += self.insert_within(middle..end.max(middle));
        }
        if self.is_time_to_look() {
            self.look();
        }
        BlockCount(news)
    }

    /// A disk may have grown since its end was told: nothing that was marked is cut off.
    fn reach(&mut self, end: u64) {
        if let Some(bound) = &mut self.bound {
            bound.end = bound.end.max(BlockIndex(end));
        }
    }

    /// Blocks of one region.
    fn insert_within(&mut self, blocks: Range<u64>) -> u64 {
        let region = blocks.start / REGION;
        if blocks.is_empty() || self.whole.contains(region) {
            return 0;
        }
        // The library makes runs of those itself where there is nothing yet, and leaves them that.
        if blocks.end - blocks.start >= RUN_MIN
            && let Some(bound) = &mut self.bound
            && self.blocks.range_cardinality(region * REGION..(region + 1) * REGION) == 0
        {
            bound.as_runs.insert(region);
        }
        self.blocks.insert_range(blocks)
    }

    /// Marks blocks clean.
    pub fn remove(&mut self, range: BlockRange) {
        let (start, end) = (range.start().0, range.end().0);
        if start >= end {
            return;
        }
        self.open(start / REGION);
        self.open((end - 1) / REGION);
        self.whole.remove_range(start / REGION..(end - 1) / REGION + 1);
        self.blocks.remove_range(start..end);
        if self.is_time_to_look() {
            self.look_at_what_is_left();
        }
    }

    fn is_time_to_look(&mut self) -> bool {
        let Some(bound) = &mut self.bound else { return false };
        bound.touched += 1;
        bound.touched >= bound.between
    }

    /// A region is not going to be dirty as a whole.
    fn open(&mut self, region: u64) {
        if self.whole.remove(region) {
            self.blocks.insert_range(region * REGION..(region + 1) * REGION);
            if let Some(bound) = &mut self.bound {
                bound.as_runs.insert(region);
            }
        }
    }

    /// Holds the same blocks in as little memory as can be.
    pub fn compact(&mut self) {
        self.blocks.optimize();
        let regions = self.regions();
        for region in regions {
            let blocks = region * REGION..(region + 1) * REGION;
            if self.blocks.range_cardinality(blocks.clone()) == REGION {
                self.blocks.remove_range(blocks);
                self.whole.insert(region);
            }
        }
    }

    /// The regions that have something in `blocks`.
    fn regions(&self) -> Vec<u64> {
        let mut regions = Vec::new();
        let mut blocks = self.blocks.iter();
        while let Some(block) = blocks.next() {
            regions.push(block / REGION);
            blocks.advance_to((block / REGION + 1) * REGION);
        }
        regions
    }

    /// The blocks of the regions that are dirty as a whole, as ranges.
    fn whole_runs(&self) -> Vec<Range<u64>> {
        let mut runs: Vec<Range<u64>> = Vec::new();
        for region in &self.whole {
            let (start, end) = (region * REGION, (region + 1) * REGION);
            match runs.last_mut() {
                Some(last) if last.end == start => last.end = end,
                Some(_) | None => runs.push(start..end),
            }
        }
        runs
    }

    /// Marks every block of `other` dirty here too.
    pub fn union_with(&mut self, other: &Self) {
        let whole = other.whole.max().map_or(0, |region| (region + 1) * REGION);
        self.reach(other.blocks.max().map_or(0, |block| block + 1).max(whole));
        if let Some(bound) = &mut self.bound {
            // Those may be runs there. Of a region that is none it costs that it is written anew once.
            bound.as_runs.extend(other.regions());
        }
        self.blocks |= &other.blocks;
        self.whole |= &other.whole;
        for run in self.whole_runs() {
            self.blocks.remove_range(run);
        }
        self.keep_bound();
    }

    /// Marks every block of `other` clean here.
    pub fn subtract(&mut self, other: &Self) {
        if !self.whole.is_empty() {
            for region in other.regions() {
                self.open(region);
            }
        }
        self.whole -= &other.whole;
        self.blocks -= &other.blocks;
        for run in other.whole_runs() {
            self.blocks.remove_range(run);
        }
    }

    /// Keeps only the blocks that are dirty in `other` too.
    pub fn intersect_with(&mut self, other: &Self) {
        let mut other = other.unbounded();
        for region in self.regions() {
            other.open(region);
        }
        for region in other.regions() {
            self.open(region);
        }
        self.whole &= &other.whole;
        self.blocks &= &other.blocks;
    }

    /// Marks every block outside the range clean.
    pub fn keep_only(&mut self, range: BlockRange) {
        let (start, end) = (range.start().0, range.end().0);
        self.open(start / REGION);
        self.open(end / REGION);
        self.whole.remove_range(..start / REGION);
        self.whole.remove_range(end / REGION..);
        self.blocks.remove_range(..start);
        self.blocks.remove_range(end..);
    }

    /// Whether any block of the range is dirty.
    pub fn touches(&self, range: BlockRange) -> bool {
        self.next_run(range.start(), range.end(), BlockCount(1)).is_some()
    }

    /// Whether every block of the range is dirty.
    pub fn contains(&self, range: BlockRange) -> bool {
        range.is_empty() || self.next_run(range.start(), range.end(), range.count()) == Some(range)
    }

    /// The first run of dirty blocks in `[from, end)`, cut to `limit` blocks.
    pub fn next_run(&self, from: BlockIndex, end: BlockIndex, limit: BlockCount) -> Option<BlockRange> {
        if from >= end {
            return None;
        }
        let mut blocks = self.blocks.iter();
        blocks.advance_to(from.0);
        let mut whole = self.whole.iter();
        whole.advance_to(from.0 / REGION);
        let whole = whole.next().map(|region| (region * REGION).max(from.0));
        let start = [blocks.next(), whole].into_iter().flatten().min().filter(|start| *start < end.0)?;
        let stop = end.0.min(start.saturating_add(limit.0.max(1)));
        let mut at = start;
        while at < stop {
            let region_end = (at / REGION + 1) * REGION;
            at = match self.whole.contains(at / REGION) {
                true => region_end,
                false => self.end_of_run(at, region_end.min(stop)),
            };
            if at < region_end {
                break;
            }
        }
        (at > start).then(|| BlockRange::from(start..at.min(stop)))
    }

    /// Where the run ends that begins at `from`, at `stop` at the latest.
    fn end_of_run(&self, from: u64, stop: u64) -> u64 {
        let mut blocks = self.blocks.iter();
        blocks.advance_to(from);
        let mut at = from;
        while at < stop && blocks.next() == Some(at) {
            at += 1;
        }
        at
    }

    /// The runs of dirty blocks inside `range`, in order, none longer than `limit`.
    pub fn runs(&self, range: BlockRange, limit: BlockCount) -> impl Iterator<Item = BlockRange> {
        let mut from = range.start();
        std::iter::from_fn(move || {
            let run = self.next_run(from, range.end(), limit)?;
            from = run.end();
            Some(run)
        })
    }

    /// The bitmap in Roaring's portable serialization, run-compressed first.
    pub fn to_bytes(&self) -> Vec<u8> {
        let mut blocks = self.blocks.clone();
        for run in self.whole_runs() {
            blocks.insert_range(run);
        }
        blocks.optimize();
        let mut bytes = Vec::with_capacity(blocks.serialized_size());
        blocks.serialize_into(&mut bytes).expect("writing to memory cannot fail");
        bytes
    }

    /// The bitmap of [`to_bytes`](Self::to_bytes), checked.
    ///
    /// # Errors
    /// When the bytes are no bitmap, or others follow it.
    pub fn from_bytes(mut bytes: &[u8]) -> io::Result<Self> {
        let blocks = RoaringTreemap::deserialize_from(&mut bytes)?;
        if !bytes.is_empty() {
            return Err(io::Error::new(
                io::ErrorKind::InvalidData,
                format!("{} bytes after the bitmap", bytes.len()),
            ));
        }
        let mut bitmap = Self { blocks, ..Self::default() };
        bitmap.compact();
        Ok(bitmap)
    }
}

#[cfg(test)]
mod model_tests;

#[cfg(test)]
mod tests {
    use super::*;

    const ALL: BlockIndex = BlockIndex(u64::MAX);

    #[test]
    fn runs_are_cut_at_gaps_and_at_the_limit() {
        let mut bitmap = DirtyBitmap::of((10..20).into());
        bitmap.insert((30..31).into());
        let runs: Vec<_> = bitmap.runs((0..1000).into(), BlockCount(8)).collect();
        assert_eq!(runs, [(10..18).into(), (18..20).into(), (30..31).into()]);
        assert_eq!(bitmap.next_run(BlockIndex(31), ALL, BlockCount(8)), None);
        assert_eq!(bitmap.next_run(BlockIndex(12), BlockIndex(15), BlockCount(8)), Some((12..15).into()));
    }

    #[test]
    fn touching_is_not_containing() {
        let bitmap = DirtyBitmap::of((10..20).into());
        assert!(bitmap.touches((19..25).into()));
        assert!(!bitmap.contains((19..25).into()));
        assert!(!bitmap.touches((20..25).into()));
        assert!(!bitmap.touches((5..5).into()));
    }

    #[test]
    fn blocks_beyond_u32_are_kept() {
        let far = (1u64 << 40..(1u64 << 40) + 3).into();
        let bitmap = DirtyBitmap::of(far);
        assert_eq!(DirtyBitmap::from_bytes(&bitmap.to_bytes()).unwrap(), bitmap);
    }

    #[test]
    fn trailing_bytes_are_refused() {
        let mut bytes = DirtyBitmap::of((1..5).into()).to_bytes();
        bytes.push(0);
        assert!(DirtyBitmap::from_bytes(&bytes).is_err());
    }
}
