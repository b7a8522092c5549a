//! The stream to the receiver: connects, shakes hands, sends what the filter has, brings back what
//! the receiver says; connects again when it is lost.

use std::{
    cell::{Cell, RefCell},
    io,
    rc::Rc,
    time::Duration,
};

use backtide_control::Address;
use backtide_protocol::{
    CloseCode, Closed, Data, Decoder, FRAME_HEADER_BYTES, Message, ProtocolError, RecordBody, Welcome, encode,
};
use backtide_storage::KillPoint;
use backtide_units::{CaptureTime, Epoch};
use bytes::Bytes;
use tokio::{
    io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt},
    sync::Notify,
    time::Instant,
};

use super::{
    Terms,
    dial::Dialer,
    engine::{Engine, Kick, add},
    gathering::{GATHERED, gather_until},
    retry::{RETRY_FIRST, Retry},
};

/// How long connecting and the handshake may take.
const HANDSHAKE_TIME: Duration = Duration::from_secs(10);

/// A receiver that owes acknowledgements and is silent for this long is given up.
const SILENCE_MAX: Duration = Duration::from_secs(30);

/// The longest payload a receiver has reason to send: the answer to a comparison, or a text.
const RECEIVER_PAYLOAD_MAX: u64 = 64 * 1024;

/// As much of what a receiver says is shown.
const SHOWN_MAX: usize = 1024;

/// As much goes out in one write.
const BATCH_FRAMES: usize = 256;
const BATCH_BYTES: usize = 1 << 20;

/// Why there is no connection.
#[derive(Debug, thiserror::Error)]
pub(crate) enum StreamError {
    /// Nobody there.
    #[error("cannot reach the receiver at {address}: {source}")]
    Unreachable { address: Address, source: io::Error },
    /// The handshake or an acknowledgement took too long.
    #[error("the receiver at {address} does not answer")]
    Silent { address: Address },
    /// One side does not accept the other's certificate.
    #[error("{0}")]
    Tls(String),
    /// The connection broke.
    #[error("the stream was lost: {0}")]
    Lost(io::Error),
    /// The receiver ended it.
    #[error("{}", .0.message)]
    Closed(Closed),
    /// What it said makes no sense, or is of another version.
    #[error("the receiver cannot be understood: {0}")]
    Protocol(#[from] ProtocolError),
    /// What it said makes no sense to the filter.
    #[error("{0}")]
    Unexpected(String),
    /// An operator ended it.
    #[error("{0}")]
    Operator(&'static str),
}

/// The last failure, for the status.
#[derive(Clone, Debug)]
pub(crate) struct LastError {
    pub(crate) code: &'static str,
    pub(crate) message: String,
    pub(crate) time: CaptureTime,
}

/// One disk's stream.
pub(crate) struct Stream {
    engine: Rc<Engine>,
    receiver: Dialer,
    terms: Terms,
    pub(crate) last_error: RefCell<Option<LastError>>,
    /// A connection has ended.
    pub(crate) ended: Notify,
    /// The epoch that has the disk, since the receiver refused this one; until it is in the disk's record.
    pub(crate) fenced_by: Cell<Option<Epoch>>,
    /// The last frame sent on this connection.
    last_seq: Cell<u64>,
    /// A batch is partly sent: nothing can follow it but its rest.
    writing: Cell<bool>,
    /// When the receiver took the disk, if it did at the last attempt.
    welcomed: Cell<Option<Instant>>,
}

impl StreamError {
    fn code(&self) -> &'static str {
        match self {
            Self::Unreachable { .. } => "unreachable",
            Self::Tls(_) => "tls",
            Self::Silent { .. } | Self::Lost(_) | Self::Operator(_) => "lost",
            Self::Protocol(ProtocolError::Version { .. }) => "version",
            Self::Protocol(_) | Self::Unexpected(_) => "invalid",
            Self::Closed(closed) => match closed.code {
                CloseCode::Bye => "lost",
                CloseCode::Fenced => "fenced",
                CloseCode::Version => "version",
                CloseCode::Invalid => "invalid",
                CloseCode::Store => "store",
                CloseCode::Busy => "busy",
                CloseCode::Refused => "refused",
                CloseCode::Denied => "denied",
            },
        }
    }

    /// Whether the receiver was there, and takes nothing of this disk as long as something stays as it is.
    fn is_refusal(&self) -> bool {
        let Self::Closed(closed) = self else { return false };
        match closed.code {
            CloseCode::Fenced
            | CloseCode::Version
            | CloseCode::Store
            | CloseCode::Refused
            | CloseCode::Denied => true,
            CloseCode::Bye | CloseCode::Invalid | CloseCode::Busy => false,
        }
    }

    /// A fenced agent never comes back with this epoch.
    fn fenced_by(&self) -> Option<Epoch> {
        match self {
            Self::Closed(Closed { code: CloseCode::Fenced, epoch, .. }) => Some(epoch.unwrap_or_default()),
            _ => None,
        }
    }
}

impl Stream {
    pub(crate) fn new(engine: Rc<Engine>, receiver: Dialer, terms: Terms) -> Rc<Self> {
        Rc::new(Self {
            engine,
            receiver,
            terms,
            last_error: RefCell::default(),
            ended: Notify::new(),
            fenced_by: Cell::default(),
            last_seq: Cell::new(1),
            writing: Cell::new(false),
            welcomed: Cell::default(),
        })
    }

