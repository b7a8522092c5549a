//! Consecutive segments, and under every bucket the list of those that have it.

use backtide_segment::{Bucket, LEVELS};
use backtide_units::{ByteRange, Lsn};
use roaring::RoaringTreemap;

use super::{
    Versions,
    lists::{Builder, Lists, Reader},
};

/// How much coarser a node becomes at a time, as a power of two.
const COARSER: u8 = 4;

/// Bits of a bucket's number.
const NUMBER_BITS: u8 = 32;

/// See the module's description.
pub(super) struct Node<S> {
    tier: u8,
    segments: Vec<S>,
    /// The lowest version of each segment and of those after it; ascending.
    low: Vec<Lsn>,
    /// The highest version of each segment and of those before it; ascending.
    high: Vec<Lsn>,
    versions: Vec<Versions>,
    /// Numbers of buckets are shifted right by this.
    shift: u8,
    /// The buckets of each level.
    levels: Vec<Lists>,
    /// Buckets of all segments as they came.
    buckets: u64,
}

/// One of the nodes that another is made of.
struct Source<'a> {
    reader: Reader<'a>,
    shift: u8,
    first_place: u16,
    /// The bucket that is next, its number as the new node has it.
    number: Option<u32>,
    places: Vec<u16>,
}

impl Source<'_> {
    fn advance(&mut self) {
        let number = self.reader.next(&mut self.places);
        self.number = number.map(|number| shifted(number, self.shift));
    }
}

fn shifted(number: u32, shift: u8) -> u32 {
    number.checked_shr(shift.into()).unwrap_or(0)
}

impl<S: Clone> Node<S> {
    pub(super) fn leaf(segment: S, versions: Versions, buckets: &RoaringTreemap) -> Self {
        let mut levels: Vec<Builder> = (0..LEVELS).map(|_| Builder::new(true)).collect();
        for bucket in buckets.iter().filter_map(Bucket::from_code) {
            levels[usize::from(bucket.level())].push(bucket.number(), &[0]);
        }
        let levels = levels.into_iter().map(Builder::finish).collect();
        Self::new(0, vec![segment], vec![versions], 0, levels, buckets.len())
    }

    /// The nodes in one of the next tier; they must be in log order.
    pub(super) fn join<'a>(nodes: impl Iterator<Item = &'a Self> + Clone) -> Self
    where
        S: 'a,
    {
        let shift = nodes.clone().map(|node| node.shift).max().unwrap_or(0);
        let tier = nodes.clone().map(|node| node.tier + 1).max().unwrap_or(0);
        let (mut segments, mut versions, mut parts) = (Vec::new(), Vec::new(), Vec::new());
        for node in nodes {
            parts.push((node, segments.len() as u16));
            segments.extend_from_slice(&node.segments);
            versions.extend_from_slice(&node.versions);
        }
        Self::build(tier, segments, versions, shift, &parts)
    }

    /// The same with buckets counted in larger units.
    pub(super) fn coarser(&self) -> Self {
        let (segments, versions) = (self.segments.clone(), self.versions.clone());
        Self::build(self.tier, segments, versions, self.shift + COARSER, &[(self, 0)])
    }

    /// Of nodes, each with the place that its first segment has from now on.
    fn build(tier: u8, segments: Vec<S>, versions: Vec<Versions>, shift: u8, parts: &[(&Self, u16)]) -> Self {
        let alone = segments.len() == 1;
        let levels = (0..usize::from(LEVELS)).map(|level| merge(parts, level, shift, alone)).collect();
        let buckets = parts.iter().map(|(node, _)| node.buckets).sum();
        Self::new(tier, segments, versions, shift, levels, buckets)
    }

    fn new(
        tier: u8,
        segments: Vec<S>,
        versions: Vec<Versions>,
        shift: u8,
        levels: Vec<Lists>,
        buckets: u64,
    ) -> Self {
        let mut high: Vec<Lsn> = versions.iter().map(|versions| versions.max).collect();
        let mut low: Vec<Lsn> = versions.iter().map(|versions| versions.min).collect();
        for place in 1..versions.len() {
            high[place] = high[place].max(high[place - 1]);
        }
        for place in (1..versions.len()).rev() {
            low[place - 1] = low[place - 1].min(low[place]);
        }
        Self { tier, segments, low, high, versions, shift, levels, buckets }
    }
}

