//! What the tests of this crate share: exports to serve, raw clients, and a place to run both.

#![allow(dead_code, unused_imports, reason = "each test file uses its part")]

mod file_export;
mod manual;
mod raw;

use std::{
    future::Future,
    path::{Path, PathBuf},
    rc::Rc,
    time::Duration,
};

use backtide_export::{Export, Exports, Limits, Listener, NbdAddress, NbdUri, Server};
pub(crate) use file_export::{FileExport, Fixed};
pub(crate) use manual::Manual;
pub(crate) use raw::Raw;

/// Long enough never to matter.
pub(crate) const GRACE: Duration = Duration::from_secs(3600);

/// Runs `story` as a worker thread of the agent would.
pub(crate) fn on_a_worker<T>(story: impl Future<Output = T>) -> T {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
    tokio::task::LocalSet::new().block_on(&runtime, story)
}

/// Lets every other task run until it can do no more without the test.
pub(crate) async fn settle() {
    for _ in 0..200 {
        tokio::task::yield_now().await;
    }
}

/// A folder with a disk image and the socket it is served on.
pub(crate) struct Place {
    folder: tempfile::TempDir,
}

impl Place {
    pub(crate) fn new() -> Self {
        Self { folder: tempfile::tempdir().unwrap() }
    }

    pub(crate) fn path(&self, name: &str) -> PathBuf {
        self.folder.path().join(name)
    }

    /// The path of a new file of `size` zero bytes.
    pub(crate) fn image(&self, size: u64) -> PathBuf {
        let path = self.path("disk.img");
        std::fs::File::create(&path).unwrap().set_len(size).unwrap();
        path
    }

    pub(crate) fn address(&self) -> NbdAddress {
        NbdAddress::Unix(self.path("socket"))
    }

    pub(crate) fn uri(&self, export: &str) -> NbdUri {
        NbdUri { address: self.address(), export: export.into(), tls: None }
    }

    /// Serves `export` on the socket.
    pub(crate) async fn serve(&self, export: Rc<dyn Export>) -> Server {
        self.serve_all(Fixed::one(export), Limits::default()).await
    }

    pub(crate) async fn serve_all(&self, exports: Rc<dyn Exports>, limits: Limits) -> Server {
        Listener::bind(&self.address()).await.unwrap().serve(exports, limits)
    }
}

/// A running foreign program; killed when the test is over, whatever way.
pub(crate) fn command(program: &str) -> tokio::process::Command {
    let package = match program {
        "qemu-io" | "qemu-img" | "qemu-nbd" => "qemu-utils",
        "nbdinfo" | "nbdcopy" => "libnbd-bin",
        other => other,
    };
    let folders = std::env::var_os("PATH").unwrap_or_default();
    let found = std::env::split_paths(&folders).any(|folder| folder.join(program).is_file());
    assert!(found, "this test needs {program}: install the Debian package {package}");
    let mut command = tokio::process::Command::new(program);
    command.kill_on_drop(true).stdin(std::process::Stdio::null());
    command
}

/// Runs a foreign program to its end; what it printed.
pub(crate) async fn run(program: &str, arguments: &[&str]) -> String {
    let output = command(program).args(arguments).output().await.unwrap();
    let printed = String::from_utf8_lossy(&output.stdout).into_owned();
    let complaint = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{program} {arguments:?}: {printed}{complaint}");
    printed
}

/// A file of `size` bytes, a multiple of 8, that no compression or alignment makes look right.
pub(crate) fn write_noise(path: &Path, size: usize) {
    let mut state = 0x9e37_79b9_7f4a_7c15_u64;
    let mut bytes = vec![0; size];
    for word in bytes.chunks_exact_mut(8) {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        word.copy_from_slice(&state.to_le_bytes());
    }
    std::fs::write(path, bytes).unwrap();
}
