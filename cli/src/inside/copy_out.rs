//! Files of a volume copied to this machine.
//!
//! Invariant: nothing is written through a name that was not made here: directories and files are created, never
//! opened, so that no symbolic link of the volume leads out of the destination. Nobody else reads anything
//! before it has the mode that it has on the volume.

use std::{
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
use rustix::fs::OFlags;
use serde::Serialize;

use super::{Entry, Kind, Volume};
use crate::ending::{Failure, io_failure};

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
}

/// Copies a file, or a directory with everything in it.
///
/// # Errors
/// What cannot be read or written; a directory that was begun stays, a file does not.
pub(crate) fn copy_out(volume: &Volume, entry: &Entry, to: &Destination) -> Result<Copied, Failure> {
    let mut copied = Copied::default();
    match (entry.kind, to) {
        (Kind::File, Destination::Stdout) => {
            let name = Path::new("standard output");
            copied.bytes = pour(volume, entry, To::Stream(&mut io::stdout().lock()), name)?;
            copied.files = 1;
        }
        (Kind::File, Destination::Path { path, replace }) => {
            let parent = path.parent().filter(|parent| !parent.as_os_str().is_empty());
            let failed = |error: io::Error| io_failure(path.display(), &error);
            let mut file =
                tempfile::NamedTempFile::new_in(parent.unwrap_or(Path::new("."))).map_err(failed)?;
            copied.bytes = pour(volume, entry, To::File(file.as_file_mut()), path)?;
            file.as_file().set_permissions(mode(entry)).map_err(failed)?;
            let kept = if *replace { file.persist(path) } else { file.persist_noclobber(path) };
            kept.map_err(|error| exists_or_failed(path, &error.error))?;
            copied.files = 1;
        }
        (Kind::Directory, Destination::Path { path, .. }) => {
            directory(volume, entry, path, 0, &mut copied)?;
        }
        (Kind::Directory, Destination::Stdout) => {
            return Err(refused("a directory cannot go to standard output: name a directory to make"));
        }
        (Kind::Symlink | Kind::Special, _) => {
            return Err(refused(&format!("{} is no file and no directory", entry.name)));
        }
    }
    Ok(copied)
}

fn directory(
    volume: &Volume,
    entry: &Entry,
    path: &Path,
    depth: usize,
    copied: &mut Copied,
) -> Result<(), Failure> {
    if depth > DEPTH_MAX {
        return Err(refused(&format!("{} is deeper than {DEPTH_MAX} directories", path.display())));
    }
    // Nobody else looks in before its own mode says so, and what is read-only can still be filled.
    DirBuilder::new().mode(0o700).create(path).map_err(|error| exists_or_failed(path, &error))?;
    copied.directories += 1;
    for inner in volume.list(entry)? {
        // A name on the volume is one word here, too, or it is nothing.
        let name = OsStr::from_bytes(&inner.raw_name);
        if inner.raw_name.is_empty() || inner.raw_name.contains(&b'/') || inner.raw_name.contains(&0) {
            return Err(ApiError::new(ErrorCode::Damaged, format!("{:?} is no file name", inner.name)).into());
        }
        let to = path.join(name);
        match inner.kind {
            Kind::Directory => directory(volume, &inner, &to, depth + 1, copied)?,
            Kind::File => {
                let created = File::options().write(true).create_new(true).mode(0o600).open(&to);
                let mut file = created.map_err(|error| exists_or_failed(&to, &error))?;
                copied.bytes += pour(volume, &inner, To::File(&mut file), &to)?;
                file.set_permissions(mode(&inner)).map_err(|error| io_failure(to.display(), &error))?;
                copied.files += 1;
            }
            Kind::Symlink => {
                let target = inner.target.as_deref().unwrap_or_default();
                symlink(target, &to).map_err(|error| exists_or_failed(&to, &error))?;
                copied.symlinks += 1;
            }
            Kind::Special => copied.skipped += 1,
        }
    }
    // Not through a link that somebody has put in its place meanwhile.
    let flags = (OFlags::DIRECTORY | OFlags::NOFOLLOW).bits().cast_signed();
    let made = File::options().read(true).custom_flags(flags).open(path);
    let set = made.and_then(|made| made.set_permissions(mode(entry)));
    set.map_err(|error| io_failure(path.display(), &error))
}

/// What the bytes of a file go to.
enum To<'to> {
    Stream(&'to mut dyn Write),
    /// A new file, which gets the holes of the one on the volume.
    File(&'to mut File),
}

/// Copies the bytes of a file.
fn pour(volume: &Volume, entry: &Entry, mut to: To<'_>, name: &Path) -> Result<u64, Failure> {
    let failed = |error: io::Error| match error.kind() {
        io::ErrorKind::BrokenPipe => Failure::ClosedPipe,
        _ => io_failure(name.display(), &error),
    };
    let mut file = volume.open_file(entry)?;
    let mut buffer = vec![0; PIECE];
    let mut bytes = 0;
    loop {
        if let To::File(to) = &mut to {
            bytes = file.skip_hole().0;
            to.seek(SeekFrom::Start(bytes)).map_err(failed)?;
        }
        let count = file.read(&mut buffer)?;
        match &mut to {
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
