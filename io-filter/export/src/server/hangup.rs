//! Whether a client has hung up, told by its socket while nothing is read from it: its end lies behind requests that there is
//! no room for.

use std::{
    io,
    os::fd::{AsFd, OwnedFd},
};

use tokio::{
    io::Interest,
    net::{TcpStream, UnixStream},
};

/// The end of one client's socket, which this keeps open as long as it is there.
#[derive(Debug)]
pub(crate) enum Hangup {
    Tcp(TcpStream),
    Unix(UnixStream),
}

impl Hangup {
    pub(crate) fn of_tcp(socket: &TcpStream) -> io::Result<Self> {
        Ok(Self::Tcp(TcpStream::from_std(again(socket)?.into())?))
    }

    pub(crate) fn of_unix(socket: &UnixStream) -> io::Result<Self> {
        Ok(Self::Unix(UnixStream::from_std(again(socket)?.into())?))
    }

    /// Waits until the client sends nothing more, whatever of it was not read; for ever if that is not told.
    pub(crate) async fn closed(&self) {
        loop {
            let ready = match self {
                Self::Tcp(socket) => socket.ready(Interest::READABLE).await,
                Self::Unix(socket) => socket.ready(Interest::READABLE).await,
            };
            // It fails only while the runtime ends.
            let Ok(ready) = ready else { return std::future::pending().await };
            if ready.is_read_closed() {
                return;
            }
            // There is something to read, for somebody else: the next time it is told that there is more, or that it was all.
            let nothing = || Err::<(), _>(io::ErrorKind::WouldBlock.into());
            let _ = match self {
                Self::Tcp(socket) => socket.try_io(Interest::READABLE, nothing),
                Self::Unix(socket) => socket.try_io(Interest::READABLE, nothing),
            };
        }
    }
}

fn again(socket: &impl AsFd) -> io::Result<OwnedFd> {
    socket.as_fd().try_clone_to_owned()
}
