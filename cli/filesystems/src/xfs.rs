//! XFS, versions 4 and 5, as it would be after the next mount: the log is replayed into memory first.
//!
//! The way of a file: `superblock` says where inodes are, `inode` what one says and where its bytes lie,
//! `directory` what names it has; `log` and `replay` put over the volume what is in the log and not yet in its place.
//!
//! Invariant: what has a checksum is checked against it, unless the replay has put it there.

mod directory;
mod inode;
mod log;
mod patches;
mod replay;
mod superblock;

use std::rc::Rc;

use backtide_units::ByteOffset;

use self::{inode::Inode, patches::Patched, superblock::Superblock};
use crate::{Contents, Error, FileId, FileSystem, Kind, Name, Node, Source};

/// The longest target of a symbolic link.
const LINK_MAX: u64 = 1024;

/// A volume with XFS.
pub struct Xfs {
    source: Patched,
    superblock: Superblock,
    warnings: Vec<String>,
}

impl Xfs {
    /// The volume on `source`.
    ///
    /// # Errors
    /// When it has no XFS, or one that is damaged or of a kind that is not known here.
    pub fn open(source: Rc<dyn Source>) -> Result<Self, Error> {
        let mut source = Patched::new(source);
        let mut superblock = superblock::read(&source, false)?;
        let mut warnings = Vec::new();
        match replay::replay(&superblock, &mut source) {
            Ok(unfinished) => {
                superblock = superblock::read(&source, source.is_patched(ByteOffset::ZERO, 512))?;
                if unfinished > 0 {
                    warnings.push(format!(
                        "the log of this XFS has begun {unfinished} changes of where files' bytes are that a mount would end: \
                         those files are as they were before"
                    ));
                }
            }
            // What is in its place can be read all the same.
            Err(error) => {
                source.forget();
                warnings.push(format!(
                    "the log of this XFS cannot be replayed, so what was changed last may be missing or as it was \
                     before: {}",
                    chain(&error)
                ));
            }
        }
        if superblock.needs_repair {
            warnings.push("this XFS says of itself that it needs xfs_repair".to_owned());
        }
        Ok(Self { source, superblock, warnings })
    }

    fn inode(&self, id: FileId) -> Result<Inode, Error> {
        inode::read(&self.source, &self.superblock, id.0).map_err(|error| error.of(|| inode_name(id)))
    }
}

fn inode_name(id: FileId) -> String {
    format!("inode {}", id.0)
}

fn chain(error: &Error) -> String {
    match std::error::Error::source(error) {
        Some(source) => format!("{error}: {source}"),
        None => error.to_string(),
    }
}

impl FileSystem for Xfs {
    fn root(&self) -> FileId {
        FileId(self.superblock.root)
    }

    fn node(&self, id: FileId) -> Result<Node, Error> {
        Ok(self.inode(id)?.node)
    }

    fn names(&self, directory: FileId) -> Result<Vec<Name>, Error> {
        let inode = self.inode(directory)?;
        let names = match inode.node.kind {
            Kind::Directory => directory::names(&self.source, &self.superblock, &inode),
            Kind::File | Kind::Symlink | Kind::Special => Err(Error::damaged("", "it is no directory")),
        };
        names.map_err(|error| error.of(|| format!("the directory of {}", inode_name(directory))))
    }

    fn link_target(&self, id: FileId) -> Result<Vec<u8>, Error> {
        let inode = self.inode(id)?;
        let length = inode.node.size.0;
        if inode.node.kind != Kind::Symlink || length == 0 || length > LINK_MAX {
            return Err(Error::damaged(inode_name(id), "it is no symbolic link of a length that can be"));
        }
        let stored = inode.stored(&self.source, &self.superblock)?;
        // The blocks of a version 5 begin with a header each.
        let header = if inode.is_inline() { 0 } else { self.superblock.link_header() };
        let (block, mut target, mut at) = (self.superblock.block_size(), Vec::new(), 0);
        while (target.len() as u64) < length {
            let count = (length - target.len() as u64).min(block - header) as usize;
            let mut part = vec![0; count];
            stored.read_stored(&self.source, ByteOffset(at + header), &mut part)?;
            target.extend_from_slice(&part);
            at += block;
        }
        Ok(target)
    }

    fn contents(&self, id: FileId) -> Result<Contents, Error> {
        let inode = self.inode(id)?;
        if inode.node.kind != Kind::File {
            return Err(Error::damaged(inode_name(id), "it is no file with bytes"));
        }
        inode.stored(&self.source, &self.superblock).map_err(|error| error.of(|| inode_name(id)))
    }

    fn read(&self, contents: &Contents, at: ByteOffset, buffer: &mut [u8]) -> Result<usize, Error> {
        contents
            .read_at(self.source.unpatched(), at, buffer)
            .map_err(|error| error.of(|| "a file of this XFS".to_owned()))
    }

    fn warnings(&self) -> &[String] {
        &self.warnings
    }
}

#[cfg(test)]
mod tests;
