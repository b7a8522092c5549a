//! Everything that goes wrong, and everything people ask for, at moments the seed chooses.

use backtide_io_filter::{Mode, ResyncKind};
use backtide_log_receiver::{ConnectionId, Disk, Effect, Session};
use backtide_protocol::{CloseCode, Message, Sequenced};
use backtide_units::{ByteCount, Epoch};

use crate::{
    plan::BANDWIDTHS,
    rewind::Rewind,
    world::{Event, World},
};

impl World {
    pub(crate) fn chaos(&mut self) {
        if self.calm {
            return;
        }
        let pause = self.plan.chaos_us;
        self.within(pause, Event::Chaos);
        let kind = self.random.below(44 + self.plan.rewinds);
        self.trace.note(self.now, "chaos", &[kind]);
        if self.plan.tracking_faults {
            self.tracking_fault();
        }
        match kind {
            0..=3 => self.cut_link(),
            4..=5 => self.cut_connections(),
            6..=7 => self.link.bandwidth = self.random.pick(&BANDWIDTHS),
            8 => self.link.latency_us = self.random.pick(&[50, 1_000, 20_000, 100_000]),
            9..=11 => self.receiver_dies(),
            12..=13 => self.agent_dies(),
            14..=16 => self.ask_to_detach(),
            17..=18 => self.pause(),
            19..=20 => self.force_resync(),
            21..=23 => self.mark(),
            24..=26 => self.verify(),
            27..=28 => self.hold_answers(),
            29 => self.clock_jumps(),
            30..=31 => self.stale_claim(),
            32..=33 => self.store_fault(),
            34 if self.plan.store_faults => self.tracking_fault(),
            34 => {}
            35..=36 => {
                let blocks = self.plan.size.0.div_ceil(4096);
                self.local.break_block(self.random.below(blocks));
                self.within(self.plan.outage_us * 20, Event::DiskHeal);
            }
            37..=38 => self.spill_fault(),
            39 => self.receiver.take_copy(self.promises.intervals.clone()),
            40 => self.put_store_back(),
            41 => self.hydration_fault(),
            42..=43 => self.power_fails(),
            _ => self.want_rewind(),
        }
    }

    fn power_fails(&mut self) {
        self.lose_host_power();
        self.within(self.plan.outage_us, Event::AgentStart);
    }

    /// Something happens while blocks are missing.
    pub(crate) fn strike(&mut self) {
        if self.calm {
            return;
        }
        match self.random.below(8) {
            0..=1 => self.agent_dies(),
            2..=3 => self.power_fails(),
            4 => self.receiver_dies(),
            5 => self.cut_link(),
            6 => self.ask_to_detach(),
            _ => self.want_rewind(),
        }
    }

    /// A clock is set: that of both hosts, or of the receiver's alone. By seconds, or by hours.
    fn clock_jumps(&mut self) {
        let most: i64 = self.random.pick(&[10_000_000, 10_000_000, 7_200_000_000]);
        let jump = self.random.below(2 * most as u64) as i64 - most;
        if self.random.one_in(2) {
            self.receiver_ahead = jump;
        } else {
            self.wall_ahead = self.wall_ahead.saturating_add_signed(jump);
        }
    }

    /// Somebody restores the receiver's store from a copy made earlier.
    fn put_store_back(&mut self) {
        // Who keeps a point for a disk that lacks blocks of it, or is about to, does not put it away.
        let goal = self.agent.as_ref().and_then(|agent| agent.rewind.as_ref()).map(Rewind::to);
        let lacking = self.lacking.point.filter(|_| self.is_lacking());
        if self.receiver.has_copy_of(goal) && self.receiver.has_copy_of(lacking) {
            self.stop_receiver(false);
            self.put_copy_back();
            self.within(self.plan.outage_us, Event::ReceiverStart);
        }
    }

    fn cut_link(&mut self) {
        self.link.up = false;
        self.cut_connections();
        let pause = self.plan.outage_us;
        self.within(pause, Event::LinkHeal);
    }

    fn receiver_dies(&mut self) {
        let power = self.random.one_in(2);
        self.stop_receiver(power);
        let pause = self.plan.outage_us;
        self.within(pause, Event::ReceiverStart);
    }

    fn agent_dies(&mut self) {
        let last = self.agent.as_ref().map(|agent| agent.filter.last_lsn());
        match self.plan.server && self.random.one_in(2) {
            true => self.lose_server(),
            false => self.kill_agent(false),
        }
        if let Some(last) = last
            && self.random.one_in(4)
        {
            self.grow(last.min(self.last_lsn()));
        }
        self.within(self.plan.outage_us, Event::AgentStart);
    }

    pub(crate) fn ask_to_detach(&mut self) {
        if let Some(agent) = &mut self.agent {
            agent.detaching = true;
            if let Some(hydrating) = &mut agent.hydrating {
                hydrating.stop();
            }
            self.hydrate();
            if self.agent.is_some() {
                self.call(|filter, _| filter.hasten());
            }
            self.detach_when_quiet();
        }
    }

    /// Whether blocks are missing, or somebody is about to set the disk back.
    fn is_lacking(&self) -> bool {
        let rewind = self.agent.as_ref().is_some_and(|agent| agent.rewind.is_some());
        rewind || self.lacking.is_there()
    }

    fn pause(&mut self) {
        let Some(agent) = &mut self.agent else { return };
        let connection = agent.connection.take();
        if let Some(connection) = connection {
            self.agent_gone(connection);
        }
        self.call(|filter, now| filter.pause(now));
        let pause = self.plan.outage_us;
        self.within(pause, Event::Resume);
    }

