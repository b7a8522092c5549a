//! Files out of a mounted point: its partitions, what is in them, and its files.
//!
//! Everything is read over NBD in this process, without root and without mounting anything on this machine. What is
//! read was written by a guest, so it is taken as hostile: names and sizes are its words, never this machine's
//! paths.

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

#[cfg(test)]
mod tests;
