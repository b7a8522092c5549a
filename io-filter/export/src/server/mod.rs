//! The server's drivers, in the order a connection meets them.

mod connection;
mod listener;
mod negotiate;
mod reply;
mod stop;

pub(crate) use connection::serve_until;
pub use connection::{serve_connection, serve_negotiated};
pub use listener::{Listener, Server};
pub use negotiate::{Negotiated, negotiate};
pub use reply::Reply;
