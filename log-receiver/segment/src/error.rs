//! What can go wrong with a segment file, by what the caller can do about it.

use std::{io, path::PathBuf};

use backtide_units::ByteOffset;

/// A segment file cannot be read or written.
#[derive(Debug, thiserror::Error)]
pub enum SegmentError {
    /// Bytes are not what they must be, or the device cannot read them.
    #[error("{} is damaged at byte {offset}: {what}", file.display())]
    Damaged {
        /// The file.
        file: PathBuf,
        /// Where in it.
        offset: ByteOffset,
        /// What was expected and found.
        what: String,
    },
    /// A version that this program does not know: use a newer program.
    #[error("{} has format version {found}, this program reads up to {known}", file.display())]
    UnknownVersion {
        /// The file.
        file: PathBuf,
        /// Its version.
        found: u32,
        /// The newest we know.
        known: u32,
    },
    /// The store is full. Nothing was written.
    #[error("no space left to {step}")]
    Full {
        /// What was attempted.
        step: String,
        /// The system's error.
        source: io::Error,
    },
    /// A file operation failed.
    #[error("cannot {step}")]
    Io {
        /// What was attempted, with the file's name.
        step: String,
        /// The system's error.
        source: io::Error,
    },
    /// A write failed before: reopen and recover.
    #[error("the segment's writer stopped after a failed write; the log must be opened again")]
    Poisoned,
}
