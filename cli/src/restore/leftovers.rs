//! What a killed restore leaves beside its output: a partial file under a name of its own.
//!
//! ```text
//! .NAME.XXXXXX.restoring     locked (flock) by the restore that writes it, as long as that lives
//! ```
//! The output's own name never stands for half a restore. A leftover that nobody holds is removed by
//! the next restore to the same output, which says so; one that is held is another restore under way,
//! and that is refused.

use std::{
    ffi::OsStr,
    fs::{self, File},
    io,
    path::{Path, PathBuf},
};

use backtide_control::{ApiError, ErrorCode};
use rustix::fs::{FlockOperation, flock};

use crate::{
    context::Context,
    ending::{Failure, io_failure},
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

/// Removes what killed restores to `output` left.
pub(crate) fn clear(context: &Context, output: &str) -> Result<(), Failure> {
    if output.contains("://") {
        return Ok(());
    }
    let output = &std::path::absolute(output).map_err(|error| io_failure(output, &error))?;
    // A link that is there is followed: the partial file stands beside what it names.
    let output = &fs::canonicalize(output).unwrap_or_else(|_| output.clone());
    for path in find(output).map_err(|error| io_failure(output.display(), &error))? {
        let file = match File::open(&path) {
            Ok(file) => file,
            // Published or removed since it was listed.
            Err(error) if error.kind() == io::ErrorKind::NotFound => continue,
            Err(error) => return Err(io_failure(path.display(), &error)),
        };
        if hold(&file).is_err() {
            let message = format!("another restore to {} is under way", output.display());
            let hint = format!("it writes to {}; wait for it or end it", path.display());
            return Err(ApiError::new(ErrorCode::Busy, message).with_hint(hint).into());
        }
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
    Ok(())
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
