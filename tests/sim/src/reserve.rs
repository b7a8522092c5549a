//! LSNs that are the agent's to give: a bound of them is saved ahead, sometimes late, sometimes in vain. After a death the
//! next attach goes on above it, so nothing above it may have left the agent.

use backtide_io_filter::Filter;
use backtide_protocol::Message;
use backtide_units::Lsn;

use crate::{
    plan::Plan,
    random::Random,
    world::{Event, World},
};

/// How a bound is saved.
pub(crate) struct Reserving {
    /// LSNs it is raised by.
    step: u64,
    /// The longest that saving takes.
    save_us: u64,
    /// One of so many saves fails; 0: none.
    fails: u64,
    /// What is being saved.
    saving: Option<Lsn>,
    /// Its own chance: what else happens in a seed does not depend on it.
    random: Random,
}

impl Reserving {
    /// In the world of a plan.
    pub(crate) fn of(plan: &Plan) -> Self {
        let mut random = Random::new(plan.chaos_us ^ plan.size.0 ^ (plan.local_us << 32) ^ plan.latency_us);
        let step = random.pick(&[3, 20, 200, 1_000]);
        let save_us = random.pick(&[1_000, 50_000, 2_000_000]);
        let fails = random.pick(&[0, 2, 10]);
        Self { step, save_us, fails, saving: None, random }
    }
}

impl World {
    /// A new attach has a bound of its own before anything happens.
    pub(crate) fn reserve_for_attach(&mut self, filter: &mut Filter) {
        let last = filter.last_lsn().max(self.persisted.reserved);
        self.persisted.reserved = last.plus(self.reserving.step);
        self.reserving.saving = None;
        filter.lsns_reserved(self.moment(), self.persisted.reserved);
    }

    /// Begins to save a higher bound when that is due.
    pub(crate) fn keep_reserve(&mut self) {
        let Some(agent) = &self.agent else { return };
        let (life, last, step) = (agent.life, agent.filter.last_lsn(), self.reserving.step);
        if self.reserving.saving.is_some() || last.0 + step / 2 <= self.persisted.reserved.0 {
            return;
        }
        self.reserving.saving = Some(last.plus(step).max(self.persisted.reserved));
        let longest = if self.calm { 1_000 } else { self.reserving.save_us };
        let us = self.reserving.random.below(longest) + 1;
        self.after(us, Event::Reserved(life));
    }

    pub(crate) fn reserved(&mut self, life: u64) {
        if self.agent.as_ref().is_none_or(|agent| agent.life != life) {
            return;
        }
        let bound = self.reserving.saving.take().expect("a save ends once");
        let fails =
            !self.calm && self.reserving.fails > 0 && self.reserving.random.one_in(self.reserving.fails);
        self.trace.note(self.now, "reserved", &[bound.0, u64::from(!fails)]);
        if fails {
            return self.keep_reserve();
        }
        self.persisted.reserved = bound;
        self.call(|filter, now| filter.lsns_reserved(now, bound));
        self.detach_when_quiet();
    }

    /// A clean end is saved with the last LSN given.
    pub(crate) fn reserve_all_given(&mut self, filter: &Filter) {
        self.persisted.reserved = self.persisted.reserved.max(filter.last_lsn());
        self.reserving.saving = None;
    }

    /// The agent has died. What was being saved is there or not; LSNs above it are given again, which only the dead one
    /// and its guest have seen.
    pub(crate) fn forget_unreserved(&mut self, filter: &Filter) {
        if let Some(bound) = self.reserving.saving.take()
            && self.reserving.random.one_in(2)
        {
            self.persisted.reserved = bound;
        }
        let reserved = self.persisted.reserved;
        if filter.last_lsn() <= reserved {
            return;
        }
        self.stats.unreserved_deaths += 1;
        self.model.forget_above(reserved);
        self.captured.split_off(&reserved.next());
        self.guest.forget_above(reserved);
        self.past.forget_above(reserved);
    }
}

/// Whoever gets this may remember its LSN.
pub(crate) fn check_reserved(reserved: Lsn, message: &Message) {
    let lsn = match message {
        Message::Record(record) => record.lsn,
        Message::PassBegin { at, .. } => *at,
        _ => return,
    };
    assert!(lsn <= reserved, "{lsn} leaves the agent, which would be given again above {reserved}");
}
