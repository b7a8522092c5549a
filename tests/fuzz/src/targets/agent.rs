//! The files of an agent: what it tracks, what it has spilled, what a rewound disk still lacks.

use std::{path::Path, sync::Arc};

use backtide_hydration::HydrationFile;
use backtide_spill::{RingLimits, SpillFiles};
use backtide_tracking::{DirtyBitmap, Loaded, SavedTracking, Snapshot};
use backtide_units::{BlockIndex, ByteCount, DiskId};
use uuid::Uuid;

use super::{golden, leave, storage_with, stream::mend_frames};
use crate::Target;

const DISK: DiskId = DiskId(Uuid::from_bytes([1; 16]));

pub(super) fn targets() -> Vec<Target> {
    let of = |name, seeds, file, mend, take| Target { name, seeds, samples: vec![golden(file)], mend, take };
    vec![
        of("tracking file", 800, "tracking/crashed.tracking", leave, tracking),
        of("spill file", 3000, "spill/0000000000000001.spill", mend_spill, spill),
        of("hydration file", 3000, "hydration/vm1.hydration", leave, hydration),
    ]
}

fn tracking(bytes: &[u8]) {
    let path = Path::new("vm1.tracking");
    let _ = Loaded::from_file(&storage_with(&[(path, bytes)]), path);
    let _ = (SavedTracking::decode(bytes), Snapshot::decode(bytes));
}

/// The frames of a spill are those of the stream.
fn mend_spill(bytes: &mut [u8]) {
    if let Some(frames) = bytes.get_mut(backtide_spill::HEADER_BYTES..) {
        mend_frames(frames);
    }
}

fn spill(bytes: &[u8]) {
    let path = Path::new(&DISK.to_string()).join("0000000000000001.spill");
    let storage = storage_with(&[(&path, bytes)]);
    let files = SpillFiles::new(Arc::new(storage), DISK, ByteCount(1 << 30));
    let limits =
        RingLimits::new(ByteCount(1 << 30), ByteCount(1 << 20), ByteCount(1 << 20), BlockIndex(1 << 20));
    let Ok(recovered) = files.recover(limits) else { return };
    let mut dirty = DirtyBitmap::default();
    recovered.ring.mark(&mut dirty);
    for frame in recovered.ring.first()..recovered.ring.next().min(recovered.ring.first() + 64) {
        if let Some(place) = recovered.ring.place_of(frame) {
            let _ = files.read(&place);
        }
    }
}

fn hydration(bytes: &[u8]) {
    let path = Path::new("vm1.hydration");
    let storage = Arc::new(storage_with(&[(path, bytes)]));
    if let Ok(Some(file)) = HydrationFile::open(storage, path, Uuid::from_bytes([2; 16])) {
        let _ = (file.missing(), file.is_settled());
    }
}
