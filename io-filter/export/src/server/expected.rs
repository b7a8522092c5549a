//! Who is connected, and who is expected back: they had the export open where it was served before.

use std::{cell::RefCell, collections::BTreeSet, net::IpAddr};

use serde::{Deserialize, Serialize};

use super::accept::Server;

/// Who a client is, as far as can be known. However many connections it has, it is one.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Peer {
    /// A process of this host, at a unix socket.
    Process {
        /// Its number, which another has after it.
        id: u32,
        /// When it was started, in ticks since the host was.
        started: u64,
    },
    /// Whatever connects from there.
    Host(IpAddr),
    /// At a unix socket, of a process that is not seen here: one of another namespace.
    Unseen,
}

impl Peer {
    /// The process of this number at a unix socket.
    pub(super) fn process(id: Option<u32>) -> Self {
        let started = id.and_then(|id| Some((id, started(id)?)));
        started.map_or(Self::Unseen, |(id, started)| Self::Process { id, started })
    }

    /// Whether it may still come back, as far as can be told; of the same start of this host.
    pub fn may_come_back(&self) -> bool {
        match self {
            Self::Process { id, started: then } => started(*id) == Some(*then),
            Self::Host(_) | Self::Unseen => true,
        }
    }
}

/// When a process was started; none when there is none of this number.
fn started(id: u32) -> Option<u64> {
    started_of(&std::fs::read_to_string(format!("/proc/{id}/stat")).ok()?)
}

/// The 22nd field of a `/proc/PID/stat`, see proc(5). The second, a name in parentheses, may have any bytes.
fn started_of(stat: &str) -> Option<u64> {
    stat.rsplit_once(')')?.1.split_ascii_whitespace().nth(19)?.parse().ok()
}

#[derive(Default)]
pub(super) struct Expected(RefCell<BTreeSet<Peer>>);

impl Expected {
    /// A client is there.
    pub(super) fn came(&self, peer: &Peer) {
        self.0.borrow_mut().remove(peer);
    }
}

impl Server {
    /// Expects these: each until it connects.
    pub fn expect(&self, peers: BTreeSet<Peer>) {
        *self.shared.expected.0.borrow_mut() = peers;
    }

    /// Who was expected and has not come.
    pub fn expected(&self) -> BTreeSet<Peer> {
        self.shared.expected.0.borrow().clone()
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
        let own = Peer::process(Some(std::process::id()));
        let Peer::Process { id, started } = own else { panic!("{own:?}") };
        assert!(own.may_come_back() && !Peer::Process { id, started: started + 1 }.may_come_back());
        assert_eq!(Peer::process(None), Peer::Unseen);
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
