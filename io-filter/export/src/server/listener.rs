//! Listening: a socket, its accept loop, and the orderly end of both.
//!
//! Invariants: a socket file is replaced only when nobody answers on it, and removed only while
//! it is the one made here; connections beyond the limit are closed at once; after
//! [`Server::shutdown`] nothing of the server is left running.

use std::{
    cell::RefCell,
    collections::BTreeMap,
    io,
    os::unix::fs::{FileTypeExt, MetadataExt},
    path::{Path, PathBuf},
    pin::pin,
    rc::Rc,
    time::Duration,
};

use backtide_nbd::NbdAddress;
use tokio::{
    io::{AsyncRead, AsyncWrite},
    net::{TcpListener, UnixListener, UnixStream},
    task::{AbortHandle, JoinHandle},
};

use super::{negotiate, serve_until, stop::Stop};
use crate::{BindError, Exports, Limits, ServeError};

/// How long the accept loop waits after an error that is not about one connection, such as too
/// many open files.
const ACCEPT_PAUSE: Duration = Duration::from_millis(100);

/// A bound socket that does not accept yet.
#[derive(Debug)]
pub struct Listener {
    socket: Socket,
    address: NbdAddress,
    /// The socket file to remove in the end.
    _file: Option<SocketFile>,
}

#[derive(Debug)]
enum Socket {
    Tcp(TcpListener),
    Unix(UnixListener),
}

impl Listener {
    /// Listens on `address`. A TCP port of 0 is replaced by a free one.
    ///
    /// # Errors
    /// When the address is in use, is no socket, or the system refuses it.
    pub async fn bind(address: &NbdAddress) -> Result<Self, BindError> {
        let failed = |source| bind_failed(address, source);
        match address {
            NbdAddress::Tcp { host, port } => {
                let socket = TcpListener::bind((host.as_str(), *port)).await.map_err(failed)?;
                let bound = socket.local_addr().map_err(failed)?;
                let address = NbdAddress::Tcp { host: host.clone(), port: bound.port() };
                Ok(Self { socket: Socket::Tcp(socket), address, _file: None })
            }
            NbdAddress::Unix(path) => {
                let socket = match UnixListener::bind(path) {
                    Err(error) if error.kind() == io::ErrorKind::AddrInUse => {
                        remove_stale(path).await?;
                        UnixListener::bind(path).map_err(failed)?
                    }
                    bound => bound.map_err(failed)?,
                };
                let file = Some(SocketFile::of(path).map_err(failed)?);
                Ok(Self { socket: Socket::Unix(socket), address: address.clone(), _file: file })
            }
        }
    }

    /// Takes over a unix socket that somebody else bound and keeps, such as systemd.
    ///
    /// # Errors
    /// When it cannot be made asynchronous.
    pub fn from_unix(socket: std::os::unix::net::UnixListener) -> io::Result<Self> {
        socket.set_nonblocking(true)?;
        let path = socket.local_addr()?.as_pathname().map(Path::to_path_buf).unwrap_or_default();
        let socket = Socket::Unix(UnixListener::from_std(socket)?);
        Ok(Self { socket, address: NbdAddress::Unix(path), _file: None })
    }

    /// Takes over a TCP socket that somebody else bound and keeps.
    ///
    /// # Errors
    /// When it cannot be made asynchronous.
    pub fn from_tcp(socket: std::net::TcpListener) -> io::Result<Self> {
        socket.set_nonblocking(true)?;
        let bound = socket.local_addr()?;
        let address = NbdAddress::Tcp { host: bound.ip().to_string(), port: bound.port() };
        Ok(Self { socket: Socket::Tcp(TcpListener::from_std(socket)?), address, _file: None })
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
        let shared = Rc::new(Shared { exports, limits, connections: RefCell::default() });
        let address = self.address.clone();
        let accepting = tokio::task::spawn_local(accept(self, Rc::clone(&shared)));
        Server { address, accepting, shared }
    }

    async fn accept(&self) -> io::Result<Stream> {
        match &self.socket {
            Socket::Tcp(socket) => {
                let (stream, _) = socket.accept().await?;
                stream.set_nodelay(true)?;
                Ok(Box::new(stream))
            }
            Socket::Unix(socket) => Ok(Box::new(socket.accept().await?.0)),
        }
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

/// Removes a socket file that nobody listens on.
async fn remove_stale(path: &Path) -> Result<(), BindError> {
    let address = NbdAddress::Unix(path.to_path_buf());
    let metadata = match std::fs::symlink_metadata(path) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(()),
        metadata => metadata.map_err(|source| BindError::Io { address: address.clone(), source })?,
    };
    if !metadata.file_type().is_socket() {
        return Err(BindError::NotASocket(path.to_path_buf()));
    }
    // Only a refusal proves that nobody listens; a full backlog, for one, is an answer too.
    match UnixStream::connect(path).await {
        Err(error) if error.kind() == io::ErrorKind::ConnectionRefused => {}
        Ok(_) | Err(_) => return Err(BindError::InUse(address)),
    }
    std::fs::remove_file(path).map_err(|source| BindError::Io { address, source })
}

/// A socket file, recognized by its inode: somebody may have put another in its place.
#[derive(Debug)]
struct SocketFile {
    path: PathBuf,
    identity: (u64, u64),
}

impl SocketFile {
    fn of(path: &Path) -> io::Result<Self> {
        Ok(Self { path: path.to_path_buf(), identity: identity(path)? })
    }
}

impl Drop for SocketFile {
    fn drop(&mut self) {
        if identity(&self.path).is_ok_and(|now| now == self.identity) {
            // Nothing is lost if it stays: the next server finds it stale.
            let _ = std::fs::remove_file(&self.path);
        }
    }
}

fn identity(path: &Path) -> io::Result<(u64, u64)> {
    let metadata = std::fs::symlink_metadata(path)?;
    Ok((metadata.dev(), metadata.ino()))
}

/// Either kind of socket's stream.
trait Duplex: AsyncRead + AsyncWrite + Unpin {}
impl<S: AsyncRead + AsyncWrite + Unpin> Duplex for S {}
type Stream = Box<dyn Duplex>;

struct Shared {
    exports: Rc<dyn Exports>,
    limits: Limits,
    connections: RefCell<Connections>,
}

#[derive(Default)]
struct Connections {
    next: u64,
    open: BTreeMap<u64, Open>,
}

struct Open {
    /// The canonical name of its export, once the handshake has settled it.
    export: Option<String>,
    stop: Rc<Stop>,
    task: Option<JoinHandle<()>>,
}

/// A server that accepts clients. Dropping it stops everything at once; see
/// [`shutdown`](Self::shutdown) for the orderly way.
pub struct Server {
    address: NbdAddress,
    accepting: JoinHandle<()>,
    shared: Rc<Shared>,
}

impl Server {
    /// Where clients connect.
    pub fn address(&self) -> &NbdAddress {
        &self.address
    }

