//! An NBD server used as a disk.
//!
//! [`Client`] checks and splits requests; a [`link`] carries them, many in flight at once, over
//! one connection driven by a task of its own; [`connect`] makes the connection. [`silence`] gives up a server whose host is
//! gone, by what [`other_host`] tells of it.

mod connect;
mod gather;
mod link;
mod other_host;
mod request;
mod silence;

pub use connect::list_exports;
pub use request::{Client, ClientOptions, ZeroOptions};
