//! Which bytes changed between two points, as spans that fit into an answer.

use backtide_receiver_api::ByteSpan;
use backtide_units::{BLOCK_SIZE, BlockIndex, ByteCount};
use roaring::RoaringTreemap;

/// The most spans of one answer; beyond it neighbors are joined.
pub(crate) const SPANS_MAX: usize = 100_000;

/// Changed bytes.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Changes {
    /// Spans are multiples of it.
    pub(crate) granularity: ByteCount,
    /// Ascending, apart from each other.
    pub(crate) spans: Vec<ByteSpan>,
}

/// The spans of `blocks` on a disk of `size` bytes: exact at first, and twice as coarse until there
/// are at most `spans_max`.
pub(crate) fn spans(blocks: &RoaringTreemap, size: ByteCount, spans_max: usize) -> Changes {
    assert!(spans_max > 0, "an answer holds at least one span");
    let mut granularity = BLOCK_SIZE;
    loop {
        if let Some(spans) = at_granularity(blocks, size.0, granularity, spans_max) {
            return Changes { granularity: ByteCount(granularity), spans };
        }
        granularity = granularity.saturating_mul(2);
    }
}

fn at_granularity(
    blocks: &RoaringTreemap,
    size: u64,
    granularity: u64,
    spans_max: usize,
) -> Option<Vec<ByteSpan>> {
    let mut ranges: Vec<(u64, u64)> = Vec::new();
    for block in blocks {
        let start = BlockIndex(block).start().0 / granularity * granularity;
        let end = start.saturating_add(granularity).min(size);
        if start >= size {
            break;
        }
        let full = ranges.len() == spans_max;
        match ranges.last_mut() {
            Some(last) if last.1 >= start => last.1 = last.1.max(end),
            Some(_) | None if full => return None,
            Some(_) | None => ranges.push((start, end)),
        }
    }
    let span =
        |(start, end)| ByteSpan { offset: backtide_units::ByteOffset(start), length: ByteCount(end - start) };
    Some(ranges.into_iter().map(span).collect())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn flat(changes: &Changes) -> Vec<(u64, u64)> {
        changes.spans.iter().map(|span| (span.offset.0, span.length.0)).collect()
    }

    #[test]
    fn neighbors_are_one_span_and_the_last_ends_with_the_disk() {
        let blocks: RoaringTreemap = [0, 1, 5, 9].into_iter().collect();
        let changes = spans(&blocks, ByteCount(9 * 4096 + 512), 10);
        assert_eq!(flat(&changes), [(0, 8192), (5 * 4096, 4096), (9 * 4096, 512)]);
        assert_eq!(changes.granularity, ByteCount(4096));
    }

    #[test]
    fn too_many_spans_are_told_more_coarsely() {
        let blocks: RoaringTreemap = (0..64).map(|block| block * 4).collect();
        let changes = spans(&blocks, ByteCount(256 * 4096), 10);
        assert_eq!(changes.granularity, ByteCount(4 * 4096));
        assert_eq!(flat(&changes), [(0, 256 * 4096)]);
    }

    #[test]
    fn nothing_changed_is_no_span() {
        assert!(spans(&RoaringTreemap::new(), ByteCount(4096), 1).spans.is_empty());
    }
}
