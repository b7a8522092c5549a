//! The whole of Backtide in one thread and no time: the production filter, stream and receiver over
//! a simulated guest, local disk, link and storage, all driven by one seed.
//!
//! A run goes through thousands of events: guest requests, local completions, frames, syncs, and
//! everything that goes wrong in between. All the while it is compared with a plain [`model`]:
//! the list of changes with their LSNs. At the end the world is healed, and everything must be in
//! sync again. What is checked, and which promise each check stands for, is in [`check`].
//!
//! A seed repeats exactly: `SEED=n cargo test -p backtide-sim` replays one and prints its trace,
//! `SEEDS=a..b` runs a range. Chance is [`random`], SplitMix64; time is a counter of microseconds.
//!
//! Read [`world`] first, then the way of a write: [`guest`], [`agent`], [`local`], [`link`],
//! [`receiver`].

pub mod agent;
pub mod chaos;
pub mod check;
pub mod effects;
pub mod guest;
mod hydration;
mod lacking;
pub mod link;
pub mod local;
mod local_io;
pub mod model;
mod past_agent;
pub mod plan;
pub mod points;
pub mod random;
pub mod receiver;
mod reserve;
mod resize;
mod rewind;
pub mod run;
mod shown;
mod spill;
pub mod steady;
mod storing;
pub mod trace;
mod tracking;
pub mod world;

pub use lacking::DriverMistake;
pub use run::{Mistake, Outcome, run, run_many};
pub use steady::{PassSeen, Said, Steady};
pub use world::Stats;
