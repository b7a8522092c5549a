//! One sector of the activity log on disk. `FORMAT.md` describes the bytes.

use bytes::{Buf, BufMut};

use crate::extents::ExtentRun;

/// The bytes of a sector.
pub(crate) const SECTOR_BYTES: usize = 4096;

/// What comes before the runs: magic, checksum, sequence number, count.
const HEADER_BYTES: usize = 4 + 4 + 8 + 4 + 4;

/// The runs that fit into a sector.
pub(crate) const RUNS_MAX: usize = (SECTOR_BYTES - HEADER_BYTES) / 8;

const MAGIC: [u8; 4] = *b"BTAL";

/// Extents became hot.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct LogRecord {
    /// Its place in the log.
    pub sequence: u64,
    /// Which; at most `RUNS_MAX`.
    pub runs: Vec<ExtentRun>,
}

/// What a sector of the log holds.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Sector {
    /// Nothing yet: all zeroes.
    Empty,
    /// A record.
    Record(LogRecord),
    /// Something that is no record: torn or damaged.
    Damaged,
}

impl LogRecord {
    /// The sector's bytes.
    ///
    /// # Panics
    /// When there are more runs than fit.
    pub fn encode(&self) -> [u8; SECTOR_BYTES] {
        assert!(self.runs.len() <= RUNS_MAX, "a record fits its sector");
        let mut sector = [0; SECTOR_BYTES];
        let mut out = &mut sector[8..];
        out.put_u64_le(self.sequence);
        out.put_u32_le(self.runs.len() as u32);
        out.put_u32_le(0);
        for run in &self.runs {
            out.put_u32_le(run.first);
            out.put_u32_le(run.count);
        }
        let crc = crc32c::crc32c(&sector[8..]);
        sector[..4].copy_from_slice(&MAGIC);
        sector[4..8].copy_from_slice(&crc.to_le_bytes());
        sector
    }
}

impl Sector {
    /// Reads a sector's bytes.
    pub(crate) fn decode(sector: &[u8]) -> Self {
        if sector.iter().all(|byte| *byte == 0) {
            return Self::Empty;
        }
        let record = (sector.len() == SECTOR_BYTES && sector[..4] == MAGIC).then(|| record(sector)).flatten();
        record.map_or(Self::Damaged, Self::Record)
    }
}

fn record(sector: &[u8]) -> Option<LogRecord> {
    let mut input = &sector[4..];
    if input.get_u32_le() != crc32c::crc32c(&sector[8..]) {
        return None;
    }
    let sequence = input.get_u64_le();
    let count = input.get_u32_le() as usize;
    if count > RUNS_MAX || input.get_u32_le() != 0 || sequence == 0 {
        return None;
    }
    let runs = (0..count).map(|_| ExtentRun { first: input.get_u32_le(), count: input.get_u32_le() });
    Some(LogRecord { sequence, runs: runs.collect() })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_record_comes_back_and_every_flipped_bit_is_noticed() {
        let runs =
            (0..RUNS_MAX as u32).map(|first| ExtentRun { first: first * 9, count: first + 1 }).collect();
        let record = LogRecord { sequence: 77, runs };
        let sector = record.encode();
        assert_eq!(Sector::decode(&sector), Sector::Record(record));
        for bit in 0..SECTOR_BYTES * 8 {
            let mut damaged = sector;
            damaged[bit / 8] ^= 1 << (bit % 8);
            assert_eq!(Sector::decode(&damaged), Sector::Damaged, "bit {bit}");
        }
        assert_eq!(Sector::decode(&[0; SECTOR_BYTES]), Sector::Empty);
    }
}
