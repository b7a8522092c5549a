//! A disk that lacks blocks: their content is that of a *point* at a log receiver, and is fetched when it is
//! touched and in the background. A rewind, an attach from a point and a failover begin with such a disk.
//!
//! [`Missing`] has the rules: what has to be fetched before something is read or written, and whose content
//! counts when a guest writes what is being fetched. It does no I/O. [`HydrationFile`] remembers what is
//! missing through the storage seam. `FORMAT.md` describes its bytes and says why a crash loses nothing.
//!
//! # Invariants
//! - A block that a guest has written, and was told so, is never fetched again over it.
//! - What is missing is never read from the image: it holds what nobody asked for.
//! - What cannot be known for sure is an error and never a guess: the image alone is no disk.

mod file;
mod header;
mod journal;
mod missing;
mod source;

pub use file::{HydrationError, HydrationFile};
pub use header::{Header, HeaderError, Kind};
pub use missing::{ChangeId, FetchId, Missing, Need};
pub use source::SourcePoint;
