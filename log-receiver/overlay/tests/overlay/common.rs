//! An overlay over a small disk, and what it should hold.

use std::{path::Path, sync::Arc};

use backtide_overlay::{
    Base, BaseError, Existing, Overlay, OverlayError, OverlayFiles, OverlayId, OverlayOptions,
};
use backtide_storage::MemoryStorage;
use backtide_units::{ByteCount, ByteOffset, ByteRange};
use bytes::Bytes;
use uuid::Uuid;

/// A short last block, so that it is tried too.
pub(crate) const SIZE: ByteCount = ByteCount(23 * 4096 + 512);
pub(crate) const ID: OverlayId = OverlayId(Uuid::from_u128(0x0e7));

/// The disk below: every byte tells its block.
pub(crate) struct Below;

impl Base for Below {
    fn read(&self, range: ByteRange) -> Result<Bytes, BaseError> {
        Ok(below()[span(range)].to_vec().into())
    }
}

pub(crate) fn below() -> Vec<u8> {
    (0..SIZE.0).map(|at| (at / 4096) as u8 | 0x80).collect()
}

pub(crate) fn span(range: ByteRange) -> std::ops::Range<usize> {
    range.start().0 as usize..range.end().0 as usize
}

pub(crate) fn range(start: u64, count: u64) -> ByteRange {
    ByteRange::new(ByteOffset(start), ByteCount(count)).unwrap()
}

pub(crate) fn files() -> OverlayFiles {
    OverlayFiles::named(Path::new("overlays"), "vm1-1")
}

/// Small enough a map that it is written anew now and then.
pub(crate) fn options() -> OverlayOptions {
    OverlayOptions { map_slack: ByteCount(400), ..OverlayOptions::alone(ByteCount(1 << 20)) }
}

pub(crate) fn open(storage: &MemoryStorage, existing: Existing) -> Result<Overlay, OverlayError> {
    open_with(storage, existing, options())
}

pub(crate) fn open_with(
    storage: &MemoryStorage,
    existing: Existing,
    options: OverlayOptions,
) -> Result<Overlay, OverlayError> {
    Overlay::open(Arc::new(storage.clone()), files(), ID, SIZE, options, existing)
}

/// A new overlay on a new storage.
pub(crate) fn fresh() -> (MemoryStorage, Overlay) {
    let storage = MemoryStorage::new();
    backtide_storage::Storage::create_dir(&storage, Path::new("overlays")).unwrap();
    let overlay = open(&storage, Existing::Create).unwrap();
    (storage, overlay)
}

pub(crate) fn content(overlay: &Overlay) -> Result<Vec<u8>, OverlayError> {
    Ok(overlay.read(range(0, SIZE.0), &Below)?.to_vec())
}

/// A change that a client makes, one record each.
#[derive(Clone, Debug)]
pub(crate) enum Step {
    Write(ByteRange, u8),
    Zero(ByteRange, bool),
    Flush,
}

impl Step {
    pub(crate) fn run(&self, overlay: &Overlay) -> Result<(), OverlayError> {
        match self {
            Self::Write(range, byte) => {
                overlay.write(range.start(), &vec![*byte; span(*range).len()], &Below)
            }
            Self::Zero(range, keep) => overlay.zero(*range, *keep, &Below),
            Self::Flush => overlay.flush(),
        }
    }

    pub(crate) fn run_on(&self, image: &mut [u8]) {
        match self {
            Self::Write(range, byte) => image[span(*range)].fill(*byte),
            Self::Zero(range, _) => image[span(*range)].fill(0),
            Self::Flush => {}
        }
    }
}

/// Steps by a seed: the same every time.
pub(crate) struct Steps(pub(crate) u64);

impl Steps {
    pub(crate) fn next_number(&mut self, below: u64) -> u64 {
        self.0 = self.0.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        (self.0 >> 33) % below
    }

    pub(crate) fn next_step(&mut self) -> Step {
        let byte = self.next_number(127) as u8 + 1;
        match self.next_number(10) {
            0 | 1 => Step::Flush,
            2 => {
                let (first, count) = (self.next_number(20), self.next_number(6));
                let bytes = range(first * 4096, (count * 4096).min(SIZE.0 - first * 4096));
                Step::Zero(bytes, self.next_number(2) == 0)
            }
            3..=5 => {
                let (first, count) = (self.next_number(20), self.next_number(3) + 1);
                Step::Write(range(first * 4096, count * 4096), byte)
            }
            _ => {
                let start = self.next_number(SIZE.0 / 512) * 512;
                let count = (self.next_number(24) + 1) * 512;
                Step::Write(range(start, count.min(SIZE.0 - start)), byte)
            }
        }
    }
}
