//! The first bytes of a spill file: whose it is, and what it continues. `FORMAT.md` describes them.

use backtide_units::{DiskId, Epoch, HistoryId, Lsn};
use bytes::{Buf, BufMut};
use uuid::Uuid;

/// The bytes of a header; frames follow.
pub const HEADER_BYTES: usize = 8 + 4 + 4 + 16 + 16 + 8 + 8 + 8 + 8 + 4;

const MAGIC: [u8; 8] = *b"BTSPILL\0";
const VERSION: u32 = 1;

/// Whose file it is, and where in the ring it belongs.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct FileHeader {
    /// The disk.
    pub disk: DiskId,
    /// The history its records continue.
    pub history: HistoryId,
    /// The attach that made it.
    pub epoch: Epoch,
    /// The file's number: one above that of the file before it.
    pub number: u64,
    /// The number of its first frame.
    pub first: u64,
    /// Where the log stands before its first frame.
    pub base: Lsn,
}

/// Why a file is none of this disk's spill.
#[derive(Debug, PartialEq, Eq, thiserror::Error)]
pub enum HeaderError {
    /// Cut short, or something else.
    #[error("no spill file: expected magic {expected:?}, found {found:?}", expected = MAGIC)]
    Magic {
        /// The first bytes.
        found: Vec<u8>,
    },
    /// Written by another version.
    #[error("spill file of version {found}, this build reads version {VERSION}")]
    Version {
        /// The version in the file.
        found: u32,
    },
    /// The checksum does not match.
    #[error("damaged header of a spill file: checksum expected {expected:#010x}, found {found:#010x}")]
    Checksum {
        /// As the header says.
        expected: u32,
        /// As computed.
        found: u32,
    },
}

impl FileHeader {
    /// The header's bytes.
    pub fn encode(&self) -> [u8; HEADER_BYTES] {
        let mut bytes = [0; HEADER_BYTES];
        let mut out = &mut bytes[..];
        out.put_slice(&MAGIC);
        out.put_u32_le(VERSION);
        out.put_u32_le(0);
        out.put_slice(self.disk.0.as_bytes());
        out.put_slice(self.history.0.as_bytes());
        for field in [self.epoch.0, self.number, self.first, self.base.0] {
            out.put_u64_le(field);
        }
        let crc = crc32c::crc32c(&bytes[..HEADER_BYTES - 4]);
        bytes[HEADER_BYTES - 4..].copy_from_slice(&crc.to_le_bytes());
        bytes
    }

    /// Reads the bytes a file begins with.
    ///
    /// # Errors
    /// When they are not as [`encode`](Self::encode) writes them.
    pub fn decode(bytes: &[u8]) -> Result<Self, HeaderError> {
        let magic = |bytes: &[u8]| HeaderError::Magic { found: bytes[..bytes.len().min(8)].to_vec() };
        let header = bytes.get(..HEADER_BYTES).ok_or_else(|| magic(bytes))?;
        if header[..8] != MAGIC {
            return Err(magic(header));
        }
        let mut input = &header[8..];
        let version = input.get_u32_le();
        if version != VERSION {
            return Err(HeaderError::Version { found: version });
        }
        let expected = (&header[HEADER_BYTES - 4..]).get_u32_le();
        let found = crc32c::crc32c(&header[..HEADER_BYTES - 4]);
        if expected != found {
            return Err(HeaderError::Checksum { expected, found });
        }
        input.advance(4);
        let [disk, history] = std::array::from_fn(|_| {
            let mut id = [0; 16];
            input.copy_to_slice(&mut id);
            Uuid::from_bytes(id)
        });
        let [epoch, number, first, base] = std::array::from_fn(|_| input.get_u64_le());
        Ok(Self {
            disk: DiskId(disk),
            history: HistoryId(history),
            epoch: Epoch(epoch),
            number,
            first,
            base: Lsn(base),
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn header() -> FileHeader {
        FileHeader {
            disk: DiskId(Uuid::from_bytes([1; 16])),
            history: HistoryId(Uuid::from_bytes([2; 16])),
            epoch: Epoch(3),
            number: 4,
            first: 5,
            base: Lsn(6),
        }
    }

    #[test]
    fn a_header_comes_back_and_every_flipped_bit_and_cut_is_noticed() {
        let bytes = header().encode();
        assert_eq!(FileHeader::decode(&bytes), Ok(header()));
        for bit in 0..HEADER_BYTES * 8 {
            let mut damaged = bytes;
            damaged[bit / 8] ^= 1 << (bit % 8);
            assert!(FileHeader::decode(&damaged).is_err(), "bit {bit}");
        }
        for length in 0..HEADER_BYTES {
            assert!(FileHeader::decode(&bytes[..length]).is_err(), "cut to {length}");
        }
    }
}
