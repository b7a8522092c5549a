//! One state of a walk: the filter, the disk and the tracking file under it, the receiver, what is on
//! its way between them, and what the guest and the plain model know.

use std::{
    collections::{BTreeMap, VecDeque},
    time::Duration,
};

use backtide_io_filter::{Filter, IoId, LocalOp, Now, SpillOp, TrackingOp};
use backtide_protocol::{CompareResult, Message};
use backtide_units::Lsn;

use crate::{
    config::{Budget, Config},
    disk::LocalDisk,
    history::History,
    past_agent::PastAgent,
    receiver::{Receiver, Session, TIME},
    rival::Rival,
    spill::SpillDirectory,
    tracking::TrackingFile,
};

/// See the module's description.
#[derive(Clone, Debug)]
pub(crate) struct World {
    pub(crate) left: Budget,
    pub(crate) filter: Filter,
    pub(crate) now: Duration,
    pub(crate) epoch: u64,
    pub(crate) paused: bool,
    pub(crate) inflight: BTreeMap<IoId, InFlight>,
    pub(crate) tracking_ops: BTreeMap<IoId, TrackingOp>,
    /// Scans under way, with the blocks that were allocated when they began.
    pub(crate) scans: BTreeMap<IoId, u8>,
    pub(crate) file: TrackingFile,
    /// It was made to fail: an alarm is right.
    pub(crate) file_failed: bool,
    pub(crate) spill: SpillDirectory,
    pub(crate) spill_ops: BTreeMap<IoId, SpillOp>,
    /// It was made to fail: an alarm is right, and so is a hole.
    pub(crate) spill_failed: bool,
    /// Records up to this one were durable in the spill.
    pub(crate) kept_to: Lsn,
    /// The disk is being detached.
    pub(crate) detaching: bool,
    pub(crate) disk: LocalDisk,
    pub(crate) writers: Vec<Writer>,
    /// The highest LSN the guest was told of.
    pub(crate) told: Lsn,
    pub(crate) history: History,
    /// The one the agent has, if it has one, is the last.
    pub(crate) connections: Vec<Connection>,
    /// How many there were; nothing depends on it.
    pub(crate) connected: u64,
    pub(crate) receiver: Receiver,
    pub(crate) past: PastAgent,
    /// Another host has taken the disk over.
    pub(crate) rival: Option<Rival>,
    /// The agent was told so: it connects no more.
    pub(crate) fenced: bool,
    /// T of the running pass, and how many blocks it has left.
    pub(crate) pass: Option<(Lsn, u64)>,
}

/// A local I/O under way.
#[derive(Clone, Debug)]
pub(crate) struct InFlight {
    pub(crate) op: LocalOp,
    pub(crate) landed: bool,
    /// T of the freeze that this was under way at.
    pub(crate) frozen: Option<Lsn>,
    /// What a flush is going to make stable.
    pub(crate) mark: Vec<usize>,
}

/// A writer of the guest.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub(crate) struct Writer {
    /// Its next request.
    pub(crate) next: u8,
    /// What it waits for.
    pub(crate) waiting: Option<Waiting>,
}

#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub(crate) struct Waiting {
    /// The highest LSN the guest had been told of when it sent this: its own must be above.
    pub(crate) floor: Lsn,
    /// The LSN that the change got.
    pub(crate) lsn: Option<Lsn>,
    /// Its local I/O has ended.
    pub(crate) done: bool,
}

/// A connection, seen from both sides.
#[derive(Clone, Debug)]
pub(crate) struct Connection {
    /// Which one of this walk; nothing depends on it.
    pub(crate) number: u64,
    /// The agent has it.
    pub(crate) agent_side: bool,
    pub(crate) welcomed: bool,
    /// The disk is its session's.
    pub(crate) owns: bool,
    pub(crate) session: Session,
    pub(crate) up: VecDeque<(u64, Message)>,
    pub(crate) down: VecDeque<Message>,
    /// Answers to comparisons that are being made.
    pub(crate) jobs: VecDeque<CompareResult>,
}

impl World {
    pub(crate) fn moment(&self) -> Now {
        Now { monotonic: self.now, wall: TIME }
    }

    /// The agent's connection.
    pub(crate) fn connection(&mut self) -> Option<&mut Connection> {
        self.connections.last_mut().filter(|connection| connection.agent_side)
    }

    pub(crate) fn has_connection(&self) -> bool {
        self.connections.last().is_some_and(|connection| connection.agent_side)
    }

    /// Whether the guest has everything it wanted.
    pub(crate) fn guest_is_done(&self, config: &Config) -> bool {
        let mut writers = self.writers.iter().zip(config.writers);
        writers.all(|(writer, ops)| writer.waiting.is_none() && usize::from(writer.next) >= ops.len())
    }
}
