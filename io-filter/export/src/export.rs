//! What a server serves: the seam between NBD connections and whoever owns the disk.

use std::{rc::Rc, time::Duration};

use backtide_nbd::{Command, ExportInfo, ExportSummary};
use backtide_units::ByteCount;

use crate::Reply;

/// One disk, as its connections see it.
pub trait Export: 'static {
    /// What it is now; asked at each handshake.
    fn info(&self) -> ExportInfo;

    /// Does `command`, which has been checked against size, block size, flags and read-only of
    /// the [`info`](Self::info) its connection was opened with. Called by the connection's task,
    /// in the order the requests arrived; must not block for long. `reply` may be completed at
    /// once or later. The implementor owns ordering between requests, also those of several
    /// connections.
    ///
    /// The data of a write is a slice of a read buffer of 256 KiB: whoever keeps a small one for
    /// long should copy it.
    fn submit(&self, command: Command, reply: Reply);
}

/// The exports of a server, looked up at each handshake: they may come and go.
pub trait Exports: 'static {
    /// The export a client calls `name`; "" is the default export.
    fn find(&self, name: &str) -> Option<Rc<dyn Export>>;

    /// What a client that asks for a list is shown.
    fn list(&self) -> Vec<ExportSummary>;
}

/// Bounds of a server.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Limits {
    /// Requests in flight per connection: from being read until the reply is sent. Default 128.
    pub requests: usize,
    /// Bytes of requests and replies in flight per connection. One request is always let in,
    /// whatever its size. Default 64 MiB.
    pub bytes: ByteCount,
    /// Connections of a [`Listener`](crate::Listener) that are served; further clients are told so
    /// in their handshake. Default 64.
    pub connections: usize,
    /// Connections of a [`Listener`](crate::Listener) in their handshake, beside those that are
    /// served; a further one takes the place of the oldest. Default 64.
    pub handshakes: usize,
    /// How long a client may take for its handshake. Default 10 s.
    pub handshake: Duration,
    /// How long a client may read nothing of the replies it is owed. Default 2 minutes: longer
    /// than a stopped or migrating guest takes, much shorter than forever.
    pub stalled: Duration,
}

impl Default for Limits {
    fn default() -> Self {
        Self {
            requests: 128,
            bytes: ByteCount(64 << 20),
            connections: 64,
            handshakes: 64,
            handshake: Duration::from_secs(10),
            stalled: Duration::from_secs(120),
        }
    }
}
