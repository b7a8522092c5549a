//! One connection to a server: requests are queued here, a task sends them and takes the
//! replies.
//!
//! Invariants: a request is answered exactly once: by its reply, or by the connection's end;
//! requests and bytes in flight are bounded, and a request counts until it is answered, also
//! when nobody waits for it any more; after an error nothing more is sent. A server that says it is shutting down is
//! told good-bye and asked for nothing more, and what it was asked for before is waited for.

use std::{
    collections::HashMap,
    future::poll_fn,
    pin::{Pin, pin},
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    task::{Context, Poll, Waker, ready},
    time::Duration,
};

use backtide_nbd::client::{Expected, ReplyParser, encode_disconnect, encode_request};
use backtide_nbd::{Command, Cookie, Intake, NbdError, ReplyStyle};
use bytes::Bytes;
use tokio::{
    io::{AsyncReadExt, AsyncWrite, AsyncWriteExt},
    sync::{OwnedSemaphorePermit, Semaphore, oneshot},
};

use super::{
    connect::{Connected, Duplex},
    gather::{Answer, Gather},
    silence::Watch,
};
use crate::{ClientError, output::Output};

/// How long a server may take the good-bye.
const GOOD_BYE_MAX: Duration = Duration::from_secs(10);

/// Bytes in flight are counted in units of this size.
const UNIT: u64 = 4096;

/// What a waiting request gets.
pub(super) type Outcome = Result<Answer, ClientError>;

/// Bounds of a connection.
#[derive(Clone, Copy, Debug)]
pub(super) struct Bounds {
    pub(super) requests: usize,
    pub(super) bytes: u64,
}

/// The half of a connection that requests reach.
#[derive(Debug)]
pub(super) struct Link {
    state: Mutex<State>,
    requests: Arc<Semaphore>,
    units: Arc<Semaphore>,
    units_max: u32,
    style: ReplyStyle,
}

#[derive(Debug, Default)]
struct State {
    output: Output,
    pending: HashMap<u64, Pending>,
    next_cookie: u64,
    /// The task, while it sleeps and nobody has woken it yet.
    sleeper: Option<Waker>,
    /// No request will come any more.
    leaving: bool,
    /// Why the connection ended, or ends: it takes no more requests.
    ended: Option<ClientError>,
    /// It ends now, whatever is not answered.
    given_up: Option<ClientError>,
}

impl State {
    /// No request will come any more: finish and say good-bye.
    fn leave(&mut self, style: ReplyStyle) {
        if !self.leaving && self.ended.is_none() {
            self.leaving = true;
            self.output.push(0, Bytes::new(), |out| encode_disconnect(out, style));
        }
    }
}

#[derive(Debug)]
struct Pending {
    gather: Gather,
    answered: oneshot::Sender<Outcome>,
    _permits: (OwnedSemaphorePermit, OwnedSemaphorePermit),
}

impl Link {
    /// Starts the task that drives `connected`.
    pub(super) fn start(connected: Connected, bounds: Bounds) -> Arc<Self> {
        let units_max = u32::try_from(bounds.bytes / UNIT).unwrap_or(u32::MAX >> 4).max(1);
        let link = Arc::new(Self {
            state: Mutex::default(),
            requests: Arc::new(Semaphore::new(bounds.requests.max(1))),
            units: Arc::new(Semaphore::new(units_max as usize)),
            units_max,
            style: connected.session.style,
        });
        let parser = ReplyParser::new(&connected.session);
        let Connected { stream, intake, watch, .. } = connected;
        tokio::spawn(drive(Driver { link: Arc::clone(&link), stream, intake, parser, watch }));
        link
    }

    /// Queues `request` as soon as the bounds allow; its answer arrives at the receiver.
    pub(super) async fn send(&self, request: Command) -> Result<oneshot::Receiver<Outcome>, ClientError> {
        let units = (request.range().count().0 / UNIT + 1).min(u64::from(self.units_max)) as u32;
        // Commands without data hold no bytes, but a slot.
        let units = match Expected::by(&request) {
            Expected::Plain(_) if !matches!(request, Command::Write { .. }) => 1,
            Expected::Extents(_) => 1,
            Expected::Plain(_) | Expected::Read(_) => units,
        };
        let permits = (
            Arc::clone(&self.requests).acquire_owned().await.expect("never closed"),
            Arc::clone(&self.units).acquire_many_owned(units).await.expect("never closed"),
        );
        let (answered, answer) = oneshot::channel();
        let gather = Gather::new(Expected::by(&request));
        let sleeper = {
            let mut state = self.lock();
            if let Some(error) = &state.ended {
                return Err(error.clone());
            }
            let cookie = state.next_cookie;
            state.next_cookie += 1;
            state.pending.insert(cookie, Pending { gather, answered, _permits: permits });
            let data = match &request {
                Command::Write { data, .. } => data.clone(),
                Command::Read { .. }
                | Command::Flush
                | Command::Trim { .. }
                | Command::WriteZeroes { .. }
                | Command::Cache { .. }
                | Command::BlockStatus { .. } => Bytes::new(),
            };
            state.output.push(0, data, |out| encode_request(out, self.style, Cookie(cookie), &request));
            state.sleeper.take()
        };
        if let Some(sleeper) = sleeper {
            sleeper.wake();
        }
        Ok(answer)
    }

