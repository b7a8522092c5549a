//! When the guest hears that its change is done: by the acknowledgement policy, and slowed down a
//! little when the window fills faster than the receiver empties it.
//!
//! Invariant: while the receiver is away no answer waits for it unless the policy says `block`; the
//! delay, for the receiver or for the spill, never exceeds the configured bound.

use std::{
    collections::{BTreeMap, VecDeque},
    time::Duration,
};

use backtide_units::Lsn;
use rustix::io::Errno;

use crate::{
    event::{AckPolicy, Effect, IoFailure, Now, OnOutage, RequestId},
    filter::{Filter, Mode},
};

/// What an answer waits for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Need {
    Received,
    Durable,
}

/// Answers held for a mark, and until when at the most.
#[derive(Clone, Debug)]
struct Held {
    answers: Vec<(RequestId, Lsn)>,
    until: Duration,
}

/// The longest a mark over several disks may hold a guest.
const HOLD_MAX: Duration = Duration::from_secs(1);

/// Answers held back.
#[derive(Clone, Debug, Default)]
pub(crate) struct Acknowledgements {
    /// By LSN, until the receiver has come so far.
    waiting: BTreeMap<(Lsn, RequestId), Need>,
    /// When those began to wait.
    since: VecDeque<(Duration, Lsn, RequestId)>,
    /// An answer has waited too long and the receiver has said nothing since: it counts as away.
    stalled: bool,
    /// By the end of their delay; since when, and how long the change had been held up before.
    delayed: BTreeMap<(Duration, RequestId), (Lsn, Duration, Duration)>,
    /// Held for a consistency-group mark.
    held: Option<Held>,
    /// The disk is given up though a guest waits: from now on whoever would wait is told so.
    refusing: bool,
}

/// What a guest is told whose disk is given up while it waits for the receiver. Its change is on the local disk all the
/// same.
const GIVEN_UP: IoFailure = IoFailure { errno: Errno::SHUTDOWN.raw_os_error() };

impl Acknowledgements {
    pub(crate) fn next_deadline(&self) -> Option<Duration> {
        let delayed = self.delayed.first_key_value().map(|((deadline, _), _)| *deadline);
        let held = self.held.as_ref().map(|held| held.until);
        [delayed, held].into_iter().flatten().min()
    }

    /// When the oldest waiting answer began to wait.
    fn oldest_wait(&mut self) -> Option<Duration> {
        while let Some((since, lsn, request)) = self.since.front().copied() {
            if self.waiting.contains_key(&(lsn, request)) {
                return Some(since);
            }
            self.since.pop_front();
        }
        None
    }

    /// Whether an answer waits for what lies above `asked` and at or below `sent`, and whether for it to be
    /// durable.
    pub(crate) fn waits_between(&self, asked: Lsn, sent: Lsn) -> Option<bool> {
        if self.waiting.is_empty() || asked >= sent {
            return None;
        }
        let between = (asked.next(), RequestId(0))..=(sent, RequestId(u64::MAX));
        let mut needs = self.waiting.range(between).map(|(_, need)| *need == Need::Durable);
        let first = needs.next()?;
        Some(first || needs.any(|durable| durable))
    }

    /// Whether an answer waits for the receiver.
    pub(crate) fn waits_for_receiver(&self) -> bool {
        !self.waiting.is_empty()
    }

    /// Answers that wait for the receiver, or for their delay to be over.
    pub(crate) fn waiting(&self) -> usize {
        self.waiting.len() + self.delayed.len()
    }
}

impl Filter {
    /// The change `lsn` is done locally; answer its request when the policy allows.
    /// It was held up for `delayed` already: the bound is for all delays of a change together.
    pub(crate) fn answer(&mut self, request: RequestId, lsn: Lsn, stable: bool, delayed: Duration) {
        self.note_delay(delayed);
        let need = match self.settings.ack {
            AckPolicy::Local => None,
            AckPolicy::Received => Some(Need::Received),
            AckPolicy::Durable => stable.then_some(Need::Durable),
            AckPolicy::DurableEveryWrite => Some(Need::Durable),
        };
        match need {
            None => self.answer_after_delay(request, lsn, delayed),
            Some(need) if self.is_met(need, lsn) => self.complete(request, lsn),
            Some(_) if self.acknowledgements.refusing => self.refuse_answer(request),
            Some(need) if self.is_in_sync() || self.settings.on_outage == OnOutage::Block => {
                self.acknowledgements.waiting.insert((lsn, request), need);
                self.acknowledgements.oldest_wait();
                self.acknowledgements.since.push_back((self.now.monotonic, lsn, request));
            }
            Some(_) => {
                self.counters.degraded_answers += 1;
                self.complete(request, lsn);
            }
        }
    }

    /// The receiver has come further, or the mode has changed.
    pub(crate) fn release_answers(&mut self) {
        if !self.acknowledgements.waiting.is_empty() {
            let waiting = std::mem::take(&mut self.acknowledgements.waiting);
            for ((lsn, request), need) in waiting {
                if self.is_met(need, lsn) {
                    self.complete(request, lsn);
                } else {
                    self.acknowledgements.waiting.insert((lsn, request), need);
                }
            }
        }
        if !self.acknowledgements.delayed.is_empty() && self.delay_now().is_zero() {
            for ((_, request), delayed) in std::mem::take(&mut self.acknowledgements.delayed) {
                self.complete_delayed(request, delayed);
            }
        }
    }

    /// The receiver has acknowledged something: it is there.
    pub(crate) fn receiver_is_alive(&mut self) {
        self.acknowledgements.stalled = false;
    }

