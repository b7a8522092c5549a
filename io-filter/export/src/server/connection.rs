//! The transmission phase of one connection: requests in, replies out, one task.
//!
//! ```text
//! read ─▶ parse and submit all that is there ─▶ write all replies ─▶ read ...
//! ```
//!
//! The task sleeps only when it can neither read, submit nor write. Requests that are answered
//! while they are submitted cost no task switch, and their replies leave together in one write.
//!
//! Invariants: nothing is read or submitted beyond [`Limits`]; after the client's end, a
//! request to stop or DISC nothing more is submitted, and the task ends when all replies are
//! sent; when it ends, replies still owed go nowhere. A client that takes nothing of what it is
//! owed is dropped after [`Limits::stalled`].

use std::{
    future::poll_fn,
    pin::{Pin, pin},
    rc::Rc,
    task::{Context, Poll, ready},
    time::Duration,
};

use backtide_nbd::server::{Incoming, ReplyEncoder, ReplyTo, RequestParser};
use backtide_nbd::{Command, Intake, NbdError};
use backtide_units::ByteCount;
use tokio::{
    io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt},
    time::{Instant, Sleep},
};

use super::negotiate::{Choice, Gate, Negotiated, negotiate};
use super::{
    expected::Returning,
    hangup::Hangup,
    reply::Channel,
    seats::{Seat, Use},
    stop::{Ending, Stop},
    stream::Stream,
};
use crate::{Export, Exports, Limits, ServeError, ServerTls};

/// Replies are sent at least after so many requests, so that a client waiting for the first is
/// not kept by the last.
const BATCH: usize = 16;

/// Serves one client from its handshake to its end, in the clear.
///
/// # Errors
/// When the client breaks the protocol or its connection fails; nothing to worry about for
/// anybody else.
pub async fn serve_connection(
    stream: impl AsyncRead + AsyncWrite + Unpin + 'static,
    exports: Rc<dyn Exports>,
    limits: Limits,
) -> Result<(), ServeError> {
    let (stop, choice) = (Stop::default(), Choice::Own(Rc::clone(&exports), None));
    let (stream, tls) = (Stream::Other(Box::new(stream)), ServerTls::off());
    let gate = Gate::new(&choice, &limits, &tls, &stop, stream.process());
    let Some(negotiated) = negotiate(stream, &gate).await? else {
        return Ok(());
    };
    let name = &negotiated.session.requested;
    let export = exports.find(name).ok_or_else(|| ServeError::ExportGone(name.clone()))?;
    serve_until(negotiated, export, limits, &stop, None, None).await
}

/// Serves the transmission phase of a client that has chosen `export`, until it leaves or `stop`
/// is requested: then what is in flight is finished and sent. It has `seat` meanwhile, and is told of as `returning` when it writes.
pub(crate) async fn serve_until(
    negotiated: Negotiated,
    export: Rc<dyn Export>,
    limits: Limits,
    stop: &Stop,
    seat: Option<Seat>,
    returning: Option<Returning>,
) -> Result<(), ServeError> {
    // Tells that the client has left also while nothing is read from it.
    let mut hung_up = pin!(hung_up(negotiated.stream.hangup()));
    let mut connection = Connection::new(negotiated, export, limits, seat, returning);
    let polled = |cx: &mut Context<'_>| {
        let polled = connection.poll(cx);
        if polled.is_pending() && connection.takes_nothing() && !stop.has_client_left() {
            connection.is_left |= hung_up.as_mut().poll(cx).is_ready();
        }
        if connection.phase == Phase::Leaving || connection.is_left {
            stop.client_left();
            connection.seat.iter().for_each(Seat::client_left);
        }
        polled
    };
    let ended = tokio::select! {
        biased;
        result = poll_fn(polled) => Ok(result),
        ending = stop.requested() => Err(ending),
    };
    let ended = match ended {
        Ok(result) => result,
        Err(ending) => {
            connection.phase = match (connection.phase, ending) {
                (Phase::Serving, Ending::Final) => Phase::Refusing,
                (Phase::Serving, Ending::HandOver) | (Phase::Refusing | Phase::Leaving, _) => Phase::Leaving,
            };
            poll_fn(|cx| connection.poll(cx)).await
        }
    };
    // The good-bye of TLS has to be taken by the client, too; one that broke the rules is not waited for.
    let patience = if ended.is_ok() { limits.stalled } else { Duration::ZERO };
    let left = tokio::time::timeout(patience, connection.stream.shutdown()).await;
    ended?;
    left.map_err(|_| ServeError::Stalled(limits.stalled))??;
    Ok(())
}

