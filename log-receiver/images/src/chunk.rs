//! A chunk: its name, and the header before its bytes in a pack.

use std::path::Path;

use backtide_units::{ByteCount, ByteOffset};
use bytes::{Buf, BufMut};

use crate::ImageError;

/// What a data chunk holds of the disk.
pub const CHUNK_BYTES: ByteCount = ByteCount(64 << 10);

/// Bytes of a reference to a chunk.
pub(crate) const REF_LENGTH: usize = 40;

/// Bytes before a chunk's content.
pub(crate) const CHUNK_HEADER_LENGTH: usize = 64;

/// A chunk by its content, and where it is. Nothing but zeroes has no chunk.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub struct ChunkRef {
    /// BLAKE3 of its content.
    pub(crate) hash: [u8; 32],
    /// The pack's number; 0 for zeroes.
    pub(crate) pack: u32,
    /// Its number in the pack, which stays when the pack loses others.
    pub(crate) ordinal: u32,
}

/// What a chunk is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Kind {
    /// Bytes of a disk.
    Data,
    /// References to chunks of the level below, which is 0 for data.
    Node(u8),
}

/// What stands before a chunk's content.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct ChunkHeader {
    pub(crate) kind: Kind,
    /// Whether the stored bytes are compressed with zstd.
    pub(crate) compressed: bool,
    pub(crate) name: ChunkRef,
    pub(crate) stored_length: u32,
    pub(crate) length: u32,
    /// CRC32C of the stored bytes.
    pub(crate) crc: u32,
}

impl ChunkRef {
    /// Nothing but zeroes.
    pub(crate) const ZEROES: Self = Self { hash: [0; 32], pack: 0, ordinal: 0 };

    pub(crate) fn is_zeroes(&self) -> bool {
        self.pack == 0
    }

    /// Its place in one number.
    pub(crate) fn place(&self) -> u64 {
        u64::from(self.pack) << 32 | u64::from(self.ordinal)
    }

    pub(crate) fn encode(&self, mut out: impl BufMut) {
        out.put_slice(&self.hash);
        out.put_u32_le(self.pack);
        out.put_u32_le(self.ordinal);
    }

    /// Reads the bytes back; none for what is no reference.
    pub(crate) fn decode(mut input: impl Buf) -> Option<Self> {
        let mut hash = [0; 32];
        input.try_copy_to_slice(&mut hash).ok()?;
        let (pack, ordinal) = (input.try_get_u32_le().ok()?, input.try_get_u32_le().ok()?);
        let found = Self { hash, pack, ordinal };
        (pack != 0 || found == Self::ZEROES).then_some(found)
    }
}

impl Kind {
    fn code(self) -> u8 {
        match self {
            Self::Data => 0,
            Self::Node(level) => level,
        }
    }

    fn of(code: u8) -> Self {
        if code == 0 { Self::Data } else { Self::Node(code) }
    }
}

impl ChunkHeader {
    pub(crate) fn encode(&self) -> [u8; CHUNK_HEADER_LENGTH] {
        let mut bytes = [0; CHUNK_HEADER_LENGTH];
        let mut out = &mut bytes[4..];
        out.put_u8(self.kind.code());
        out.put_u8(u8::from(self.compressed));
        out.put_u16_le(0);
        out.put_u32_le(self.name.pack);
        out.put_u32_le(self.name.ordinal);
        out.put_u32_le(self.stored_length);
        out.put_u32_le(self.length);
        out.put_u32_le(self.crc);
        out.put_u32_le(0);
        out.put_slice(&self.name.hash);
        let crc = crc32c::crc32c(&bytes[4..]);
        bytes[..4].copy_from_slice(&crc.to_le_bytes());
        bytes
    }

    /// Reads the bytes back; `file` and `offset` name them in errors.
    ///
    /// # Errors
    /// [`ImageError::Damaged`].
    pub(crate) fn decode(
        bytes: &[u8; CHUNK_HEADER_LENGTH],
        file: &Path,
        offset: ByteOffset,
    ) -> Result<Self, ImageError> {
        let damaged = |what: String| ImageError::Damaged { file: file.to_owned(), offset, what };
        let mut input = &bytes[..];
        let (crc, computed) = (input.get_u32_le(), crc32c::crc32c(&bytes[4..]));
        if crc != computed {
            return Err(damaged(format!(
                "the chunk header's checksum is {crc:08x}, its bytes give {computed:08x}"
            )));
        }
        let (kind, encoding) = (Kind::of(input.get_u8()), input.get_u8());
        input.advance(2);
        let (pack, ordinal) = (input.get_u32_le(), input.get_u32_le());
        let (stored_length, length, crc) = (input.get_u32_le(), input.get_u32_le(), input.get_u32_le());
        input.advance(4);
        let mut hash = [0; 32];
        input.copy_to_slice(&mut hash);
        let lengths = stored_length <= length && u64::from(length) <= CHUNK_BYTES.0;
        if encoding > 1 || pack == 0 || !lengths || (encoding == 0 && stored_length != length) {
            return Err(damaged(format!(
                "no chunk has encoding {encoding} and {length} bytes, {stored_length} of them stored"
            )));
        }
        let name = ChunkRef { hash, pack, ordinal };
        Ok(Self { kind, compressed: encoding == 1, name, stored_length, length, crc })
    }

    /// Bytes of header, content and padding.
    pub(crate) fn whole(&self) -> u64 {
        whole_length(self.stored_length)
    }
}

/// Bytes that a chunk with so many stored ones takes.
pub(crate) fn whole_length(stored: u32) -> u64 {
    (CHUNK_HEADER_LENGTH as u64 + u64::from(stored)).next_multiple_of(8)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_header_reads_back_and_every_flipped_bit_is_found() {
        let name = ChunkRef { hash: [7; 32], pack: 3, ordinal: 9 };
        let (stored_length, length) = (100, 65536);
        let header =
            ChunkHeader { kind: Kind::Node(2), compressed: true, name, stored_length, length, crc: 5 };
        let good = header.encode();
        let decode = |bytes: &_| ChunkHeader::decode(bytes, Path::new("x"), ByteOffset(64));
        assert_eq!(decode(&good).unwrap(), header);
        for bit in 0..CHUNK_HEADER_LENGTH * 8 {
            let mut bytes = good;
            bytes[bit / 8] ^= 1 << (bit % 8);
            assert!(decode(&bytes).is_err(), "bit {bit}");
        }
    }

    #[test]
    fn a_reference_reads_back_and_half_a_one_is_none() {
        for name in [ChunkRef::ZEROES, ChunkRef { hash: [1; 32], pack: 1, ordinal: 0 }] {
            let mut bytes = Vec::new();
            name.encode(&mut bytes);
            assert_eq!(bytes.len(), REF_LENGTH);
            assert_eq!(ChunkRef::decode(&bytes[..]), Some(name));
            assert_eq!(ChunkRef::decode(&bytes[..39]), None);
        }
        assert_eq!(ChunkRef::decode(&[1; 40][..32]), None);
        let mut strange = [0; REF_LENGTH];
        strange[0] = 1;
        assert_eq!(ChunkRef::decode(&strange[..]), None, "zeroes have no hash");
    }
}
