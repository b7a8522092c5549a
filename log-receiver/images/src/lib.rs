//! Images: whole versions of disks as content-addressed chunks in pack files.
//!
//! On the way of a write this is where old history ends up: [`ImageWriter`] makes an image of a disk at a point from the
//! log, [`Image`] reads it, [`Images::collect`] gives the room of images back that nobody names any more, [`Images::mend`]
//! puts chunks back that are damaged. A library: no sockets, no clock, no threads of its own. `FORMAT.md` describes the bytes.
//!
//! Invariants: a pack is never changed once its trailer is durable, only replaced by one with fewer chunks, or with whole
//! ones for damaged ones, under the same addresses; nothing names a chunk before its pack is durable; every byte that is read has the hash by which it was asked
//! for.

mod check;
mod chunk;
mod collect;
mod durable;
mod encode;
mod error;
mod having;
mod image;
mod inspect;
mod mend;
mod node;
mod numbers;
mod pack;
mod pack_writer;
mod parts;
mod recent;
mod store;
mod writer;

pub use check::{Losses, LostChunk};
pub use chunk::{CHUNK_BYTES, ChunkRef};
pub use collect::Collected;
pub use error::ImageError;
pub use having::{Having, LostBytes, LostRanges};
pub use image::{Image, ROOT_LENGTH, Root};
pub use inspect::inspect;
pub use mend::{FindChunk, Left, Mended, Step};
pub use pack::PACK_MAGIC;
pub use recent::Recent;
pub use store::{Images, ImagesLimits, PACKS_DIR};
pub use writer::{ImageSource, ImageWriter, Written};
