//! Marks of one disk: setting them, and hearing that the receiver has them durable.
//!
//! Invariant: a mark is told to be kept only when the receiver acknowledged it as durable. A mark that it
//! has not acknowledged goes with the window when that is given up, and is told to be lost then.

use std::{
    cell::{Cell, RefCell},
    rc::Rc,
};

use backtide_agent_api::MarkState;
use backtide_io_filter::{Filter, MarkError, Marked, Mode};
use backtide_units::{CaptureTime, Lsn};
use tokio::sync::oneshot;

use super::engine::Engine;

/// At most so many wait for their mark at the same time.
const WAITING_MAX: usize = 1024;

/// Where a mark landed.
#[derive(Clone, Copy, Debug)]
pub(crate) struct MarkAt {
    pub(crate) lsn: Lsn,
    pub(crate) time: CaptureTime,
    /// What stands between it and a point.
    pub(crate) state: MarkState,
}

/// Who waits for the receiver to have a mark.
#[derive(Debug, Default)]
pub(crate) struct MarkWaits {
    waits: RefCell<Vec<Wait>>,
    /// The mode and whether there was a stream when all of them were looked for in the window.
    looked_in: Cell<Option<(Mode, bool)>>,
}

#[derive(Debug)]
struct Wait {
    lsn: Lsn,
    label: String,
    answer: oneshot::Sender<MarkState>,
}

/// Marks the state now, while answers are held.
pub(super) fn mark(engine: &Rc<Engine>, label: &str) -> Result<MarkAt, MarkError> {
    engine.happen(|filter, now| {
        if !filter.holds_answers() {
            let disk = filter.settings().name.to_string();
            return Err(MarkError::HeldTooLong { disk });
        }
        let state = match (filter.is_connected(), filter.mode()) {
            (false, _) if filter.is_refused() => MarkState::Refused,
            (false, _) => MarkState::Away,
            (true, Mode::Sync) => MarkState::Unconfirmed,
            (true, Mode::Resync | Mode::Tracking | Mode::Paused | Mode::Detached) => MarkState::Resync,
        };
        let marked = filter.mark(now, label);
        // Whoever sets a mark goes to it, maybe at once.
        filter.hasten();
        marked.map(|Marked { lsn, time }| MarkAt { lsn, time, state })
    })
}

impl MarkWaits {
    /// Answers when the receiver has the mark, or nothing sends it any more.
    pub(super) fn wait(&self, filter: &Filter, lsn: Lsn, label: String, answer: oneshot::Sender<MarkState>) {
        if self.waits.borrow().len() < WAITING_MAX {
            self.waits.borrow_mut().push(Wait { lsn, label, answer });
            self.looked_in.set(None);
        }
        self.look(filter);
    }

    /// Something happened to the filter.
    pub(super) fn look(&self, filter: &Filter) {
        if self.waits.borrow().is_empty() {
            return;
        }
        // In sync nothing is given up, and a window is long: it is searched when something has changed.
        let now = (filter.mode(), filter.is_connected());
        let may_be_lost = self.looked_in.replace(Some(now)) != Some(now) && filter.mode() != Mode::Sync;
        let waits = self.waits.take();
        let mut still = Vec::with_capacity(waits.len());
        for wait in waits {
            let Wait { lsn, label, .. } = &wait;
            let state = if filter.has_durable_mark(*lsn, label) {
                Some(MarkState::Kept)
            } else if may_be_lost && !filter.retains_mark(*lsn, label) {
                Some(MarkState::Lost)
            } else {
                None
            };
            match state {
                // Who asked may have given up.
                Some(state) => drop(wait.answer.send(state)),
                None if wait.answer.is_closed() => {}
                None => still.push(wait),
            }
        }
        *self.waits.borrow_mut() = still;
    }
}
