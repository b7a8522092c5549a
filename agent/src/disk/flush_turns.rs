//! Flushes that everybody shares who waits for one at the same time.
//!
//! Invariant: what the server had answered before [`share`](FlushTurns::share) was called is stable once that has
//! succeeded. A flush began since and succeeded, and the server has refused none meanwhile: one that it refuses may cost
//! it whatever it had not made stable, and the next that succeeds says nothing of it.

use std::cell::Cell;

use backtide_io_filter::IoFailure;
use tokio::sync::Notify;

use super::local::EIO;

/// The flushes of one server.
#[derive(Default)]
pub(super) struct FlushTurns {
    /// One of these flushes is under way.
    running: Cell<bool>,
    /// How many have begun, one after the other: the number of the last one.
    begun: Cell<u64>,
    /// The last one that has ended, and the last that succeeded.
    ended: Cell<u64>,
    stable: Cell<u64>,
    /// Why the last one failed that did.
    failure: Cell<Option<IoFailure>>,
    /// How many flushes of any kind the server has refused.
    refused: Cell<u64>,
    turn_over: Notify,
}

/// How many flushes had been refused at some moment.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Refusals(u64);

/// The flush that is under way, until this goes.
struct Turn<'turns>(&'turns FlushTurns);

impl Drop for Turn<'_> {
    fn drop(&mut self) {
        self.0.running.set(false);
        self.0.turn_over.notify_waiters();
    }
}

impl FlushTurns {
    /// Before anything is written that is to be stable.
    pub(super) fn refusals(&self) -> Refusals {
        Refusals(self.refused.get())
    }

    /// The server has refused a flush, of this kind or another.
    pub(super) fn is_refused(&self) {
        self.refused.set(self.refused.get() + 1);
    }

    /// Makes stable what was answered before, which was begun when there were these refusals.
    ///
    /// # Errors
    /// When that is not sure: it has to be written again.
    pub(super) async fn share<F>(&self, before: Refusals, flush: impl Fn() -> F) -> Result<(), IoFailure>
    where
        F: Future<Output = Result<(), IoFailure>>,
    {
        // One that is under way may have begun before the last answer.
        let wanted = self.begun.get() + 1;
        loop {
            // Before the look, so that nothing is missed after it.
            let over = self.turn_over.notified();
            if self.ended.get() >= wanted {
                let is_stable = self.stable.get() >= wanted && self.refusals() == before;
                let failure = || self.failure.get().unwrap_or(IoFailure { errno: EIO });
                return if is_stable { Ok(()) } else { Err(failure()) };
            }
            if self.running.replace(true) {
                over.await;
                continue;
            }
            let turn = Turn(self);
            let number = self.begun.get() + 1;
            self.begun.set(number);
            match flush().await {
                Ok(()) => self.stable.set(number),
                Err(failure) => self.failure.set(Some(failure)),
            }
            self.ended.set(number);
            drop(turn);
        }
    }
}

#[cfg(test)]
mod tests {
    use std::{cell::RefCell, collections::VecDeque, rc::Rc};

    use tokio::{
        sync::oneshot,
        task::{JoinHandle, LocalSet, spawn_local},
    };

    use super::*;

    /// Flushes that end when a test says so.
    #[derive(Default)]
    struct Server {
        turns: FlushTurns,
        begun: RefCell<VecDeque<oneshot::Sender<Result<(), IoFailure>>>>,
        has_begun: Notify,
    }

    impl Server {
        fn ask(self: &Rc<Self>) -> JoinHandle<Result<(), IoFailure>> {
            let (server, before) = (Rc::clone(self), self.turns.refusals());
            spawn_local(async move {
                let flush = || async {
                    let (end, ended) = oneshot::channel();
                    server.begun.borrow_mut().push_back(end);
                    server.has_begun.notify_one();
                    let flushed = ended.await.unwrap();
                    if flushed.is_err() {
                        server.turns.is_refused();
                    }
                    flushed
                };
                server.turns.share(before, flush).await
            })
        }

        /// Waits until a flush has begun; what ends it.
        async fn next(&self) -> oneshot::Sender<Result<(), IoFailure>> {
            loop {
                if let Some(end) = self.begun.borrow_mut().pop_front() {
                    return end;
                }
                self.has_begun.notified().await;
            }
        }
    }

    #[tokio::test]
    async fn who_comes_while_one_is_under_way_shares_the_next() {
        LocalSet::new()
            .run_until(async {
                let server = Rc::new(Server::default());
                let first = server.ask();
                let end = server.next().await;
                let late = [server.ask(), server.ask(), server.ask()];
                tokio::task::yield_now().await;
                end.send(Ok(())).unwrap();
                assert_eq!(first.await.unwrap(), Ok(()));
                let end = server.next().await;
                assert!(late.iter().all(|asked| !asked.is_finished()), "the first began before they asked");
                end.send(Ok(())).unwrap();
                for asked in late {
                    assert_eq!(asked.await.unwrap(), Ok(()));
                }
                assert_eq!(server.turns.begun.get(), 2);
            })
            .await;
    }

    #[tokio::test]
    async fn a_flush_that_was_refused_meanwhile_makes_the_next_one_worth_nothing() {
        LocalSet::new()
            .run_until(async {
                let server = Rc::new(Server::default());
                let first = server.ask();
                let end = server.next().await;
                let late = server.ask();
                tokio::task::yield_now().await;
                end.send(Err(IoFailure { errno: 28 })).unwrap();
                assert_eq!(first.await.unwrap(), Err(IoFailure { errno: 28 }));
                server.next().await.send(Ok(())).unwrap();
                assert!(late.await.unwrap().is_err(), "what it had written may be lost with the first");
                let again = server.ask();
                server.next().await.send(Ok(())).unwrap();
                assert_eq!(again.await.unwrap(), Ok(()));
            })
            .await;
    }
}
