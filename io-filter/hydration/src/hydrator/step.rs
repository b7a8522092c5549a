//! What whoever drives a [`Hydrator`] is asked for, and what it says.

use backtide_units::{BlockIndex, BlockRange, ByteRange};

#[cfg(doc)]
use super::Hydrator;
use crate::FetchId;

/// A request of whoever uses the disk.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct RequestId(pub(super) u64);

/// What a request is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Wish {
    /// To read this.
    Read(ByteRange),
    /// To change this, and if `stable` to have that on stable storage.
    Change {
        /// What.
        range: ByteRange,
        /// As a write with FUA.
        stable: bool,
    },
    /// To have everything on stable storage that was done.
    Flush,
}

/// Something that the driver does now. Those that are out at the same time may be done in any order.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Step {
    /// The request's own read or change of the image, not stable: ends with [`Hydrator::image_done`].
    Image(RequestId),
    /// [`HydrationFile::present`](crate::HydrationFile::present): ends with [`Hydrator::noted`].
    Note(RequestId, Vec<BlockRange>),
    /// [`HydrationFile::settle`](crate::HydrationFile::settle): ends with [`Hydrator::settled`].
    Settle(RequestId),
    /// Getting this from the source, however long it takes, where the image [may not](Hydrator::may_compare) be found to
    /// hold it: ends with [`Hydrator::fetched`] or [`Hydrator::lost`].
    Fetch(FetchId, BlockRange),
    /// [`HydrationFile::store`](crate::HydrationFile::store) of this part of what was fetched: ends with
    /// [`Hydrator::stored`] or [`Hydrator::unnoted`].
    Store(FetchId, Vec<BlockRange>),
    /// The request has ended.
    Answer(RequestId, Result<(), Refusal>),
}

/// Why a request fails.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Refusal {
    /// The source has lost what this block held.
    Damaged(BlockIndex),
    /// The disk is given up.
    Stopped,
    /// The image or the journal failed with this error number.
    Failed {
        /// As the operating system says.
        errno: i32,
    },
}

/// What came of [`Hydrator::fetch_ahead`].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Ahead {
    /// A fetch of these has begun.
    Begun(BlockRange),
    /// Something has to end before.
    Wait,
    /// Nothing is missing.
    Complete,
}
