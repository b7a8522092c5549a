//! A new file as a target: written under a temporary name beside its place, and moved there when
//! it is whole and durable. Nobody ever sees half a restore under the name that was asked for. Notes
//! beside it say what is done, so that a later restore of the same point goes on there.

use std::{
    fs::File,
    io,
    path::Path,
    sync::{Arc, Mutex, PoisonError},
};

use backtide_control::{ApiError, ErrorCode};
use backtide_export::Extent;
use backtide_units::{ByteCount, ByteOffset, ByteRange};
use rustix::fs::{SeekFrom, seek};
use tempfile::{NamedTempFile, TempPath};

use crate::{
    ending::{Failure, io_failure},
    restore::{
        leftovers::{self, Leftover},
        notes::{self, Goal, Notes},
        open_file::OpenFile,
        pieces::PIECE,
    },
};

/// A file that has no name yet. Dropped before [`NewFile::publish`], it is gone.
#[derive(Clone)]
pub(crate) struct NewFile {
    file: OpenFile,
    /// Taken when the file gets its name.
    temporary: Arc<Mutex<Option<Partial>>>,
    notes: Notes,
    replace: bool,
}

/// The partial file and its notes. Dropped, both are gone.
struct Partial {
    file: NamedTempFile,
    notes: TempPath,
}

impl NewFile {
    /// Of the point's size, all zeroes and without space. It gets mode 0600: it holds a disk. Of a
    /// leftover it is the file that an earlier restore began.
    pub(crate) fn create(
        path: &Path,
        goal: &Goal,
        replace: bool,
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
        Ok(Self { file, temporary: Arc::new(Mutex::new(Some(partial))), notes, replace })
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
        if let Some(Partial { file, notes }) = partial {
            // What cannot be kept is only done again.
            let _ = file.keep();
            let _ = notes.keep();
        }
    }

    pub(super) async fn extents(&self, range: ByteRange) -> Result<Vec<Extent>, Failure> {
        self.file.blocking("look for data in", move |file| allocated(file, range)).await
    }

    pub(super) async fn publish(&self) -> Result<(), Failure> {
        let temporary = self.temporary.lock().unwrap_or_else(PoisonError::into_inner).take();
        let Partial { file: temporary, notes } = temporary.expect("a restored file gets its name once");
        let (path, replace) = (self.path().to_owned(), self.replace);
        let name = move |_: &File| {
            // Not earlier: a partial file that others may open is not gone on with.
            if replace && let Ok(found) = std::fs::metadata(&path) {
                temporary.as_file().set_permissions(found.permissions())?;
            }
            let kept = if replace { temporary.persist(&path) } else { temporary.persist_noclobber(&path) };
            match kept {
                Ok(_) => {
                    drop(notes);
                    sync_directory(&path).map(|()| true)
                }
                Err(error) if error.error.kind() == io::ErrorKind::AlreadyExists => Ok(false),
                Err(error) => Err(error.error),
            }
        };
        let named = self.file.blocking("name", name).await?;
        if named {
            return Ok(());
        }
        let message = format!("{} has appeared meanwhile", self.path().display());
        Err(ApiError::new(ErrorCode::Exists, message).into())
    }
}

/// Which parts of a range the file system keeps space for. Where it cannot tell: all of it.
pub(super) fn allocated(file: &File, range: ByteRange) -> io::Result<Vec<Extent>> {
    let mut extents = Vec::new();
    let (mut at, end) = (range.start().0, range.end().0);
    while at < end {
        let data = match seek(file, SeekFrom::Data(at)) {
            Ok(data) => data.min(end),
            Err(rustix::io::Errno::NXIO) => end,
            Err(rustix::io::Errno::INVAL | rustix::io::Errno::OPNOTSUPP) => at,
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
