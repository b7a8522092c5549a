//! Who had the disk open when its service was interrupted - the agent was restarted or killed, the disk resized or
//! set back - and has not come back. A virtual machine connects again with its next request only, and what it has in
//! its memory is of this disk as it was: until then the disk is in use, though nobody is connected.
//!
//! Invariants: who is connected is in the record from the next look on, at the latest as the service ends; who hung up by
//! itself is not expected; nor is a process that has ended, nor anybody's after the host was started anew.

use std::collections::BTreeSet;

use backtide_export::{Clients, Server};
use serde::{Deserialize, Serialize};
use uuid::Uuid;

use super::trust::boot_id;

/// Clients as the record has them.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Clientele {
    /// The start of the host in which the numbers of the processes were theirs.
    boot: Uuid,
    processes: BTreeSet<Process>,
    /// Connections of which no process is known.
    others: u32,
}

/// A process of this host: numbers are used again.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
struct Process {
    id: u32,
    /// When it was started, in ticks since the host was.
    started: u64,
}

impl Process {
    /// None when there is none of this number.
    fn of(id: u32) -> Option<Self> {
        Some(Self { id, started: started(&std::fs::read_to_string(format!("/proc/{id}/stat")).ok()?)? })
    }

    fn lives(self) -> bool {
        Self::of(self.id) == Some(self)
    }
}

/// The 22nd field of a `/proc/PID/stat`, see proc(5). The second, a name in parentheses, may have any bytes.
fn started(stat: &str) -> Option<u64> {
    stat.rsplit_once(')')?.1.split_ascii_whitespace().nth(19)?.parse().ok()
}

impl Clientele {
    pub(crate) fn is_empty(&self) -> bool {
        self.processes.is_empty() && self.others == 0
    }

    /// Those that may come back to a disk that is served now.
    pub(super) fn left(&self) -> Self {
        let mut left = self.clone();
        left.processes.retain(|process| self.boot == boot_id() && process.lives());
        left
    }

    /// Has `server` expect them.
    pub(super) fn expected_by(&self, server: &Server) {
        let Self { processes, others, .. } = self.left();
        server.expect(processes.into_iter().map(|process| process.id).collect(), others);
    }

    /// Of `known`, those that `server` expects still.
    pub(super) fn awaited(known: &Self, server: &Server) -> Self {
        let (processes, others) = server.expected();
        if processes.is_empty() && others == 0 {
            return Self::default();
        }
        let mut awaited = known.left();
        awaited.processes.retain(|process| processes.contains(&process.id));
        Self { others, ..awaited }
    }

    /// Those that are there, and of `known` those that are expected still: for the next attach.
    pub(super) fn now(known: &Self, server: &Server) -> Self {
        let mut now = Self::awaited(known, server);
        let Clients { processes, others } = server.clients();
        now.others = now.others.saturating_add(others);
        for (id, connections) in processes {
            match Process::of(id) {
                Some(process) => drop(now.processes.insert(process)),
                // Whoever has the connection by now has another number.
                None => now.others = now.others.saturating_add(connections),
            }
        }
        now.boot = if now.is_empty() { Uuid::nil() } else { boot_id() };
        now
    }

    /// How many clients, a process for one.
    pub(super) fn count(&self) -> u32 {
        u32::try_from(self.processes.len()).unwrap_or(u32::MAX).saturating_add(self.others)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_process_is_known_by_its_number_and_its_start() {
        assert_eq!(started("7 (a) b) c) S 1 7 7 0 -1 4 1 0 0 0 0 0 0 0 20 0 1 0 4711 9 9"), Some(4711));
        assert_eq!(started("7 (a"), None);
        let own = Process::of(std::process::id()).unwrap();
        assert!(own.lives() && !Process { started: own.started + 1, ..own }.lives());
        let of = |boot| Clientele { boot, processes: [own].into(), others: 2 };
        assert_eq!(of(boot_id()).left().count(), 3);
        assert_eq!(of(Uuid::nil()).left().count(), 2, "the host was started anew");
    }
}