    /// When a receiver that says nothing counts as away, if somebody waits for it.
    pub(crate) fn next_stall(&self) -> Option<Duration> {
        let waits =
            self.settings.on_outage == OnOutage::Continue && !self.acknowledgements.waiting.is_empty();
        let since = self.acknowledgements.since.front().map(|(since, _, _)| *since);
        since.filter(|_| waits).map(|since| since + self.settings.outage_after)
    }

    /// The guest does not wait for ever for a receiver that hangs.
    fn give_up_on_a_silent_receiver(&mut self) {
        let Some(since) = self.acknowledgements.oldest_wait() else { return };
        let late = self.now.monotonic >= since + self.settings.outage_after;
        if late && self.settings.on_outage == OnOutage::Continue {
            self.acknowledgements.stalled = true;
            self.release_answers_after_outage();
        }
    }

    /// The receiver cannot be waited for any more.
    pub(crate) fn release_answers_after_outage(&mut self) {
        if self.settings.on_outage == OnOutage::Continue {
            for ((lsn, request), _) in std::mem::take(&mut self.acknowledgements.waiting) {
                self.counters.degraded_answers += 1;
                self.complete(request, lsn);
            }
        }
        self.release_answers();
    }

    /// The disk is given up though its guest waits for the receiver: these requests fail, and so do later ones
    /// that would wait. How many fail now.
    pub fn give_up_answers(&mut self, now: Now) -> u64 {
        self.observe(now);
        self.acknowledgements.refusing = true;
        let waiting = std::mem::take(&mut self.acknowledgements.waiting);
        for (_, request) in waiting.keys() {
            self.refuse_answer(*request);
        }
        waiting.len() as u64
    }

    fn refuse_answer(&mut self, request: RequestId) {
        self.effects.push_back(Effect::Complete { request, result: Err(GIVEN_UP) });
    }

    pub(crate) fn release_due_answers(&mut self) {
        let now = self.now.monotonic;
        self.give_up_on_a_silent_receiver();
        if self.acknowledgements.held.as_ref().is_some_and(|held| held.until <= now) {
            self.give_held_answers();
        }
        while let Some(entry) = self.acknowledgements.delayed.first_entry() {
            if entry.key().0 > now {
                break;
            }
            let ((_, request), delayed) = entry.remove_entry();
            self.complete_delayed(request, delayed);
        }
    }

    /// Holds all answers from now on: part of a mark over several disks. What the guest has not
    /// heard of, nobody can have built upon. After a second the guest gets them all the same.
    pub fn hold_answers(&mut self, now: Now) {
        self.observe(now);
        let until = self.now.monotonic + HOLD_MAX;
        self.acknowledgements.held.get_or_insert(Held { answers: Vec::new(), until });
    }

    /// Whether answers are being held.
    pub fn holds_answers(&self) -> bool {
        self.acknowledgements.held.is_some()
    }

    /// Gives the held answers. Whether they were held until now: if not, a guest may have built upon one.
    pub fn give_held_answers(&mut self) -> bool {
        let Some(held) = self.acknowledgements.held.take() else { return false };
        for (request, lsn) in held.answers {
            self.complete(request, lsn);
        }
        true
    }

    fn answer_after_delay(&mut self, request: RequestId, lsn: Lsn, delayed: Duration) {
        let delay = self.delay_now().min(self.settings.guest_delay_max.saturating_sub(delayed));
        if delay.is_zero() {
            return self.complete(request, lsn);
        }
        self.counters.delayed_answers += 1;
        let now = self.now.monotonic;
        self.acknowledgements.delayed.insert((now + delay, request), (lsn, now, delayed));
    }

    fn complete_delayed(&mut self, request: RequestId, (lsn, since, before): (Lsn, Duration, Duration)) {
        self.note_delay(before + self.now.monotonic.saturating_sub(since));
        self.complete(request, lsn);
    }

    /// What a change really was held up for, not what was meant.
    fn note_delay(&mut self, delay: Duration) {
        let delay_us = u64::try_from(delay.as_micros()).unwrap_or(u64::MAX);
        self.counters.guest_delay_us_max = self.counters.guest_delay_us_max.max(delay_us);
    }

    /// None while the window is less than half full, then growing to the bound at a full window.
    fn delay_now(&self) -> Duration {
        let somebody_catches_up = self.is_connected() || self.is_spilling();
        if !somebody_catches_up || !self.is_forwarding() {
            return Duration::ZERO;
        }
        let half = self.settings.window_bytes.0 / 2;
        let over = self.window.retained_bytes().0.saturating_sub(half).min(half);
        let bound_us = u64::try_from(self.settings.guest_delay_max.as_micros()).unwrap_or(u64::MAX);
        let share = u128::from(bound_us) * u128::from(over) / u128::from(half.max(1));
        Duration::from_micros(u64::try_from(share).unwrap_or(bound_us))
    }

    fn is_in_sync(&self) -> bool {
        self.mode == Mode::Sync && self.is_connected() && !self.acknowledgements.stalled
    }

    fn is_met(&self, need: Need, lsn: Lsn) -> bool {
        self.mode == Mode::Sync
            && match need {
                Need::Received => self.received_lsn.max(self.durable_lsn) >= lsn,
                Need::Durable => self.durable_lsn >= lsn,
            }
    }

    fn complete(&mut self, request: RequestId, lsn: Lsn) {
        match &mut self.acknowledgements.held {
            Some(held) => held.answers.push((request, lsn)),
            None => self.effects.push_back(Effect::Complete { request, result: Ok(lsn) }),
        }
    }
}
