//! One disk and the thread that owns it.
//!
//! [`thread`] starts and ends it and takes commands; [`engine`] runs the filter; [`export`] is the
//! guest's side, [`local`] the disk behind, [`stream`] the way to the receiver, [`status`] what can
//! be told of it all.

pub(crate) mod engine;
mod export;
mod handle;
pub(crate) mod local;
mod open;
mod status;
mod stream;
mod thread;

pub(crate) use handle::{DiskHandle, Ended};
pub(crate) use open::{OpenError, open};
pub(crate) use thread::{Command, DetachError, start, start_error};
