//! Sockets that streams arrive on: unix or TCP, listening and accepted.
//!
//! Invariants: a socket file is replaced only when nobody answers on it, has mode 0600 (a stream in the
//! clear has no authentication) from before anybody can connect, and is removed in the end only while it is the one made here; TCP in
//! the clear is on loopback, or somebody has said that it may be elsewhere.

use std::{
    io,
    net::{IpAddr, SocketAddr},
    os::fd::{AsRawFd, RawFd},
    path::Path,
    sync::Arc,
};

use backtide_control::Address;
use backtide_socket::{Occupied, SocketFile, SocketMode, bind_unix as bind_unix_at};
use backtide_tls::{Secured, Session, StreamServer, TlsError};
use tokio::{
    io::{AsyncRead, AsyncWrite},
    net::{TcpListener, TcpStream, UnixListener, UnixStream, lookup_host},
};

/// A peer that is silent for this long is asked whether it is there...
const KEEPALIVE_IDLE: std::time::Duration = std::time::Duration::from_secs(30);
/// ... this often ...
const KEEPALIVE_INTERVAL: std::time::Duration = std::time::Duration::from_secs(10);
/// ... and so many times before the connection is lost.
const KEEPALIVE_PROBES: u32 = 3;

/// Why nothing listens at an address.
#[derive(Debug, thiserror::Error)]
pub enum ListenError {
    /// Somebody answers there.
    #[error("the address {0} is in use: another process answers there")]
    InUse(Address),
    /// Something that is no socket has the path.
    #[error("cannot listen at {0}: there is a file of that name that is no socket")]
    NoSocket(Address),
    /// In the clear on a network.
    #[error(
        "{0} is refused: streams would come in the clear, from whoever reaches it: use tls:// with certificates, or --insecure on a network that only hosts you trust are on"
    )]
    Insecure(Address),
    /// TLS without certificates.
    #[error("{0} needs certificates: give --tls-certificates DIR, or certificates in [stream_tls]")]
    NoCertificates(Address),
    /// Certificates that cannot be used.
    #[error("cannot take streams under TLS: {}", .0.chain())]
    Tls(TlsError),
    /// The operating system refused.
    #[error("cannot listen at {address}")]
    Io {
        /// Where.
        address: Address,
        /// Why.
        source: io::Error,
    },
}

/// A socket that listens for streams.
pub(crate) struct Listener {
    kind: ListenerKind,
    address: Address,
}

/// How streams over TCP are let in.
#[derive(Clone, Default)]
pub(crate) struct Entrance {
    /// For `tls://`.
    pub(crate) tls: Option<Arc<StreamServer>>,
    /// Whether TCP in the clear may be off loopback.
    pub(crate) insecure: bool,
}

enum ListenerKind {
    Unix { listener: UnixListener, _file: SocketFile },
    Tcp(TcpListener),
    Tls(TcpListener, Arc<StreamServer>),
}

/// A connection that was just accepted.
pub(crate) struct Accepted {
    pub(crate) stream: Stream,
    /// Where it comes from, over a network.
    pub(crate) from: Option<IpAddr>,
    /// The handshake that is due before anything else.
    pub(crate) tls: Option<Arc<StreamServer>>,
}

/// An accepted stream that belongs to no thread's event loop yet.
pub(crate) enum Socket {
    Unix(std::os::unix::net::UnixStream),
    Tcp(std::net::TcpStream),
    Tls(std::net::TcpStream, Session),
}

/// An accepted stream on this thread's event loop, in its two directions.
pub(crate) struct Duplex {
    pub(crate) reader: Box<dyn AsyncRead + Send + Unpin>,
    pub(crate) writer: Box<dyn AsyncWrite + Send + Unpin>,
    /// What was written is out only after a flush.
    pub(crate) buffered: bool,
}

/// An accepted stream on this thread's event loop.
pub(crate) enum Stream {
    Unix(UnixStream),
    Tcp(TcpStream),
    Tls(Secured<TcpStream>),
}

impl Entrance {
    /// Whether streams may be taken at `address`, as far as can be told without taking the place.
    pub(crate) async fn check(&self, address: &Address) -> Result<(), ListenError> {
        let allowed = match address {
            Address::Unix(_) => return Ok(()),
            Address::Tcp { host, port } => resolve(address, host, *port, self.insecure).await,
            Address::Tls { .. } if self.tls.is_none() => Err(ListenError::NoCertificates(address.clone())),
            Address::Tls { host, port } => resolve(address, host, *port, true).await,
        };
        allowed.map(drop)
    }
}

impl Listener {
    pub(crate) async fn bind(address: &Address, entrance: &Entrance) -> Result<Self, ListenError> {
        match address {
            Address::Unix(path) => bind_unix(address, path).await,
            Address::Tcp { host, port } => {
                let (listener, port) = bind_tcp(address, host, *port, entrance.insecure).await?;
                let address = Address::Tcp { host: host.clone(), port };
                Ok(Self { kind: ListenerKind::Tcp(listener), address })
            }
            Address::Tls { host, port } => {
                let tls = entrance.tls.clone().ok_or_else(|| ListenError::NoCertificates(address.clone()))?;
                let (listener, port) = bind_tcp(address, host, *port, true).await?;
                let address = Address::Tls { host: host.clone(), port };
                Ok(Self { kind: ListenerKind::Tls(listener, tls), address })
            }
        }
    }

    /// Where agents connect, with the real port.
    pub(crate) fn address(&self) -> &Address {
        &self.address
    }