    /// Connections that are open now.
    pub fn connections(&self) -> usize {
        self.shared.connections.borrow().open.len()
    }

    /// Connections of one export, by its canonical name.
    pub fn connections_of(&self, export: &str) -> usize {
        let connections = self.shared.connections.borrow();
        connections.open.values().filter(|open| open.export.as_deref() == Some(export)).count()
    }

    /// Closes the connections of one export in good order: what is in flight is finished and
    /// answered; what is not so far after `grace` is cut off. Take it out of the [`Exports`]
    /// first, or clients come back.
    pub async fn close_export(&self, export: &str, grace: Duration) {
        close(&self.shared, |open| open.export.as_deref() == Some(export), grace).await;
    }

    /// Stops accepting, lets every connection finish what is in flight, closes. Connections
    /// that are not done after `grace` are cut off.
    pub async fn shutdown(mut self, grace: Duration) {
        self.accepting.abort();
        // The loop's end closes the socket and removes its file.
        let _ = (&mut self.accepting).await;
        close(&self.shared, |_| true, grace).await;
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        self.accepting.abort();
        for open in self.shared.connections.borrow().open.values() {
            if let Some(task) = &open.task {
                task.abort();
            }
        }
    }
}

async fn close(shared: &Shared, mut which: impl FnMut(&Open) -> bool, grace: Duration) {
    let tasks: Vec<JoinHandle<()>> = shared
        .connections
        .borrow_mut()
        .open
        .values_mut()
        .filter(|open| which(open))
        .filter_map(|open| {
            open.stop.request();
            open.task.take()
        })
        .collect();
    let cut_off: Vec<AbortHandle> = tasks.iter().map(JoinHandle::abort_handle).collect();
    let mut finished = pin!(async {
        for task in tasks {
            // An error is a task that was aborted or panicked: it is over.
            let _ = task.await;
        }
    });
    if tokio::time::timeout(grace, &mut finished).await.is_err() {
        tracing::warn!(?grace, "NBD connections did not finish in time, cutting them off");
        for task in cut_off {
            task.abort();
        }
        finished.await;
    }
}

async fn accept(listener: Listener, shared: Rc<Shared>) {
    loop {
        let stream = match listener.accept().await {
            Ok(stream) => stream,
            Err(error) => {
                tracing::warn!(address = %listener.address, %error, "cannot accept an NBD client");
                tokio::time::sleep(ACCEPT_PAUSE).await;
                continue;
            }
        };
        let mut connections = shared.connections.borrow_mut();
        if connections.open.len() >= shared.limits.connections {
            let limit = shared.limits.connections;
            tracing::warn!(address = %listener.address, limit, "too many NBD connections");
            continue;
        }
        let id = connections.next;
        connections.next += 1;
        let stop = Rc::<Stop>::default();
        let entry = Entry { shared: Rc::clone(&shared), id };
        let task = tokio::task::spawn_local(connection(stream, entry, Rc::clone(&stop)));
        connections.open.insert(id, Open { export: None, stop, task: Some(task) });
    }
}

/// A connection's place in the list; leaves it when the task ends, however it ends.
struct Entry {
    shared: Rc<Shared>,
    id: u64,
}

impl Drop for Entry {
    fn drop(&mut self) {
        // Taken out before it is dropped: dropping must not find the list borrowed.
        let open = self.shared.connections.borrow_mut().open.remove(&self.id);
        drop(open);
    }
}

async fn connection(stream: Stream, entry: Entry, stop: Rc<Stop>) {
    if let Err(error) = serve(stream, &entry, &stop).await {
        let source = std::error::Error::source(&error);
        tracing::debug!(%error, source, "NBD connection ended");
    }
}

async fn serve(stream: Stream, entry: &Entry, stop: &Stop) -> Result<(), ServeError> {
    let Shared { exports, limits, connections } = &*entry.shared;
    let negotiated = tokio::select! {
        biased;
        () = stop.requested() => return Ok(()),
        negotiated = negotiate(stream, &**exports, limits) => negotiated?,
    };
    let Some(negotiated) = negotiated else { return Ok(()) };
    let name = negotiated.session.requested.clone();
    let export = exports.find(&name).ok_or(ServeError::ExportGone(name))?;
    if let Some(open) = connections.borrow_mut().open.get_mut(&entry.id) {
        open.export = Some(negotiated.session.export.name.clone());
    }
    serve_until(negotiated, export, *limits, stop).await
}
