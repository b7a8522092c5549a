//! An overlay: what clients wrote to a mounted point, as checksummed blocks over a disk that does
//! not change.
//!
//! On the way back this lies between a mount's NBD export and the view of its point: blocks that were
//! written come from here, all others from the point. It is a library: no sockets, no clock, no
//! threads of its own; files only through the storage seam. `FORMAT.md` describes the two files.
//!
//! Invariants:
//! - *Flushed is kept.* What was written before a [`Overlay::flush`] that succeeded is there after a
//!   power cut; of what came later, a prefix in the order of the writes.
//! - *Nothing in place.* A block is never written over: a new version goes to a free slot, and the old
//!   slot is free only when the map that names the new one is durable.
//! - *No unverified byte.* Each block's CRC32C is in the map and checked by every read.

mod blocks;
mod check;
mod error;
mod format;
mod inspect;
mod options;
mod overlay;
mod read;
mod recover;
mod slots;
mod sync;
mod write;

pub use check::{Checked, check, check_map};
pub use error::{BaseError, OverlayError};
pub use inspect::{DATA_MAGIC, MAP_MAGIC, inspect_data, inspect_map};
pub use options::{Base, Budget, OverlayOptions};
pub use overlay::{Existing, Overlay, OverlayFiles, OverlayId, OverlayUse, remove};
pub use read::{Kind, Partly};
