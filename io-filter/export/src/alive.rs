//! Whether the other end of a TCP connection is still there. A host that lost power, or its way here, says
//! nothing any more: without being asked, reads would wait for it for ever.
//!
//! What is asked is the other host's kernel. A server that is there and takes long is left to take long, also one that
//! takes nothing of what it is sent. So there is no `TCP_USER_TIMEOUT` on any connection: it counts the answer "no room yet"
//! for none. What is out when a host dies is the system's to give up, in a quarter of an hour; a client whose requests
//! wait does not leave it at that (`client/silence.rs`).

use std::{io, time::Duration};

use rustix::net::sockopt;
use tokio::net::TcpStream;

/// When the other end of a connection on which nothing is out is given up.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Patience {
    /// One that is silent for so long is asked whether it is still there ...
    silence: Duration,
    /// ... as often as this ...
    pause: Duration,
    /// ... and given up after so many questions without an answer.
    probes: u32,
}

impl Patience {
    /// Of a server with its clients, which cost it a place and some memory.
    pub(crate) const WITH_CLIENTS: Self =
        Self { silence: Duration::from_secs(60), pause: Duration::from_secs(15), probes: 4 };

    /// Of a client with its server, for which a guest waits: 20 s. A guest bears about 30 s of it.
    pub(crate) const WITH_SERVERS: Self =
        Self { silence: Duration::from_secs(10), pause: Duration::from_secs(5), probes: 2 };

    /// Sees that a connection whose other end is gone ends.
    pub(crate) fn apply(self, stream: &TcpStream) -> io::Result<()> {
        sockopt::set_socket_keepalive(stream, true)?;
        sockopt::set_tcp_keepidle(stream, self.silence)?;
        sockopt::set_tcp_keepintvl(stream, self.pause)?;
        sockopt::set_tcp_keepcnt(stream, self.probes)?;
        Ok(())
    }

    /// How long nothing is heard of one that is given up.
    pub(crate) fn after(self) -> Duration {
        self.silence + self.pause * self.probes
    }
}
