//! The plain model: every change of the disk with its LSN, and nothing else. The disk at a point L
//! is the effect of all changes up to L in the order of their LSNs.
//!
//! Two things have no LSN of their own: a local write that failed half way, and what a crash left.
//! Their range is unknown (any content is right) until a later change covers it, or until the next
//! freeze, at which the disk's content is what it is.

use backtide_units::{ByteCount, ByteRange, Lsn};
use bytes::Bytes;

use crate::local::indices;

/// What a change did to its range.
#[derive(Clone, Debug)]
pub enum What {
    /// These bytes are there now.
    Bytes(Bytes),
    /// Zeroes are there now.
    Zeroes,
    /// Nobody knows.
    Unknown,
}

#[derive(Clone, Debug)]
struct Change {
    lsn: Lsn,
    range: ByteRange,
    what: What,
}

/// The disk at one LSN.
#[derive(Clone, Debug)]
pub struct Image {
    /// The content.
    pub bytes: Vec<u8>,
    /// Where any content is right.
    unknown: Vec<(usize, usize)>,
}

/// See the module's description.
pub struct Model {
    /// By LSN; equal ones in the order they came.
    changes: Vec<Change>,
    /// Images before the change of that index, ascending.
    checkpoints: Vec<(usize, Image)>,
    unresolved: Vec<ByteRange>,
}

const CHECKPOINT_EVERY: usize = 256;

impl Model {
    /// A disk that holds this before the first change.
    pub fn new(content: &[u8]) -> Self {
        let image = Image { bytes: content.to_vec(), unknown: Vec::new() };
        Self { changes: Vec::new(), checkpoints: vec![(0, image)], unresolved: Vec::new() }
    }

    /// How many changes there were.
    pub fn len(&self) -> usize {
        self.changes.len()
    }

    /// Whether nothing was ever changed.
    pub fn is_empty(&self) -> bool {
        self.changes.is_empty()
    }

    /// The disk is larger; it was zeroes there, as far as any point knows.
    pub fn grow(&mut self, size: ByteCount) {
        for (_, image) in &mut self.checkpoints {
            image.bytes.resize(size.0 as usize, 0);
        }
    }

    /// A change that is part of every point from `lsn` on.
    pub fn change(&mut self, lsn: Lsn, range: ByteRange, what: What) {
        let place = self.changes.partition_point(|change| change.lsn <= lsn);
        self.changes.insert(place, Change { lsn, range, what });
        self.checkpoints.retain(|(index, _)| *index <= place);
    }

    /// What was given LSNs above `last` has none any more: those are given again. It is part of every point above.
    pub(crate) fn forget_above(&mut self, last: Lsn) {
        for change in self.changes.iter_mut().rev().take_while(|change| change.lsn > last) {
            change.lsn = last.next();
        }
    }

    /// From `lsn` on nobody knows what the range holds.
    pub fn lose(&mut self, lsn: Lsn, range: ByteRange) {
        self.change(lsn, range, What::Unknown);
        self.unresolved.push(range);
    }

    /// A freeze at `at`: the disk holds `content`, which settles what was unknown.
    pub fn resolve(&mut self, at: Lsn, content: &[u8]) {
        for range in std::mem::take(&mut self.unresolved) {
            self.settle(at, range, Bytes::copy_from_slice(&content[indices(range)]));
        }
    }

    /// The pass frozen at `at` finds these bytes, of which nobody knew.
    pub(crate) fn settle(&mut self, at: Lsn, range: ByteRange, bytes: Bytes) {
        self.change(at, range, What::Bytes(bytes));
    }

    /// The disk at `lsn`.
    pub fn image_at(&mut self, lsn: Lsn) -> Image {
        let end = self.changes.partition_point(|change| change.lsn <= lsn);
        let nearest = self.checkpoints.partition_point(|(index, _)| *index <= end) - 1;
        let first = self.checkpoints[nearest].0;
        let mut at = first;
        let mut image = self.checkpoints[nearest].1.clone();
        let mut made = nearest;
        for index in first..end {
            if index - at >= CHECKPOINT_EVERY {
                at = index;
                made += 1;
                self.checkpoints.insert(made, (index, image.clone()));
            }
            image.apply(&self.changes[index]);
        }
        image
    }
}

impl Image {
    fn apply(&mut self, change: &Change) {
        let at = indices(change.range);
        match &change.what {
            What::Bytes(bytes) => self.bytes[at.clone()].copy_from_slice(bytes),
            What::Zeroes => self.bytes[at.clone()].fill(0),
            What::Unknown => return self.unknown.push((at.start, at.end)),
        }
        if !self.unknown.is_empty() {
            let parts = std::mem::take(&mut self.unknown);
            for (start, end) in parts {
                let before = (start, end.min(at.start));
                let after = (start.max(at.end), end);
                self.unknown.extend([before, after].into_iter().filter(|(start, end)| start < end));
            }
        }
    }

    /// The first byte where `found` is wrong.
    pub fn mismatch(&self, found: &[u8]) -> Option<usize> {
        if self.bytes == found {
            return None;
        }
        let known = |offset: usize| !self.unknown.iter().any(|(start, end)| (*start..*end).contains(&offset));
        (0..self.bytes.len().max(found.len()))
            .find(|offset| self.bytes.get(*offset) != found.get(*offset) && known(*offset))
    }

    /// Where any content is right.
    pub fn unknown(&self) -> &[(usize, usize)] {
        &self.unknown
    }
}
