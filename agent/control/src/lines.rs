//! The connections of a control API: clients that keep one open and ask for nothing.
//!
//! Invariants: a connection on which a call is under way is never ended here, unless its client takes nothing of the answer
//! for long; one that has been idle for long is, and the oldest idle one at once when descriptors are short or when there are
//! too many, so that whoever comes to ask is answered.

use std::{
    collections::BTreeMap,
    io,
    os::fd::AsRawFd,
    pin::Pin,
    sync::{
        Arc, Mutex, MutexGuard, PoisonError,
        atomic::{AtomicBool, Ordering},
    },
    task::{Context, Poll, Waker},
    time::Duration,
};

use backtide_socket::Door;
use tokio::{
    io::{AsyncRead, AsyncWrite, ReadBuf},
    net::{TcpListener, TcpStream, UnixListener, UnixStream},
    time::Sleep,
};

/// How long a client may keep a connection on which it asks for nothing, or takes nothing of what it asked for. Our own give
/// theirs up earlier.
const IDLE: Duration = Duration::from_secs(60);

/// So many connections are open at once as long as some of them are idle.
pub(crate) const LINES_MAX: usize = 256;

/// Where calls come in.
pub(crate) trait Source: Send + Sync + 'static {
    /// A client's connection.
    type Io: AsyncRead + AsyncWrite + AsRawFd + Send + Unpin + 'static;

    /// The next one.
    fn next(&self) -> impl Future<Output = io::Result<Self::Io>> + Send;
}

impl Source for UnixListener {
    type Io = UnixStream;

    async fn next(&self) -> io::Result<UnixStream> {
        Ok(self.accept().await?.0)
    }
}

impl Source for TcpListener {
    type Io = TcpStream;

    async fn next(&self) -> io::Result<TcpStream> {
        Ok(self.accept().await?.0)
    }
}

/// What a control API accepts from.
pub(crate) struct Lines<S> {
    source: S,
    door: Door,
    next: u64,
    open: Open,
}

/// The connections, in the order in which they came.
type Open = Arc<Mutex<BTreeMap<u64, Arc<Use>>>>;

/// What is known of a connection.
#[derive(Default)]
struct Use {
    /// A call is under way: something came, and what was answered since is not all sent.
    is_asking: AtomicBool,
    /// It is to end.
    is_over: AtomicBool,
    /// Who waits for its client.
    reader: Mutex<Option<Waker>>,
}

/// A connection.
pub(crate) struct Line<Io> {
    io: Io,
    id: u64,
    used: Arc<Use>,
    /// Something of an answer was sent since something came.
    is_answering: bool,
    idle: Pin<Box<Sleep>>,
    open: Open,
}

impl<S: Source> Lines<S> {
    pub(crate) fn new(source: S, at: impl std::fmt::Display) -> Self {
        let door = Door::new(format_args!("the calls to {at}"));
        Self { source, door, next: 0, open: Arc::default() }
    }
}

impl<S: Source> axum::serve::Listener for Lines<S> {
    type Io = Line<S::Io>;
    type Addr = ();

    async fn accept(&mut self) -> (Self::Io, ()) {
        let open = &self.open;
        let io = loop {
            let accepted = Door::accepted(self.source.next(), || end_oldest_idle(open)).await.map(|io| {
                let descriptor = io.as_raw_fd();
                (io, descriptor)
            });
            if let Some(io) = self.door.admit(accepted, || end_oldest_idle(open)).await {
                break io;
            }
        };
        if lock(open).len() >= LINES_MAX {
            end_oldest_idle(open);
        }
        let (id, used) = (self.next, Arc::<Use>::default());
        self.next += 1;
        lock(open).insert(id, Arc::clone(&used));
        let idle = Box::pin(tokio::time::sleep(IDLE));
        (Line { io, id, used, is_answering: false, idle, open: Arc::clone(open) }, ())
    }

    fn local_addr(&self) -> io::Result<()> {
        Ok(())
    }
}

/// Whether there was one.
fn end_oldest_idle(open: &Open) -> bool {
    let mut open = lock(open);
    let idle = open.iter().find(|(_, used)| !used.is_asking.load(Ordering::Acquire)).map(|(id, _)| *id);
    let Some(used) = idle.and_then(|id| open.remove(&id)) else { return false };
    used.is_over.store(true, Ordering::Release);
    let reader = lock(&used.reader).take();
    reader.into_iter().for_each(Waker::wake);
    true
}

fn lock<T>(kept: &Mutex<T>) -> MutexGuard<'_, T> {
    kept.lock().unwrap_or_else(PoisonError::into_inner)
}

impl<Io> Line<Io> {
    fn note(&mut self, is_asking: bool, is_answering: bool) {
        self.used.is_asking.store(is_asking, Ordering::Release);
        self.is_answering = is_answering;
        self.idle.as_mut().reset(tokio::time::Instant::now() + IDLE);
    }

    fn note_written(&mut self, written: &Poll<io::Result<usize>>) {
        if written.is_ready() {
            self.note(true, true);
        }
    }

    /// Whether it ends now: it has been idle too long, or somebody else needs its descriptor, or its client takes nothing of
    /// what it asked for.
    fn is_over(&mut self, cx: &mut Context<'_>) -> bool {
        *lock(&self.used.reader) = Some(cx.waker().clone());
        let is_asking = self.used.is_asking.load(Ordering::Acquire);
        if is_asking && !self.is_answering {
            return false;
        }
        let gives_way = !is_asking && self.used.is_over.load(Ordering::Acquire);
        gives_way || self.idle.as_mut().poll(cx).is_ready()
    }
}

impl<Io> Drop for Line<Io> {
    fn drop(&mut self) {
        lock(&self.open).remove(&self.id);
    }
}

impl<Io: AsyncRead + Unpin> AsyncRead for Line<Io> {
    fn poll_read(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buffer: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        let had = buffer.filled().len();
        let read = Pin::new(&mut self.io).poll_read(cx, buffer);
        match &read {
            Poll::Ready(Ok(())) if buffer.filled().len() > had => self.note(true, false),
            // To whoever serves it this is a client that has left.
            Poll::Pending if self.is_over(cx) => return Poll::Ready(Ok(())),
            Poll::Ready(_) | Poll::Pending => {}
        }
        read
    }
}

impl<Io: AsyncWrite + Unpin> AsyncWrite for Line<Io> {
    fn poll_write(mut self: Pin<&mut Self>, cx: &mut Context<'_>, data: &[u8]) -> Poll<io::Result<usize>> {
        let written = Pin::new(&mut self.io).poll_write(cx, data);
        self.note_written(&written);
        written
    }

    fn poll_write_vectored(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        data: &[io::IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        let written = Pin::new(&mut self.io).poll_write_vectored(cx, data);
        self.note_written(&written);
        written
    }

    fn is_write_vectored(&self) -> bool {
        self.io.is_write_vectored()
    }

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        let flushed = Pin::new(&mut self.io).poll_flush(cx);
        // It comes when all that there is of an answer was written, but for those that have nothing to write.
        if flushed.is_ready() && self.is_answering {
            self.note(false, false);
            // Whoever serves it knows that nothing came, and would not read again: then nobody would hear of its end.
            let reader = lock(&self.used.reader).take();
            reader.into_iter().for_each(Waker::wake);
        }
        flushed
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.io).poll_shutdown(cx)
    }
}
