//! Which segments have which buckets: finds the few that a look-up needs among any number of them.
//!
//! Every segment that is not written any more comes in as a node: its buckets, sorted. Eight nodes of one
//! tier become one of the next, with the list of its segments under every bucket. So there are few nodes however
//! long the log, and one binary search in each gives exactly the segments that touch a bucket. Nodes never
//! change and are shared with snapshots.
//!
//! Memory is bounded, by a limit and by what the log has: beyond 1.75 bytes for each bucket that a segment
//! has, buckets are counted in larger units, first in the node that takes most for each. Then some
//! segments are named that do not have the bucket; whoever asks looks into their index and finds nothing.

mod lists;
mod node;

use std::sync::Arc;

use backtide_segment::{Bucket, LEVELS, SegmentStats};
use backtide_units::{ByteCount, ByteRange, Lsn};
use roaring::RoaringTreemap;

use node::Node;

/// Nodes of a tier that become one of the next.
const FANOUT: usize = 8;

/// Nodes of this tier (32,768 segments) are not joined: a place in a node has 16 bits.
const TIER_MAX: u8 = 5;

/// A log may take so much whatever it has.
const BYTES_MIN: u64 = 512 << 10;

/// The lowest and the highest version of a segment's extents; the lowest above the highest without any.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Versions {
    pub(crate) min: Lsn,
    pub(crate) max: Lsn,
}

/// Segments in log order, found by their buckets. Cheap to clone.
#[derive(Clone)]
pub(crate) struct Directory<S> {
    nodes: Vec<Placed<S>>,
    bytes_max: ByteCount,
}

/// A node, and the highest version before it.
#[derive(Clone)]
struct Placed<S> {
    node: Arc<Node<S>>,
    max_before: Lsn,
}

/// One segment with its buckets, ready to be added.
pub(crate) struct Leaf<S>(Arc<Node<S>>);

impl<S: Clone> Leaf<S> {
    /// Of a segment with the codes of its buckets.
    pub(crate) fn new(segment: S, versions: Versions, buckets: &RoaringTreemap) -> Self {
        Self(Arc::new(Node::leaf(segment, versions, buckets)))
    }
}

impl<S> Clone for Leaf<S> {
    fn clone(&self) -> Self {
        Self(Arc::clone(&self.0))
    }
}

impl Versions {
    pub(crate) fn of(stats: &SegmentStats) -> Self {
        Self { min: stats.version_min, max: stats.version_max }
    }
}

/// Work on the directory, to be done on any thread; one at a time.
pub(crate) enum Upkeep<S> {
    /// Nodes that become one.
    Join(Job<S>),
    /// One that takes too much memory.
    Coarsen(Job<S>),
}

/// Nodes that stand together, from the `first`-th on.
pub(crate) struct Job<S> {
    first: usize,
    nodes: Vec<Arc<Node<S>>>,
}

/// Work that is done.
pub(crate) struct Upkept<S> {
    job: Job<S>,
    node: Arc<Node<S>>,
}

impl<S: Clone> Upkeep<S> {
    /// Does it.
    pub(crate) fn run(self) -> Upkept<S> {
        match self {
            Self::Join(job) => {
                let node = Arc::new(Node::join(job.nodes.iter().map(|node| &**node)));
                Upkept { job, node }
            }
            Self::Coarsen(job) => {
                let node = Arc::new(job.nodes[0].coarser());
                Upkept { job, node }
            }
        }
    }
}

/// Segments that may have extents of some buckets at or below a version, newest first.
pub(crate) struct Candidates<'a, S> {
    nodes: &'a [Placed<S>],
    /// Where the range asked for lies: one bucket of each level from the lowest on.
    buckets: Vec<Bucket>,
    at: Lsn,
    /// Of the node that is walked through: for each bucket, places that are still to come.
    places: Vec<Vec<u16>>,
}

impl<S: Clone> Directory<S> {
    pub(crate) fn new(bytes_max: ByteCount) -> Self {
        Self { nodes: Vec::new(), bytes_max }
    }

    /// Adds the next segment.
    pub(crate) fn push(&mut self, leaf: Leaf<S>) {
        self.place(leaf.0);
    }

    fn place(&mut self, node: Arc<Node<S>>) {
        let max_before =
            self.nodes.last().map_or(Lsn::ZERO, |last| last.max_before.max(last.node.version_max()));
        self.nodes.push(Placed { node, max_before });
    }

    /// Drops nodes from the first on, as long as all segments of a node are `unwanted`; none while there is work under
    /// way, which knows nodes by their places.
    pub(crate) fn drop_first(&mut self, unwanted: impl Fn(&S) -> bool) {
        let all = |placed: &Placed<S>| placed.node.segments().iter().all(&unwanted);
        let dropped = self.nodes.iter().take_while(|placed| all(placed)).count();
        let rest = self.nodes.split_off(dropped);
        self.nodes.clear();
        for placed in rest {
            self.place(placed.node);
        }
    }

    /// What is to be done for few nodes and little memory, if anything. Look-ups are right without it.
    pub(crate) fn upkeep(&self) -> Option<Upkeep<S>> {
        self.full_tier().map(Upkeep::Join).or_else(|| self.coarsening())
    }

