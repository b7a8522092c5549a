//! Asking a connection's task to come to an orderly end, and its word that its client has left.

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
    /// The client waits for an export that is expected.
    awaits: Cell<bool>,
    /// The client has said its last: what it still is owed, nobody needs to wait for.
    left: Cell<bool>,
}

impl Stop {
    /// Asks.
    pub(crate) fn request(&self, ending: Ending) {
        self.requested.set(Some(ending));
        self.notify.notify_waiters();
    }

    /// The client asks for nothing more: it has hung up or said good-bye.
    pub(crate) fn client_left(&self) {
        self.left.set(true);
    }

    /// Whether it has.
    pub(crate) fn has_client_left(&self) -> bool {
        self.left.get()
    }

    /// The client of a handshake begins to wait for an export that is expected, or has waited.
    pub(crate) fn client_awaits(&self, awaits: bool) {
        self.awaits.set(awaits);
    }

    /// Whether it waits.
    pub(crate) fn is_awaiting(&self) -> bool {
        self.awaits.get()
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
