//! The server's side: handshake, requests in, replies out.

mod handshake;
mod option;
mod reply;
mod request;

pub use handshake::{Catalog, Contexts, Handshake, Session, Step, TlsMode};
pub use reply::{ReadPart, ReplyEncoder, ReplyTo};
pub use request::{Incoming, RequestParser};
