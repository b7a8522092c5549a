//! Files of a volume copied to this machine.
//!
//! Invariant: nothing is written through a name that was not made here: directories and files are created, never
//! opened, so that no symbolic link of the volume leads out of the destination. Nobody else reads anything
//! before it has the mode that it has on the volume. A file gets its name when all of it is there: what ends a copy
//! leaves no half one. What was copied is durable at the end.

use std::{
    collections::HashSet,
    ffi::OsStr,
    fs::{self, DirBuilder, File},
    io::{self, Seek, SeekFrom, Write},
    os::unix::{
        ffi::OsStrExt,
        fs::{DirBuilderExt, OpenOptionsExt, PermissionsExt, symlink},
    },
    path::{Path, PathBuf},
};

use backtide_control::{ApiError, ErrorCode};
use backtide_filesystems::FileId;
use rustix::{fs::OFlags, io::Errno};
use serde::Serialize;
use tempfile::NamedTempFile;

use super::{Entry, Kind, Lost, Unreadable, Volume, hold_names};
use crate::{
    ending::{Failure, io_failure},
    restore::{Replaceable, name_if_free},
};

/// What is read and written at once.
const PIECE: usize = 1 << 20;

/// Directories within directories; no file system that is well has more.
const DEPTH_MAX: usize = 512;

/// Where files go.
pub(crate) enum Destination {
    /// Standard output: one file.
    Stdout,
    /// A name that is not there yet; a file may be replaced when that was asked for.
    Path {
        /// The name.
        path: PathBuf,
        /// Whether a file that exists is replaced.
        replace: bool,
    },
}

/// What was copied.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize)]
pub(crate) struct Copied {
    /// Files.
    pub(crate) files: u64,
    /// Directories.
    pub(crate) directories: u64,
    /// Symbolic links.
    pub(crate) symlinks: u64,
    /// Bytes of files.
    pub(crate) bytes: u64,
    /// Devices, sockets and pipes, which were left out.
    pub(crate) skipped: u64,
    /// What cannot be read, which was left out.
    #[serde(flatten)]
    pub(crate) unreadable: Unreadable,
}

/// Copies a file, or a directory with everything in it, of a point that `lost` tells the end of.
///
/// # Errors
/// What cannot be written, or cannot be read when it was asked for by name; of a directory's files those that cannot
/// be read are left out. A directory that was begun stays, a file does not.
pub(crate) fn copy_out(
    volume: &Volume,
    entry: &Entry,
    to: &Destination,
    lost: &Lost,
) -> Result<Copied, Failure> {
    let mut copied = Copied::default();
    match (entry.kind, to) {
        (Kind::File, Destination::Stdout) => {
            let name = Path::new("standard output");
            copied.bytes = pour(volume, entry, To::Stream(&mut io::stdout().lock()), name)?;
            copied.files = 1;
        }
        (Kind::File, Destination::Path { path, replace }) => {
            let failed = |error: io::Error| io_failure(path.display(), &error);
            let replaced = Replaceable::at(path, *replace)?;
            let mut file = NamedTempFile::new_in(parent_of(path)).map_err(failed)?;
            copied.bytes = pour(volume, entry, To::File(file.as_file_mut()), path)?;
            file.as_file().set_permissions(mode(entry)).map_err(failed)?;
            file.as_file().sync_all().map_err(failed)?;
            let held = replaced.still(path)?;
            let kept = match held.is_some() {
                true => file.persist(path).map(drop).map_err(|error| error.error),
                false => name_if_free(file, path),
            };
            kept.map_err(|error| exists_or_failed(path, &error))?;
            File::open(parent_of(path)).and_then(|parent| parent.sync_all()).map_err(failed)?;
            copied.files = 1;
        }
        (Kind::Directory, Destination::Path { path, .. }) => {
            Replaceable::at(path, false)?;
            let mut tree = Tree { volume, lost, seen: HashSet::new(), held: 0, copied };
            let entries = tree.entries(entry)?;
            make(path).map_err(|error| exists_or_failed(path, &error))?;
            let made = tree.directory(entry, entries, path, 0)?;
            // All of it at once, and with it what closing a file would have told.
            let synced = rustix::fs::syncfs(&made).map_err(io::Error::from);
            synced.map_err(|error| io_failure(path.display(), &error))?;
            copied = tree.copied;
        }
        (Kind::Directory, Destination::Stdout) => {
            return Err(refused("a directory cannot go to standard output: name a directory to make"));
        }
        (Kind::Symlink | Kind::Special | Kind::Unreadable, _) => {
            return Err(refused(&format!("{} is no file and no directory", entry.name)));
        }
    }
    Ok(copied)
}

