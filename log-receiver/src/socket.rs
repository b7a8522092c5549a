//! Sockets that streams arrive on: unix or TCP, listening and accepted.
//!
//! Invariants: a socket file is replaced only when nobody answers on it, has mode 0600 (a stream has
//! no authentication of its own), and is removed in the end only while it is the one made here.

use std::{fs, io, os::unix::fs::PermissionsExt, path::Path};

use backtide_control::Address;
use backtide_socket::{Occupied, Place, SocketFile};
use tokio::{
    io::{AsyncRead, AsyncWrite},
    net::{TcpListener, TcpStream, UnixListener, UnixStream},
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

enum ListenerKind {
    Unix { listener: UnixListener, _file: SocketFile },
    Tcp(TcpListener),
}

/// An accepted stream that belongs to no thread's event loop yet.
pub(crate) enum Socket {
    Unix(std::os::unix::net::UnixStream),
    Tcp(std::net::TcpStream),
}

/// An accepted stream on this thread's event loop, in its two directions.
pub(crate) struct Duplex {
    pub(crate) reader: Box<dyn AsyncRead + Send + Unpin>,
    pub(crate) writer: Box<dyn AsyncWrite + Send + Unpin>,
}

/// An accepted stream on this thread's event loop.
pub(crate) enum Stream {
    Unix(UnixStream),
    Tcp(TcpStream),
}

impl Listener {
    pub(crate) async fn bind(address: &Address) -> Result<Self, ListenError> {
        match address {
            Address::Unix(path) => bind_unix(address, path).await,
            Address::Tcp { host, port } => bind_tcp(address, host, *port).await,
        }
    }

    /// Where agents connect, with the real port.
    pub(crate) fn address(&self) -> &Address {
        &self.address
    }

    pub(crate) async fn accept(&self) -> io::Result<Stream> {
        match &self.kind {
            ListenerKind::Unix { listener, .. } => Ok(Stream::Unix(listener.accept().await?.0)),
            ListenerKind::Tcp(listener) => {
                let (stream, _) = listener.accept().await?;
                stream.set_nodelay(true)?;
                keep_alive(&stream)?;
                Ok(Stream::Tcp(stream))
            }
        }
    }
}

impl Stream {
    /// Takes the stream off this thread's event loop.
    pub(crate) fn detach(self) -> io::Result<Socket> {
        Ok(match self {
            Self::Unix(stream) => Socket::Unix(stream.into_std()?),
            Self::Tcp(stream) => Socket::Tcp(stream.into_std()?),
        })
    }

    pub(crate) fn split(self) -> Duplex {
        match self {
            Self::Unix(stream) => {
                let (reader, writer) = stream.into_split();
                Duplex { reader: Box::new(reader), writer: Box::new(writer) }
            }
            Self::Tcp(stream) => {
                let (reader, writer) = stream.into_split();
                Duplex { reader: Box::new(reader), writer: Box::new(writer) }
            }
        }
    }

    /// Reads what is there into `buffer`; 0 at the end of the stream.
    pub(crate) async fn read(&mut self, buffer: &mut bytes::BytesMut) -> io::Result<usize> {
        use tokio::io::AsyncReadExt;
        match self {
            Self::Unix(stream) => stream.read_buf(buffer).await,
            Self::Tcp(stream) => stream.read_buf(buffer).await,
        }
    }
}

impl Socket {
    /// Puts the stream on this thread's event loop.
    pub(crate) fn attach(self) -> io::Result<Stream> {
        Ok(match self {
            Self::Unix(stream) => Stream::Unix(UnixStream::from_std(stream)?),
            Self::Tcp(stream) => Stream::Tcp(TcpStream::from_std(stream)?),
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

async fn bind_tcp(address: &Address, host: &str, port: u16) -> Result<Listener, ListenError> {
    let failed = |source: io::Error| match source.kind() {
        io::ErrorKind::AddrInUse => ListenError::InUse(address.clone()),
        _ => ListenError::Io { address: address.clone(), source },
    };
    let listener = TcpListener::bind((host, port)).await.map_err(failed)?;
    let port = listener.local_addr().map_err(failed)?.port();
    let address = Address::Tcp { host: host.to_owned(), port };
    Ok(Listener { kind: ListenerKind::Tcp(listener), address })
}

async fn bind_unix(address: &Address, path: &Path) -> Result<Listener, ListenError> {
    let failed = |source| ListenError::Io { address: address.clone(), source };
    Place::clear(path).await.map_err(|occupied| match occupied {
        Occupied::Live => ListenError::InUse(address.clone()),
        Occupied::NoSocket => ListenError::NoSocket(address.clone()),
        Occupied::Io(source) => failed(source),
    })?;
    let listener = UnixListener::bind(path).map_err(failed)?;
    fs::set_permissions(path, fs::Permissions::from_mode(0o600)).map_err(failed)?;
    let file = SocketFile::of(path).map_err(failed)?;
    let kind = ListenerKind::Unix { listener, _file: file };
    Ok(Listener { kind, address: address.clone() })
}
