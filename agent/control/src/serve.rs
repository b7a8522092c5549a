//! Serving a control API at an address.
//!
//! Whoever can reach a control API owns the daemon's disks, so it is reached by the same user on
//! the same machine only: a unix socket has mode 0600 from its first moment, TCP is loopback.

use std::{
    future::poll_fn,
    io,
    net::{Ipv4Addr, Ipv6Addr, SocketAddr},
    os::fd::OwnedFd,
    path::Path,
    pin::Pin,
    time::Duration,
};

use axum::{
    Router,
    body::{Body, HttpBody},
    extract::{DefaultBodyLimit, Request},
    http::{
        StatusCode,
        header::{HOST, ORIGIN},
    },
    middleware::{self, Next},
    response::{IntoResponse, Response},
};
use backtide_socket::{Listening, Occupied, SocketFile, SocketMode, Sockets, bind_unix as bind_unix_at};
use tokio::net::{TcpListener, UnixListener, lookup_host};

use crate::{Address, ApiError, ErrorCode, address::SOCKET_PATH_BYTES_MAX, lines::Lines};

/// The largest request body taken. Requests are names and numbers.
const BODY_BYTES_MAX: usize = 1 << 20;

/// How much of a too large request is read for the sake of an answer.
const DISCARDED_BYTES_MAX: usize = 64 << 20;

/// How long a shutdown waits for calls that are still being answered.
const SHUTDOWN_GRACE: Duration = Duration::from_secs(5);

/// A control API that is listening and not served yet: calls queue up until [`Server::run`].
#[derive(Debug)]
pub struct Server {
    listener: Listener,
    address: Address,
}

#[derive(Debug)]
enum Listener {
    Unix { listener: UnixListener, socket: Option<SocketFile> },
    Tcp(TcpListener),
}

/// Why nothing listens at an address.
#[derive(Debug, thiserror::Error)]
pub enum BindError {
    /// Somebody else answers there.
    #[error("{address} is in use: another process answers there")]
    InUse {
        /// Where.
        address: Address,
    },
    /// Something that is no socket has that path.
    #[error("{address} cannot be used: there is a file of that name that is no socket")]
    NoSocket {
        /// Where.
        address: Address,
    },
    /// A control API on a network anybody can reach.
    #[error(
        "{address} is refused: a control API has no authentication, so TCP is served on loopback only (127.0.0.1 or ::1)"
    )]
    NotLoopback {
        /// Where.
        address: Address,
    },
    /// Only streams are under TLS.
    #[error("{address} is refused: a control API is served on a unix socket or on loopback, never under TLS")]
    Tls {
        /// Where.
        address: Address,
    },
    /// The path of the unix socket is too long.
    #[error("{address} cannot be used: the path of a control socket has at most {max} bytes")]
    PathTooLong {
        /// Where.
        address: Address,
        /// The limit.
        max: usize,
    },
    /// The operating system refused.
    #[error("listen at {address}")]
    Io {
        /// Where.
        address: Address,
        /// What it said.
        #[source]
        source: io::Error,
    },
}

impl BindError {
    /// The kind of error a daemon ends with.
    pub fn code(&self) -> ErrorCode {
        match self {
            Self::InUse { .. } | Self::NoSocket { .. } => ErrorCode::Locked,
            Self::NotLoopback { .. } | Self::Tls { .. } => ErrorCode::Refused,
            Self::PathTooLong { .. } => ErrorCode::Usage,
            Self::Io { .. } => ErrorCode::Failed,
        }
    }
}

impl Server {
    /// Listens at `address`. A stale socket file is replaced, but only when nobody answers on it.
    ///
    /// # Errors
    /// See [`BindError`].
    pub async fn bind(address: &Address) -> Result<Self, BindError> {
        match address {
            Address::Unix(path) => bind_unix(address, path).await,
            Address::Tcp { host, port } => bind_tcp(address, host, *port).await,
            Address::Tls { .. } => Err(BindError::Tls { address: address.clone() }),
        }
    }

