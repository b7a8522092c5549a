//! A model checker: every interleaving of a tiny world, over the production state machines.
//!
//! Where the simulation (`tests/sim`) throws dice in a large world, this walks all that can happen in
//! a tiny one: two or three blocks, two writers, a drain, freezes, a lost link, crashes of agent and
//! receiver, power losses, another host that takes the disk over. The walk is finite because the guest's requests and the accidents are
//! counted, and it is complete: [`walk`] ends when no new state is left. Every state is checked, and
//! from some the world is healed and has to come into sync.
//!
//! What is real: [`backtide_io_filter::Filter`] with its window, passes, guard and activity log; the
//! tracking file's snapshots and records; the spill with its files; the protocol's messages; the receiver's timeline, which says
//! what entry may follow which and what is a point.
//!
//! What is not: the local disk (a few values a block), the tracking file's bytes (an operation under
//! way at a crash has happened or not; that this is so, `tests/sim` and the file's own tests show), and
//! the receiver's sessions and log files, which are said again in `receiver` because a walk has to copy
//! them a million times; [`lockstep`] shows that they are said right, by long random walks in which the
//! production sessions and logs have to give the same answers. No local I/O fails but that of the spill, nothing is damaged.
//!
//! The walk is breadth first with a set of seen fingerprints, so what it finds it finds by a shortest
//! way. A library such as `stateright` would add a web page and a way of writing actions down; what is
//! needed of it is `explore`, and panics of the production code are findings here.
//!
//! Read `world` first, then `actions`, `agent`, `link`, `receiver`, `rival`; what must be true is in `check`.

mod actions;
mod agent;
mod begin;
mod check;
pub mod config;
mod content;
mod disk;
mod explore;
mod fingerprint;
mod heal;
mod history;
mod link;
mod lockstep;
mod past_agent;
mod receiver;
mod rival;
mod spill;
mod tracking;
mod world;

pub use actions::{Action, Crash, Part};
pub use config::{Budget, Config, Op, Start};
pub use explore::{Violation, Walk, walk};
pub use lockstep::{Steps, lockstep};
