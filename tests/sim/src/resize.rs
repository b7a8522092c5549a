//! The disk grows while no agent has it, as a resize does: the next attach has to compare what is new.

use backtide_units::{BlockRange, ByteCount, ByteOffset, ByteRange, Lsn};

use crate::world::World;

/// So much a disk may become; what it was at first is a part of it.
const SIZE_MAX: u64 = 4 << 20;

impl World {
    /// What is new holds anything: of a device, whatever was there. No point up to `last` has it.
    pub(crate) fn grow(&mut self, last: Lsn) {
        let before = self.plan.size;
        let size = ByteCount(before.0 + 512 * self.random.between(1, 64));
        if size.0 > SIZE_MAX {
            return;
        }
        self.plan.size = size;
        self.local.grow(size);
        self.model.grow(size);
        let new = ByteRange::between(ByteOffset(before.0), ByteOffset(size.0));
        if self.random.one_in(2) {
            let content = vec![0x5a; new.count().0 as usize];
            self.local.write(new, Some(&content), false);
            self.local.flush(self.local.flush_mark());
        }
        self.model.lose(last.next(), new);
        self.stats.grown += 1;
        self.trace.note(self.now, "disk grows", &[before.0, size.0]);
    }

    /// The blocks that the disk has gained since an agent had it last, the last one of before included when
    /// it was not whole.
    pub(crate) fn gained(&self) -> Option<BlockRange> {
        let before = self.persisted.size.filter(|before| *before < self.plan.size)?;
        let new = ByteRange::between(ByteOffset(before.0), ByteOffset(self.plan.size.0));
        Some(BlockRange::touched_by(new)).filter(|_| !self.forgets_growth)
    }
}
