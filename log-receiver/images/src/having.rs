//! Where images have what was lost: which bytes of the disk cannot be read, in which of them.
//!
//! Trees share nodes, so each node is read once for all images that have it: what lies below it is known relative to it.

use std::{
    collections::{BTreeMap, HashMap},
    sync::Arc,
};

use backtide_units::{ByteOffset, ByteRange};
use roaring::RoaringTreemap;

use crate::{
    Image, ImageError, Losses,
    chunk::{ChunkRef, Kind},
    image::{covered, span},
};

/// So many ranges below one node are told apart for each thing that was lost; more are told as one that holds all of them.
const RANGES_MAX: usize = 16;

/// Bytes of the disk that cannot be read, by what is wrong: a sentence with file and place.
pub type LostRanges = BTreeMap<Arc<str>, LostBytes>;

/// Bytes of the disk, in order.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct LostBytes {
    /// Where. The last chunk of a disk is told of whole, though the disk may end within it.
    pub ranges: Vec<ByteRange>,
    /// Whether bytes between them may be told of too.
    pub coarse: bool,
}

/// Finds what was lost in any number of images.
pub struct Having<'a> {
    losses: &'a Losses,
    /// Nodes below which everything can be read.
    whole: RoaringTreemap,
    /// What cannot, relative to the node.
    below: HashMap<u64, LostRanges>,
}

impl LostBytes {
    fn add(&mut self, range: ByteRange, coarse: bool) {
        self.coarse |= coarse;
        let full = self.ranges.len() >= RANGES_MAX;
        match self.ranges.last_mut() {
            Some(last) if last.end() >= range.start() && last.start() <= range.start() => {
                *last = ByteRange::between(last.start(), last.end().max(range.end()));
            }
            Some(last) if full => {
                *last = ByteRange::between(last.start(), range.end());
                self.coarse = true;
            }
            Some(_) | None => self.ranges.push(range),
        }
    }
}

impl<'a> Having<'a> {
    /// Of what was lost, as checks of images found it.
    pub fn new(losses: &'a Losses) -> Self {
        Self { losses, whole: RoaringTreemap::new(), below: HashMap::new() }
    }

    /// What of an image cannot be read because of that. Nodes are read, data is not.
    ///
    /// # Errors
    /// The file system's, and damage that the checks did not find.
    pub fn of(&mut self, image: &Image) -> Result<LostRanges, ImageError> {
        let root = image.root();
        self.look(image, &root.top, root.height)
    }

    fn look(&mut self, image: &Image, name: &ChunkRef, level: u8) -> Result<LostRanges, ImageError> {
        let place = name.place();
        if name.is_zeroes() || self.whole.contains(place) {
            return Ok(LostRanges::new());
        }
        if let Some(known) = self.below.get(&place) {
            return Ok(known.clone());
        }
        let mut lost = LostRanges::new();
        if self.is_lost(image, name, level) {
            let all = covered(ByteOffset::ZERO, level);
            for what in self.sentences(image, name) {
                lost.entry(what).or_default().add(all, false);
            }
        } else if let Some(below) = level.checked_sub(1) {
            let node = image.images().node(name, level)?;
            for (nth, child) in (0..).zip(&node.children) {
                for (what, bytes) in self.look(image, child, below)? {
                    let into = lost.entry(what).or_default();
                    let start = nth * span(below).0;
                    bytes.ranges.iter().for_each(|range| into.add(moved(*range, start), bytes.coarse));
                }
            }
        }
        match lost.is_empty() {
            true => drop(self.whole.insert(place)),
            false => drop(self.below.insert(place, lost.clone())),
        }
        Ok(lost)
    }

    /// Whether a read cannot get past it: a node has a second, and both must be lost.
    fn is_lost(&self, image: &Image, name: &ChunkRef, level: u8) -> bool {
        let is_known = |name: &ChunkRef| self.losses.chunks.contains_key(&name.place());
        if !is_known(name) || level == 0 {
            return is_known(name);
        }
        let images = image.images();
        let readable = |twin: &ChunkRef| images.content(twin, Kind::Node(level)).is_ok();
        !images.twins(name).iter().any(|twin| !is_known(twin) && readable(twin))
    }

    /// What is wrong with it, and with its second.
    fn sentences(&self, image: &Image, name: &ChunkRef) -> Vec<Arc<str>> {
        let twins = image.images().twins(name);
        let lost =
            std::iter::once(name).chain(&twins).filter_map(|name| self.losses.chunks.get(&name.place()));
        lost.map(|lost| Arc::from(lost.what())).collect()
    }
}

/// A range relative to a node, as one relative to what has the node at `start`.
fn moved(range: ByteRange, start: u64) -> ByteRange {
    ByteRange::between(ByteOffset(range.start().0 + start), ByteOffset(range.end().0 + start))
}
