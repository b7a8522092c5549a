//! Reading: blocks of the overlay from its data file, each checked; all others from the disk below.

use std::sync::PoisonError;

use backtide_units::{BLOCK_SIZE, BlockIndex, BlockRange, ByteRange};
use bytes::Bytes;

use crate::{
    Base, Overlay, OverlayError,
    blocks::{Lookup, Slot, Stored},
};

/// The most blocks of one read of the data file.
const BLOCKS_MAX: usize = 256;

/// Who has some bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    /// The overlay, as data.
    Data,
    /// The overlay, as zeroes.
    Zero,
    /// The disk below.
    Below,
}

/// A read of an overlay that lacks what the disk below has.
///
/// The disk below never changes, and no block is its again once the overlay has it: so it does not matter when the rest
/// is read.
#[derive(Debug)]
pub struct Partly {
    range: ByteRange,
    /// Empty as long as nothing is in it.
    buffer: Vec<u8>,
    below: Vec<ByteRange>,
}

impl Partly {
    /// What the disk below has of it: ascending parts that do not touch.
    pub fn below(&self) -> &[ByteRange] {
        &self.below
    }

    /// All of it; `rest` has the bytes of each part [below](Partly::below), in that order.
    ///
    /// # Panics
    /// When those are more, fewer or of other lengths.
    pub fn complete(self, rest: Vec<Bytes>) -> Bytes {
        let Self { range, mut buffer, below } = self;
        assert_eq!(rest.len(), below.len(), "each part has its bytes");
        if below == [range] {
            return rest.into_iter().next().expect("there is one");
        }
        for (part, bytes) in below.iter().zip(&rest) {
            place(&mut buffer, range, *part, bytes);
        }
        buffer.into()
    }
}

impl Overlay {
    /// The bytes of `range`, which is inside the disk; each block checked against its checksum.
    ///
    /// # Errors
    /// [`OverlayError::Damaged`] with file and place, never wrong data; what the disk below answers.
    ///
    /// # Panics
    /// When the range is longer than memory can be.
    pub fn read(&self, range: ByteRange, base: &impl Base) -> Result<Bytes, OverlayError> {
        let partly = self.read_partly(range)?;
        // Not under the lock: the disk below may be slow.
        let rest = partly.below.iter().map(|part| base.read(*part).map_err(OverlayError::Base));
        let rest = rest.collect::<Result<_, _>>()?;
        Ok(partly.complete(rest))
    }

    /// What the overlay has of `range`, which is inside the disk, for somebody to whom the disk below is elsewhere.
    ///
    /// # Errors
    /// [`OverlayError::Damaged`] with file and place, never wrong data; the file system's.
    ///
    /// # Panics
    /// When the range is longer than memory can be.
    pub fn read_partly(&self, range: ByteRange) -> Result<Partly, OverlayError> {
        let mut buffer = Vec::new();
        let below = self.read_own(range, &mut buffer)?;
        Ok(Partly { range, buffer, below })
    }

    /// The blocks that a write or zeroing of `range` changes in part and the disk below has: at most two. They are all
    /// that is read of it for that.
    pub fn edges(&self, range: ByteRange) -> Vec<ByteRange> {
        let touched = BlockRange::touched_by(range);
        if touched.is_empty() {
            return Vec::new();
        }
        let (first, last) = (touched.start().0, touched.end().0 - 1);
        let ends = if first == last { vec![first] } else { vec![first, last] };
        let ends = ends.into_iter().map(|block| BlockRange::from(block..block + 1).bytes(self.size));
        let partly = ends.filter(|block| !range.contains(*block));
        partly.filter(|block| self.extents(*block) == [(*block, Kind::Below)]).collect()
    }

