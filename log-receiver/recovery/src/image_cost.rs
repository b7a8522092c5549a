//! What it takes to make an image, known from the segments' bitmaps before anything is read for it.

use backtide_images::CHUNK_BYTES;
use backtide_units::{BLOCK_SIZE, ByteCount, Lsn};

use crate::{LogError, Snapshot};

/// Nodes have 256 children, on each level; disks have four levels of them at most.
const LEVELS: u32 = 4;

/// About what a node takes in a pack, where it is twice.
const NODE_BYTES: u64 = 2 * 10_400;

/// About what making an image takes.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct ImageCost {
    /// What is read of the disk's versions.
    pub read: ByteCount,
    /// The most that is written: less where it compresses, or is stored already.
    pub written_max: ByteCount,
}

impl Snapshot {
    /// What an image of the disk at `at` takes, beside one at `after`.
    ///
    /// # Errors
    /// When the log cannot be read.
    pub fn image_cost(&self, after: Lsn, at: Lsn) -> Result<ImageCost, LogError> {
        let blocks_per_chunk = CHUNK_BYTES.0 / BLOCK_SIZE;
        let mut counts = [0_u64; LEVELS as usize + 1];
        let mut last = [None; LEVELS as usize + 1];
        for block in self.changed_blocks(after, at)? {
            let mut place = block / blocks_per_chunk;
            for (count, last) in counts.iter_mut().zip(&mut last) {
                if *last == Some(place) {
                    // So are all above it.
                    break;
                }
                *last = Some(place);
                *count += 1;
                place >>= 8;
            }
        }
        let read = counts[0] * CHUNK_BYTES.0;
        let nodes: u64 = counts[1..].iter().sum();
        Ok(ImageCost { read: ByteCount(read), written_max: ByteCount(read + nodes * NODE_BYTES) })
    }
}
