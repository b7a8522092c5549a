//! Carries out what the filter wants, and sends what it has to send.

use backtide_io_filter::{Effect, LocalOp, Mode};
use backtide_protocol::encode;

use crate::{
    reserve::check_reserved,
    world::{Event, World},
};

impl World {
    /// Everything the filter wants done, until it wants nothing more.
    pub(crate) fn carry_out(&mut self) {
        loop {
            let Some(agent) = &mut self.agent else { return };
            match agent.filter.next_effect() {
                Some(effect) => self.carry_out_one(effect),
                None if self.send_one() => {}
                None => break,
            }
        }
        self.persist();
        self.watch_pass();
        self.watch_verify();
        self.set_timer();
    }

    fn carry_out_one(&mut self, effect: Effect) {
        match effect {
            Effect::Local(io, op) => self.begin_local(io, op),
            Effect::Tracking(io, op) => self.begin_tracking(io, op),
            Effect::Spill(io, op) => self.begin_spill(io, op),
            Effect::Complete { request, result } => self.answered(request, result),
            Effect::Scan(io) => {
                let life = self.agent.as_ref().expect("it asked").life;
                let mut at: Vec<u64> = (0..3).map(|_| self.random.below(20_000)).collect();
                at.sort_unstable();
                for (stage, us) in (0..).zip(at) {
                    self.after(us, Event::Scan { life, io, stage });
                }
            }
            Effect::Transition { from, to, reason } => {
                self.trace.note(self.now, "mode", &[from as u64, to as u64]);
                self.trace.say(self.now, || format!("{from:?} -> {to:?} ({reason:?})"));
                if from == Mode::Sync && to == Mode::Tracking {
                    self.check_spill_was_used(reason);
                }
                if to == Mode::Resync {
                    self.freeze();
                } else if from == Mode::Resync {
                    self.agent.as_mut().expect("it said so").pass = None;
                }
            }
            Effect::ReadFailed { range, .. } => {
                self.trace.note(self.now, "read failed", &[range.start().0]);
            }
            Effect::Disconnect { why } => panic!("honest peers do not part: {why}"),
            Effect::Alarm(why) if self.tracking.faulty && why.contains("tracking file") => {
                self.stats.tracking_lost += 1;
            }
            // A store was put back from a copy: an agent that knows more than it says so.
            Effect::Alarm(why) if self.stats.stores_put_back > 0 && is_of_a_rollback(&why) => {
                self.stats.put_back_noticed += 1;
            }
            Effect::Alarm(why) if self.spill.faulty && why.contains("spill") => {}
            Effect::Alarm(why) if why.contains("cannot be read") => self.stats.unreadable += 1,
            // A flush of the filter's own failed, as planned.
            Effect::Alarm(why) if self.may_flushes_fail() && why.contains("flushing") => {}
            Effect::Alarm(why) => panic!("nothing happened that an alarm is right for: {why}"),
        }
    }

    fn may_flushes_fail(&self) -> bool {
        self.plan.write_errors_permille > 0 || self.lacking.faulty || self.lacking.refusals > 0
    }

    /// A pass begins: what the disk holds now, and what is under way, belongs to its T.
    fn freeze(&mut self) {
        let agent = self.agent.as_mut().expect("it froze");
        let pass = agent.filter.status().pass.expect("a resync is a pass");
        agent.pass = Some((pass.at, u64::MAX));
        for inflight in agent.inflight.values_mut() {
            if matches!(inflight.op, LocalOp::Change(_)) {
                inflight.frozen = Some(pass.at);
            }
        }
        self.stats.freezes += 1;
        self.stats.coalescing += u64::from(!pass.forwarding);
        self.trace.note(self.now, "freeze", &[pass.at.0, pass.total.0, u64::from(pass.forwarding)]);
        self.model.resolve(pass.at, self.shown.disk.content());
    }

