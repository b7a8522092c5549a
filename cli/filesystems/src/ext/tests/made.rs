//! Volumes that e2fsprogs makes, and what its own programs say of them.

use std::{
    collections::BTreeMap,
    fs,
    os::unix::{ffi::OsStrExt, fs::PermissionsExt},
    path::{Path, PathBuf},
    process::{Command, Output},
};

use tempfile::TempDir;

use super::*;
use crate::path;

/// A volume in a file.
pub(super) struct Made {
    directory: TempDir,
}

/// What a file is, and its bytes or where it leads; with its mode.
pub(super) type Files = BTreeMap<Vec<u8>, (Kind, u32, Vec<u8>)>;

/// Bytes that differ from place to place.
pub(super) fn pattern(length: usize, number: usize) -> Vec<u8> {
    (0..length).map(|at| ((at / 1000 + number) % 251) as u8).collect()
}

fn run(program: &str, arguments: &[&str]) -> Output {
    // Debian has them where other users than root do not look.
    let path = format!("{}:/usr/sbin:/sbin", std::env::var("PATH").unwrap_or_default());
    let mut command = Command::new(program);
    let output = command.args(arguments).env("PATH", path).output();
    output.unwrap_or_else(|error| panic!("{program}, which is in the Debian package e2fsprogs: {error}"))
}

fn text(path: &Path) -> &str {
    path.to_str().unwrap()
}

impl Made {
    /// A volume of so many KiB, on what was something else before, with the files of `tree`.
    pub(super) fn new(kibibytes: usize, options: &[&str], tree: Option<&Path>) -> Self {
        let made = Self { directory: TempDir::new().unwrap() };
        fs::write(made.path(), vec![0xa5; kibibytes << 10]).unwrap();
        let tree = tree.map_or(Vec::new(), |tree| vec!["-d", text(tree)]);
        let output = run("mke2fs", &[&["-q", "-F"], options, &tree, &[text(&made.path())]].concat());
        assert!(output.status.success(), "{options:?}: {output:?}");
        made
    }

    pub(super) fn path(&self) -> PathBuf {
        self.directory.path().join("image")
    }

    /// A file beside it with these bytes.
    pub(super) fn beside(&self, name: &str, bytes: &[u8]) -> String {
        let path = self.directory.path().join(name);
        fs::write(&path, bytes).unwrap();
        text(&path).to_owned()
    }

    /// Has debugfs do these, and says what it has printed.
    pub(super) fn debugfs(&self, commands: &[&str]) -> String {
        let commands = self.beside("commands", format!("{}\n", commands.join("\n")).as_bytes());
        let output = run("debugfs", &["-w", "-f", &commands, text(&self.path())]);
        let said = String::from_utf8_lossy(&output.stdout).into_owned();
        let failed = String::from_utf8_lossy(&output.stderr).into_owned();
        // Its own version comes first, and nothing else when all went well.
        assert!(output.status.success() && failed.lines().count() <= 1, "{said}{failed}");
        said
    }

    /// The blocks of a file, as debugfs tells them.
    pub(super) fn blocks(&self, file: &str) -> Vec<usize> {
        let said = self.debugfs(&[&format!("blocks {file}")]);
        let last = said.lines().rfind(|line| !line.starts_with("debugfs:") && !line.trim().is_empty());
        last.unwrap_or_default().split_whitespace().map(|block| block.parse().unwrap()).collect()
    }

    /// Has e2fsck mend it, which replays the journal.
    pub(super) fn mend(&self, options: &str) {
        let output = run("e2fsck", &[options, text(&self.path())]);
        assert!(matches!(output.status.code(), Some(0 | 1)), "{output:?}");
    }

    pub(super) fn bytes(&self) -> Vec<u8> {
        fs::read(self.path()).unwrap()
    }

    pub(super) fn put(&self, bytes: &[u8]) {
        fs::write(self.path(), bytes).unwrap();
    }

    pub(super) fn copy(&self) -> Self {
        let made = Self { directory: TempDir::new().unwrap() };
        made.put(&self.bytes());
        made
    }

    pub(super) fn open(&self) -> Ext {
        open(self.bytes()).unwrap()
    }

    /// The files of it as debugfs copies them out.
    pub(super) fn dumped(&self) -> Files {
        let out = TempDir::new_in(self.directory.path()).unwrap();
        self.debugfs(&[&format!("rdump / {}", text(out.path()))]);
        put(out.path())
    }
}

/// The files below a directory of this machine.
pub(super) fn put(directory: &Path) -> Files {
    let mut files = Files::new();
    add_tree(directory, b"", &mut files);
    files
}

fn add_tree(directory: &Path, path: &[u8], files: &mut Files) {
    for entry in fs::read_dir(directory).unwrap() {
        let (at, name) = entry.map(|entry| (entry.path(), entry.file_name())).unwrap();
        let path = [path, b"/", name.as_bytes()].concat();
        let found = fs::symlink_metadata(&at).unwrap();
        let (kind, bytes) = match found.file_type() {
            kind if kind.is_dir() => (Kind::Directory, Vec::new()),
            kind if kind.is_file() => (Kind::File, fs::read(&at).unwrap()),
            kind if kind.is_symlink() => {
                (Kind::Symlink, fs::read_link(&at).unwrap().as_os_str().as_bytes().to_vec())
            }
            _ => (Kind::Special, Vec::new()),
        };
        if kind == Kind::Directory {
            add_tree(&at, &path, files);
        }
        files.insert(path, described(kind, found.permissions().mode(), bytes));
    }
}

/// Copies of links have modes of their own.
fn described(kind: Kind, mode: u32, bytes: Vec<u8>) -> (Kind, u32, Vec<u8>) {
    (kind, if kind == Kind::Symlink { 0 } else { mode & 0o7777 }, bytes)
}

/// All bytes of a file.
pub(super) fn read(ext: &Ext, id: FileId) -> Vec<u8> {
    let contents = ext.contents(id).unwrap();
    let mut bytes = vec![0; contents.size().0 as usize];
    assert_eq!(ext.read(&contents, ByteOffset::ZERO, &mut bytes).unwrap(), bytes.len());
    bytes
}

pub(super) fn find(ext: &Ext, path: &str) -> FileId {
    path::find(ext, path, false).unwrap().id
}

/// The files of a volume as they are read here.
pub(super) fn files(ext: &Ext) -> Files {
    let (mut files, mut directories) = (Files::new(), vec![(Vec::new(), ext.root())]);
    while let Some((path, directory)) = directories.pop() {
        for name in ext.names(directory).unwrap() {
            let path = [&path[..], b"/", &name.bytes].concat();
            let node = ext.node(name.id).unwrap();
            let bytes = match node.kind {
                Kind::File => read(ext, name.id),
                Kind::Symlink => ext.link_target(name.id).unwrap(),
                Kind::Directory | Kind::Special => Vec::new(),
            };
            if node.kind == Kind::Directory {
                directories.push((path.clone(), name.id));
            }
            let before = files.insert(path, described(node.kind, node.mode.into(), bytes));
            assert!(before.is_none(), "a name that is there twice");
        }
    }
    files
}

/// Says which files differ, without the bytes of all.
#[track_caller]
pub(super) fn assert_same(found: &Files, expected: &Files, what: &str) {
    let names = found.keys().chain(expected.keys());
    let differ: Vec<_> = names
        .filter(|name| found.get(*name) != expected.get(*name))
        .map(|name| String::from_utf8_lossy(name).into_owned())
        .take(5)
        .collect();
    assert!(differ.is_empty(), "{what}: {differ:?}");
}
