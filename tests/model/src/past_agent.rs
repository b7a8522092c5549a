//! Somebody else has the image open, and writes it past the agent. The agent sees that they are there before they write,
//! and when they have gone; what they write only the disk and the model know.

use backtide_io_filter::{Filter, Resume};
use backtide_units::{Lsn, Reason};

use crate::{config::Config, world::World};

/// See the module's description.
#[derive(Clone, Debug, Default, PartialEq, Eq, Hash)]
pub(crate) struct PastAgent {
    /// They have it open.
    pub(crate) there: bool,
    /// The agent's record: they may have written it since everything was compared last.
    pub(crate) wrote: bool,
    /// Since they have gone everything is being compared, or waits for the receiver.
    compares: bool,
    /// The LSNs of when an agent saw them first.
    seen: Vec<Lsn>,
}

impl World {
    /// They open the image, or an agent begins that finds them there.
    pub(crate) fn past_agent_is_seen(&mut self, config: &Config) {
        (self.past.there, self.past.wrote, self.past.compares) = (true, true, false);
        let mut ends_stream = false;
        self.call(config, |filter, now| ends_stream = filter.is_written_past(now));
        if ends_stream {
            self.end_agent_side(config);
        }
        self.past.seen.push(self.filter.last_lsn());
    }

    /// Blocks that they may write: what comes of two writes at once nobody could tell.
    pub(crate) fn free_blocks(&self) -> impl Iterator<Item = u8> {
        let mut changed = self.inflight.values().filter_map(|inflight| inflight.change());
        let taken = changed.by_ref().fold(0u8, |taken, (block, _)| taken | 1 << block);
        (0..self.disk.count()).filter(move |block| taken & 1 << block == 0)
    }

    /// It is in every point from here on, if there is one.
    pub(crate) fn written_past(&mut self, block: u8) {
        let value = 0xe0 + self.left.past_writes;
        self.disk.write(block, value);
        self.history.change(self.filter.last_lsn(), block, Some(value));
    }

    pub(crate) fn past_agent_leaves(&mut self, config: &Config) {
        self.past.there = false;
        self.call(config, |filter, now| filter.was_written_past(now));
        self.past.compares = true;
    }

    /// Whether they are forgotten: everything was compared since they have gone.
    pub(crate) fn forget_past_agent(&mut self) {
        let past = &mut self.past;
        if !past.there && past.compares && self.filter.owes_no_resync() {
            (past.wrote, past.compares) = (false, false);
        }
    }

    /// What the next agent begins with, whatever else is known.
    pub(crate) fn distrusting(&self, resume: Resume) -> Resume {
        let (history, last_lsn) = (self.file.history, self.file.reserved);
        match self.past.wrote {
            true => {
                Resume::Lost { reason: Reason::WrittenPastAgent, history, last_lsn, acked_durable: Lsn::ZERO }
            }
            false => resume,
        }
    }

    /// An agent begins: it looks who is there before it connects, and otherwise compares everything by itself.
    pub(crate) fn look_at_start(&mut self, config: &Config) {
        match self.past.there {
            true => self.past_agent_is_seen(config),
            false => self.past.compares = self.past.wrote,
        }
    }

    /// While they are there no moment can be named and no pass reads, and what they write is a hole.
    pub(crate) fn check_past_agent(&self) {
        if self.past.there {
            let mut filter = self.filter.clone();
            assert!(
                filter.mark(self.moment(), "here").is_err(),
                "a mark while somebody else writes the image"
            );
            let reads = |filter: &Filter| filter.status().pass.is_some();
            assert!(!reads(&filter), "a pass reads what somebody else writes");
        }
        if self.rival.is_some() {
            // Who gives that LSN anew.
            return;
        }
        let offers = self.receiver.offers();
        for seen in &self.past.seen {
            let offered = offers.iter().find(|(from, to)| from <= seen && seen <= to);
            assert_eq!(offered, None, "at LSN {seen} somebody else wrote the image: that is a hole");
        }
    }
}
