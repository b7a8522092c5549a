//! Which disk has which name: one table for the whole store, whoever owns the disks.
//!
//! Only the handshake writes it, so its lock is never on the path of a record.
//! Invariant: a name belongs to at most one disk, and a disk has at most one name.

use std::{
    collections::BTreeMap,
    sync::{Mutex, MutexGuard, PoisonError},
};

use backtide_units::{DiskId, DiskName};

/// The names of all disks of a store.
#[derive(Debug, Default)]
pub struct Names {
    by_name: Mutex<BTreeMap<DiskName, DiskId>>,
}

impl Names {
    /// An empty table.
    pub fn new() -> Self {
        Self::default()
    }

    /// Gives `name` to `disk`, instead of the name it had.
    ///
    /// # Errors
    /// The disk that has the name; nothing was changed.
    pub fn take(&self, name: &DiskName, disk: DiskId) -> Result<(), DiskId> {
        let mut by_name = self.lock();
        match by_name.get(name) {
            Some(&owner) if owner == disk => Ok(()),
            Some(&owner) => Err(owner),
            None => {
                by_name.retain(|_, owner| *owner != disk);
                by_name.insert(name.clone(), disk);
                Ok(())
            }
        }
    }

    /// Forgets the name of a disk that could not be made.
    pub fn release(&self, disk: DiskId) {
        self.lock().retain(|_, owner| *owner != disk);
    }

    /// The disk of a name.
    pub fn find(&self, name: &str) -> Option<DiskId> {
        let name: DiskName = name.parse().ok()?;
        self.lock().get(&name).copied()
    }

    /// The name of a disk.
    pub fn name_of(&self, disk: DiskId) -> Option<DiskName> {
        self.lock().iter().find(|(_, owner)| **owner == disk).map(|(name, _)| name.clone())
    }

    /// All names, sorted.
    pub fn all(&self) -> Vec<DiskName> {
        self.lock().keys().cloned().collect()
    }

    /// Nothing that could panic runs under the lock, so a poisoned one still holds the truth.
    fn lock(&self) -> MutexGuard<'_, BTreeMap<DiskName, DiskId>> {
        self.by_name.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn name(text: &str) -> DiskName {
        text.parse().unwrap()
    }

    #[test]
    fn a_name_has_one_disk_and_a_disk_one_name() {
        let names = Names::new();
        let (one, two) = (DiskId::random(), DiskId::random());
        assert_eq!(names.take(&name("vm1"), one), Ok(()));
        assert_eq!(names.take(&name("vm1"), one), Ok(()));
        assert_eq!(names.take(&name("vm1"), two), Err(one));
        assert_eq!(names.take(&name("vm2"), one), Ok(()), "a rename");
        assert_eq!(names.find("vm1"), None);
        assert_eq!(names.take(&name("vm1"), two), Ok(()));
        assert_eq!(names.name_of(one), Some(name("vm2")));
        names.release(one);
        assert_eq!(names.all(), [name("vm1")]);
    }
}