    /// Never connects: another agent has the disk, and whoever comes with a higher epoch takes it away.
    pub(crate) fn stay_fenced(&self) {
        tracing::error!(disk = %self.engine.name(), "{}", self.note_fenced());
    }

    /// What its status says from now on, whatever the receiver's words were.
    fn note_fenced(&self) -> String {
        let message = format!(
            "another agent has disk {} since: this one serves it, and forwards nothing",
            self.engine.name()
        );
        let time = self.engine.now().wall;
        self.last_error.replace(Some(LastError { code: "fenced", message: message.clone(), time }));
        message
    }

    /// Keeps the disk connected for as long as it wants to be.
    pub(crate) async fn keep(self: Rc<Self>) {
        let mut retry = Retry::new();
        loop {
            while !self.engine.look(backtide_io_filter::Filter::wants_connection) {
                self.engine.wanted.notified().await;
            }
            let began = Instant::now();
            let error = self.receiver.explained(self.connect_and_run().await);
            self.engine.happen(|filter, now| filter.receiver_refuses(now, error.is_refusal()));
            let was_connected = self.engine.look(backtide_io_filter::Filter::is_connected);
            if was_connected {
                add(&self.engine.traffic.disconnects, 1);
                self.engine.happen(|filter, now| filter.disconnected(now));
            }
            self.note(&error);
            self.ended.notify_waiters();
            if let Some(epoch) = error.fenced_by() {
                self.note_fenced();
                self.engine.happen(|filter, now| filter.fenced(now));
                self.fenced_by.set(Some(epoch));
                // The next attach has to know, also after a crash.
                self.engine.acquainted.notify_one();
                return;
            }
            let pause = retry.after(self.welcomed.take().map(|since| since.elapsed()));
            // Jitter, so that the disks of an agent do not all come at once.
            let jitter = Duration::from_micros(u64::from(began.elapsed().subsec_nanos()) % 50_000);
            tokio::select! {
                () = tokio::time::sleep(pause + jitter) => {}
                () = self.engine.wanted.notified() => {}
            }
        }
    }

    /// What is known of the stream's certificates.
    pub(crate) fn tls(&self) -> Option<backtide_agent_api::StreamTlsStatus> {
        self.receiver.status()
    }

    fn note(&self, error: &StreamError) {
        let disk = self.engine.name();
        let message: String = error.to_string().chars().take(SHOWN_MAX).collect();
        if let StreamError::Operator(why) = error {
            tracing::info!(%disk, why, "the stream to the receiver has ended");
            return;
        }
        let known = self.last_error.borrow().as_ref().is_some_and(|last| last.message == message);
        if !known {
            tracing::warn!(%disk, error = message, "no stream to the receiver: changes are retained or tracked");
        }
        let time = self.engine.now().wall;
        self.last_error.replace(Some(LastError { code: error.code(), message, time }));
    }

