//! What a failed flush has left in doubt is read from the device, not from the page cache: the system calls pages clean that
//! it could not write, and shows them as long as it has them.
//!
//! Invariant: it goes by what was left, not by what an attach makes of that: a disk of which nothing is believed is compared
//! as well. (After a crash nothing says that a flush had failed and its guest was told, and the guest waits: what is compared
//! then may come from the page cache.)

use backtide_storage::ImageFile;
use backtide_tracking::{DirtyBitmap, Loaded};
use backtide_units::{BlockRange, ByteCount, ByteOffset, ByteRange};

use super::incomplete::OpenedHydration;
use crate::record::DiskRecord;

/// The longest piece that the page cache keeps or lets go of as one.
const CACHED_AS_ONE: u64 = 2 << 20;

/// The blocks of a disk of `size` in doubt, before an attach reads any.
pub(super) fn left(
    record: &DiskRecord,
    tracked: Option<&Loaded>,
    lacks: Option<&OpenedHydration>,
    size: ByteCount,
) -> DirtyBitmap {
    // Nobody was told of it, so nobody knows of which blocks it was.
    if record.flush_failed {
        return DirtyBitmap::of(BlockRange::whole_disk(size));
    }
    // Of a failback: what it was compared for may have been in doubt when this agent had the disk last.
    let mut blocks = lacks.and_then(OpenedHydration::compared).unwrap_or_default();
    if let Some(Loaded { snapshot, clean, .. }) = tracked
        && (*clean || snapshot.everything)
        && snapshot.saved.compare
    {
        blocks.union_with(&snapshot.saved.dirty);
    }
    blocks
}

/// Has the next read of these blocks come from the device.
pub(super) fn look_at_the_device(image: &ImageFile, in_doubt: &DirtyBitmap) {
    let (size, mut blocks) = (image.size(), DirtyBitmap::new());
    let whole = BlockRange::whole_disk(size);
    for run in in_doubt.runs(whole, whole.count()) {
        let range = run.bytes(size);
        let start = range.start().0 / CACHED_AS_ONE * CACHED_AS_ONE;
        let end = (range.end().0.next_multiple_of(CACHED_AS_ONE)).min(size.0);
        blocks.insert(BlockRange::touched_by(ByteRange::between(ByteOffset(start), ByteOffset(end))));
    }
    blocks.runs(whole, whole.count()).for_each(|run| image.let_go(run.bytes(size)));
}

#[cfg(test)]
mod tests;
