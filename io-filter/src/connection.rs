//! The connection to the receiver: the handshake's decision, what is sent, what comes back, and
//! what a lost stream means.

use backtide_protocol::{Hello, Message, PROTOCOL_VERSION, Ping, Reading, ReceiverState, Tracking, Welcome};
use backtide_units::{BlockRange, CaptureTime, Lsn, Reason};

use crate::{
    event::{Effect, Now},
    filter::{Filter, Link, Mode},
    freeze::PassPlan,
    hasten::Asked,
    pass::Phase,
    window::Acknowledged,
};

/// What follows from a handshake.
#[derive(Clone, Debug, PartialEq)]
pub(crate) enum Decision {
    /// The window continues the log: send it from here.
    Replay,
    /// The same, and then everything is compared: the log goes on, and what it holds is in doubt.
    ReplayAndCompare(PassPlan),
    /// The passive bitmap says what is missing.
    Bitmap,
    /// What was due anyway, or as much more as the receiver makes it.
    Due(PassPlan),
    /// The receiver's log is not what this agent thinks of it: the whole disk.
    Everything(PassPlan),
}

impl Filter {
    /// Whether the driver should try to connect.
    pub fn wants_connection(&self) -> bool {
        !matches!(self.mode, Mode::Paused | Mode::Detached)
    }

    /// The first frame of a new connection.
    pub fn hello(&self) -> Hello {
        let reason = self.reason.unwrap_or(Reason::ReceiverAway);
        let tracking = match (&self.lost, self.mode) {
            (_, Mode::Sync) => Tracking::Window { base: self.window.base() },
            (Some(_), _) if self.history.is_none() => Tracking::New,
            (Some(plan), _) => Tracking::Lost { reason: plan.reason },
            (None, _) => Tracking::Bitmap { gap_from: self.window.log_end(), reason },
        };
        Hello {
            version: PROTOCOL_VERSION,
            disk: self.settings.disk,
            name: self.settings.name.clone(),
            size: self.settings.size,
            epoch: self.settings.epoch,
            attach: self.settings.attach,
            history: self.history,
            tracking,
            next_lsn: self.last_lsn.next(),
            acked_durable: self.acked_durable,
            ack: None,
            on_outage: None,
            origin: None,
        }
    }

    /// The receiver accepted the hello, which was frame 1.
    pub fn connected(&mut self, now: Now, welcome: &Welcome) {
        self.observe(now);
        if !self.wants_connection() {
            return;
        }
        if let Some(why) = self.why_unacceptable(welcome) {
            self.alarm(format!("disk {}: {why}", self.settings.name));
            return self.refuse(why);
        }
        let continues = self.log_continues(welcome);
        let is_strange = self.stranger(welcome).is_some();
        let decision = self.decide(welcome);
        let is_another = matches!(decision, Decision::Everything(_)) && welcome.durable > Lsn::ZERO;
        self.known_until = None;
        self.link = Link::Up { next_seq: 2, received: 1, durable: 1, asked: Asked::default(), heard: None };
        self.history = Some(welcome.history);
        self.last_lsn = self.last_lsn.max(welcome.highest).max(welcome.durable);
        if is_strange || is_another {
            // What the disk had at these LSNs in its own life is not in that log: the timeline gets a hole there.
            self.last_lsn = self.last_lsn.next();
        }
        self.acked_durable = welcome.durable;
        self.acked_position = welcome.position;
        self.last_time = self.last_time.max(welcome.last_time.unwrap_or_default());
        self.acked_in_pass = false;
        self.welcomed();
        self.counters.connections += 1;
        self.receiver_is_alive();
        match decision {
            Decision::Replay => self.replay_from(welcome.durable),
            Decision::ReplayAndCompare(plan) => {
                self.replay_from(welcome.durable);
                self.lost = Some(self.merge_plan(plan));
            }
            Decision::Bitmap => self.go_on_or_restart(continues, welcome.durable),
            Decision::Due(plan) | Decision::Everything(plan) => {
                self.go_on_or_restart(continues, welcome.durable);
                self.enter(Mode::Tracking, Some(plan.reason));
                self.lost = Some(plan);
            }
        }
        self.pump();
    }

