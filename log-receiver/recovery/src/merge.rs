//! Which version of each byte a point has: the newest at or below it, over all segments.
//!
//! A range is cut into buckets, as large as there are no finer extents in them: a large piece of a disk that was
//! never written, or trimmed as a whole, is one look-up. In each bucket segments are merged by version. Versions are
//! not in log order: pass data at T may lie behind records above T, and in a later segment. So a segment waits in
//! a heap under the highest version it can have, is opened only when its turn comes, and the walk ends as
//! soon as every byte is covered. Older segments are asked for only when nothing in the heap is above all that they
//! can have. Equal versions happen within one pass only; there the later entry counts. Large parts of a disk are made
//! up segment by segment instead (`sweep.rs`).

use std::{
    cmp::Ordering,
    collections::{BinaryHeap, VecDeque},
    sync::Arc,
};

use backtide_segment::{Bucket, Extent, ExtentKey, LEVELS, Seq};
use backtide_units::{ByteRange, Lsn};

use crate::{LogError, directory::Candidates, segment::Segment, segments::Segments, sweep::SWEPT};

/// Extents fetched from a segment at once.
const FETCH: usize = 16;

/// Bytes of the disk and where they come from.
#[derive(Clone)]
pub(crate) struct Piece<'a> {
    pub(crate) range: ByteRange,
    pub(crate) content: Content<'a>,
    /// The version of these bytes, also of zeros; none of what the log has nothing of.
    pub(crate) version: Option<Lsn>,
}

/// Where bytes come from.
#[derive(Clone, Copy)]
pub(crate) enum Content<'a> {
    /// An extent with a payload.
    Payload(Source<'a>),
    /// An extent of zeroes.
    Zeroes,
    /// Nothing above the floor: what was there at the floor, or zeroes when the log begins with itself.
    Below,
}

/// An extent, with its segment.
#[derive(Clone, Copy)]
pub(crate) struct Source<'a> {
    pub(crate) segment: &'a Segment,
    pub(crate) extent: Extent,
}

/// A segment's extents of one bucket, newest first, fetched as they are needed.
struct Cursor<'a> {
    segment: &'a Segment,
    fetched: VecDeque<Extent>,
    next: Option<ExtentKey>,
}

/// A cursor by the version and entry it can give next at the highest.
struct Waiting<'a> {
    version: Lsn,
    seq: Seq,
    cursor: Cursor<'a>,
}

/// What a merge reads from.
pub(crate) struct Merge<'a> {
    pub(crate) segments: &'a Segments,
    pub(crate) at: Lsn,
    /// Versions at or below it do not count.
    pub(crate) floor: Lsn,
    pub(crate) through: Seq,
}

