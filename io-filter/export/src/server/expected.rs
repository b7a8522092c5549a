//! Who is connected, and who is expected back: they had the export open where it was served before.

use std::{
    cell::RefCell,
    collections::BTreeSet,
    io,
    net::{IpAddr, Ipv4Addr},
    rc::Rc,
};

use serde::{Deserialize, Serialize};

use super::accept::{Server, Shared};

/// Who a client is, as far as can be known. However many connections it has, it is one.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Peer {
    /// A process of this host, at a unix socket.
    Process {
        /// Its number, which another has after it.
        id: u32,
        /// When it was started, in ticks since the host was; 0 where that could not be told.
        started: u64,
    },
    /// Whatever connects from there; from this host it is 127.0.0.1, by whichever of its addresses.
    Host(IpAddr),
    /// At a unix socket, of a process that is not seen here: one of another namespace.
    Unseen,
}

impl Peer {
    /// The process of this number at a unix socket.
    pub(super) fn process(id: Option<u32>) -> Self {
        id.map_or(Self::Unseen, |id| Self::found(id, started(stat(id))))
    }

    fn found(id: u32, started: io::Result<Option<u64>>) -> Self {
        match started {
            Ok(Some(started)) => Self::Process { id, started },
            Ok(None) => Self::Unseen,
            // What cannot be looked at may be there, and may be looked at when it is back.
            Err(_) => Self::Process { id, started: 0 },
        }
    }

    /// Whatever connects from `far` to `near`.
    pub(super) fn host(far: IpAddr, near: Option<IpAddr>) -> Self {
        let is_here = near.is_some_and(|near| near.to_canonical() == far.to_canonical());
        Self::Host(if is_here { Ipv4Addr::LOCALHOST.into() } else { far }).canonical()
    }

    /// As it is told of one that is there: an earlier program may have told it by another form of its address.
    pub fn canonical(self) -> Self {
        match self {
            Self::Host(ip) if ip.to_canonical().is_loopback() => Self::Host(Ipv4Addr::LOCALHOST.into()),
            Self::Host(ip) => Self::Host(ip.to_canonical()),
            peer @ (Self::Process { .. } | Self::Unseen) => peer,
        }
    }

    /// Whether both are one. No two processes of one number are there at a time, and when one was started is not always told.
    fn is(&self, other: &Self) -> bool {
        match (self, other) {
            (Self::Process { id, .. }, Self::Process { id: other, .. }) => id == other,
            _ => self == other,
        }
    }

    /// Whether it may still come back, as far as can be told; of the same start of this host.
    pub fn may_come_back(&self) -> bool {
        match self {
            // What cannot be looked at may be there.
            Self::Process { id, started: then } => {
                started(stat(*id)).map_or(true, |now| now.is_some_and(|now| *then == 0 || now == *then))
            }
            Self::Host(_) | Self::Unseen => true,
        }
    }

    /// Whether it is of this host, and ends with it.
    pub fn is_of_this_host(&self) -> bool {
        match self {
            Self::Process { .. } | Self::Unseen => true,
            Self::Host(ip) => ip.is_loopback(),
        }
    }
}

fn stat(process: u32) -> io::Result<String> {
    std::fs::read_to_string(format!("/proc/{process}/stat"))
}

/// When a process was started, by its `stat`; none when there is none of this number.
///
/// # Errors
/// When that cannot be told now.
fn started(stat: io::Result<String>) -> io::Result<Option<u64>> {
    match stat {
        Ok(stat) => Ok(started_of(&stat)),
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(None),
        // It ended while that was read.
        Err(error) if error.raw_os_error() == Some(rustix::io::Errno::SRCH.raw_os_error()) => Ok(None),
        Err(error) => Err(error),
    }
}

/// The 22nd field of a `/proc/PID/stat`, see proc(5). The second, a name in parentheses, may have any bytes. None of one that
/// has ended and was not waited for: its third field, with one thread left.
fn started_of(stat: &str) -> Option<u64> {
    let fields: Vec<_> = stat.rsplit_once(')')?.1.split_ascii_whitespace().collect();
    let has_ended = matches!(*fields.first()?, "Z" | "X") && *fields.get(17)? == "1";
    if has_ended { None } else { fields.get(19)?.parse().ok() }
}

#[derive(Default)]
pub(super) struct Expected(RefCell<BTreeSet<Peer>>);

impl Expected {
    /// The server itself ended a connection of this client. Of one that is not seen nobody hears whether it is still there.
    pub(super) fn was_dropped(&self, peer: Peer) {
        if matches!(peer, Peer::Process { .. }) {
            self.0.borrow_mut().insert(peer);
        }
    }

    /// A client is back.
    pub(super) fn came(&self, peer: &Peer) {
        self.0.borrow_mut().retain(|expected| !expected.is(peer));
    }
}

/// A client that is served, and may be one that is expected.
pub(crate) struct Returning {
    shared: Rc<Shared>,
    peer: Peer,
}

impl Returning {
    /// A process is known, and back. Of a host, or where processes are not seen, somebody else may only look at the export:
    /// whoever had it open goes on with it, and that is told by what it asks for.
    pub(super) fn new(shared: &Rc<Shared>, peer: &Peer) -> Option<Self> {
        if matches!(peer, Peer::Process { .. }) {
            shared.expected.came(peer);
            return None;
        }
        Some(Self { shared: Rc::clone(shared), peer: peer.clone() })
    }

    /// It writes, or flushes.
    pub(super) fn writes(self) {
        self.shared.expected.came(&self.peer);
    }
}

impl Server {
    /// Expects these: each until it connects, and one that is no known process until it writes or flushes, too.
    pub fn expect(&self, peers: BTreeSet<Peer>) {
        *self.shared.expected.0.borrow_mut() = peers;
    }

