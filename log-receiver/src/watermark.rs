//! How far a log was durable, written beside it after every sync: a log that ends earlier has lost
//! bytes that were acknowledged, which its own entries cannot tell of their end.
//!
//! ```text
//! 0  magic "BKTDDUR\n"   8  history   24  entry   32  LSN   40  lost entry   48  its LSN
//! 56  comparing   57  in doubt   58  zero   60  CRC32C of 0..60
//! ```
//! Little-endian. Entry and LSN: everything up to there is durable. When a log is found to end before its mark, a mark with its
//! actual end is synced before anything is appended, and names as *lost* how far it had been durable (0 and 0 otherwise): so what
//! is appended and torn later is cut like any other tail, and the loss is known at every start until all of it has been
//! compared. *Comparing* is 1 when the pass that does that has begun, durably, and 0 otherwise: from then on no agent need be
//! told of the loss any more.
//! *In doubt* is 1 when nothing is known to be missing at the end, but not all up to the lost entry may be what its agent knows
//! of: some of it is damaged, or the mark is one that a repair has made anew. That is to be compared too. An agent that knows of more
//! than the log has makes a loss of it, with the LSN that it knows of.
//!
//! The first mark is synced before it gets the file's name, so a file without one is damaged. Others are
//! written in place, within a sector, and not synced but the one that tells of a loss: what a power cut leaves is an
//! older mark, and each was true when it was written.
//!
//! A mark that the device cannot read is an error, never none: without it the end of a log that was lost would look like one
//! that never was.

use std::{io, path::Path, sync::Arc};

use backtide_recovery::{Durable, Timeline};
use backtide_segment::Seq;
use backtide_storage::{Storage, StorageFile, replace_with};
use backtide_units::{ByteOffset, HistoryId, Lsn};
use uuid::Uuid;

pub(crate) const FILE: &str = "durable";
pub(crate) const MAGIC: &[u8; 8] = b"BKTDDUR\n";
const LENGTH: usize = 64;
const COMPARING_AT: usize = 56;
const DOUBT_AT: usize = 57;
const CRC_AT: usize = 60;

/// What a mark says.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Noted {
    /// Everything up to there is durable.
    pub(crate) durable: Durable,
    /// The end that was lost, or what is in doubt, when no pass has compared everything since.
    pub(crate) lost: Option<Lost>,
}

/// The end of a log that was lost after it had been acknowledged, or what is in doubt of it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Lost {
    /// How far the log was durable once.
    pub(crate) through: Durable,
    /// Whether a pass that compares everything has begun since, durably.
    pub(crate) is_compared: bool,
    /// It is no lost end: what stands up to there is in doubt.
    pub(crate) in_doubt: bool,
}

impl Lost {
    /// What stands up to there is to be compared.
    pub(crate) fn in_doubt(through: Durable) -> Self {
        Self { through, is_compared: false, in_doubt: true }
    }
}

/// The mark of one log.
#[derive(Clone)]
pub(crate) struct Watermark {
    file: Arc<dyn StorageFile>,
    history: HistoryId,
}

impl Noted {
    /// Nothing is lost up to there.
    pub(crate) fn whole(durable: Durable) -> Self {
        Self { durable, lost: None }
    }

    /// What stands up to there is to be compared.
    pub(crate) fn in_doubt(durable: Durable) -> Self {
        Self { durable, lost: Some(Lost::in_doubt(durable)) }
    }

    /// The highest LSN that was ever durable.
    pub(crate) fn highest(&self) -> Lsn {
        self.durable.lsn.max(self.lost.map_or(Lsn::ZERO, |lost| lost.through.lsn))
    }