    fn replay_from(&mut self, durable: Lsn) {
        self.window.trim_to(durable);
        self.durable_lsn = self.durable_lsn.max(durable);
        self.received_lsn = self.received_lsn.max(durable);
        self.release_answers();
    }

    /// What makes a welcome one that cannot be: nothing may follow from it.
    fn why_unacceptable(&self, welcome: &Welcome) -> Option<String> {
        let Welcome { version, history, state, durable, highest, .. } = welcome;
        if *version != PROTOCOL_VERSION {
            return Some(format!(
                "the receiver speaks version {version} of the stream, expected {PROTOCOL_VERSION}"
            ));
        }
        if durable > highest || *highest > Lsn::PLAUSIBLE_MAX {
            return Some(format!("the receiver claims LSN {durable} of at most {highest}: that cannot be"));
        }
        if welcome.last_time.is_some_and(|last| last > CaptureTime::PLAUSIBLE_MAX) {
            return Some("the receiver claims a record of after the year 9999: that cannot be".to_owned());
        }
        let known = *state == ReceiverState::Known;
        (known && self.history != Some(*history))
            .then(|| format!("the receiver calls history {history} known, which this agent never named"))
    }

    /// Whether what the spill holds of the log is what comes next at the receiver. It is true history,
    /// whatever has become of the disk since: only what follows it has to be compared.
    fn log_continues(&self, welcome: &Welcome) -> bool {
        let is_own = welcome.state == ReceiverState::Known || self.is_in_doubt(welcome);
        self.window.holds_spill() && is_own && self.is_what_was_left(welcome)
    }

    /// Whether the receiver has all that it acknowledged, nothing was written to its log since, and what is retained comes next.
    fn is_what_was_left(&self, welcome: &Welcome) -> bool {
        !self.is_behind(welcome)
            && !self.is_newer(welcome)
            && self.stranger(welcome).is_none()
            && welcome.highest <= self.last_lsn
            && !welcome.in_pass
            && self.window.continues(welcome.durable)
    }

    /// Whether the receiver has this agent's history, and says itself that acknowledged bytes may be missing in it.
    fn is_in_doubt(&self, welcome: &Welcome) -> bool {
        let is_own = self.history == Some(welcome.history) && welcome.durable > Lsn::ZERO;
        welcome.state == ReceiverState::Foreign && is_own
    }

    /// Whether a log in doubt goes on with what is retained all the same: of what was acknowledged nothing is missing at its end.
    /// The first pass that it gets is then the one that compares everything: in sync nothing of another one is retained.
    fn doubt_is_continued(&self, welcome: &Welcome) -> bool {
        self.mode == Mode::Sync && self.is_what_was_left(welcome)
    }

    /// Whether nothing more is forwarded before everything was compared, whatever the receiver has.
    fn will_compare_everything(&self) -> bool {
        let is_all = self.lost.as_ref().is_some_and(|plan| plan.within.is_none());
        is_all && self.mode != Mode::Sync
    }

    /// Whether the receiver has records that were made after this agent's state was saved.
    fn is_newer(&self, welcome: &Welcome) -> bool {
        self.known_until.is_some_and(|until| welcome.last_time.is_some_and(|last| last > until))
    }

    /// Whether the receiver has less than it acknowledged as durable. Its LSN does not tell all: the blocks of
    /// a pass have none of their own.
    fn is_behind(&self, welcome: &Welcome) -> bool {
        welcome.durable < self.acked_durable || welcome.position < self.acked_position
    }

