//! Which version of each byte a point has: the newest at or below it, over all segments.
//!
//! Versions are not in log order: pass data at T may lie behind records above T, and in a later
//! segment. So the segments are merged by version: each one that has the bucket waits in a heap under
//! the highest version it can have, is opened only when its turn comes, and the walk ends as soon as
//! every byte is covered. Equal versions happen within one pass only; there the later entry counts.

use std::{
    cmp::Ordering,
    collections::{BinaryHeap, VecDeque},
    sync::Arc,
};

use backtide_segment::{BUCKET_SIZE, Bucket, Extent, ExtentKey, Seq};
use backtide_units::{ByteRange, Lsn};

use crate::{LogError, segment::Segment};

/// Extents fetched from a segment at once.
const FETCH: usize = 32;

/// Bytes of the disk and where they come from; `None` is zeros.
#[derive(Clone)]
pub(crate) struct Piece {
    pub(crate) range: ByteRange,
    pub(crate) source: Option<Source>,
}

/// An extent that is not zeroes, by its segment's place in the list.
#[derive(Clone, Copy)]
pub(crate) struct Source {
    pub(crate) segment: usize,
    pub(crate) extent: Extent,
}

/// A segment's extents of one bucket, newest first, fetched as they are needed.
struct Cursor {
    segment: usize,
    fetched: VecDeque<Extent>,
    next: Option<ExtentKey>,
}

/// A cursor by the version and entry it can give next at the highest.
struct Waiting {
    version: Lsn,
    seq: Seq,
    cursor: Cursor,
}

/// What a merge reads from.
pub(crate) struct Merge<'a> {
    pub(crate) segments: &'a [Arc<Segment>],
    pub(crate) at: Lsn,
    pub(crate) through: Seq,
}

impl Merge<'_> {
    /// The pieces that make up `range`, in order.
    pub(crate) fn pieces(&self, range: ByteRange) -> Result<Vec<Piece>, LogError> {
        let wide = self.wide(range)?;
        let mut pieces = Vec::new();
        for window in range.split_at_multiples(BUCKET_SIZE) {
            self.window(window, &wide, &mut pieces)?;
        }
        Ok(pieces)
    }

    /// All wide extents over `range`, newest first.
    fn wide(&self, range: ByteRange) -> Result<Vec<Source>, LogError> {
        let mut wide = Vec::new();
        for (place, segment) in self.segments.iter().enumerate() {
            let found = segment.wide(range, self.at)?;
            let known = found.into_iter().filter(|extent| extent.seq <= self.through);
            wide.extend(known.map(|extent| Source { segment: place, extent }));
        }
        wide.sort_by_key(|source| std::cmp::Reverse((source.extent.version, source.extent.seq)));
        Ok(wide)
    }

    fn window(&self, window: ByteRange, wide: &[Source], pieces: &mut Vec<Piece>) -> Result<(), LogError> {
        let bucket = Bucket::holding(window.start());
        let mut gaps = vec![window];
        let first = pieces.len();
        let mut wide = wide.iter().filter(|source| source.extent.range.overlaps(window)).peekable();
        let mut heap = self.waiting(bucket);
        while !gaps.is_empty() {
            let narrow = heap.peek().map(|waiting| (waiting.version, waiting.seq));
            let broad = wide.peek().map(|source| (source.extent.version, source.extent.seq));
            // A cursor that has not been opened waits under Seq::MAX and so goes before a wide extent
            // of the same version: it is opened and then stands where it belongs.
            if narrow.is_none() && broad.is_none() {
                break;
            }
            if narrow < broad {
                let Some(source) = wide.next() else { break };
                cover(&mut gaps, *source, pieces);
                continue;
            }
            let Some(Waiting { mut cursor, .. }) = heap.pop() else { break };
            // An opened cursor's turn means that its first extent is the newest of all.
            if let Some(extent) = cursor.fetched.pop_front() {
                cover(&mut gaps, Source { segment: cursor.segment, extent }, pieces);
            }
            self.push(&mut heap, cursor)?;
        }
        pieces.extend(gaps.into_iter().map(|range| Piece { range, source: None }));
        pieces[first..].sort_by_key(|piece| piece.range.start());
        Ok(())
    }

    /// Every segment that may have the bucket, not opened yet.
    fn waiting(&self, bucket: Bucket) -> BinaryHeap<Waiting> {
        let of = |(place, segment): (usize, &Arc<Segment>)| {
            let version = segment.narrow_bound(bucket, self.at)?;
            let next = Some(ExtentKey::newest(bucket, self.at));
            let cursor = Cursor { segment: place, fetched: VecDeque::new(), next };
            Some(Waiting { version, seq: Seq(u64::MAX), cursor })
        };
        self.segments.iter().enumerate().filter_map(of).collect()
    }

    /// Puts a cursor back under its next extent, fetching more when it has none; drops it at its end.
    fn push(&self, heap: &mut BinaryHeap<Waiting>, mut cursor: Cursor) -> Result<(), LogError> {
        while cursor.fetched.is_empty() {
            let Some(from) = cursor.next else { return Ok(()) };
            let extents = self.segments[cursor.segment].fetch(from, FETCH)?;
            cursor.next = extents.last().filter(|_| extents.len() == FETCH).map(|last| last.key().older());
            cursor.fetched.extend(extents.into_iter().filter(|extent| extent.seq <= self.through));
        }
        if let Some(extent) = cursor.fetched.front() {
            heap.push(Waiting { version: extent.version, seq: extent.seq, cursor });
        }
        Ok(())
    }
}

/// Gives the parts of the extent that lie in gaps to the pieces, and closes those gaps.
fn cover(gaps: &mut Vec<ByteRange>, source: Source, pieces: &mut Vec<Piece>) {
    let mut left = Vec::with_capacity(gaps.len() + 1);
    for gap in gaps.drain(..) {
        let Some(range) = gap.intersection(source.extent.range) else {
            left.push(gap);
            continue;
        };
        pieces.push(Piece { range, source: (!source.extent.zero).then_some(source) });
        let before = ByteRange::between(gap.start(), range.start());
        let after = ByteRange::between(range.end(), gap.end());
        left.extend([before, after].into_iter().filter(|rest| !rest.is_empty()));
    }
    *gaps = left;
}

impl Ord for Waiting {
    fn cmp(&self, other: &Self) -> Ordering {
        (self.version, self.seq, self.cursor.segment).cmp(&(other.version, other.seq, other.cursor.segment))
    }
}

impl PartialOrd for Waiting {
    fn partial_cmp(&self, other: &Self) -> Option<Ordering> {
        Some(self.cmp(other))
    }
}

impl PartialEq for Waiting {
    fn eq(&self, other: &Self) -> bool {
        self.cmp(other) == Ordering::Equal
    }
}

impl Eq for Waiting {}
