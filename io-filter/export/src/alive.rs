//! Whether the other end of a TCP connection is still there. A host that lost power, or its way here, says
//! nothing any more: without being asked, reads would wait for it for ever.
//!
//! What is asked is the other host's kernel. A server that is there and takes long is left to take long.

use std::{io, time::Duration};

use rustix::net::sockopt;
use tokio::net::TcpStream;

/// When the other end of a connection is given up.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Patience {
    /// One that is silent for so long is asked whether it is still there ...
    silence: Duration,
    /// ... as often as this ...
    pause: Duration,
    /// ... and given up after so many questions without an answer.
    probes: u32,
    /// How long what was sent may stay without the other kernel's acknowledgement; none is the system's own time, a
    /// quarter of an hour.
    unacknowledged: Option<Duration>,
}

impl Patience {
    /// Of a server with its clients, which cost it a place and some memory.
    pub(crate) const WITH_CLIENTS: Self = Self {
        silence: Duration::from_secs(60),
        pause: Duration::from_secs(15),
        probes: 4,
        unacknowledged: None,
    };

    /// Of a client with its server, for which a guest waits: 20 s. A guest bears about 30 s of it.
    pub(crate) const WITH_SERVERS: Self = Self {
        silence: Duration::from_secs(10),
        pause: Duration::from_secs(5),
        probes: 2,
        unacknowledged: Some(Duration::from_secs(20)),
    };

    /// Sees that a connection whose other end is gone ends.
    pub(crate) fn apply(self, stream: &TcpStream) -> io::Result<()> {
        sockopt::set_socket_keepalive(stream, true)?;
        sockopt::set_tcp_keepidle(stream, self.silence)?;
        sockopt::set_tcp_keepintvl(stream, self.pause)?;
        sockopt::set_tcp_keepcnt(stream, self.probes)?;
        if let Some(time) = self.unacknowledged {
            let milliseconds = u32::try_from(time.as_millis()).expect("some seconds");
            sockopt::set_tcp_user_timeout(stream, milliseconds)?;
        }
        Ok(())
    }
}
