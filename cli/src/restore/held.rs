//! The lock on what a restore is going to overwrite, held from before its first byte until after its last.
//!
//! An agent locks the images it protects, and refuses one that is locked. So as long as a restore holds the
//! same lock nobody attaches what it replaces: the new file would take the name, and the agent would go on
//! writing to one that has none.
//!
//! Invariant: when a name is given to another file, whatever has it until then is held here.

use std::{
    fs::{File, Permissions},
    io,
    os::unix::fs::MetadataExt,
    path::Path,
};

use backtide_control::{ApiError, ErrorCode};
use backtide_storage::is_written_by_qemu;

use crate::{
    ending::{Failure, io_failure},
    restore::leftovers,
};

/// A file or device that nobody else has locked, nor can lock until this is dropped.
#[derive(Debug)]
pub(crate) struct Held {
    file: File,
}

/// Why something cannot be held.
#[derive(Debug)]
pub(super) enum NotHeld {
    /// Somebody else has it locked.
    Locked,
    /// A QEMU has it open to write, by its own kind of locks.
    Qemu,
    /// The system does not let it be opened or locked.
    Io(io::Error),
}

impl Held {
    /// Locks what is at `path`, an existing file or device.
    pub(super) fn take(path: &Path) -> Result<Self, NotHeld> {
        // Some network file systems lock only what may be written; and what may not be written may still be
        // replaced.
        let file = File::options().read(true).write(true).open(path);
        let file = file.or_else(|_| File::open(path)).map_err(NotHeld::Io)?;
        match leftovers::hold(&file) {
            Ok(()) => Self { file }.unless_used(),
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => Err(NotHeld::Locked),
            Err(error) => Err(NotHeld::Io(error)),
        }
    }

    /// What has the name `path` now: `held`, if it still has it. None when nothing has it.
    pub(super) fn now(held: Option<Self>, path: &Path) -> Result<Option<Self>, NotHeld> {
        let none_there = |error: io::Error| match error.kind() {
            io::ErrorKind::NotFound => Ok(None),
            _ => Err(NotHeld::Io(error)),
        };
        if let Some(held) = held {
            match held.is_at(path) {
                // Locks of other kinds are no obstacle to each other: it may have been started since.
                Ok(true) => return held.unless_used().map(Some),
                Ok(false) => {}
                Err(error) => return none_there(error),
            }
        }
        let held = match Self::take(path) {
            Ok(held) => held,
            Err(NotHeld::Io(error)) => return none_there(error),
            Err(used @ (NotHeld::Locked | NotHeld::Qemu)) => return Err(used),
        };
        match held.is_at(path) {
            Ok(true) => Ok(Some(held)),
            // Somebody gives the name away at this very moment.
            Ok(false) => Err(NotHeld::Locked),
            Err(error) => none_there(error),
        }
    }

    fn unless_used(self) -> Result<Self, NotHeld> {
        // Where that cannot be asked nobody has such a lock either.
        if is_written_by_qemu(&self.file).unwrap_or(false) { Err(NotHeld::Qemu) } else { Ok(self) }
    }

    /// Whether it is what `path` leads to now.
    fn is_at(&self, path: &Path) -> io::Result<bool> {
        let (held, there) = (self.file.metadata()?, std::fs::metadata(path)?);
        Ok((held.dev(), held.ino()) == (there.dev(), there.ino()))
    }

    /// Who may read and write it.
    pub(super) fn permissions(&self) -> io::Result<Permissions> {
        Ok(self.file.metadata()?.permissions())
    }
}

impl NotHeld {
    /// As the failure of a restore to `path`, with what can be done about it.
    pub(super) fn failure(self, path: &Path, hint: &str) -> Failure {
        match self {
            Self::Locked => {
                let message = format!(
                    "{} is locked: an agent protects it, or another program writes to it",
                    path.display()
                );
                ApiError::new(ErrorCode::Locked, message).with_hint(hint).into()
            }
            Self::Qemu => {
                let message = format!("{} is in use: a QEMU has it open to write", path.display());
                let hint = "end that QEMU first, or take another place";
                ApiError::new(ErrorCode::Locked, message).with_hint(hint).into()
            }
            Self::Io(error) => io_failure(path.display(), &error),
        }
    }
}
