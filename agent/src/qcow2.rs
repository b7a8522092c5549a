//! qcow2 files: opened by `qemu-nbd`, which the agent starts and ends, and used through NBD.
//!
//! The format stays QEMU's business. The child takes QEMU's own image lock, so that no virtual
//! machine has the file at the same time.

use std::{
    io::{self, Read},
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
        // A socket of a child that was killed with its agent.
        let _ = std::fs::remove_file(&socket);
        let mut child = Command::new("qemu-nbd")
            .args(["--format=qcow2", "--persistent", "--shared=0", "--cache=writeback", "--discard=unmap"])
            .arg(format!("--export-name={disk}"))
            .arg("--socket")
            .arg(&socket)
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
    }
}
