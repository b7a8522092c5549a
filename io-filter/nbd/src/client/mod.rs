//! The client's side: handshake, requests out, replies in.

mod handshake;
mod reply;
mod request;

pub use handshake::{Goal, Handshake, Session, Step};
pub use reply::{Content, Expected, Reply, ReplyParser};
pub use request::{encode_disconnect, encode_request};
