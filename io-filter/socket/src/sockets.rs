//! The listening sockets of a process, kept open for the one that listens next.
//!
//! A client that connects while nobody accepts waits in the socket's queue: to it a restart is a
//! pause. So a socket is kept here beside whoever accepts on it, is given to the service manager in
//! case this process dies, and is passed on when it becomes another program.
//!
//! Invariants: a kept socket is used again only for what it was made for, at the same address and,
//! if it has a file, while that is still its file; a socket that the service manager made itself
//! (socket activation) is never removed, nor its file.

use std::{
    collections::BTreeMap,
    env, io,
    net::{IpAddr, SocketAddr},
    os::{
        fd::{AsFd, OwnedFd},
        unix::ffi::OsStrExt,
    },
    path::Path,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
};

use listenfd::ListenFd;
use rustix::net::{SocketAddrUnix, getsockname, sockopt};

use crate::{
    Notifier, SocketFile,
    passing::{self, Named},
};

/// Names of sockets that are ours begin with this.
const OURS: &str = "backtide-";

/// Where a socket is to listen.
#[derive(Clone, Copy, Debug)]
pub enum Place<'a> {
    /// A unix socket's path.
    Unix(&'a Path),
    /// A host and port; port 0 is any.
    Tcp(&'a str, u16),
}

/// The kept sockets. Cheap to clone.
#[derive(Clone, Debug, Default)]
pub struct Sockets {
    kept: Arc<Mutex<BTreeMap<String, Kept>>>,
    notifier: Option<Notifier>,
}

#[derive(Debug)]
struct Kept {
    socket: OwnedFd,
    /// Goes with the socket, when the file is known and ours.
    file: Option<SocketFile>,
}

impl Sockets {
    /// Those that the process before left, and the service manager that keeps them from now on. To
    /// be called once, before anything else opens descriptors or reads standard input.
    ///
    /// # Errors
    /// When the environment promises sockets that are not there.
    pub fn inherited() -> io::Result<Self> {
        let mut sockets = activated();
        if env::var_os(passing::VARIABLE).is_some_and(|value| value == passing::FROM_STDIN) {
            let stdin = io::stdin();
            sockets.extend(passing::unpack(&stdin)?);
            passing::close_stdin()?;
        }
        let listening = sockets.into_iter().filter(|named| {
            let listens = sockopt::socket_acceptconn(&named.socket).unwrap_or(false);
            if !listens {
                tracing::warn!(name = named.name, "a descriptor that was passed to this process is unknown");
            }
            listens
        });
        let kept = listening.map(|Named { name, socket }| (name, Kept { socket, file: None })).collect();
        Ok(Self { kept: Arc::new(Mutex::new(kept)), notifier: Notifier::from_environment() })
    }

    /// The service manager, if there is one.
    pub fn notifier(&self) -> Option<&Notifier> {
        self.notifier.as_ref()
    }

    /// The socket kept for `purpose` at `place`, if there is one.
    pub fn take(&self, purpose: &str, place: Place<'_>) -> Option<OwnedFd> {
        let mut kept = self.kept();
        let ours = name_of(purpose, place);
        let name = match ours.filter(|name| kept.contains_key(name)) {
            Some(name) => name,
            None => {
                let mut others = kept.iter().filter(|(name, _)| !name.starts_with(OURS));
                others.find(|(_, kept)| is_at(&kept.socket, place))?.0.clone()
            }
        };
        let found = kept.get_mut(&name)?;
        let socket = found.socket.try_clone().ok()?;
        if let Place::Unix(path) = place
            && name.starts_with(OURS)
            && found.file.is_none()
        {
            found.file = SocketFile::of(path).ok();
        }
        Some(socket)
    }

    /// Keeps a socket that was made for `purpose` at `place`, with its file; one kept for it before is
    /// let go of.
    ///
    /// # Errors
    /// When the process has no descriptor left. The file is removed then.
    pub fn keep(
        &self,
        purpose: &str,
        place: Place<'_>,
        socket: impl AsFd,
        file: Option<SocketFile>,
    ) -> io::Result<()> {
        let socket = socket.as_fd().try_clone_to_owned()?;
        self.forget(purpose);
        let Some(name) = name_of(purpose, place) else {
            return Err(io::Error::new(io::ErrorKind::NotFound, "the socket's file is gone already"));
        };
        if let Some(notifier) = &self.notifier {
            notifier.store(&name, socket.as_fd());
        }
        self.kept().insert(name, Kept { socket, file });
        Ok(())
    }

    /// Lets go of what was kept for `purpose`, and removes its file.
    pub fn forget(&self, purpose: &str) {
        self.forget_those(|of| of == purpose);
    }

    /// The same of everything but for these purposes.
    pub fn forget_others(&self, purposes: &[String]) {
        self.forget_those(|of| !purposes.iter().any(|purpose| purpose == of));
    }

    fn forget_those(&self, which: impl Fn(&str) -> bool) {
        let mut kept = self.kept();
        let names: Vec<String> =
            kept.keys().filter(|name| purpose_of(name).is_some_and(&which)).cloned().collect();
        for name in names {
            if let Some(notifier) = &self.notifier {
                notifier.forget(&name);
            }
            kept.remove(&name);
        }
    }

    /// Packs all of them for the program that follows: see [`passing::pack`].
    ///
    /// # Errors
    /// When the system has no room for so many.
    pub fn pack(&self) -> io::Result<OwnedFd> {
        let kept = self.kept();
        passing::pack(kept.iter().map(|(name, kept)| (name.as_str(), kept.socket.as_fd())))
    }

    /// The end of a process that has no successor by its own doing. Files go, unless a service manager
    /// keeps the sockets for one that it starts. A holder does not: it ends too.
    pub fn close(&self) {
        let held = env::var_os(passing::HOLDER_VARIABLE).is_some();
        for (_, kept) in std::mem::take(&mut *self.kept()) {
            if let Some(file) = kept.file
                && self.notifier.is_some()
                && !held
            {
                file.leave();
            }
        }
    }

    fn kept(&self) -> MutexGuard<'_, BTreeMap<String, Kept>> {
        self.kept.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// What a service manager opened or kept (`LISTEN_FDS`).
fn activated() -> Vec<Named> {
    // Without it these may be the descriptors of another process of this one's ancestors.
    if env::var("LISTEN_PID").ok().and_then(|id| id.parse().ok()) != Some(std::process::id()) {
        return Vec::new();
    }
    let names = env::var("LISTEN_FDNAMES").unwrap_or_default();
    let mut names = names.split(':').map(str::to_owned);
    let mut opened = ListenFd::from_env();
    let mut sockets = Vec::new();
    for nth in 0..opened.len() {
        let name = names.next().filter(|name| !name.is_empty()).unwrap_or_else(|| "unknown".to_owned());
        // Sockets that the manager opened have its unit's name, several of one unit the same.
        let name = if name.starts_with(OURS) { name } else { format!("{name}:{nth}") };
        let unix = opened.take_unix_listener(nth).ok().flatten().map(OwnedFd::from);
        let taken = unix.or_else(|| opened.take_tcp_listener(nth).ok().flatten().map(OwnedFd::from));
        match taken {
            Some(socket) => sockets.push(Named { name, socket }),
            None => tracing::warn!(name, "the service manager passed a descriptor that is no such socket"),
        }
    }
    sockets
}

/// The name of the socket for `purpose` at `place`; of one with a file only while that is there.
fn name_of(purpose: &str, place: Place<'_>) -> Option<String> {
    let sum = match place {
        Place::Unix(path) => {
            let (device, inode) = super::identity(path).ok()?;
            let sum = crc32c::crc32c(path.as_os_str().as_bytes());
            crc32c::crc32c_append(sum, format!("{device} {inode}").as_bytes())
        }
        Place::Tcp(host, port) => crc32c::crc32c(format!("{host}:{port}").as_bytes()),
    };
    Some(format!("{OURS}{purpose}-{sum:08x}"))
}

fn purpose_of(name: &str) -> Option<&str> {
    Some(name.strip_prefix(OURS)?.rsplit_once('-')?.0)
}

/// Whether a socket that somebody else bound listens at `place`.
fn is_at(socket: &OwnedFd, place: Place<'_>) -> bool {
    let Ok(bound) = getsockname(socket) else { return false };
    match place {
        Place::Unix(path) => SocketAddrUnix::try_from(bound)
            .is_ok_and(|bound| bound.path_bytes().is_some_and(|bound| bound == path.as_os_str().as_bytes())),
        Place::Tcp(host, port) => {
            let name = host.trim_start_matches('[').trim_end_matches(']');
            let name = if name == "localhost" { "127.0.0.1" } else { name };
            let at = name.parse::<IpAddr>().map(|host| SocketAddr::new(host, port));
            SocketAddr::try_from(bound).is_ok_and(|bound| at == Ok(bound))
        }
    }
}

#[cfg(test)]
mod tests {
    use std::os::unix::net::UnixListener;

    use super::*;

    fn bind(path: &Path) -> (UnixListener, Option<SocketFile>) {
        (UnixListener::bind(path).unwrap(), Some(SocketFile::of(path).unwrap()))
    }

    #[test]
    fn a_kept_socket_is_for_its_purpose_and_place_only() {
        let directory = tempfile::tempdir().unwrap();
        let (path, other) = (directory.path().join("a"), directory.path().join("b"));
        let sockets = Sockets::default();
        let (listener, file) = bind(&path);
        sockets.keep("disk-vm1", Place::Unix(&path), &listener, file).unwrap();
        assert!(sockets.take("disk-vm1", Place::Unix(&path)).is_some());
        assert!(sockets.take("disk-vm1", Place::Unix(&other)).is_none());
        assert!(sockets.take("disk-vm", Place::Unix(&path)).is_none());
        // Another's socket has its path now: nobody could reach this one.
        std::fs::remove_file(&path).unwrap();
        let _another = UnixListener::bind(&path).unwrap();
        assert!(sockets.take("disk-vm1", Place::Unix(&path)).is_none());
    }

    #[test]
    fn what_is_forgotten_goes_with_its_file() {
        let directory = tempfile::tempdir().unwrap();
        let path = |name: &str| directory.path().join(name);
        let sockets = Sockets::default();
        for name in ["vm1", "vm1-2", "vm2"] {
            let (listener, file) = bind(&path(name));
            sockets.keep(&format!("disk-{name}"), Place::Unix(&path(name)), &listener, file).unwrap();
        }
        sockets.forget("disk-vm1");
        assert!(!path("vm1").exists() && path("vm1-2").exists(), "only the one of that name");
        sockets.forget_others(&["disk-vm2".to_owned()]);
        assert!(!path("vm1-2").exists() && path("vm2").exists());
        sockets.close();
        assert!(!path("vm2").exists(), "nobody keeps it");
    }

    #[test]
    fn what_others_opened_is_found_by_its_address_and_stays() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("s");
        let unix = UnixListener::bind(&path).unwrap();
        let tcp = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
        let port = tcp.local_addr().unwrap().port();
        let sockets = Sockets::default();
        let others = [("a.socket:0", OwnedFd::from(unix)), ("a.socket:1", OwnedFd::from(tcp))];
        for (name, socket) in others {
            sockets.kept().insert(name.to_owned(), Kept { socket, file: None });
        }
        assert!(sockets.take("disk-vm1", Place::Unix(&path)).is_some());
        assert!(sockets.take("disk-vm1", Place::Unix(&directory.path().join("t"))).is_none());
        assert!(sockets.take("api", Place::Tcp("localhost", port)).is_some());
        assert!(sockets.take("api", Place::Tcp("127.0.0.2", port)).is_none());
        sockets.forget("disk-vm1");
        sockets.forget_others(&[]);
        assert!(sockets.take("disk-vm1", Place::Unix(&path)).is_some());
        sockets.close();
        assert!(path.exists());
    }
}
