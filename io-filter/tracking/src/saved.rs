//! What the filter knows of a disk at a moment, as bytes: the inner part of a snapshot.
//! `FORMAT.md` beside this crate describes them.

use backtide_units::{DiskId, HistoryId, LogPosition, Lsn, Reason};
use bytes::{Buf, BufMut};
use uuid::Uuid;

use crate::DirtyBitmap;

/// What the filter knows of the differences between a disk and its receiver.
#[derive(Clone, Debug, PartialEq)]
pub struct SavedTracking {
    /// The disk it belongs to.
    pub disk: DiskId,
    /// The history the bitmap is relative to; none when the disk never met a receiver.
    pub history: Option<HistoryId>,
    /// The last LSN given.
    pub last_lsn: Lsn,
    /// The receiver's log is complete up to here; later changes are in the bitmap.
    pub gap_from: Lsn,
    /// The highest LSN the receiver acknowledged as durable.
    pub acked_durable: Lsn,
    /// How much of its log it acknowledged so.
    pub acked_position: LogPosition,
    /// With the records in the spill, which end here, the log is complete and no block is dirty.
    pub spilled_to: Option<Lsn>,
    /// Why blocks are dirty; none when the log is complete and the bitmap empty.
    pub reason: Option<Reason>,
    /// Whether dirty blocks are only candidates that have to be compared.
    pub compare: bool,
    /// The dirty blocks.
    pub dirty: DirtyBitmap,
    /// Blocks known to read as zeroes here, of which the receiver has not been told.
    pub zeroes: DirtyBitmap,
}

/// Why a tracking file cannot be used. Everything has to be compared then.
#[derive(Debug, thiserror::Error)]
pub enum SavedError {
    /// Not a tracking file at all.
    #[error("no tracking file: expected magic {expected:?}, found {found:?}", expected = MAGIC)]
    Magic {
        /// The first bytes.
        found: [u8; 8],
    },
    /// Written by another version.
    #[error("tracking file of version {found}, this build reads version {VERSION}")]
    Version {
        /// The version in the file.
        found: u32,
    },
    /// Cut short or longer than it says.
    #[error("tracking file of {found} bytes, expected {expected}")]
    Length {
        /// As the header says.
        expected: u64,
        /// The file's length.
        found: u64,
    },
    /// The checksum does not match.
    #[error("damaged tracking file: checksum expected {expected:#010x}, found {found:#010x}")]
    Checksum {
        /// As the file says.
        expected: u32,
        /// As computed.
        found: u32,
    },
    /// A field has an impossible value.
    #[error("damaged tracking file: {0}")]
    Invalid(String),
}

const MAGIC: [u8; 8] = *b"BTTRACK\0";
const VERSION: u32 = 1;
const HEADER_BYTES: usize = 8 + 4 + 1 + 1 + 2 + 16 + 16 + 8 + 8 + 8 + 8 + 8 + 8 + 8 + 4;

const FLAG_COMPARE: u8 = 1;
const FLAG_HAS_HISTORY: u8 = 2;

impl SavedTracking {
    /// Nothing is known of the disk.
    pub fn unknown(disk: DiskId) -> Self {
        Self {
            disk,
            history: None,
            last_lsn: Lsn::ZERO,
            gap_from: Lsn::ZERO,
            acked_durable: Lsn::ZERO,
            acked_position: LogPosition::default(),
            spilled_to: None,
            reason: None,
            compare: true,
            dirty: DirtyBitmap::new(),
            zeroes: DirtyBitmap::new(),
        }
    }

    /// The file's bytes.
    pub fn encode(&self) -> Vec<u8> {
        let dirty = self.dirty.to_bytes();
        let zeroes = self.zeroes.to_bytes();
        let mut out = Vec::with_capacity(HEADER_BYTES + dirty.len() + zeroes.len() + 4);
        out.put_slice(&MAGIC);
        out.put_u32_le(VERSION);
        let compare = if self.compare { FLAG_COMPARE } else { 0 };
        let history = if self.history.is_some() { FLAG_HAS_HISTORY } else { 0 };
        out.put_u8(compare | history);
        out.put_u8(self.reason.map_or(0, Reason::code));
        out.put_u16_le(0);
        out.put_slice(self.disk.0.as_bytes());
        out.put_slice(self.history.map_or(Uuid::nil(), |history| history.0).as_bytes());
        out.put_u64_le(self.last_lsn.0);
        out.put_u64_le(self.gap_from.0);
        out.put_u64_le(self.acked_durable.0);
        out.put_u64_le(self.acked_position.0);
        out.put_u64_le(self.spilled_to.unwrap_or_default().0);
        out.put_u64_le(dirty.len() as u64);
        out.put_u64_le(zeroes.len() as u64);
        out.put_u32_le(0);
        out.put_slice(&dirty);
        out.put_slice(&zeroes);
        let crc = crc32c::crc32c(&out);
        out.put_u32_le(crc);
        out
    }