    /// Who was expected and is not back, or was dropped and has no other connection. Whoever is there now is not counted.
    pub fn expected(&self) -> BTreeSet<Peer> {
        let (there, expected) = (self.clients(), self.shared.expected.0.borrow());
        expected.iter().filter(|peer| !there.iter().any(|client| client.is(peer))).cloned().collect()
    }

    /// Whose [connections](Self::connections) are served now.
    pub fn clients(&self) -> BTreeSet<Peer> {
        self.shared.clients()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_process_is_known_by_its_number_and_its_start() {
        assert_eq!(started_of("7 (a) b) c) S 1 7 7 0 -1 4 1 0 0 0 0 0 0 0 20 0 1 0 4711 9 9"), Some(4711));
        assert_eq!(started_of("7 (a"), None);
        let ended = |state: &str, threads: u32| {
            started_of(&format!("7 (a) {state} 1 7 7 0 -1 4 1 0 0 0 0 0 0 0 20 0 {threads} 0 4711 9 9"))
        };
        assert_eq!((ended("Z", 1), ended("Z", 2), ended("X", 1)), (None, Some(4711), None));
        let own = Peer::process(Some(std::process::id()));
        let Peer::Process { id, started } = own else { panic!("{own:?}") };
        assert!(own.may_come_back() && !Peer::Process { id, started: started + 1 }.may_come_back());
        assert_eq!(Peer::process(None), Peer::Unseen);
    }

    #[test]
    fn a_process_that_cannot_be_looked_at_may_be_there() {
        let error = |errno: rustix::io::Errno| started(Err(errno.into()));
        assert_eq!(error(rustix::io::Errno::NOENT).unwrap(), None);
        assert_eq!(error(rustix::io::Errno::SRCH).unwrap(), None);
        error(rustix::io::Errno::MFILE).unwrap_err();
        error(rustix::io::Errno::ACCESS).unwrap_err();
    }

    #[test]
    fn a_process_that_could_not_be_looked_at_is_known_when_it_is_back() {
        let own = Peer::process(Some(std::process::id()));
        let Peer::Process { id, started } = own else { panic!("{own:?}") };
        let unclear = Peer::found(id, Err(rustix::io::Errno::MFILE.into()));
        assert_eq!(unclear, Peer::Process { id, started: 0 });
        assert_eq!(Peer::found(id, Ok(None)), Peer::Unseen);
        assert!(unclear.may_come_back() && unclear.is_of_this_host());
        // No process has this number.
        assert!(!Peer::Process { id: u32::MAX, started: 0 }.may_come_back());
        let expected = Expected(RefCell::new([unclear.clone(), Peer::Unseen].into()));
        expected.came(&Peer::Process { id: id + 1, started });
        assert_eq!(expected.0.borrow().len(), 2);
        expected.came(&own);
        assert_eq!(*expected.0.borrow(), [Peer::Unseen].into());
        expected.was_dropped(own);
        expected.came(&unclear);
        assert_eq!(*expected.0.borrow(), [Peer::Unseen].into());
    }

    #[test]
    fn whoever_connects_from_an_address_of_this_host_is_of_it() {
        let ip = |text: &str| text.parse::<IpAddr>().unwrap();
        let of = |far, near: Option<&str>| Peer::host(ip(far), near.map(ip));
        let here = Peer::Host(ip("127.0.0.1"));
        for (far, near) in [
            ("192.0.2.2", "192.0.2.2"),
            ("::ffff:192.0.2.2", "192.0.2.2"),
            ("192.0.2.2", "::ffff:192.0.2.2"),
            ("2001:db8::2", "2001:db8::2"),
            ("127.0.0.2", "127.0.0.1"),
            ("::ffff:127.0.0.2", "::ffff:127.0.0.1"),
            ("::1", "::1"),
        ] {
            assert_eq!(of(far, Some(near)), here, "{far}");
        }
        assert!(here.is_of_this_host());
        for near in [None, Some("192.0.2.2"), Some("::ffff:192.0.2.2")] {
            let far = of("::ffff:192.0.2.1", near);
            assert_eq!(far, Peer::Host(ip("192.0.2.1")));
            assert!(!far.is_of_this_host());
        }
        assert_eq!(of("::1", None), here);
        assert_eq!(Peer::Host(ip("::ffff:192.0.2.1")).canonical(), Peer::Host(ip("192.0.2.1")));
        assert_eq!(Peer::Unseen.canonical(), Peer::Unseen);
    }

    #[test]
    fn a_process_that_was_not_waited_for_has_ended() {
        let mut child =
            std::process::Command::new("cat").stdin(std::process::Stdio::piped()).spawn().unwrap();
        let peer = Peer::process(Some(child.id()));
        assert!(matches!(peer, Peer::Process { .. }) && peer.may_come_back());
        drop(child.stdin.take());
        // It is a zombie as soon as it has ended, until it is waited for.
        while peer.may_come_back() {
            std::thread::yield_now();
        }
        child.wait().unwrap();
        assert!(!peer.may_come_back());
    }

    #[test]
    fn nobody_comes_back_for_another() {
        let host = |last| Peer::Host(IpAddr::from([192, 0, 2, last]));
        let expected = Expected(RefCell::new([host(1), Peer::Unseen].into()));
        expected.came(&host(2));
        expected.came(&Peer::process(Some(std::process::id())));
        assert_eq!(*expected.0.borrow(), [host(1), Peer::Unseen].into());
        expected.came(&host(1));
        assert_eq!(*expected.0.borrow(), [Peer::Unseen].into());
    }
}
