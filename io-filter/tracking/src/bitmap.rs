//! A set of blocks, compressed: the passive and the active bitmap of a disk are two of these.

use std::io;

use backtide_units::{BlockCount, BlockIndex, BlockRange, ByteCount};
use roaring::RoaringTreemap;

mod coarse;

/// A set of dirty blocks.
///
/// A Roaring treemap: a few bytes for a run of any length, two bytes for a lone block among
/// scattered ones, and never more than one bit a block. One with a [`bound`](Self::bounded) becomes
/// coarser above it: then it holds more than was marked, and never less.
#[derive(Clone, Debug, Default)]
pub struct DirtyBitmap {
    blocks: RoaringTreemap,
    bound: Option<Bound>,
}

/// What a bitmap may take, and of how large a disk it is.
#[derive(Clone, Copy, Debug)]
struct Bound {
    bytes: ByteCount,
    end: BlockIndex,
    /// Ranges marked since the size was looked at.
    marked: u32,
}

/// A range costs at most a few bytes more than it did before it was marked; looking costs more.
const MARKS_BETWEEN_LOOKS: u32 = 16 * 1024;

/// Two bitmaps are equal when the same blocks are dirty.
impl PartialEq for DirtyBitmap {
    fn eq(&self, other: &Self) -> bool {
        self.blocks == other.blocks
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
        Self { blocks: RoaringTreemap::new(), bound: Some(Bound { bytes, end, marked: 0 }) }
    }

    /// The same blocks, without the bound.
    #[must_use]
    pub fn unbounded(&self) -> Self {
        Self { blocks: self.blocks.clone(), bound: None }
    }

    /// Takes all blocks out; the bound stays.
    #[must_use]
    pub fn take(&mut self) -> Self {
        let blocks = std::mem::take(&mut self.blocks);
        Self { blocks, bound: self.bound }
    }

    /// Exactly these blocks.
    pub fn of(range: BlockRange) -> Self {
        let mut bitmap = Self::new();
        bitmap.insert(range);
        bitmap
    }

    /// Whether no block is dirty.
    pub fn is_empty(&self) -> bool {
        self.blocks.is_empty()
    }

    /// How many blocks are dirty.
    pub fn count(&self) -> BlockCount {
        BlockCount(self.blocks.len())
    }

    /// Marks blocks dirty.
    pub fn insert(&mut self, range: BlockRange) {
        self.blocks.insert_range(range.indices());
        if let Some(bound) = &mut self.bound {
            bound.marked += 1;
            if bound.marked >= MARKS_BETWEEN_LOOKS {
                self.keep_bound();
            }
        }
    }

    /// Marks blocks clean.
    pub fn remove(&mut self, range: BlockRange) {
        self.blocks.remove_range(range.indices());
    }

    /// Marks every block of `other` dirty here too.
    pub fn union_with(&mut self, other: &Self) {
        self.blocks |= &other.blocks;
        self.keep_bound();
    }

    /// Marks every block of `other` clean here.
    pub fn subtract(&mut self, other: &Self) {
        self.blocks -= &other.blocks;
    }

    /// Keeps only the blocks that are dirty in `other` too.
    pub fn intersect_with(&mut self, other: &Self) {
        self.blocks &= &other.blocks;
    }

    /// Marks every block outside the range clean.
    pub fn keep_only(&mut self, range: BlockRange) {
        self.blocks.remove_range(..range.start().0);
        self.blocks.remove_range(range.end().0..);
    }

    /// Whether any block of the range is dirty.
    pub fn touches(&self, range: BlockRange) -> bool {
        self.next_run(range.start(), range.end(), BlockCount(1)).is_some()
    }

    /// Whether every block of the range is dirty.
    pub fn contains(&self, range: BlockRange) -> bool {
        self.blocks.range_cardinality(range.indices()) == range.count().0
    }

    /// The first run of dirty blocks in `[from, end)`, cut to `limit` blocks.
    pub fn next_run(&self, from: BlockIndex, end: BlockIndex, limit: BlockCount) -> Option<BlockRange> {
        if from >= end {
            return None;
        }
        let mut blocks = self.blocks.iter();
        blocks.advance_to(from.0);
        let start = blocks.next().filter(|start| *start < end.0)?;
        let stop = end.0.min(start.saturating_add(limit.0.max(1)));
        let mut last = start;
        for block in blocks {
            if block != last + 1 || block >= stop {
                break;
            }
            last = block;
        }
        Some(BlockRange::from(start..last + 1))
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
        Ok(Self { blocks, bound: None })
    }
}

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
