//! ext2, ext3 and ext4, as they would be after the next mount: the journal is replayed first, in memory.
//!
//! The way of a file: `superblock` says where inodes are, `inode` what one says, `map` where its bytes lie, `directory` what
//! names it has; `journal` and `replay` find the newest copy of each block, and `patches` reads that in place of the
//! block.
//!
//! Invariants: what has a checksum is checked against it. Where [`Contents`] say that bytes of a file are, they are: a
//! block whose newest copy is in the journal is said to be there.

mod checksum;
mod directory;
mod inode;
mod journal;
mod map;
mod patches;
mod replay;
mod superblock;

use std::{collections::BTreeMap, rc::Rc};

use backtide_units::ByteOffset;

use self::{
    inode::{Inode, POINTERS},
    patches::{Copied, Patched},
    superblock::{Journal, Superblock},
};
use crate::{Contents, Error, FileId, FileSystem, Kind, Name, Node, Source};

/// The root directory.
const ROOT: FileId = FileId(2);

/// The longest target of a symbolic link.
const LINK_MAX: u64 = 4096;

/// A volume, and what is in its superblock.
struct Volume {
    source: Patched,
    superblock: Superblock,
}

/// A volume with ext2, ext3 or ext4.
pub struct Ext {
    volume: Volume,
    warnings: Vec<String>,
}

impl Volume {
    fn open(source: Rc<dyn Source>, copies: BTreeMap<u64, Copied>) -> Result<Self, Error> {
        let block_size = superblock::read(source.as_ref())?.block_size();
        let source = Patched::new(source, block_size, copies);
        let superblock = superblock::read(&source)?;
        if superblock.block_size() != block_size {
            let what = "the superblock of this ext file system";
            return Err(Error::damaged(what, "its journal has one with blocks of another size"));
        }
        Ok(Self { source, superblock })
    }
}

impl Ext {
    /// The volume on `source`.
    ///
    /// # Errors
    /// When it has no ext, or one that is damaged or has features that are not known here.
    pub fn open(source: Rc<dyn Source>) -> Result<Self, Error> {
        let mut volume = Volume::open(Rc::clone(&source), BTreeMap::new())?;
        let mut warnings = Vec::new();
        if volume.superblock.needs_recovery {
            let replayed = replay::replay(&volume);
            let opened = replayed.and_then(|mut replayed| {
                let copies = std::mem::take(&mut replayed.copies);
                Ok((Volume::open(source, copies)?, replayed))
            });
            match opened {
                Ok((opened, replayed)) => {
                    volume = opened;
                    if let Some(damaged) = replayed.damaged {
                        warnings.push(format!(
                            "transaction {damaged} in the journal of this ext is damaged, so what was changed from it \
                             on may be missing or as it was before"
                        ));
                    }
                    if replayed.is_fast {
                        warnings.push(
                            "the journal of this ext ends with fast commits, which are not replayed here: what was \
                             changed last may be missing or as it was before"
                                .to_owned(),
                        );
                    }
                }
                // What is in its place can be read all the same.
                Err(error) => warnings.push(format!(
                    "the journal of this ext cannot be replayed, so what was changed last may be missing or as it \
                     was before: {}",
                    chain(&error)
                )),
            }
        } else if replay::is_left(&volume) {
            warnings.push(
                "the journal of this ext has changes that a mount would leave there, as the superblock says that \
                 there are none"
                    .to_owned(),
            );
        }
        let superblock = &volume.superblock;
        if superblock.journal == Journal::None && !superblock.is_clean {
            warnings.push(
                "this ext was in use and has no journal: what was being changed may be half there".to_owned(),
            );
        }
        if superblock.has_errors {
            warnings.push("this ext says of itself that it needs e2fsck".to_owned());
        }
        Ok(Self { volume, warnings })
    }

    fn inode(&self, id: FileId) -> Result<Inode, Error> {
        inode::read(&self.volume, id.0).map_err(|error| error.of(|| inode_name(id)))
    }

    /// An inode of this kind whose bytes can be read.
    fn readable(&self, id: FileId, kind: Kind, what: &str) -> Result<Inode, Error> {
        let inode = self.inode(id)?;
        if inode.node.kind != kind {
            return Err(Error::damaged(inode_name(id), format!("it is no {what}")));
        }
        if inode.is_encrypted() {
            return Err(Error::Unsupported { what: format!("{} is encrypted", inode_name(id)) });
        }
        Ok(inode)
    }

    /// The bytes of a file or a link.
    fn stored(&self, inode: &Inode) -> Result<Contents, Error> {
        if inode.is_inline() {
            return Ok(Contents::inline(inode.inline_bytes()?));
        }
        map::stored(&self.volume, inode)
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

impl FileSystem for Ext {
    fn root(&self) -> FileId {
        ROOT
    }

    fn node(&self, id: FileId) -> Result<Node, Error> {
        Ok(self.inode(id)?.node)
    }

    fn names(&self, directory: FileId) -> Result<Vec<Name>, Error> {
        let inode = self.readable(directory, Kind::Directory, "directory")?;
        let names = directory::names(&self.volume, &inode);
        names.map_err(|error| error.of(|| format!("the directory of {}", inode_name(directory))))
    }

    fn link_target(&self, id: FileId) -> Result<Vec<u8>, Error> {
        let inode = self.readable(id, Kind::Symlink, "symbolic link")?;
        let length = inode.node.size.0;
        if length == 0 || length > LINK_MAX {
            let why = format!("it says it is a symbolic link of {length} bytes");
            return Err(Error::damaged(inode_name(id), why));
        }
        let mut target = vec![0; length as usize];
        let is_fast = !inode.is_inline() && !inode.has_extents() && target.len() < POINTERS;
        if is_fast {
            return Ok(inode.pointers()[..target.len()].to_vec());
        }
        let read = self.stored(&inode).and_then(|stored| {
            stored.read_stored(self.volume.source.unpatched(), ByteOffset::ZERO, &mut target)
        });
        read.map_err(|error| error.of(|| inode_name(id)))?;
        Ok(target)
    }

    fn contents(&self, id: FileId) -> Result<Contents, Error> {
        let inode = self.readable(id, Kind::File, "file with bytes")?;
        self.stored(&inode).map_err(|error| error.of(|| inode_name(id)))
    }

    fn read(&self, contents: &Contents, at: ByteOffset, buffer: &mut [u8]) -> Result<usize, Error> {
        contents
            .read_at(self.volume.source.unpatched(), at, buffer)
            .map_err(|error| error.of(|| "a file of this ext file system".to_owned()))
    }

    fn warnings(&self) -> &[String] {
        &self.warnings
    }
}

#[cfg(test)]
mod tests;