    pub(crate) fn resume(&mut self) {
        if self.agent.is_some() {
            self.call(|filter, now| filter.resume(now));
        }
    }

    fn force_resync(&mut self) {
        let kind = self.random.pick(&[ResyncKind::Changed, ResyncKind::Compare, ResyncKind::Full]);
        if self.agent.is_some() {
            self.call(|filter, now| filter.force_resync(now, kind));
        }
    }

    fn mark(&mut self) {
        let label = format!("m{}", self.random.below(20));
        self.mark_as(label);
    }

    pub(crate) fn mark_as(&mut self, label: String) {
        if self.agent.is_some() {
            let marked = self.call(|filter, now| filter.mark(now, &label));
            let mode = self.agent.as_ref().map(|agent| agent.filter.mode());
            self.guest.marks.extend(marked.iter().map(|marked| (label.clone(), marked.lsn)));
            assert!(marked.is_ok() || mode != Some(Mode::Sync), "a disk in sync takes a mark: {marked:?}");
            assert!(marked.is_err() || !self.past.there, "a mark while somebody else writes the image");
        }
    }

    fn verify(&mut self) {
        if self.agent.is_some() {
            let started = self.call(|filter, now| filter.start_verify(now, false)).is_ok();
            if let Some(agent) = &mut self.agent {
                agent.verifying |= started;
            }
        }
    }

    fn hold_answers(&mut self) {
        let Some(agent) = &mut self.agent else { return };
        agent.holding = true;
        let life = agent.life;
        for request in self.guest.requests.values_mut() {
            request.held = true;
        }
        self.call(|filter, now| filter.hold_answers(now));
        self.within(self.plan.outage_us, Event::GiveAnswers(life));
    }

    pub(crate) fn give_answers(&mut self, life: u64) {
        let Some(agent) = self.agent.as_mut().filter(|agent| agent.life == life) else { return };
        agent.holding = false;
        self.call(|filter, _| filter.give_held_answers());
        self.detach_when_quiet();
    }

    /// An agent of an earlier attach turns up: it is refused, and nothing changes.
    fn stale_claim(&mut self) {
        let Some(agent) = &self.agent else { return };
        let mut hello = agent.filter.hello();
        let disk = self.receiver_disk().filter(|disk| disk.failure().is_none());
        let seen = disk.and_then(Disk::timeline).and_then(|timeline| timeline.attached());
        let Some(seen) = seen.map(|attached| attached.epoch.0).filter(|epoch| *epoch > 0) else { return };
        hello.epoch = Epoch(seen - 1);
        let before = self.receiver_disk().map(|disk| (disk.appended(), disk.owner()));
        let mut session = Session::new(ConnectionId(u64::MAX));
        let now = self.receiver_wall();
        let disks = self.receiver.disks.as_mut().expect("seen above");
        let effects = session.handle(disks, Sequenced { seq: 1, message: Message::Hello(hello) }, now);
        let full = |effect: &Effect| matches!(effect, Effect::Send(Message::Close(closed)) if closed.code == CloseCode::Store);
        let fenced = |effect: &Effect| matches!(effect, Effect::Send(Message::Close(closed)) if closed.code == CloseCode::Fenced);
        assert!(effects.iter().any(|effect| fenced(effect) || full(effect)), "a stale epoch is refused");
        let after = self.receiver_disk().map(|disk| (disk.appended(), disk.owner()));
        assert_eq!(before, after, "a stale epoch changed something");
        self.stats.stale_refused += 1;
    }

    /// The receiver's storage fails once, or is full for a while.
    fn store_fault(&mut self) {
        if !self.plan.store_faults || self.receiver.disks.is_none() {
            return;
        }
        let kind = self.random.below(3);
        self.trace.note(self.now, "store fault", &[kind]);
        match kind {
            0 => self.receiver.storage.fail_write_after(self.random.below(4)),
            1 => self.receiver.storage.fail_sync_after(self.random.below(4)),
            _ => {
                let used = self.receiver.storage.used().0;
                let left = self.random.below(400_000);
                self.receiver.storage.set_capacity(Some(ByteCount(used + left)));
                let pause = self.plan.outage_us;
                self.within(pause, Event::StoreHeal);
            }
        }
    }

    /// From here on nothing goes wrong, and everything is fast.
    pub(crate) fn calm_down(&mut self) {
        self.calm = true;
        self.trace.note(self.now, "calm", &[]);
        self.local.heal();
        self.lacking.heal();
        if let Some(agent) = &mut self.agent {
            agent.rewind = None;
        }
        if self.agent.as_ref().and_then(|agent| agent.hydrating.as_ref()).is_some_and(|lacks| lacks.troubled)
        {
            self.kill_agent(false);
        }
        self.past_agent_leaves();
        self.link.up = true;
        self.link.bandwidth = 400_000_000;
        self.link.latency_us = 100;
        self.receiver.storage.set_capacity(None);
        self.spill.storage.set_capacity(None);
        self.tracking.storage.set_capacity(None);
        self.start_receiver();
        if let Some(agent) = &self.agent {
            let life = agent.life;
            self.give_answers(life);
        } else {
            self.start_agent();
        }
        self.resume();
        if self.agent.is_some() {
            self.call(|filter, now| filter.force_resync(now, ResyncKind::Changed));
        }
    }
}
