//! TLS for everything that encrypts: NBD sockets, and disks' streams between agent and receiver.
//!
//! Certificates lie in a folder under the names QEMU and libnbd use ([`folder`]), are read again when
//! they change ([`Reloading`]), on a thread of their own, and say in time that they end ([`Certificate::ends_soon`]);
//! [`warnings`] is what a person should see to of all that are in use. A stream is
//! TLS 1.3 with a certificate on both sides: [`StreamClient`] is the agent's end, [`StreamServer`] the
//! receiver's. What goes wrong between them is told in one sentence on either side ([`refusal`]).
//!
//! Invariants: a good certificate in use gives way to a good one only, and a file system that stands still
//! holds up nobody for more than a moment; certificates are verified, also the server's name; nothing older than TLS 1.3 on a
//! stream; a stream that is established is not touched by certificates that change.

mod certificate;
mod client;
mod der;
pub mod folder;
mod in_use;
mod looks;
pub mod refusal;
mod reload;
mod renewal;
mod rights;
mod secured;
mod server;

pub use certificate::Certificate;
pub use client::{ClientStream, ConnectError, StreamClient, receiver_certificate};
pub use folder::{Role, TlsError};
pub use in_use::{Shelf, look_again, warnings};
pub use reload::{Loaded, Reloading};
pub use rights::{Rights, WhichDisks};
pub use secured::{Secured, Session};
pub use server::{Peer, StreamServer};