    /// A pass only ever shrinks.
    fn watch_pass(&mut self) {
        let agent = self.agent.as_mut().expect("it is alive");
        let status = agent.filter.status();
        self.stats.held += u64::from(status.pass.is_some_and(|pass| pass.held_to.is_some()));
        match (&mut agent.pass, status.pass) {
            (Some((at, left)), Some(pass)) => {
                assert_eq!(*at, pass.at, "one pass follows the other unseen");
                assert!(pass.left.0 <= *left, "the pass at {at} grew from {left} to {} blocks", pass.left.0);
                *left = pass.left.0;
                assert!(pass.done <= pass.total, "a pass does no more than it is");
            }
            (None, None) => {}
            (known, found) => panic!("the running pass is {known:?} by its effects and is {found:?}"),
        }
    }

    /// A verify that ended found nothing: nothing happened behind the filter's back.
    fn watch_verify(&mut self) {
        let agent = self.agent.as_mut().expect("it is alive");
        if !agent.verifying {
            return;
        }
        let Some((report, Some(result))) = agent.filter.verify_state() else { return };
        agent.verifying = false;
        let one = self.plan.local_us + 2 * self.plan.tracking_us;
        agent.verify_shadow = self.now + one * (self.plan.depth + 2);
        if result.is_ok() {
            assert!(report.differing.is_empty(), "a false alarm: {report:?}");
            assert_eq!(report.compared, report.total, "the verify left something out");
            self.stats.verifies += 1;
        }
    }

    fn set_timer(&mut self) {
        let agent = self.agent.as_mut().expect("it is alive");
        let Some(deadline) = agent.filter.next_deadline() else { return };
        let at = micros_up(deadline).max(self.now);
        if agent.timer.is_none_or(|timer| timer > at) {
            agent.timer = Some(at);
            let (life, us) = (agent.life, at - self.now);
            self.after(us, Event::Tick(life));
        }
    }

    pub(crate) fn tick(&mut self, life: u64) {
        let Some(agent) = self.agent.as_mut().filter(|agent| agent.life == life) else { return };
        if agent.timer != Some(self.now) {
            return;
        }
        agent.timer = None;
        self.call(|filter, now| filter.tick(now));
        // What it began may have been the last thing that a detach waited for.
        let Some(agent) = self.agent.as_ref().filter(|agent| agent.life == life) else { return };
        let next = agent.filter.next_deadline().map_or(u64::MAX, micros_up);
        assert!(next > self.now, "a tick at the deadline leaves the deadline where it is");
        self.detach_when_quiet();
    }

    /// Sends the filter's next frame, if there is one and the link takes it.
    fn send_one(&mut self) -> bool {
        let now = self.moment();
        let agent = self.agent.as_mut().expect("it is alive");
        let Some(id) = agent.connection else { return false };
        let connection = self.connections.get_mut(&id).expect("it is connected");
        if !connection.welcomed || !agent.filter.has_to_send() {
            let above = agent.filter.last_lsn() > self.persisted.reserved;
            self.stats.unreserved_held += u64::from(connection.welcomed && above);
            return false;
        }
        let backlog_us = connection.up.free_at.saturating_sub(self.now);
        if backlog_us > self.plan.socket_buffer * 1_000_000 / self.link.bandwidth {
            if !connection.room_awaited {
                connection.room_awaited = true;
                self.after(backlog_us, Event::Room(id));
            }
            return false;
        }
        let Some((seq, message)) = agent.filter.poll_send(now) else { return false };
        connection.note_sent(seq, &message);
        check_reserved(self.persisted.reserved, &message);
        let (header, payload) = encode(seq, &message);
        self.trace.note(self.now, "send", &[id, seq, payload.len() as u64]);
        self.trace.say(self.now, || crate::link::brief(&message));
        self.transmit_up(id, &[&header[..], &payload].concat());
        true
    }

    pub(crate) fn room(&mut self, id: u64) {
        let Some(connection) = self.connections.get_mut(&id) else { return };
        connection.room_awaited = false;
        if self.agent.as_ref().is_some_and(|agent| agent.connection == Some(id)) {
            self.carry_out();
        }
    }
}

/// Whether the receiver is said to have less, or something else, than it once acknowledged.
fn is_of_a_rollback(alarm: &str) -> bool {
    ["rolled back", "lost the history", "another history", "cannot be continued", "was last written"]
        .iter()
        .any(|words| alarm.contains(words))
}

/// Never before the moment.
fn micros_up(moment: std::time::Duration) -> u64 {
    moment.as_nanos().div_ceil(1000) as u64
}