/// Waits for the client's end, where something tells of it.
async fn hung_up(hangup: Option<Hangup>) {
    match hangup {
        Some(hangup) => hangup.closed().await,
        None => std::future::pending().await,
    }
}

/// What becomes of requests that come.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Phase {
    /// They are submitted.
    Serving,
    /// They are answered with ESHUTDOWN, for as long as something submitted is unanswered.
    Refusing,
    /// They are not read any more.
    Leaving,
}

struct Connection {
    stream: Stream,
    intake: Intake,
    parser: RequestParser,
    export: Rc<dyn Export>,
    limits: Limits,
    channel: Rc<Channel>,
    /// Its place among the server's clients, and what that is to know.
    seat: Option<Seat>,
    used: Use,
    is_used: bool,
    /// Until it writes.
    returning: Option<Returning>,
    /// A request that is there but would break a limit.
    held: Option<(ReplyTo, Command, ByteCount)>,
    phase: Phase,
    /// Runs while the client does not take what it is owed.
    stalled: Option<Pin<Box<Sleep>>>,
    /// How much it had taken when that began.
    taken: u64,
    /// The client's last message was cut off.
    truncated: bool,
    /// The client sends nothing more, though not all of what it sent was read.
    is_left: bool,
}

/// How far the requests that were read got.
#[derive(PartialEq, Eq)]
enum Submitted {
    /// All of them are submitted.
    All,
    /// More are there, but it is time to send replies.
    Batch,
    /// The next would break a limit.
    Full,
}

impl Connection {
    fn new(
        negotiated: Negotiated,
        export: Rc<dyn Export>,
        limits: Limits,
        seat: Option<Seat>,
        returning: Option<Returning>,
    ) -> Self {
        let Negotiated { stream, intake, session } = negotiated;
        Self {
            stream,
            intake,
            parser: RequestParser::new(&session),
            export,
            limits,
            channel: Channel::new(ReplyEncoder::new(&session)),
            seat,
            used: Use::default(),
            is_used: false,
            returning,
            held: None,
            phase: Phase::Serving,
            stalled: None,
            taken: 0,
            truncated: false,
            is_left: false,
        }
    }

    fn poll(&mut self, cx: &mut Context<'_>) -> Poll<Result<(), ServeError>> {
        self.channel.awake();
        loop {
            let submitted = self.submit()?;
            let sent = self.channel.poll_write(cx, Pin::new(&mut self.stream))?;
            self.watch(sent.is_ready(), cx)?;
            if self.phase == Phase::Refusing && self.channel.unanswered() == 0 {
                self.phase = Phase::Leaving;
            }
            if self.phase == Phase::Leaving && self.channel.requests() == 0 {
                ready!(sent);
                let truncated = self.truncated;
                return Poll::Ready(if truncated { Err(ServeError::Truncated) } else { Ok(()) });
            }
            match submitted {
                Submitted::Batch => continue,
                // Sending may have made room.
                Submitted::Full if self.held_fits() => continue,
                Submitted::Full => {}
                Submitted::All if self.may_read() => {
                    if self.poll_read(cx)?.is_ready() {
                        continue;
                    }
                }
                Submitted::All => {}
            }
            self.note_use();
            self.channel.sleep(cx.waker());
            return Poll::Pending;
        }
    }

    /// Fails when the client has taken nothing of what it is owed for too long.
    fn watch(&mut self, all_sent: bool, cx: &mut Context<'_>) -> Result<(), ServeError> {
        if all_sent {
            self.stalled = None;
            return Ok(());
        }
        let taken = self.channel.written();
        let until = Instant::now() + self.limits.stalled;
        let stalled = self.stalled.get_or_insert_with(|| Box::pin(tokio::time::sleep_until(until)));
        if self.taken != taken {
            self.taken = taken;
            stalled.as_mut().reset(until);
        }
        match stalled.as_mut().poll(cx) {
            Poll::Ready(()) => Err(ServeError::Stalled(self.limits.stalled)),
            Poll::Pending => Ok(()),
        }
    }