    /// Reads what the overlay has of `range` into `buffer`; tells what the disk below has.
    fn read_own(&self, range: ByteRange, buffer: &mut Vec<u8>) -> Result<Vec<ByteRange>, OverlayError> {
        let blocks = self.blocks.read().unwrap_or_else(PoisonError::into_inner);
        let mut below: Vec<ByteRange> = Vec::new();
        let mut run: Vec<(BlockIndex, Stored)> = Vec::new();
        for block in BlockRange::touched_by(range).indices().map(BlockIndex) {
            let bytes = BlockRange::from(block.0..block.0 + 1).bytes(self.size);
            let part = bytes.intersection(range).expect("a touched block shares bytes");
            match blocks.find(block) {
                Lookup::Stored(stored) => {
                    let joins = run.last().is_none_or(|(before, last)| {
                        before.0 + 1 == block.0 && last.slot.0 + 1 == stored.slot.0 && run.len() < BLOCKS_MAX
                    });
                    if !joins {
                        self.read_run(&std::mem::take(&mut run), range, buffer)?;
                    }
                    run.push((block, stored));
                }
                Lookup::Zero => {}
                Lookup::Below => match below.last_mut() {
                    Some(last) if last.end() == part.start() => {
                        *last = ByteRange::between(last.start(), part.end());
                    }
                    Some(_) | None => below.push(part),
                },
            }
        }
        self.read_run(&run, range, buffer)?;
        if below != [range] {
            buffer.resize(length(range), 0);
        }
        Ok(below)
    }

    /// Reads adjoining blocks in adjoining slots, checks them, and copies what `range` has of them.
    fn read_run(
        &self,
        run: &[(BlockIndex, Stored)],
        range: ByteRange,
        buffer: &mut Vec<u8>,
    ) -> Result<(), OverlayError> {
        let Some((first, stored)) = run.first() else { return Ok(()) };
        let mut bytes = vec![0; run.len() * BLOCK_SIZE as usize];
        self.read_slots(stored.slot, &mut bytes)?;
        for ((block, stored), content) in run.iter().zip(bytes.chunks_exact(BLOCK_SIZE as usize)) {
            check_block(*block, *stored, content).map_err(|why| self.damaged(stored.slot, why))?;
        }
        buffer.resize(length(range), 0);
        let blocks = BlockRange::from(first.0..first.0 + run.len() as u64);
        let whole = blocks.bytes(self.size);
        let part = whole.intersection(range).expect("blocks that were asked for");
        let from = usize::try_from(part.start().0 - whole.start().0).expect("within a run");
        place(buffer, range, part, &bytes[from..from + length(part)]);
        Ok(())
    }

    /// Reads slots; a file that ends within them reads as zeroes there, which no checksum matches but
    /// that of zeroes.
    pub(crate) fn read_slots(&self, first: Slot, bytes: &mut [u8]) -> Result<(), OverlayError> {
        let read = self.data.read_at(first.offset(), bytes);
        let read = read.map_err(|source| self.io("read", &self.files.data, source))?;
        bytes[read..].fill(0);
        Ok(())
    }

    pub(crate) fn damaged(&self, slot: Slot, why: String) -> OverlayError {
        let path = self.storage.display(&self.files.data);
        OverlayError::Damaged { path, offset: slot.offset(), why }
    }

    /// Who has which part of `range`: adjoining, in order, covering it.
    pub fn extents(&self, range: ByteRange) -> Vec<(ByteRange, Kind)> {
        let runs = {
            let blocks = self.blocks.read().unwrap_or_else(PoisonError::into_inner);
            blocks.runs(BlockRange::touched_by(range))
        };
        let mut extents = Vec::new();
        let mut done = range.start();
        for (blocks, data) in runs {
            let part = blocks.bytes(self.size).intersection(range).expect("touched blocks share bytes");
            if done < part.start() {
                extents.push((ByteRange::between(done, part.start()), Kind::Below));
            }
            extents.push((part, if data { Kind::Data } else { Kind::Zero }));
            done = part.end();
        }
        if done < range.end() {
            extents.push((ByteRange::between(done, range.end()), Kind::Below));
        }
        extents
    }
}

/// Says what is wrong with a block's bytes, when something is.
pub(crate) fn check_block(block: BlockIndex, stored: Stored, content: &[u8]) -> Result<(), String> {
    let found = crc32c::crc32c(content);
    if found == stored.crc {
        return Ok(());
    }
    Err(format!(
        "the block at byte {} of the disk has checksum {found:08x}, expected {:08x}",
        block.start(),
        stored.crc
    ))
}

fn length(range: ByteRange) -> usize {
    range.count().as_usize().expect("a read that fits in memory")
}

/// Copies the bytes of `part` into the buffer of `whole`.
fn place(buffer: &mut [u8], whole: ByteRange, part: ByteRange, bytes: &[u8]) {
    let to = usize::try_from(part.start().0 - whole.start().0).expect("an offset in memory");
    buffer[to..to + bytes.len()].copy_from_slice(bytes);
}
