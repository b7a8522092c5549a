//! What a large part of a disk is made of, segment by segment: each index is walked once, in its order.
//!
//! `merge.rs` resolves bucket after bucket and asks each segment that may have one. That is right for a read, which wants
//! few of them. Of a large part it costs a look-up for each bucket and segment: with small writes all over a disk, of which
//! each leaves gaps that only older segments can fill, that is every segment for every bucket. Here the segments come in
//! the order of the newest version they can have, and give everything that they have where something is still open; what is
//! open becomes less from segment to segment, and an index is left out where nothing is.
//!
//! Versions are not in log order, so what segments gave waits in a heap, and is taken when no segment that is left can have
//! anything newer. Memory goes by what is in the part, which is 256 MiB at the most.

use std::{
    cmp::Ordering,
    collections::{BTreeMap, BinaryHeap},
};

use backtide_segment::{Bucket, ExtentKey, LEVELS};
use backtide_units::{ByteOffset, ByteRange, Lsn};

use crate::{
    LogError,
    merge::{Content, Merge, Piece, Source},
    segment::{Next, Segment},
};

/// Buckets of these levels (16 MiB and 256 MiB) are swept when there is anything finer in them.
pub(crate) const SWEPT: std::ops::RangeInclusive<u8> = 2..=3;

/// In buckets of these levels what newer extents of the same segment cover is left out at once. Larger ones hold few
/// extents, and many gaps.
const THINNED_MAX: u8 = 1;

/// Ranges that lie apart, by their starts.
struct Gaps(BTreeMap<u64, u64>);

/// An extent that a segment gave.
struct Given<'a>(Source<'a>);

/// A segment that has not given anything yet: the newest version that it can have, and the levels.
struct Waiting<'a> {
    version: Lsn,
    segment: &'a Segment,
    levels: u16,
}

impl<'a> Merge<'a> {
    /// Gives the pieces that make up `part`, in order.
    pub(crate) fn sweep(&self, part: ByteRange, take: &mut dyn FnMut(Piece<'a>)) -> Result<(), LogError> {
        let mut gaps = Gaps::of(part);
        let mut pieces = Vec::new();
        let mut waiting = self.waiting(part)?;
        let mut given: BinaryHeap<Given<'a>> = BinaryHeap::new();
        while !gaps.0.is_empty() {
            // Of one version too: the later entry counts, and it may be in either.
            let is_next = |next: &mut Waiting<'a>| {
                given.peek().is_none_or(|Given(top)| top.extent.version <= next.version)
            };
            if let Some(Waiting { segment, levels, .. }) = waiting.pop_if(is_next) {
                for level in (0..LEVELS).filter(|level| levels & 1 << level != 0) {
                    self.give(segment, level, &gaps, &mut given)?;
                }
                continue;
            }
            let Some(Given(source)) = given.pop() else { break };
            let content = if source.extent.zero { Content::Zeroes } else { Content::Payload(source) };
            let version = Some(source.extent.version);
            gaps.cover(source.extent.range, &mut |range| pieces.push(Piece { range, content, version }));
        }
        let below = |range| Piece { range, content: Content::Below, version: None };
        pieces.extend(gaps.iter().map(below));
        pieces.sort_by_key(|piece| piece.range.start());
        pieces.into_iter().for_each(take);
        Ok(())
    }