    async fn connect_and_run(&self) -> StreamError {
        let silent = || StreamError::Silent { address: self.receiver.address().clone() };
        let socket = match tokio::time::timeout(HANDSHAKE_TIME, self.receiver.connect()).await {
            Ok(Ok(socket)) => socket,
            Ok(Err(error)) => return error,
            Err(_) => return silent(),
        };
        let (mut reader, mut writer) = tokio::io::split(socket);
        let mut decoder = Decoder::limited(RECEIVER_PAYLOAD_MAX);
        let welcome = self.shake_hands(&mut reader, &mut writer, &mut decoder);
        let welcome = match tokio::time::timeout(HANDSHAKE_TIME, welcome).await {
            Ok(Ok(welcome)) => welcome,
            Ok(Err(error)) => return error,
            Err(_) => return silent(),
        };
        // A kick of before is about another connection.
        let _ = self.engine.take_kick();
        self.engine.happen(|filter, now| filter.connected(now, &welcome));
        self.engine.acquainted.notify_one();
        if !self.engine.look(backtide_io_filter::Filter::is_connected) {
            // Refused by the filter, or paused meanwhile.
            return self.kick_error().unwrap_or(StreamError::Operator("the disk wants no connection"));
        }
        let disk = self.engine.name();
        self.welcomed.set(Some(Instant::now()));
        tracing::info!(%disk, receiver = %self.receiver.address(), history = %welcome.history, durable = %welcome.durable, "connected");
        self.last_error.replace(None);
        self.last_seq.set(1);
        self.writing.set(false);
        let heard = Cell::new(Instant::now());
        let ended = tokio::select! {
            error = self.read_all(&mut reader, &mut decoder, &heard) => error,
            error = self.write_all(&mut writer) => StreamError::Lost(error),
            error = self.kicked() => error,
            () = self.silence(&heard) => silent(),
        };
        if let StreamError::Operator(why) = ended {
            self.say_goodbye(&mut writer, why).await;
        }
        // What the receiver said before it closed tells more than the broken pipe.
        if let StreamError::Lost(_) = &ended
            && let Ok(closed) =
                tokio::time::timeout(RETRY_FIRST, self.read_all(&mut reader, &mut decoder, &heard)).await
            && matches!(closed, StreamError::Closed(_))
        {
            return closed;
        }
        ended
    }

    async fn shake_hands(
        &self,
        reader: &mut (impl AsyncRead + Unpin),
        writer: &mut (impl AsyncWrite + Unpin),
        decoder: &mut Decoder,
    ) -> Result<Welcome, StreamError> {
        let hello = self.terms.tell(self.engine.look(backtide_io_filter::Filter::hello));
        let (header, payload) = encode(1, &Message::Hello(hello));
        let told = async {
            writer.write_all(&header).await?;
            writer.write_all(&payload).await?;
            writer.flush().await
        };
        let mut told = told.await;
        loop {
            if let Some(first) = decoder.next_message()? {
                return match first.message {
                    Message::Welcome(welcome) => Ok(welcome),
                    Message::Close(closed) => Err(StreamError::Closed(closed)),
                    other => Err(StreamError::Unexpected(format!(
                        "expected a welcome from the receiver, found {}",
                        other.name()
                    ))),
                };
            }
            // What the other side said before it closed tells more than the broken pipe.
            fill(reader, decoder).await.map_err(|error| match std::mem::replace(&mut told, Ok(())) {
                Err(lost) => StreamError::Lost(lost),
                Ok(()) => error,
            })?;
        }
    }

    async fn read_all(
        &self,
        reader: &mut (impl AsyncRead + Unpin),
        decoder: &mut Decoder,
        heard: &Cell<Instant>,
    ) -> StreamError {
        loop {
            loop {
                match decoder.next_message() {
                    Ok(Some(next)) => match next.message {
                        Message::Close(closed) => return StreamError::Closed(closed),
                        message => self.engine.happen(|filter, now| filter.receive(now, message)),
                    },
                    Ok(None) => break,
                    Err(error) => return error.into(),
                }
            }
            if let Err(error) = fill(reader, decoder).await {
                return error;
            }
            heard.set(Instant::now());
        }
    }

    async fn write_all(&self, writer: &mut (impl AsyncWrite + Unpin)) -> io::Error {
        let mut batch: Vec<([u8; FRAME_HEADER_BYTES], Bytes)> = Vec::with_capacity(BATCH_FRAMES);
        let mut next = Instant::now();
        loop {
            self.wait_for_more(next).await;
            self.gather(&mut batch);
            if batch.is_empty() {
                self.engine.send.notified().await;
                continue;
            }
            self.writing.set(true);
            if let Err(error) = write_batch(writer, &batch).await {
                return error;
            }
            self.writing.set(false);
            batch.clear();
            next = Instant::now() + GATHERED;
        }
    }

