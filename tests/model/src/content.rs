//! Between a block's value and its bytes: the first byte is the value, all others are zeroes.
//!
//! The last block of a disk has one byte: the states of a walk stay small, and a partial last block
//! is walked too.

use backtide_units::{BLOCK_SIZE, ByteCount, ByteOffset, ByteRange};
use bytes::Bytes;

/// The size of a disk of so many blocks.
pub(crate) fn disk_size(blocks: u8) -> ByteCount {
    ByteCount((u64::from(blocks) - 1) * BLOCK_SIZE + 1)
}

/// The byte of a block that says what it holds.
pub(crate) fn byte_of(block: u8) -> ByteRange {
    ByteRange::new(ByteOffset(u64::from(block) * BLOCK_SIZE), ByteCount(1)).expect("a tiny disk")
}

/// All bytes of a block.
pub(crate) fn block_of(block: u8, blocks: u8) -> ByteRange {
    let start = u64::from(block) * BLOCK_SIZE;
    let end = (start + BLOCK_SIZE).min(disk_size(blocks).0);
    ByteRange::between(ByteOffset(start), ByteOffset(end))
}

/// The blocks whose first byte lies in the range.
pub(crate) fn blocks_in(range: ByteRange) -> impl Iterator<Item = u8> {
    let first = range.start().0.div_ceil(BLOCK_SIZE);
    let end = range.end().0.div_ceil(BLOCK_SIZE);
    (first..end).map(|block| u8::try_from(block).expect("a tiny disk"))
}

/// The bytes of a range of a disk with these values.
pub(crate) fn bytes_of(range: ByteRange, value: impl Fn(u8) -> u8) -> Bytes {
    let length = range.count().as_usize().expect("a tiny disk");
    let mut bytes = vec![0; length];
    for block in blocks_in(range) {
        let at = u64::from(block) * BLOCK_SIZE - range.start().0;
        bytes[usize::try_from(at).expect("a tiny disk")] = value(block);
    }
    bytes.into()
}

/// The value of a block in the bytes of a range; no bytes are zeroes.
pub(crate) fn value_in(range: ByteRange, bytes: &[u8], block: u8) -> u8 {
    let at = u64::from(block) * BLOCK_SIZE - range.start().0;
    let at = usize::try_from(at).expect("a tiny disk");
    if bytes.is_empty() { 0 } else { bytes[at] }
}
