//! Whether the state directory takes what is going to be written there: only an attempt tells.

use std::{
    io,
    path::{Path, PathBuf},
};

use backtide_hydration::HydrationFile;
use backtide_tracking::DirtyBitmap;
use backtide_units::{ByteCount, ByteOffset, DiskName};

use super::Records;

/// Of a record, the frames of the files, and what a file system takes for their names.
const FRAMES: ByteCount = ByteCount(64 << 10);

/// It is written in pieces of this size.
const PIECE_BYTES: u64 = 1 << 20;

impl Records {
    /// What is written of a disk that is let go of and attached again, and then lacks `missing`, which need not be known: a
    /// hydration file with room for what is noted in it, a tracking file by which that is changed, and a record.
    pub(crate) fn room_for(&self, disk: &DiskName, missing: Option<&DirtyBitmap>) -> ByteCount {
        let noted = match missing {
            Some(missing) if missing.is_empty() => ByteCount::ZERO,
            Some(missing) => HydrationFile::room_for(missing.count()),
            None => HydrationFile::room_at_most(),
        };
        let missing = missing.map_or(0, |missing| missing.to_bytes().len() as u64);
        // What cannot be read is begun anew, and is small.
        let tracked = self.load_tracking(disk).ok().flatten();
        let tracked = tracked.map_or(0, |tracked| tracked.snapshot.encode().len() as u64);
        ByteCount(FRAMES.0 + noted.0 + 2 * missing + tracked)
    }

    /// Writes so many bytes there, durably, and removes them.
    ///
    /// # Errors
    /// The storage's: then nothing stays of it, as far as that allows.
    pub(crate) fn try_room(&self, disk: &DiskName, bytes: ByteCount) -> io::Result<()> {
        let path = PathBuf::from(format!("{disk}.room"));
        // Of an agent that died meanwhile.
        match self.storage.remove(&path) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(error),
            Ok(()) | Err(_) => {}
        }
        let written = self.fill(&path, bytes);
        let removed = self.storage.remove(&path);
        // On some file systems its room is free only then.
        written.and(removed).and_then(|()| self.sync_names())
    }

    /// Makes a file of so many zeroes, durably but for its name: no file system has to find room for them later.
    pub(super) fn fill(&self, path: &Path, bytes: ByteCount) -> io::Result<()> {
        let file = self.storage.create_new(path)?;
        let piece = vec![0; PIECE_BYTES.min(bytes.0) as usize];
        let mut at = 0;
        while at < bytes.0 {
            let length = PIECE_BYTES.min(bytes.0 - at);
            file.write_at(ByteOffset(at), &piece[..length as usize])?;
            at += length;
        }
        file.sync_data()
    }
}
