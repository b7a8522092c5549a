//! Consecutive segments, and under every bucket the list of those that have it.

use backtide_segment::{Bucket, LEVELS};
use backtide_units::{ByteRange, Lsn};
use roaring::RoaringTreemap;

use super::Versions;

/// How much coarser a node becomes at a time, as a power of two.
const COARSER: u8 = 4;

/// Bits of a bucket's number.
const NUMBER_BITS: u8 = 32;

/// See the module's description. The lists are one array: those of bucket number `numbers[i]` are
/// `places[starts[i]..starts[i + 1]]`, ascending.
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
    /// Where the numbers of each level begin, and where the last ends.
    levels: [u32; LEVELS as usize + 1],
    numbers: Vec<u32>,
    starts: Vec<u32>,
    places: Vec<u16>,
}

/// A bucket and a place in one number, in their order: level, number, place.
fn packed(level: u8, number: u32, place: u16) -> u64 {
    u64::from(level) << 48 | u64::from(number) << 16 | u64::from(place)
}

impl<S: Clone> Node<S> {
    pub(super) fn leaf(segment: S, versions: Versions, buckets: &RoaringTreemap) -> Self {
        let buckets = buckets.iter().filter_map(Bucket::from_code);
        let entries = buckets.map(|bucket| packed(bucket.level(), bucket.number(), 0)).collect();
        Self::build(0, vec![segment], vec![versions], 0, entries)
    }

    /// The nodes in one of the next tier; they must be in log order.
    pub(super) fn join<'a>(nodes: impl Iterator<Item = &'a Self> + Clone) -> Self
    where
        S: 'a,
    {
        let shift = nodes.clone().map(|node| node.shift).max().unwrap_or(0);
        let tier = nodes.clone().map(|node| node.tier + 1).max().unwrap_or(0);
        let (mut segments, mut versions, mut entries) = (Vec::new(), Vec::new(), Vec::new());
        for node in nodes {
            node.entries(shift, segments.len() as u16, &mut entries);
            segments.extend_from_slice(&node.segments);
            versions.extend_from_slice(&node.versions);
        }
        Self::build(tier, segments, versions, shift, entries)
    }

    /// The same with buckets counted in larger units.
    pub(super) fn coarser(&self) -> Self {
        let shift = self.shift + COARSER;
        let mut entries = Vec::new();
        self.entries(shift, 0, &mut entries);
        Self::build(self.tier, self.segments.clone(), self.versions.clone(), shift, entries)
    }

    fn entries(&self, shift: u8, first_place: u16, out: &mut Vec<u64>) {
        for level in 0..LEVELS {
            for which in self.level(level) {
                let number = self.numbers[which].checked_shr((shift - self.shift).into()).unwrap_or(0);
                let places = &self.places[self.starts[which] as usize..self.starts[which + 1] as usize];
                out.extend(places.iter().map(|place| packed(level, number, first_place + place)));
            }
        }
    }

    /// Of entries in any order, several of them equal.
    fn build(tier: u8, segments: Vec<S>, versions: Vec<Versions>, shift: u8, mut entries: Vec<u64>) -> Self {
        // Runs that are sorted already, which this sort makes use of.
        entries.sort();
        entries.dedup();
        let mut high: Vec<Lsn> = versions.iter().map(|versions| versions.max).collect();
        let mut low: Vec<Lsn> = versions.iter().map(|versions| versions.min).collect();
        for place in 1..versions.len() {
            high[place] = high[place].max(high[place - 1]);
        }
        for place in (1..versions.len()).rev() {
            low[place - 1] = low[place - 1].min(low[place]);
        }
        let mut levels = [0; LEVELS as usize + 1];
        let (mut numbers, mut starts) = (Vec::new(), Vec::new());
        let mut last = None;
        for (at, entry) in entries.iter().enumerate() {
            if last != Some(entry >> 16) {
                last = Some(entry >> 16);
                numbers.push((entry >> 16) as u32);
                starts.push(at as u32);
                levels[(entry >> 48) as usize + 1] = numbers.len() as u32;
            }
        }
        starts.push(entries.len() as u32);
        for level in 1..levels.len() {
            levels[level] = levels[level].max(levels[level - 1]);
        }
        let places: Vec<u16> = entries.iter().map(|entry| *entry as u16).collect();
        numbers.shrink_to_fit();
        starts.shrink_to_fit();
        Self { tier, segments, low, high, versions, shift, levels, numbers, starts, places }
    }
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

    pub(super) fn bytes(&self) -> usize {
        let of_segments = size_of::<S>() + size_of::<Versions>() + 2 * size_of::<Lsn>();
        self.segments.len() * of_segments
            + (self.numbers.len() + self.starts.len()) * size_of::<u32>()
            + self.places.len() * size_of::<u16>()
    }

    pub(super) fn can_be_coarser(&self) -> bool {
        self.shift < NUMBER_BITS && !self.numbers.is_empty()
    }

    fn level(&self, level: u8) -> std::ops::Range<usize> {
        let level = usize::from(level);
        self.levels[level] as usize..self.levels[level + 1] as usize
    }

    fn shifted(&self, bucket: Bucket) -> u32 {
        bucket.number().checked_shr(self.shift.into()).unwrap_or(0)
    }

    /// The places of the segments that may have extents in `bucket`, ascending.
    pub(super) fn places(&self, bucket: Bucket) -> &[u16] {
        let level = self.level(bucket.level());
        match self.numbers[level.clone()].binary_search(&self.shifted(bucket)) {
            Ok(found) => {
                let which = level.start + found;
                &self.places[self.starts[which] as usize..self.starts[which + 1] as usize]
            }
            Err(_) => &[],
        }
    }

    /// Whether any segment may have extents in the buckets of a level that touch `range`.
    pub(super) fn has(&self, level: u8, range: ByteRange) -> bool {
        let numbers = &self.numbers[self.level(level)];
        if range.is_empty() || numbers.is_empty() {
            return false;
        }
        let first = self.shifted(Bucket::holding(range.start(), level));
        let last = Bucket::holding(backtide_units::ByteOffset(range.end().0 - 1), level);
        let place = numbers.partition_point(|number| *number < first);
        numbers.get(place).is_some_and(|number| *number <= self.shifted(last))
    }
}
