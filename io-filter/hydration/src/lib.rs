//! A disk that lacks blocks: their content is that of a *point* at a log receiver, and is fetched when it is
//! touched and in the background. A rewind, an attach from a point and a failover begin with such a disk.
//!
//! [`Missing`] has the rules: what has to be fetched before something is read or written, and whose content
//! counts when a guest writes what is being fetched. [`Hydrator`] has the steps: what is done for a request or a
//! fetch, one after the other. [`set_back`](lacking) decides what a disk lacks that is set to a point. None of them does
//! I/O. [`HydrationFile`] remembers what is missing through the storage seam. `FORMAT.md` describes its bytes and
//! says why a crash loses nothing.
//!
//! # Invariants
//! - A block that a guest has written, and was told so, is never fetched again over it.
//! - What is missing is never read from the image: it holds what nobody asked for.
//! - What cannot be known for sure is an error and never a guess: the image alone is no disk.

mod file;
mod header;
mod hydrator;
mod journal;
mod missing;
mod mutant;
mod set_back;
mod source;

pub use file::{HydrationError, HydrationFile, StoreError};
pub use header::{Header, HeaderError, Kind};
pub use hydrator::{Ahead, Hydrator, Refusal, RequestId, Step, Wish};
pub use missing::{ChangeId, FetchId, Missing, Need};
#[cfg(feature = "mutants")]
pub use mutant::Mutant;
pub use set_back::{Since, lacking, may_be_set_back};
pub use source::SourcePoint;
