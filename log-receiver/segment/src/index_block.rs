//! One block of a sealed segment's index: up to 170 extents in key order, checked when it is read.

use backtide_units::Lsn;
use bytes::{Buf, Bytes};

use crate::{
    Bucket, Extent, ExtentKey, Seq,
    footer::{BLOCK_CRC_AT, COUNT_AT, RECORD_LENGTH, RECORDS_PER_BLOCK, SEQ_BITS},
    index::Piece,
};

/// One block of the index, checked.
#[derive(Clone, Debug)]
pub struct IndexBlock {
    first_seq: Seq,
    count: usize,
    bytes: Bytes,
}

impl IndexBlock {
    /// Of the bytes of a block; `None` when they are not what was written.
    pub(crate) fn decode(bytes: Bytes, first_seq: Seq) -> Option<Self> {
        let crc = (&bytes[BLOCK_CRC_AT..]).get_u32_le();
        let count = usize::from((&bytes[COUNT_AT..]).get_u16_le());
        if crc != crc32c::crc32c(&bytes[..BLOCK_CRC_AT]) || count > RECORDS_PER_BLOCK {
            return None;
        }
        let block = Self { first_seq, count, bytes };
        let sound = (0..count).all(|place| {
            let (bucket, piece, _) = block.record(place);
            bucket.is_some_and(|bucket| piece.fits(bucket))
        });
        // Look-ups halve it.
        (sound && (1..count).all(|place| block.get(place - 1).0 < block.get(place).0)).then_some(block)
    }

    fn record(&self, place: usize) -> (Option<Bucket>, Piece, (Lsn, Seq)) {
        let mut record = &self.bytes[place * RECORD_LENGTH..][..RECORD_LENGTH];
        let number = record.get_u32_le();
        let (start, last) = (record.get_u16_le(), record.get_u16_le());
        let version = Lsn(record.get_u64_le());
        let level_and_seq = record.get_u32_le();
        let seq = Seq(self.first_seq.0.saturating_add(u64::from(level_and_seq & ((1 << SEQ_BITS) - 1))));
        let bucket = Bucket::new((level_and_seq >> SEQ_BITS) as u8, number);
        (bucket, Piece { start, last, position: record.get_u32_le() }, (version, seq))
    }

    /// How many extents.
    pub fn len(&self) -> usize {
        self.count
    }

    /// Whether it has no extents.
    pub fn is_empty(&self) -> bool {
        self.count == 0
    }

    /// One extent, with its key.
    ///
    /// # Panics
    /// When there is no such extent.
    pub fn get(&self, place: usize) -> (ExtentKey, Extent) {
        assert!(place < self.count, "extent {place} of {}", self.count);
        let (bucket, piece, (version, seq)) = self.record(place);
        let key = ExtentKey::new(bucket.expect("checked when it was read"), version, seq);
        (key, piece.extent(key))
    }

    /// The first place at or after `key`.
    pub fn lower_bound(&self, key: ExtentKey) -> usize {
        let (mut low, mut high) = (0, self.count);
        while low < high {
            let middle = usize::midpoint(low, high);
            if self.get(middle).0 < key { low = middle + 1 } else { high = middle }
        }
        low
    }
}
