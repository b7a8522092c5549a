//! The disk's io_uring on the disk's thread.
//!
//! What is pushed while a task runs is handed to the kernel in one system call when the ring's own task
//! runs next ([`RingDisk::due`], [`RingDisk::turn`]): a batch is whatever one read of a client's
//! socket, or one batch of completions, brought.
//!
//! Invariant: a request that does not fit into the ring waits in order; nothing is refused.

use std::{
    cell::{Cell, RefCell},
    collections::VecDeque,
    future::poll_fn,
    io,
    os::fd::{AsFd, AsRawFd, OwnedFd, RawFd},
    sync::Arc,
    task::{Context, Poll, Waker},
    time::Instant,
};

use backtide_storage::{Completion, ImageFile, Ring, RingOp};
use tokio::io::{Interest, unix::AsyncFd};

use super::{at_once::SLOW_WRITE, local::Purpose};

/// A disk's ring.
pub(crate) struct RingDisk {
    ring: RefCell<Ring<Purpose>>,
    /// Readable when the ring has something.
    event: AsyncFd<Event>,
    /// More than the ring has room for.
    waiting: RefCell<VecDeque<(RingOp, Purpose)>>,
    /// Something was pushed since the last turn.
    pushed: Cell<bool>,
    /// When a turn last brought back a request.
    ended: Cell<Option<Instant>>,
    /// The task that takes turns, while it waits.
    sleeper: RefCell<Option<Waker>>,
}

/// A descriptor of its own for the ring's event, so that it can be watched while the ring is used.
struct Event(OwnedFd);

impl AsRawFd for Event {
    fn as_raw_fd(&self) -> RawFd {
        self.0.as_raw_fd()
    }
}

#[expect(deprecated, reason = "unsound with what closes its descriptor early, which an OwnedFd never does")]
fn watch(event: Event) -> io::Result<AsyncFd<Event>> {
    AsyncFd::with_interest(event, Interest::READABLE)
}

impl RingDisk {
    /// On the thread that will use it, within its runtime.
    pub(crate) fn new(image: Arc<ImageFile>) -> io::Result<Self> {
        let ring = Ring::new(image)?;
        let event = watch(Event(ring.as_fd().try_clone_to_owned()?))?;
        Ok(Self {
            ring: RefCell::new(ring),
            event,
            waiting: RefCell::default(),
            pushed: Cell::new(false),
            ended: Cell::new(None),
            sleeper: RefCell::default(),
        })
    }

    /// Takes a request, or gives back what the ring cannot do.
    pub(crate) fn push(&self, op: RingOp, purpose: Purpose) -> Result<(), Purpose> {
        let mut ring = self.ring.borrow_mut();
        if !ring.takes(&op) {
            return Err(purpose);
        }
        let mut waiting = self.waiting.borrow_mut();
        if waiting.is_empty() && ring.has_room() {
            ring.push(op, purpose);
        } else {
            waiting.push_back((op, purpose));
        }
        self.wake();
        Ok(())
    }

    /// The next turn is due.
    pub(crate) fn wake(&self) {
        self.pushed.set(true);
        if let Some(sleeper) = self.sleeper.take() {
            sleeper.wake();
        }
    }

    /// Whether requests are under way of which none has ended lately.
    pub(crate) fn is_stuck(&self, now: Instant) -> bool {
        let ended_lately = self.ended.get().is_some_and(|ended| now < ended + SLOW_WRITE);
        !ended_lately && self.ring.borrow().under_way() > 0
    }

    /// Waits until a turn would bring something on.
    pub(crate) async fn due(&self) {
        poll_fn(|cx| self.poll_due(cx)).await;
        // Reads out of the page cache are complete at once, so this could go on without an end.
        tokio::task::coop::consume_budget().await;
    }

    fn poll_due(&self, cx: &mut Context<'_>) -> Poll<()> {
        let mut due = self.pushed.replace(false);
        // Trouble with the event would show at every turn; those go on.
        if let Poll::Ready(Ok(mut ready)) = self.event.poll_read_ready(cx) {
            ready.clear_ready();
            due = true;
        }
        if due {
            return Poll::Ready(());
        }
        *self.sleeper.borrow_mut() = Some(cx.waker().clone());
        Poll::Pending
    }

    /// Hands over what was pushed and appends what is complete.
    pub(crate) fn turn(&self, done: &mut Vec<Completion<Purpose>>) -> io::Result<()> {
        let mut ring = self.ring.borrow_mut();
        let mut waiting = self.waiting.borrow_mut();
        let before = done.len();
        let result = ring.turn(done);
        if done.len() > before {
            self.ended.set(Some(Instant::now()));
        }
        while ring.has_room()
            && let Some((op, purpose)) = waiting.pop_front()
        {
            ring.push(op, purpose);
            self.wake();
        }
        result
    }
}