    /// The segments that may have anything of `part`, the one that can have the newest last.
    fn waiting(&self, part: ByteRange) -> Result<Vec<Waiting<'a>>, LogError> {
        let mut waiting = Vec::new();
        let mut wait = |segment: &'a Segment, levels: u16| {
            let version = segment.version_max_at(self.at).filter(|version| *version > self.floor);
            // One that is folded may be in the directory still, and its file be gone.
            let version = version.filter(|_| self.segments.has_segment(segment));
            waiting.extend(version.filter(|_| levels != 0).map(|version| Waiting {
                version,
                segment,
                levels,
            }));
        };
        self.segments.directory().each_within(part, &mut |segment, levels| wait(segment, levels));
        for segment in self.segments.recent() {
            let mut levels = 0;
            for level in 0..LEVELS {
                levels |= u16::from(segment.may_have(level, part)?) << level;
            }
            wait(segment, levels);
        }
        waiting.sort_by_key(|waiting| waiting.version);
        Ok(waiting)
    }

    /// Everything that a segment has in buckets of a level where there are gaps.
    fn give(
        &self,
        segment: &'a Segment,
        level: u8,
        gaps: &Gaps,
        given: &mut BinaryHeap<Given<'a>>,
    ) -> Result<(), LogError> {
        let newest_in = |gap: ByteRange| ExtentKey::newest(Bucket::holding(gap.start(), level), self.at);
        let Some(first) = gaps.first_behind(ByteOffset::ZERO) else { return Ok(()) };
        // What of the bucket no newer extent of this segment covers, whatever other segments have.
        let (mut bucket, mut open) = (None, Gaps(BTreeMap::new()));
        segment.walk_on(newest_in(first), &mut |key, extent| {
            let here = key.bucket();
            if here.level() != level {
                return Next::End;
            }
            let next_bucket = || {
                let gap = gaps.first_behind(here.range().end());
                gap.map_or(Next::End, |gap| Next::From(newest_in(gap)))
            };
            if bucket != Some(here) {
                match gaps.first_behind(here.range().start()) {
                    Some(gap) if gap.start() < here.range().end() => {}
                    Some(gap) => return Next::From(newest_in(gap)),
                    None => return Next::End,
                }
                bucket = Some(here);
                if level <= THINNED_MAX {
                    open = gaps.within(here.range());
                }
            }
            if extent.version > self.at {
                return Next::From(ExtentKey::newest(here, self.at));
            }
            if extent.version <= self.floor {
                return next_bucket();
            }
            if extent.seq > self.through {
                return Next::On;
            }
            let touched = if level <= THINNED_MAX {
                let mut touched = false;
                open.cover(extent.range, &mut |_| touched = true);
                touched
            } else {
                gaps.first_behind(extent.range.start()).is_some_and(|gap| gap.start() < extent.range.end())
            };
            if touched {
                given.push(Given(Source { segment, extent }));
            }
            if level <= THINNED_MAX && open.0.is_empty() { next_bucket() } else { Next::On }
        })
    }
}

impl Gaps {
    fn of(range: ByteRange) -> Self {
        Self(BTreeMap::from([(range.start().0, range.end().0)]))
    }

    fn iter(&self) -> impl Iterator<Item = ByteRange> {
        self.0.iter().map(|(start, end)| ByteRange::between(ByteOffset(*start), ByteOffset(*end)))
    }

    /// The first that ends behind `at`, from there on.
    fn first_behind(&self, at: ByteOffset) -> Option<ByteRange> {
        let before = self.0.range(..=at.0).next_back().filter(|(_, end)| **end > at.0);
        let (start, end) = before.or_else(|| self.0.range(at.0..).next())?;
        Some(ByteRange::between(ByteOffset((*start).max(at.0)), ByteOffset(*end)))
    }

    /// Those in a range.
    fn within(&self, range: ByteRange) -> Self {
        let mut within = BTreeMap::new();
        let mut at = range.start();
        while let Some(part) = self.first_behind(at).and_then(|gap| gap.intersection(range)) {
            within.insert(part.start().0, part.end().0);
            at = part.end();
        }
        Self(within)
    }

    /// Closes what of them lies in `range`, and gives it.
    fn cover(&mut self, range: ByteRange, take: &mut dyn FnMut(ByteRange)) {
        while let Some(part) = self.first_behind(range.start()).and_then(|gap| gap.intersection(range)) {
            let (start, end) =
                self.0.range(..=part.start().0).next_back().map(|(s, e)| (*s, *e)).expect("a gap has it");
            self.0.remove(&start);
            if start < part.start().0 {
                self.0.insert(start, part.start().0);
            }
            if part.end().0 < end {
                self.0.insert(part.end().0, end);
            }
            take(part);
        }
    }
}

impl Given<'_> {
    fn key(&self) -> (Lsn, backtide_segment::Seq, backtide_segment::SegmentId) {
        (self.0.extent.version, self.0.extent.seq, self.0.segment.header().id)
    }
}

impl Ord for Given<'_> {
    fn cmp(&self, other: &Self) -> Ordering {
        self.key().cmp(&other.key())
    }
}

impl PartialOrd for Given<'_> {
    fn partial_cmp(&self, other: &Self) -> Option<Ordering> {
        Some(self.cmp(other))
    }
}

impl PartialEq for Given<'_> {
    fn eq(&self, other: &Self) -> bool {
        self.cmp(other) == Ordering::Equal
    }
}

impl Eq for Given<'_> {}