    /// The log at the receiver goes on with what is retained of it, or begins anew where it stands.
    fn go_on_or_restart(&mut self, continues: bool, durable: Lsn) {
        if continues {
            self.window.trim_to(durable);
            self.durable_lsn = self.durable_lsn.max(durable);
            self.received_lsn = self.received_lsn.max(durable);
            return;
        }
        self.window.abandon(&mut self.passive);
        self.window.restart_at(durable);
        self.durable_lsn = self.durable_lsn.min(durable);
    }

    /// The handshake's decisions, row by row.
    fn decide(&mut self, welcome: &Welcome) -> Decision {
        let name = &self.settings.name;
        match welcome.state {
            ReceiverState::New if self.history.is_none() => {
                Decision::Everything(PassPlan::everything(Reason::FirstAttach))
            }
            ReceiverState::New => self.lost_history(),
            // The welcome of an earlier connection got lost: the receiver knows the disk and has nothing of it.
            ReceiverState::Foreign if self.history.is_none() && welcome.durable == Lsn::ZERO => {
                Decision::Everything(PassPlan::everything(Reason::FirstAttach))
            }
            // The same, and then the agent died before it had noted the history that the receiver had begun for it. Nobody
            // else begins one of this disk: whoever takes it over names its history.
            ReceiverState::Foreign if self.history.is_none() => {
                Decision::Everything(PassPlan::compare(Reason::AgentCrashed))
            }
            // It began one anew in place of a lost one, has nothing of it yet, and the agent died before it had noted that.
            ReceiverState::Foreign if welcome.durable == Lsn::ZERO => self.lost_history(),
            ReceiverState::Foreign if self.is_in_doubt(welcome) => {
                self.alarm(format!(
                    "the receiver's log of disk {name} is damaged or in doubt, not all that was acknowledged is known to be in it: everything is compared"
                ));
                let plan = PassPlan::compare(Reason::Damaged);
                // What is retained is true history, whatever is to be said of what was before.
                match self.doubt_is_continued(welcome) {
                    true => Decision::ReplayAndCompare(plan),
                    false => Decision::Everything(plan),
                }
            }
            ReceiverState::Foreign => {
                self.alarm(format!(
                    "the receiver keeps another history of disk {name}: everything is compared"
                ));
                Decision::Everything(PassPlan::compare(Reason::ForeignHistory))
            }
            ReceiverState::Known if self.is_behind(welcome) => {
                self.alarm(format!(
                    "the receiver has disk {name} up to LSN {} (log entry {}) only, but acknowledged LSN {} (log entry {}) as durable: was its store rolled back?",
                    welcome.durable, welcome.position.0, self.acked_durable, self.acked_position.0
                ));
                Decision::Everything(PassPlan::compare(Reason::ReceiverRolledBack))
            }
            ReceiverState::Known if self.is_newer(welcome) => {
                self.alarm(format!(
                    "the receiver has records of disk {name} that are newer than this agent's state: was the state directory put back from a copy? everything is compared"
                ));
                Decision::Everything(PassPlan::compare(Reason::AgentRolledBack))
            }
            // An agent that died may have named LSNs in its hello that it had not noted yet, and sent nothing of them.
            ReceiverState::Known
                if welcome.highest > self.last_lsn && (self.lost.is_none() || self.mode == Mode::Sync) =>
            {
                self.alarm(format!(
                    "the receiver has LSN {} of disk {name}, this agent gave none above {}: was its state rolled back?",
                    welcome.highest, self.last_lsn
                ));
                Decision::Everything(PassPlan::compare(Reason::AgentRolledBack))
            }
            ReceiverState::Known if self.stranger(welcome).is_some() && !self.will_compare_everything() => {
                self.alarm(format!(
                    "the receiver's log of disk {name} was last written by an attach that this agent knows nothing of: was the receiver's store, or this agent's state directory, put back from a copy? everything is compared"
                ));
                Decision::Everything(PassPlan::compare(Reason::ForeignHistory))
            }
            ReceiverState::Known if self.mode == Mode::Sync => {
                if self.window.continues(welcome.durable) && !welcome.in_pass {
                    Decision::Replay
                } else {
                    self.alarm(format!(
                        "the receiver's log of disk {name} stands at LSN {}, where this agent's cannot be continued: everything is compared",
                        welcome.durable
                    ));
                    Decision::Everything(PassPlan::compare(Reason::ForeignHistory))
                }
            }
            ReceiverState::Known => match &self.lost {
                Some(plan) => Decision::Due(plan.clone().comparing()),
                None => Decision::Bitmap,
            },
        }
    }

