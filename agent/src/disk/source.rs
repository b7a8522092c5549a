//! Where the content of missing blocks comes from: a point at a log receiver.
//!
//! A [`PointSource`] is used on one thread by whoever hydrates a disk, and by the registry before a disk
//! is set to a point. Its futures belong to that thread's `LocalSet`; dropped, they cost nothing but what
//! was fetched.

mod asking;
#[cfg(test)]
pub(crate) mod fake;
mod remote;

use std::{future::Future, pin::Pin, rc::Rc};

use backtide_hydration::SourcePoint;
use backtide_protocol::CompareItem;
use backtide_tracking::DirtyBitmap;
use backtide_units::{BlockRange, ByteRange, DiskId, Epoch, HistoryId, LogPosition, Lsn};
use bytes::Bytes;

pub(crate) use self::remote::find_point;
use self::remote::remote;
use super::dial::Dialer;

/// Ways to points: over the stream, or in memory for tests.
pub(crate) trait Sources: Send + Sync {
    /// The point at the receiver that `dialer` reaches; connected when something is asked of it.
    fn open(&self, point: SourcePoint, dialer: Dialer) -> Rc<dyn PointSource>;

    /// A point of which at most the history and the LSN are known; none: the latest.
    fn find(
        &self,
        dialer: Dialer,
        disk: DiskId,
        history: Option<HistoryId>,
        lsn: Option<Lsn>,
    ) -> Fetching<'static, Rc<dyn PointSource>>;
}

/// Points at log receivers.
pub(crate) struct Remote;

impl Sources for Remote {
    fn open(&self, point: SourcePoint, dialer: Dialer) -> Rc<dyn PointSource> {
        remote(point, dialer)
    }

    fn find(
        &self,
        dialer: Dialer,
        disk: DiskId,
        history: Option<HistoryId>,
        lsn: Option<Lsn>,
    ) -> Fetching<'static, Rc<dyn PointSource>> {
        Box::pin(find_point(dialer, disk, history, lsn))
    }
}

/// What a [`PointSource`] gives, later.
pub(crate) type Fetching<'source, T> = Pin<Box<dyn Future<Output = Result<T, FetchError>> + 'source>>;

/// What a stretch holds at the point.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Piece {
    /// These bytes, as many as the stretch has; checked against their checksum.
    Data(Bytes),
    /// Zeroes.
    Zeroes,
}

/// Why nothing was fetched.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub(crate) enum FetchError {
    /// The receiver is away or too busy: the same may succeed later.
    #[error("{0}")]
    Unreachable(String),
    /// What the receiver has of this range is damaged: it will not succeed, while other ranges may.
    #[error("{0}")]
    Damaged(String),
    /// The receiver has no such point (any more), or does not give it to this agent.
    #[error("{0}")]
    Refused(String),
}

/// A point of a disk at a log receiver.
pub(crate) trait PointSource {
    /// Which point it is.
    fn point(&self) -> &SourcePoint;

    /// What `range` holds at the point: pieces in order, which together are the range. Any number of
    /// these may be under way; `range` is at most 1 MiB.
    fn fetch(&self, range: ByteRange) -> Fetching<'_, Vec<(ByteRange, Piece)>>;

    /// Positions of those `items` that hold something else at the point, or are damaged there; 1 MiB together at most.
    fn differing(&self, items: Vec<CompareItem>) -> Fetching<'_, Vec<u32>>;

    /// The blocks whose content at the point may differ from that at `since`, a later or earlier point of
    /// the same history.
    fn changed(&self, since: Lsn) -> Fetching<'_, DirtyBitmap>;

    /// The blocks whose content at the point may differ from what this agent has, which has been told that everything up to `durable`,
    /// and so many entries of the log, are durable. What it knows to be changed here comes on top.
    fn after(&self, durable: Lsn, entries: LogPosition) -> Fetching<'_, DirtyBitmap>;

    /// The blocks whose content at the point may differ from what this agent has, whose attach of `epoch` was its last before
    /// the disk was taken from it, when it has been told that everything up to `durable`, and so many entries of the log, are
    /// durable. What it knows to be changed here comes on top.
    fn left(&self, epoch: Epoch, durable: Lsn, entries: LogPosition) -> Fetching<'_, DirtyBitmap>;

    /// Those of [`changed`](Self::changed), or without an LSN of [`data`](Self::data), that the receiver finds damaged. It looks
    /// only where it knows of damage at all.
    fn damaged(&self, since: Option<Lsn>) -> Fetching<'_, DirtyBitmap>;

    /// The blocks that may hold anything but zeroes at the point.
    fn data(&self) -> Fetching<'_, DirtyBitmap>;

    /// Those of [`data`](Self::data) that are in `part`, of at most 16 GiB.
    fn data_in(&self, part: BlockRange) -> Fetching<'_, DirtyBitmap>;

    /// Those of [`changed`](Self::changed) that are in `part`, of at most 16 GiB. Of an empty one it says at once whether
    /// that can be told.
    fn changed_in(&self, since: Lsn, part: BlockRange) -> Fetching<'_, DirtyBitmap>;

    /// Has the receiver keep the point until [`release`](Self::release), also while nobody is connected.
    /// `owner` says to people who needs it; asked again with the same owner it changes nothing. Whenever the receiver was
    /// away it is asked again before anything is fetched.
    fn hold(&self, owner: &str) -> Fetching<'_, ()>;

    /// Gives up what [`hold`](Self::hold) with this owner asked for.
    fn release(&self, owner: &str) -> Fetching<'_, ()>;
}
