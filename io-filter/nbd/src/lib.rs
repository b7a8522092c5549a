//! NBD codec, handshake and transmission state machines, without I/O.
//!
//! First and last crate on a guest write's way: the request is read here, and its answer is
//! encoded here. Nothing in this crate knows a socket, a clock or a task. Drivers read bytes into
//! an [`Intake`], ask a machine for its next step, and write out what the machine appended to an
//! output buffer.
//!
//! * Server: [`server::Handshake`], then [`server::RequestParser`] and [`server::ReplyEncoder`].
//! * Client: [`client::Handshake`], then [`client::encode_request`] and [`client::ReplyParser`].
//!
//! Invariants: whatever the peer sends, nothing panics; memory held here is bounded by the
//! intake's buffer plus one announced payload of at most [`MAX_PAYLOAD`].
//!
//! Layout and numbers follow the NBD specification (`doc/proto.md` of the NBD project).
//! Everything on the wire is big-endian. How messages are framed is one [`ReplyStyle`] per
//! connection; what a server must do is listed, with its tests, in `CONFORMANCE.md`.

mod command;
mod error;
mod export;
mod intake;
mod uri;
pub mod wire;

pub mod client;
pub mod server;

pub use command::{Command, CommandKind, Cookie, DirtyExtent, Extent, ReplyStyle};
pub use error::{NbdError, ProtocolError};
pub use export::{BlockSizes, ExportInfo, ExportSummary, TransmissionFlags};
pub use intake::Intake;
pub use uri::{NbdAddress, NbdUri, ParseUriError, UriTls};

use backtide_units::ByteCount;

/// The longest READ or WRITE we serve, and the longest payload we take: 32 MiB, what the
/// specification asks every peer to be able to handle.
pub const MAX_PAYLOAD: ByteCount = ByteCount(32 << 20);