    /// Reads the file's bytes.
    ///
    /// # Errors
    /// When anything about them is not as [`encode`](Self::encode) writes it.
    pub fn decode(bytes: &[u8]) -> Result<Self, SavedError> {
        let short =
            |expected: usize| SavedError::Length { expected: expected as u64, found: bytes.len() as u64 };
        let mut input = bytes.get(..HEADER_BYTES).ok_or_else(|| short(HEADER_BYTES + 4))?;
        let mut magic = [0; 8];
        input.copy_to_slice(&mut magic);
        if magic != MAGIC {
            return Err(SavedError::Magic { found: magic });
        }
        let version = input.get_u32_le();
        if version != VERSION {
            return Err(SavedError::Version { found: version });
        }
        let flags = input.get_u8();
        let reason = input.get_u8();
        input.advance(2);
        let disk = DiskId(uuid(&mut input));
        let history = HistoryId(uuid(&mut input));
        let [last_lsn, gap_from, acked_durable] = std::array::from_fn(|_| Lsn(input.get_u64_le()));
        let acked_position = LogPosition(input.get_u64_le());
        let spilled_to = Lsn(input.get_u64_le());
        let [dirty_bytes, zeroes_bytes] = std::array::from_fn(|_| input.get_u64_le());
        let expected =
            (HEADER_BYTES as u64 + 4).checked_add(dirty_bytes).and_then(|n| n.checked_add(zeroes_bytes));
        let found = bytes.len() as u64;
        if expected != Some(found) {
            return Err(SavedError::Length { expected: expected.unwrap_or(u64::MAX), found });
        }
        let (body, mut crc) = bytes.split_at(bytes.len() - 4);
        let (expected, found) = (crc.get_u32_le(), crc32c::crc32c(body));
        if expected != found {
            return Err(SavedError::Checksum { expected, found });
        }
        let (dirty, zeroes) = body[HEADER_BYTES..].split_at(dirty_bytes as usize);
        let bitmap =
            |bytes| DirtyBitmap::from_bytes(bytes).map_err(|error| SavedError::Invalid(error.to_string()));
        let unknown = || SavedError::Invalid(format!("unknown reason code {reason}"));
        Ok(Self {
            disk,
            history: (flags & FLAG_HAS_HISTORY != 0).then_some(history),
            last_lsn,
            gap_from,
            acked_durable,
            acked_position,
            spilled_to: (spilled_to != Lsn::ZERO).then_some(spilled_to),
            reason: if reason == 0 { None } else { Some(Reason::from_code(reason).ok_or_else(unknown)?) },
            compare: flags & FLAG_COMPARE != 0,
            dirty: bitmap(dirty)?,
            zeroes: bitmap(zeroes)?,
        })
    }
}

fn uuid(input: &mut &[u8]) -> Uuid {
    let mut bytes = [0; 16];
    input.copy_to_slice(&mut bytes);
    Uuid::from_bytes(bytes)
}

#[cfg(test)]
pub(crate) mod tests {
    use super::*;

    pub(crate) fn saved() -> SavedTracking {
        SavedTracking {
            disk: DiskId(Uuid::from_bytes([1; 16])),
            history: Some(HistoryId(Uuid::from_bytes([2; 16]))),
            last_lsn: Lsn(300),
            gap_from: Lsn(200),
            acked_durable: Lsn(199),
            acked_position: LogPosition(777),
            spilled_to: Some(Lsn(250)),
            reason: Some(Reason::ReceiverAway),
            compare: true,
            dirty: DirtyBitmap::of((5..900).into()),
            zeroes: DirtyBitmap::of((1 << 33..(1 << 33) + 9).into()),
        }
    }

    #[test]
    fn what_was_saved_comes_back() {
        let saved = saved();
        assert_eq!(SavedTracking::decode(&saved.encode()).unwrap(), saved);
        let fresh = SavedTracking { history: None, reason: None, compare: false, ..saved };
        assert_eq!(SavedTracking::decode(&fresh.encode()).unwrap(), fresh);
    }

    #[test]
    fn every_flipped_bit_and_every_cut_is_noticed() {
        let bytes = saved().encode();
        for bit in 0..bytes.len() * 8 {
            let mut damaged = bytes.clone();
            damaged[bit / 8] ^= 1 << (bit % 8);
            assert!(SavedTracking::decode(&damaged).is_err(), "bit {bit}");
        }
        for length in 0..bytes.len() {
            assert!(SavedTracking::decode(&bytes[..length]).is_err(), "cut to {length}");
        }
    }

    proptest::proptest! {
        #[test]
        fn arbitrary_bytes_never_panic(bytes in proptest::collection::vec(proptest::num::u8::ANY, 0..300)) {
            let _ = SavedTracking::decode(&bytes);
        }
    }
}
