//! The server's drivers, in the order a connection meets them.

mod accept;
mod connection;
mod hangup;
mod listener;
mod negotiate;
mod reply;
mod stop;

pub use accept::Server;
pub use connection::serve_connection;
pub use listener::Listener;
pub use reply::Reply;
