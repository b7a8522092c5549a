//! How far a log was durable, written beside it after every sync: a log that ends earlier has lost
//! bytes that were acknowledged, which its own entries cannot tell of their end.
//!
//! ```text
//! 0  magic "BKTDDUR\n"   8  history   24  entry   32  LSN   40  zero   44  CRC32C of 0..44
//! ```
//! Little-endian. It is written in place and never synced: what a power cut leaves of it is an older
//! mark or none, and each mark was true when it was written.

use std::{io, path::Path, sync::Arc};

use backtide_recovery::Durable;
use backtide_segment::Seq;
use backtide_storage::{Storage, StorageFile};
use backtide_units::{ByteOffset, HistoryId, Lsn};

const FILE: &str = "durable";
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
    /// Opens the mark in the directory of a log.
    ///
    /// # Errors
    /// The file system's.
    pub(crate) fn open(storage: &dyn Storage, dir: &Path, history: HistoryId) -> io::Result<Self> {
        let path = dir.join(FILE);
        let file = match storage.open(&path) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => storage.create_new(&path)?,
            opened => opened?,
        };
        Ok(Self { file, history })
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
    use uuid::Uuid;

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
