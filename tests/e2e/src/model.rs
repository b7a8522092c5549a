//! What a disk must hold: the plain effect of a list of writes.

use std::{collections::BTreeSet, path::Path};

use crate::Written;

/// One write of a guest. Its data follow from it, so that a stray sector tells where it is from.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Write {
    /// Different for all writes of a test.
    pub tag: u64,
    /// Where it is, in bytes.
    pub offset: u64,
    /// How long it is, in bytes.
    pub length: u64,
}

const SECTOR: u64 = 512;

/// The data of a write: each sector repeats the write's tag and its own place on the disk.
pub fn fill(write: &Write, buffer: &mut Vec<u8>) {
    buffer.clear();
    for sector in (write.offset..write.offset + write.length).step_by(SECTOR as usize) {
        for _ in 0..SECTOR / 16 {
            buffer.extend_from_slice(&write.tag.to_le_bytes());
            buffer.extend_from_slice(&sector.to_le_bytes());
        }
    }
}

/// A disk of zeroes and the writes to it in their order.
///
/// A write that got no answer before its connection broke may have happened, or any part of it: its
/// sectors may hold what it wrote or what they held before, until something else is written there.
#[derive(Clone, Debug)]
pub struct Model {
    size: u64,
    writes: Vec<Write>,
    /// Positions of writes that got no answer.
    unanswered: BTreeSet<usize>,
}

impl Model {
    /// A disk of `size` bytes.
    pub fn of_zeroes(size: u64, writes: Vec<Write>) -> Self {
        Self { size, writes, unanswered: BTreeSet::new() }
    }

    /// What a guest did next.
    pub fn then(&mut self, written: Written) {
        self.add(&written);
    }

    /// This disk after what a guest did on one connection after the other.
    #[must_use]
    pub fn after_all(&self, lives: &[Written]) -> Self {
        let mut after = self.clone();
        lives.iter().for_each(|life| after.add(life));
        after
    }

    fn add(&mut self, written: &Written) {
        self.writes.extend(&written.writes);
        if let Some(write) = written.unanswered {
            self.unanswered.insert(self.writes.len());
            self.writes.push(write);
        }
    }

    /// How many writes there are.
    pub fn len(&self) -> usize {
        self.writes.len()
    }

    /// Whether there are none.
    pub fn is_empty(&self) -> bool {
        self.writes.is_empty()
    }

    /// The disk after the first `count` writes, without those that got no answer.
    pub fn after(&self, count: usize) -> Vec<u8> {
        let size = usize::try_from(self.size).expect("a disk that fits memory");
        // Whose each sector is: of most writes nothing is left.
        let mut last = vec![None; size.div_ceil(SECTOR as usize)];
        let answered = |position: &usize| !self.unanswered.contains(position);
        for position in (0..count).filter(answered) {
            let Write { offset, length, .. } = self.writes[position];
            last[(offset / SECTOR) as usize..((offset + length) / SECTOR) as usize].fill(Some(position));
        }
        let (mut disk, mut content) = (vec![0; size], Vec::new());
        for (sector, position) in last.into_iter().enumerate() {
            let Some(position) = position else { continue };
            let offset = sector as u64 * SECTOR;
            fill(&Write { offset, length: SECTOR, ..self.writes[position] }, &mut content);
            disk[offset as usize..][..content.len()].copy_from_slice(&content);
        }
        disk
    }

    /// The file at `path` is the disk after the first `count` writes.
    pub fn assert_is_in(&self, path: &Path, count: usize, what: &str) {
        if let Err(why) = self.look_for_it_in(path, count) {
            panic!("{what}, {why}");
        }
    }

    /// Whether the file at `path` is the disk after the first `count` writes.
    ///
    /// # Errors
    /// The first sector that is another one.
    pub fn look_for_it_in(&self, path: &Path, count: usize) -> Result<(), String> {
        let found = std::fs::read(path).expect("read a restored file");
        let expected = self.after(count);
        if found.len() != expected.len() {
            return Err(format!("expected {} bytes, found {}", expected.len(), found.len()));
        }
        let sectors = expected.chunks(SECTOR as usize).zip(found.chunks(SECTOR as usize)).enumerate();
        for (sector, (expected, found)) in sectors {
            if expected != found && !self.may_hold(sector, expected, found, count) {
                let (expected, found) = (self.origin(expected), self.origin(found));
                return Err(format!("sector {sector}: expected {expected}, found {found} ({count} writes)"));
            }
        }
        Ok(())
    }

    /// The file at `path` is the disk after some first writes, whichever they are: how many.
    ///
    /// The newest write that can be seen tells, as nothing lies above it.
    pub fn prefix_in(&self, path: &Path, what: &str) -> usize {
        let found = std::fs::read(path).expect("read a restored file");
        let newest = found.chunks(SECTOR as usize).filter_map(|sector| self.position(sector)).max();
        let count = newest.map_or(0, |index| index + 1);
        self.assert_is_in(path, count, what);
        count
    }

    /// Whether the sector may hold what a write without an answer made of it, after what else was
    /// written there.
    fn may_hold(&self, sector: usize, expected: &[u8], found: &[u8], count: usize) -> bool {
        let Some(position) = self.position(found).filter(|position| self.unanswered.contains(position))
        else {
            return false;
        };
        let write = &self.writes[position];
        let (offset, mut content) = (sector as u64 * SECTOR, Vec::new());
        fill(&Write { offset, length: SECTOR, ..*write }, &mut content);
        position < count
            && (write.offset..write.offset + write.length).contains(&offset)
            && self.position(expected).is_none_or(|answered| answered < position)
            && found == content
    }

    fn position(&self, sector: &[u8]) -> Option<usize> {
        let tag = u64::from_le_bytes(sector[..8].try_into().expect("eight bytes"));
        self.writes.binary_search_by_key(&tag, |write| write.tag).ok()
    }

    fn origin(&self, sector: &[u8]) -> String {
        let offset = u64::from_le_bytes(sector[8..16].try_into().expect("eight bytes"));
        match self.position(sector) {
            Some(index) => format!("write {} for sector {}", index + 1, offset / SECTOR),
            None if sector.iter().all(|&byte| byte == 0) => "zeroes".to_owned(),
            None => format!("foreign data {:02x?}", &sector[..16]),
        }
    }
}
