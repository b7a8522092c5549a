//! Why an overlay cannot do what is asked.

use std::{error::Error, io, path::PathBuf};

use backtide_units::{ByteCount, ByteOffset};

/// What the disk below answered instead of bytes.
pub type BaseError = Box<dyn Error + Send + Sync>;

/// Why an overlay cannot be opened, read or written.
#[derive(Debug, thiserror::Error)]
pub enum OverlayError {
    /// The file system refuses.
    #[error("cannot {what} {}", path.display())]
    Io {
        /// What was tried.
        what: &'static str,
        /// Which file.
        path: PathBuf,
        /// Why.
        source: io::Error,
    },
    /// Bytes of the overlay are not what was written. Never data.
    #[error("{} is damaged at byte {offset}: {why}", path.display())]
    Damaged {
        /// Which file.
        path: PathBuf,
        /// Where.
        offset: ByteOffset,
        /// What is wrong.
        why: String,
    },
    /// The file is of a later version.
    #[error("{} has version {found}, this program knows version 1", path.display())]
    UnknownVersion {
        /// Which file.
        path: PathBuf,
        /// Its version.
        found: u32,
    },
    /// The overlay holds as much as it may.
    #[error("the overlay is full: it may hold {limit} bytes")]
    Full {
        /// Its limit, or what is left of that of all overlays together.
        limit: ByteCount,
    },
    /// The store has no room: a sentence.
    #[error("{0}")]
    NoRoom(String),
    /// A sync failed before: nobody knows what is durable until the overlay is opened again.
    #[error("the overlay is out of use until it is mounted again, for a write or sync of it failed: {0}")]
    Poisoned(String),
    /// The disk below cannot be read.
    #[error("cannot read the point below the overlay")]
    Base(#[source] BaseError),
}
