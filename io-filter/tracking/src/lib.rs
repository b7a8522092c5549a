//! What differs between a disk and the receiver's copy: dirty bitmaps in memory, and the file in
//! which a clean detach leaves them.

mod bitmap;
mod saved;

pub use bitmap::DirtyBitmap;
pub use saved::{SavedError, SavedTracking};
