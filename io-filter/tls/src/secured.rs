//! The receiver's end of an encrypted stream: a TLS session over a socket, to read and to write.
//!
//! It can be taken apart into the socket and the session and put together again on another thread's
//! event loop, which is why it is here: the handshake is done before it is known which thread owns
//! the disk. Reads take as much of the socket as there is, so a batch of records costs one call.
//!
//! Invariants: what was accepted and not sent yet is bounded, for a write takes nothing before what
//! was accepted earlier is out; what was taken is out after a flush.

use std::{
    io::{self, Read, Write},
    pin::Pin,
    task::{Context, Poll, ready},
};

use rustls::ServerConnection;
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};

/// What is read from the socket at once.
const INCOMING_BYTES: usize = 128 * 1024;

/// The session of an encrypted stream, and what it has read of its socket beyond what it gave.
pub struct Session {
    tls: Box<ServerConnection>,
    incoming: Box<[u8]>,
    /// What of `incoming` the session has not taken yet.
    unread: std::ops::Range<usize>,
    closing: bool,
}

/// An encrypted stream over `IO`.
pub struct Secured<IO> {
    io: IO,
    session: Session,
}

impl Session {
    /// Of a handshake that has been done.
    pub(crate) fn new(tls: ServerConnection) -> Self {
        Self { tls: Box::new(tls), incoming: vec![0; INCOMING_BYTES].into(), unread: 0..0, closing: false }
    }

    /// Gives the session what was read of the socket, until there is something for the reader.
    fn take_incoming(&mut self) -> io::Result<()> {
        let mut rest = &self.incoming[self.unread.clone()];
        self.tls.read_tls(&mut rest)?;
        self.unread.start = self.unread.end - rest.len();
        self.tls.process_new_packets().map_err(|error| io::Error::new(io::ErrorKind::InvalidData, error))?;
        Ok(())
    }
}

impl<IO> Secured<IO> {
    /// Puts a socket and its session together.
    pub fn new(io: IO, session: Session) -> Self {
        Self { io, session }
    }

    /// Takes them apart.
    pub fn into_parts(self) -> (IO, Session) {
        (self.io, self.session)
    }
}

impl<IO: AsyncRead + AsyncWrite + Unpin> Secured<IO> {
    /// Sends what the session has to send.
    fn poll_send(&mut self, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        while self.session.tls.wants_write() {
            let mut blocking = Blocking { io: &mut self.io, cx };
            match self.session.tls.write_tls(&mut blocking) {
                Ok(0) => return Poll::Ready(Err(io::ErrorKind::WriteZero.into())),
                Ok(_) => {}
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => return Poll::Pending,
                Err(error) => return Poll::Ready(Err(error)),
            }
        }
        Poll::Ready(Ok(()))
    }

    /// Decrypts what has been read of the socket, as long as there is room in `buffer`.
    fn give(&mut self, cx: &mut Context<'_>, buffer: &mut ReadBuf<'_>) -> io::Result<bool> {
        let had = buffer.filled().len();
        loop {
            match self.session.tls.reader().read(buffer.initialize_unfilled()) {
                // The peer has said that this is the end.
                Ok(0) => return Ok(true),
                Ok(read) => buffer.advance(read),
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => {
                    if self.session.unread.is_empty() {
                        return Ok(buffer.filled().len() > had);
                    }
                    let taken = self.session.take_incoming();
                    // An answer of the session's own: new keys, or why it ends. Nothing waits for it.
                    if let Poll::Ready(Err(error)) = self.poll_send(cx) {
                        return Err(error);
                    }
                    taken?;
                }
                Err(error) => return Err(error),
            }
            if buffer.remaining() == 0 {
                return Ok(true);
            }
        }
    }
}

impl<IO: AsyncRead + AsyncWrite + Unpin> AsyncRead for Secured<IO> {
    fn poll_read(
        self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buffer: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        let this = self.get_mut();
        if buffer.remaining() == 0 {
            return Poll::Ready(Ok(()));
        }
        while !this.give(cx, buffer)? {
            let mut incoming = ReadBuf::new(&mut this.session.incoming);
            ready!(Pin::new(&mut this.io).poll_read(cx, &mut incoming))?;
            let read = incoming.filled().len();
            this.session.unread = 0..read;
            if read == 0 {
                // An end without a word of the session is a stream that was cut.
                this.session.tls.read_tls(&mut io::empty())?;
                return match this.session.tls.reader().read(&mut []) {
                    Ok(_) => Poll::Ready(Ok(())),
                    Err(error) if error.kind() == io::ErrorKind::WouldBlock => {
                        Poll::Ready(Err(io::ErrorKind::UnexpectedEof.into()))
                    }
                    Err(error) => Poll::Ready(Err(error)),
                };
            }
        }
        Poll::Ready(Ok(()))
    }
}

impl<IO: AsyncRead + AsyncWrite + Unpin> AsyncWrite for Secured<IO> {
    fn poll_write(self: Pin<&mut Self>, cx: &mut Context<'_>, data: &[u8]) -> Poll<io::Result<usize>> {
        let this = self.get_mut();
        ready!(this.poll_send(cx))?;
        let taken = this.session.tls.writer().write(data)?;
        // What does not go out now goes with the next write or flush.
        if let Poll::Ready(Err(error)) = this.poll_send(cx) {
            return Poll::Ready(Err(error));
        }
        Poll::Ready(Ok(taken))
    }

    fn poll_flush(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        let this = self.get_mut();
        ready!(this.poll_send(cx))?;
        Pin::new(&mut this.io).poll_flush(cx)
    }

    fn poll_shutdown(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        let this = self.get_mut();
        if !this.session.closing {
            this.session.closing = true;
            this.session.tls.send_close_notify();
        }
        ready!(this.poll_send(cx))?;
        Pin::new(&mut this.io).poll_shutdown(cx)
    }
}

/// A socket for who knows nothing of waiting: what would wait is an error, and wakes the task later.
struct Blocking<'io, 'cx, 'waker, IO> {
    io: &'io mut IO,
    cx: &'cx mut Context<'waker>,
}

fn or_would_block(result: Poll<io::Result<usize>>) -> io::Result<usize> {
    match result {
        Poll::Ready(result) => result,
        Poll::Pending => Err(io::ErrorKind::WouldBlock.into()),
    }
}

impl<IO: AsyncWrite + Unpin> Write for Blocking<'_, '_, '_, IO> {
    fn write(&mut self, data: &[u8]) -> io::Result<usize> {
        or_would_block(Pin::new(&mut *self.io).poll_write(self.cx, data))
    }

    fn write_vectored(&mut self, data: &[io::IoSlice<'_>]) -> io::Result<usize> {
        or_would_block(Pin::new(&mut *self.io).poll_write_vectored(self.cx, data))
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}
