//! Room in the state directory that is kept for the start of an agent which finds it full: without it no disk could be attached
//! again, and no guest would have its disk, because of a file system that only Backtide needs.

use std::{io, path::Path};

use backtide_units::{ByteCount, DiskName};

use super::Records;

/// Beside the records.
const FILE: &str = "reserve";

/// Records and the growth of tracking files of hundreds of disks, as long as little has changed.
const RESERVE: ByteCount = ByteCount(4 << 20);

/// It is kept where there is as much as this: a directory that is nearly full is of more use to its disks.
const FREE_MIN: ByteCount = ByteCount(16 * RESERVE.0);

impl Records {
    /// Keeps the reserve, where there is room in plenty; whether there is one.
    ///
    /// # Errors
    /// The storage's: then there is none.
    pub(crate) fn keep_reserve(&self) -> io::Result<bool> {
        let file = Path::new(FILE);
        let length = |found: io::Result<_>| match found {
            Ok(length) => Ok(Some(length)),
            Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(None),
            Err(error) => Err(error),
        };
        match length(self.storage.open(file).and_then(|file| file.len()))? {
            Some(RESERVE) => return Ok(true),
            // Of an agent that died while it wrote it.
            Some(_) => self.storage.remove(file)?,
            None => {}
        }
        if self.storage.free_space()? < FREE_MIN {
            return Ok(false);
        }
        if let Err(error) = self.fill(file, RESERVE) {
            // A part of it would be taken for one that is being written.
            let _ = self.storage.remove(file);
            return Err(error);
        }
        self.sync_names().map(|()| true)
    }

    /// Gives the reserve up where the directory has not as much room again, which is what may be written of disks that are attached;
    /// whether that was so and there was one.
    ///
    /// # Errors
    /// The storage's, other than that it is full.
    pub(crate) fn use_reserve(&self, disk: &DiskName) -> io::Result<bool> {
        if self.storage.free_space()? >= FREE_MIN {
            return Ok(false);
        }
        match self.try_room(disk, RESERVE) {
            Err(error) if is_full(&error) => {}
            tried => return tried.map(|()| false),
        }
        match self.storage.remove(Path::new(FILE)) {
            Ok(()) => self.sync_names().map(|()| true),
            Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(false),
            Err(error) => Err(error),
        }
    }
}

/// Whether it says that there is no room, for anybody or for this user.
fn is_full(error: &io::Error) -> bool {
    matches!(error.kind(), io::ErrorKind::StorageFull | io::ErrorKind::QuotaExceeded)
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use backtide_storage::{MemoryStorage, Storage};

    use super::*;

    fn records(storage: &MemoryStorage) -> Records {
        Records::new(Arc::new(storage.clone()))
    }

    #[test]
    fn a_reserve_is_kept_where_there_is_room_and_used_where_there_is_none() {
        let (storage, disk) = (MemoryStorage::new(), "vm1".parse().unwrap());
        storage.set_capacity(Some(FREE_MIN));
        let records = records(&storage);
        assert!(records.keep_reserve().unwrap());
        assert_eq!(storage.used(), RESERVE);
        assert!(records.keep_reserve().unwrap(), "it is there");
        assert!(!records.use_reserve(&disk).unwrap(), "there is room");
        assert_eq!(storage.used(), RESERVE, "it stays");

        storage.set_capacity(Some(ByteCount(2 * RESERVE.0 - 1)));
        assert!(records.use_reserve(&disk).unwrap());
        assert_eq!(storage.used(), ByteCount(0));
        assert!(!records.keep_reserve().unwrap(), "what is left is for the disks");
        storage.set_capacity(Some(ByteCount(1)));
        assert!(!records.use_reserve(&disk).unwrap(), "there is none any more");
    }

    #[test]
    fn a_reserve_that_was_not_written_whole_is_written_anew() {
        let storage = MemoryStorage::new();
        storage.create_new(Path::new(FILE)).unwrap();
        assert!(records(&storage).keep_reserve().unwrap());
        assert_eq!(storage.used(), RESERVE);
    }
}
