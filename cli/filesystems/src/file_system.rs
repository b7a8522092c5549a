//! What every file system here can tell.

use backtide_units::ByteCount;

use crate::{Contents, Error};

/// The most names of one directory that are read.
pub(crate) const NAMES_MAX: usize = 1 << 20;

/// A file or directory of one volume: the number by which its file system finds it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct FileId(pub u64);

/// What a file is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Kind {
    /// A file with bytes in it.
    File,
    /// A directory.
    Directory,
    /// A symbolic link.
    Symlink,
    /// A device, socket or pipe.
    Special,
}

/// What a volume says of a file.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Node {
    /// What it is.
    pub kind: Kind,
    /// How long it is.
    pub size: ByteCount,
    /// Its permission bits, made up where the file system has none.
    pub mode: u16,
    /// Its owner; 0 where the file system has none.
    pub uid: u32,
    /// Its group; 0 where the file system has none.
    pub gid: u32,
    /// When its content was changed last, in nanoseconds since 1970.
    pub modified_ns: i128,
    /// When anything of it was changed last, in nanoseconds since 1970.
    pub changed_ns: i128,
}

/// An entry of a directory.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Name {
    /// The name's bytes: UTF-8 where the file system knows which letters they are.
    pub bytes: Vec<u8>,
    /// What it names.
    pub id: FileId,
}

/// Whether two names are one when capitals do not count.
pub(crate) fn is_same_text(a: &[u8], b: &[u8]) -> bool {
    match (std::str::from_utf8(a), std::str::from_utf8(b)) {
        (Ok(a), Ok(b)) => a.chars().flat_map(char::to_lowercase).eq(b.chars().flat_map(char::to_lowercase)),
        _ => a == b,
    }
}

/// A volume whose files can be read.
pub trait FileSystem {
    /// The root directory.
    fn root(&self) -> FileId;

    /// What the volume says of a file.
    ///
    /// # Errors
    /// When it cannot be read.
    fn node(&self, id: FileId) -> Result<Node, Error>;

    /// The entries of a directory, in any order, without itself and the one above.
    ///
    /// # Errors
    /// When it cannot be read, or is none.
    fn names(&self, directory: FileId) -> Result<Vec<Name>, Error>;

    /// Where a symbolic link leads.
    ///
    /// # Errors
    /// When it cannot be read, or is none.
    fn link_target(&self, id: FileId) -> Result<Vec<u8>, Error>;

    /// Where the bytes of a file lie.
    ///
    /// # Errors
    /// When that cannot be read, or its bytes are stored in a way that is not read here.
    fn contents(&self, id: FileId) -> Result<Contents, Error>;

    /// Reads bytes of a file. As many as the buffer takes; fewer at its end only.
    ///
    /// # Errors
    /// When they cannot be read.
    fn read(
        &self,
        contents: &Contents,
        at: backtide_units::ByteOffset,
        buffer: &mut [u8],
    ) -> Result<usize, Error>;

    /// Whether two names are one: file systems differ in what they think of capitals.
    fn is_same_name(&self, a: &[u8], b: &[u8]) -> bool {
        a == b
    }

    /// What a reader has to know before believing what it sees, a sentence each.
    fn warnings(&self) -> &[String];
}
