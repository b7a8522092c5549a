//! Making a log whole again while nobody uses it: what `fsck --rebuild` and `fsck --repair` do to its segments.
//!
//! What follows from the rest is written anew: headers, footers. Where entries are lost, what stands behind them is of no
//! use to anybody, for nobody knows which blocks it misses: it is cut off and put aside, never removed.
//!
//! Invariants: an entry that gives a point is not touched; a power cut on the way leaves a log that reads as before or as
//! after, and doing it again ends it.

use std::{
    io,
    path::{Path, PathBuf},
};

use backtide_segment::{Rebuilt, SegmentHeader, SegmentId, Seq, claims};
use backtide_storage::Storage;
use backtide_units::{ByteCount, ByteOffset};

use crate::{
    FoundBase, LogError, Salvage, Snapshot,
    base::put,
    recover::{failed, list, open, sync_above},
};

/// Bytes that are copied at once.
const COPIED_AT_ONCE: usize = 1 << 20;

impl Salvage {
    /// Writes the headers of segments again that are lost, of those that can be read all the same: their neighbors say
    /// all that stood there, but which entry was durable when the segment was made, and for that their entries speak.
    /// Gives a sentence for each.
    ///
    /// # Errors
    /// The file system's.
    pub fn mend_headers(&self, storage: &dyn Storage, dir: &Path) -> Result<Vec<String>, LogError> {
        let segments_dir = dir.join("segments");
        let mut mended = Vec::new();
        for lost in &self.lost_headers {
            let file = open(storage, &segments_dir, lost.id)?;
            let claimed = claims(&file, lost, ByteOffset::ZERO)?.unwrap_or_default();
            let header = SegmentHeader { synced: claimed.min(Seq(lost.first_seq.0 - 1)), ..*lost };
            file.mend_header(&header)?;
            mended.push(format!("{}: its header is written again", file.name().display()));
        }
        Ok(mended)
    }

    /// Whether there are points, and behind them something that is lost, so that [`Salvage::cut`] makes the log whole.
    pub fn can_be_cut(&self) -> bool {
        self.lost_place.is_some()
    }

    /// Whether no segment is left: what there is are the images of its base.
    pub fn has_no_segment(&self) -> bool {
        self.snapshot.segments.iter().next().is_none() && self.beyond.is_empty()
    }

    /// Cuts the log in `dir` where it is lost. What stands behind that goes into `aside`, a directory of the same storage:
    /// whole segments are moved, of the one that stays in part a copy is made. Gives the names of what is there then.
    ///
    /// # Errors
    /// The file system's: then the next try ends it.
    pub fn cut(&self, storage: &dyn Storage, dir: &Path, aside: &Path) -> Result<Vec<PathBuf>, LogError> {
        let Some(lost) = self.lost_place else { return Ok(Vec::new()) };
        let segments_dir = dir.join("segments");
        let io = |what: &'static str, path: &Path| {
            let step = format!("{what} {}", storage.display(path).display());
            move |source| failed(step, source)
        };
        storage.create_dir(aside).map_err(io("create", aside))?;
        let mut put = Vec::new();
        // The last one first: whatever is left on the way ends where the log is lost.
        for id in list(storage, &segments_dir)?.into_iter().rev().filter(|id| *id >= lost.segment) {
            let from = segments_dir.join(id.file_name());
            let to = free_place(storage, &from, aside, id).map_err(io("put aside", &from))?;
            match lost.keep.filter(|_| id == lost.segment) {
                None => {
                    storage.rename(&from, &to).map_err(io("put aside", &from))?;
                    sync_above(storage, aside)?;
                    storage.sync_dir(&segments_dir).map_err(io("sync", &segments_dir))?;
                }
                Some(keep) => {
                    copy(storage, &from, &to).map_err(io("copy", &from))?;
                    sync_above(storage, aside)?;
                    cut_file(storage, &from, keep).map_err(io("cut", &from))?;
                }
            }
            put.push(storage.display(&to));
        }
        put.reverse();
        Ok(put)
    }
}

/// Writes the base of the log in `dir` again where a copy of it is missing or damaged, and gives a sentence for each.
///
/// # Errors
/// [`LogError::UnknownVersion`], or the file system's.
pub fn settle_base(storage: &dyn Storage, dir: &Path) -> Result<Vec<String>, LogError> {
    let found = FoundBase::read(storage, dir)?;
    if found.is_settled() || found.base.is_none() {
        return Ok(Vec::new());
    }
    put(found.base.as_ref(), storage, dir)?;
    Ok(found.damage.iter().map(|damage| format!("{damage}: it is written again")).collect())
}

/// Where a segment is put. What is there already under its name stays, unless it is a part of this one, from a time when this
/// was cut short: a log can be cut twice, and has more of a segment the first time.
fn free_place(storage: &dyn Storage, from: &Path, aside: &Path, id: SegmentId) -> io::Result<PathBuf> {
    let own = storage.open(from)?.len()?;
    for nth in 1_u32.. {
        let name = if nth == 1 { id.file_name() } else { format!("{}.{nth}", id.file_name()) };
        let place = aside.join(name);
        match storage.open(&place) {
            Ok(there) if there.len()? > own => {}
            Ok(_) => return Ok(place),
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(place),
            Err(error) => return Err(error),
        }
    }
    Err(io::ErrorKind::AlreadyExists.into())
}

fn copy(storage: &dyn Storage, from: &Path, to: &Path) -> io::Result<()> {
    match storage.remove(to) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(error),
        Ok(()) | Err(_) => {}
    }
    let (from, to) = (storage.open(from)?, storage.create_new(to)?);
    let mut bytes = vec![0; COPIED_AT_ONCE];
    let mut at = ByteOffset::ZERO;
    loop {
        let read = from.read_at(at, &mut bytes)?;
        if read == 0 {
            return to.sync_data();
        }
        to.write_at(at, &bytes[..read])?;
        at.0 += read as u64;
    }
}

fn cut_file(storage: &dyn Storage, path: &Path, keep: ByteOffset) -> io::Result<()> {
    let file = storage.open(path)?;
    file.set_len(ByteCount(keep.0))?;
    file.sync_data()
}

impl Snapshot {
    /// Builds the footers of sealed segments again from their entries, and writes those that differ from what is there.
    /// `step` is told the bytes read. Gives a sentence for each that was written; a segment whose entries are not all whole
    /// keeps its footer.
    ///
    /// # Errors
    /// The file system's.
    pub fn rebuild_footers(&self, step: &mut dyn FnMut(ByteCount) -> bool) -> Result<Vec<String>, LogError> {
        let mut written = Vec::new();
        for segment in self.segments.iter() {
            let Some(sealed) = segment.sealed() else { continue };
            let file = segment.file()?;
            if file.rebuild_footer(sealed)? == Rebuilt::Written {
                written
                    .push(format!("{}: its footer is built again from its entries", file.name().display()));
            }
            if !step(ByteCount(segment.entries_end().0)) {
                break;
            }
        }
        Ok(written)
    }
}