/// One level of several nodes in one. What is read is in order, so no more than a bucket of each is in memory twice.
fn merge<S>(parts: &[(&Node<S>, u16)], level: usize, shift: u8, alone: bool) -> Lists {
    let mut sources: Vec<Source<'_>> = Vec::with_capacity(parts.len());
    for (node, first_place) in parts {
        sources.push(Source {
            reader: node.levels[level].read(node.is_alone()),
            shift: shift - node.shift,
            first_place: *first_place,
            number: None,
            places: Vec::new(),
        });
    }
    sources.iter_mut().for_each(Source::advance);
    let (mut builder, mut places) = (Builder::new(alone), Vec::new());
    while let Some(number) = sources.iter().filter_map(|source| source.number).min() {
        places.clear();
        for source in &mut sources {
            let from = places.len();
            while source.number == Some(number) {
                places.extend(source.places.iter().map(|place| source.first_place + place));
                source.advance();
            }
            // Several of its buckets may be one now.
            places[from..].sort_unstable();
        }
        places.dedup();
        builder.push(number, &places);
    }
    builder.finish()
}

impl<S> Node<S> {
    pub(super) fn tier(&self) -> u8 {
        self.tier
    }

    pub(super) fn segments(&self) -> &[S] {
        &self.segments
    }

    pub(super) fn version_max(&self) -> Lsn {
        self.high.last().copied().unwrap_or_default()
    }

    /// The highest version of the segments up to a place.
    pub(super) fn version_max_upto(&self, place: usize) -> Lsn {
        self.high[place]
    }

    /// How many segments from the first on can have a version at or below `at`.
    pub(super) fn places_at(&self, at: Lsn) -> usize {
        self.low.partition_point(|low| *low <= at)
    }

    /// Bytes of the lists, which are fewer when it is coarser.
    pub(super) fn list_bytes(&self) -> usize {
        self.levels.iter().map(Lists::bytes).sum()
    }

    pub(super) fn bytes(&self) -> usize {
        let of_segments = size_of::<S>() + size_of::<Versions>() + 2 * size_of::<Lsn>();
        self.segments.len() * of_segments + self.list_bytes()
    }

    /// Buckets of all its segments as they came: no more than they have extents.
    pub(super) fn buckets(&self) -> u64 {
        self.buckets
    }

    pub(super) fn can_be_coarser(&self) -> bool {
        self.shift < NUMBER_BITS && self.list_bytes() > 0
    }

    fn is_alone(&self) -> bool {
        self.segments.len() == 1
    }

    /// The places of the segments that may have extents in `bucket`, ascending.
    pub(super) fn places(&self, bucket: Bucket) -> Vec<u16> {
        let (wanted, mut places) = (shifted(bucket.number(), self.shift), Vec::new());
        let lists = &self.levels[usize::from(bucket.level())];
        match lists.find(wanted, self.is_alone(), &mut places) {
            Some(found) if found == wanted => places,
            Some(_) | None => Vec::new(),
        }
    }

    /// Sets the bit of a level for each segment, by its place, that may have extents in the buckets that touch `range`.
    pub(super) fn note_within(&self, level: u8, range: ByteRange, levels: &mut [u16]) {
        if range.is_empty() {
            return;
        }
        let last = backtide_units::ByteOffset(range.end().0 - 1);
        let number = |at| shifted(Bucket::holding(at, level).number(), self.shift);
        let lists = &self.levels[usize::from(level)];
        let Some(mut reader) = lists.read_from(number(range.start()), self.is_alone()) else { return };
        let mut places = Vec::new();
        while let Some(found) = reader.next(&mut places).filter(|found| *found <= number(last)) {
            if found >= number(range.start()) {
                places.iter().for_each(|place| levels[usize::from(*place)] |= 1 << level);
            }
        }
    }

    /// Whether any segment may have extents in the buckets of a level that touch `range`.
    pub(super) fn has(&self, level: u8, range: ByteRange) -> bool {
        let lists = &self.levels[usize::from(level)];
        if range.is_empty() {
            return false;
        }
        let last = backtide_units::ByteOffset(range.end().0 - 1);
        let number = |at| shifted(Bucket::holding(at, level).number(), self.shift);
        let found = lists.find(number(range.start()), self.is_alone(), &mut Vec::new());
        found.is_some_and(|found| found <= number(last))
    }
}
