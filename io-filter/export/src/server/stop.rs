//! Asking a task to come to an orderly end.

use std::cell::Cell;

use tokio::sync::Notify;

/// A request to stop that is made once and stays made.
#[derive(Debug, Default)]
pub(crate) struct Stop {
    requested: Cell<bool>,
    notify: Notify,
}

impl Stop {
    /// Asks.
    pub(crate) fn request(&self) {
        self.requested.set(true);
        self.notify.notify_waiters();
    }

    /// Whether it was asked.
    pub(crate) fn is_requested(&self) -> bool {
        self.requested.get()
    }

    /// Waits until it is asked.
    pub(crate) async fn requested(&self) {
        // One thread: nothing can be asked between the check and the first poll of the wait.
        if !self.is_requested() {
            self.notify.notified().await;
        }
    }
}
