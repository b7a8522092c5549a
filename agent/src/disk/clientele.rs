//! Who had the disk open when its service was interrupted - the agent was restarted or killed, the disk resized or
//! set back - and has not come back. A virtual machine connects again with its next request only, and what it has in
//! its memory is of this disk as it was: until then the disk is in use, though nobody is connected.
//!
//! Invariants: who is connected is in the record from the next look on, at the latest as the service ends; who hung up by
//! itself is not expected, but a process whose connection the server ended is; not a process that has ended, nor anybody of this
//! host after that was started anew; nobody is expected of a disk that was detached.

use std::collections::BTreeSet;

use backtide_export::{Peer, Server};
use serde::{Deserialize, Deserializer, Serialize};
use uuid::Uuid;

use super::trust::boot_id;

/// Clients as the record has them.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Clientele {
    /// The start of the host in which they were seen.
    boot: Uuid,
    peers: BTreeSet<Peer>,
}

impl Clientele {
    pub(crate) fn is_empty(&self) -> bool {
        self.peers.is_empty()
    }

    /// What a record says of them: it must never be lost for what is not understood of that, which is nobody.
    pub(crate) fn or_nobody<'de, D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        let value = serde_json::Value::deserialize(deserializer)?;
        Ok(serde_json::from_value(value).unwrap_or_default())
    }

    /// Those that may come back to a disk that is served now.
    pub(crate) fn left(&self) -> Self {
        let now = if self.is_empty() { Uuid::nil() } else { boot_id() };
        self.left_in(now)
    }

    /// The same in this start of the host. One that is not known may be that in which they were seen.
    fn left_in(&self, now: Uuid) -> Self {
        let same_start = self.boot == now || self.boot.is_nil() || now.is_nil();
        let is_left = |peer: &Peer| (same_start || !peer.is_of_this_host()) && peer.may_come_back();
        let peers = self.peers.iter().cloned().map(Peer::canonical).filter(is_left).collect();
        Self { boot: self.boot, peers }
    }

    /// Has `server` expect them.
    pub(super) fn expected_by(&self, server: &Server) {
        server.expect(self.left().peers);
    }

    /// Those that `server` expects still.
    pub(super) fn awaited(server: &Server) -> Self {
        let mut peers = server.expected();
        peers.retain(Peer::may_come_back);
        Self::of(peers)
    }

    /// Those that are there, and those that are expected still: for the next attach.
    pub(super) fn now(server: &Server) -> Self {
        let mut peers = Self::awaited(server).peers;
        peers.extend(server.clients());
        Self::of(peers)
    }

    fn of(peers: BTreeSet<Peer>) -> Self {
        Self { boot: if peers.is_empty() { Uuid::nil() } else { boot_id() }, peers }
    }

    /// How many.
    pub(crate) fn count(&self) -> u32 {
        u32::try_from(self.peers.len()).unwrap_or(u32::MAX)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn nobody_of_a_host_that_was_started_anew_comes_back() {
        let far = Peer::Host([192, 0, 2, 1].into());
        let of = |boot| Clientele { boot, peers: [Peer::Unseen, far.clone()].into() };
        assert_eq!(of(boot_id()).left(), of(boot_id()));
        let before = Uuid::from_u128(7);
        assert_eq!(of(before).left().peers, [far.clone()].into());
        for here in ["127.0.0.1", "::1", "::ffff:127.0.0.1"] {
            let near = Clientele { boot: before, peers: [Peer::Host(here.parse().unwrap())].into() };
            assert!(near.left().is_empty(), "{here}");
        }
        // That cannot be told: they may be there.
        assert_eq!(of(before).left_in(Uuid::nil()), of(before));
        assert_eq!(of(Uuid::nil()).left(), of(Uuid::nil()));
    }

    #[test]
    fn a_host_is_awaited_by_the_address_that_it_comes_from() {
        let of = |ip: &str| Clientele { boot: boot_id(), peers: [Peer::Host(ip.parse().unwrap())].into() };
        assert_eq!(of("::ffff:192.0.2.1").left(), of("192.0.2.1"));
        assert_eq!(of("::1").left(), of("127.0.0.1"));
    }
}
