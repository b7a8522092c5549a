//! Reading all of an image against its hashes: what cannot be read where it is, and where the disk has it.
//!
//! A node that is damaged leads on all the same when its second is whole: what lies below it is checked too.

use std::collections::{BTreeMap, BTreeSet};

use backtide_units::{ByteCount, ByteOffset, ByteRange};
use bytes::Bytes;
use roaring::RoaringTreemap;

use crate::{
    Image, ImageError,
    chunk::{ChunkRef, Kind},
    image::{covered, span},
    node::Node,
};

/// So many chunks are remembered; others are counted, and found by the next check.
const LOST_MAX: usize = 4096;

/// So many places of one chunk: it may be anywhere in a disk, any number of times.
const PLACES_MAX: usize = 8;

/// A chunk that cannot be read where it is.
#[derive(Clone, Debug)]
pub struct LostChunk {
    pub(crate) name: ChunkRef,
    /// 0 for data.
    pub(crate) level: u8,
    what: String,
    /// The image by the number the caller gave it, and what of the disk it covers there.
    places: Vec<(usize, ByteRange)>,
}

/// What checks of images found.
#[derive(Clone, Debug, Default)]
pub struct Losses {
    /// By place.
    pub(crate) chunks: BTreeMap<u64, LostChunk>,
    /// Packs whose header, table or trailer is damaged.
    pub(crate) tables: BTreeMap<u32, String>,
    /// What nothing can mend.
    other: Vec<String>,
    /// Chunks beyond those that are remembered.
    more: u64,
    /// Packs that were opened for this: one that somebody had open tells nothing of its table.
    opened: BTreeSet<u32>,
    /// Places of chunks that were taken.
    before: RoaringTreemap,
    /// Whether some were not remembered then.
    more_before: bool,
}

impl LostChunk {
    /// What is wrong: a sentence with file and place.
    pub fn what(&self) -> &str {
        &self.what
    }

    /// Where images have it: each by the number the caller gave it, with what of the disk the chunk covers. At most 8;
    /// none of a second one, which stands for the first.
    pub fn places(&self) -> &[(usize, ByteRange)] {
        &self.places
    }

    /// Whether it has references instead of data: once it is whole again, what lies below it can be checked.
    pub fn is_node(&self) -> bool {
        self.level > 0
    }

    pub(crate) fn kind(&self) -> Kind {
        kind_at(self.level)
    }
}

impl Losses {
    /// Whether nothing was found.
    pub fn is_empty(&self) -> bool {
        self.chunks.is_empty() && self.tables.is_empty() && self.other.is_empty() && self.more == 0
    }

    /// Takes out what was found; checks can go on.
    pub fn take(&mut self) -> Self {
        let mut before = self.before.clone();
        before.extend(self.chunks.keys().copied());
        let more_before = self.more_before || self.more > 0;
        std::mem::replace(self, Self { before, more_before, ..Self::default() })
    }

    /// What was found, a sentence each.
    pub fn sentences(&self) -> impl Iterator<Item = &str> {
        let chunks = self.chunks.values().map(LostChunk::what);
        self.tables.values().chain(&self.other).map(String::as_str).chain(chunks)
    }

    /// What was found that no mend is for, a sentence each.
    pub fn lasting(&self) -> impl Iterator<Item = &str> {
        self.other.iter().map(String::as_str)
    }

    /// Chunks that were found beyond those that are remembered.
    pub fn more(&self) -> u64 {
        self.more
    }

    /// Whether the checks that filled `seen` too have read all of the chunk at a place. Not known when losses are not remembered.
    pub(crate) fn is_whole(&self, place: u64, seen: &RoaringTreemap) -> bool {
        let all_known = self.more == 0 && !self.more_before;
        all_known && seen.contains(place) && !self.chunks.contains_key(&place) && !self.before.contains(place)
    }

    fn lose(&mut self, name: &ChunkRef, level: u8, place: Option<(usize, ByteRange)>, what: String) {
        if self.chunks.len() < LOST_MAX {
            let lost = LostChunk { name: *name, level, what, places: place.into_iter().collect() };
            self.chunks.insert(name.place(), lost);
        } else {
            self.more += 1;
        }
    }

    /// Whether a chunk is known to be lost; this is one more place of it then.
    fn knows(&mut self, name: &ChunkRef, place: (usize, ByteRange)) -> bool {
        let Some(lost) = self.chunks.get_mut(&name.place()) else { return false };
        if lost.places.len() < PLACES_MAX && !lost.places.is_empty() {
            lost.places.push(place);
        }
        true
    }
}

