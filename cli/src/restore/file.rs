//! A new file as a target: written under a temporary name beside its place, and moved there when
//! it is whole and durable. Nobody ever sees half a restore under the name that was asked for. Notes
//! beside it say what is done, so that a later restore of the same point goes on there. What it replaces is
//! locked from the beginning to the end, so that no agent begins to protect a file that is about to lose its name.

use std::{
    fs::File,
    io,
    path::Path,
    sync::{Arc, Mutex, PoisonError},
};

use backtide_control::{ApiError, ErrorCode};
use backtide_export::Extent;
use backtide_storage::tells_holes;
use backtide_units::{ByteCount, ByteOffset, ByteRange};
use rustix::{
    fs::{SeekFrom, seek},
    io::Errno,
};
use tempfile::{NamedTempFile, PersistError, TempPath};

use crate::{
    ending::{Failure, io_failure},
    restore::{
        held::{Held, NotHeld},
        leftovers::{self, Leftover},
        notes::{self, Goal, Notes},
        open_file::OpenFile,
        pieces::PIECE,
    },
};

/// What becomes of a restore whose name somebody else has in the end.
const STAYS: &str = "what was restored stays beside it: detach the disk, then the same command with the same point gives it the name";

/// A file that has no name yet. Dropped before [`NewFile::publish`], it is gone.
#[derive(Clone)]
pub(crate) struct NewFile {
    file: OpenFile,
    /// Taken when the file gets its name.
    temporary: Arc<Mutex<Option<Partial>>>,
    notes: Notes,
    replacing: Arc<Mutex<Replacing>>,
}

/// What a new file does to what has its name.
#[derive(Debug, Default)]
pub(super) enum Replacing {
    /// Nothing: there must be none.
    #[default]
    Nothing,
    /// Takes the name from it, if there is one: what was there at the beginning is held.
    Anything(Option<Held>),
}

impl Replacing {
    /// With `force` whatever has the name, of which `held` is there already.
    pub(super) fn new(force: bool, held: Option<Held>) -> Self {
        if force { Self::Anything(held) } else { Self::Nothing }
    }
}

/// The partial file and its notes. Dropped, both are gone.
struct Partial {
    file: NamedTempFile,
    notes: TempPath,
}

impl NewFile {
    /// Of the point's size, all zeroes and without space. It gets mode 0600: it holds a disk. Of a
    /// leftover it is the file that an earlier restore began.
    pub(super) fn create(
        path: &Path,
        goal: &Goal,
        replacing: Replacing,
        leftover: Option<Leftover>,
    ) -> Result<Self, Failure> {
        let failed = |error: io::Error| io_failure(format_args!("create {}", path.display()), &error);
        let parent = path.parent().unwrap_or(Path::new("/"));
        if !parent.is_dir() {
            let message = format!("there is no directory {}", parent.display());
            return Err(ApiError::new(ErrorCode::NotFound, message).with_hint("create it first").into());
        }
        let (temporary, notes, notes_path) = match leftover {
            Some(Leftover { file, path, notes }) => {
                let notes_path = notes::path_of(&path);
                let path = TempPath::try_from_path(path).map_err(failed)?;
                (NamedTempFile::from_parts(file, path), notes, notes_path)
            }
            None => {
                let temporary = tempfile::Builder::new()
                    .prefix(&leftovers::prefix(path))
                    .suffix(leftovers::SUFFIX)
                    .tempfile_in(parent)
                    // The path of the temporary file is in the error; people asked for another one.
                    .map_err(|error| failed(error.kind().into()))?;
                leftovers::hold(temporary.as_file()).map_err(failed)?;
                let notes_path = notes::path_of(temporary.path());
                let notes = Notes::create(&notes_path, goal).map_err(failed)?;
                (temporary, notes, notes_path)
            }
        };
        temporary.as_file().set_len(goal.size.0).map_err(failed)?;
        let file = OpenFile::new(temporary.as_file().try_clone().map_err(failed)?, path);
        let notes_path = TempPath::try_from_path(notes_path).map_err(failed)?;
        let partial = Partial { file: temporary, notes: notes_path };
        let replacing = Arc::new(Mutex::new(replacing));
        Ok(Self { file, temporary: Arc::new(Mutex::new(Some(partial))), notes, replacing })
    }

    /// The name it is going to have.
    pub(crate) fn path(&self) -> &Path {
        self.file.path()
    }

    /// Its content.
    pub(super) fn content(&self) -> &OpenFile {
        &self.file
    }

    /// The digest that an earlier restore has noted of a piece.
    pub(super) fn noted(&self, piece: ByteRange) -> Option<[u8; 32]> {
        self.notes.of(piece.start().0 / PIECE.0)
    }

    /// Notes that a piece is in the file.
    pub(super) fn note(&self, piece: ByteRange, digest: &[u8; 32]) -> Result<(), Failure> {
        let noted = self.notes.add(piece.start().0 / PIECE.0, digest);
        noted.map_err(|error| {
            io_failure(format_args!("note what is done of {}", self.path().display()), &error)
        })
    }

    /// Lets the partial file stay for a later restore.
    pub(super) fn leave(&self) {
        let partial = self.temporary.lock().unwrap_or_else(PoisonError::into_inner).take();
        if let Some(partial) = partial {
            partial.keep();
        }
    }

    pub(super) async fn extents(&self, range: ByteRange) -> Result<Vec<Extent>, Failure> {
        self.file.blocking("look for data in", move |file| allocated(file, range)).await
    }