    /// The same on a socket that `sockets` has kept for `purpose` or, if there is none, on a new one
    /// that it keeps from now on: the end of this server does not close it.
    ///
    /// # Errors
    /// See [`BindError`].
    pub async fn bind_kept(address: &Address, sockets: &Sockets, purpose: &str) -> Result<Self, BindError> {
        let place = match address {
            Address::Unix(path) => Listening::Unix(path),
            Address::Tcp { host, port } => Listening::Tcp(host, *port),
            Address::Tls { .. } => return Err(BindError::Tls { address: address.clone() }),
        };
        let failed = |source| BindError::Io { address: address.clone(), source };
        if let Some(socket) = sockets.take(purpose, place) {
            return inherit(address, socket).map_err(failed);
        }
        let mut server = Self::bind(address).await?;
        match &mut server.listener {
            Listener::Unix { listener, socket } => sockets.keep(purpose, place, &*listener, socket.take()),
            Listener::Tcp(listener) => sockets.keep(purpose, place, &*listener, None),
        }
        .map_err(failed)?;
        Ok(server)
    }

    /// Where it listens, with the real port when port 0 was asked for.
    pub fn address(&self) -> &Address {
        &self.address
    }

    /// Serves `router` until `shutdown` is ready, then lets running calls end for up to five
    /// seconds. The socket file is gone afterwards, and also when this future is dropped.
    ///
    /// # Errors
    /// When accepting connections fails for good.
    pub async fn run(
        self,
        router: Router,
        shutdown: impl Future<Output = ()> + Send + 'static,
    ) -> io::Result<()> {
        let router = json_fallbacks(router)
            .layer(DefaultBodyLimit::disable())
            .layer(middleware::from_fn(no_web_pages));
        // The outermost: also what is refused is read to its end.
        let router = router.layer(middleware::from_fn(whole_body));
        let (ending, mut ended) = tokio::sync::watch::channel(false);
        let shutdown = async move {
            shutdown.await;
            ending.send_replace(true);
        };
        let grace = async move {
            // An error means that serving ended by itself; then the other branch is ready.
            if ended.wait_for(|ending| *ending).await.is_ok() {
                tokio::time::sleep(SHUTDOWN_GRACE).await;
            } else {
                std::future::pending::<()>().await;
            }
        };
        match self.listener {
            Listener::Unix { listener, socket } => {
                let lines = Lines::new(listener, &self.address);
                let serving = axum::serve(lines, router).with_graceful_shutdown(shutdown);
                let result = tokio::select! { result = serving => result, () = grace => Ok(()) };
                drop(socket);
                result
            }
            Listener::Tcp(listener) => {
                let router = router.layer(middleware::from_fn(loopback_host_only));
                let lines = Lines::new(listener, &self.address);
                let serving = axum::serve(lines, router).with_graceful_shutdown(shutdown);
                tokio::select! { result = serving => result, () = grace => Ok(()) }
            }
        }
    }
}

/// The router with unknown paths and methods answered in the APIs' error shape.
pub fn json_fallbacks(router: Router) -> Router {
    router.fallback(no_such_call).method_not_allowed_fallback(no_such_call)
}

/// How the answer to a call begins that the daemon does not know.
pub(crate) const NO_SUCH_CALL: &str = "there is no call";

async fn no_such_call(request: Request) -> ApiError {
    let message = format!("{NO_SUCH_CALL} {} {}", request.method(), request.uri().path());
    ApiError::new(ErrorCode::NotFound, message)
        .with_hint("the daemon may be older or newer than the command; the calls are in docs/api.md")
}

/// Reads a request to its end before anything is answered. A client that is still sending when the
/// connection closes sees a broken pipe and never reads the answer that says what was wrong.
async fn whole_body(request: Request, next: Next) -> Response {
    let (parts, mut body) = request.into_parts();
    let mut taken = Vec::new();
    let mut bytes = 0;
    while let Some(frame) = poll_fn(|context| Pin::new(&mut body).poll_frame(context)).await {
        // The client is gone, or speaks no HTTP any more.
        let Ok(frame) = frame else { return StatusCode::BAD_REQUEST.into_response() };
        let Ok(data) = frame.into_data() else { continue };
        bytes += data.len();
        if bytes <= BODY_BYTES_MAX {
            taken.extend_from_slice(&data);
        } else if bytes > DISCARDED_BYTES_MAX {
            break;
        }
    }
    if bytes > BODY_BYTES_MAX {
        let message = format!("the request is refused: it has more than {BODY_BYTES_MAX} bytes");
        let error = ApiError::new(ErrorCode::Usage, message);
        return error.with_hint("the request bodies are in docs/api.md").into_response();
    }
    next.run(Request::from_parts(parts, Body::from(taken))).await
}

