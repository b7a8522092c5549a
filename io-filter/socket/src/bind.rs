//! Making a unix socket that listens: for whom its file's mode says, from its first moment.

use std::{fmt, fs::Permissions, io, os::unix::fs::PermissionsExt, path::Path, str::FromStr};

use rustix::net::{AddressFamily, SocketAddrUnix, SocketFlags, SocketType, bind, listen, socket_with};
use serde::{Deserialize, Serialize};
use tokio::net::UnixListener;

use crate::{Occupied, Place, SocketFile};

/// Connections that may wait to be accepted; the kernel's own limit is lower as a rule.
const BACKLOG: i32 = 4096;

/// Who may connect to a unix socket, as the mode of its file: whoever may write it. On disks it is also who may reach
/// the directories on the way.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct SocketMode(u32);

/// A text that is no mode of a socket.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{0:?} is no mode of a socket: expected an octal number from 0600 to 0777, such as 0660")]
pub struct NoSocketMode(String);

impl SocketMode {
    /// The user of this process, and root.
    pub const PRIVATE: Self = Self(0o600);
}

impl Default for SocketMode {
    fn default() -> Self {
        Self::PRIVATE
    }
}

impl FromStr for SocketMode {
    type Err = NoSocketMode;

    fn from_str(text: &str) -> Result<Self, NoSocketMode> {
        let digits = text.bytes().all(|byte| byte.is_ascii_digit());
        match u32::from_str_radix(text, 8) {
            // Its owner always may: that is who serves.
            Ok(mode) if digits && mode & !0o777 == 0 && mode & 0o600 == 0o600 => Ok(Self(mode)),
            Ok(_) | Err(_) => Err(NoSocketMode(text.to_owned())),
        }
    }
}

impl TryFrom<String> for SocketMode {
    type Error = NoSocketMode;

    fn try_from(text: String) -> Result<Self, NoSocketMode> {
        text.parse()
    }
}

impl From<SocketMode> for String {
    fn from(mode: SocketMode) -> Self {
        mode.to_string()
    }
}

impl fmt::Display for SocketMode {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:04o}", self.0)
    }
}

/// Listens at `path`, for whom `mode` lets in. The socket of a process that is gone is replaced.
///
/// Whatever the umask is, nobody else gets in: a socket that does not listen yet takes no connection, and it listens
/// when its file has its mode.
///
/// # Errors
/// When the path is not free, or the system refuses.
pub async fn bind_unix(path: &Path, mode: SocketMode) -> Result<(UnixListener, SocketFile), Occupied> {
    Place::clear(path).await?;
    let socket = socket_with(
        AddressFamily::UNIX,
        SocketType::STREAM,
        SocketFlags::CLOEXEC | SocketFlags::NONBLOCK,
        None,
    )
    .map_err(io::Error::from)?;
    let address = SocketAddrUnix::new(path).map_err(io::Error::from)?;
    bind(&socket, &address).map_err(|error| match error {
        // Another process was faster.
        rustix::io::Errno::ADDRINUSE => Occupied::Live,
        error => Occupied::Io(error.into()),
    })?;
    // Gone with this value, should the rest fail.
    let file = SocketFile::of(path)?;
    std::fs::set_permissions(path, Permissions::from_mode(mode.0))?;
    listen(&socket, BACKLOG).map_err(io::Error::from)?;
    let listener = UnixListener::from_std(socket.into())?;
    Ok((listener, file))
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::MetadataExt;

    use tokio::net::UnixStream;

    use super::*;

    #[tokio::test]
    async fn a_socket_lets_in_whom_its_mode_says() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("s");
        for mode in ["0600", "0660", "0666", "0777"] {
            let (listener, file) = bind_unix(&path, mode.parse().unwrap()).await.unwrap();
            let found = std::fs::metadata(&path).unwrap().mode() & 0o7777;
            assert_eq!(format!("{found:04o}"), mode, "whatever the umask");
            let (accepted, connected) = tokio::join!(listener.accept(), UnixStream::connect(&path));
            accepted.unwrap();
            connected.unwrap();
            drop(file);
            assert!(!path.exists());
        }
    }

    #[tokio::test]
    async fn only_a_path_that_is_free_is_taken() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("s");
        let (listener, file) = bind_unix(&path, SocketMode::PRIVATE).await.unwrap();
        assert!(matches!(bind_unix(&path, SocketMode::PRIVATE).await, Err(Occupied::Live)));
        // As a process leaves it that was killed.
        file.leave();
        drop(listener);
        drop(bind_unix(&path, SocketMode::PRIVATE).await.unwrap());
        std::fs::write(&path, "no socket").unwrap();
        assert!(matches!(bind_unix(&path, SocketMode::PRIVATE).await, Err(Occupied::NoSocket)));
        let long = directory.path().join("x".repeat(200));
        assert!(matches!(bind_unix(&long, SocketMode::PRIVATE).await, Err(Occupied::Io(_))));
    }

    #[test]
    fn a_mode_is_what_chmod_takes() {
        assert_eq!("660".parse::<SocketMode>().unwrap().to_string(), "0660");
        for wrong in ["", "0888", "0060", "10600", "+660", "rw", "0x1b0", "4294967296"] {
            assert_eq!(wrong.parse::<SocketMode>(), Err(NoSocketMode(wrong.to_owned())));
        }
    }
}
