//! The spill of one disk: the part of its retained window that lies in files.
//!
//! [`Ring`] is what the filter keeps in memory of it: which frames lie where, and how much room is
//! left. It does no I/O. [`SpillFiles`] writes, reads and removes files through the storage seam, and
//! [`recover`](SpillFiles::recover) makes a ring out of what an agent that ended has left. The bytes are
//! described in `FORMAT.md`.
//!
//! # Invariants
//! - Frames are numbered without a gap; those in the ring are one run, in the order of the stream.
//! - The files never take more than the limit; a file goes when everything in it has been trimmed.
//! - What cannot be read back exactly is told, never guessed.

mod files;
mod header;
mod recover;
mod ring;

pub use files::{ReadBack, SpillError, SpillFiles};
pub use header::{FileHeader, HEADER_BYTES, HeaderError};
pub use recover::{Left, Recovered};
pub use ring::{Place, Ring, RingLimits, Slot, frame_bytes};
