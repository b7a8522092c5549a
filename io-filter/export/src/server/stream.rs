//! A connection's stream: a client's socket, in the clear or under TLS.
//!
//! A client of a shared socket is greeted on one thread and served on another. Its socket leaves the first one's runtime
//! ([`Stream::park`]) and enters the second's ([`Parked::unpark`]); what TLS has read of it or not sent yet goes along.

use std::{
    io::{self, IoSlice},
    os::fd::OwnedFd,
    pin::Pin,
    task::{Context, Poll},
};

use rustls::pki_types::CertificateDer;
use tokio::{
    io::{AsyncRead, AsyncWrite, ReadBuf},
    net::{TcpStream, UnixStream},
};
use tokio_rustls::{TlsAcceptor, server::TlsStream};

use super::{expected::Peer, hangup::Hangup};

/// Whatever bytes come and go through.
pub(crate) trait Duplex: AsyncRead + AsyncWrite + Unpin {}
impl<S: AsyncRead + AsyncWrite + Unpin> Duplex for S {}

/// A connection's stream.
pub(crate) enum Stream {
    Clear(Socket),
    Secured(Box<TlsStream<Socket>>),
    /// What somebody else made; it stays on its thread.
    Other(Box<dyn Duplex>),
}

/// A client's socket.
#[derive(Debug)]
pub(crate) enum Socket {
    Tcp(TcpStream),
    Unix(UnixStream),
    /// Of no runtime, on its way to another thread.
    Parked(Kind, OwnedFd),
    /// It could not be taken out of its runtime.
    Gone,
}

/// What kind of socket a descriptor is.
#[derive(Clone, Copy, Debug)]
pub(crate) enum Kind {
    Tcp,
    Unix,
}

/// A stream on its way to another thread.
pub(crate) struct Parked(ParkedStream);

enum ParkedStream {
    Clear(Socket),
    Secured(Box<TlsStream<Socket>>),
}

impl Stream {
    /// The same stream once its client and `acceptor` have agreed on TLS.
    pub(crate) async fn secured(self, acceptor: TlsAcceptor) -> io::Result<Self> {
        Ok(match self {
            Self::Clear(socket) => Self::Secured(Box::new(acceptor.accept(socket).await?)),
            Self::Other(stream) => Self::Other(Box::new(acceptor.accept(stream).await?)),
            Self::Secured(_) => return Err(io::Error::other("TLS was started already")),
        })
    }

    /// The chain of the certificate that the client showed, if it showed one.
    pub(crate) fn client_certificates(&self) -> Option<&[CertificateDer<'static>]> {
        match self {
            Self::Secured(stream) => stream.get_ref().1.peer_certificates(),
            Self::Clear(_) | Self::Other(_) => None,
        }
    }

    /// What tells that the client has hung up; none where nothing does.
    pub(crate) fn hangup(&self) -> Option<Hangup> {
        match self {
            Self::Clear(socket) => socket.hangup(),
            Self::Secured(stream) => stream.get_ref().0.hangup(),
            Self::Other(_) => None,
        }
    }

    /// The process of a client on this host, where its socket tells.
    pub(crate) fn process(&self) -> Option<u32> {
        self.socket().and_then(Socket::process)
    }

    /// Who the client is, as far as its socket tells.
    pub(crate) fn peer(&self) -> Peer {
        let host = self.socket().and_then(Socket::host);
        host.unwrap_or_else(|| Peer::process(self.process()))
    }

    fn socket(&self) -> Option<&Socket> {
        match self {
            Self::Clear(socket) => Some(socket),
            Self::Secured(stream) => Some(stream.get_ref().0),
            Self::Other(_) => None,
        }
    }

    /// What its bytes come and go through.
    fn inner(self: Pin<&mut Self>) -> Pin<&mut dyn Duplex> {
        match self.get_mut() {
            Self::Clear(socket) => Pin::new(socket),
            Self::Secured(stream) => Pin::new(stream),
            Self::Other(stream) => Pin::new(stream),
        }
    }

    /// Takes it out of this thread's runtime.
    ///
    /// # Errors
    /// When the system refuses, or somebody else made it.
    pub(crate) fn park(self) -> io::Result<Parked> {
        Ok(Parked(match self {
            Self::Clear(mut socket) => {
                socket.park()?;
                ParkedStream::Clear(socket)
            }
            Self::Secured(mut stream) => {
                stream.get_mut().0.park()?;
                ParkedStream::Secured(stream)
            }
            Self::Other(_) => return Err(io::ErrorKind::Unsupported.into()),
        }))
    }
}

impl Parked {
    /// Puts it into this thread's runtime.
    pub(crate) fn unpark(self) -> io::Result<Stream> {
        Ok(match self.0 {
            ParkedStream::Clear(mut socket) => {
                socket.unpark()?;
                Stream::Clear(socket)
            }
            ParkedStream::Secured(mut stream) => {
                stream.get_mut().0.unpark()?;
                Stream::Secured(stream)
            }
        })
    }
}

impl Socket {
    fn park(&mut self) -> io::Result<()> {
        let (kind, fd) = match std::mem::replace(self, Self::Gone) {
            Self::Tcp(socket) => (Kind::Tcp, socket.into_std()?.into()),
            Self::Unix(socket) => (Kind::Unix, socket.into_std()?.into()),
            Self::Parked(kind, fd) => (kind, fd),
            Self::Gone => return Err(io::ErrorKind::NotConnected.into()),
        };
        *self = Self::Parked(kind, fd);
        Ok(())
    }

