//! The files of unix sockets: one rule for everything that listens on one - disks, streams and
//! control APIs. And how listening sockets outlive the process that listens: [`Sockets`] keeps them
//! for the next one, [`Notifier`] tells a service manager, [`passing`] is the way from process to
//! process. [`Door`] accepts, also while descriptors are short.
//!
//! Invariants: a file is replaced only when it is a socket on which nobody answers, which is what a
//! process that was killed leaves behind; and it is removed in the end only while it is the one that
//! was made.

mod bind;
mod door;
mod notifier;
mod outage;
pub mod passing;
mod sockets;

pub use bind::{NoSocketMode, SocketMode, bind_unix};
pub use door::Door;
pub use notifier::Notifier;
pub use outage::Outage;
pub use sockets::{Place as Listening, Sockets};

use std::{
    io,
    os::unix::fs::{FileTypeExt, MetadataExt},
    path::{Path, PathBuf},
};

use tokio::net::UnixStream;

/// Why a path is not free for a socket.
#[derive(Debug, thiserror::Error)]
pub enum Occupied {
    /// Somebody listens there.
    #[error("another process answers there")]
    Live,
    /// Something else has that path; it is left alone.
    #[error("there is a file of that name that is no socket")]
    NoSocket,
    /// The system does not tell.
    #[error(transparent)]
    Io(#[from] io::Error),
}

/// What is at a path that a socket may take.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Place {
    /// Nothing.
    Free,
    /// The socket of a process that is gone: to be replaced or removed.
    Stale,
}

impl Place {
    /// Finds out whether a socket may take `path`.
    ///
    /// # Errors
    /// See [`Occupied`].
    pub async fn at(path: &Path) -> Result<Self, Occupied> {
        match std::fs::symlink_metadata(path) {
            Ok(found) if !found.file_type().is_socket() => return Err(Occupied::NoSocket),
            Ok(_) => {}
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(Self::Free),
            Err(error) => return Err(error.into()),
        }
        match UnixStream::connect(path).await {
            // Only a refusal proves that nobody listens; a full queue, for one, is an answer too.
            Err(error) if error.kind() == io::ErrorKind::ConnectionRefused => Ok(Self::Stale),
            // It went away meanwhile.
            Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(Self::Free),
            Ok(_) | Err(_) => Err(Occupied::Live),
        }
    }

    /// Makes `path` free, when a socket may take it.
    ///
    /// # Errors
    /// See [`Occupied`].
    pub async fn clear(path: &Path) -> Result<(), Occupied> {
        match Self::at(path).await? {
            Self::Free => Ok(()),
            Self::Stale => Ok(std::fs::remove_file(path)?),
        }
    }
}

/// A socket's file, which goes with this value, unless somebody else's has taken its place.
#[derive(Debug)]
pub struct SocketFile {
    path: PathBuf,
    identity: (u64, u64),
    stays: bool,
}

impl SocketFile {
    /// Of the socket that is at `path`.
    ///
    /// # Errors
    /// When it cannot be looked at.
    pub fn of(path: &Path) -> io::Result<Self> {
        Self::moving(path, path)
    }

    /// Of the socket that is at `now` and will be at `path`.
    ///
    /// # Errors
    /// When it cannot be looked at.
    pub fn moving(now: &Path, path: &Path) -> io::Result<Self> {
        Ok(Self { path: path.to_owned(), identity: identity(now)?, stays: false })
    }

    /// The file stays: whoever listens next has the same socket.
    pub fn leave(mut self) {
        self.stays = true;
    }
}

impl Drop for SocketFile {
    fn drop(&mut self) {
        if self.stays {
            return;
        }
        let ours = identity(&self.path).is_ok_and(|now| now == self.identity);
        // Nothing is lost if it stays: the next process finds it stale.
        if ours && let Err(error) = std::fs::remove_file(&self.path) {
            tracing::warn!(socket = %self.path.display(), %error, "cannot remove a socket");
        }
    }
}

fn identity(path: &Path) -> io::Result<(u64, u64)> {
    let found = std::fs::symlink_metadata(path)?;
    Ok((found.dev(), found.ino()))
}

#[cfg(test)]
mod tests {
    use std::os::unix::net::UnixListener;

    use super::*;

    #[tokio::test]
    async fn only_the_socket_of_a_process_that_is_gone_is_replaced() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("s");
        assert_eq!(Place::at(&path).await.unwrap(), Place::Free);
        let listener = UnixListener::bind(&path).unwrap();
        assert!(matches!(Place::at(&path).await, Err(Occupied::Live)));
        drop(listener);
        assert_eq!(Place::at(&path).await.unwrap(), Place::Stale);
        Place::clear(&path).await.unwrap();
        assert!(!path.exists());
        std::fs::write(&path, "not a socket").unwrap();
        assert!(matches!(Place::clear(&path).await, Err(Occupied::NoSocket)));
        assert_eq!(std::fs::read(&path).unwrap(), b"not a socket");
    }

    #[test]
    fn a_file_goes_only_while_it_is_ours() {
        let directory = tempfile::tempdir().unwrap();
        let (path, newborn) = (directory.path().join("s"), directory.path().join("n"));
        let _first = UnixListener::bind(&newborn).unwrap();
        let file = SocketFile::moving(&newborn, &path).unwrap();
        std::fs::rename(&newborn, &path).unwrap();
        drop(file);
        assert!(!path.exists());
        let _second = UnixListener::bind(&path).unwrap();
        let file = SocketFile::of(&path).unwrap();
        let _third = UnixListener::bind(&newborn).unwrap();
        std::fs::rename(&newborn, &path).unwrap();
        drop(file);
        assert!(path.exists(), "another's socket has taken its place");
    }
}
