//! qcow2 files: opened by `qemu-nbd`, which the agent starts and ends, and used through NBD.
//!
//! The format stays QEMU's business. The child takes QEMU's own image lock, so that no virtual
//! machine has the file at the same time.

use std::{
    io::{self, Read},
    os::unix::fs::FileTypeExt,
    path::{Path, PathBuf},
    time::Duration,
};

use backtide_units::DiskName;
use tokio::{
    net::UnixStream,
    process::{Child, Command},
};

/// The first bytes of a qcow2 file ("QFI\xfb").
const MAGIC: [u8; 4] = [0x51, 0x46, 0x49, 0xfb];

/// A file opened by `qemu-nbd`. Ends with this value.
#[derive(Debug)]
pub(crate) struct Qcow2Server {
    child: Child,
    uri: String,
    socket: PathBuf,
}

/// Why a qcow2 file cannot be opened.
#[derive(Debug, thiserror::Error)]
pub(crate) enum Qcow2Error {
    /// `qemu-nbd` is missing.
    #[error("a qcow2 image needs qemu-nbd (Debian package qemu-utils): {0}")]
    Start(io::Error),
    /// The one of an agent that was killed still has the file, or its socket is not a socket.
    #[error("cannot end the qemu-nbd of an earlier agent: {0}")]
    Predecessor(io::Error),
    /// It ended at once.
    #[error("qemu-nbd cannot open {}: {message}", image.display())]
    Refused {
        /// Which file.
        image: PathBuf,
        /// What it wrote.
        message: String,
    },
}

/// Whether a path is a qcow2 file. What cannot be read is left for its opener to complain about.
pub(crate) fn is_qcow2(path: &Path) -> bool {
    let mut magic = [0; 4];
    std::fs::File::open(path).and_then(|mut file| file.read_exact(&mut magic)).is_ok() && magic == MAGIC
}

impl Qcow2Server {
    /// Opens `image` on a socket of its own.
    pub(crate) async fn start(image: &Path, disk: &DiskName, socket: PathBuf) -> Result<Self, Qcow2Error> {
        end_predecessor(&socket).await.map_err(Qcow2Error::Predecessor)?;
        let mut child = Command::new("qemu-nbd")
            .args(["--format=qcow2", "--persistent", "--shared=0", "--cache=writeback", "--discard=unmap"])
            .arg(format!("--export-name={disk}"))
            .arg("--socket")
            .arg(&socket)
            .arg("--pid-file")
            .arg(pid_file(&socket))
            .arg(image)
            .stdin(std::process::Stdio::null())
            .stderr(std::process::Stdio::piped())
            .kill_on_drop(true)
            .spawn()
            .map_err(Qcow2Error::Start)?;
        loop {
            if UnixStream::connect(&socket).await.is_ok() {
                let uri = format!("nbd+unix:///{disk}?socket={}", socket.display());
                return Ok(Self { child, uri, socket });
            }
            if child.try_wait().map_err(Qcow2Error::Start)?.is_some() {
                let output = child.wait_with_output().await.map_err(Qcow2Error::Start)?;
                let message = String::from_utf8_lossy(&output.stderr).trim().replace('\n', "; ");
                return Err(Qcow2Error::Refused { image: image.to_path_buf(), message });
            }
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
    }

    /// Where it serves the disk.
    pub(crate) fn uri(&self) -> &str {
        &self.uri
    }

    /// Ends it in good order: it flushes and gives up its lock.
    pub(crate) async fn stop(mut self) {
        if let Some(id) = self.child.id() {
            // SIGTERM by the shell's own tool: the standard library can only kill.
            let _ = Command::new("kill").arg(id.to_string()).status().await;
        }
        if let Err(error) = self.child.wait().await {
            tracing::warn!(%error, "qemu-nbd");
        }
        let _ = std::fs::remove_file(&self.socket);
        let _ = std::fs::remove_file(pid_file(&self.socket));
    }
}

fn pid_file(socket: &Path) -> PathBuf {
    let mut name = socket.as_os_str().to_owned();
    name.push(".pid");
    name.into()
}

/// Ends the server that an agent left behind when it was killed, which still has the image locked,
/// and removes its socket. Nothing of anybody else is touched.
async fn end_predecessor(socket: &Path) -> io::Result<()> {
    let file = pid_file(socket);
    if let Ok(text) = std::fs::read_to_string(&file)
        && let Ok(id) = text.trim().parse::<u32>()
    {
        let mut asked = false;
        while serves(id, socket) {
            if !asked {
                Command::new("kill").arg(id.to_string()).status().await?;
                asked = true;
            }
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
    }
    match std::fs::symlink_metadata(socket) {
        Ok(found) if found.file_type().is_socket() => std::fs::remove_file(socket),
        Ok(_) => Err(io::Error::other(format!("{} is not a socket", socket.display()))),
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(()),
        Err(error) => Err(error),
    }
}

/// Whether the process is a `qemu-nbd` on this socket: ids are used again.
fn serves(id: u32, socket: &Path) -> bool {
    let Ok(line) = std::fs::read(format!("/proc/{id}/cmdline")) else { return false };
    let mut words = line.split(|&byte| byte == 0);
    words.next().is_some_and(|program| program.ends_with(b"qemu-nbd"))
        && words.any(|word| word == socket.as_os_str().as_encoded_bytes())
}
