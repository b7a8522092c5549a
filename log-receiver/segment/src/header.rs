//! The segment's header: the first 128 bytes, which say whose log this is a part of.

use std::path::Path;

use backtide_units::{ByteOffset, DiskId, HistoryId};
use bytes::{Buf, BufMut};
use uuid::Uuid;

use crate::{SegmentError, SegmentId, Seq};

/// Bytes of a segment's header.
pub const SEGMENT_HEADER_LENGTH: usize = 128;

/// The newest format version, the one we write.
pub const VERSION: u32 = 1;

/// How every segment file begins.
pub const MAGIC: [u8; 8] = *b"BKTDSEG\n";

const CRC_AT: usize = SEGMENT_HEADER_LENGTH - 4;

/// What a segment says about itself before its first entry.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct SegmentHeader {
    /// The disk.
    pub disk: DiskId,
    /// The disk's history at this receiver.
    pub history: HistoryId,
    /// Which segment of the log.
    pub id: SegmentId,
    /// The number of its first entry.
    pub first_seq: Seq,
    /// Every entry up to this one was durable when the segment was created.
    pub synced: Seq,
}

impl SegmentHeader {
    /// The bytes.
    pub fn encode(&self) -> [u8; SEGMENT_HEADER_LENGTH] {
        let mut bytes = [0; SEGMENT_HEADER_LENGTH];
        let mut out = &mut bytes[..];
        out.put_slice(&MAGIC);
        out.put_u32_le(VERSION);
        out.put_u32_le(SEGMENT_HEADER_LENGTH as u32);
        out.put_slice(self.disk.0.as_bytes());
        out.put_slice(self.history.0.as_bytes());
        out.put_u32_le(self.id.0);
        out.put_u32_le(0);
        out.put_u64_le(self.first_seq.0);
        out.put_u64_le(self.synced.0);
        let crc = crc32c::crc32c(&bytes[..CRC_AT]);
        bytes[CRC_AT..].copy_from_slice(&crc.to_le_bytes());
        bytes
    }

    /// Reads the bytes back; `file` names them in errors.
    ///
    /// # Errors
    /// [`SegmentError::UnknownVersion`], or [`SegmentError::Damaged`] for anything else that is not
    /// a header.
    pub fn decode(bytes: &[u8; SEGMENT_HEADER_LENGTH], file: &Path) -> Result<Self, SegmentError> {
        let damaged = |offset: u64, what: String| SegmentError::Damaged {
            file: file.to_owned(),
            offset: ByteOffset(offset),
            what,
        };
        let mut input = &bytes[..];
        let mut magic = [0; 8];
        input.copy_to_slice(&mut magic);
        if magic != MAGIC {
            return Err(damaged(0, format!("expected a segment's magic, found {magic:02x?}")));
        }
        let version = input.get_u32_le();
        let crc =
            u32::from_le_bytes([bytes[CRC_AT], bytes[CRC_AT + 1], bytes[CRC_AT + 2], bytes[CRC_AT + 3]]);
        let computed = crc32c::crc32c(&bytes[..CRC_AT]);
        if crc != computed {
            return Err(damaged(
                0,
                format!("the segment header's checksum is {crc:08x}, its bytes give {computed:08x}"),
            ));
        }
        if version != VERSION {
            return Err(SegmentError::UnknownVersion {
                file: file.to_owned(),
                found: version,
                known: VERSION,
            });
        }
        let length = input.get_u32_le();
        if length != SEGMENT_HEADER_LENGTH as u32 {
            return Err(damaged(12, format!("expected a header of 128 bytes, found {length}")));
        }
        let disk = DiskId(Uuid::from_u128(input.get_u128()));
        let history = HistoryId(Uuid::from_u128(input.get_u128()));
        let id = SegmentId(input.get_u32_le());
        input.advance(4);
        let first_seq = Seq(input.get_u64_le());
        let synced = Seq(input.get_u64_le());
        if id.0 == 0 || first_seq.0 == 0 || first_seq > Seq::MAX {
            let found = format!("expected segment and entry numbers from 1, found {id} and {first_seq}");
            return Err(damaged(48, found));
        }
        Ok(Self { disk, history, id, first_seq, synced })
    }

    /// What entry checksums start from, so that no entry of another log can pass for one of this.
    pub(crate) fn salt(&self) -> u32 {
        let crc = crc32c::crc32c(self.disk.0.as_bytes());
        crc32c::crc32c_append(crc, self.history.0.as_bytes())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn header() -> SegmentHeader {
        SegmentHeader {
            disk: DiskId(Uuid::from_u128(1)),
            history: HistoryId(Uuid::from_u128(2)),
            id: SegmentId(3),
            first_seq: Seq(4),
            synced: Seq(2),
        }
    }

    #[test]
    fn a_header_reads_back() {
        assert_eq!(SegmentHeader::decode(&header().encode(), Path::new("x")).expect("good"), header());
    }

    #[test]
    fn every_flipped_bit_is_found() {
        for bit in 0..SEGMENT_HEADER_LENGTH * 8 {
            let mut bytes = header().encode();
            bytes[bit / 8] ^= 1 << (bit % 8);
            assert!(SegmentHeader::decode(&bytes, Path::new("x")).is_err(), "bit {bit}");
        }
    }

    #[test]
    fn a_newer_version_is_refused_by_name() {
        let mut bytes = header().encode();
        bytes[8] = 2;
        let crc = crc32c::crc32c(&bytes[..CRC_AT]);
        bytes[CRC_AT..].copy_from_slice(&crc.to_le_bytes());
        let error = SegmentHeader::decode(&bytes, Path::new("s.seg")).expect_err("refused");
        assert_eq!(error.to_string(), "s.seg has format version 2, this program reads up to 1");
    }
}
