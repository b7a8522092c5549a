//! How far a log was durable, written beside it after every sync: a log that ends earlier has lost
//! bytes that were acknowledged, which its own entries cannot tell of their end.
//!
//! `log-receiver/segment/FORMAT.md` describes its bytes.
//!
//! When a log is found to end before its mark, a mark with its actual end is synced before anything is appended, and names as
//! *lost* how far it had been durable: so what is appended and torn later is cut like any other tail, and the loss is known at
//! every start until all of it has been compared.
//! *In doubt* is a log of which nothing is known to be missing at the end, but not all up to the lost entry may be what its agent
//! knows of: some of it is damaged, or the mark is one that a repair has made anew. That is to be compared too. An agent that knows
//! of more than the log has makes a loss of it, with the LSN that it knows of.
//!
//! The first mark is synced before it gets the file's name, so a file without one is damaged. Others are
//! written in place, within a sector, and not synced but the one that tells of a loss: what a power cut leaves is an
//! older mark, and each was true when it was written.
//!
//! A mark that the device cannot read is an error, never none: without it the end of a log that was lost would look like one
//! that never was. So is one that a newer program wrote: it is whole, and nobody here knows what it says.

use std::{io, path::Path, sync::Arc};

use backtide_recovery::{Durable, LogError, Timeline};
use backtide_segment::Seq;
use backtide_storage::{Storage, StorageFile, replace_with};
use backtide_units::{ByteOffset, HistoryId, Lsn};
use uuid::Uuid;

pub(crate) const FILE: &str = "durable";
pub(crate) const MAGIC: &[u8; 8] = b"BKTDDUR\n";
const LENGTH: usize = 64;
const COMPARING_AT: usize = 56;
const DOUBT_AT: usize = 57;
const VERSION_AT: usize = 58;
const CRC_AT: usize = 60;

/// The version that is read and written. The first one had zeros there: in the file stands one less.
const VERSION: u16 = 1;

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
        match Self::find(storage, dir, history) {
            Ok(Some(_)) => return Ok(Self { file: storage.open(&path)?, history }),
            Ok(None) => {}
            Err(LogError::Io { source, .. }) => return Err(source),
            Err(error) => return Err(io::Error::new(io::ErrorKind::Unsupported, error)),
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
    /// [`LogError::Io`] and [`LogError::UnknownVersion`]: then nobody knows what is noted.
    pub(crate) fn of_any(storage: &dyn Storage, dir: &Path) -> Result<Option<(HistoryId, Noted)>, LogError> {
        match Self::at(storage, &dir.join(FILE)) {
            Err(LogError::Io { source, .. }) if source.kind() == io::ErrorKind::NotFound => Ok(None),
            noted => noted,
        }
    }

    /// What a file notes, and of which history; none when it holds no mark.
    ///
    /// # Errors
    /// As [`Watermark::of_any`].
    pub(crate) fn at(storage: &dyn Storage, path: &Path) -> Result<Option<(HistoryId, Noted)>, LogError> {
        let name = storage.display(path);
        let failed = |source| LogError::Io { step: format!("read {}", name.display()), source };
        let file = storage.open(path).map_err(failed)?;
        let mut bytes = [0; LENGTH];
        if file.read_at(ByteOffset::ZERO, &mut bytes).map_err(failed)? < LENGTH {
            return Ok(None);
        }
        match decode(&bytes) {
            Mark::Noted(history, noted) => Ok(Some((history, noted))),
            Mark::None => Ok(None),
            Mark::Newer(found) => {
                Err(LogError::UnknownVersion { file: name, found, known: u32::from(VERSION) })
            }
        }
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
            Err(LogError::Io { source, .. }) if source.kind() == io::ErrorKind::NotFound => None,
            Err(LogError::Io { source, .. }) => Some(unreadable(&name, &source)),
            Err(error) => Some(error.to_string()),
        }
    }

    /// What to say of the mark in a directory when the device cannot read it; none when it can, or there is no file.
    pub(crate) fn unreadable_in(storage: &dyn Storage, dir: &Path) -> Option<String> {
        match Self::of_any(storage, dir) {
            Err(LogError::Io { source, .. }) => Some(unreadable(&storage.display(&dir.join(FILE)), &source)),
            // One of another version is whole, and not ours to make anew.
            Ok(_) | Err(_) => None,
        }
    }

    /// What is noted of the log in a directory; none when no mark tells. Makes nothing.
    ///
    /// # Errors
    /// As [`Watermark::of_any`].
    pub(crate) fn find(
        storage: &dyn Storage,
        dir: &Path,
        history: HistoryId,
    ) -> Result<Option<Noted>, LogError> {
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
    bytes[VERSION_AT..CRC_AT].copy_from_slice(&(VERSION - 1).to_le_bytes());
    let crc = crc32c::crc32c(&bytes[..CRC_AT]);
    bytes[CRC_AT..].copy_from_slice(&crc.to_le_bytes());
    bytes
}

/// What a file holds.
#[derive(Debug, PartialEq, Eq)]
enum Mark {
    Noted(HistoryId, Noted),
    None,
    /// A mark of this version.
    Newer(u32),
}

