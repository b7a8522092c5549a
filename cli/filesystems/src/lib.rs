//! The files of ext2/3/4, XFS, NTFS and FAT, the logical volumes of LVM, and partitions, out of the bytes of a disk. Nothing is written.
//!
//! A [`Source`] gives bytes; a [`FileSystem`] tells from them what lies where. File systems only find things: where
//! a file's bytes are is told as [`Contents`], which one place reads (`contents`), and paths are walked in
//! one place (`path`).
//!
//! Invariant: what is read was written by a guest and is taken as hostile. Whatever it says, the answer is what is
//! there or an [`Error`] that names the structure: never a panic, never an endless loop, never memory without bounds.

mod contents;
mod error;
pub mod ext;
pub mod fat;
mod fields;
mod file_system;
#[cfg(test)]
mod golden;
pub mod lvm;
pub mod ntfs;
pub mod partitions;
pub mod path;
mod source;
pub mod xfs;

pub use contents::{Contents, Piece, Place};
pub use error::Error;
pub use file_system::{FileId, FileSystem, Kind, Name, Node};
pub use source::{Bytes, Source, Window};
