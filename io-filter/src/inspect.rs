//! What the filter answers for: what a snapshot of the tracking has to say, and what the simulation and
//! the model check.

use backtide_tracking::DirtyBitmap;
use backtide_units::BlockRange;

use crate::{capture::Ongoing, filter::Filter};

impl Filter {
    /// Every block that may differ between the local disk and the newest version at the receiver:
    /// the crate's invariant says there is no other. `None` while everything may, because a scan
    /// of the whole disk is due or under way.
    pub fn unsettled_blocks(&self) -> Option<DirtyBitmap> {
        // Made often: nothing is coarsened for it.
        let mut blocks = self.passive.unbounded();
        for plan in self.lost.iter().chain(self.scanning.iter().map(|scanning| &scanning.plan)) {
            blocks.union_with(plan.within.as_ref()?);
        }
        if let Some(scanning) = &self.scanning {
            blocks.union_with(&scanning.touched);
        }
        blocks.union_with(&self.passive_zeroes);
        if let Some(pass) = &self.pass {
            blocks.union_with(&pass.active);
            blocks.union_with(&pass.zeroes);
            for range in pass.compares.values().flat_map(|pending| pending.ranges()) {
                blocks.insert(BlockRange::touched_by(range));
            }
        }
        self.window.mark_all_dirty(&mut blocks);
        for ongoing in self.ongoing.values() {
            if let Ongoing::Change(change) = ongoing {
                blocks.insert(change.blocks());
            }
        }
        Some(blocks)
    }
}