    fn lost_history(&mut self) -> Decision {
        let name = &self.settings.name;
        self.alarm(format!(
            "the receiver has lost the history of disk {name}, or was told to forget it: it acknowledged everything up to LSN {} and knows nothing of it; everything is sent anew",
            self.acked_durable
        ));
        Decision::Everything(PassPlan::everything(Reason::ReceiverRolledBack))
    }

    fn alarm(&mut self, text: String) {
        self.effects.push_back(Effect::Alarm(text));
    }

    /// The next frame to send, when the transport can take one.
    pub fn poll_send(&mut self, now: Now) -> Option<(u64, Message)> {
        self.observe(now);
        let asks = self.next_hasten();
        let recalled = if self.is_connected() { self.recalled.pop_front() } else { None };
        let stamp = self.next_stamp();
        let Link::Up { next_seq, asked, heard, .. } = &mut self.link else { return None };
        let seq = *next_seq;
        let message = match (heard.take(), recalled, asks) {
            (heard @ Some(_), recalled, _) => {
                self.recalled.extend(recalled);
                Message::Ping(Ping { sent: Some(stamp), heard })
            }
            (None, Some(recalled), _) => recalled,
            (None, None, Some(durable)) => asked.asks(seq, durable, self.window.sent_end()),
            (None, None, None) => self.window.send(seq)?,
        };
        *next_seq += 1;
        if matches!(message, Message::PassData { .. }) {
            // Sent data leaves the buffer: there is room for more.
            self.retry_copies();
            self.pump();
        }
        Some((seq, message))
    }

    /// Whether [`poll_send`](Self::poll_send) would give a frame.
    pub fn has_to_send(&self) -> bool {
        let Link::Up { heard, .. } = &self.link else { return false };
        heard.is_some()
            || !self.recalled.is_empty()
            || self.window.has_unsent()
            || self.next_hasten().is_some()
    }

    /// Whether frames are out that the receiver has not acknowledged as durable.
    pub fn awaits_acknowledgement(&self) -> bool {
        self.is_connected() && self.window.awaits()
    }

    /// A message came from the receiver. Close is the driver's: it ends with
    /// [`disconnected`](Self::disconnected).
    pub fn receive(&mut self, now: Now, message: Message) {
        self.observe(now);
        match message {
            Message::Ack { received, durable, position } => {
                self.acknowledged(received, durable);
                self.acked_position = self.acked_position.max(position);
            }
            Message::CompareResult(result) => self.compared(result),
            Message::Ping(ping) => {
                if let Link::Up { heard, .. } = &mut self.link {
                    *heard = ping.sent;
                }
            }
            Message::Reading(Reading::Fetch { id, range }) => self.asked_for(id, range),
            Message::Hello(_)
            | Message::Welcome(_)
            | Message::Record(_)
            | Message::Flush { .. }
            | Message::Unchanged { .. }
            | Message::PassBegin { .. }
            | Message::PassData { .. }
            | Message::PassEnd { .. }
            | Message::Mark { .. }
            | Message::Hasten { .. }
            | Message::Compare(_)
            | Message::Reading(_)
            | Message::Close(_) => self.refuse(format!("the receiver sent an unexpected {}", message.name())),
        }
        self.pump();
    }

