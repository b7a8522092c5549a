//! What a disk must hold: the plain effect of a list of writes.

use std::path::Path;

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
#[derive(Clone, Debug)]
pub struct Model {
    size: u64,
    writes: Vec<Write>,
}

impl Model {
    /// A disk of `size` bytes.
    pub fn of_zeroes(size: u64, writes: Vec<Write>) -> Self {
        Self { size, writes }
    }

    /// How many writes there are.
    pub fn len(&self) -> usize {
        self.writes.len()
    }

    /// Whether there are none.
    pub fn is_empty(&self) -> bool {
        self.writes.is_empty()
    }

    /// The disk after the first `count` writes.
    pub fn after(&self, count: usize) -> Vec<u8> {
        let mut disk = vec![0; usize::try_from(self.size).expect("a disk that fits memory")];
        let mut buffer = Vec::new();
        for write in &self.writes[..count] {
            fill(write, &mut buffer);
            let start = write.offset as usize;
            disk[start..start + buffer.len()].copy_from_slice(&buffer);
        }
        disk
    }

    /// The file at `path` is the disk after the first `count` writes.
    pub fn assert_is_in(&self, path: &Path, count: usize, what: &str) {
        let found = std::fs::read(path).expect("read a restored file");
        let expected = self.after(count);
        assert_eq!(found.len(), expected.len(), "{what}: the size");
        let sectors = expected.chunks(SECTOR as usize).zip(found.chunks(SECTOR as usize)).enumerate();
        for (sector, (expected, found)) in sectors {
            assert!(
                expected == found,
                "{what}, sector {sector}: expected {}, found {} ({count} writes)",
                self.origin(expected),
                self.origin(found)
            );
        }
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
