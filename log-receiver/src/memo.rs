//! `disk.json` beside a log: whose log it is, and its newest attach, once more.
//!
//! The log says all of it; this copy is for the day when the log's own header and attach cannot be
//! read any more, so that the disk keeps its name and its entries can still be told from foreign
//! bytes. It is written without a sync and read as a hint: one that is missing, torn or damaged costs
//! nothing while the log is whole.

use std::{io, path::Path};

use backtide_recovery::{Attached, LogIdentity};
use backtide_storage::{Storage, read_file};
use backtide_units::{ByteCount, ByteOffset, CaptureTime, DiskId, DiskName, Epoch, HistoryId};
use serde::{Deserialize, Serialize};
use uuid::Uuid;

/// Its name.
pub(crate) const FILE: &str = "disk.json";
const MAGIC: &str = "backtide-disk";
const VERSION: u32 = 1;
const FILE_BYTES_MAX: ByteCount = ByteCount(16 * 1024);

/// What is remembered of a disk.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Memo {
    pub(crate) identity: LogIdentity,
    pub(crate) attached: Attached,
}

#[derive(Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct MemoFile {
    magic: String,
    version: u32,
    disk: DiskId,
    history: HistoryId,
    name: DiskName,
    size: ByteCount,
    epoch: Epoch,
    attach: Uuid,
    time: CaptureTime,
    /// CRC32C of the JSON of this with an empty checksum, in hexadecimal.
    checksum: String,
}

impl MemoFile {
    fn sum(&self) -> String {
        let bare =
            Self { magic: self.magic.clone(), name: self.name.clone(), checksum: String::new(), ..*self };
        let text = serde_json::to_vec(&bare).expect("plain data becomes JSON");
        format!("{:08x}", crc32c::crc32c(&text))
    }
}

/// Writes the memo into the directory of a log.
///
/// # Errors
/// The file system's.
pub(crate) fn write(storage: &dyn Storage, dir: &Path, memo: &Memo) -> io::Result<()> {
    let Memo { identity, attached } = memo;
    let mut file = MemoFile {
        magic: MAGIC.to_owned(),
        version: VERSION,
        disk: identity.disk,
        history: identity.history,
        name: attached.name.clone(),
        size: attached.size,
        epoch: attached.epoch,
        attach: attached.attach,
        time: attached.time,
        checksum: String::new(),
    };
    file.checksum = file.sum();
    let content = serde_json::to_vec_pretty(&file).expect("plain data becomes JSON");
    let (path, beside) = (dir.join(FILE), dir.join("disk.json.new"));
    match storage.remove(&beside) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(error),
        Ok(()) | Err(_) => {}
    }
    storage.create_new(&beside)?.write_at(ByteOffset::ZERO, &content)?;
    storage.rename(&beside, &path)
}

/// Reads the memo of a log; none when there is no good one.
pub(crate) fn read(storage: &dyn Storage, dir: &Path) -> Option<Memo> {
    let content = read_file(storage, &dir.join(FILE), FILE_BYTES_MAX).ok()?;
    let file: MemoFile = serde_json::from_slice(&content).ok()?;
    if file.magic != MAGIC || file.version != VERSION || file.checksum != file.sum() {
        return None;
    }
    let identity = LogIdentity { disk: file.disk, history: file.history };
    let (epoch, attach, name, size, time) = (file.epoch, file.attach, file.name, file.size, file.time);
    Some(Memo { identity, attached: Attached { epoch, attach, name, size, time } })
}

/// Whether there is a memo that cannot be read.
pub(crate) fn is_damaged(storage: &dyn Storage, dir: &Path) -> bool {
    read_file(storage, &dir.join(FILE), FILE_BYTES_MAX).is_ok() && read(storage, dir).is_none()
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
            // White space may change into other white space.
            assert!(found.is_none() || found.as_ref() == Some(&memo), "byte {byte}");
            storage.flip_bit(&path, ByteOffset(byte), 1);
        }
        assert_eq!(read(&storage, Path::new("e")), None);
    }
}
