//! Marks of one disk: setting them, and hearing that the receiver has them durable.
//!
//! Invariant: a mark is told to be kept only when the receiver acknowledged it as durable. A mark that it
//! has not acknowledged goes with the window when that overflows.

use std::{cell::RefCell, rc::Rc};

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
pub(crate) struct MarkWaits(RefCell<Vec<Wait>>);

#[derive(Debug)]
struct Wait {
    lsn: Lsn,
    label: String,
    answer: oneshot::Sender<bool>,
}

/// Marks the state now, while answers are held.
pub(super) fn mark(engine: &Rc<Engine>, label: &str) -> Result<MarkAt, MarkError> {
    engine.happen(|filter, now| {
        if !filter.holds_answers() {
            let disk = filter.settings().name.to_string();
            return Err(MarkError::HeldTooLong { disk });
        }
        let state = match (filter.is_connected(), filter.mode()) {
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
    /// Answers when the receiver has the mark, or when the disk is out of sync and it may be lost.
    pub(super) fn wait(&self, filter: &Filter, lsn: Lsn, label: String, answer: oneshot::Sender<bool>) {
        if self.0.borrow().len() < WAITING_MAX {
            self.0.borrow_mut().push(Wait { lsn, label, answer });
        }
        self.look(filter);
    }

    /// Something happened to the filter.
    pub(super) fn look(&self, filter: &Filter) {
        if self.0.borrow().is_empty() {
            return;
        }
        let waits = self.0.take();
        let mut still = Vec::with_capacity(waits.len());
        for wait in waits {
            let kept = filter.has_durable_mark(wait.lsn, &wait.label);
            if kept || filter.mode() != Mode::Sync {
                // Who asked may have given up.
                let _ = wait.answer.send(kept);
            } else if !wait.answer.is_closed() {
                still.push(wait);
            }
        }
        *self.0.borrow_mut() = still;
    }
}