    /// Gathers what may wait, until then.
    async fn wait_for_more(&self, then: Instant) {
        let may_wait = || self.engine.look(|filter| !filter.has_to_send() || filter.may_gather());
        gather_until(then, &self.engine.send, may_wait).await;
    }

    /// Takes frames from the filter until a write is worth its while or there are none.
    fn gather(&self, batch: &mut Vec<([u8; FRAME_HEADER_BYTES], Bytes)>) {
        let mut bytes = 0;
        while batch.len() < BATCH_FRAMES && bytes < BATCH_BYTES {
            let Some((seq, message)) = self.engine.happen(|filter, now| filter.poll_send(now)) else { break };
            match &message {
                Message::Record(record) => match &record.body {
                    RecordBody::Write(data) => add(&self.engine.traffic.sent_bytes, length(data)),
                    RecordBody::Zero | RecordBody::Trim => {}
                },
                Message::PassData { data, .. } => add(&self.engine.traffic.resync_sent_bytes, length(data)),
                _ => {}
            }
            at_kill_point(&message);
            self.last_seq.set(seq);
            let frame = encode(seq, &message);
            bytes += FRAME_HEADER_BYTES + frame.1.len();
            batch.push(frame);
        }
    }

    /// Tells the receiver that this end is meant. It finds out by itself when that fails.
    async fn say_goodbye(&self, writer: &mut (impl AsyncWrite + Unpin), why: &str) {
        if self.writing.get() {
            return;
        }
        let closed = Closed::new(CloseCode::Bye, why);
        let frame = encode(self.last_seq.get() + 1, &Message::Close(closed));
        let _ = tokio::time::timeout(RETRY_FIRST, write_batch(writer, &[frame])).await;
    }

    fn kick_error(&self) -> Option<StreamError> {
        Some(match self.engine.take_kick()? {
            Kick::Operator(why) => StreamError::Operator(why),
            Kick::Invalid(why) => StreamError::Unexpected(why),
        })
    }

    async fn kicked(&self) -> StreamError {
        loop {
            self.engine.kick.notified().await;
            if let Some(error) = self.kick_error() {
                return error;
            }
        }
    }

    /// Ends when the receiver has owed an acknowledgement for too long.
    async fn silence(&self, heard: &Cell<Instant>) {
        let mut owed_since: Option<Instant> = None;
        loop {
            tokio::time::sleep(SILENCE_MAX / 10).await;
            if !self.engine.look(backtide_io_filter::Filter::awaits_acknowledgement) {
                owed_since = None;
                continue;
            }
            let since = owed_since.get_or_insert_with(Instant::now);
            if since.max(&mut heard.get()).elapsed() > SILENCE_MAX {
                return;
            }
        }
    }
}

fn at_kill_point(message: &Message) {
    match message {
        Message::PassBegin { .. } => KillPoint::PassBeginSent.reached(),
        Message::PassData { .. } => KillPoint::PassDataSent.reached(),
        Message::PassEnd { .. } => KillPoint::PassEndSent.reached(),
        _ => {}
    }
}

fn length(data: &Data) -> u64 {
    data.bytes().len() as u64
}

async fn fill(reader: &mut (impl AsyncRead + Unpin), decoder: &mut Decoder) -> Result<(), StreamError> {
    match reader.read_buf(decoder.buffer()).await {
        Ok(0) => Err(StreamError::Lost(io::Error::new(
            io::ErrorKind::UnexpectedEof,
            "the receiver closed the connection",
        ))),
        Ok(_) => Ok(()),
        Err(error) => Err(StreamError::Lost(error)),
    }
}

/// Writes headers and payloads in order, without copying payloads.
async fn write_batch(
    writer: &mut (impl AsyncWrite + Unpin),
    batch: &[([u8; FRAME_HEADER_BYTES], Bytes)],
) -> io::Result<()> {
    let mut slices: Vec<io::IoSlice<'_>> = Vec::with_capacity(batch.len() * 2);
    for (header, payload) in batch {
        slices.push(io::IoSlice::new(header));
        if !payload.is_empty() {
            slices.push(io::IoSlice::new(payload));
        }
    }
    let mut rest = &mut slices[..];
    while !rest.is_empty() {
        let written = writer.write_vectored(rest).await?;
        if written == 0 {
            return Err(io::ErrorKind::WriteZero.into());
        }
        io::IoSlice::advance_slices(&mut rest, written);
    }
    writer.flush().await
}
