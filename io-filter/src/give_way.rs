//! Reads of a pass or a verify that a guest's change waits for: they give way when it has waited its
//! time.
//!
//! Invariants: no change waits longer than its bound for a read of more than one block, or for one that
//! waits for another host; a read that gave way has changed nothing, and is done again block by block. Such
//! a read of the disk gives way to nobody, so that it comes to an end. One for which another host is asked
//! gives way too: what was asked for comes all the same, and the next read finds it on the disk.

use std::time::Duration;

use backtide_units::{BlockCount, BlockRange};

use crate::{
    capture::{Ongoing, Queued},
    courtesy::Watch,
    event::IoId,
    filter::Filter,
};

/// When a change was asked for, and for how long it was held up since for the receiver's sake.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Arrival {
    /// Moved on by what it waited for anything else.
    pub(crate) at: Duration,
    pub(crate) delayed: Duration,
    /// It waits at the guard for a read of a pass or a verify.
    pub(crate) behind_read: bool,
    pub(crate) watch: Watch,
}

impl Arrival {
    pub(crate) fn now(at: Duration, watch: Watch) -> Self {
        Self { at, delayed: Duration::ZERO, behind_read: false, watch }
    }

    /// When it has waited its time.
    pub(crate) fn deadline(&self, bound: Duration) -> Duration {
        self.at + bound
    }

    /// As if it had been asked for so much later.
    pub(crate) fn later_by(self, waited: Duration) -> Self {
        Self { at: self.at + waited, watch: self.watch.later_by(waited), ..self }
    }
}

impl Filter {
    /// A read for a pass or a verify holds this range at the guard until it has ended.
    pub(crate) fn hold_for_read(&mut self, io: IoId, run: BlockRange) {
        self.reads.insert(io, run);
        self.pace.read_begins(self.now.monotonic, run.count().bytes());
    }

    /// A read of [`Effect::Local`](crate::Effect::Local) waits for another host: the disk does not have these blocks
    /// yet. To be called when it begins.
    pub fn read_is_far(&mut self, io: IoId) {
        if self.reads.contains_key(&io) {
            self.far_reads.insert(io);
        }
    }

    pub(crate) fn read_ended(&mut self, io: IoId) {
        self.reads.remove(&io);
        self.far_reads.remove(&io);
        self.pace.read_ended(self.now.monotonic);
    }

    /// Whether a change of these blocks, which cannot have them now, waits for a read.
    pub(crate) fn is_behind_read(&self, blocks: BlockRange) -> bool {
        let waits = |queued: &Queued| match queued {
            Queued::Change(_, change, asked) => {
                asked.behind_read
                    && change.range().is_some_and(|range| BlockRange::touched_by(range).overlaps(blocks))
            }
            Queued::Drain(run) => run.overlaps(blocks),
            Queued::Verify(run) => run.blocks().overlaps(blocks),
        };
        self.reads.values().any(|run| run.overlaps(blocks)) || self.queued.values().any(waits)
    }

    /// When the next read has to give way.
    pub(crate) fn next_give_way(&self) -> Option<Duration> {
        self.waiting_for_reads().map(|(_, asked)| asked.deadline(self.settings.guest_delay_max)).min()
    }

    /// Lets changes that have waited their time go ahead of reads.
    pub(crate) fn give_way_to_overdue(&mut self) {
        let (now, bound) = (self.now.monotonic, self.settings.guest_delay_max);
        loop {
            let overdue = self.waiting_for_reads().find(|(_, asked)| asked.deadline(bound) <= now);
            let Some((io, _)) = overdue else { return };
            self.abandon_read(io);
        }
    }

    /// The reads that may give way, each with a change that waits for it.
    fn waiting_for_reads(&self) -> impl Iterator<Item = (IoId, Arrival)> {
        let far = |io: &IoId| self.far_reads.contains(io);
        let long = self.reads.iter().filter(move |(io, run)| run.count() > BlockCount(1) || far(io));
        long.flat_map(|(io, run)| {
            self.queued.values().filter_map(|queued| match queued {
                Queued::Change(_, change, asked) => {
                    let blocks = BlockRange::touched_by(change.range()?);
                    blocks.overlaps(*run).then_some((*io, *asked))
                }
                Queued::Drain(_) | Queued::Verify(_) => None,
            })
        })
    }

    fn abandon_read(&mut self, io: IoId) {
        let run = self.reads[&io];
        self.read_ended(io);
        self.counters.reads_abandoned += 1;
        let read = self.ongoing.insert(io, Ongoing::Abandoned).expect("a read is under way");
        match read {
            Ongoing::Drain(_) => self.drain_gave_way(io, run),
            Ongoing::Verify(verify) => self.verify_gave_way(verify),
            Ongoing::Change(_)
            | Ongoing::Flush(..)
            | Ongoing::Copy(_)
            | Ongoing::Abandoned
            | Ongoing::Recall(_)
            | Ongoing::Settle => {
                unreachable!("only reads of passes and verifies are held")
            }
        }
        self.release(run);
    }
}