    /// The next connection, and its descriptor.
    pub(crate) async fn accept(&self) -> io::Result<(Accepted, RawFd)> {
        match &self.kind {
            ListenerKind::Unix { listener, .. } => {
                let stream = listener.accept().await?.0;
                let descriptor = stream.as_raw_fd();
                Ok((Accepted { stream: Stream::Unix(stream), from: None, tls: None }, descriptor))
            }
            ListenerKind::Tcp(listener) => accept_tcp(listener, None).await,
            ListenerKind::Tls(listener, tls) => accept_tcp(listener, Some(Arc::clone(tls))).await,
        }
    }
}

impl Stream {
    /// Takes the stream off this thread's event loop.
    pub(crate) fn detach(self) -> io::Result<Socket> {
        Ok(match self {
            Self::Unix(stream) => Socket::Unix(stream.into_std()?),
            Self::Tcp(stream) => Socket::Tcp(stream.into_std()?),
            Self::Tls(stream) => {
                let (socket, session) = stream.into_parts();
                Socket::Tls(socket.into_std()?, session)
            }
        })
    }

    pub(crate) fn split(self) -> Duplex {
        match self {
            Self::Unix(stream) => {
                let (reader, writer) = stream.into_split();
                Duplex { reader: Box::new(reader), writer: Box::new(writer), buffered: false }
            }
            Self::Tcp(stream) => {
                let (reader, writer) = stream.into_split();
                Duplex { reader: Box::new(reader), writer: Box::new(writer), buffered: false }
            }
            Self::Tls(stream) => {
                let (reader, writer) = tokio::io::split(stream);
                Duplex { reader: Box::new(reader), writer: Box::new(writer), buffered: true }
            }
        }
    }

    /// Reads what is there into `buffer`; 0 at the end of the stream.
    pub(crate) async fn read(&mut self, buffer: &mut bytes::BytesMut) -> io::Result<usize> {
        use tokio::io::AsyncReadExt;
        match self {
            Self::Unix(stream) => stream.read_buf(buffer).await,
            Self::Tcp(stream) => stream.read_buf(buffer).await,
            Self::Tls(stream) => stream.read_buf(buffer).await,
        }
    }
}

impl Socket {
    /// Puts the stream on this thread's event loop.
    pub(crate) fn attach(self) -> io::Result<Stream> {
        Ok(match self {
            Self::Unix(stream) => Stream::Unix(UnixStream::from_std(stream)?),
            Self::Tcp(stream) => Stream::Tcp(TcpStream::from_std(stream)?),
            Self::Tls(stream, session) => Stream::Tls(Secured::new(TcpStream::from_std(stream)?, session)),
        })
    }
}

/// An agent whose machine died says nothing any more; this finds out.
fn keep_alive(stream: &TcpStream) -> io::Result<()> {
    use rustix::net::sockopt;
    sockopt::set_socket_keepalive(stream, true)?;
    sockopt::set_tcp_keepidle(stream, KEEPALIVE_IDLE)?;
    sockopt::set_tcp_keepintvl(stream, KEEPALIVE_INTERVAL)?;
    sockopt::set_tcp_keepcnt(stream, KEEPALIVE_PROBES)?;
    Ok(())
}

async fn accept_tcp(listener: &TcpListener, tls: Option<Arc<StreamServer>>) -> io::Result<(Accepted, RawFd)> {
    let (stream, from) = listener.accept().await?;
    stream.set_nodelay(true)?;
    keep_alive(&stream)?;
    let descriptor = stream.as_raw_fd();
    Ok((Accepted { stream: Stream::Tcp(stream), from: Some(from.ip().to_canonical()), tls }, descriptor))
}

/// What a host's name stands for, where streams may be taken; `anywhere` or on loopback.
async fn resolve(
    address: &Address,
    host: &str,
    port: u16,
    anywhere: bool,
) -> Result<Vec<SocketAddr>, ListenError> {
    let failed = |source| ListenError::Io { address: address.clone(), source };
    let resolved: Vec<_> = lookup_host((host, port)).await.map_err(failed)?.collect();
    if !anywhere && resolved.iter().any(|at| !at.ip().is_loopback()) {
        return Err(ListenError::Insecure(address.clone()));
    }
    Ok(resolved)
}

async fn bind_tcp(
    address: &Address,
    host: &str,
    port: u16,
    anywhere: bool,
) -> Result<(TcpListener, u16), ListenError> {
    let failed = |source: io::Error| match source.kind() {
        io::ErrorKind::AddrInUse => ListenError::InUse(address.clone()),
        _ => ListenError::Io { address: address.clone(), source },
    };
    let resolved = resolve(address, host, port, anywhere).await?;
    let listener = TcpListener::bind(resolved.as_slice()).await.map_err(failed)?;
    let port = listener.local_addr().map_err(failed)?.port();
    Ok((listener, port))
}

async fn bind_unix(address: &Address, path: &Path) -> Result<Listener, ListenError> {
    let failed = |source| ListenError::Io { address: address.clone(), source };
    let (listener, file) =
        bind_unix_at(path, SocketMode::PRIVATE).await.map_err(|occupied| match occupied {
            Occupied::Live => ListenError::InUse(address.clone()),
            Occupied::NoSocket => ListenError::NoSocket(address.clone()),
            Occupied::Io(source) => failed(source),
        })?;
    let kind = ListenerKind::Unix { listener, _file: file };
    Ok(Listener { kind, address: address.clone() })
}
