//! The way back: a reply is completed by whoever did the work and queued for its connection.

use std::{
    cell::{Cell, RefCell},
    io,
    pin::Pin,
    rc::Rc,
    task::{Context, Poll, Waker},
};

use backtide_nbd::server::{ReadPart, ReplyEncoder, ReplyTo};
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
    pub(crate) fn refuse(self: &Rc<Self>, to: ReplyTo, error: NbdError, why: &str) {
        self.begin(to, ByteCount::ZERO).fail_with(error, why);
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

    fn queue(&self, push: impl FnOnce(ReplyEncoder, &mut Output)) {
        self.unanswered.set(self.unanswered.get() - 1);
        if self.dead.get() {
            return;
        }
        push(self.encoder, &mut self.output.borrow_mut());
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
        self.answer(|encoder, to, out| encoder.done(to, out));
    }

    /// The bytes of a READ. Stretches of zeroes in them are told, not sent, to clients that understand that.
    ///
    /// # Panics
    /// When the request was no READ of exactly so many bytes.
    pub fn data(mut self, data: Bytes) {
        self.answered = true;
        let (to, cost) = (self.to, self.cost);
        self.channel.queue(|encoder, output| {
            let parts = encoder.parts(to, &data);
            let Some((last, before)) = parts.as_deref().and_then(<[ReadPart]>::split_last) else {
                let length = ByteCount::of(&data);
                return output.push(cost.0, data, |out| encoder.read_header(to, length, out));
            };
            let bytes = |part: &ReadPart| match part.zero {
                true => Bytes::new(),
                false => data.slice(part.start..part.start + part.length),
            };
            for part in before {
                output.push_part(bytes(part), |out| encoder.part(to, *part, false, out));
            }
            output.push(cost.0, bytes(last), |out| encoder.part(to, *last, true, out));
        });
    }

    /// The answer to BLOCK_STATUS: extents from the request's offset on. They may end before
    /// the request does; what lies beyond it is cut.
    ///
    /// # Panics
    /// When the request was no BLOCK_STATUS, or the extents are empty.
    pub fn extents(mut self, extents: &[Extent]) {
        self.answer(|encoder, to, out| encoder.extents(to, extents, out));
    }

    /// The answer to BLOCK_STATUS of an export with a dirty bitmap: what of the two was asked for is sent.
    ///
    /// # Panics
    /// As [`Reply::extents`].
    pub fn statuses(mut self, extents: &[Extent], dirty: &[DirtyExtent]) {
        self.answer(|encoder, to, out| encoder.statuses(to, extents, dirty, out));
    }

    /// Failure.
    pub fn fail(mut self, error: NbdError) {
        self.answer(|encoder, to, out| encoder.error(to, error, "", out));
    }

    /// Failure, with a sentence for people; it reaches clients that take structured replies.
    pub fn fail_with(mut self, error: NbdError, text: &str) {
        self.answer(|encoder, to, out| encoder.error(to, error, text, out));
    }

    fn answer(&mut self, encode: impl FnOnce(ReplyEncoder, ReplyTo, &mut bytes::BytesMut)) {
        self.answered = true;
        let (to, cost) = (self.to, self.cost);
        let push = |encoder, output: &mut Output| {
            output.push(cost.0, Bytes::new(), |out| encode(encoder, to, out));
        };
        self.channel.queue(push);
    }
}

impl Drop for Reply {
    fn drop(&mut self) {
        if !self.answered {
            self.answer(|encoder, to, out| {
                encoder.error(to, NbdError::Shutdown, "the request was given up", out);
            });
        }
    }
}
