//! The simulated local disk: a page cache over stable storage.
//!
//! The fault model: what was written is in the page cache, which survives the death of a process
//! and not that of the host. At a power loss each sector of 512 bytes that was written since the
//! last flush holds any one of the contents it had since then. A flush makes stable what was
//! written when it began. One that is refused leaves what was not stable as it was, and no later one helps: only what
//! is written again becomes stable.

use std::collections::BTreeMap;

use backtide_tracking::DirtyBitmap;
use backtide_units::{BlockRange, ByteCount, ByteOffset, ByteRange};
use bytes::Bytes;

use crate::random::Random;

const SECTOR: usize = 512;

/// See the module's description.
pub struct LocalDisk {
    cache: Vec<u8>,
    /// Per sector, the contents it may hold after a power loss, the stable one first, each with
    /// the number of the write that brought it.
    unflushed: BTreeMap<usize, Vec<(u64, Vec<u8>)>>,
    writes: u64,
    /// Blocks that may hold something else than zeroes.
    allocated: DirtyBitmap,
    /// Blocks that cannot be read until they are written.
    bad: DirtyBitmap,
}

impl LocalDisk {
    /// A disk of zeroes, nothing allocated.
    pub fn new(size: ByteCount) -> Self {
        let cache = vec![0; size.0 as usize];
        Self {
            cache,
            unflushed: BTreeMap::new(),
            writes: 0,
            allocated: DirtyBitmap::new(),
            bad: DirtyBitmap::new(),
        }
    }

    /// Becomes larger, by what holds zeroes.
    pub fn grow(&mut self, size: ByteCount) {
        assert!(size.0 as usize >= self.cache.len(), "a disk does not shrink");
        self.cache.resize(size.0 as usize, 0);
    }

    /// What a reader sees now.
    pub fn content(&self) -> &[u8] {
        &self.cache
    }

    /// What a reader sees now of a part.
    pub fn read(&self, range: ByteRange) -> Bytes {
        Bytes::copy_from_slice(&self.cache[indices(range)])
    }

    /// Which blocks may hold data.
    pub fn allocated(&self) -> &DirtyBitmap {
        &self.allocated
    }

    /// The number of the last write: a flush that begins now covers it.
    pub fn flush_mark(&self) -> u64 {
        self.writes
    }

    /// Writes bytes; none for zeroes, whose space is given back when it is a `trim`.
    pub fn write(&mut self, range: ByteRange, data: Option<&[u8]>, trim: bool) {
        let at = indices(range);
        if at.is_empty() {
            return;
        }
        self.writes += 1;
        let size = ByteCount(self.cache.len() as u64);
        self.bad.remove(BlockRange::covered_by(range, size));
        for sector in at.start / SECTOR..at.end.div_ceil(SECTOR) {
            let content = self.sector(sector).to_vec();
            self.unflushed.entry(sector).or_insert_with(|| vec![(0, content)]);
        }
        match data {
            Some(data) => self.cache[at.clone()].copy_from_slice(data),
            None => self.cache[at.clone()].fill(0),
        }
        for sector in at.start / SECTOR..at.end.div_ceil(SECTOR) {
            let content = self.sector(sector).to_vec();
            self.unflushed.get_mut(&sector).expect("inserted above").push((self.writes, content));
        }
        if trim {
            let size = ByteCount(self.cache.len() as u64);
            self.allocated.remove(BlockRange::covered_by(range, size));
        } else {
            self.allocated.insert(BlockRange::touched_by(range));
        }
    }

    /// What was written up to `mark` is stable.
    pub fn flush(&mut self, mark: u64) {
        self.unflushed.retain(|_, contents| {
            let stable = contents.iter().rposition(|(write, _)| *write <= mark).unwrap_or(0);
            contents.drain(..stable);
            contents.len() > 1
        });
    }

    /// A flush is refused: what was written and is not stable can be read, and becomes stable by no other flush.
    pub fn refuse_flush(&mut self) {
        for contents in self.unflushed.values_mut() {
            contents.iter_mut().skip(1).for_each(|(write, _)| *write = u64::MAX);
        }
    }

    /// What was refused can be flushed again, except in these blocks.
    pub fn forgive(&mut self, except: &DirtyBitmap) {
        let writes = self.writes;
        for (sector, contents) in &mut self.unflushed {
            let at = ByteOffset((sector * SECTOR) as u64);
            let sector = ByteRange::between(at, ByteOffset(at.0 + SECTOR as u64));
            if !except.touches(BlockRange::touched_by(sector)) {
                contents.iter_mut().for_each(|(write, _)| *write = (*write).min(writes));
            }
        }
    }

    /// Whether a power loss takes nothing.
    pub fn is_stable(&self) -> bool {
        self.unflushed.is_empty()
    }

    /// What the range holds now is stable.
    pub fn flush_range(&mut self, range: ByteRange) {
        let at = indices(range);
        for sector in at.start / SECTOR..at.end.div_ceil(SECTOR) {
            self.unflushed.remove(&sector);
        }
    }

    /// The host loses power.
    pub fn lose_power(&mut self, random: &mut Random) {
        for (sector, mut contents) in std::mem::take(&mut self.unflushed) {
            let (_, content) = contents.swap_remove(random.below(contents.len() as u64) as usize);
            let start = sector * SECTOR;
            self.cache[start..start + content.len()].copy_from_slice(&content);
        }
        // The file system's idea of what is allocated may be older or newer, but covers all data.
        self.allocated = DirtyBitmap::new();
        for (block, content) in (0..).zip(self.cache.chunks(4096)) {
            if content.iter().any(|byte| *byte != 0) || random.one_in(8) {
                self.allocated.insert((block..block + 1).into());
            }
        }
    }

    /// What it holds from now on, stably.
    pub fn become_stable(&mut self, content: Vec<u8>) {
        assert_eq!(content.len(), self.cache.len(), "a disk keeps its size");
        self.cache = content;
        self.unflushed.clear();
    }

    /// Where the sectors begin that cannot hold what is `found` there after a power loss.
    pub fn unexplained(&self, found: &[u8]) -> Vec<usize> {
        let mut wrong = Vec::new();
        for (sector, found) in found.chunks(SECTOR).enumerate() {
            let explained = match self.unflushed.get(&sector) {
                Some(contents) => contents.iter().any(|(_, content)| content == found),
                None => self.sector(sector) == found,
            };
            if !explained {
                wrong.push(sector * SECTOR);
            }
        }
        wrong
    }

    /// A block cannot be read from now on.
    pub fn break_block(&mut self, block: u64) {
        self.bad.insert((block..block + 1).into());
    }

    /// All blocks can be read again.
    pub fn heal(&mut self) {
        self.bad = DirtyBitmap::new();
    }

    /// Whether a read of the range fails.
    pub fn is_bad(&self, range: ByteRange) -> bool {
        self.bad.touches(BlockRange::touched_by(range))
    }

    /// Changes a byte behind everybody's back.
    pub fn flip(&mut self, offset: usize) {
        self.cache[offset] ^= 0x40;
        self.allocated.insert(BlockRange::touched_by(ByteRange::between(
            ByteOffset(offset as u64),
            ByteOffset(offset as u64 + 1),
        )));
    }

    fn sector(&self, sector: usize) -> &[u8] {
        let start = sector * SECTOR;
        &self.cache[start..self.cache.len().min(start + SECTOR)]
    }
}

/// A byte range as indices of a slice.
pub fn indices(range: ByteRange) -> std::ops::Range<usize> {
    range.start().0 as usize..range.end().0 as usize
}
