//! What a server serves: the seam between NBD connections and whoever owns the disk.

use std::{rc::Rc, time::Duration};

use backtide_nbd::{Command, ExportInfo, ExportSummary};
use backtide_socket::SocketMode;
use backtide_units::ByteCount;
use serde::{Deserialize, Serialize};

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

/// Bounds of a server. In a configuration each is optional; times are in milliseconds.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
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
    #[serde(rename = "handshake_ms", with = "milliseconds")]
    pub handshake: Duration,
    /// How long a client may read nothing of the replies it is owed. Default 2 minutes: longer
    /// than a stopped or migrating guest takes, much shorter than forever.
    #[serde(rename = "stalled_ms", with = "milliseconds")]
    pub stalled: Duration,
    /// Who may connect to a unix socket that is made for it. Default 0600: the user of this process.
    pub socket_mode: SocketMode,
}

impl Limits {
    /// Whether a server can work within them.
    ///
    /// # Errors
    /// A sentence that names the first that cannot be.
    pub fn check(&self) -> Result<(), String> {
        let counts =
            [("requests", self.requests), ("connections", self.connections), ("handshakes", self.handshakes)];
        if let Some((name, _)) = counts.into_iter().find(|(_, count)| *count == 0) {
            return Err(format!("the limit {name} of NBD servers cannot be 0: nobody would be served"));
        }
        let times = [("handshake_ms", self.handshake), ("stalled_ms", self.stalled)];
        match times.into_iter().find(|(_, time)| time.is_zero()) {
            Some((name, _)) => Err(format!("the limit {name} of NBD servers cannot be 0: nobody is so fast")),
            None => Ok(()),
        }
    }
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
            socket_mode: SocketMode::PRIVATE,
        }
    }
}

/// Durations as whole milliseconds.
mod milliseconds {
    use std::time::Duration;

    use serde::{Deserialize, Deserializer, Serialize, Serializer};

    pub(super) fn serialize<S: Serializer>(time: &Duration, serializer: S) -> Result<S::Ok, S::Error> {
        u64::try_from(time.as_millis()).unwrap_or(u64::MAX).serialize(serializer)
    }

    pub(super) fn deserialize<'de, D: Deserializer<'de>>(deserializer: D) -> Result<Duration, D::Error> {
        u64::deserialize(deserializer).map(Duration::from_millis)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn limits_in_a_configuration_are_defaults_but_for_what_is_named() {
        let text = r#"{"connections": 8, "stalled_ms": 1500, "socket_mode": "0660"}"#;
        let limits: Limits = serde_json::from_str(text).unwrap();
        let stalled = Duration::from_millis(1500);
        let socket_mode = "0660".parse().unwrap();
        let expected = Limits { connections: 8, stalled, socket_mode, ..Limits::default() };
        assert_eq!(limits, expected);
        assert_eq!(limits.check(), Ok(()));
        assert!(serde_json::from_str::<Limits>(r#"{"conections": 8}"#).is_err());
        assert!(serde_json::from_str::<Limits>(r#"{"socket_mode": "rw-rw----"}"#).is_err());
        for nothing in ["requests", "connections", "handshakes", "handshake_ms", "stalled_ms"] {
            let text = format!(r#"{{"{nothing}": 0}}"#);
            let limits: Limits = serde_json::from_str(&text).unwrap();
            assert!(limits.check().unwrap_err().contains(nothing));
        }
    }
}
