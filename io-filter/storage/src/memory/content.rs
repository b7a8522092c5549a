//! One file's content: what is visible, and what each sector may hold after a power cut.

use std::collections::BTreeMap;

use super::Random;

const SECTOR: u64 = 512;
const SECTOR_LENGTH: usize = 512;

type Sector = [u8; SECTOR_LENGTH];
const ZEROS: Sector = [0; SECTOR_LENGTH];

/// Sectors that were never written are absent and read as zeros.
#[derive(Default)]
pub(super) struct Content {
    visible: BTreeMap<u64, Box<Sector>>,
    len: u64,
    allocated: u64,
    /// For each sector not durable: the contents it may have after a power cut, besides the visible
    /// one. The first is the durable one.
    unsynced: BTreeMap<u64, Unsynced>,
    /// Lengths that the file may have after a power cut, besides the visible one.
    unsynced_lens: Vec<u64>,
    /// What somebody else's sync could not write has to be told by the next of this file.
    owes_failure: bool,
}

struct Unsynced {
    before: Vec<Sector>,
    /// A sync failed with this sector: a later one does not make it durable.
    stuck: bool,
}

impl Content {
    /// What is visible, as durable content of another file.
    pub(super) fn copy(&self) -> Self {
        Self { visible: self.visible.clone(), len: self.len, allocated: self.allocated, ..Self::default() }
    }

    pub(super) fn len(&self) -> u64 {
        self.len
    }

    /// Bytes of the device that the file takes.
    pub(super) fn space(&self) -> u64 {
        self.len.max(self.allocated)
    }

    pub(super) fn read(&self, offset: u64, buffer: &mut [u8]) -> usize {
        let available = self.len.saturating_sub(offset);
        let count = buffer.len().min(usize::try_from(available).unwrap_or(usize::MAX));
        let buffer = &mut buffer[..count];
        for (number, within, piece) in pieces(offset, count) {
            match self.visible.get(&number) {
                Some(sector) => {
                    buffer[piece.clone()].copy_from_slice(&sector[within..within + piece.len()]);
                }
                None => buffer[piece].fill(0),
            }
        }
        count
    }

    pub(super) fn write(&mut self, offset: u64, bytes: &[u8]) {
        for (number, within, piece) in pieces(offset, bytes.len()) {
            let mut sector = self.sector(number);
            sector[within..within + piece.len()].copy_from_slice(&bytes[piece]);
            self.put(number, sector);
        }
        let end = offset + bytes.len() as u64;
        if end > self.len {
            self.change_len(end);
        }
    }

    pub(super) fn set_len(&mut self, len: u64) {
        if len < self.len {
            let first_gone = len.div_ceil(SECTOR);
            let gone: Vec<u64> = self.visible.range(first_gone..).map(|(number, _)| *number).collect();
            for number in gone {
                self.put(number, Box::new(ZEROS));
            }
            if !len.is_multiple_of(SECTOR) {
                let mut last = self.sector(len / SECTOR);
                last[usize::try_from(len % SECTOR).unwrap_or(0)..].fill(0);
                self.put(len / SECTOR, last);
            }
            self.allocated = self.allocated.min(len);
        }
        if len != self.len {
            self.change_len(len);
        }
    }

    pub(super) fn allocate(&mut self, end: u64) {
        self.allocated = self.allocated.max(end);
        if end > self.len {
            self.change_len(end);
        }
    }

    pub(super) fn sync(&mut self) {
        self.unsynced.retain(|_, sector| sector.stuck);
        self.unsynced_lens.clear();
    }

    /// A sync of everything has failed, and told nobody which file it was.
    pub(super) fn fail_next_sync(&mut self) {
        self.owes_failure |= !self.unsynced.is_empty();
        self.fail_sync();
    }

    /// Whether the sync that is being done has to tell of a failure that is over.
    pub(super) fn owed_failure(&mut self) -> bool {
        std::mem::take(&mut self.owes_failure)
    }

    pub(super) fn fail_sync(&mut self) {
        for sector in self.unsynced.values_mut() {
            sector.stuck = true;
        }
    }

    pub(super) fn crash(&mut self, random: &mut Random) {
        self.owes_failure = false;
        for (number, mut sector) in std::mem::take(&mut self.unsynced) {
            let choice = random.up_to(sector.before.len());
            if choice < sector.before.len() {
                self.visible.insert(number, Box::new(sector.before.swap_remove(choice)));
            }
        }
        let lens = std::mem::take(&mut self.unsynced_lens);
        let choice = random.up_to(lens.len());
        if let Some(&len) = lens.get(choice) {
            // What lies beyond a shorter length is gone for good.
            let grown = len > self.len;
            self.len = len.max(self.len);
            if !grown {
                self.set_len(len);
                self.unsynced.clear();
                self.unsynced_lens.clear();
            }
        }
    }

    pub(super) fn flip_bit(&mut self, offset: u64, bit: u32) {
        if offset >= self.len {
            return;
        }
        let within = usize::try_from(offset % SECTOR).unwrap_or(0);
        let mut sector = self.sector(offset / SECTOR);
        sector[within] ^= 1 << (bit % 8);
        self.visible.insert(offset / SECTOR, sector);
    }

    pub(super) fn to_vec(&self) -> Vec<u8> {
        let mut bytes = vec![0; usize::try_from(self.len).unwrap_or(usize::MAX)];
        self.read(0, &mut bytes);
        bytes
    }

    fn sector(&self, number: u64) -> Box<Sector> {
        self.visible.get(&number).cloned().unwrap_or_else(|| Box::new(ZEROS))
    }

    fn put(&mut self, number: u64, sector: Box<Sector>) {
        let before = self.visible.insert(number, sector).map_or(ZEROS, |sector| *sector);
        let unsynced = self.unsynced.entry(number).or_insert(Unsynced { before: Vec::new(), stuck: false });
        unsynced.before.push(before);
        unsynced.stuck = false;
    }

    fn change_len(&mut self, len: u64) {
        self.unsynced_lens.push(self.len);
        self.len = len;
    }
}

/// The sectors that `count` bytes at `offset` touch: number, start within it, bytes of the buffer.
fn pieces(offset: u64, count: usize) -> impl Iterator<Item = (u64, usize, std::ops::Range<usize>)> {
    let mut done = 0;
    std::iter::from_fn(move || {
        if done == count {
            return None;
        }
        let at = offset + done as u64;
        let within = usize::try_from(at % SECTOR).unwrap_or(0);
        let length = (SECTOR_LENGTH - within).min(count - done);
        let piece = done..done + length;
        done += length;
        Some((at / SECTOR, within, piece))
    })
}
