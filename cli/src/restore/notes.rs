//! What a restore to a file has done so far, beside its partial file: who comes later goes on there.
//!
//! ```text
//! .NAME.XXXXXX.restoring.notes
//! 0   magic "BKTDRST\n"   8  version 1   12  zero   16  disk   32  LSN   40  size   48  CRC32C of 0..48
//! 52  and every 44 bytes: number of a piece of 1 MiB (8), its digest (32), CRC32C of the 40
//! ```
//! Little-endian. A note is written when its piece is in the file. Neither is synced: a piece counts only when
//! the file still has its digest, and a note that is torn ends the notes.

use std::{
    collections::BTreeMap,
    fs::File,
    io::{self, Write},
    os::unix::fs::{FileExt, OpenOptionsExt},
    path::{Path, PathBuf},
    sync::{Arc, Mutex, PoisonError},
};

use backtide_units::{ByteCount, DiskId, Lsn};

use super::{leftovers, pieces::PIECE};

/// Ends the name of the notes of a partial file.
const SUFFIX: &str = ".notes";

const MAGIC: &[u8; 8] = b"BKTDRST\n";
const HEADER_LENGTH: usize = 52;
const NOTE_LENGTH: usize = 44;

/// Where the notes of a partial file are.
pub(super) fn path_of(partial: &Path) -> PathBuf {
    let mut name = partial.as_os_str().to_owned();
    name.push(SUFFIX);
    name.into()
}

/// The point that a partial file is going to be.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Goal {
    pub(crate) disk: DiskId,
    pub(crate) lsn: Lsn,
    pub(crate) size: ByteCount,
}

/// The notes of one partial file. Clones share it.
#[derive(Clone, Debug)]
pub(super) struct Notes {
    file: Arc<Mutex<File>>,
    /// What an earlier restore has noted.
    known: Arc<BTreeMap<u64, [u8; 32]>>,
}

impl Goal {
    fn header(&self) -> [u8; HEADER_LENGTH] {
        let mut bytes = [0; HEADER_LENGTH];
        bytes[..8].copy_from_slice(MAGIC);
        bytes[8] = 1;
        bytes[16..32].copy_from_slice(self.disk.0.as_bytes());
        bytes[32..40].copy_from_slice(&self.lsn.0.to_le_bytes());
        bytes[40..48].copy_from_slice(&self.size.0.to_le_bytes());
        let crc = crc32c::crc32c(&bytes[..48]);
        bytes[48..].copy_from_slice(&crc.to_le_bytes());
        bytes
    }
}

fn note(piece: u64, digest: &[u8; 32]) -> [u8; NOTE_LENGTH] {
    let mut bytes = [0; NOTE_LENGTH];
    bytes[..8].copy_from_slice(&piece.to_le_bytes());
    bytes[8..40].copy_from_slice(digest);
    let crc = crc32c::crc32c(&bytes[..40]);
    bytes[40..].copy_from_slice(&crc.to_le_bytes());
    bytes
}

impl Notes {
    /// New notes at `path`.
    pub(super) fn create(path: &Path, goal: &Goal) -> io::Result<Self> {
        // Made here and for this user, as the partial file is: never what somebody has put there.
        let mut file = File::options().write(true).create_new(true).mode(0o600).open(path)?;
        file.write_all(&goal.header())?;
        Ok(Self { file: Arc::new(Mutex::new(file)), known: Arc::default() })
    }

    /// The notes at `path`, to go on with; none when they are of another point, somebody else may have
    /// written them, or there are none at all.
    pub(super) fn open(path: &Path, goal: &Goal) -> Option<Self> {
        let file = leftovers::open_own(path, true).ok()?.filter(leftovers::is_private)?;
        let length = usize::try_from(file.metadata().ok()?.len()).ok()?;
        let mut header = [0; HEADER_LENGTH];
        file.read_exact_at(&mut header, 0).ok()?;
        if header != goal.header() {
            return None;
        }
        let notes_max = usize::try_from(goal.size.0.div_ceil(PIECE.0)).ok()?.checked_mul(2 * NOTE_LENGTH)?;
        let mut bytes = vec![0; length.saturating_sub(HEADER_LENGTH).min(notes_max)];
        file.read_exact_at(&mut bytes, HEADER_LENGTH as u64).ok()?;
        bytes.truncate(whole_notes(&bytes));
        // A torn note would stand between those before it and those that follow.
        file.set_len((HEADER_LENGTH + bytes.len()) as u64).ok()?;
        let read = |found: &[u8]| {
            let piece = u64::from_le_bytes(found[..8].try_into().expect("eight bytes"));
            (piece, found[8..40].try_into().expect("32 bytes"))
        };
        let known = bytes.chunks_exact(NOTE_LENGTH).map(read).collect();
        Some(Self { file: Arc::new(Mutex::new(file)), known: Arc::new(known) })
    }

    /// The digest of a piece that an earlier restore has noted.
    pub(super) fn of(&self, piece: u64) -> Option<[u8; 32]> {
        self.known.get(&piece).copied()
    }

    /// Notes that a piece is in the file.
    pub(super) fn add(&self, piece: u64, digest: &[u8; 32]) -> io::Result<()> {
        let mut file = self.file.lock().unwrap_or_else(PoisonError::into_inner);
        file.write_all(&note(piece, digest))
    }
}

/// How many bytes of notes are whole.
fn whole_notes(bytes: &[u8]) -> usize {
    let whole = bytes.chunks_exact(NOTE_LENGTH).take_while(|found| {
        let crc = crc32c::crc32c(&found[..40]);
        found[40..] == crc.to_le_bytes()
    });
    whole.count() * NOTE_LENGTH
}

#[cfg(test)]
mod tests {
    use super::*;

    fn goal(lsn: u64) -> Goal {
        let disk = DiskId("11111111-2222-3333-4444-555555555555".parse().unwrap());
        Goal { disk, lsn: Lsn(lsn), size: ByteCount(5 << 20) }
    }

    #[test]
    fn notes_read_back_up_to_a_torn_one_and_only_for_their_point() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("notes");
        let notes = Notes::create(&path, &goal(7)).unwrap();
        for piece in [3, 0, 4] {
            notes.add(piece, &[piece as u8; 32]).unwrap();
        }
        assert!(Notes::open(&path, &goal(8)).is_none());
        let whole = std::fs::read(&path).unwrap();
        for cut in HEADER_LENGTH..=whole.len() {
            std::fs::write(&path, &whole[..cut]).unwrap();
            let again = Notes::open(&path, &goal(7)).unwrap();
            again.add(1, &[9; 32]).unwrap();
            let again = Notes::open(&path, &goal(7)).unwrap();
            let kept = (cut - HEADER_LENGTH) / NOTE_LENGTH;
            for (place, piece) in [3, 0, 4].into_iter().enumerate() {
                assert_eq!(again.of(piece).is_some(), place < kept, "cut {cut}");
            }
            assert_eq!(again.of(1), Some([9; 32]), "cut {cut}");
        }
        for byte in 0..HEADER_LENGTH {
            let mut bytes = whole.clone();
            bytes[byte] ^= 1;
            std::fs::write(&path, bytes).unwrap();
            assert!(Notes::open(&path, &goal(7)).is_none(), "byte {byte}");
        }
    }
}
