//! What a walk consists of: the disk, what the guest does, and how much of everything may go wrong.
//! All of it is finite, so that all of it can be walked.

use std::time::Duration;

use backtide_io_filter::Mutant;

/// A request of a guest's writer.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Op {
    /// Writes a byte of this block that no other write writes.
    Write(u8),
    /// Trims the whole block.
    Trim(u8),
    /// Flushes the disk.
    Flush,
}

/// Where a walk begins.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Start {
    /// At the disk's first attach, not connected.
    FirstAttach,
    /// In sync, with everything durable.
    InSync,
    /// As `InSync`, and then the stream was lost.
    Away,
    /// As `InSync`, then paused, these blocks changed, resumed and not connected: the next connection
    /// begins a pass over them that is no comparison.
    Dirty(&'static [Op]),
}

/// How often something may still happen.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub struct Budget {
    /// The stream is lost.
    pub cuts: u8,
    /// The agent's process dies and starts again.
    pub agent_crashes: u8,
    /// The agent's host loses power and comes back.
    pub power_losses: u8,
    /// The receiver dies and starts again, without what it likes of what was not durable.
    pub receiver_crashes: u8,
    /// Time passes until the filter's next deadline.
    pub ticks: u8,
    /// Somebody pauses the disk, and resumes it.
    pub pauses: u8,
    /// Somebody forces a resync.
    pub forces: u8,
    /// Another host takes the disk over.
    pub rivals: u8,
    /// The disk is detached, and attached again.
    pub detaches: u8,
    /// An operation of the spill fails.
    pub spill_failures: u8,
    /// A write of the tracking file fails, or the making of a new one.
    pub tracking_failures: u8,
    /// Somebody else opens the image, to write it past the agent.
    pub past_agents: u8,
    /// They write a block of it.
    pub past_writes: u8,
}

/// A walk. See the module's description.
#[derive(Clone, Debug)]
pub struct Config {
    /// For people.
    pub name: &'static str,
    /// Blocks of the disk. The last one has a single byte.
    pub blocks: u8,
    /// What the disk holds in the beginning, by block; zero is nothing.
    pub content: &'static [u8],
    /// What each writer does, one request after the other.
    pub writers: &'static [&'static [Op]],
    /// The first value that writes write; no two write the same.
    pub first_value: u8,
    /// Where it begins.
    pub start: Start,
    /// What may go wrong.
    pub budget: Budget,
    /// Frames that fit on the way to the receiver.
    pub lane: usize,
    /// The filter's window.
    pub window_bytes: u64,
    /// The filter's resync buffer.
    pub buffer_bytes: u64,
    /// What the spill may take; zero for no spill.
    pub spill_bytes: u64,
    /// The longest the filter may delay a write.
    pub delay_max: Duration,
    /// Extents that stay hot, of one block each; zero for no activity log.
    pub hot: u32,
    /// Whether a change reaches the disk in a step of its own before it ends.
    pub slow_landing: bool,
    /// Whether frames of a connection that the agent has lost may still arrive, after those of the next.
    pub ghosts: bool,
    /// Whether the receiver acknowledges also what is merely in its memory.
    pub received_acks: bool,
    /// A deliberate mistake.
    pub mutant: Option<Mutant>,
}

impl Config {
    /// A disk of two blocks in which nothing goes wrong yet.
    pub const fn new(name: &'static str, writers: &'static [&'static [Op]]) -> Self {
        Self {
            name,
            blocks: 2,
            content: &[],
            writers,
            first_value: 0x10,
            start: Start::InSync,
            budget: Budget {
                cuts: 0,
                agent_crashes: 0,
                power_losses: 0,
                receiver_crashes: 0,
                ticks: 0,
                pauses: 0,
                forces: 0,
                rivals: 0,
                detaches: 0,
                spill_failures: 0,
                tracking_failures: 0,
                past_agents: 0,
                past_writes: 0,
            },
            lane: 1,
            window_bytes: 1 << 20,
            buffer_bytes: 1 << 20,
            spill_bytes: 0,
            delay_max: Duration::from_millis(10),
            hot: 0,
            slow_landing: false,
            ghosts: false,
            received_acks: false,
            mutant: None,
        }
    }
}
