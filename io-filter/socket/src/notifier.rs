//! Telling a service manager how it goes, in the protocol of `sd_notify(3)`: systemd speaks it, and
//! so does the holder of `backtide agent run --hold`.
//!
//! Nothing depends on being heard: what cannot be told is logged, once.

use std::{
    env, io,
    os::{
        fd::{AsFd, BorrowedFd},
        linux::net::SocketAddrExt,
        unix::{ffi::OsStrExt, net::SocketAddr, net::UnixDatagram},
    },
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    time::Duration,
};

use crate::passing;

/// How long a service manager may take to make room in its queue.
const SEND_TIME: Duration = Duration::from_secs(1);

/// A service manager that started this process and wants to hear of it. Cheap to clone.
#[derive(Clone, Debug)]
pub struct Notifier {
    socket: Arc<UnixDatagram>,
    complained: Arc<AtomicBool>,
    watchdog: Option<Duration>,
}

impl Notifier {
    /// The one the environment names, if it names one (`NOTIFY_SOCKET`).
    pub fn from_environment() -> Option<Self> {
        let address = env::var_os("NOTIFY_SOCKET").filter(|address| !address.is_empty())?;
        let watchdog = env::var("WATCHDOG_USEC").ok().and_then(|text| text.parse().ok());
        let is_mine = env::var("WATCHDOG_PID")
            .map_or(Ok(true), |text| text.parse::<u32>().map(|id| id == std::process::id()));
        let watchdog = watchdog.filter(|_| is_mine == Ok(true)).map(Duration::from_micros);
        match connect(address.as_bytes()) {
            Ok(socket) => Some(Self {
                socket: Arc::new(socket),
                complained: Arc::default(),
                watchdog: watchdog.filter(|time| !time.is_zero()),
            }),
            Err(error) => {
                tracing::warn!(address = %address.display(), %error, "cannot reach the service manager");
                None
            }
        }
    }

    /// How often at least it wants a sign of life, if it does.
    pub fn watchdog(&self) -> Option<Duration> {
        self.watchdog
    }

    /// Tells it something, such as `READY=1`.
    pub fn tell(&self, text: &str) {
        self.send(text, &[]);
    }

    /// Has it keep a socket for the next process, under a name.
    pub(crate) fn store(&self, name: &str, socket: BorrowedFd<'_>) {
        self.send(&format!("FDSTORE=1\nFDNAME={name}"), &[socket]);
    }

    /// It need not keep it any longer.
    pub(crate) fn forget(&self, name: &str) {
        self.send(&format!("FDSTOREREMOVE=1\nFDNAME={name}"), &[]);
    }

    fn send(&self, text: &str, sockets: &[BorrowedFd<'_>]) {
        if let Err(error) = passing::send(self.socket.as_fd(), text, sockets)
            && !self.complained.swap(true, Ordering::Relaxed)
        {
            tracing::warn!(%error, "cannot tell the service manager");
        }
    }
}

fn connect(address: &[u8]) -> io::Result<UnixDatagram> {
    let address = match address {
        [b'@', name @ ..] => SocketAddr::from_abstract_name(name)?,
        path => SocketAddr::from_pathname(std::ffi::OsStr::from_bytes(path))?,
    };
    let socket = UnixDatagram::unbound()?;
    socket.connect_addr(&address)?;
    socket.set_write_timeout(Some(SEND_TIME))?;
    Ok(socket)
}