    /// The first eight nodes of one tier, which stand together.
    fn full_tier(&self) -> Option<Job<S>> {
        let mut runs = self.nodes.chunk_by(|a, b| a.node.tier() == b.node.tier());
        let mut first = 0;
        let run = runs.find(|run| {
            let full = run.len() >= FANOUT && run[0].node.tier() < TIER_MAX;
            first += if full { 0 } else { run.len() };
            full
        })?;
        Some(Job { first, nodes: run[..FANOUT].iter().map(|placed| Arc::clone(&placed.node)).collect() })
    }

    fn coarsening(&self) -> Option<Upkeep<S>> {
        let buckets: u64 = self.nodes.iter().map(|placed| placed.node.buckets()).sum();
        let lists: u64 = self.nodes.iter().map(|placed| placed.node.list_bytes() as u64).sum();
        if self.bytes() <= self.bytes_max && lists <= BYTES_MIN.max(buckets / 4 * 7) {
            return None;
        }
        let nodes = self.nodes.iter().enumerate().filter(|(_, placed)| placed.node.can_be_coarser());
        let dearness = |node: &Node<S>| node.list_bytes() as u64 * 16 / node.buckets().max(1);
        let (first, dearest) =
            nodes.max_by_key(|(_, placed)| (dearness(&placed.node), placed.node.list_bytes()))?;
        Some(Upkeep::Coarsen(Job { first, nodes: vec![Arc::clone(&dearest.node)] }))
    }

    /// Puts the outcome in place.
    ///
    /// # Panics
    /// When it is not of this directory.
    pub(crate) fn install(&mut self, upkept: Upkept<S>) {
        let Upkept { job, node } = upkept;
        let behind = job.first + job.nodes.len();
        let replaced = &self.nodes[job.first..behind];
        let same = replaced.iter().zip(&job.nodes).all(|(placed, node)| Arc::ptr_eq(&placed.node, node));
        assert!(same, "only one upkeep is under way at a time");
        let rest = self.nodes.split_off(behind);
        self.nodes.truncate(job.first);
        self.place(node);
        for placed in rest {
            self.place(placed.node);
        }
    }

    /// Memory of all nodes, without the segments themselves.
    pub(crate) fn bytes(&self) -> ByteCount {
        ByteCount(self.nodes.iter().map(|placed| placed.node.bytes() as u64).sum())
    }

    /// All segments in log order.
    pub(crate) fn iter(&self) -> impl DoubleEndedIterator<Item = &S> {
        self.nodes.iter().flat_map(|placed| placed.node.segments())
    }

    /// Whether any segment may have extents in the buckets of a level that touch `range`.
    pub(crate) fn has(&self, level: u8, range: ByteRange) -> bool {
        self.nodes.iter().any(|placed| placed.node.has(level, range))
    }

    /// Gives the segments that may have extents in the buckets that touch `range`, in log order, each with a bit for every
    /// level of those.
    pub(crate) fn each_within<'a>(&'a self, range: ByteRange, take: &mut dyn FnMut(&'a S, u16)) {
        for Placed { node, .. } in &self.nodes {
            let mut levels = vec![0; node.segments().len()];
            (0..LEVELS).for_each(|level| node.note_within(level, range, &mut levels));
            for (segment, levels) in node.segments().iter().zip(levels).filter(|(_, levels)| *levels != 0) {
                take(segment, levels);
            }
        }
    }

    /// The segments that may have extents at or below `at` in the buckets, from `lowest` on, that hold the byte
    /// at which `range` begins.
    pub(crate) fn candidates(&self, range: ByteRange, lowest: u8, at: Lsn) -> Candidates<'_, S> {
        let buckets = (lowest..LEVELS).map(|level| Bucket::holding(range.start(), level)).collect();
        let mut candidates = Candidates { nodes: &self.nodes, buckets, at, places: Vec::new() };
        candidates.enter();
        candidates
    }
}

impl<'a, S> Candidates<'a, S> {
    /// Begins with the last node that is left.
    fn enter(&mut self) {
        self.places.clear();
        if let Some(Placed { node, .. }) = self.nodes.last() {
            let end = node.places_at(self.at);
            let upto = |mut places: Vec<u16>| {
                places.truncate(places.partition_point(|place| usize::from(*place) < end));
                places
            };
            self.places.extend(self.buckets.iter().map(|bucket| upto(node.places(*bucket))));
        }
    }

    /// The highest version that the next one, or any after it, can have.
    pub(crate) fn version_max(&mut self) -> Option<Lsn> {
        loop {
            let Placed { node, max_before } = self.nodes.last()?;
            if let Some(place) = self.places.iter().filter_map(|places| places.last()).max() {
                return Some(node.version_max_upto(usize::from(*place)).max(*max_before).min(self.at));
            }
            self.nodes = &self.nodes[..self.nodes.len() - 1];
            self.enter();
        }
    }
}

impl<'a, S> Iterator for Candidates<'a, S> {
    /// A segment, and the bucket it may have.
    type Item = (&'a S, Bucket);

    fn next(&mut self) -> Option<Self::Item> {
        self.version_max()?;
        let node = &self.nodes.last()?.node;
        let newest = (0..self.places.len()).max_by_key(|which| self.places[*which].last())?;
        let place = self.places[newest].pop()?;
        Some((&node.segments()[usize::from(place)], self.buckets[newest]))
    }
}

#[cfg(test)]
mod tests;
