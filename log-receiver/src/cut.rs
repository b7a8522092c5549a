//! `cut.json` beside a log that a repair has cut: nothing is appended to that log any more. `FORMAT.md` beside this crate
//! describes it.
//!
//! What stood behind the cut had been acknowledged, and blocks that it had written differ from what the log has now. So the
//! log goes on as one that was damaged: it is read, the disk's next hello begins a new one behind it, and the hole between
//! the two has the reason of the cut. The file is there before anything is cut: a repair that was cut short leaves a
//! log that is damaged and out of use, and the next one ends it.

use std::{io, path::Path};

use backtide_recovery::LogError;
use backtide_storage::Storage;
use backtide_units::ByteCount;
use serde::{Deserialize, Serialize};

use crate::sealed_json::{SealedError, SealedJson};

/// Its name.
const FILE: &str = "cut.json";
const KIND: SealedJson = SealedJson { magic: "backtide-cut", version: 1, bytes_max: ByteCount(64 * 1024) };

/// That a log was cut.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct Cut {
    /// A sentence.
    pub(crate) why: String,
}

impl Cut {
    /// What is noted in the directory of a log. A file that is damaged says as much as one that is whole: the log was cut.
    ///
    /// # Errors
    /// The file system's, and [`LogError::UnknownVersion`]: then nobody knows.
    pub(crate) fn read(storage: &dyn Storage, dir: &Path) -> Result<Option<Self>, LogError> {
        let path = dir.join(FILE);
        match KIND.read(storage, &path) {
            Ok(cut) => Ok(cut),
            Err(error @ SealedError::Damaged { .. }) => Ok(Some(Self { why: error.to_string() })),
            Err(SealedError::Io { file, source }) => {
                Err(LogError::Io { step: format!("read {file}"), source })
            }
            Err(SealedError::Version { found, known, .. }) => {
                Err(LogError::UnknownVersion { file: storage.display(&path), found, known })
            }
        }
    }

    /// Notes it, durably.
    ///
    /// # Errors
    /// The file system's.
    pub(crate) fn write(&self, storage: &dyn Storage, dir: &Path) -> io::Result<()> {
        KIND.write(storage, &dir.join(FILE), self)
    }

    /// How the file is damaged, a sentence.
    pub(crate) fn damage_of(storage: &dyn Storage, dir: &Path) -> Option<String> {
        KIND.damage_of::<Self>(storage, &dir.join(FILE))
    }
}

#[cfg(test)]
mod tests {
    use backtide_storage::MemoryStorage;
    use backtide_units::ByteOffset;

    use super::*;

    #[test]
    fn a_log_that_was_cut_stays_so_whatever_becomes_of_the_file() {
        let (storage, dir) = (MemoryStorage::new(), Path::new("d"));
        storage.create_dir(dir).unwrap();
        assert!(Cut::read(&storage, dir).unwrap().is_none());
        let cut = Cut { why: "a segment is missing".to_owned() };
        cut.write(&storage, dir).unwrap();
        let read = || Cut::read(&storage, dir).unwrap();
        assert_eq!((read(), Cut::damage_of(&storage, dir)), (Some(cut.clone()), None));
        let length = storage.open(&dir.join(FILE)).unwrap().len().unwrap().0;
        for byte in 0..length {
            storage.flip_bit(&dir.join(FILE), ByteOffset(byte), 1);
            assert_ne!(read(), None, "byte {byte}");
            assert!(Cut::damage_of(&storage, dir).unwrap().contains("cut.json"), "byte {byte}");
            storage.flip_bit(&dir.join(FILE), ByteOffset(byte), 1);
        }
        assert_eq!(read(), Some(cut.clone()));
        // Another program's is no reason to take the log for cut, nor for one that was not.
        SealedJson { version: 2, ..KIND }.write(&storage, &dir.join(FILE), &cut).unwrap();
        assert!(matches!(Cut::read(&storage, dir), Err(LogError::UnknownVersion { found: 2, .. })));
        assert_eq!(Cut::damage_of(&storage, dir), None);
    }
}
