//! Which bytes changed between two points, as spans that fit into an answer; and when a block last did.

use backtide_export::DirtyExtent;
use backtide_receiver_api::{ApiError, BlockChange, ByteSpan, ChangedBy, ErrorCode, Point};
use backtide_recovery::{LogError, Snapshot, View};
use backtide_units::{BLOCK_SIZE, BlockIndex, BlockRange, ByteCount, ByteOffset, ByteRange, Lsn};
use roaring::RoaringTreemap;

use crate::points;

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

/// Which parts of `range` lie in `blocks`: adjoining, from its begin on, at most `extents_max`.
pub(crate) fn dirty_extents(
    blocks: &RoaringTreemap,
    range: ByteRange,
    extents_max: usize,
) -> Vec<DirtyExtent> {
    let mut extents: Vec<DirtyExtent> = Vec::new();
    let mut push = |bytes: u64, dirty: bool| {
        let full = extents.len() == extents_max;
        match extents.last_mut() {
            _ if bytes == 0 => true,
            Some(last) if last.dirty == dirty => {
                last.length.0 += bytes;
                true
            }
            Some(_) | None if full => false,
            Some(_) | None => {
                extents.push(DirtyExtent { length: ByteCount(bytes), dirty });
                true
            }
        }
    };
    let touched = BlockRange::touched_by(range);
    let mut iter = blocks.iter();
    iter.advance_to(touched.start().0);
    let mut done = range.start().0;
    for block in iter.take_while(|block| *block < touched.end().0) {
        let start = BlockIndex(block).start().0.max(done);
        let end = (BlockIndex(block).start().0 + BLOCK_SIZE).min(range.end().0);
        if !push(start - done, false) || !push(end - start, true) {
            return extents;
        }
        done = end;
    }
    push(range.end().0 - done, false);
    extents
}

/// The block of a byte, on a disk of `size` bytes.
///
/// # Errors
/// When the disk has no such byte.
pub(crate) fn block_at(offset: ByteOffset, size: ByteCount) -> Result<ByteRange, ApiError> {
    if offset.0 >= size.0 {
        let why = format!("byte {offset} is beyond the disk, which has {size} bytes at that point");
        return Err(ApiError::new(ErrorCode::Usage, why));
    }
    let block = BlockIndex::holding(offset).0;
    Ok(BlockRange::from(block..block + 1).bytes(size))
}

/// The newest change of a block that a view has.
///
/// # Errors
/// When the log cannot be read.
pub(crate) fn last_change(
    snapshot: &Snapshot,
    view: &View,
    block: ByteRange,
) -> Result<Option<BlockChange>, LogError> {
    let Some(lsn) = view.newest_version(block)? else { return Ok(None) };
    let timeline = snapshot.timeline();
    let record = snapshot.record_at(lsn)?;
    // A pass is at the beginning of an interval, when it gave a point; else its time is that of what was before.
    let begun = || points::interval_of(timeline, lsn).map(|interval| interval.from.time);
    let (time, by) = match record {
        Some(record) => (record.time, ChangedBy::Write),
        None => {
            let time = begun().max(snapshot.time_of(lsn)?).unwrap_or_default();
            (time, ChangedBy::Resync)
        }
    };
    let before = timeline.intervals().iter().rev().find(|interval| interval.from.lsn < lsn);
    let before = match before {
        Some(interval) => {
            let last = interval.to.lsn.min(Lsn(lsn.0 - 1));
            let time = snapshot.time_of(last)?.max(Some(interval.from.time)).unwrap_or_default();
            Some(Point { lsn: last, time })
        }
        None => None,
    };
    Ok(Some(BlockChange { lsn, time, by, before }))
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
    for (first, last) in runs(blocks) {
        let start = BlockIndex(first).start().0 / granularity * granularity;
        let end = BlockIndex(last).start().0.saturating_add(BLOCK_SIZE);
        let end = end.checked_next_multiple_of(granularity).unwrap_or(u64::MAX).min(size);
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
    let span = |(start, end)| ByteSpan { offset: ByteOffset(start), length: ByteCount(end - start) };
    Some(ranges.into_iter().map(span).collect())
}

/// The runs of adjoining blocks, first and last: a trim of a huge disk is few of them and very many blocks.
fn runs(blocks: &RoaringTreemap) -> impl Iterator<Item = (u64, u64)> + '_ {
    blocks.bitmaps().flat_map(|(high, bitmap)| {
        let mut blocks = bitmap.iter();
        let whole = move |low: u32| u64::from(high) << 32 | u64::from(low);
        std::iter::from_fn(move || blocks.next_range().map(|run| (whole(*run.start()), whole(*run.end()))))
    })
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
    fn dirty_extents_cover_the_range_from_its_begin() {
        let blocks: RoaringTreemap = [0, 1, 5].into_iter().collect();
        let told = |start: u64, end: u64, most: usize| {
            let range = ByteRange::between(ByteOffset(start), ByteOffset(end));
            let extents = dirty_extents(&blocks, range, most);
            extents.iter().map(|extent| (extent.length.0, extent.dirty)).collect::<Vec<_>>()
        };
        assert_eq!(told(0, 40960, 9), [(8192, true), (12288, false), (4096, true), (16384, false)]);
        assert_eq!(told(512, 9000, 9), [(7680, true), (808, false)]);
        assert_eq!(told(20480, 21000, 9), [(520, true)]);
        assert_eq!(told(8192, 16384, 9), [(8192, false)]);
        assert_eq!(told(0, 40960, 2), [(8192, true), (12288, false)]);
    }

    #[test]
    fn a_trim_of_a_huge_disk_is_one_span() {
        const BLOCKS: u64 = (64 << 40) / BLOCK_SIZE;
        let mut blocks = RoaringTreemap::new();
        blocks.insert_range(1..BLOCKS);
        let changes = spans(&blocks, ByteCount(BLOCKS * BLOCK_SIZE), 10);
        assert_eq!(flat(&changes), [(BLOCK_SIZE, (BLOCKS - 1) * BLOCK_SIZE)]);
    }

    #[test]
    fn spans_of_many_runs_are_what_single_blocks_give() {
        let blocks: RoaringTreemap = (0..5000_u64).map(|n| n * n % 7919 + (n % 3) * (1 << 31)).collect();
        let size = ByteCount(BLOCK_SIZE << 33);
        for spans_max in [1, 7, 300, 100_000] {
            let Changes { granularity, spans } = spans(&blocks, size, spans_max);
            assert!(spans.len() <= spans_max);
            let inside = |block: u64, span: &ByteSpan| {
                (span.offset.0..span.offset.0 + span.length.0).contains(&(block * BLOCK_SIZE))
            };
            assert!(blocks.iter().all(|block| spans.iter().any(|span| inside(block, span))), "{granularity}");
            assert!(spans.windows(2).all(|two| two[0].offset.0 + two[0].length.0 < two[1].offset.0));
        }
    }

    #[test]
    fn nothing_changed_is_no_span() {
        assert!(spans(&RoaringTreemap::new(), ByteCount(4096), 1).spans.is_empty());
    }
}
