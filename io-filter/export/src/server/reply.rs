//! The way back: a reply is completed by whoever did the work and queued for its connection.

use std::{
    cell::{Cell, RefCell},
    io,
    pin::Pin,
    rc::Rc,
    task::{Context, Poll, Waker},
};

use backtide_nbd::server::{ReplyEncoder, ReplyTo};
use backtide_nbd::{Cookie, DirtyExtent, Extent, NbdError};
use backtide_units::ByteCount;
use bytes::Bytes;
use tokio::io::AsyncWrite;

use crate::output::Output;

/// The half of a connection that replies reach: its output queue and what is in flight.
#[derive(Debug)]
pub(crate) struct Channel {
    encoder: ReplyEncoder,
    output: RefCell<Output>,
    requests: Cell<usize>,
    /// Requests whose reply is not even queued.
    unanswered: Cell<usize>,
    bytes: Cell<u64>,
    /// The connection's task, while it sleeps and nobody has woken it yet.
    sleeper: RefCell<Option<Waker>>,
    /// Nothing can be sent any more.
    dead: Cell<bool>,
}

impl Channel {
    pub(crate) fn new(encoder: ReplyEncoder) -> Rc<Self> {
        Rc::new(Self {
            encoder,
            output: RefCell::default(),
            requests: Cell::new(0),
            unanswered: Cell::new(0),
            bytes: Cell::new(0),
            sleeper: RefCell::new(None),
            dead: Cell::new(false),
        })
    }

    /// A request that holds `cost` bytes until its reply is sent.
    pub(crate) fn begin(self: &Rc<Self>, to: ReplyTo, cost: ByteCount) -> Reply {
        self.requests.set(self.requests.get() + 1);
        self.unanswered.set(self.unanswered.get() + 1);
        self.bytes.set(self.bytes.get() + cost.0);
        Reply { channel: Rc::clone(self), to, cost, answered: false }
    }

    /// Requests in flight.
    pub(crate) fn requests(&self) -> usize {
        self.requests.get()
    }

    /// Requests in flight whose reply is not queued yet.
    pub(crate) fn unanswered(&self) -> usize {
        self.unanswered.get()
    }

    /// How many bytes were ever written.
    pub(crate) fn written(&self) -> u64 {
        self.output.borrow().written()
    }

    /// Bytes of requests in flight, with what was kept for their replies.
    pub(crate) fn bytes(&self) -> ByteCount {
        ByteCount(self.bytes.get())
    }

    /// Queues a refusal of something that never was in flight for anybody else.
    pub(crate) fn refuse(self: &Rc<Self>, to: ReplyTo, error: NbdError) {
        self.begin(to, ByteCount::ZERO).fail(error);
    }

    /// Sends what can be sent. Ready when nothing is queued, here or in the stream.
    pub(crate) fn poll_write<S: AsyncWrite>(
        &self,
        cx: &mut Context<'_>,
        mut stream: Pin<&mut S>,
    ) -> Poll<io::Result<()>> {
        let (result, released) = self.output.borrow_mut().poll_write(cx, stream.as_mut());
        self.requests.set(self.requests.get() - released.messages);
        self.bytes.set(self.bytes.get() - released.cost);
        // TLS holds back what its socket does not take; other streams have nothing to flush.
        if let Poll::Ready(Ok(())) = result { stream.poll_flush(cx) } else { result }
    }

    /// The next completion wakes `waker`, once.
    pub(crate) fn sleep(&self, waker: &Waker) {
        *self.sleeper.borrow_mut() = Some(waker.clone());
    }

    /// Completions wake nobody: the task is running.
    pub(crate) fn awake(&self) {
        self.sleeper.take();
    }

    /// The connection is gone: later completions are dropped.
    pub(crate) fn bury(&self) {
        self.dead.set(true);
        self.output.take();
        self.sleeper.take();
    }

    fn queue(&self, cost: ByteCount, data: Bytes, encode: impl FnOnce(ReplyEncoder, &mut bytes::BytesMut)) {
        self.unanswered.set(self.unanswered.get() - 1);
        if self.dead.get() {
            return;
        }
        let encoder = self.encoder;
        self.output.borrow_mut().push(cost.0, data, |out| encode(encoder, out));
        if let Some(sleeper) = self.sleeper.take() {
            sleeper.wake();
        }
    }
}

/// The answer owed to one request. Completing it queues the answer and wakes the connection.
///
/// Dropped without being completed it answers `ESHUTDOWN`: no request is ever left open.
#[derive(Debug)]
#[must_use = "dropping a reply answers the request with ESHUTDOWN"]
pub struct Reply {
    channel: Rc<Channel>,
    to: ReplyTo,
    cost: ByteCount,
    answered: bool,
}

impl Reply {
    /// The request's cookie, for logs; clients may use one twice.
    pub fn cookie(&self) -> Cookie {
        self.to.cookie()
    }

    /// Success of anything but a READ or BLOCK_STATUS.
    ///
    /// # Panics
    /// When the request was one of these.
    pub fn done(mut self) {
        self.answer(Bytes::new(), |encoder, to, out| encoder.done(to, out));
    }

    /// The bytes of a READ.
    ///
    /// # Panics
    /// When the request was no READ of exactly so many bytes.
    pub fn data(mut self, data: Bytes) {
        let length = ByteCount::of(&data);
        self.answer(data, |encoder, to, out| encoder.read_header(to, length, out));
    }

    /// The answer to BLOCK_STATUS: extents from the request's offset on. They may end before
    /// the request does; what lies beyond it is cut.
    ///
    /// # Panics
    /// When the request was no BLOCK_STATUS, or the extents are empty.
    pub fn extents(mut self, extents: &[Extent]) {
        self.answer(Bytes::new(), |encoder, to, out| encoder.extents(to, extents, out));
    }

    /// The answer to BLOCK_STATUS of an export with a dirty bitmap: what of the two was asked for is sent.
    ///
    /// # Panics
    /// As [`Reply::extents`].
    pub fn statuses(mut self, extents: &[Extent], dirty: &[DirtyExtent]) {
        self.answer(Bytes::new(), |encoder, to, out| encoder.statuses(to, extents, dirty, out));
    }

    /// Failure.
    pub fn fail(mut self, error: NbdError) {
        self.answer(Bytes::new(), |encoder, to, out| encoder.error(to, error, "", out));
    }

    /// Failure, with a sentence for people; it reaches clients of READ and BLOCK_STATUS that
    /// take structured replies.
    pub fn fail_with(mut self, error: NbdError, text: &str) {
        self.answer(Bytes::new(), |encoder, to, out| encoder.error(to, error, text, out));
    }

    fn answer(&mut self, data: Bytes, encode: impl FnOnce(ReplyEncoder, ReplyTo, &mut bytes::BytesMut)) {
        self.answered = true;
        let to = self.to;
        self.channel.queue(self.cost, data, |encoder, out| encode(encoder, to, out));
    }
}

impl Drop for Reply {
    fn drop(&mut self) {
        if !self.answered {
            self.answer(Bytes::new(), |encoder, to, out| {
                encoder.error(to, NbdError::Shutdown, "the request was given up", out);
            });
        }
    }
}
