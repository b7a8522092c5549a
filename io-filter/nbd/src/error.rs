//! The errors of NBD: those that travel in replies, and those that end a connection.

use std::borrow::Cow;

/// An error a reply can carry; the specification allows these and no others.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, thiserror::Error)]
pub enum NbdError {
    /// EPERM: the export is read-only.
    #[error("operation not permitted (EPERM)")]
    NotPermitted,
    /// EIO: the disk failed.
    #[error("input/output error (EIO)")]
    Io,
    /// ENOMEM.
    #[error("cannot allocate memory (ENOMEM)")]
    NoMemory,
    /// EINVAL: the request makes no sense.
    #[error("invalid argument (EINVAL)")]
    Invalid,
    /// ENOSPC: no space, or a write beyond the end.
    #[error("no space left on device (ENOSPC)")]
    NoSpace,
    /// EOVERFLOW: too long for one chunk.
    #[error("value too large (EOVERFLOW)")]
    Overflow,
    /// ENOTSUP: cannot be done fast, or at all.
    #[error("operation not supported (ENOTSUP)")]
    NotSupported,
    /// ESHUTDOWN: the server is going away.
    #[error("server is shutting down (ESHUTDOWN)")]
    Shutdown,
}

impl NbdError {
    /// Every error, for tables and tests.
    pub const ALL: [Self; 8] = [
        Self::NotPermitted,
        Self::Io,
        Self::NoMemory,
        Self::Invalid,
        Self::NoSpace,
        Self::Overflow,
        Self::NotSupported,
        Self::Shutdown,
    ];

    /// The number on the wire.
    pub fn code(self) -> u32 {
        match self {
            Self::NotPermitted => 1,
            Self::Io => 5,
            Self::NoMemory => 12,
            Self::Invalid => 22,
            Self::NoSpace => 28,
            Self::Overflow => 75,
            Self::NotSupported => 95,
            Self::Shutdown => 108,
        }
    }

    /// What a number on the wire means; unknown ones count as EINVAL, as the specification says.
    /// `None` for 0, which is success.
    pub fn from_code(code: u32) -> Option<Self> {
        if code == 0 {
            return None;
        }
        Some(Self::ALL.into_iter().find(|error| error.code() == code).unwrap_or(Self::Invalid))
    }
}

impl From<&std::io::Error> for NbdError {
    /// The nearest error a reply can carry; anything that has none is EIO.
    fn from(error: &std::io::Error) -> Self {
        match error.raw_os_error() {
            Some(1 | 13 | 30) => Self::NotPermitted,
            Some(12) => Self::NoMemory,
            Some(22) => Self::Invalid,
            // EFBIG and EDQUOT tell a guest the same: there is no room.
            Some(27 | 28 | 122) => Self::NoSpace,
            Some(75) => Self::Overflow,
            Some(38 | 95) => Self::NotSupported,
            Some(_) | None => Self::Io,
        }
    }
}

/// Why a connection cannot go on: the peer broke the protocol, or offers nothing we can use.
#[derive(Debug, PartialEq, Eq, thiserror::Error)]
pub enum ProtocolError {
    /// A message does not begin as it must.
    #[error("expected the magic number {expected:#x} of {message}, found {found:#x}")]
    BadMagic {
        /// What was expected.
        message: &'static str,
        /// Its magic number.
        expected: u64,
        /// What the peer sent.
        found: u64,
    },
    /// The client set handshake flags the server never offered.
    #[error("client set unknown handshake flags {0:#x}")]
    UnknownClientFlags(u32),
    /// A client that does not know fixed newstyle sent something else than EXPORT_NAME.
    #[error("client without fixed newstyle sent option {0}")]
    OptionWithoutFixedNewstyle(u32),
    /// The client asked for an unknown export by EXPORT_NAME, which has no error reply.
    #[error("client asked for the unknown export {0:?}")]
    UnknownExport(String),
    /// EXPORT_NAME with a name that is too long or not UTF-8.
    #[error("client sent a malformed export name of {0} bytes")]
    MalformedExportName(u32),
    /// EXPORT_NAME after extended headers, whose transmission phase only GO begins.
    #[error("client sent EXPORT_NAME after it chose extended headers")]
    ExportNameAfterExtendedHeaders,
    /// EXPORT_NAME where it has to be refused, for which it has no reply.
    #[error("client sent EXPORT_NAME where it is refused: {0}")]
    ExportNameRefused(Cow<'static, str>),
    /// The client sent something along with STARTTLS, which would be taken as encrypted.
    #[error("client sent {0} bytes in the clear after STARTTLS")]
    DataBeforeTls(usize),
    /// More options than a handshake may have.
    #[error("client sent more than {0} options")]
    TooManyOptions(u32),
    /// The peer is an oldstyle server.
    #[error("server speaks the oldstyle handshake, which is not supported")]
    Oldstyle,
    /// The server did not grant what the client asked for.
    #[error("server refuses {what}: {reason}")]
    Refused {
        /// What was asked.
        what: String,
        /// The server's error, and its own words.
        reason: String,
    },
    /// The server wants TLS.
    #[error("server requires TLS: use nbds:// or nbds+unix:// with tls-certificates=DIR")]
    TlsRequired,
    /// TLS is wanted and the server has none.
    #[error("server offers no TLS: {0}")]
    TlsRefused(String),
    /// The server sent something along with its answer to STARTTLS.
    #[error("server sent data in the clear after it agreed to TLS")]
    ServerDataBeforeTls,
    /// The server sent something malformed.
    #[error("server sent a malformed {0}")]
    Malformed(&'static str),
    /// A length beyond what we take.
    #[error("peer announced {found} bytes for {what}, the limit is {limit}")]
    TooLong {
        /// What was announced.
        what: &'static str,
        /// Announced, in bytes.
        found: u64,
        /// Allowed, in bytes.
        limit: u64,
    },
    /// A reply to a request that is not in flight.
    #[error("server replied to the unknown request {0:#x}")]
    UnknownCookie(u64),
    /// A reply chunk that does not fit its request.
    #[error("server sent a chunk that does not fit its request: {0}")]
    WrongChunk(&'static str),
}
