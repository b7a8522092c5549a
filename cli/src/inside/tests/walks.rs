//! Trees that are walked: what of them cannot be taken keeps nobody from the rest.

use std::path::Path;

use backtide_filesystems::{self as filesystems, Contents, Error, FileId, FileSystem, Name, Node};

use super::*;

/// Directories within each other, each with a pipe beside; in the first a link and a directory of names that are too
/// long.
struct Deep;

const DIRECTORIES: u64 = 600;
const PIPE: FileId = FileId(1000);
const LINK: FileId = FileId(1001);
const LONG: FileId = FileId(1002);

impl FileSystem for Deep {
    fn root(&self) -> FileId {
        FileId(0)
    }

    fn node(&self, id: FileId) -> Result<Node, Error> {
        let kind = match id {
            PIPE => filesystems::Kind::Special,
            LINK => filesystems::Kind::Symlink,
            _ => filesystems::Kind::Directory,
        };
        let (size, mode, modified_ns, changed_ns) = (ByteCount::ZERO, 0o755, 0, 0);
        Ok(Node { kind, size, mode, uid: 0, gid: 0, modified_ns, changed_ns })
    }

    fn names(&self, FileId(number): FileId) -> Result<Vec<Name>, Error> {
        let name = |bytes: &[u8], id| Name { bytes: bytes.to_vec(), id };
        let mut names = vec![name(b"z", PIPE)];
        if number < DIRECTORIES {
            names.push(name(b"d", FileId(number + 1)));
        }
        if number == 0 {
            names.extend([name(&[b'a'; 300], LINK), name(&[b'b'; 300], LONG)]);
        }
        Ok(names)
    }

    fn link_target(&self, _: FileId) -> Result<Vec<u8>, Error> {
        Ok(b"somewhere".to_vec())
    }

    fn contents(&self, _: FileId) -> Result<Contents, Error> {
        unreachable!("it has no files")
    }

    fn read(&self, _: &Contents, _: ByteOffset, _: &mut [u8]) -> Result<usize, Error> {
        unreachable!("it has no files")
    }

    fn warnings(&self) -> &[String] {
        &[]
    }
}

#[test]
fn a_directory_that_is_too_deep_and_names_that_are_too_long_keep_nobody_from_the_rest() {
    let (volume, directory) = (Volume(Box::new(Deep)), tempfile::tempdir().unwrap());
    let path = directory.path().join("out");
    let to = Destination::Path { path: path.clone(), replace: false };
    let copied = copy_out(&volume, &volume.look("/").unwrap(), &to, &Lost::default()).unwrap();
    let said = copied.unreadable.sentences();
    assert_eq!((copied.unreadable.count, copied.symlinks), (3, 0), "{said:?}");
    assert!(said.iter().any(|said| said.contains("deeper than 512 directories")), "{said:?}");
    assert_eq!(said.iter().filter(|said| said.contains("takes no such name")).count(), 2, "{said:?}");
    assert_eq!((copied.directories, copied.skipped), (513, 513), "all others, with what is beside them");
    assert!(path.join("d/d/d").is_dir());

    let is_changed = |_| false;
    let sides = Sides { from: &volume, to: &volume, is_changed: &is_changed, reads_all: true };
    let found = compare(&sides).unwrap();
    assert_eq!((found.unreadable.count, found.files.len()), (1, 0), "{:?}", found.unreadable);
}

/// A volume that must not be asked for what is a hole.
struct NoHoles(filesystems::ext::Ext);

impl FileSystem for NoHoles {
    fn root(&self) -> FileId {
        self.0.root()
    }

    fn node(&self, id: FileId) -> Result<Node, Error> {
        self.0.node(id)
    }

    fn names(&self, directory: FileId) -> Result<Vec<Name>, Error> {
        self.0.names(directory)
    }

    fn link_target(&self, id: FileId) -> Result<Vec<u8>, Error> {
        self.0.link_target(id)
    }

    fn contents(&self, id: FileId) -> Result<Contents, Error> {
        self.0.contents(id)
    }

    fn read(&self, contents: &Contents, at: ByteOffset, buffer: &mut [u8]) -> Result<usize, Error> {
        let is_end = at.0 == contents.size().0;
        assert!(is_end || contents.next_data(at) == Some(at), "byte {at} is in a hole");
        self.0.read(contents, at, buffer)
    }

    fn warnings(&self) -> &[String] {
        self.0.warnings()
    }
}

#[test]
fn a_comparison_of_all_bytes_reads_no_holes() {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("../testdata/volumes/ext4.zst");
    let bytes = zstd::decode_all(&std::fs::read(path).unwrap()[..]).unwrap();
    let open = || {
        let source = Rc::new(filesystems::Bytes(bytes.clone()));
        Volume(Box::new(NoHoles(filesystems::ext::Ext::open(source).unwrap())))
    };
    let (from, to, is_changed) = (open(), open(), |_| false);
    let sides = Sides { from: &from, to: &to, is_changed: &is_changed, reads_all: true };
    let found = compare(&sides).unwrap();
    assert_eq!((found.unreadable.count, found.files), (0, Vec::new()));
}
