//! Asking a task to come to an orderly end.

use std::cell::Cell;

use tokio::sync::Notify;

/// What is to become of a connection's client.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Ending {
    /// A successor will serve it: what was not begun is left unanswered, and the client sends it
    /// again there. An answer would reach the guest as an error.
    HandOver,
    /// Nobody will serve it: what was not begun is answered with ESHUTDOWN.
    Final,
}

/// A request to stop that is made once and stays made.
#[derive(Debug, Default)]
pub(crate) struct Stop {
    requested: Cell<Option<Ending>>,
    notify: Notify,
}

impl Stop {
    /// Asks.
    pub(crate) fn request(&self, ending: Ending) {
        self.requested.set(Some(ending));
        self.notify.notify_waiters();
    }

    /// What was asked, if it was.
    pub(crate) fn asked(&self) -> Option<Ending> {
        self.requested.get()
    }

    /// Waits until it is asked.
    pub(crate) async fn requested(&self) -> Ending {
        loop {
            // One thread: nothing can be asked between the check and the first poll of the wait.
            match self.asked() {
                Some(ending) => return ending,
                None => self.notify.notified().await,
            }
        }
    }
}
