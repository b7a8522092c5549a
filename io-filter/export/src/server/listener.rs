//! Listening: who may have an address.
//!
//! Invariants: a socket file is replaced only when nobody answers on it, and removed only while
//! it is the one made here. Whoever its mode does not let in never gets in, whatever the umask.

use std::{
    io,
    os::fd::{AsRawFd, RawFd},
    path::Path,
    rc::Rc,
};

use backtide_nbd::server::TlsMode;
use backtide_nbd::{NbdAddress, NbdUri};
use backtide_socket::{Listening, Occupied, SocketFile, SocketMode, Sockets, bind_unix};
use backtide_units::DiskName;
use tokio::net::{TcpListener, UnixListener};

use super::negotiate::Choice;
use super::seats::Seats;
use super::stream::{Socket as Client, Stream};
use super::{Directory, Server};
use crate::{BindError, ClientCertificates, Exports, Limits, ServerTls, alive::Patience};

/// A bound socket that does not accept yet.
#[derive(Debug)]
pub struct Listener {
    socket: Socket,
    address: NbdAddress,
    tls: ServerTls,
    /// The socket file to remove in the end.
    file: Option<SocketFile>,
}

#[derive(Debug)]
enum Socket {
    Tcp(TcpListener),
    Unix(UnixListener),
}

impl Listener {
    /// Listens on `address`, on a unix socket for this user. A TCP port of 0 is replaced by a free one.
    ///
    /// # Errors
    /// When the address is in use, is no socket, or the system refuses it.
    pub async fn bind(address: &NbdAddress) -> Result<Self, BindError> {
        Self::bind_for(address, SocketMode::PRIVATE).await
    }

    async fn bind_for(address: &NbdAddress, mode: SocketMode) -> Result<Self, BindError> {
        let failed = |source| bind_failed(address, source);
        match address {
            NbdAddress::Tcp { host, port } => {
                let socket = TcpListener::bind((host.as_str(), *port)).await.map_err(failed)?;
                let bound = socket.local_addr().map_err(failed)?;
                let address = NbdAddress::Tcp { host: host.clone(), port: bound.port() };
                Ok(Self { socket: Socket::Tcp(socket), address, tls: ServerTls::off(), file: None })
            }
            NbdAddress::Unix(path) => {
                let (socket, file) = bind_unix(path, mode).await.map_err(|occupied| match occupied {
                    Occupied::Live => BindError::InUse(address.clone()),
                    Occupied::NoSocket => BindError::NotASocket(path.clone()),
                    Occupied::Io(source) => failed(source),
                })?;
                let (socket, file) = (Socket::Unix(socket), Some(file));
                Ok(Self { socket, address: address.clone(), tls: ServerTls::off(), file })
            }
        }
    }

    /// Listens where `uri` says, on a unix socket for whom `mode` lets in: with `nbds` every client has to use TLS, if it is
    /// [required](backtide_nbd::UriTls::required), and then to have a certificate.
    ///
    /// # Errors
    /// As [`bind`](Self::bind), and when the certificates cannot be used.
    pub async fn bind_uri(uri: &NbdUri, mode: SocketMode) -> Result<Self, BindError> {
        let tls = tls_of(uri).await?;
        Ok(Self::bind_for(&uri.address, mode).await?.with_tls(tls))
    }

    /// The same on a socket that `sockets` has kept for `purpose` or, if there is none, on a new one
    /// that it keeps from now on: the end of this listener does not close it.
    ///
    /// # Errors
    /// As [`bind_uri`](Self::bind_uri).
    pub async fn bind_kept(
        uri: &NbdUri,
        mode: SocketMode,
        sockets: &Sockets,
        purpose: &str,
    ) -> Result<Self, BindError> {
        let tls = tls_of(uri).await?;
        let failed = |source| bind_failed(&uri.address, source);
        let place = place_of(uri);
        if let Some(socket) = sockets.take(purpose, place) {
            return match &uri.address {
                NbdAddress::Tcp { .. } => Self::from_tcp(socket.into()),
                NbdAddress::Unix(_) => Self::from_unix(socket.into()),
            }
            .map(|kept| Self { address: with_port_of(&uri.address, &kept.address), ..kept.with_tls(tls) })
            .map_err(failed);
        }
        let mut listener = Self::bind_for(&uri.address, mode).await?.with_tls(tls);
        let file = listener.file.take();
        let kept = match &listener.socket {
            Socket::Tcp(socket) => sockets.keep(purpose, place, socket, file),
            Socket::Unix(socket) => sockets.keep(purpose, place, socket, file),
        };
        kept.map_err(failed)?;
        Ok(listener)
    }

    /// Whether [`bind_kept`](Self::bind_kept) would listen there now; nothing listens afterwards that did not before.
    ///
    /// # Errors
    /// Those of [`bind_kept`](Self::bind_kept).
    pub async fn check_kept(
        uri: &NbdUri,
        mode: SocketMode,
        sockets: &Sockets,
        purpose: &str,
    ) -> Result<(), BindError> {
        match sockets.take(purpose, place_of(uri)) {
            Some(_) => tls_of(uri).await.map(drop),
            None => Self::bind_uri(uri, mode).await.map(drop),
        }
    }

