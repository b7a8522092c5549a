//! A snapshot of a disk's tracking: what may differ from the receiver, and where the activity log
//! goes on from there. `FORMAT.md` describes the bytes.

use bytes::{Buf, BufMut};

use crate::{
    activity::Captured,
    extents::ExtentRun,
    saved::{SavedError, SavedTracking},
};

/// What the file says of a disk as of one moment.
#[derive(Clone, Debug, PartialEq)]
pub struct Snapshot {
    /// Which snapshot of this file; the newest counts.
    pub generation: u64,
    /// The log's records from here on come on top.
    pub log_from: u64,
    /// A clean detach made it: nothing was written since, unless the log says so.
    pub clean: bool,
    /// Everything may differ, whatever else it says.
    pub everything: bool,
    /// The extents that were hot.
    pub hot: Vec<ExtentRun>,
    /// What the filter knew.
    pub saved: SavedTracking,
}

const MAGIC: [u8; 8] = *b"BTSNAP\0\0";
const HEADER_BYTES: usize = 8 + 8 + 8 + 8 + 4 + 4 + 8;

const FLAG_CLEAN: u32 = 1;
const FLAG_EVERYTHING: u32 = 2;

/// The longest list of hot extents that is read.
pub(crate) const HOT_RUNS_MAX: u32 = 1 << 22;

impl Snapshot {
    /// Of a file that has just this one.
    pub fn first(saved: SavedTracking, clean: bool, everything: bool) -> Self {
        Self { generation: 1, log_from: 1, clean, everything, hot: Vec::new(), saved }
    }

    /// Of a disk in use.
    pub fn of(captured: Captured, everything: bool, saved: SavedTracking) -> Self {
        let Captured { generation, log_from, hot } = captured;
        Self { generation, log_from, clean: false, everything, hot, saved }
    }

    /// The snapshot's bytes.
    pub fn encode(&self) -> Vec<u8> {
        let saved = self.saved.encode();
        let mut out = Vec::with_capacity(HEADER_BYTES + self.hot.len() * 8 + saved.len() + 4);
        out.put_slice(&MAGIC);
        // The length of everything, then what it is about.
        out.put_u64_le((HEADER_BYTES + self.hot.len() * 8 + saved.len() + 4) as u64);
        out.put_u64_le(self.generation);
        out.put_u64_le(self.log_from);
        let clean = if self.clean { FLAG_CLEAN } else { 0 };
        let everything = if self.everything { FLAG_EVERYTHING } else { 0 };
        out.put_u32_le(clean | everything);
        out.put_u32_le(self.hot.len() as u32);
        out.put_u64_le(saved.len() as u64);
        for run in &self.hot {
            out.put_u32_le(run.first);
            out.put_u32_le(run.count);
        }
        out.put_slice(&saved);
        let crc = crc32c::crc32c(&out);
        out.put_u32_le(crc);
        out
    }

    /// How long the snapshot is whose first bytes these are; none when they begin no snapshot.
    pub(crate) fn length(head: &[u8]) -> Option<u64> {
        let mut input = head.get(..16)?.strip_prefix(&MAGIC)?;
        Some(input.get_u64_le())
    }

    /// Reads the bytes of a snapshot.
    ///
    /// # Errors
    /// When anything about them is not as [`encode`](Self::encode) writes it.
    pub fn decode(bytes: &[u8]) -> Result<Self, SavedError> {
        let found = bytes.len() as u64;
        let least = (HEADER_BYTES + 4) as u64;
        if found < least {
            return Err(SavedError::Length { expected: least, found });
        }
        let (body, mut crc) = bytes.split_at(bytes.len() - 4);
        let (expected, computed) = (crc.get_u32_le(), crc32c::crc32c(body));
        if expected != computed {
            return Err(SavedError::Checksum { expected, found: computed });
        }
        let mut input = body.strip_prefix(&MAGIC).ok_or_else(|| {
            let mut magic = [0; 8];
            magic.copy_from_slice(&body[..8]);
            SavedError::Magic { found: magic }
        })?;
        let length = input.get_u64_le();
        let [generation, log_from] = std::array::from_fn(|_| input.get_u64_le());
        let [flags, hot_runs] = std::array::from_fn(|_| input.get_u32_le());
        let saved_bytes = input.get_u64_le();
        let expected = u64::from(hot_runs).checked_mul(8).and_then(|hot| hot.checked_add(saved_bytes));
        if length != found || expected != Some(input.len() as u64) || hot_runs > HOT_RUNS_MAX {
            return Err(SavedError::Length { expected: length, found });
        }
        if flags & !(FLAG_CLEAN | FLAG_EVERYTHING) != 0 || generation == 0 || log_from == 0 {
            return Err(SavedError::Invalid(format!(
                "flags {flags}, generation {generation}, log {log_from}"
            )));
        }
        let hot = (0..hot_runs).map(|_| ExtentRun { first: input.get_u32_le(), count: input.get_u32_le() });
        let hot = hot.collect();
        Ok(Self {
            generation,
            log_from,
            clean: flags & FLAG_CLEAN != 0,
            everything: flags & FLAG_EVERYTHING != 0,
            hot,
            saved: SavedTracking::decode(input)?,
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::saved::tests::saved;

    #[test]
    fn a_snapshot_comes_back_and_every_flipped_bit_and_cut_is_noticed() {
        let hot = vec![ExtentRun { first: 3, count: 9 }, ExtentRun { first: 70, count: 1 }];
        let snapshot =
            Snapshot { generation: 5, log_from: 9, clean: false, everything: true, hot, saved: saved() };
        let bytes = snapshot.encode();
        assert_eq!(Snapshot::decode(&bytes).unwrap(), snapshot);
        assert_eq!(Snapshot::length(&bytes), Some(bytes.len() as u64));
        for bit in 0..bytes.len() * 8 {
            let mut damaged = bytes.clone();
            damaged[bit / 8] ^= 1 << (bit % 8);
            assert!(Snapshot::decode(&damaged).is_err(), "bit {bit}");
        }
        for length in 0..bytes.len() {
            assert!(Snapshot::decode(&bytes[..length]).is_err(), "cut to {length}");
        }
    }

    proptest::proptest! {
        #[test]
        fn arbitrary_bytes_never_panic(mut bytes in proptest::collection::vec(proptest::num::u8::ANY, 60..400)) {
            // With a right checksum, so that everything behind it is reached.
            bytes[..8].copy_from_slice(&MAGIC);
            let end = bytes.len() - 4;
            let crc = crc32c::crc32c(&bytes[..end]);
            bytes[end..].copy_from_slice(&crc.to_le_bytes());
            let _ = Snapshot::decode(&bytes);
        }
    }
}
