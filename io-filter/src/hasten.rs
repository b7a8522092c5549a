//! When the receiver is told that somebody waits: it gathers what it makes durable otherwise, and
//! acknowledges along with that, for each sync slows down all that share its device.
//!
//! Waiting are a guest by its acknowledgement policy, from the beginning of its flush on, everybody when the window grows, and whoever takes the
//! disk away ([`Filter::hasten`]). Invariant: for each answer that waits the receiver is asked once, after
//! the record has been sent; a lost stream forgets what was asked, for everything is sent again.

use backtide_protocol::Message;
use backtide_units::Lsn;

use crate::{
    event::AckPolicy,
    filter::{Filter, Link, Mode},
};

/// While frames flow without a pause, who waits is asked for after so many of them.
const FRAMES_BETWEEN: u64 = 64;

/// Above this part of the window nothing is gathered any more.
const WINDOW_PART: u64 = 4;

/// What the receiver was asked on this connection.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(crate) struct Asked {
    /// Whoever waits for an LSN up to here has been asked for.
    lsn: Lsn,
    /// The frame that asked last.
    frame: u64,
    /// The frame that last asked to hear that everything is durable.
    durable: u64,
    /// Somebody waits for all of it.
    wanted: bool,
}

impl Asked {
    /// The question, as frame `seq`, when everything up to `sent_end` has been sent.
    pub(crate) fn asks(&mut self, seq: u64, durable: bool, sent_end: Lsn) -> Message {
        self.lsn = sent_end;
        self.frame = seq;
        if durable {
            self.durable = seq;
            self.wanted = false;
        }
        Message::Hasten { durable }
    }
}

impl Filter {
    /// A guest's flush begins. Where its answer will wait for the receiver too, both devices are at it at the
    /// same time.
    pub(crate) fn hasten_for_flush(&mut self, covers: Lsn) {
        let waits = match self.settings.ack {
            AckPolicy::Local | AckPolicy::Received => false,
            AckPolicy::Durable | AckPolicy::DurableEveryWrite => self.durable_lsn < covers,
        };
        if waits && self.mode == Mode::Sync {
            self.hasten();
        }
    }

    /// Somebody waits for everything sent so far to be durable.
    pub fn hasten(&mut self) {
        if let Link::Up { asked, .. } = &mut self.link {
            asked.wanted = true;
        }
    }

    /// Whether what there is to send may stay here for a moment, so that it goes out along with what follows: it is little,
    /// and nobody waits for it.
    pub fn may_gather(&self) -> bool {
        let Link::Up { asked, heard, .. } = &self.link else { return false };
        let nobody_waits = !asked.wanted && heard.is_none() && !self.acknowledgements.waits_for_receiver();
        let roomy = self.window.retained_bytes().0 < self.settings.window_bytes.0 / WINDOW_PART;
        self.mode == Mode::Sync
            && nobody_waits
            && roomy
            && self.recalled.is_empty()
            && self.window.has_little_unsent()
    }

    /// Whether to ask now, before anything else is sent, and whether to hear of what is durable.
    pub(crate) fn next_hasten(&self) -> Option<bool> {
        let Link::Up { next_seq, durable, asked, .. } = &self.link else { return None };
        let last = *next_seq - 1;
        let unsent = self.window.has_unsent();
        let sent_end = self.window.sent_end();
        if !unsent || last >= asked.frame + FRAMES_BETWEEN {
            let waits = self.acknowledgements.waits_between(asked.lsn, sent_end);
            if waits.is_some() {
                return waits;
            }
        }
        let news = last > asked.durable && *durable < last;
        let answered = *durable >= asked.durable;
        let pressed = self.window.retained_bytes().0 >= self.settings.window_bytes.0 / WINDOW_PART
            || self.window.is_held_back()
            || (asked.wanted && !unsent);
        (pressed && news && answered).then_some(true)
    }
}
