//! Somebody else has the image open, and writes it past the agent: a QEMU that was given the file itself. The agent sees
//! that they are there before they write, and when they have gone; what they write only the disk and the model know.
//!
//! They may come while a living agent has a disk that lacks no blocks and is not about to be set back, and stay whatever
//! happens to the agent, until the host loses power. In some worlds nobody comes.

use backtide_io_filter::Filter;
use backtide_units::{BlockRange, ByteOffset, ByteRange, Lsn};

use crate::{
    local_io::InFlight,
    model::What,
    plan::Plan,
    random::Random,
    world::{Event, World},
};

/// See the module's description.
pub(crate) struct PastAgent {
    /// They have it open.
    pub(crate) there: bool,
    /// The agent's record: they may have written it since everything was compared last.
    pub(crate) wrote: bool,
    /// Since they have gone everything is being compared, or waits for the receiver.
    compares: bool,
    /// The LSNs of when an agent saw them first: no points.
    seen: Vec<Lsn>,
    /// How often they wrote, each time something else.
    writes: u64,
    /// The longest pause between two things that they do; none where nobody comes.
    pause_us: Option<u64>,
    /// Its own chance: what else happens in a seed does not depend on it.
    random: Random,
}

impl PastAgent {
    /// In the world of a plan.
    pub(crate) fn of(plan: &Plan) -> Self {
        let mut random = Random::new(plan.chaos_us ^ plan.size.0.rotate_left(7) ^ (plan.sync_us << 20));
        let comes = !plan.server && random.one_in(2);
        let pause_us = random.pick(&[1, 4, 20]) * plan.chaos_us;
        Self {
            there: false,
            wrote: false,
            compares: false,
            seen: Vec::new(),
            writes: 0,
            pause_us: comes.then_some(pause_us),
            random,
        }
    }

    /// LSNs above this are given again.
    pub(crate) fn forget_above(&mut self, last: Lsn) {
        self.seen.retain(|seen| *seen <= last);
    }
}

impl World {
    /// When they do something next.
    pub(crate) fn plan_past_agent(&mut self) {
        let Some(pause) = self.past.pause_us else { return };
        let pause = if self.past.there { self.plan.chaos_us.min(pause) } else { pause };
        let after = self.past.random.below(pause + 1);
        self.after(after, Event::PastAgent);
    }

    /// They come, write, or go.
    pub(crate) fn past_agent_turn(&mut self) {
        if self.calm {
            return;
        }
        match self.past.there {
            true if self.past.random.one_in(6) => self.past_agent_leaves(),
            true => {
                self.write_past_agent();
                // It is looked again and again.
                if self.agent.is_some() && self.past.random.one_in(2) {
                    self.see_past_agent();
                }
            }
            false if self.may_come() => {
                self.past.there = true;
                self.see_past_agent();
                self.write_past_agent();
            }
            false => {}
        }
        self.plan_past_agent();
    }

    fn may_come(&self) -> bool {
        let is_free = |agent: &crate::agent::Agent| agent.rewind.is_none() && !agent.wants_rewind;
        self.agent.as_ref().is_some_and(is_free) && !self.lacking.is_there()
    }

    /// The agent looks, and sees them.
    fn see_past_agent(&mut self) {
        let is_news = self.agent.as_ref().is_some_and(|agent| !agent.sees_past_agent);
        (self.past.wrote, self.past.compares) = (true, false);
        let ends_stream = self.call(Filter::is_written_past);
        self.trace.note(self.now, "past the agent", &[u64::from(is_news), u64::from(ends_stream)]);
        let agent = self.agent.as_mut().expect("it looks");
        agent.sees_past_agent = true;
        let seen = agent.filter.last_lsn();
        if ends_stream && let Some(connection) = agent.connection.take() {
            self.stats.past_in_pass += 1;
            self.agent_gone(connection);
        }
        if is_news {
            self.stats.past_agents += 1;
            self.past.seen.push(seen);
        }
    }

    /// It is in every point from here on, if there is one. What comes of two writes at once nobody could tell.
    fn write_past_agent(&mut self) {
        let sectors = self.plan.size.0 / 512;
        let start = self.past.random.below(sectors) * 512;
        let end = (start + self.past.random.between(1, 16) * 512).min(self.plan.size.0);
        let range = ByteRange::between(ByteOffset(start), ByteOffset(end));
        let blocks = BlockRange::touched_by(range);
        let at_once = |inflight: &InFlight| {
            inflight.range().is_some_and(|other| BlockRange::touched_by(other).overlaps(blocks))
        };
        let lsn = match &self.agent {
            Some(agent) if agent.inflight.values().any(at_once) => return,
            Some(agent) => agent.filter.last_lsn(),
            None => self.last_lsn().next(),
        };
        self.past.writes += 1;
        self.stats.past_writes += 1;
        self.stats.past_without_agent += u64::from(self.agent.is_none());
        let mut data = self.past.writes.to_le_bytes().repeat((end - start) as usize / 8);
        data.iter_mut().skip(7).step_by(8).for_each(|last| *last = 0x70);
        self.local.write(range, Some(&data), false);
        self.shown.disk.write(range, Some(&data), false);
        self.model.change(lsn, range, What::Bytes(data.into()));
        self.trace.note(self.now, "written past the agent", &[lsn.0, start, end]);
    }

    /// They go, or the host does; an agent that lives sees that.
    pub(crate) fn past_agent_leaves(&mut self) {
        if !std::mem::replace(&mut self.past.there, false) {
            return;
        }
        self.trace.note(self.now, "nobody writes past the agent", &[]);
        if let Some(agent) = &mut self.agent {
            agent.sees_past_agent = false;
            self.call(Filter::was_written_past);
            self.past.compares = true;
        }
    }

    /// An agent begins: it looks who is there before it connects, and otherwise compares everything by itself.
    pub(crate) fn look_at_start(&mut self) {
        self.past.compares = self.past.wrote;
        if self.past.there {
            self.see_past_agent();
        }
    }

    /// They are forgotten when everything was compared since they have gone.
    pub(crate) fn forget_past_agent(&mut self) {
        let Some(agent) = &self.agent else { return };
        let past = &mut self.past;
        if past.wrote && !past.there && past.compares && agent.filter.owes_no_resync() {
            (past.wrote, past.compares) = (false, false);
            self.stats.past_compared += 1;
        }
    }

    /// What they write is a hole from when they are seen.
    pub(crate) fn check_past_agent(&self, offers: &[(Lsn, Lsn)]) {
        for seen in &self.past.seen {
            let offered = offers.iter().find(|(from, to)| from <= seen && seen <= to);
            assert_eq!(offered, None, "at LSN {seen} somebody else wrote the image: that is a hole");
        }
    }
}