    /// The end that a log has lost which goes to entry `found`. A pass may have ended durably after the last mark was written:
    /// when one had begun, and the log gives points as they come, everything was compared.
    pub(crate) fn lost_of(&self, found: Seq, timeline: &Timeline) -> Option<Lost> {
        if self.durable.seq > found {
            // What was lost before may have had higher LSNs.
            let through = Durable { seq: self.durable.seq, lsn: self.highest() };
            return Some(Lost { through, is_compared: false, in_doubt: false });
        }
        let is_whole = timeline.latest().is_some() && timeline.holes().iter().all(|hole| hole.to.is_some());
        self.lost.filter(|lost| !(lost.is_compared && is_whole))
    }
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
                if mark.read()?.is_some() {
                    return Ok(mark);
                }
            }
            Err(error) if error.kind() == io::ErrorKind::NotFound => {}
            Err(error) => return Err(error),
        }
        let noted = encode(history, Noted::whole(durable));
        let file = replace_with(storage, &path, |file| file.write_at(ByteOffset::ZERO, &noted))?;
        Ok(Self { file, history })
    }

    /// Makes the mark of the log in a directory anew, durably.
    ///
    /// # Errors
    /// The file system's: then the old one is there, or the new one.
    pub(crate) fn replace(
        storage: &dyn Storage,
        dir: &Path,
        history: HistoryId,
        noted: Noted,
    ) -> io::Result<()> {
        let bytes = encode(history, noted);
        replace_with(storage, &dir.join(FILE), |file| file.write_at(ByteOffset::ZERO, &bytes)).map(|_| ())
    }

    /// What is noted of whatever log is in a directory, and of which history; none when no mark tells.
    ///
    /// # Errors
    /// The file system's: then nobody knows what is noted.
    pub(crate) fn of_any(storage: &dyn Storage, dir: &Path) -> io::Result<Option<(HistoryId, Noted)>> {
        match Self::at(storage, &dir.join(FILE)) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(None),
            noted => noted,
        }
    }

    /// What a file notes, and of which history; none when it holds no mark.
    ///
    /// # Errors
    /// The file system's.
    pub(crate) fn at(storage: &dyn Storage, path: &Path) -> io::Result<Option<(HistoryId, Noted)>> {
        let file = storage.open(path)?;
        let mut bytes = [0; LENGTH];
        if file.read_at(ByteOffset::ZERO, &mut bytes)? < LENGTH {
            return Ok(None);
        }
        let mut history = [0; 16];
        history.copy_from_slice(&bytes[8..24]);
        let history = HistoryId(Uuid::from_bytes(history));
        Ok(decode(&bytes, history).map(|noted| (history, noted)))
    }

    /// What is wrong with the mark in a directory: a sentence; none when there is one, or no file.
    pub(crate) fn damage_of(storage: &dyn Storage, dir: &Path) -> Option<String> {
        let path = dir.join(FILE);
        let name = storage.display(&path);
        match Self::at(storage, &path) {
            Ok(Some(_)) => None,
            Ok(None) => {
                Some(format!("{} is damaged: it is written again when the receiver starts", name.display()))
            }
            Err(error) if error.kind() == io::ErrorKind::NotFound => None,
            Err(error) => Some(unreadable(&name, &error)),
        }
    }

    /// What to say of the mark in a directory when the device cannot read it; none when it can, or there is no file.
    pub(crate) fn unreadable_in(storage: &dyn Storage, dir: &Path) -> Option<String> {
        let error = Self::of_any(storage, dir).err()?;
        Some(unreadable(&storage.display(&dir.join(FILE)), &error))
    }

    /// What is noted of the log in a directory; none when no mark tells. Makes nothing.
    ///
    /// # Errors
    /// As [`Watermark::of_any`].
    pub(crate) fn find(storage: &dyn Storage, dir: &Path, history: HistoryId) -> io::Result<Option<Noted>> {
        let found = Self::of_any(storage, dir)?;
        Ok(found.filter(|(of, _)| *of == history).map(|(_, noted)| noted))
    }

    /// Notes what is durable.
    ///
    /// # Errors
    /// The file system's; the mark may be none then.
    pub(crate) fn write(&self, noted: Noted) -> io::Result<()> {
        self.file.write_at(ByteOffset::ZERO, &encode(self.history, noted))
    }

    /// Notes it durably.
    ///
    /// # Errors
    /// The file system's; the mark may be the one before then.
    pub(crate) fn write_durably(&self, noted: Noted) -> io::Result<()> {
        self.write(noted)?;
        self.file.sync_data()
    }

    /// What is noted; none when no mark tells.
    ///
    /// # Errors
    /// As [`Watermark::of_any`].
    pub(crate) fn read(&self) -> io::Result<Option<Noted>> {
        let mut bytes = [0; LENGTH];
        let read = self.file.read_at(ByteOffset::ZERO, &mut bytes)?;
        Ok((read == LENGTH).then(|| decode(&bytes, self.history)).flatten())
    }
}

