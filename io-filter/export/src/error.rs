//! What goes wrong around a connection.

use std::{io, path::PathBuf, sync::Arc, time::Duration};

use backtide_nbd::{CommandKind, NbdAddress, NbdError, ProtocolError};
use backtide_units::{ByteCount, ByteRange};

use crate::TlsError;

/// Why serving a connection ended other than in good order. Never fatal for the server.
#[derive(Debug, thiserror::Error)]
pub enum ServeError {
    /// The socket failed.
    #[error("NBD connection failed")]
    Io(#[from] io::Error),
    /// The client broke the protocol.
    #[error("NBD client broke the protocol")]
    Protocol(#[from] ProtocolError),
    /// The client did not finish its handshake in time.
    #[error("NBD client did not finish its handshake within {0:?}")]
    HandshakeTimeout(Duration),
    /// The client closed in the middle of a message.
    #[error("NBD client closed in the middle of a message")]
    Truncated,
    /// TLS could not be started: a certificate that is missing or not trusted, for one.
    #[error("NBD client did not start TLS")]
    Tls(#[source] io::Error),
    /// The client takes nothing of what it is owed.
    #[error("NBD client has not read its replies for {0:?}")]
    Stalled(Duration),
    /// The server serves as many clients as it may.
    #[error("the server has {0} NBD clients, its limit")]
    Full(usize),
    /// The export was detached between its description and the first request.
    #[error("export {0:?} is gone")]
    ExportGone(String),
}

/// Why a server cannot listen on an address.
#[derive(Debug, thiserror::Error)]
pub enum BindError {
    /// Somebody answers there.
    #[error("address {0} is in use by another server")]
    InUse(NbdAddress),
    /// The path exists and is no socket; it is left alone.
    #[error("cannot listen on {0:?}: the file exists and is no socket")]
    NotASocket(PathBuf),
    /// The certificates for TLS cannot be used.
    #[error("cannot listen with TLS")]
    Tls(#[source] TlsError),
    /// The system refuses.
    #[error("cannot listen on {address}")]
    Io {
        /// Where.
        address: NbdAddress,
        /// Why.
        source: io::Error,
    },
}

/// Why a request to an NBD server, or the connection to it, failed.
///
/// [`is_lost`](Self::is_lost) tells whether the connection is gone; the others leave it usable.
#[derive(Clone, Debug, thiserror::Error)]
pub enum ClientError {
    /// Nobody answers.
    #[error("cannot connect to {address}")]
    Connect {
        /// Where.
        address: NbdAddress,
        /// Why.
        source: Arc<io::Error>,
    },
    /// The server did not finish the handshake in time.
    #[error("{address} did not finish the NBD handshake within {after:?}")]
    HandshakeTimeout {
        /// Where.
        address: NbdAddress,
        /// How long it had.
        after: Duration,
    },
    /// The certificates for TLS cannot be used.
    #[error("cannot use TLS")]
    TlsFiles(#[source] Arc<TlsError>),
    /// TLS could not be started: the server's certificate is not trusted or not for this name.
    #[error("cannot start TLS with {address}")]
    Tls {
        /// Where.
        address: NbdAddress,
        /// Why.
        source: Arc<io::Error>,
    },
    /// The server refuses or breaks the protocol.
    #[error("cannot go on with the NBD server")]
    Protocol(#[source] Arc<ProtocolError>),
    /// The socket failed.
    #[error("the connection to the NBD server failed")]
    Io(#[source] Arc<io::Error>),
    /// Its host, or the way there, is gone.
    #[error("the NBD server's host has acknowledged nothing for {after:?}")]
    HostGone {
        /// How long.
        after: Duration,
    },
    /// The server closed the connection.
    #[error("the NBD server closed the connection")]
    Closed,
    /// The server says that it is about to end: it is given no more requests.
    #[error("the NBD server is shutting down")]
    ShuttingDown,
    /// The server answered with an error.
    #[error("NBD server refuses {kind:?} of {range}: {error}{}{text}", if text.is_empty() { "" } else { ": " })]
    Refused {
        /// Which request.
        kind: CommandKind,
        /// Where.
        range: ByteRange,
        /// The error.
        error: NbdError,
        /// The server's words; may be empty.
        text: String,
    },
    /// The server does not serve this request.
    #[error("NBD server does not offer {0:?}")]
    NotOffered(CommandKind),
    /// The request does not fit the disk.
    #[error("{range} is not inside the disk of {size} bytes")]
    OutOfRange {
        /// The request.
        range: ByteRange,
        /// The disk.
        size: ByteCount,
    },
    /// A write that is no multiple of the server's block size.
    #[error("{range} is not aligned to the NBD server's blocks of {minimum} bytes")]
    Misaligned {
        /// The request.
        range: ByteRange,
        /// The block size.
        minimum: u32,
    },
}

impl ClientError {
    /// Whether the connection is gone: every later request fails too; connect again.
    pub fn is_lost(&self) -> bool {
        match self {
            Self::Connect { .. }
            | Self::HandshakeTimeout { .. }
            | Self::TlsFiles(_)
            | Self::Tls { .. }
            | Self::Protocol(_)
            | Self::Io(_)
            | Self::HostGone { .. }
            | Self::Closed
            | Self::ShuttingDown => true,
            Self::Refused { .. }
            | Self::NotOffered(_)
            | Self::OutOfRange { .. }
            | Self::Misaligned { .. } => false,
        }
    }

    /// The error to answer a guest with whose request was passed on.
    pub fn as_nbd(&self) -> NbdError {
        match self {
            Self::Refused { error, .. } => *error,
            Self::NotOffered(_) => NbdError::NotSupported,
            Self::OutOfRange { .. } | Self::Misaligned { .. } => NbdError::Invalid,
            Self::Connect { .. }
            | Self::HandshakeTimeout { .. }
            | Self::TlsFiles(_)
            | Self::Tls { .. }
            | Self::Protocol(_)
            | Self::Io(_)
            | Self::HostGone { .. }
            | Self::Closed
            | Self::ShuttingDown => NbdError::Io,
        }
    }
}

impl From<ProtocolError> for ClientError {
    fn from(error: ProtocolError) -> Self {
        Self::Protocol(Arc::new(error))
    }
}

impl From<io::Error> for ClientError {
    fn from(error: io::Error) -> Self {
        Self::Io(Arc::new(error))
    }
}