impl<'a> Merge<'a> {
    /// Gives the pieces that make up `range`, in order.
    pub(crate) fn pieces(&self, range: ByteRange, take: &mut dyn FnMut(Piece<'a>)) -> Result<(), LogError> {
        for (bucket, part) in Bucket::split(range) {
            self.resolve(bucket.level(), part, take)?;
        }
        Ok(())
    }

    /// The pieces of a part of one bucket of `level`.
    fn resolve(&self, level: u8, part: ByteRange, take: &mut dyn FnMut(Piece<'a>)) -> Result<(), LogError> {
        let mut finer = false;
        for level in 0..level {
            finer |= self.segments.has(level, part)?;
        }
        if !finer {
            return self.window(level, part, take);
        }
        if SWEPT.contains(&level) {
            return self.sweep(part, take);
        }
        for part in part.split_at_multiples(Bucket::size(level - 1)) {
            self.resolve(level - 1, part, take)?;
        }
        Ok(())
    }

    /// The pieces of a part of a bucket in which no extent is finer.
    fn window(&self, level: u8, window: ByteRange, take: &mut dyn FnMut(Piece<'a>)) -> Result<(), LogError> {
        let mut gaps = vec![window];
        let mut pieces = Vec::new();
        let mut older = self.segments.directory().candidates(window, level, self.at);
        let mut heap = self.recent(level, window)?;
        while !gaps.is_empty() {
            self.admit(&mut heap, &mut older);
            let Some(Waiting { mut cursor, .. }) = heap.pop() else { break };
            // An opened cursor's turn means that its first extent is the newest of all.
            if let Some(extent) = cursor.fetched.pop_front() {
                cover(&mut gaps, Source { segment: cursor.segment, extent }, &mut pieces);
            }
            self.push(&mut heap, cursor)?;
        }
        let below = |range| Piece { range, content: Content::Below, version: None };
        pieces.extend(gaps.into_iter().map(below));
        pieces.sort_by_key(|piece| piece.range.start());
        pieces.into_iter().for_each(take);
        Ok(())
    }

    /// The segments that are not in the directory yet, not opened.
    fn recent(&self, level: u8, window: ByteRange) -> Result<BinaryHeap<Waiting<'a>>, LogError> {
        let mut heap = BinaryHeap::new();
        for segment in self.segments.recent() {
            for level in level..LEVELS {
                if segment.may_have(level, window)? {
                    self.wait(&mut heap, segment, Bucket::holding(window.start(), level));
                }
            }
        }
        Ok(heap)
    }

    fn wait(&self, heap: &mut BinaryHeap<Waiting<'a>>, segment: &'a Segment, bucket: Bucket) {
        // One that is folded may be in the directory still, joined with those behind it, and its file be gone.
        if !self.segments.has_segment(segment) {
            return;
        }
        let version = segment.version_max_at(self.at).filter(|version| *version > self.floor);
        let Some(version) = version else { return };
        let next = Some(ExtentKey::newest(bucket, self.at));
        let cursor = Cursor { segment, fetched: VecDeque::new(), next };
        // Under the highest number, so that it is opened before an extent of the same version is taken.
        heap.push(Waiting { version, seq: Seq(u64::MAX), cursor });
    }

    /// Lets older segments wait too, as long as they can have anything at or above the newest that waits.
    fn admit(&self, heap: &mut BinaryHeap<Waiting<'a>>, older: &mut Candidates<'a, Arc<Segment>>) {
        while let Some(version) = older.version_max() {
            if heap.peek().is_some_and(|waiting| waiting.version > version) {
                return;
            }
            let Some((segment, bucket)) = older.next() else { return };
            self.wait(heap, segment, bucket);
        }
    }

    /// Puts a cursor back under its next extent, fetching more when it has none; drops it at its end.
    fn push(&self, heap: &mut BinaryHeap<Waiting<'a>>, mut cursor: Cursor<'a>) -> Result<(), LogError> {
        while cursor.fetched.is_empty() {
            let Some(from) = cursor.next else { return Ok(()) };
            let extents = cursor.segment.fetch(from, FETCH)?;
            cursor.next = extents.last().filter(|_| extents.len() == FETCH).map(|(last, _)| last.older());
            let known = extents.into_iter().map(|(_, extent)| extent);
            let counts = |extent: &Extent| extent.seq <= self.through && extent.version > self.floor;
            cursor.fetched.extend(known.filter(counts));
        }
        if let Some(extent) = cursor.fetched.front() {
            heap.push(Waiting { version: extent.version, seq: extent.seq, cursor });
        }
        Ok(())
    }
}

/// Gives the parts of the extent that lie in gaps to the pieces, and closes those gaps.
fn cover<'a>(gaps: &mut Vec<ByteRange>, source: Source<'a>, pieces: &mut Vec<Piece<'a>>) {
    let mut left = Vec::with_capacity(gaps.len() + 1);
    for gap in gaps.drain(..) {
        let Some(range) = gap.intersection(source.extent.range) else {
            left.push(gap);
            continue;
        };
        let content = if source.extent.zero { Content::Zeroes } else { Content::Payload(source) };
        let version = Some(source.extent.version);
        pieces.push(Piece { range, content, version });
        let before = ByteRange::between(gap.start(), range.start());
        let after = ByteRange::between(range.end(), gap.end());
        left.extend([before, after].into_iter().filter(|rest| !rest.is_empty()));
    }
    *gaps = left;
}

impl Ord for Waiting<'_> {
    fn cmp(&self, other: &Self) -> Ordering {
        let key = |waiting: &Self| (waiting.version, waiting.seq, waiting.cursor.segment.header().id);
        key(self).cmp(&key(other))
    }
}

impl PartialOrd for Waiting<'_> {
    fn partial_cmp(&self, other: &Self) -> Option<Ordering> {
        Some(self.cmp(other))
    }
}

impl PartialEq for Waiting<'_> {
    fn eq(&self, other: &Self) -> bool {
        self.cmp(other) == Ordering::Equal
    }
}

impl Eq for Waiting<'_> {}
