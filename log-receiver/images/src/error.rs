//! What can go wrong with images, by what the caller can do about it.

use std::{io, path::PathBuf};

use backtide_units::ByteOffset;

/// An image cannot be read or made.
#[derive(Debug, thiserror::Error)]
pub enum ImageError {
    /// Bytes are not what they must be, are missing, or the device cannot read them.
    #[error("{} is damaged at byte {offset}: {what}", file.display())]
    Damaged {
        /// The file.
        file: PathBuf,
        /// Where in it.
        offset: ByteOffset,
        /// What was expected and found.
        what: String,
    },
    /// A file of a version that this program does not know: use a newer program.
    #[error("{} has format version {found}, this program reads up to {known}", file.display())]
    UnknownVersion {
        /// The file.
        file: PathBuf,
        /// Its version.
        found: u32,
        /// The newest we know.
        known: u32,
    },
    /// The store is full. Nothing names what was written.
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
}

/// The system's error of a step.
pub(crate) fn failed(step: String, source: io::Error) -> ImageError {
    if source.kind() == io::ErrorKind::StorageFull {
        ImageError::Full { step, source }
    } else {
        ImageError::Io { step, source }
    }
}
