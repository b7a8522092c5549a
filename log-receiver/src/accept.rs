//! Accepts agents, waits for their first message, and sends each to the thread that owns its disk.
//!
//! Invariants: an agent that says nothing has a few seconds; the number of connections, greeted or
//! not, is bounded, and so is the memory of one that is not greeted; what was read beyond the first
//! message travels along.

use std::{
    hash::{DefaultHasher, Hash, Hasher},
    io,
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
    },
    time::Duration,
};

use backtide_protocol::{Decoder, Message, PAYLOAD_BYTES_MAX, Sequenced, encode};
use backtide_units::DiskId;
use tokio::{
    io::AsyncWriteExt,
    sync::{OwnedSemaphorePermit, Semaphore, mpsc},
};

use crate::{
    connection::undecodable,
    ingest::Task,
    session::ConnectionId,
    socket::{Listener, Socket, Stream},
};

/// How long an agent may take for its first message.
const HELLO_TIMEOUT: Duration = Duration::from_secs(10);

/// The longest first message: memory of a peer of whom nothing is known yet. A hello has less than this.
const FIRST_PAYLOAD_BYTES_MAX: u64 = 64 * 1024;

/// How long the accept loop waits after an error that is not about one connection, such as too
/// many open files.
const ACCEPT_PAUSE: Duration = Duration::from_millis(100);

/// A connection whose first message has come.
pub(crate) struct Arrival {
    pub(crate) id: ConnectionId,
    pub(crate) socket: Socket,
    pub(crate) decoder: Decoder,
    pub(crate) first: Sequenced,
    pub(crate) _permit: OwnedSemaphorePermit,
}

/// Sends connections where they belong.
#[derive(Clone)]
pub(crate) struct Door {
    threads: Arc<[mpsc::Sender<Task>]>,
    connections: Arc<Semaphore>,
    next: Arc<AtomicU64>,
}

impl Door {
    pub(crate) fn new(threads: Vec<mpsc::Sender<Task>>, connections_max: usize) -> Self {
        Self {
            threads: threads.into(),
            connections: Arc::new(Semaphore::new(connections_max)),
            next: Arc::default(),
        }
    }

    /// Which of `threads` threads owns a disk: the same one for the receiver's whole life.
    pub(crate) fn owner(disk: DiskId, threads: usize) -> usize {
        let mut hasher = DefaultHasher::new();
        disk.hash(&mut hasher);
        usize::try_from(hasher.finish() % threads as u64).expect("less than the number of threads")
    }

    /// Accepts agents until dropped.
    pub(crate) async fn accept(self, listener: Listener) {
        loop {
            let stream = match listener.accept().await {
                Ok(stream) => stream,
                Err(error) => {
                    tracing::warn!(address = %listener.address(), %error, "cannot accept an agent");
                    tokio::time::sleep(ACCEPT_PAUSE).await;
                    continue;
                }
            };
            let Ok(permit) = Arc::clone(&self.connections).try_acquire_owned() else {
                tracing::warn!(address = %listener.address(), "too many connections, one more refused");
                continue;
            };
            let id = ConnectionId(self.next.fetch_add(1, Ordering::Relaxed));
            let door = self.clone();
            tokio::spawn(async move {
                match tokio::time::timeout(HELLO_TIMEOUT, greet(stream)).await {
                    Ok(Ok(Some((stream, decoder, first)))) => {
                        door.pass_on(id, stream, decoder, first, permit).await;
                    }
                    Ok(Ok(None)) => {}
                    Ok(Err(error)) => {
                        tracing::debug!(connection = id.0, %error, "connection lost before its hello")
                    }
                    Err(_) => tracing::warn!(
                        connection = id.0,
                        "no hello within {HELLO_TIMEOUT:?}, connection closed"
                    ),
                }
            });
        }
    }

    async fn pass_on(
        self,
        id: ConnectionId,
        stream: Stream,
        decoder: Decoder,
        first: Sequenced,
        permit: OwnedSemaphorePermit,
    ) {
        let thread = match &first.message {
            Message::Hello(hello) => Self::owner(hello.disk, self.threads.len()),
            // Any thread's session refuses it in the right words.
            Message::Welcome(_)
            | Message::Record(_)
            | Message::Flush { .. }
            | Message::PassBegin { .. }
            | Message::PassData { .. }
            | Message::PassEnd { .. }
            | Message::Mark { .. }
            | Message::Compare(_)
            | Message::CompareResult(_)
            | Message::Ack { .. }
            | Message::Ping
            | Message::Close(_) => 0,
        };
        match stream.detach() {
            Ok(socket) => {
                let arrival = Arrival { id, socket, decoder, first, _permit: permit };
                // It fails only while the receiver ends; then the connection ends too.
                let _ = self.threads[thread].send(Task::Connect(Box::new(arrival))).await;
            }
            Err(error) => tracing::warn!(connection = id.0, %error, "cannot hand a connection on"),
        }
    }
}

/// Reads until the first message is there; none when the agent leaves before, or sends what is no
/// stream and is told so.
async fn greet(mut stream: Stream) -> io::Result<Option<(Stream, Decoder, Sequenced)>> {
    let mut decoder = Decoder::limited(FIRST_PAYLOAD_BYTES_MAX);
    loop {
        match decoder.next_message() {
            Ok(Some(first)) => {
                decoder.limit(PAYLOAD_BYTES_MAX);
                return Ok(Some((stream, decoder, first)));
            }
            Ok(None) => {}
            Err(error) => {
                tracing::warn!(%error, "a peer was refused");
                let close = Message::Close(undecodable(&error));
                let (header, payload) = encode(1, &close);
                let mut duplex = stream.split();
                duplex.writer.write_all(&header).await?;
                duplex.writer.write_all(&payload).await?;
                duplex.writer.shutdown().await?;
                drain(&mut duplex.reader).await;
                return Ok(None);
            }
        }
        if stream.read(decoder.buffer()).await? == 0 {
            return Ok(None);
        }
    }
}

/// Reads and drops until the peer ends: closing with unread bytes would make the system throw away
/// what the peer has not read of our last words. The caller bounds how long.
pub(crate) async fn drain(reader: &mut (dyn tokio::io::AsyncRead + Send + Unpin)) {
    let mut scrap = [0; 4096];
    while let Ok(read) = tokio::io::AsyncReadExt::read(reader, &mut scrap).await
        && read > 0
    {}
}
