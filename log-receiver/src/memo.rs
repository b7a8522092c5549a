//! `disk.json` beside a log: whose log it is, and its newest attach, once more. `FORMAT.md` beside this crate describes it.
//!
//! The log says all of it; this copy is for the day when the log's own header and attach cannot be
//! read any more, so that the disk keeps its name and its entries can still be told from foreign
//! bytes. It is written without a sync and read as a hint: one that is missing, torn or damaged costs
//! nothing while the log is whole.

use std::{io, path::Path};

use backtide_recovery::{Attached, LogIdentity};
use backtide_storage::Storage;
use backtide_units::{ByteCount, ByteOffset, CaptureTime, DiskId, DiskName, Epoch, HistoryId};
use serde::{Deserialize, Serialize};
use uuid::Uuid;

use crate::sealed_json::{SealedError, SealedJson};

/// Its name.
pub(crate) const FILE: &str = "disk.json";
const KIND: SealedJson = SealedJson { magic: "backtide-disk", version: 1, bytes_max: ByteCount(16 * 1024) };

/// What is remembered of a disk.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Memo {
    pub(crate) identity: LogIdentity,
    pub(crate) attached: Attached,
}

#[derive(Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct MemoFile {
    disk: DiskId,
    history: HistoryId,
    name: DiskName,
    size: ByteCount,
    epoch: Epoch,
    attach: Uuid,
    time: CaptureTime,
}

/// Writes the memo into the directory of a log.
///
/// # Errors
/// The file system's.
pub(crate) fn write(storage: &dyn Storage, dir: &Path, memo: &Memo) -> io::Result<()> {
    let content = KIND.encode(&MemoFile::of(memo));
    let (path, beside) = (dir.join(FILE), dir.join("disk.json.new"));
    match storage.remove(&beside) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(error),
        Ok(()) | Err(_) => {}
    }
    storage.create_new(&beside)?.write_at(ByteOffset::ZERO, &content)?;
    storage.rename(&beside, &path)
}

/// Writes it durably: for a log of which nothing else may tell any more who attached it.
///
/// # Errors
/// The file system's.
pub(crate) fn write_durably(storage: &dyn Storage, dir: &Path, memo: &Memo) -> io::Result<()> {
    KIND.write(storage, &dir.join(FILE), &MemoFile::of(memo))
}

impl MemoFile {
    fn of(memo: &Memo) -> Self {
        let Memo { identity, attached } = memo;
        Self {
            disk: identity.disk,
            history: identity.history,
            name: attached.name.clone(),
            size: attached.size,
            epoch: attached.epoch,
            attach: attached.attach,
            time: attached.time,
        }
    }
}

/// Reads the memo of a log; none when there is no good one.
pub(crate) fn read(storage: &dyn Storage, dir: &Path) -> Option<Memo> {
    let file: MemoFile = KIND.read(storage, &dir.join(FILE)).ok()??;
    let identity = LogIdentity { disk: file.disk, history: file.history };
    let (epoch, attach, name, size, time) = (file.epoch, file.attach, file.name, file.size, file.time);
    Some(Memo { identity, attached: Attached { epoch, attach, name, size, time } })
}

/// Whether a memo may be written there: there is none, or a damaged one.
pub(crate) fn is_free(storage: &dyn Storage, dir: &Path) -> bool {
    matches!(KIND.read::<MemoFile>(storage, &dir.join(FILE)), Ok(None) | Err(SealedError::Damaged { .. }))
}

/// What is wrong with a memo that is there: a sentence.
pub(crate) fn damage_of(storage: &dyn Storage, dir: &Path) -> Option<String> {
    let path = dir.join(FILE);
    match KIND.read::<MemoFile>(storage, &path) {
        Ok(_) => None,
        Err(error @ (SealedError::Io { .. } | SealedError::Version { .. })) => Some(error.to_string()),
        Err(SealedError::Damaged { .. }) => {
            let name = storage.display(&path);
            Some(format!("{} is damaged: it is written again at the next attach", name.display()))
        }
    }
}

#[cfg(test)]
mod tests {
    use backtide_storage::MemoryStorage;

    use super::*;

    #[test]
    fn a_memo_reads_back_and_every_flipped_bit_makes_it_none() {
        let storage = MemoryStorage::new();
        storage.create_dir(Path::new("d")).unwrap();
        let identity =
            LogIdentity { disk: DiskId(Uuid::from_u128(1)), history: HistoryId(Uuid::from_u128(2)) };
        let attached = Attached {
            epoch: Epoch(3),
            attach: Uuid::from_u128(4),
            name: "vm1".parse().unwrap(),
            size: ByteCount(4096),
            time: CaptureTime(5),
        };
        let memo = Memo { identity, attached };
        for _ in 0..2 {
            write(&storage, Path::new("d"), &memo).unwrap();
            assert_eq!(read(&storage, Path::new("d")), Some(memo.clone()));
        }
        let path = Path::new("d").join(FILE);
        let length = storage.open(&path).unwrap().len().unwrap().0;
        for byte in 0..length {
            storage.flip_bit(&path, ByteOffset(byte), 1);
            let found = read(&storage, Path::new("d"));
            assert_eq!(found, None, "byte {byte}");
            storage.flip_bit(&path, ByteOffset(byte), 1);
        }
        assert_eq!(read(&storage, Path::new("e")), None);
        SealedJson { version: 2, ..KIND }.write(&storage, &path, &["more"]).unwrap();
        assert_eq!((read(&storage, Path::new("d")), is_free(&storage, Path::new("d"))), (None, false));
        assert!(damage_of(&storage, Path::new("d")).unwrap().contains("has version 2"));
    }
}
