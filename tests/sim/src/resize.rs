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
        // A disk that lacks blocks does not change its size, and none goes back to a point with another one.
        let goes_back = self.plan.rewinds > 4;
        if size.0 > SIZE_MAX || goes_back || self.lacking.is_there() {
            return;
        }
        self.plan.size = size;
        self.local.grow(size);
        self.shown.disk.grow(size);
        self.model.grow(size);
        let new = ByteRange::between(ByteOffset(before.0), ByteOffset(size.0));
        if self.random.one_in(2) {
            let content = vec![0x5a; new.count().0 as usize];
            for disk in [&mut self.local, &mut self.shown.disk] {
                disk.write(new, Some(&content), false);
                disk.flush_range(new);
            }
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
