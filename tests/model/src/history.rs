//! The plain model: every change with its LSN. The disk at a point L is the effect of all changes up
//! to L in the order of their LSNs.
//!
//! What a crash left of a change under way has no LSN: the block is unknown (any content is right)
//! until a later change, or until the next freeze, at which the disk's content is what it is.

use std::collections::BTreeSet;

use backtide_units::Lsn;

/// See the module's description.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub(crate) struct History {
    first: Vec<u8>,
    /// By LSN; of equal ones in the order they came. Without a value, nobody knows.
    changes: Vec<(Lsn, u8, Option<u8>)>,
    unresolved: BTreeSet<u8>,
}

impl History {
    pub(crate) fn new(first: Vec<u8>) -> Self {
        Self { first, changes: Vec::new(), unresolved: BTreeSet::new() }
    }

    /// The highest LSN that a change was given.
    pub(crate) fn highest(&self) -> Lsn {
        let mut given = self.changes.iter().filter(|(_, _, value)| value.is_some());
        given.next_back().map_or(Lsn::ZERO, |(lsn, ..)| *lsn)
    }

    pub(crate) fn change(&mut self, lsn: Lsn, block: u8, value: Option<u8>) {
        let place = self.changes.partition_point(|(other, ..)| *other <= lsn);
        self.changes.insert(place, (lsn, block, value));
    }

    /// From `lsn` on nobody knows what the block holds.
    pub(crate) fn lose(&mut self, lsn: Lsn, block: u8) {
        self.change(lsn, block, None);
        self.unresolved.insert(block);
    }

    /// A freeze at `at`: the disk holds `values`, which settles what was unknown.
    pub(crate) fn resolve(&mut self, at: Lsn, values: &[u8]) {
        for block in std::mem::take(&mut self.unresolved) {
            self.change(at, block, Some(values[usize::from(block)]));
        }
    }

    /// The disk at `lsn`; blocks without a value may hold anything.
    pub(crate) fn image_at(&self, lsn: Lsn) -> Vec<Option<u8>> {
        let mut image: Vec<Option<u8>> = self.first.iter().copied().map(Some).collect();
        for (_, block, value) in self.changes.iter().take_while(|(change, ..)| *change <= lsn) {
            image[usize::from(*block)] = *value;
        }
        image
    }
}
