//! Writing a base, and taking it back.

use std::{
    fmt, io,
    path::{Path, PathBuf},
};

use backtide_images::{Image, Images};
use backtide_storage::{Storage, replace_with};
use backtide_units::{ByteOffset, Lsn};

use super::{Base, ELSEWHERE, FoundBase, codec, copies};
use crate::{
    LogError,
    recover::{failed, sync_above},
};

/// A base that was not written everywhere, and not taken back everywhere either: which one counts when the log is opened again
/// is not known. Nobody may be promised a point that it does without.
pub struct Doubt {
    /// What lies before is of older logs of the disk.
    begins: Lsn,
    floor: Lsn,
    /// Ascending.
    kept: Vec<Lsn>,
    /// If it is the one that counts, they must be there.
    _images: Vec<Image>,
}

impl Doubt {
    pub(crate) fn about(base: &Base, before: Option<&Base>, images: &Images) -> Self {
        Self {
            begins: before.map_or_else(|| begin(base), first_point),
            // What lies above all of a log that has ended is of those behind it.
            floor: base
                .floor
                .map_or(Lsn(base.timeline.highest_lsn().0.saturating_add(1)), |floor| floor.at.lsn),
            kept: base.kept.iter().map(|kept| kept.at.lsn).collect(),
            _images: base.roots().map(|root| images.image(root)).collect(),
        }
    }

    /// About all that a log and those before it have, up to where the next one begins: nothing is known of where it does.
    pub fn about_all_before(next: Lsn) -> Self {
        Self { begins: Lsn::ZERO, floor: next, kept: Vec::new(), _images: Vec::new() }
    }

    /// Whether the disk's point at `lsn` is there with either base.
    pub fn keeps(&self, lsn: Lsn) -> bool {
        lsn < self.begins || lsn >= self.floor || self.kept.binary_search(&lsn).is_ok()
    }
}

/// The first point that a log with this base offers.
fn first_point(base: &Base) -> Lsn {
    base.images().next().map_or(Lsn::ZERO, |first| first.at.lsn)
}

/// The first that it offered before it had a base.
fn begin(base: &Base) -> Lsn {
    // The timeline of one that has ended is what it offers now.
    let first = base.timeline.intervals().first().filter(|_| !base.is_ended());
    first.map_or(Lsn::ZERO, |first| first.from.lsn)
}

impl fmt::Debug for Doubt {
    fn fmt(&self, out: &mut fmt::Formatter<'_>) -> fmt::Result {
        let mut out = out.debug_struct("Doubt");
        out.field("begins", &self.begins).field("floor", &self.floor).field("kept", &self.kept).finish()
    }
}

/// Puts a base everywhere it belongs for the log in `dir`, durably; none is removed everywhere.
pub(crate) fn put(base: Option<&Base>, storage: &dyn Storage, dir: &Path) -> Result<(), LogError> {
    put_first(copies(dir).len(), base, storage, dir)
}

/// Makes durable what the log in `dir` begins with when it is opened, everywhere: for one in [`Doubt`] that has failed, or is
/// never opened again. One of which files are there and none is whole begins nowhere: nothing of it is promised, and only what
/// is seen of it is made durable. Nobody may have it open.
///
/// # Errors
/// As [`FoundBase::read`], and the file system's: the doubt remains.
pub fn settle_closed(storage: &dyn Storage, dir: &Path) -> Result<(), LogError> {
    if let Some(base) = FoundBase::read(storage, dir)?.base {
        put(Some(&base), storage, dir)?;
    }
    sync_names(storage, dir)
}

/// Makes durable which base the log in `dir` is seen to have: each is whole and durable before it gets its name.
///
/// # Errors
/// The file system's: then a power cut may leave another one that was there before.
pub fn sync_names(storage: &dyn Storage, dir: &Path) -> Result<(), LogError> {
    for dir in [dir, Path::new(ELSEWHERE)] {
        match storage.sync_dir(dir) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => {}
            synced => {
                synced
                    .map_err(|source| failed(format!("sync {}", storage.display(dir).display()), source))?;
            }
        }
    }
    Ok(())
}

/// Puts `base` everywhere in place of `before`. When that fails `before` is put back: with the error comes whether it is
/// there again, durably.
pub(crate) fn replace(
    base: &Base,
    before: Option<&Base>,
    storage: &dyn Storage,
    dir: &Path,
) -> Result<(), (LogError, bool)> {
    let bytes = codec::encode(base);
    for (nth, path) in copies(dir).iter().enumerate() {
        if let Err(error) = write(&bytes, storage, dir, path) {
            // This one may have been replaced too.
            let back = put_first(nth + 1, before, storage, dir);
            return Err((error, back.is_ok()));
        }
    }
    Ok(())
}

/// [`put`] for the first so many copies. Half way through it either base counts, as when one is written.
fn put_first(count: usize, base: Option<&Base>, storage: &dyn Storage, dir: &Path) -> Result<(), LogError> {
    let copies = &copies(dir)[..count];
    let Some(base) = base else {
        // The first is the last that counts.
        return copies.iter().rev().try_for_each(|path| remove(storage, path));
    };
    let bytes = codec::encode(base);
    copies.iter().try_for_each(|path| write(&bytes, storage, dir, path))
}

fn write(bytes: &[u8], storage: &dyn Storage, dir: &Path, path: &Path) -> Result<(), LogError> {
    let fail = |source| failed(format!("write {}", storage.display(path).display()), source);
    let beside = directory_of(path);
    if beside != dir {
        storage.create_dir(&beside).map_err(fail)?;
        sync_above(storage, &beside)?;
    }
    replace_with(storage, path, |file| file.write_at(ByteOffset::ZERO, bytes)).map_err(fail)?;
    Ok(())
}

fn remove(storage: &dyn Storage, path: &Path) -> Result<(), LogError> {
    let removed = match storage.remove(path) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(()),
        removed => removed,
    };
    let removed = removed.and_then(|()| match storage.sync_dir(&directory_of(path)) {
        // It may not even have come to the directory.
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(()),
        synced => synced,
    });
    removed.map_err(|source| failed(format!("remove {}", storage.display(path).display()), source))
}

fn directory_of(path: &Path) -> PathBuf {
    path.parent().expect("a file is in a directory").to_owned()
}
