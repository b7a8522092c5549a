//! The one file seam: real, in-memory and faulty files.
//!
//! Everything Backtide keeps on a disk of its own goes through [`Storage`] and [`StorageFile`], so
//! that the same code runs on a real directory ([`RealStorage`]) and on one whose power can be cut
//! at any operation ([`MemoryStorage`]). The guest's own image is another matter: [`ImageFile`] is
//! real only and has the calls an image needs (try-read, punch hole, allocated ranges, own lock); a
//! [`Ring`] does its I/O by io_uring.
//!
//! Both traits are synchronous and object-safe: callers hold `Arc<dyn Storage>`. A call to a
//! function table is nothing beside a system call, and no generic parameter spreads through the store.

mod batch;
mod buffer;
mod image;
mod kill_point;
mod loop_device;
mod memory;
mod qemu_lock;
mod real;
mod ring;
mod seam;
mod unreadable;

pub use batch::{SetSync, Sharing, SyncSet};
pub use buffer::{BUFFER_ALIGNMENT, Buffer, BufferPool};
pub use image::{Alignment, Cache, ImageError, ImageFile, Opening, Wrote, lock_owner, tells_holes};
pub use kill_point::KillPoint;
pub use loop_device::{LoopBacking, loop_backing};
pub use memory::{MemoryStorage, OperationCounts};
pub use qemu_lock::is_written_by_qemu;
pub use real::RealStorage;
pub use ring::{Completion, Ring, RingOp};
pub use seam::{DeviceId, Storage, StorageFile, read_file, replace_file, replace_with};
pub use unreadable::is_unreadable_place;
