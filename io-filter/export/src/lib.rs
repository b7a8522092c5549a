//! Serving and reaching disks over NBD: tokio drivers around `backtide-nbd`.
//!
//! The first crate on a guest write's way that touches a socket. A request is read, checked and
//! given to [`Export::submit`]; whoever owns the disk answers through [`Reply`], at once or
//! later. The other direction, [`Client`], is an NBD server used as a disk.
//!
//! Invariants:
//! * One task per connection, on the thread that owns the disk. Threads share nothing that a request needs, so none takes
//!   a lock; a client of a [`Directory`] comes to its disk's thread when its handshake is done.
//! * Requests and bytes in flight are bounded per connection by [`Limits`], also when the client
//!   never reads its replies: above the limit nothing more is read.
//! * Whoever only connects takes no place from clients that are served.
//! * A write's payload reaches the export without a copy.

mod alive;
mod client;
mod error;
mod export;
mod output;
mod server;
mod tls;

pub use backtide_socket::{NoSocketMode, SocketMode};
pub use backtide_tls::TlsError;
pub use client::{Client, ClientOptions, ZeroOptions, list_exports};
pub use error::{BindError, ClientError, ServeError};
pub use export::{Export, Exports, Limits};
pub use server::{Directory, Listener, Peer, Reply, Server, serve_connection};
pub use tls::{ClientCertificates, NbdRule, NbdTls, NoPlace, ServerTls, TlsDemand};

pub use backtide_nbd::wire::dirty_bitmap;
pub use backtide_nbd::{
    BlockSizes, Command, CommandKind, DirtyExtent, ExportInfo, ExportSummary, Extent, NbdAddress, NbdError,
    NbdUri, ParseUriError, UriTls, server::TlsMode,
};