    /// No request will come any more: finish and say good-bye.
    pub(super) fn leave(&self) {
        let sleeper = {
            let mut state = self.lock();
            state.leave(self.style);
            state.sleeper.take()
        };
        if let Some(sleeper) = sleeper {
            sleeper.wake();
        }
    }

    /// Ends the connection now: what the server has not got of it never gets there.
    pub(super) fn give_up(&self, why: ClientError) {
        let sleeper = {
            let mut state = self.lock();
            state.given_up.get_or_insert(why);
            state.sleeper.take()
        };
        if let Some(sleeper) = sleeper {
            sleeper.wake();
        }
    }

    /// Why the connection ended, or takes no more requests, if that is so.
    pub(super) fn ended(&self) -> Option<ClientError> {
        self.lock().ended.clone()
    }

    /// Nothing comes any more, because of `error` if it had not ended before: who waits is told.
    fn end(&self, error: &ClientError) {
        let (pending, error) = {
            let mut state = self.lock();
            let error = state.ended.get_or_insert_with(|| error.clone()).clone();
            state.output = Output::default();
            (std::mem::take(&mut state.pending), error)
        };
        for pending in pending.into_values() {
            let _ = pending.answered.send(Err(error.clone()));
        }
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        // Nothing panics while it holds the lock and leaves the state half changed.
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

struct Driver {
    link: Arc<Link>,
    stream: Box<dyn Duplex>,
    intake: Intake,
    parser: ReplyParser,
    /// Of a server that may be at another host.
    watch: Option<Watch>,
}

/// Runs until the connection ends, then answers every request that is left. Whoever waits hears of it before anything else
/// is waited for: a server that is given up takes no good-bye.
async fn drive(mut driver: Driver) {
    let ended = poll_fn(|cx| driver.poll(cx)).await;
    driver.link.end(ended.as_ref().err().unwrap_or(&ClientError::Closed));
    if ended.is_ok() {
        driver.stream.keep_what_was_sent();
        // The server may be gone already; nothing depends on this.
        let _ = tokio::time::timeout(GOOD_BYE_MAX, driver.stream.shutdown()).await;
    }
}

/// Also of a runtime that ends before the connection does: whoever waits on a thread of its own would wait for ever.
impl Drop for Driver {
    fn drop(&mut self) {
        self.link.end(&ClientError::Closed);
    }
}

impl Driver {
    /// Ready with success when everybody left and everything was answered.
    fn poll(&mut self, cx: &mut Context<'_>) -> Poll<Result<(), ClientError>> {
        loop {
            self.take_replies()?;
            {
                let mut state = self.link.lock();
                if let Some(why) = state.given_up.take() {
                    return Poll::Ready(Err(why));
                }
                if let Some(watch) = &mut self.watch {
                    watch.poll(cx, state.leaving || !state.pending.is_empty())?;
                }
                let stream = Pin::new(&mut self.stream);
                let (sent, _) = state.output.poll_write(cx, stream);
                let mut sent = sent?;
                if sent.is_ready() {
                    // TLS holds back what its socket does not take.
                    sent = Pin::new(&mut self.stream).poll_flush(cx)?;
                }
                if sent.is_ready() && state.leaving && state.pending.is_empty() {
                    return Poll::Ready(Ok(()));
                }
                state.sleeper = Some(cx.waker().clone());
            }
            let mut space = self.intake.space();
            let read = pin!(self.stream.read_buf(&mut space));
            if ready!(read.poll(cx))? == 0 {
                return Poll::Ready(Err(ClientError::Closed));
            }
        }
    }

    /// Hands out the replies that were read.
    fn take_replies(&mut self) -> Result<(), ClientError> {
        let mut state = self.link.lock();
        loop {
            let pending = &state.pending;
            let expected = |cookie: Cookie| Some(pending.get(&cookie.0)?.gather.expected());
            let Some(reply) = self.parser.next(&mut self.intake, expected)? else {
                return Ok(());
            };
            let cookie = reply.cookie.0;
            let request = state.pending.get_mut(&cookie).expect("the parser has looked it up");
            request.gather.take(reply.content)?;
            if reply.last {
                let request = state.pending.remove(&cookie).expect("it was there just now");
                let (answer, broken) = match request.gather.finish() {
                    // The request is one for whoever serves in its place.
                    Ok(Answer::Refused(NbdError::Shutdown, _)) => {
                        state.leave(self.link.style);
                        state.ended.get_or_insert(ClientError::ShuttingDown);
                        (Err(ClientError::ShuttingDown), None)
                    }
                    Ok(answer) => (Ok(answer), None),
                    Err(error) => {
                        let error = ClientError::from(error);
                        (Err(error.clone()), Some(error))
                    }
                };
                // Whoever asked may have stopped waiting.
                let _ = request.answered.send(answer);
                if let Some(error) = broken {
                    return Err(error);
                }
            }
        }
    }
}
