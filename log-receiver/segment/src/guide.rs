//! The part of a footer that says where to look: in which index block an extent is, in which stretch a record.

use backtide_units::{CaptureTime, Lsn};
use bytes::{Buf, Bytes};

use crate::{
    Bucket, ExtentKey, IndexBlock, Position, SEGMENT_HEADER_LENGTH, SegmentHeader, Seq, Stretch,
    footer::{FENCE_LENGTH, STRETCH_LENGTH},
};

/// Where to look in a sealed segment.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Guide {
    /// The first key of each index block.
    fences: Vec<ExtentKey>,
    stretches: Vec<Stretch>,
}

impl Guide {
    /// The block in which a walk from `key` begins.
    pub fn block_of(&self, key: ExtentKey) -> u32 {
        (self.fences.partition_point(|fence| *fence <= key) as u32).saturating_sub(1)
    }

    /// Whether a block is the one that this says: look-ups go by the fences alone, so a block that begins elsewhere,
    /// or reaches into the next, would hide what it holds.
    pub(crate) fn is_block(&self, number: u32, block: &IndexBlock) -> bool {
        let fence = |number: usize| self.fences.get(number).copied();
        let Some(last) = block.len().checked_sub(1) else { return false };
        let number = number as usize;
        fence(number) == Some(block.get(0).0) && fence(number + 1).is_none_or(|next| block.get(last).0 < next)
    }

    /// The stretches of entries, in order; they adjoin.
    pub fn stretches(&self) -> &[Stretch] {
        &self.stretches
    }

    /// Bytes that it takes in memory.
    pub fn weight(&self) -> usize {
        self.fences.len() * size_of::<ExtentKey>() + self.stretches.len() * size_of::<Stretch>()
    }

    /// `None` when the bytes are no guide to a segment with so many index blocks and these bounds.
    pub(crate) fn decode(
        mut bytes: Bytes,
        blocks: u32,
        header: &SegmentHeader,
        next_seq: Seq,
        entries_end: u64,
    ) -> Option<Self> {
        let fences_length = (blocks as usize).checked_mul(FENCE_LENGTH)?;
        if bytes.len() < fences_length || !(bytes.len() - fences_length).is_multiple_of(STRETCH_LENGTH) {
            return None;
        }
        let mut fences = Vec::with_capacity(blocks as usize);
        for _ in 0..blocks {
            let bucket = Bucket::from_code(bytes.get_u64_le())?;
            fences.push(ExtentKey::new(bucket, Lsn(bytes.get_u64_le()), Seq(bytes.get_u64_le())));
        }
        let mut stretches = Vec::with_capacity(bytes.len() / STRETCH_LENGTH);
        while bytes.has_remaining() {
            let position = Position(bytes.get_u32_le());
            bytes.advance(4);
            stretches.push(Stretch {
                position,
                seq: Seq(bytes.get_u64_le()),
                records: bytes.get_u32_le(),
                flushes: bytes.get_u32_le(),
                lsn_min: Lsn(bytes.get_u64_le()),
                time_min: CaptureTime(bytes.get_u64_le()),
            });
        }
        let placed = |stretch: &Stretch| {
            (SEGMENT_HEADER_LENGTH as u64..entries_end).contains(&stretch.position.offset().0)
                && (header.first_seq..next_seq).contains(&stretch.seq)
        };
        let ordered = stretches.is_sorted_by(|a, b| a.position < b.position && a.seq < b.seq);
        (ordered && stretches.iter().all(placed)).then_some(Self { fences, stretches })
    }
}
