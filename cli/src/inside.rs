//! Files out of a mounted point: its partitions, what is in them, and the files of ext2, ext3 and ext4.
//!
//! Everything is read over NBD in this process, without root and without mounting anything on this machine. What is
//! read was written by a guest, so it is taken as hostile: names and sizes are its words, never this machine's
//! paths.

mod copy_out;
mod partitions;
mod point_reader;
mod volume;

pub(crate) use copy_out::{Copied, Destination, copy_out};
pub(crate) use partitions::{Content, Partition, partitions};
pub(crate) use point_reader::PointReader;
pub(crate) use volume::{Entry, Kind, Volume};

#[cfg(test)]
mod tests;