    /// The stream is lost, whoever ended it.
    pub fn disconnected(&mut self, now: Now) {
        self.observe(now);
        if !self.is_connected() {
            return;
        }
        self.link = Link::Down;
        self.hole_is_open = false;
        self.forget_recalls();
        // The receiver keeps the reason of the pass that it has.
        let has_begun = std::mem::take(&mut self.acked_in_pass);
        self.give_up_scan();
        match self.mode {
            Mode::Sync => self.window.rewind(),
            Mode::Resync => {
                self.abort_pass();
                let first = self.reason.filter(|_| !has_begun);
                self.enter(Mode::Tracking, Some(first.unwrap_or(Reason::ResyncInterrupted)));
            }
            Mode::Tracking | Mode::Paused | Mode::Detached if self.window.holds_spill() => {
                self.window.rewind();
            }
            Mode::Tracking | Mode::Paused | Mode::Detached => self.window.abandon(&mut self.passive),
        }
        self.interrupt_verify();
        self.retry_copies();
        self.release_answers_after_outage();
        self.keep_spilling();
    }

    fn acknowledged(&mut self, received: u64, durable: u64) {
        let Link::Up { next_seq, received: known_received, durable: known_durable, .. } = &mut self.link
        else {
            return;
        };
        let valid = durable <= received && received < *next_seq;
        if !valid || received < *known_received || durable < *known_durable {
            let sent = *next_seq - 1;
            return self
                .refuse(format!("the receiver acknowledged frames {received}/{durable} of {sent} sent"));
        }
        let progress = (received, durable) != (*known_received, *known_durable);
        (*known_received, *known_durable) = (received, durable);
        if progress {
            self.refused = false;
            self.receiver_is_alive();
        }
        if let Some(lsn) = self.window.received(received) {
            self.received_lsn = self.received_lsn.max(lsn);
        }
        self.trim_spill_too_early();
        let mut pass_ended = false;
        while let Some(item) = self.window.pop_durable(durable) {
            pass_ended |= self.note_durable(item);
        }
        if pass_ended {
            self.finish_pass();
        }
        self.release_answers();
    }

    /// Whether the running pass has its end durable now.
    fn note_durable(&mut self, item: Acknowledged) -> bool {
        match item {
            Acknowledged::Record(lsn, bytes) => {
                self.acked_durable = lsn;
                self.counters.bytes_durable += bytes.0;
                if !self.acked_in_pass {
                    self.durable_lsn = lsn;
                }
            }
            Acknowledged::Data(bytes) => {
                self.counters.resync_bytes_durable += bytes.0;
                if let Some(pass) = &mut self.pass {
                    pass.moving = pass.moving.saturating_sub(bytes.0);
                }
            }
            Acknowledged::Zeroes(bytes) => self.counters.resync_bytes_durable += bytes.0,
            Acknowledged::PassBegin(at) => {
                self.acked_durable = at;
                self.acked_in_pass = true;
            }
            Acknowledged::PassEnd(at, valid_from) => {
                // Without a point at its end what follows is none either, up to the end of the next pass.
                self.acked_in_pass = valid_from.is_none();
                if valid_from.is_some() {
                    self.durable_lsn = self.acked_durable;
                }
                return self.pass.as_ref().is_some_and(|pass| pass.at == at && pass.phase == Phase::Ended);
            }
            Acknowledged::Mark(lsn, label) => self.mark_is_durable(lsn, label),
            Acknowledged::Other => {}
        }
        false
    }

    pub(crate) fn refuse(&mut self, why: String) {
        self.effects.push_back(Effect::Disconnect { why });
    }

    /// What a pass had not made durable is dirty again.
    pub(crate) fn abort_pass(&mut self) {
        let pass = self.pass.take().expect("the caller has one");
        self.passive.union_with(&pass.active);
        self.passive_zeroes.union_with(&pass.zeroes);
        for pending in pass.compares.values() {
            for range in pending.ranges() {
                self.passive.insert(BlockRange::touched_by(range));
            }
        }
        self.passive_compare |= pass.compare;
        self.window.abandon(&mut self.passive);
        self.counters.passes_aborted += 1;
        self.pace.set_free(false);
    }
}
