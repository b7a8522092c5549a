//! Writing a base, and taking it back.

use std::{
    fmt, io,
    path::{Path, PathBuf},
};

use backtide_images::{Image, Images};
use backtide_storage::{Storage, replace_with};
use backtide_units::{ByteOffset, Lsn};

use super::{Base, codec, copies};
use crate::{
    LogError,
    recover::{failed, sync_above},
};

/// A base that was not written everywhere, and not taken back everywhere either: which one counts when the log is opened again
/// is not known. Nobody may be promised a point that it does without.
pub struct Doubt {
    floor: Lsn,
    /// Ascending.
    kept: Vec<Lsn>,
    /// If it is the one that counts, they must be there.
    _images: Vec<Image>,
}

impl Doubt {
    pub(crate) fn about(base: &Base, images: &Images) -> Self {
        Self {
            floor: base.floor.at.lsn,
            kept: base.kept.iter().map(|kept| kept.at.lsn).collect(),
            _images: base.roots().map(|root| images.image(root)).collect(),
        }
    }

    /// Whether this log's point at `lsn` is there with either base.
    pub fn keeps(&self, lsn: Lsn) -> bool {
        lsn >= self.floor || self.kept.binary_search(&lsn).is_ok()
    }
}

impl fmt::Debug for Doubt {
    fn fmt(&self, out: &mut fmt::Formatter<'_>) -> fmt::Result {
        out.debug_struct("Doubt").field("floor", &self.floor).field("kept", &self.kept).finish()
    }
}

/// Puts a base everywhere it belongs for the log in `dir`, durably; none is removed everywhere.
pub(crate) fn put(base: Option<&Base>, storage: &dyn Storage, dir: &Path) -> Result<(), LogError> {
    put_first(copies(dir).len(), base, storage, dir)
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