/// What to say of a mark that the device cannot read.
fn unreadable(name: &Path, error: &io::Error) -> String {
    format!(
        "{} cannot be read, which tells how far the log was durable: {error}; if it stays so, `backtide fsck --repair` \
         makes it anew from the log",
        name.display()
    )
}

fn encode(history: HistoryId, noted: Noted) -> [u8; LENGTH] {
    let mut bytes = [0; LENGTH];
    bytes[..8].copy_from_slice(MAGIC);
    bytes[8..24].copy_from_slice(history.0.as_bytes());
    let lost = noted.lost.map(|lost| lost.through).unwrap_or_default();
    let is_compared = noted.lost.is_some_and(|lost| lost.is_compared);
    let numbers = [noted.durable.seq.0, noted.durable.lsn.0, lost.seq.0, lost.lsn.0];
    for (number, place) in numbers.iter().zip(bytes[24..56].chunks_exact_mut(8)) {
        place.copy_from_slice(&number.to_le_bytes());
    }
    bytes[COMPARING_AT] = u8::from(is_compared);
    bytes[DOUBT_AT] = u8::from(noted.lost.is_some_and(|lost| lost.in_doubt));
    let crc = crc32c::crc32c(&bytes[..CRC_AT]);
    bytes[CRC_AT..].copy_from_slice(&crc.to_le_bytes());
    bytes
}

fn decode(bytes: &[u8; LENGTH], history: HistoryId) -> Option<Noted> {
    let durable = |at: usize| {
        let number = |at: usize| {
            let mut number = [0; 8];
            number.copy_from_slice(&bytes[at..at + 8]);
            u64::from_le_bytes(number)
        };
        Durable { seq: Seq(number(at)), lsn: Lsn(number(at + 8)) }
    };
    let lost = Some(durable(40)).filter(|lost| lost.seq > Seq(0));
    let (is_compared, in_doubt) = (bytes[COMPARING_AT] == 1, bytes[DOUBT_AT] == 1);
    let lost = lost.map(|through| Lost { through, is_compared, in_doubt });
    let noted = Noted { durable: durable(24), lost };
    (*bytes == encode(history, noted)).then_some(noted)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_mark_reads_back_and_every_flipped_bit_makes_it_none() {
        let history = HistoryId(Uuid::from_u128(5));
        let durable = Durable { seq: Seq(7), lsn: Lsn(9) };
        let lost = Durable { seq: Seq(12), lsn: Lsn(11) };
        let lost = |is_compared, in_doubt| Some(Lost { through: lost, is_compared, in_doubt });
        for lost in [None, lost(false, false), lost(true, false), lost(false, true), lost(true, true)] {
            let noted = Noted { durable, lost };
            let good = encode(history, noted);
            assert_eq!(decode(&good, history), Some(noted));
            assert_eq!(decode(&good, HistoryId(Uuid::from_u128(6))), None, "a mark of another log");
            for bit in 0..LENGTH * 8 {
                let mut bytes = good;
                bytes[bit / 8] ^= 1 << (bit % 8);
                assert_eq!(decode(&bytes, history), None, "bit {bit}");
            }
        }
    }
}
