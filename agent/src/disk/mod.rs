//! One disk and the thread that owns it.
//!
//! [`thread`] starts and ends it and takes commands; [`engine`] runs the filter; [`export`] is the
//! guest's side, [`local`] the disk behind, [`medium`] what it lies on, [`image_disk`] and [`nbd_disk`] its kinds, [`stream`] the way
//! to the receiver, [`status`] what can be told of it all.

mod at_once;
mod beside;
pub(crate) mod claim;
mod clientele;
mod detach;
mod dial;
mod doubt;
pub(crate) mod engine;
mod export;
mod flush_turns;
mod forgotten;
mod gathering;
mod handle;
pub(crate) mod hydrating;
mod image_disk;
mod in_place;
mod incomplete;
mod leaving;
mod life;
pub(crate) mod local;
mod marking;
mod medium;
mod nbd_disk;
mod open;
mod past_agent;
mod polling;
mod refused;
mod rest;
mod retry;
mod ring;
mod saving;
#[allow(dead_code, reason = "an attach from a point needs more of it")]
pub(crate) mod source;
mod start_error;
mod status;
mod stream;
mod terms;
mod thread;
mod tracking;
pub(crate) mod trust;
mod unflushed;

pub(crate) use clientele::Clientele;
pub(crate) use dial::{Dialer, check_tls};
pub(crate) use handle::{DiskHandle, NoAnswer};
pub(crate) use in_place::{Displaced, InPlace};
pub(crate) use incomplete::{
    HydrationProblem, ReservedNote, has_note, lacked, leave_note, path_of, reserve_note, take_note_back,
    try_note,
};
pub(crate) use leaving::{DetachError, Leaving, awaited_text};
#[cfg(test)]
pub(crate) use marking::MarkAt;
pub(crate) use nbd_disk::{Served, look_at};
pub(crate) use open::{OpenError, Opened, activity_limits, open};
pub(crate) use polling::PollSeats;
pub(crate) use start_error::{behind_error, start_error};
pub(crate) use status::{given_up, not_attached};
pub(crate) use terms::Terms;
pub(crate) use thread::{Command, Entrance, nbd_purpose, start};

#[cfg(test)]
pub(crate) mod tests;