    pub(super) async fn publish(&self) -> Result<(), Failure> {
        let partial = self.temporary.lock().unwrap_or_else(PoisonError::into_inner).take();
        let partial = partial.expect("a restored file gets its name once");
        let replacing = std::mem::take(&mut *self.replacing.lock().unwrap_or_else(PoisonError::into_inner));
        let path = self.path().to_owned();
        let name = move |_: &File| match replacing {
            Replacing::Nothing => partial.name_if_free(&path),
            Replacing::Anything(held) => partial.name(&path, held),
        };
        match self.file.blocking("name", name).await? {
            Named::Done => Ok(()),
            Named::Appeared => {
                let message = format!("{} has appeared meanwhile", self.path().display());
                Err(ApiError::new(ErrorCode::Exists, message).into())
            }
            Named::NotHeld(why) => Err(why.failure(self.path(), STAYS)),
        }
    }
}

/// How the end of a restore went.
enum Named {
    Done,
    /// Something has the name now.
    Appeared,
    /// Something has it that must not lose it. The partial file stays.
    NotHeld(NotHeld),
}

impl Partial {
    /// Gives it the name of nothing else.
    fn name_if_free(self, path: &Path) -> io::Result<Named> {
        match name_if_free(self.file, path) {
            Ok(()) => {
                drop(self.notes);
                sync_directory(path).map(|()| Named::Done)
            }
            Err(error) if error.kind() == io::ErrorKind::AlreadyExists => Ok(Named::Appeared),
            Err(error) => Err(error),
        }
    }

    /// Gives it the name, also of something else: of what is `held`, or of what can be held now.
    fn name(self, path: &Path, held: Option<Held>) -> io::Result<Named> {
        // What was locked at the beginning may have no name any more, and an agent may have what has it now.
        let held = match Held::now(held, path) {
            Ok(Some(held)) => held,
            Ok(None) => return self.name_if_free(path),
            Err(why) => {
                self.keep();
                return Ok(Named::NotHeld(why));
            }
        };
        // Not earlier: a partial file that others may open is not gone on with.
        self.file.as_file().set_permissions(held.permissions()?)?;
        self.file.persist(path).map_err(|error| error.error)?;
        drop(self.notes);
        sync_directory(path)?;
        // Not earlier: whoever waits for the lock opens what has the name by then.
        drop(held);
        Ok(Named::Done)
    }

    /// Lets it stay for a later restore.
    fn keep(self) {
        // What cannot be kept is only done again.
        let _ = self.file.keep();
        let _ = self.notes.keep();
    }
}

/// Gives a temporary file the name of nothing else.
///
/// # Errors
/// The system's: `AlreadyExists` when something has the name.
pub(crate) fn name_if_free(file: NamedTempFile, path: &Path) -> io::Result<()> {
    let Err(PersistError { error, file }) = file.persist_noclobber(path) else { return Ok(()) };
    if !matches!(Errno::from_io_error(&error), Some(Errno::PERM | Errno::OPNOTSUPP | Errno::NOSYS)) {
        return Err(error);
    }
    take_name(file, path)
}

/// The same on a file system without links, as exFAT: the name is taken first, and given to the file then.
fn take_name(file: NamedTempFile, path: &Path) -> io::Result<()> {
    File::create_new(path)?;
    file.persist(path).map(drop).map_err(|PersistError { error, .. }| {
        let _ = std::fs::remove_file(path);
        error
    })
}

/// Which parts of a range the file system keeps space for. Where it cannot tell: all of it.
pub(super) fn allocated(file: &File, range: ByteRange) -> io::Result<Vec<Extent>> {
    if !tells_holes(file) {
        return Ok(vec![Extent::data(range.count())]);
    }
    let mut extents = Vec::new();
    let (mut at, end) = (range.start().0, range.end().0);
    while at < end {
        let data = match seek(file, SeekFrom::Data(at)) {
            Ok(data) => data.min(end),
            Err(Errno::NXIO) => end,
            Err(Errno::INVAL | Errno::OPNOTSUPP) => at,
            Err(error) => return Err(error.into()),
        };
        if data > at {
            extents.push(Extent::hole(ByteCount(data - at)));
        }
        if data >= end {
            break;
        }
        let hole = seek(file, SeekFrom::Hole(data)).unwrap_or(end).clamp(data, end);
        // A hole at its own beginning would be an endless loop; it cannot hold data twice.
        let hole = if hole == data { end } else { hole };
        extents.push(Extent::data(ByteCount(hole - data)));
        at = hole;
    }
    debug_assert_eq!(
        extents.iter().map(|extent| extent.length.0).sum::<u64>(),
        range.count().0,
        "extents cover the range from {}",
        ByteOffset(range.start().0)
    );
    Ok(extents)
}

/// A rename is durable when its directory is.
fn sync_directory(path: &Path) -> io::Result<()> {
    File::open(path.parent().unwrap_or(Path::new("/")))?.sync_all()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn without_links_a_file_gets_a_name_that_is_nothing_elses() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("restored.img");
        let file = |content: &str| {
            let file = NamedTempFile::new_in(directory.path()).unwrap();
            std::fs::write(file.path(), content).unwrap();
            file
        };
        take_name(file("first"), &path).unwrap();
        let taken = take_name(file("second"), &path).unwrap_err();
        assert_eq!(taken.kind(), io::ErrorKind::AlreadyExists);
        assert_eq!(std::fs::read(&path).unwrap(), b"first");
        assert_eq!(directory.path().read_dir().unwrap().count(), 1, "nothing is left over");
    }
}
