//! The server's drivers, in the order a connection meets them.

mod accept;
mod adopt;
mod connection;
mod directory;
mod expected;
mod hangup;
mod listener;
mod negotiate;
mod reply;
mod seats;
mod stop;
mod stream;

pub use accept::Server;
pub use connection::serve_connection;
pub use directory::Directory;
pub use expected::Peer;
pub use listener::Listener;
pub use reply::Reply;