fn kind_at(level: u8) -> Kind {
    if level == 0 { Kind::Data } else { Kind::Node(level) }
}

impl Image {
    /// Reads and checks every chunk that is not in `seen`; what is wrong goes to `losses`, with `number` for this image. `step`
    /// is told how many bytes were read since it was last asked, and says whether to go on: false when it did not.
    ///
    /// # Errors
    /// The file system's: then nobody knows what it would have found.
    pub fn check(
        &self,
        number: usize,
        seen: &mut RoaringTreemap,
        losses: &mut Losses,
        step: &mut dyn FnMut(ByteCount) -> bool,
    ) -> Result<bool, ImageError> {
        let root = self.root();
        Walk { image: self, number, seen, losses, step }.check(&root.top, root.height, ByteOffset::ZERO)
    }

    /// As [`Image::check`], of what lies below a node that was lost in this image and is whole again.
    ///
    /// # Errors
    /// As [`Image::check`].
    pub fn check_below(
        &self,
        found: &LostChunk,
        seen: &mut RoaringTreemap,
        losses: &mut Losses,
        step: &mut dyn FnMut(ByteCount) -> bool,
    ) -> Result<bool, ImageError> {
        let Some((number, covers)) = found.places.first().copied() else { return Ok(true) };
        seen.remove(found.name.place());
        Walk { image: self, number, seen, losses, step }.check(&found.name, found.level, covers.start())
    }
}

struct Walk<'a> {
    image: &'a Image,
    number: usize,
    seen: &'a mut RoaringTreemap,
    losses: &'a mut Losses,
    step: &'a mut dyn FnMut(ByteCount) -> bool,
}

impl Walk<'_> {
    fn check(&mut self, name: &ChunkRef, level: u8, start: ByteOffset) -> Result<bool, ImageError> {
        let place = (self.number, covered(start, level));
        if name.is_zeroes() || self.losses.knows(name, place) || !self.seen.insert(name.place()) {
            return Ok(true);
        }
        let Some(content) = self.content(name, level, place)? else { return Ok(true) };
        if !(self.step)(ByteCount(content.len() as u64)) {
            return Ok(false);
        }
        let Some(below) = level.checked_sub(1) else { return Ok(true) };
        let Some(node) = Node::decode(&content, level) else {
            let name = self.image.images().name_of(name.pack);
            let what = format!("{} is damaged: a chunk of it is no node of level {level}", name.display());
            self.losses.other.push(what);
            return Ok(true);
        };
        for (nth, child) in (0..).zip(&node.children) {
            if !self.check(child, below, ByteOffset(start.0 + nth * span(below).0))? {
                return Ok(false);
            }
        }
        Ok(true)
    }

    /// What the chunk has; none when it is lost. Of a node that is lost its second.
    fn content(
        &mut self,
        name: &ChunkRef,
        level: u8,
        place: (usize, ByteRange),
    ) -> Result<Option<Bytes>, ImageError> {
        let images = self.image.images();
        if self.losses.opened.insert(name.pack) {
            images.forget_pack(name.pack);
        }
        let read = match images.content(name, kind_at(level)) {
            Ok((pack, content)) => {
                if let Some(broken) = pack.broken() {
                    self.losses.tables.insert(name.pack, broken.to_owned());
                }
                Some(content)
            }
            Err(error) => {
                let what = damage(error)?;
                self.losses.lose(name, level, Some(place), what);
                None
            }
        };
        if level == 0 {
            return Ok(read);
        }
        let mut second = None;
        for twin in images.twins(name) {
            if !self.seen.insert(twin.place()) {
                continue;
            }
            match images.content(&twin, kind_at(level)) {
                Ok((_, content)) => second = Some(content),
                Err(error) => {
                    let what = damage(error)?;
                    self.losses.lose(&twin, level, None, what);
                }
            }
        }
        Ok(read.or(second))
    }
}

/// What is damaged; any other error goes on.
fn damage(error: ImageError) -> Result<String, ImageError> {
    match error {
        ImageError::Damaged { .. } => Ok(error.to_string()),
        ImageError::UnknownVersion { .. } | ImageError::Full { .. } | ImageError::Io { .. } => Err(error),
    }
}