/// Makes a directory. Nobody else looks in before its own mode says so, and what is read-only can still be filled.
fn make(path: &Path) -> io::Result<()> {
    DirBuilder::new().mode(0o700).create(path)
}

/// A directory that is copied with what is in it.
struct Tree<'volume> {
    volume: &'volume Volume,
    lost: &'volume Lost,
    /// Directories that were entered: a tree has each once.
    seen: HashSet<FileId>,
    /// Names of directories that are being copied.
    held: usize,
    copied: Copied,
}

impl Tree<'_> {
    /// What is in a directory that was not entered yet.
    fn entries(&mut self, directory: &Entry) -> Result<Vec<Entry>, ApiError> {
        if !self.seen.insert(directory.id) {
            let why = format!("the directory {} is in the tree more than once", directory.name);
            return Err(ApiError::new(ErrorCode::Damaged, why));
        }
        let entries = self.volume.list(directory)?;
        hold_names(&mut self.held, entries.len())?;
        Ok(entries)
    }

    /// Fills a directory that was made.
    fn directory(
        &mut self,
        entry: &Entry,
        entries: Vec<Entry>,
        path: &Path,
        depth: usize,
    ) -> Result<File, Failure> {
        self.copied.directories += 1;
        for inner in entries {
            self.entry(&inner, path, depth)?;
        }
        // Not through a link that somebody has put in its place meanwhile.
        let flags = (OFlags::DIRECTORY | OFlags::NOFOLLOW).bits().cast_signed();
        let made = File::options().read(true).custom_flags(flags).open(path);
        let set = made.and_then(|made| made.set_permissions(mode(entry)).map(|()| made));
        set.map_err(|error| io_failure(path.display(), &error))
    }

    /// Copies what a directory names; what cannot be read is noted.
    fn entry(&mut self, inner: &Entry, path: &Path, depth: usize) -> Result<(), Failure> {
        // A name on the volume is one word here, too, or it is nothing.
        let name = &inner.raw_name;
        if name.is_empty() || name == b"." || name == b".." || name.contains(&b'/') || name.contains(&0) {
            self.copied.unreadable.add(path.display(), &format!("{:?} is no file name", inner.name));
            return Ok(());
        }
        let to = path.join(OsStr::from_bytes(name));
        match inner.kind {
            Kind::Directory if depth >= DEPTH_MAX => {
                let why = format!("it is deeper than {DEPTH_MAX} directories");
                self.copied.unreadable.add(to.display(), &why);
            }
            Kind::Directory => {
                let held = self.held;
                match self.entries(inner) {
                    Ok(entries) => match make(&to) {
                        Ok(()) => drop(self.directory(inner, entries, &to, depth + 1)?),
                        Err(error) => self.is_not_made(&to, &error)?,
                    },
                    Err(error) => self.leave_out(&to, &error)?,
                }
                self.held = held;
            }
            Kind::File => self.file(inner, &to)?,
            Kind::Symlink => {
                let target = &inner.raw_target;
                if target.is_empty() || target.contains(&0) {
                    self.copied.unreadable.add(to.display(), "where it leads to is no path");
                    return Ok(());
                }
                match symlink(OsStr::from_bytes(target), &to) {
                    Ok(()) => self.copied.symlinks += 1,
                    Err(error) => self.is_not_made(&to, &error)?,
                }
            }
            Kind::Special => self.copied.skipped += 1,
            Kind::Unreadable => {
                let why = inner.error.as_deref().unwrap_or("it cannot be read");
                self.copied.unreadable.add(to.display(), why);
            }
        }
        Ok(())
    }

    fn file(&mut self, inner: &Entry, to: &Path) -> Result<(), Failure> {
        // Half a file would be taken for a whole one, were it under its own name.
        let failed = |error: io::Error| io_failure(to.display(), &error);
        let mut file = match NamedTempFile::new_in(parent_of(to)) {
            Ok(file) => file,
            Err(error) => return self.is_not_made(to, &error),
        };
        let bytes = match pour(self.volume, inner, To::File(file.as_file_mut()), to) {
            Ok(bytes) => bytes,
            Err(Halt::Volume(error)) => return self.leave_out(to, &error),
            Err(halt @ Halt::Here(_)) => return Err(halt.into()),
        };
        file.as_file().set_permissions(mode(inner)).map_err(failed)?;
        if let Err(error) = name_if_free(file, to) {
            return self.is_not_made(to, &error);
        }
        self.copied.bytes += bytes;
        self.copied.files += 1;
        Ok(())
    }

    /// Notes what this machine has no name for: a longer one than it takes, or of other letters. All else ends the
    /// copy.
    fn is_not_made(&mut self, to: &Path, error: &io::Error) -> Result<(), Failure> {
        if !matches!(Errno::from_io_error(error), Some(Errno::NAMETOOLONG | Errno::ILSEQ)) {
            return Err(exists_or_failed(to, error));
        }
        self.copied.unreadable.add(to.display(), &format!("this machine takes no such name: {error}"));
        Ok(())
    }

    /// Notes what cannot be read, unless that is so of everything from now on.
    fn leave_out(&mut self, to: &Path, error: &ApiError) -> Result<(), Failure> {
        if let Some(why) = self.lost.why() {
            return Err(why.clone().into());
        }
        self.copied.unreadable.add_error(to.display(), error);
        Ok(())
    }
}

