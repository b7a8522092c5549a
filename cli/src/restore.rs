//! A point written to a target: read over NBD, pipelined, sparse, then read back and compared.
//!
//! The disk is looked at in pieces of 1 MiB on a fixed grid, in windows of 1 GiB. A file that takes direct I/O is read back
//! piece by piece while others are written, and compared with what was written. Of other targets each side gives a
//! digest per window at the end, so that verifying needs 32 bytes of memory per GiB and can name the window
//! that differs. A piece without data has a digest without being read, on either side. What is done of a
//! new file is noted piece by piece: a restore that was killed, or lost the receiver, is gone on with.

mod copy;
mod device;
mod direct;
mod file;
mod held;
mod leftovers;
mod notes;
mod old_file;
mod open_file;
mod pieces;
mod replaceable;
mod room;
mod target;

pub(crate) use copy::{copy, verify};
pub(crate) use file::name_if_free;
pub(crate) use leftovers::take;
pub(crate) use notes::Goal;
pub(crate) use replaceable::Replaceable;
pub(crate) use room::refuse_no_room;
pub(crate) use target::{Target, Wanted, is_agent_state, refuse_no_name};

#[cfg(test)]
mod tests;
