//! Watches the room that is left in the store, for all its disks together.
//!
//! Asking the file system for every record would cost more than the record: it is asked again after
//! so many bytes as cannot use up the reserve, and every time while the store is full.

use std::sync::{
    Arc,
    atomic::{AtomicU64, Ordering},
};

use backtide_storage::Storage;
use backtide_units::ByteCount;

/// The share of the reserve that may be written between two looks.
const SHARE: u64 = 16;

/// Not counted yet: look at once.
const UNKNOWN: u64 = u64::MAX / 2;

/// What is refused for want of room. Clones share it.
#[derive(Clone, Debug, Default)]
pub(crate) struct Refusals(Arc<AtomicU64>);

impl Refusals {
    /// Whether data would be refused with so much free, as it was lately.
    pub(crate) fn hold_at(&self, free: ByteCount) -> bool {
        free.0 < self.0.load(Ordering::Relaxed)
    }

    /// What was refused needed so much, with the reserve. Room for less does not end that: the next may be as long.
    fn refused(&self, needed: u64) {
        self.0.store(needed, Ordering::Relaxed);
    }
}

/// The room left in a store. Clones share it.
#[derive(Clone)]
pub(crate) struct Space {
    storage: Arc<dyn Storage>,
    floor: ByteCount,
    /// Bytes taken since the last look.
    taken: Arc<AtomicU64>,
    refusals: Refusals,
}

impl Space {
    pub(crate) fn new(storage: Arc<dyn Storage>, floor: ByteCount, refusals: Refusals) -> Self {
        Self { storage, floor, taken: Arc::new(AtomicU64::new(UNKNOWN)), refusals }
    }

    /// Counts `wanted` bytes.
    ///
    /// # Errors
    /// A sentence when the store has too little room left for them.
    pub(crate) fn take(&self, wanted: ByteCount) -> Result<(), String> {
        let taken = self.taken.fetch_add(wanted.0, Ordering::Relaxed).saturating_add(wanted.0);
        if taken < self.floor.0 / SHARE {
            return Ok(());
        }
        self.look(wanted)
    }

    /// As [`Space::take`], with a look at the file system in any case.
    ///
    /// # Errors
    /// A sentence when the store has too little room left for them.
    pub(crate) fn look(&self, wanted: ByteCount) -> Result<(), String> {
        let place = || self.storage.display("".as_ref()).display().to_string();
        let why = match self.storage.free_space() {
            Ok(free) if free.0 >= self.floor.0.saturating_add(wanted.0) => {
                self.taken.store(0, Ordering::Relaxed);
                return Ok(());
            }
            Ok(free) => {
                if !wanted.is_zero() {
                    self.refusals.refused(self.floor.0.saturating_add(wanted.0));
                }
                format!(
                    "the store {} is full: {free} bytes are free, {} are kept in reserve",
                    place(),
                    self.floor
                )
            }
            Err(error) => format!("cannot read the free space of the store {}: {error}", place()),
        };
        self.taken.store(UNKNOWN, Ordering::Relaxed);
        Err(why)
    }
}

#[cfg(test)]
mod tests {
    use backtide_storage::MemoryStorage;

    use super::*;

    #[test]
    fn a_full_store_is_noticed_within_a_share_and_stays_noticed() {
        let storage = MemoryStorage::new();
        let refusals = Refusals::default();
        let space = Space::new(Arc::new(storage.clone()), ByteCount(1600), refusals.clone());
        assert!(space.take(ByteCount(1)).is_ok());
        storage.set_capacity(Some(ByteCount(1000)));
        assert!(space.take(ByteCount(99)).is_ok(), "less than a share of the reserve");
        let why = space.take(ByteCount(1)).unwrap_err();
        assert!(why.contains("is full: 1000 bytes are free, 1600 are kept in reserve"), "{why}");
        assert!(space.take(ByteCount(1)).is_err(), "every time while it is full");
        assert!(refusals.hold_at(ByteCount(1600)) && !refusals.hold_at(ByteCount(1601)));
        storage.set_capacity(None);
        assert!(space.take(ByteCount(1)).is_ok());
    }
}
