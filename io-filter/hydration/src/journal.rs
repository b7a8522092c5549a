//! The second part of a hydration file: which blocks have become present, in the order in which they did,
//! and how much of that is durable on the image. `FORMAT.md` describes the bytes.
//!
//! Invariant: entries never lie across a sector of 512 bytes, and one is written behind the other. So a sector
//! that a power cut left as it was before holds whole entries and zeroes; anything else is damage.

use backtide_units::{BlockIndex, BlockRange};
use bytes::{Buf, BufMut};
use uuid::Uuid;

/// The bytes of an entry.
pub(crate) const ENTRY_BYTES: u64 = 32;

const KIND_PRESENT: u32 = 1;
const KIND_DURABLE: u32 = 2;

/// Something that has happened to the image.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Entry {
    /// These blocks hold what they should; a power loss may take that away.
    Present(BlockRange),
    /// All blocks of the entries up to this one are durable on the image.
    Durable(u64),
}

/// What is in the place of an entry.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Slot {
    /// A whole one.
    Whole(Entry),
    /// None was written.
    Empty,
    /// Something else.
    Damaged,
}

/// The bytes of an entry; `sequence` counts from 1 in each file.
pub(crate) fn encode(file: Uuid, sequence: u64, entry: Entry) -> [u8; ENTRY_BYTES as usize] {
    let (kind, first, second) = match entry {
        Entry::Present(blocks) => (KIND_PRESENT, blocks.start().0, blocks.count().0),
        Entry::Durable(until) => (KIND_DURABLE, until, 0),
    };
    let mut bytes = [0; ENTRY_BYTES as usize];
    let mut out = &mut bytes[4..];
    out.put_u32_le(kind);
    out.put_u64_le(sequence);
    out.put_u64_le(first);
    out.put_u64_le(second);
    let crc = checksum(file, &bytes[4..]);
    bytes[..4].copy_from_slice(&crc.to_le_bytes());
    bytes
}

/// The file's id is part of it: what another file left in the same place is no entry of this one.
fn checksum(file: Uuid, body: &[u8]) -> u32 {
    crc32c::crc32c_append(crc32c::crc32c(file.as_bytes()), body)
}

/// Reads the place of the entry `sequence`.
pub(crate) fn decode(file: Uuid, sequence: u64, bytes: &[u8]) -> Slot {
    if bytes.iter().all(|byte| *byte == 0) {
        return Slot::Empty;
    }
    if bytes.len() as u64 != ENTRY_BYTES {
        return Slot::Damaged;
    }
    let mut input = bytes;
    if input.get_u32_le() != checksum(file, &bytes[4..]) {
        return Slot::Damaged;
    }
    let kind = input.get_u32_le();
    let [found, first, second] = std::array::from_fn(|_| input.get_u64_le());
    if found != sequence {
        return Slot::Damaged;
    }
    match (kind, first.checked_add(second)) {
        (KIND_PRESENT, Some(end)) => {
            Slot::Whole(Entry::Present(BlockRange::between(BlockIndex(first), BlockIndex(end))))
        }
        (KIND_DURABLE, _) if first < sequence => Slot::Whole(Entry::Durable(first)),
        _ => Slot::Damaged,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_entry_comes_back_and_every_flipped_bit_and_cut_is_noticed() {
        let file = Uuid::from_bytes([7; 16]);
        for entry in [Entry::Present((5..9).into()), Entry::Durable(2)] {
            let bytes = encode(file, 3, entry);
            assert_eq!(decode(file, 3, &bytes), Slot::Whole(entry));
            assert_eq!(decode(file, 4, &bytes), Slot::Damaged, "in another place");
            assert_eq!(decode(Uuid::nil(), 3, &bytes), Slot::Damaged, "of another file");
            for bit in 0..bytes.len() * 8 {
                let mut damaged = bytes;
                damaged[bit / 8] ^= 1 << (bit % 8);
                assert_eq!(decode(file, 3, &damaged), Slot::Damaged, "bit {bit}");
            }
            assert_eq!(decode(file, 3, &bytes[..20]), Slot::Damaged);
        }
        assert_eq!(decode(file, 3, &[0; 32]), Slot::Empty);
    }
}