/// Refuses requests that reached loopback under a foreign name: a web page can make a browser ask
/// `http://its.own.name:port` after pointing that name at 127.0.0.1.
async fn loopback_host_only(request: Request, next: Next) -> Response {
    let host = request.headers().get(HOST).and_then(|host| host.to_str().ok()).unwrap_or("");
    if is_loopback(host) {
        return next.run(request).await;
    }
    let error = ApiError::new(ErrorCode::Refused, format!("refused for host {host:?}: loopback only"));
    (StatusCode::FORBIDDEN, error.into_response()).into_response()
}

/// Whether a `Host` is loopback, with or without a port. A name is not by how it begins: `127.0.0.1.example` is anybody's.
fn is_loopback(host: &str) -> bool {
    let (named, after) = match host.strip_prefix('[').and_then(|rest| rest.split_once(']')) {
        Some((name, after)) => (name.parse().is_ok_and(|address: Ipv6Addr| address.is_loopback()), after),
        None => {
            let (name, after) = host.split_at(host.find(':').unwrap_or(host.len()));
            let address = || name.parse().is_ok_and(|address: Ipv4Addr| address.is_loopback());
            (name == "localhost" || address(), after)
        }
    };
    let port = after.strip_prefix(':');
    named && (after.is_empty() || port.is_some_and(|port| port.parse::<u16>().is_ok()))
}

/// Refuses web pages: a page of anybody's makes the browser of a user here send what needs no body, such as a pause, and does
/// without the answer. Browsers say of all that changes something whose page it comes from; commands do not. So on a unix socket
/// too: a port may have been forwarded to it.
async fn no_web_pages(request: Request, next: Next) -> Response {
    if !request.headers().contains_key(ORIGIN) {
        return next.run(request).await;
    }
    let message = "refused with an Origin header: a web page sends that, and the control API answers none";
    (StatusCode::FORBIDDEN, ApiError::new(ErrorCode::Refused, message).into_response()).into_response()
}

/// A socket that listens already, here or at the same host with a port of its own.
fn inherit(address: &Address, socket: OwnedFd) -> io::Result<Server> {
    match address {
        Address::Unix(_) => {
            let socket = std::os::unix::net::UnixListener::from(socket);
            socket.set_nonblocking(true)?;
            let listener = UnixListener::from_std(socket)?;
            Ok(Server { listener: Listener::Unix { listener, socket: None }, address: address.clone() })
        }
        Address::Tcp { host, .. } => {
            let socket = std::net::TcpListener::from(socket);
            socket.set_nonblocking(true)?;
            let listener = TcpListener::from_std(socket)?;
            let address = Address::Tcp { host: host.clone(), port: listener.local_addr()?.port() };
            Ok(Server { listener: Listener::Tcp(listener), address })
        }
        Address::Tls { .. } => unreachable!("no control API listens under TLS"),
    }
}

async fn bind_tcp(address: &Address, host: &str, port: u16) -> Result<Server, BindError> {
    let failed = |source| BindError::Io { address: address.clone(), source };
    let resolved: Vec<SocketAddr> = lookup_host((host, port)).await.map_err(failed)?.collect();
    if resolved.iter().any(|at| !at.ip().is_loopback()) {
        return Err(BindError::NotLoopback { address: address.clone() });
    }
    let listener = TcpListener::bind(resolved.as_slice()).await.map_err(|source| {
        if source.kind() == io::ErrorKind::AddrInUse {
            BindError::InUse { address: address.clone() }
        } else {
            failed(source)
        }
    })?;
    let port = listener.local_addr().map_err(failed)?.port();
    let address = Address::Tcp { host: host.to_owned(), port };
    Ok(Server { listener: Listener::Tcp(listener), address })
}

async fn bind_unix(address: &Address, path: &Path) -> Result<Server, BindError> {
    let bytes = path.as_os_str().len();
    if bytes > SOCKET_PATH_BYTES_MAX {
        return Err(BindError::PathTooLong { address: address.clone(), max: SOCKET_PATH_BYTES_MAX });
    }
    let failed = |source| BindError::Io { address: address.clone(), source };
    let (listener, socket) =
        bind_unix_at(path, SocketMode::PRIVATE).await.map_err(|occupied| match occupied {
            Occupied::Live => BindError::InUse { address: address.clone() },
            Occupied::NoSocket => BindError::NoSocket { address: address.clone() },
            Occupied::Io(source) => failed(source),
        })?;
    Ok(Server { listener: Listener::Unix { listener, socket: Some(socket) }, address: address.clone() })
}