/// What the bytes of a file go to.
enum To<'to> {
    Stream(&'to mut dyn Write),
    /// A new file, which gets the holes of the one on the volume.
    File(&'to mut File),
}

/// What ended a copy.
enum Halt {
    /// The file cannot be read.
    Volume(ApiError),
    /// It cannot be written.
    Here(Failure),
}

impl From<Halt> for Failure {
    fn from(halt: Halt) -> Self {
        match halt {
            Halt::Volume(error) => error.into(),
            Halt::Here(failure) => failure,
        }
    }
}

/// Copies the bytes of a file.
fn pour(volume: &Volume, entry: &Entry, mut to: To<'_>, name: &Path) -> Result<u64, Halt> {
    let failed = |error: io::Error| match error.kind() {
        io::ErrorKind::BrokenPipe => Halt::Here(Failure::ClosedPipe),
        _ => Halt::Here(io_failure(name.display(), &error)),
    };
    let mut file = volume.open_file(entry).map_err(Halt::Volume)?;
    let mut buffer = vec![0; PIECE];
    let mut bytes = 0;
    loop {
        if let To::File(to) = &mut to {
            bytes = file.skip_hole().0;
            to.seek(SeekFrom::Start(bytes)).map_err(failed)?;
        }
        let count = file.read(&mut buffer).map_err(Halt::Volume)?;
        match &mut to {
            To::Stream(to) if count == 0 => to.flush().map_err(failed)?,
            To::Stream(to) => to.write_all(&buffer[..count]).map_err(failed)?,
            To::File(to) if count == 0 => to.set_len(bytes).map_err(failed)?,
            To::File(to) => to.write_all(&buffer[..count]).map_err(failed)?,
        }
        if count == 0 {
            return Ok(bytes);
        }
        bytes += count as u64;
    }
}

/// The directory that a name is in.
fn parent_of(path: &Path) -> &Path {
    path.parent().filter(|parent| !parent.as_os_str().is_empty()).unwrap_or(Path::new("."))
}

/// Who may read and write it; what runs as another user does not come along.
fn mode(entry: &Entry) -> fs::Permissions {
    fs::Permissions::from_mode(u32::from(entry.mode & 0o777))
}

fn exists_or_failed(path: &Path, error: &io::Error) -> Failure {
    if error.kind() == io::ErrorKind::AlreadyExists {
        let why = format!("{} exists already", path.display());
        return ApiError::new(ErrorCode::Exists, why).with_hint("take another name").into();
    }
    io_failure(path.display(), error)
}

fn refused(why: &str) -> Failure {
    ApiError::new(ErrorCode::Usage, why).into()
}
