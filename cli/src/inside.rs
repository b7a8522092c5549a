//! Files out of a mounted point: its partitions, what is in them, and its files.
//!
//! Everything is read over NBD in this process, without root and without mounting anything on this machine. What is
//! read was written by a guest, so it is taken as hostile: names and sizes are its words, never this machine's
//! paths.

use backtide_control::{ApiError, ErrorCode};

mod compare;
mod copy_out;
mod partitions;
mod parts;
mod point_reader;
mod unreadable;
mod volume;

pub(crate) use compare::{Change, Difference, Differences, Sides, compare};
pub(crate) use copy_out::{Copied, Destination, copy_out};
pub(crate) use partitions::{Content, LogicalVolume, Partition, logical_volumes, partitions};
pub(crate) use parts::{Part, Parts};
pub(crate) use point_reader::{Lost, PointReader, is_gone};
pub(crate) use unreadable::Unreadable;
pub(crate) use volume::{Entry, Kind, Volume};

/// Names of nested directories that a walk keeps at once: some hundred bytes each. One directory has up to 2^20, and a
/// walk that compares reads two.
const NAMES_HELD_MAX: usize = 3 << 20;

/// Counts the names of one more directory. A volume can name the same millions at each of its levels.
fn hold_names(held: &mut usize, names: usize) -> Result<(), ApiError> {
    if *held + names > NAMES_HELD_MAX {
        let why = format!("the directories above it and it have more than {NAMES_HELD_MAX} names");
        return Err(ApiError::new(ErrorCode::Damaged, why));
    }
    *held += names;
    Ok(())
}

#[cfg(test)]
mod tests;