    /// Submits requests that were read, within the limits.
    fn submit(&mut self) -> Result<Submitted, ServeError> {
        if self.phase == Phase::Leaving {
            return Ok(Submitted::All);
        }
        for _ in 0..BATCH {
            let (to, command, cost) = match self.held.take() {
                Some(held) => held,
                None => match self.parser.next(&mut self.intake)? {
                    None => return Ok(Submitted::All),
                    Some(Incoming::Request(to, command)) => {
                        self.used.asked += 1;
                        if command.is_of_a_writer() {
                            self.used.is_writer = true;
                            self.returning.take().into_iter().for_each(Returning::writes);
                        }
                        self.is_used = true;
                        let cost = ByteCount(payload(&command).0 + to.data_length().0);
                        (to, command, cost)
                    }
                    Some(Incoming::Refused(to, error, why)) => {
                        self.channel.refuse(to, error, why);
                        // A refusal holds nothing but its reply, yet those add up too.
                        if !self.fits(ByteCount::ZERO) {
                            return Ok(Submitted::Full);
                        }
                        continue;
                    }
                    Some(Incoming::Disconnect) => {
                        self.phase = Phase::Leaving;
                        return Ok(Submitted::All);
                    }
                },
            };
            if !self.fits(cost) {
                self.held = Some((to, command, cost));
                return Ok(Submitted::Full);
            }
            if self.phase == Phase::Refusing {
                self.channel.refuse(to, NbdError::Shutdown, "the export is not served any more");
            } else {
                self.export.submit(command, self.channel.begin(to, cost));
            }
        }
        Ok(Submitted::Batch)
    }

    /// Tells its place what the client has done since it was told last.
    fn note_use(&mut self) {
        let is_busy = self.channel.requests() > 0;
        if self.is_used || self.used.is_busy != is_busy {
            self.used.is_busy = is_busy;
            self.is_used = false;
            self.seat.iter().for_each(|seat| seat.note(self.used));
        }
    }

    /// Whether a request of `cost` bytes is let in. One always is.
    fn fits(&self, cost: ByteCount) -> bool {
        let requests = self.channel.requests();
        requests == 0
            || requests < self.limits.requests
                && self.channel.bytes().0.saturating_add(cost.0) <= self.limits.bytes.0
    }

    fn held_fits(&self) -> bool {
        match &self.held {
            Some((_, _, cost)) => self.fits(*cost),
            None => self.fits(ByteCount::ZERO),
        }
    }

    /// Whether there is room for what will be read, above all for a long payload.
    fn may_read(&self) -> bool {
        self.phase != Phase::Leaving && self.fits(ByteCount(self.intake.payload_missing() as u64))
    }

    /// Whether nothing is read for want of room, so that nobody would notice the client's end.
    fn takes_nothing(&self) -> bool {
        self.held.is_some() || !self.may_read()
    }

    fn poll_read(&mut self, cx: &mut Context<'_>) -> Poll<Result<(), ServeError>> {
        let mut space = self.intake.space();
        let read = pin!(self.stream.read_buf(&mut space));
        if ready!(read.poll(cx))? == 0 {
            self.phase = Phase::Leaving;
            self.truncated = !self.intake.buffered().is_empty() || self.parser.is_inside();
        }
        Poll::Ready(Ok(()))
    }
}

impl Drop for Connection {
    fn drop(&mut self) {
        self.channel.bury();
    }
}

/// Bytes of a request's payload.
fn payload(command: &Command) -> ByteCount {
    match command {
        Command::Write { data, .. } => ByteCount::of(data),
        Command::Read { .. }
        | Command::Flush
        | Command::Trim { .. }
        | Command::WriteZeroes { .. }
        | Command::Cache { .. }
        | Command::BlockStatus { .. } => ByteCount::ZERO,
    }
}
