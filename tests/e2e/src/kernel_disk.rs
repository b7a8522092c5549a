//! An export as a file system of the kernel: nbdfuse makes a file of it, a loop device a disk of the
//! file. What is synced there becomes a flush of the export.

use std::{
    os::unix::fs::FileTypeExt,
    path::{Path, PathBuf},
};

use crate::{Bench, bench::text, is_root, tools};

/// Why this machine cannot mount an export, if it cannot.
pub fn cannot_mount() -> Option<&'static str> {
    let device = |path: &str| std::fs::metadata(path).is_ok_and(|found| found.file_type().is_char_device());
    if !is_root() {
        return Some("only root mounts a file system");
    }
    if !device("/dev/fuse") || !device("/dev/loop-control") {
        return Some("there is no /dev/fuse or /dev/loop-control");
    }
    if !tools::is_there("nbdfuse") {
        return Some("there is no nbdfuse, which is in the Debian package libnbd-bin");
    }
    None
}

/// An export as a file, until dropped.
pub struct Served {
    path: PathBuf,
    nbdfuse: Option<tools::Beside>,
}

impl Served {
    /// Makes a file `name` in the bench's directory of the export at `uri`, which has `size` bytes.
    pub fn start(bench: &Bench, name: &str, uri: &str, size: u64) -> Self {
        let path = bench.path(name);
        std::fs::write(&path, "").expect("create a file to mount on");
        let mut nbdfuse = tools::Beside::start("nbdfuse", &[&text(&path), uri]);
        while std::fs::metadata(&path).is_ok_and(|found| found.len() != size) {
            assert!(nbdfuse.runs(), "nbdfuse ended before it served {uri}");
            std::thread::yield_now();
        }
        Self { path, nbdfuse: Some(nbdfuse) }
    }

    /// The file.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Has e2fsck replay the journal of the ext4 in it, as a kernel would, and then find nothing.
    pub fn check_ext4(&self) {
        let path = text(&self.path);
        // It ends with 1 when it has mended what a cut leaves, and with more when it could not.
        tools::run("sh", &["-c", "e2fsck -fp \"$0\" || [ $? -eq 1 ]", &path]);
        tools::run("e2fsck", &["-fn", &path]);
    }
}

impl Drop for Served {
    fn drop(&mut self) {
        tools::try_run("umount", &["-l", &text(&self.path)]);
        // It ends once it is unmounted, which it may not get to when what is behind is gone.
        drop(self.nbdfuse.take());
    }
}

/// A mounted file system, until dropped.
pub struct Mounted(PathBuf);

impl Mounted {
    /// Mounts what is served through a loop device.
    ///
    /// # Errors
    /// What mount says when this machine has no loop devices for us.
    pub fn at(directory: PathBuf, served: &Served) -> Result<Self, String> {
        std::fs::create_dir(&directory).expect("make a directory to mount on");
        match tools::try_run("mount", &["-o", "loop", &text(served.path()), &text(&directory)]) {
            (true, _) => Ok(Self(directory)),
            (false, said) => Err(said),
        }
    }

    /// Where it is mounted.
    pub fn directory(&self) -> &Path {
        &self.0
    }

    /// Unmounts it: everything written is with the server then.
    pub fn unmount(self) {
        let name = text(&self.0);
        drop(self);
        while std::fs::read_to_string("/proc/self/mountinfo").expect("read mounts").contains(&name) {
            std::thread::yield_now();
        }
    }
}

impl Drop for Mounted {
    fn drop(&mut self) {
        // Lazily: the server behind may be gone.
        tools::try_run("umount", &["-l", &text(&self.0)]);
    }
}
