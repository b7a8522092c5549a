//! How far a log was durable, written beside it after every sync: a log that ends earlier has lost
//! bytes that were acknowledged, which its own entries cannot tell of their end.
//!
//! ```text
//! 0  magic "BKTDDUR\n"   8  history   24  entry   32  LSN   40  zero   44  CRC32C of 0..44
//! ```
//! Little-endian. The first mark is synced before it gets the file's name, so a file without one is damaged.
//! Later ones are written in place, within a sector, and never synced: what a power cut leaves is an older
//! mark, and each was true when it was written.

use std::{io, path::Path, sync::Arc};

use backtide_recovery::Durable;
use backtide_segment::Seq;
use backtide_storage::{Storage, StorageFile};
use backtide_units::{ByteOffset, HistoryId, Lsn};
use uuid::Uuid;

pub(crate) const FILE: &str = "durable";
const FILE_NEW: &str = "durable.new";
const MAGIC: &[u8; 8] = b"BKTDDUR\n";
const LENGTH: usize = 48;
const CRC_AT: usize = 44;

/// The mark of one log.
#[derive(Clone)]
pub(crate) struct Watermark {
    file: Arc<dyn StorageFile>,
    history: HistoryId,
}

impl Watermark {
    /// Opens the mark in the directory of a log; when none tells, makes it anew with what is durable now.
    ///
    /// # Errors
    /// The file system's.
    pub(crate) fn open(
        storage: &dyn Storage,
        dir: &Path,
        history: HistoryId,
        durable: Durable,
    ) -> io::Result<Self> {
        let path = dir.join(FILE);
        match storage.open(&path) {
            Ok(file) => {
                let mark = Self { file, history };
                if mark.read().is_some() {
                    return Ok(mark);
                }
            }
            Err(error) if error.kind() == io::ErrorKind::NotFound => {}
            Err(error) => return Err(error),
        }
        let beside = dir.join(FILE_NEW);
        match storage.remove(&beside) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(error),
            Ok(()) | Err(_) => {}
        }
        let new = Self { file: storage.create_new(&beside)?, history };
        new.write(durable)?;
        new.file.sync_data()?;
        storage.rename(&beside, &path)?;
        Ok(Self { file: storage.open(&path)?, history })
    }

    /// What was durable of whatever log is in a directory; none when no mark tells.
    pub(crate) fn of_any(storage: &dyn Storage, dir: &Path) -> Option<Durable> {
        let file = storage.open(&dir.join(FILE)).ok()?;
        let mut bytes = [0; LENGTH];
        file.read_exact_at(ByteOffset::ZERO, &mut bytes).ok()?;
        let mut history = [0; 16];
        history.copy_from_slice(&bytes[8..24]);
        decode(&bytes, HistoryId(Uuid::from_bytes(history)))
    }

    /// Whether there is a file without a mark.
    pub(crate) fn is_damaged(storage: &dyn Storage, dir: &Path) -> bool {
        storage.open(&dir.join(FILE)).is_ok() && Self::of_any(storage, dir).is_none()
    }

    /// What was durable of the log in a directory; none when no mark tells. Makes nothing.
    pub(crate) fn find(storage: &dyn Storage, dir: &Path, history: HistoryId) -> Option<Durable> {
        let file = storage.open(&dir.join(FILE)).ok()?;
        Self { file, history }.read()
    }

    /// Notes what is durable.
    ///
    /// # Errors
    /// The file system's; the mark may be none then.
    pub(crate) fn write(&self, durable: Durable) -> io::Result<()> {
        self.file.write_at(ByteOffset::ZERO, &encode(self.history, durable))
    }

    /// What was durable; none when no mark tells.
    pub(crate) fn read(&self) -> Option<Durable> {
        let mut bytes = [0; LENGTH];
        self.file.read_exact_at(ByteOffset::ZERO, &mut bytes).ok()?;
        decode(&bytes, self.history)
    }
}

fn encode(history: HistoryId, durable: Durable) -> [u8; LENGTH] {
    let mut bytes = [0; LENGTH];
    bytes[..8].copy_from_slice(MAGIC);
    bytes[8..24].copy_from_slice(history.0.as_bytes());
    bytes[24..32].copy_from_slice(&durable.seq.0.to_le_bytes());
    bytes[32..40].copy_from_slice(&durable.lsn.0.to_le_bytes());
    let crc = crc32c::crc32c(&bytes[..CRC_AT]);
    bytes[CRC_AT..].copy_from_slice(&crc.to_le_bytes());
    bytes
}

fn decode(bytes: &[u8; LENGTH], history: HistoryId) -> Option<Durable> {
    let number = |at: usize| {
        let mut number = [0; 8];
        number.copy_from_slice(&bytes[at..at + 8]);
        u64::from_le_bytes(number)
    };
    let durable = Durable { seq: Seq(number(24)), lsn: Lsn(number(32)) };
    (*bytes == encode(history, durable)).then_some(durable)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_mark_reads_back_and_every_flipped_bit_makes_it_none() {
        let history = HistoryId(Uuid::from_u128(5));
        let durable = Durable { seq: Seq(7), lsn: Lsn(9) };
        let good = encode(history, durable);
        assert_eq!(decode(&good, history), Some(durable));
        assert_eq!(decode(&good, HistoryId(Uuid::from_u128(6))), None, "a mark of another log");
        for bit in 0..LENGTH * 8 {
            let mut bytes = good;
            bytes[bit / 8] ^= 1 << (bit % 8);
            assert_eq!(decode(&bytes, history), None, "bit {bit}");
        }
    }
}