    /// The same listener, encrypting as `tls` says.
    #[must_use]
    pub fn with_tls(self, tls: ServerTls) -> Self {
        Self { tls, ..self }
    }

    /// The same listener, which serves `disk`: a client that shows a certificate needs one that speaks for it.
    #[must_use]
    pub fn for_disk(self, disk: DiskName) -> Self {
        Self { tls: self.tls.for_disk(disk), ..self }
    }

    /// Takes over a unix socket that somebody else bound and keeps, such as systemd.
    ///
    /// # Errors
    /// When it cannot be made asynchronous.
    pub fn from_unix(socket: std::os::unix::net::UnixListener) -> io::Result<Self> {
        socket.set_nonblocking(true)?;
        let path = socket.local_addr()?.as_pathname().map(Path::to_path_buf).unwrap_or_default();
        let socket = Socket::Unix(UnixListener::from_std(socket)?);
        Ok(Self { socket, address: NbdAddress::Unix(path), tls: ServerTls::off(), file: None })
    }

    /// Takes over a TCP socket that somebody else bound and keeps.
    ///
    /// # Errors
    /// When it cannot be made asynchronous.
    pub fn from_tcp(socket: std::net::TcpListener) -> io::Result<Self> {
        socket.set_nonblocking(true)?;
        let bound = socket.local_addr()?;
        let address = NbdAddress::Tcp { host: bound.ip().to_string(), port: bound.port() };
        let socket = Socket::Tcp(TcpListener::from_std(socket)?);
        Ok(Self { socket, address, tls: ServerTls::off(), file: None })
    }

    /// Where clients connect; the port is the real one.
    pub fn address(&self) -> &NbdAddress {
        &self.address
    }

    /// Accepts clients from now on, each in a task of its own on this thread.
    ///
    /// # Panics
    /// Outside a `LocalSet`.
    pub fn serve(self, exports: Rc<dyn Exports>, limits: Limits) -> Server {
        let tls = self.tls.clone();
        let seats = Seats::new(limits.connections, limits.handshake);
        Server::start(self, Choice::Own(exports, Some(seats)), limits, tls)
    }

    /// Accepts clients of all exports in `directory` from now on, and hands each to the server of the one it chooses. Of
    /// `limits` those of handshakes count here; a client whose certificate names disks is shown no others.
    ///
    /// # Panics
    /// Outside a `LocalSet`.
    pub fn serve_directory(self, directory: Directory, limits: Limits) -> Server {
        let tls = self.tls.clone();
        Server::start(self, Choice::Others(directory), limits, tls)
    }

    /// The next client, and its descriptor.
    pub(crate) async fn accept(&self) -> io::Result<(Stream, RawFd)> {
        match &self.socket {
            Socket::Tcp(socket) => loop {
                let (stream, client) = socket.accept().await?;
                // A client that is gone already is no trouble of the listener's.
                match stream.set_nodelay(true).and_then(|()| Patience::WITH_CLIENTS.apply(&stream)) {
                    Ok(()) => {
                        let descriptor = stream.as_raw_fd();
                        return Ok((Stream::Clear(Client::Tcp(stream)), descriptor));
                    }
                    Err(error) => tracing::debug!(%client, %error, "NBD client went away"),
                }
            },
            Socket::Unix(socket) => {
                let (stream, _) = socket.accept().await?;
                let descriptor = stream.as_raw_fd();
                Ok((Stream::Clear(Client::Unix(stream)), descriptor))
            }
        }
    }
}

/// How a server at `uri` encrypts.
async fn tls_of(uri: &NbdUri) -> Result<ServerTls, BindError> {
    let Some(tls) = &uri.tls else { return Ok(ServerTls::off()) };
    let mode = if tls.required { TlsMode::Required } else { TlsMode::Optional };
    ServerTls::load(mode, &tls.certificates, ClientCertificates::Required).await.map_err(BindError::Tls)
}

/// The address asked for, with the port that was found for it.
fn with_port_of(asked: &NbdAddress, bound: &NbdAddress) -> NbdAddress {
    match (asked, bound) {
        (NbdAddress::Tcp { host, .. }, NbdAddress::Tcp { port, .. }) => {
            NbdAddress::Tcp { host: host.clone(), port: *port }
        }
        (asked, _) => asked.clone(),
    }
}

fn place_of(uri: &NbdUri) -> Listening<'_> {
    match &uri.address {
        NbdAddress::Tcp { host, port } => Listening::Tcp(host, *port),
        NbdAddress::Unix(path) => Listening::Unix(path),
    }
}

fn bind_failed(address: &NbdAddress, source: io::Error) -> BindError {
    let address = address.clone();
    if source.kind() == io::ErrorKind::AddrInUse {
        BindError::InUse(address)
    } else {
        BindError::Io { address, source }
    }
}
