//! Clients that are expected back: they had the export open where it was served before.

use std::{
    cell::RefCell,
    collections::{BTreeMap, BTreeSet},
};

use super::accept::Server;

/// Clients by their process, and how many of whom none is known.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Clients {
    /// Connections of each process.
    pub processes: BTreeMap<u32, u32>,
    /// Connections whose process is not known: over TCP, or of another namespace.
    pub others: u32,
}

impl Clients {
    pub(super) fn note(&mut self, process: Option<u32>) {
        match process {
            Some(process) => *self.processes.entry(process).or_default() += 1,
            None => self.others += 1,
        }
    }
}

#[derive(Default)]
pub(super) struct Expected(RefCell<(BTreeSet<u32>, u32)>);

impl Expected {
    /// A client is there. Who has several connections is back with the first.
    pub(super) fn came(&self, process: Option<u32>) {
        let mut expected = self.0.borrow_mut();
        match process {
            Some(process) => drop(expected.0.remove(&process)),
            None => expected.1 = expected.1.saturating_sub(1),
        }
    }
}

impl Server {
    /// Expects these processes, and so many clients whose process is not known: until they connect.
    pub fn expect(&self, processes: BTreeSet<u32>, others: u32) {
        *self.shared.expected.0.borrow_mut() = (processes, others);
    }

    /// Who was expected and has not come.
    pub fn expected(&self) -> (BTreeSet<u32>, u32) {
        self.shared.expected.0.borrow().clone()
    }

    /// Whose [connections](Self::connections) are served now.
    pub fn clients(&self) -> Clients {
        self.shared.clients()
    }
}
