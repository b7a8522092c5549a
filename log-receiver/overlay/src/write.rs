//! Writing: data to free slots first, then the record that names it, then the map in memory.
//!
//! A write that fails half way changes nothing that can be read: its slots are free again, and the
//! place of its record is written over by the next one.

use std::sync::{MutexGuard, PoisonError};

use backtide_units::{BLOCK_SIZE, BlockCount, BlockIndex, BlockRange, ByteCount, ByteOffset, ByteRange};

use crate::{
    Base, Overlay, OverlayError,
    blocks::Change,
    format::{Record, RecordNumber},
    overlay::Writer,
    slots::SlotRun,
};

/// The most blocks of one record.
pub(crate) const BLOCKS_MAX: u64 = 1024;

/// A write waits for a sync when so much is not durable: it bounds what is checked when the overlay is
/// opened after a crash.
const UNDURABLE_MAX: ByteCount = ByteCount(64 << 20);

/// Slots that may wait for a sync before a write does.
const WAITING_MAX: usize = 8192;

/// Slots beyond the limit, for new versions of blocks whose old one is not free yet.
const SPARE: u64 = WAITING_MAX as u64 + BLOCKS_MAX;

impl Overlay {
    /// Writes `data` from `offset` on, inside the disk. Durable after a [`Overlay::flush`].
    ///
    /// # Errors
    /// [`OverlayError::Full`] and [`OverlayError::NoRoom`] when there is no room for it; a long write may be
    /// done in part then.
    pub fn write(&self, offset: ByteOffset, data: &[u8], base: &impl Base) -> Result<(), OverlayError> {
        let range = ByteRange::new(offset, ByteCount::of(data)).expect("a write inside the disk");
        for part in range.split_at_multiples(BlockCount(BLOCKS_MAX).bytes()) {
            let from = usize::try_from(part.start().0 - offset.0).expect("within the data");
            let length = part.count().as_usize().expect("within the data");
            self.write_part(part, &data[from..from + length], base)?;
        }
        Ok(())
    }

    /// Lets `range` read as zeroes. With `keep_allocated` room is kept for it.
    ///
    /// # Errors
    /// As [`Overlay::write`].
    pub fn zero(&self, range: ByteRange, keep_allocated: bool, base: &impl Base) -> Result<(), OverlayError> {
        let whole = BlockRange::covered_by(range, self.size);
        if keep_allocated || whole.is_empty() {
            return self.write_zeroes(range, base);
        }
        let inside = whole.bytes(self.size);
        self.write_zeroes(ByteRange::between(range.start(), inside.start()), base)?;
        self.write_zeroes(ByteRange::between(inside.end().min(range.end()), range.end()), base)?;
        let mut writer = self.writer_with_room()?;
        self.append(&mut writer, vec![Change::Zero(whole)])
    }

    /// Writes zeroes as data.
    fn write_zeroes(&self, range: ByteRange, base: &impl Base) -> Result<(), OverlayError> {
        for part in range.split_at_multiples(BlockCount(BLOCKS_MAX).bytes()) {
            let zeroes = vec![0; part.count().as_usize().expect("a part fits in memory")];
            self.write_part(part, &zeroes, base)?;
        }
        Ok(())
    }

    fn write_part(&self, range: ByteRange, data: &[u8], base: &impl Base) -> Result<(), OverlayError> {
        let blocks = BlockRange::touched_by(range);
        if blocks.is_empty() {
            return Ok(());
        }
        let mut writer = self.writer_with_room()?;
        let aligned = [range.start().0, range.end().0].iter().all(|at| at % BLOCK_SIZE == 0);
        if aligned {
            return self.store(&mut writer, blocks, data);
        }
        // Nobody else writes meanwhile: what is around the data is still that when it is stored.
        let whole = blocks.bytes(self.size);
        let mut content = vec![0; blocks.count().bytes().as_usize().expect("a part fits in memory")];
        let last = BlockRange::from(blocks.end().0 - 1..blocks.end().0);
        for edge in [BlockRange::from(blocks.start().0..blocks.start().0 + 1), last] {
            let edge = edge.bytes(self.size);
            if !range.contains(edge) {
                let at = usize::try_from(edge.start().0 - whole.start().0).expect("within a part");
                let old = self.read(edge, base)?;
                content[at..at + old.len()].copy_from_slice(&old);
            }
        }
        let at = usize::try_from(range.start().0 - whole.start().0).expect("within a part");
        content[at..at + data.len()].copy_from_slice(data);
        self.store(&mut writer, blocks, &content)
    }

