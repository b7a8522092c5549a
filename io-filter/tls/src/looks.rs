//! Who looks at files, and when: one thread for each folder, again and again and whenever somebody asks.
//!
//! What is asked for of a file system may never be answered. That is this thread's trouble alone: whoever asks waits for
//! it for a moment, and while it stands still not even that.
//!
//! Invariant: there is one look at a time, so that no more than one thread stands still.

use std::{
    io,
    sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError},
    time::{Duration, Instant},
};

use tokio::sync::watch;

/// Files are looked at this often though nobody asks: a renewal that failed is to be known before the next connection.
const EVERY: Duration = Duration::from_secs(10);

/// The looks of one thread.
pub(crate) struct Looks {
    asked: Mutex<Asked>,
    wake: Condvar,
    /// The newest question that a look has answered.
    answered: watch::Sender<u64>,
}

#[derive(Default)]
struct Asked {
    /// How often somebody did.
    newest: u64,
    /// Since when a look is under way.
    since: Option<Instant>,
    ended: bool,
}

impl Looks {
    /// None yet.
    pub(crate) fn new() -> Arc<Self> {
        let asked = Asked { newest: 1, ..Asked::default() };
        let (answered, _) = watch::channel(0);
        Arc::new(Self { asked: Mutex::new(asked), wake: Condvar::new(), answered })
    }

    /// Begins, with a first `look`.
    ///
    /// # Errors
    /// When there is no thread to be had.
    pub(crate) fn begin(self: Arc<Self>, mut look: impl FnMut() + Send + 'static) -> io::Result<()> {
        std::thread::Builder::new().name("certificates".to_owned()).spawn(move || {
            while let Some(question) = self.next() {
                look();
                self.asked().since = None;
                self.answered.send_replace(question);
            }
        })?;
        Ok(())
    }

    /// Waits for a question, or until it is time; none in the end.
    fn next(&self) -> Option<u64> {
        let answered = *self.answered.borrow();
        let idle = |asked: &mut Asked| asked.newest == answered && !asked.ended;
        let waited = self.wake.wait_timeout_while(self.asked(), EVERY, idle);
        let (mut asked, _) = waited.unwrap_or_else(PoisonError::into_inner);
        asked.since = Some(Instant::now());
        (!asked.ended).then_some(asked.newest)
    }

    /// Returns when a look has ended that began after this was called, or `patience` is over; at once while a look is under
    /// way for longer than that already.
    pub(crate) async fn look(&self, patience: Duration) {
        let question = {
            let mut asked = self.asked();
            if asked.since.is_some_and(|since| since.elapsed() > patience) {
                return;
            }
            asked.newest += 1;
            asked.newest
        };
        self.wake.notify_one();
        let mut answered = self.answered.subscribe();
        // It fails only when the time is over: what answers is kept by this.
        let _ = tokio::time::timeout(patience, answered.wait_for(|answered| *answered >= question)).await;
    }

    /// For how long a look has been under way.
    pub(crate) fn under_way(&self) -> Option<Duration> {
        self.asked().since.map(|since| since.elapsed())
    }

    /// The look that is under way is the last.
    pub(crate) fn end(&self) {
        self.asked().ended = true;
        self.wake.notify_one();
    }

    fn asked(&self) -> MutexGuard<'_, Asked> {
        self.asked.lock().unwrap_or_else(PoisonError::into_inner)
    }
}
