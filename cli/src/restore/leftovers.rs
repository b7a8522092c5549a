//! What a killed restore leaves beside its output: a partial file under a name of its own, and its notes.
//!
//! ```text
//! .NAME.XXXXXX.restoring           locked (flock) by the restore that writes it, as long as that lives
//! .NAME.XXXXXX.restoring.notes     what is done of which point
//! ```
//! The output's own name never stands for half a restore. A leftover that nobody holds is gone on with by
//! the next restore of the same point to the same output; one of another point is removed. Both are told.
//! One that is held is another restore under way, and that is refused.
//!
//! Invariant: nothing is written to a file that somebody else has put there under such a name, nor to what it
//! links to: what is gone on with is a regular file of this user, with one name, that nobody else may open.

use std::{
    ffi::OsStr,
    fs::{self, File},
    io,
    os::unix::fs::{MetadataExt, OpenOptionsExt},
    path::{Path, PathBuf},
};

use backtide_control::{ApiError, ErrorCode};
use rustix::{
    fs::{FlockOperation, OFlags, flock},
    process::geteuid,
};

use crate::{
    context::Context,
    ending::{Failure, io_failure},
    restore::notes::{self, Goal, Notes},
};

/// Ends the name of every partial file.
pub(super) const SUFFIX: &str = ".restoring";

/// Begins the name of the partial files of `output`.
pub(super) fn prefix(output: &Path) -> String {
    format!(".{}.", output.file_name().unwrap_or_default().to_string_lossy())
}

/// Claims a partial file for this process: it is given up however the process ends.
pub(super) fn hold(file: &File) -> io::Result<()> {
    Ok(flock(file, FlockOperation::NonBlockingLockExclusive)?)
}

/// Opens a file that an earlier restore of this user left; none when it is somebody else's, or no regular file.
pub(super) fn open_own(path: &Path, append: bool) -> io::Result<Option<File>> {
    // No link is followed, and no pipe waited for.
    let flags = (OFlags::NOFOLLOW | OFlags::NONBLOCK).bits().cast_signed();
    let opened = File::options().read(true).write(true).append(append).custom_flags(flags).open(path);
    let Ok(file) = opened else {
        return match fs::symlink_metadata(path) {
            Ok(found) if is_own(&found) => opened.map(Some),
            Ok(_) => Ok(None),
            Err(error) => Err(error),
        };
    };
    Ok(Some(file).filter(|file| file.metadata().is_ok_and(|found| is_own(&found))))
}

fn is_own(found: &fs::Metadata) -> bool {
    found.is_file() && found.uid() == geteuid().as_raw()
}

/// Whether nobody else can have opened it: it has the mode that a restore gives it, and no other name.
pub(super) fn is_private(file: &File) -> bool {
    file.metadata().is_ok_and(|found| found.nlink() == 1 && found.mode() & 0o077 == 0)
}

/// A partial file to go on with, held.
pub(crate) struct Leftover {
    pub(super) file: File,
    pub(super) path: PathBuf,
    pub(super) notes: Notes,
}

/// Finds what a killed restore of the same point to `output` left, and removes what others left.
pub(crate) fn take(context: &Context, output: &str, goal: &Goal) -> Result<Option<Leftover>, Failure> {
    if output.contains("://") {
        return Ok(None);
    }
    let mut taken = None;
    let output = &std::path::absolute(output).map_err(|error| io_failure(output, &error))?;
    // A link that is there is followed: the partial file stands beside what it names.
    let output = &fs::canonicalize(output).unwrap_or_else(|_| output.clone());
    for path in find(output).map_err(|error| io_failure(output.display(), &error))? {
        let file = match open_own(&path, false) {
            Ok(Some(file)) => file,
            Ok(None) => {
                let path = path.display();
                context
                    .tell(&format!("{path} is no file of this user: it is left alone, and not gone on with"));
                continue;
            }
            // Published or removed since it was listed.
            Err(error) if error.kind() == io::ErrorKind::NotFound => continue,
            Err(error) => return Err(io_failure(path.display(), &error)),
        };
        if hold(&file).is_err() {
            let message = format!("another restore to {} is under way", output.display());
            let hint = format!("it writes to {}; wait for it or end it", path.display());
            return Err(ApiError::new(ErrorCode::Busy, message).with_hint(hint).into());
        }
        let same_size = file.metadata().is_ok_and(|found| found.len() == goal.size.0);
        let usable = same_size && taken.is_none() && is_private(&file);
        if let Some(notes) = usable.then(|| Notes::open(&notes::path_of(&path), goal)).flatten() {
            let path_name = path.display();
            context.tell(&format!("going on with {path_name}, which an earlier restore of this point left"));
            taken = Some(Leftover { file, path, notes });
            continue;
        }
        // Without notes it is nothing that could be gone on with.
        let _ = fs::remove_file(notes::path_of(&path));
        match fs::remove_file(&path) {
            Ok(()) => {
                let (path, output) = (path.display(), output.display());
                context
                    .tell(&format!("removed {path}: a restore to {output} was killed and left it half done"));
            }
            Err(error) if error.kind() == io::ErrorKind::NotFound => {}
            Err(error) => return Err(io_failure(path.display(), &error)),
        }
    }
    Ok(taken)
}

fn find(output: &Path) -> io::Result<Vec<PathBuf>> {
    let directory = output.parent().unwrap_or(Path::new("/"));
    let prefix = prefix(output);
    let mut found = Vec::new();
    let entries = match fs::read_dir(directory) {
        // What is wrong with the directory is said by the restore itself.
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(found),
        entries => entries?,
    };
    for entry in entries {
        let name = entry?.file_name();
        if is_leftover(&name, &prefix) {
            found.push(directory.join(name));
        }
    }
    Ok(found)
}

/// Another output's name may begin as this one's does: between the two parts stands one word.
fn is_leftover(name: &OsStr, prefix: &str) -> bool {
    let word = name.to_str().and_then(|name| name.strip_prefix(prefix)?.strip_suffix(SUFFIX));
    word.is_some_and(|word| !word.is_empty() && word.chars().all(|c| c.is_ascii_alphanumeric()))
}