    fn unpark(&mut self) -> io::Result<()> {
        *self = match std::mem::replace(self, Self::Gone) {
            Self::Parked(Kind::Tcp, fd) => Self::Tcp(TcpStream::from_std(fd.into())?),
            Self::Parked(Kind::Unix, fd) => Self::Unix(UnixStream::from_std(fd.into())?),
            Self::Gone => return Err(io::ErrorKind::NotConnected.into()),
            socket @ (Self::Tcp(_) | Self::Unix(_)) => socket,
        };
        Ok(())
    }

    fn hangup(&self) -> Option<Hangup> {
        match self {
            Self::Tcp(socket) => Hangup::of_tcp(socket).ok(),
            Self::Unix(socket) => Hangup::of_unix(socket).ok(),
            Self::Parked(..) | Self::Gone => None,
        }
    }

    fn process(&self) -> Option<u32> {
        match self {
            // A process of another namespace has no number here.
            Self::Unix(socket) => socket.peer_cred().ok()?.pid()?.try_into().ok().filter(|id| *id > 0),
            Self::Tcp(_) | Self::Parked(..) | Self::Gone => None,
        }
    }

    /// Where it connects from.
    fn host(&self) -> Option<Peer> {
        match self {
            Self::Tcp(socket) => {
                let near = socket.local_addr().ok().map(|near| near.ip());
                Some(Peer::host(socket.peer_addr().ok()?.ip(), near))
            }
            Self::Unix(_) | Self::Parked(..) | Self::Gone => None,
        }
    }

    /// Reads or writes with `poll`; not while it is of no runtime.
    fn poll<T>(
        self: Pin<&mut Self>,
        poll: impl FnOnce(Pin<&mut dyn Duplex>) -> Poll<io::Result<T>>,
    ) -> Poll<io::Result<T>> {
        match self.get_mut() {
            Self::Tcp(socket) => poll(Pin::new(socket)),
            Self::Unix(socket) => poll(Pin::new(socket)),
            Self::Parked(..) | Self::Gone => Poll::Ready(Err(io::ErrorKind::NotConnected.into())),
        }
    }
}

impl AsyncRead for Socket {
    fn poll_read(self: Pin<&mut Self>, cx: &mut Context<'_>, into: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        self.poll(|socket| socket.poll_read(cx, into))
    }
}

impl AsyncWrite for Socket {
    fn poll_write(self: Pin<&mut Self>, cx: &mut Context<'_>, bytes: &[u8]) -> Poll<io::Result<usize>> {
        self.poll(|socket| socket.poll_write(cx, bytes))
    }

    fn poll_write_vectored(
        self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        slices: &[IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        self.poll(|socket| socket.poll_write_vectored(cx, slices))
    }

    fn is_write_vectored(&self) -> bool {
        true
    }

    fn poll_flush(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        self.poll(|socket| socket.poll_flush(cx))
    }

    fn poll_shutdown(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        self.poll(|socket| socket.poll_shutdown(cx))
    }
}

impl AsyncRead for Stream {
    fn poll_read(self: Pin<&mut Self>, cx: &mut Context<'_>, into: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        self.inner().poll_read(cx, into)
    }
}

impl AsyncWrite for Stream {
    fn poll_write(self: Pin<&mut Self>, cx: &mut Context<'_>, bytes: &[u8]) -> Poll<io::Result<usize>> {
        self.inner().poll_write(cx, bytes)
    }

    fn poll_write_vectored(
        self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        slices: &[IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        self.inner().poll_write_vectored(cx, slices)
    }

    fn is_write_vectored(&self) -> bool {
        match self {
            Self::Clear(socket) => socket.is_write_vectored(),
            Self::Secured(stream) => stream.is_write_vectored(),
            Self::Other(stream) => stream.is_write_vectored(),
        }
    }

    fn poll_flush(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        self.inner().poll_flush(cx)
    }

    fn poll_shutdown(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        self.inner().poll_shutdown(cx)
    }
}

#[cfg(test)]
mod tests {
    use std::net::{IpAddr, Ipv4Addr, UdpSocket};

    use tokio::net::TcpListener;

    use super::*;

    /// An address of this host by which others reach it; loopback where it has none. Nothing is sent.
    fn own_address() -> IpAddr {
        let socket = UdpSocket::bind((Ipv4Addr::UNSPECIFIED, 0)).unwrap();
        let local = socket.connect(("192.0.2.1", 9)).and_then(|()| socket.local_addr());
        local.map_or(Ipv4Addr::LOCALHOST.into(), |local| local.ip())
    }

    #[tokio::test]
    async fn a_client_from_this_hosts_own_address_is_of_this_host() {
        let listener = TcpListener::bind((own_address(), 0)).await.unwrap();
        let address = listener.local_addr().unwrap();
        let (client, accepted) = tokio::join!(TcpStream::connect(address), listener.accept());
        let _client = client.unwrap();
        let peer = Stream::Clear(Socket::Tcp(accepted.unwrap().0)).peer();
        assert_eq!(peer, Peer::Host(Ipv4Addr::LOCALHOST.into()), "{address}");
    }
}
