//! An NBD server used as a disk.
//!
//! [`Client`] checks and splits requests; a [`link`] carries them, many in flight at once, over
//! one connection driven by a task of its own; [`connect`] makes the connection.

mod connect;
mod gather;
mod link;
mod request;

pub use connect::list_exports;
pub use request::{Client, ClientOptions, ZeroOptions};
