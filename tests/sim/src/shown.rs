//! What the disk shows to whoever reads it: the image, and where blocks are missing what they hold at the point.
//!
//! It is kept beside the image, by every write at the moment from which on it can be seen. So every read can be
//! compared with it; and after a crash the disk has to show exactly this, or after a power loss one of the contents
//! that each sector had since it was stable.

use std::mem::take;

use backtide_hydration::HydrationFile;
use backtide_io_filter::LocalOp;
use backtide_tracking::DirtyBitmap;
use backtide_units::{BlockCount, BlockRange, ByteCount, ByteOffset, ByteRange, Lsn};

use crate::{
    local::{LocalDisk, indices},
    local_io::InFlight,
    world::World,
};

/// See the module's description.
pub(crate) struct Shown {
    pub(crate) disk: LocalDisk,
    /// Changes that were under way when an agent died: each sector of them may have happened.
    pub(crate) unsure: Vec<ByteRange>,
    /// The power was lost since an agent looked.
    pub(crate) power_lost: bool,
    /// The image could not be synced since: what was not durable may be gone.
    pub(crate) unsynced: bool,
}

impl Shown {
    /// Of a disk whose image is complete.
    pub(crate) fn new(image: &LocalDisk) -> Self {
        let mut disk = LocalDisk::new(ByteCount(image.content().len() as u64));
        disk.become_stable(image.content().to_vec());
        Self { disk, unsure: Vec::new(), power_lost: false, unsynced: false }
    }

    /// The disk was set to a point: by what is durable already.
    pub(crate) fn become_point(&mut self, content: Vec<u8>) {
        self.disk.become_stable(content);
        self.unsure.clear();
        (self.power_lost, self.unsynced) = (false, false);
    }

    /// After whatever has happened the disk shows `found`.
    fn check_again(&mut self, found: Vec<u8>) {
        let unsure = take(&mut self.unsure);
        let is_unsure = |at: usize| unsure.iter().any(|range| indices(*range).contains(&at));
        let (power_lost, unsynced) = (take(&mut self.power_lost), take(&mut self.unsynced));
        let sector = |at: usize| ByteRange::between(ByteOffset(at as u64), ByteOffset(at as u64 + 512));
        if power_lost || unsynced {
            let mut wrong = self.disk.unexplained(&found).into_iter();
            let wrong = wrong.find(|at| !indices(sector(*at)).any(is_unsure));
            assert_eq!(
                wrong, None,
                "the disk shows at this byte what nobody wrote there since it was stable"
            );
        }
        if power_lost {
            return self.disk.become_stable(found);
        }
        let shown = self.disk.content();
        let changed: Vec<usize> = (0..found.len()).filter(|at| shown[*at] != found[*at]).collect();
        let wrong = changed.iter().find(|at| !unsynced && !is_unsure(**at));
        assert_eq!(
            wrong, None,
            "the disk shows something else at this byte than it did before the agent died"
        );
        // What it shows now may still go.
        for at in changed {
            let byte = ByteRange::between(ByteOffset(at as u64), ByteOffset(at as u64 + 1));
            self.disk.write(byte, Some(&found[at..=at]), false);
        }
    }
}

impl World {
    /// What there is without the agent: the image, and of the point what `missing` says.
    fn found(&self, missing: &DirtyBitmap) -> Vec<u8> {
        let mut found = self.local.content().to_vec();
        for run in missing.runs(BlockRange::whole_disk(self.plan.size), BlockCount(u64::MAX)) {
            let at = indices(run.bytes(self.plan.size));
            found[at.clone()].copy_from_slice(&self.lacking.content[at]);
        }
        found
    }

    /// An agent begins, and finds what the last one left.
    pub(crate) fn check_shown_at_start(&mut self, file: Option<&HydrationFile>) {
        let missing = file.map(HydrationFile::missing).unwrap_or_default();
        let found = self.found(&missing);
        self.shown.check_again(found);
    }

    /// A read of the image gives what the disk shows. Not one that has given way: the change it gave way to lands beside it, and the
    /// filter takes nothing of it.
    pub(crate) fn check_read(&self, range: ByteRange) {
        let agent = self.agent.as_ref().expect("it reads");
        let lands = |op: &LocalOp| {
            let LocalOp::Change(change) = op else { return false };
            let blocks = change.range().map(BlockRange::touched_by);
            blocks.is_some_and(|blocks| blocks.overlaps(BlockRange::touched_by(range)))
        };
        let gave_way = agent.filter.status().counters.reads_abandoned > 0;
        if gave_way && agent.inflight.values().any(|inflight| lands(&inflight.op)) {
            return;
        }
        let (found, right) = (self.local.read(range), self.shown.disk.read(range));
        let wrong = found.iter().zip(&right).position(|(found, right)| found != right);
        assert_eq!(wrong, None, "a read of {range} gives what the disk does not hold");
    }

    /// The disk is what the model says, wherever nothing is under way; and it shows that.
    pub(crate) fn check_disk(&mut self) {
        let Some(agent) = &self.agent else { return };
        let missing =
            agent.hydrating.as_ref().map(|hydrating| hydrating.missing().clone()).unwrap_or_default();
        let found = self.found(&missing);
        let wrong = found.iter().zip(self.shown.disk.content()).position(|(found, shown)| found != shown);
        assert_eq!(wrong, None, "image and missing blocks are not what the disk shows");
        let mut right = self.model.image_at(Lsn::MAX);
        for range in agent.inflight.values().filter_map(InFlight::range) {
            right.bytes[indices(range)].copy_from_slice(&found[indices(range)]);
        }
        if let Some(at) = right.mismatch(&found) {
            panic!(
                "the disk is wrong at byte {at} (block {}): expected {:x?}, found {:x?}",
                at / 4096,
                &right.bytes[at..(at + 16).min(right.bytes.len())],
                &found[at..(at + 16).min(found.len())]
            );
        }
    }

    /// The parts of `range` in blocks that are not missing.
    pub(crate) fn not_missing(&self, range: ByteRange) -> Vec<ByteRange> {
        let Some(hydrating) = self.agent.as_ref().and_then(|agent| agent.hydrating.as_ref()) else {
            return vec![range];
        };
        let mut there = DirtyBitmap::of(BlockRange::touched_by(range));
        there.subtract(hydrating.missing());
        let runs = there.runs(BlockRange::touched_by(range), BlockCount(u64::MAX));
        runs.filter_map(|run| run.bytes(self.plan.size).intersection(range)).collect()
    }
}
