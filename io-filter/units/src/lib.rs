//! Units of the data path, as types: nothing crosses a function boundary as a bare `u64`.
//!
//! Three families: places on a disk ([`ByteOffset`], [`ByteCount`], [`ByteRange`] and, at the
//! tracking granularity, [`BlockIndex`], [`BlockCount`], [`BlockRange`]), places in a disk's history ([`Lsn`],
//! [`LogPosition`], [`CaptureTime`], [`Epoch`]), and identities ([`DiskId`], [`HistoryId`], a payload's [`PayloadChecksum`]).
//! Ranges are half-open.
//! Arithmetic that could leave the type's range is checked and has a name.

mod blocks;
mod bytes;
mod checksum;
mod history;
mod identity;
mod reason;

pub use blocks::{BLOCK_SIZE, BlockCount, BlockIndex, BlockRange};
pub use bytes::{ByteCount, ByteOffset, ByteRange, DISK_SIZE_MAX, is_zeroes};
pub use checksum::PayloadChecksum;
pub use history::{CaptureTime, Epoch, LogPosition, Lsn, ParseLsnError};
pub use identity::{DiskId, DiskName, HistoryId, InvalidDiskName};
pub use reason::Reason;
