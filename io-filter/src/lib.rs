//! The filter of one disk: a state machine that captures every change, forwards it in order, and
//! tracks and resynchronizes what could not be forwarded.
//!
//! There is no I/O, clock or thread in here. A driver feeds events ([`Filter::submit`],
//! [`Filter::local_done`], [`Filter::connected`], [`Filter::receive`], ...) and carries out the
//! [`Effect`]s that come back; the agent does so with real disks and sockets, the simulation with
//! imagined ones, both with this code. Read it in the order of a write's way:
//!
//! 1. `capture`: a guest's request, the local write, its LSN.
//! 2. `window`: the record on its way to the receiver, retained until durable there.
//! 3. `acknowledge`: when the guest hears of it.
//! 4. `connection`: the handshake's decision, acks, a lost stream; `hasten`: when the receiver is told that
//!    somebody waits.
//! 5. `freeze`, `drain`, `compare`, `prepared`: a resync pass; `pace`, `courtesy`: how fast it may be; `progress`: how
//!    fast it is.
//! 6. `activity`: what the tracking file has to say, before a change may happen.
//! 7. `spill`: the window's part on disk.
//! 8. `operate`, `verify`, `differing`: what a person can ask for.
//!
//! # Invariants
//! For every block that differs between the local disk and the newest version at the receiver,
//! at least one holds: its record is in the window; it is in the passive or the active bitmap; its
//! drained content is in the window; a change of it is in flight. And should everything in memory be
//! lost: the tracking file's newest snapshot has it, or it lies in an extent that is hot, durably.

mod acknowledge;
mod activity;
mod attaches;
mod capture;
mod compare;
mod connection;
mod courtesy;
mod differing;
mod drain;
mod event;
mod filter;
mod freeze;
mod give_way;
mod guard;
mod hasten;
mod inspect;
mod mutant;
mod operate;
mod pace;
mod pass;
mod prepared;
mod progress;
mod recall;
mod reserve;
mod spill;
mod status;
mod unchanged;
mod unreadable;
mod verify;
mod window;

pub use activity::Untracked;
pub use compare::chunk_items;
pub use courtesy::Watch;
pub use differing::{Differing, STRETCHES_LISTED};
pub use event::{
    AckPolicy, Change, Effect, IoFailure, IoId, LocalData, LocalOp, Now, OnOutage, RequestId, Resume,
    Settings, SpillDone, SpillOp, TrackingOp,
};
pub use filter::{Filter, Mode};
#[cfg(feature = "mutants")]
pub use mutant::Mutant;
pub use operate::{MARKS_KNOWN, MarkError, Marked, ResyncKind};
pub use prepared::{Prepared, ReadUse};
pub use progress::Speed;
pub use status::{Counters, PassStatus, SpillStatus, Status};
pub use verify::{VerifyError, VerifyReport};