fn decode(bytes: &[u8; LENGTH]) -> Mark {
    let number = |at: usize| {
        let mut number = [0; 8];
        number.copy_from_slice(&bytes[at..at + 8]);
        u64::from_le_bytes(number)
    };
    // These are the same in every version.
    let crc = crc32c::crc32c(&bytes[..CRC_AT]).to_le_bytes();
    if !bytes.starts_with(MAGIC) || bytes[CRC_AT..] != crc {
        return Mark::None;
    }
    let version = u32::from(u16::from_le_bytes([bytes[VERSION_AT], bytes[VERSION_AT + 1]])) + 1;
    if version != u32::from(VERSION) {
        return Mark::Newer(version);
    }
    let mut history = [0; 16];
    history.copy_from_slice(&bytes[8..24]);
    let history = HistoryId(Uuid::from_bytes(history));
    let durable = |at: usize| Durable { seq: Seq(number(at)), lsn: Lsn(number(at + 8)) };
    let lost = Some(durable(40)).filter(|lost| lost.seq > Seq(0));
    let (is_compared, in_doubt) = (bytes[COMPARING_AT] == 1, bytes[DOUBT_AT] == 1);
    let lost = lost.map(|through| Lost { through, is_compared, in_doubt });
    let noted = Noted { durable: durable(24), lost };
    if *bytes == encode(history, noted) { Mark::Noted(history, noted) } else { Mark::None }
}

#[cfg(test)]
mod tests {
    use backtide_storage::MemoryStorage;

    use super::*;

    const HISTORY: HistoryId = HistoryId(Uuid::from_u128(5));

    fn noted(is_compared: bool, in_doubt: bool) -> Noted {
        let through = Durable { seq: Seq(12), lsn: Lsn(11) };
        let lost = Some(Lost { through, is_compared, in_doubt });
        Noted { durable: Durable { seq: Seq(7), lsn: Lsn(9) }, lost }
    }

    fn seal(bytes: &mut [u8; LENGTH]) {
        let crc = crc32c::crc32c(&bytes[..CRC_AT]);
        bytes[CRC_AT..].copy_from_slice(&crc.to_le_bytes());
    }

    #[test]
    fn a_mark_reads_back_and_every_flipped_bit_makes_it_none() {
        let all = [(false, false), (true, false), (false, true), (true, true)];
        let whole = Noted { lost: None, ..noted(false, false) };
        for noted in all.map(|(compared, doubt)| noted(compared, doubt)).into_iter().chain([whole]) {
            let good = encode(HISTORY, noted);
            assert_eq!(decode(&good), Mark::Noted(HISTORY, noted));
            for bit in 0..LENGTH * 8 {
                let mut bytes = good;
                bytes[bit / 8] ^= 1 << (bit % 8);
                assert_eq!(decode(&bytes), Mark::None, "bit {bit}");
            }
        }
    }

    #[test]
    fn one_of_a_newer_version_is_refused_with_a_sentence_and_stays_as_it_is() {
        let (storage, dir) = (MemoryStorage::new(), Path::new("d"));
        storage.create_dir(dir).unwrap();
        for (stands, version) in [(1_u16, 2), (u16::MAX, 65_536)] {
            let mut bytes = encode(HISTORY, noted(true, false));
            bytes[VERSION_AT..CRC_AT].copy_from_slice(&stands.to_le_bytes());
            // Of what lies between nobody here knows anything.
            bytes[24..VERSION_AT].fill(0xee);
            assert_eq!(decode(&bytes), Mark::None, "it is not what somebody wrote");
            seal(&mut bytes);
            replace_with(&storage, &dir.join(FILE), |file| file.write_at(ByteOffset::ZERO, &bytes)).unwrap();
            let why = format!("d/durable has format version {version}, this program reads up to 1");
            for error in [
                Watermark::of_any(&storage, dir).unwrap_err(),
                Watermark::find(&storage, dir, HISTORY).unwrap_err(),
            ] {
                assert!(error.to_string().ends_with(&why), "{error}");
            }
            assert!(Watermark::damage_of(&storage, dir).unwrap().ends_with(&why));
            assert_eq!(Watermark::unreadable_in(&storage, dir), None, "no repair makes it anew");
            assert!(Watermark::open(&storage, dir, HISTORY, Durable::default()).is_err());
            let files = storage.files();
            assert_eq!(files.first().unwrap().1[..], bytes);
        }
    }

    #[test]
    fn the_bytes_of_version_1_stay() {
        let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("../testdata/v1/segment/durable");
        if std::env::var_os("BACKTIDE_WRITE_GOLDEN").is_some() {
            std::fs::write(&path, encode(HISTORY, noted(true, false))).unwrap();
        }
        let golden: [u8; LENGTH] = std::fs::read(&path).unwrap().try_into().unwrap();
        assert_eq!(decode(&golden), Mark::Noted(HISTORY, noted(true, false)));
        assert_eq!(encode(HISTORY, noted(true, false)), golden);
    }
}