    /// The right to write, with slots enough for one record.
    fn writer_with_room(&self) -> Result<MutexGuard<'_, Writer>, OverlayError> {
        loop {
            let writer = self.writer();
            if let Some(why) = &writer.poisoned {
                return Err(OverlayError::Poisoned(why.clone()));
            }
            if writer.undurable < UNDURABLE_MAX && writer.slots.waiting() < WAITING_MAX {
                return Ok(writer);
            }
            drop(writer);
            self.flush_and_free()?;
        }
    }

    /// Stores whole blocks.
    fn store(&self, writer: &mut Writer, blocks: BlockRange, content: &[u8]) -> Result<(), OverlayError> {
        let limit = self.options.bytes_max.0 / BLOCK_SIZE;
        let known = self.blocks.read().unwrap_or_else(PoisonError::into_inner).stored_in(blocks);
        let new = blocks.count().0 - known;
        if writer.charged + new > limit {
            return Err(OverlayError::Full { limit: self.options.bytes_max });
        }
        let count = u32::try_from(blocks.count().0).expect("a record's blocks are few");
        let growth = BlockCount(u64::from(writer.slots.growth_for(count))).bytes();
        (self.options.room)(growth).map_err(OverlayError::NoRoom)?;
        if !self.options.budget.take(new) {
            let limit = BlockCount(writer.charged).bytes().0 + self.options.budget.left().0;
            return Err(OverlayError::Full { limit: ByteCount(limit) });
        }
        let total_max = u32::try_from(limit + SPARE).unwrap_or(u32::MAX);
        let stored = match writer.slots.take(count, total_max) {
            Some(runs) => self.store_in(writer, blocks.start(), &runs, content),
            None => Err(OverlayError::Full { limit: self.options.bytes_max }),
        };
        if stored.is_err() {
            self.options.budget.give_back(new);
        }
        stored
    }

    fn store_in(
        &self,
        writer: &mut Writer,
        first: BlockIndex,
        runs: &[SlotRun],
        content: &[u8],
    ) -> Result<(), OverlayError> {
        let (mut changes, mut rest, mut block) = (Vec::new(), content, first);
        let mut written = Ok(());
        for run in runs {
            let (bytes, after) = rest.split_at(run.count as usize * BLOCK_SIZE as usize);
            let crcs = bytes.chunks_exact(BLOCK_SIZE as usize).map(crc32c::crc32c).collect();
            changes.push(Change::Data { first: block, slot: run.first, crcs });
            written = written.and_then(|()| self.data.write_at(run.first.offset(), bytes));
            (rest, block) = (after, BlockIndex(block.0 + u64::from(run.count)));
        }
        let written = written.map_err(|source| self.io("write", &self.files.data, source));
        let stored = written.and_then(|()| self.append(writer, changes));
        match &stored {
            Ok(()) => writer.undurable.0 += content.len() as u64,
            Err(_) => writer.slots.put_back(runs),
        }
        stored
    }

    /// Writes the record of `changes` and carries them out.
    fn append(&self, writer: &mut Writer, changes: Vec<Change>) -> Result<(), OverlayError> {
        let number = RecordNumber(writer.last.0 + 1);
        let record = Record { number, durable: writer.durable, changes };
        let bytes = record.encode(self.id);
        (self.options.room)(ByteCount::of(&bytes)).map_err(OverlayError::NoRoom)?;
        let written = writer.map.write_at(writer.end, &bytes);
        written.map_err(|source| self.io("write", &self.files.map, source))?;
        writer.end.0 += bytes.len() as u64;
        writer.last = number;
        writer.undurable.0 += bytes.len() as u64;
        let mut blocks = self.blocks.write().unwrap_or_else(PoisonError::into_inner);
        let emptied = record.changes.iter().flat_map(|change| blocks.apply(change)).collect();
        let stored = blocks.stored();
        drop(blocks);
        if stored < writer.charged {
            self.options.budget.give_back(writer.charged - stored);
        }
        writer.charged = stored;
        writer.slots.emptied(number, emptied);
        Ok(())
    }
}
