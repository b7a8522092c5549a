//! A connection that reads a point instead of feeding a log: what the two sides say on it.
//!
//! The agent opens a point, then asks as often and as much at once as it likes within the receiver's
//! bounds; each question has an id, and its answer is any number of parts with that id and one
//! [`Reading::Answered`] or [`Reading::Failed`] that ends them. Answers to different questions may lie
//! between each other's parts.

use backtide_units::{
    BlockIndex, BlockRange, ByteCount, ByteRange, CaptureTime, DiskId, DiskName, Epoch, HistoryId,
    LogPosition, Lsn,
};
use roaring::{RoaringBitmap, RoaringTreemap};
use serde::{Deserialize, Serialize};

use crate::message::Data;

/// The most bytes of one [`Reading::Fetch`], and so of one [`Reading::Piece`].
pub const FETCH_BYTES_MAX: u64 = 1 << 20;

/// Blocks that one [`Reading::Blocks`] tells of at most: 16 GiB of disk, at most half a MiB of bitmap.
pub const BLOCKS_PER_PART: u64 = 1 << 22;

/// The longest name of an owner of a hold, and of a reader, in bytes.
pub const OWNER_BYTES_MAX: usize = 256;

/// One message of a connection that reads a point.
#[derive(Clone, Debug, PartialEq)]
pub enum Reading {
    /// Agent: which point. The first frame, once.
    Open(OpenPoint),
    /// Receiver: the point can be read, for as long as the connection lasts.
    Opened(PointOpened),
    /// Agent: what is in these bytes? At most [`FETCH_BYTES_MAX`] of them. On the stream of a disk the receiver asks it, for what
    /// is damaged in its store.
    Fetch {
        /// Comes back with the answer.
        id: u64,
        /// Which bytes.
        range: ByteRange,
    },
    /// Receiver: a part of the answer to a fetch. The parts come in order and cover its range. The agent answers in one.
    Piece {
        /// That of the question.
        id: u64,
        /// Which bytes.
        range: ByteRange,
        /// Their content; no bytes at all say that they are zeroes.
        data: Data,
    },
    /// Agent: which blocks?
    AskBlocks {
        /// Comes back with the answer.
        id: u64,
        /// Of which.
        which: Blocks,
    },
    /// Receiver: a part of the answer to a question for blocks.
    Blocks {
        /// That of the question.
        id: u64,
        /// The part begins here: a multiple of [`BLOCKS_PER_PART`].
        first: BlockIndex,
        /// The blocks, counted from `first`: all below [`BLOCKS_PER_PART`].
        blocks: RoaringBitmap,
    },
    /// Agent: keep the point also between connections, until it is released: durably, in the name of this
    /// owner, whose earlier hold of this disk, if there is one, it replaces.
    Hold {
        /// Comes back with the answer.
        id: u64,
        /// Who needs it, for people; 1 to [`OWNER_BYTES_MAX`] bytes.
        owner: String,
    },
    /// Agent: what this owner holds of the disk is needed no longer, whichever point it is.
    Release {
        /// Comes back with the answer.
        id: u64,
        /// As in [`Reading::Hold`].
        owner: String,
    },
    /// Receiver: everything that belongs to the answer was said.
    Answered {
        /// That of the question.
        id: u64,
    },
    /// Receiver: there is no answer; parts that came are worth nothing.
    Failed {
        /// That of the question.
        id: u64,
        /// Why not.
        failure: ReadFailure,
    },
}

/// Which blocks are asked for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Blocks {
    /// Those that may hold something else than zeroes at the point.
    Data,
    /// Those whose content may differ between the point and this LSN, older or newer; [`Lsn::MAX`] is
    /// everything that came after the point, also what is no point yet.
    Changed(Lsn),
    /// Those of [`Blocks::Data`] that lie in this range, of at most [`BLOCKS_PER_PART`].
    DataIn(BlockRange),
    /// Those of [`Blocks::Changed`] that lie in this range, of at most [`BLOCKS_PER_PART`]. Of no block at all it says whether that can be told.
    ChangedIn(Lsn, BlockRange),
    /// Those of [`Blocks::Changed`] since this LSN, or without one of [`Blocks::Data`], whose content at the point is damaged
    /// at the receiver. They are looked at only where it knows of damage to the disk's log at all.
    Damaged(Option<Lsn>),
    /// Those whose content at the point may differ from what an agent had when the disk was taken from it, as far as all of
    /// that was durable at the receiver.
    Left {
        /// Its last attach.
        epoch: Epoch,
        /// Up to here the receiver had acknowledged everything as durable.
        durable: Lsn,
        /// So many entries of the log it had acknowledged as durable.
        entries: LogPosition,
    },
    /// Those of [`Blocks::Changed`] since the point, as far as all that the receiver had acknowledged as durable is in the log still.
    After {
        /// Up to here it had.
        durable: Lsn,
        /// So many entries of the log it had.
        entries: LogPosition,
    },
}

/// The first frame of a connection that reads a point.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct OpenPoint {
    /// [`crate::PROTOCOL_VERSION`] of the agent.
    pub version: u32,
    /// The disk's name at the receiver, or its UUID.
    pub disk: DiskName,
    /// The history that the point belongs to: one of another history with the same LSN is another
    /// point. None when the agent does not know.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub history: Option<HistoryId>,
    /// The point; none: the latest.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub lsn: Option<Lsn>,
    /// Who reads, for people; 1 to [`OWNER_BYTES_MAX`] bytes.
    pub reader: String,
}

/// The answer to an [`OpenPoint`] that is accepted.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct PointOpened {
    /// [`crate::PROTOCOL_VERSION`] of the receiver.
    pub version: u32,
    /// The disk.
    pub disk: DiskId,
    /// Its name today.
    pub name: DiskName,
    /// The size that it had at the point.
    pub size: ByteCount,
    /// The point.
    pub lsn: Lsn,
    /// When it was captured.
    pub time: CaptureTime,
    /// The history that has the point.
    pub history: HistoryId,
    /// The latest point there was when this one was opened.
    pub latest: Lsn,
}

/// Why a question has no answer.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct ReadFailure {
    /// What to do about it.
    pub code: FailureCode,
    /// A sentence for people.
    pub message: String,
}

/// Kinds of failures, each with one right reaction.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum FailureCode {
    /// What is stored of it is damaged. It stays so until a person mends the store.
    Damaged,
    /// There is no such point. Asking again does not help.
    Gone,
    /// The question makes no sense for this point. Asking again does not help.
    Invalid,
    /// The receiver may not promise it now. Nothing changes that but its store, which a person sees to.
    Refused,
    /// The receiver could not do it now. Retry later.
    Failed,
}

impl Reading {
    /// What kind of message it is, for people.
    pub fn name(&self) -> &'static str {
        match self {
            Self::Open(_) => "open-point",
            Self::Opened(_) => "point-opened",
            Self::Fetch { .. } => "fetch",
            Self::Piece { .. } => "piece",
            Self::AskBlocks { .. } => "ask-blocks",
            Self::Blocks { .. } => "blocks",
            Self::Hold { .. } => "hold",
            Self::Release { .. } => "release",
            Self::Answered { .. } => "answered",
            Self::Failed { .. } => "failed",
        }
    }

    /// The answer's parts that tell of `blocks`, in order; empty stretches are left out.
    pub fn parts(id: u64, blocks: &RoaringTreemap) -> impl Iterator<Item = Self> + '_ {
        let mut next = 0;
        std::iter::from_fn(move || {
            let mut left = blocks.iter();
            left.advance_to(next);
            let first = left.next()? / BLOCKS_PER_PART * BLOCKS_PER_PART;
            next = first.saturating_add(BLOCKS_PER_PART);
            let (first, blocks) = part(blocks, first);
            Some(Self::Blocks { id, first, blocks })
        })
    }
}

/// The blocks of the stretch that begins with `first`.
fn part(blocks: &RoaringTreemap, first: u64) -> (BlockIndex, RoaringBitmap) {
    let end = first + BLOCKS_PER_PART;
    let mut part = RoaringBitmap::new();
    for (high, bitmap) in blocks.bitmaps() {
        let base = u64::from(high) << 32;
        if base >= end || base + (1 << 32) <= first {
            continue;
        }
        let low = |block: u64| u32::try_from(block - base).expect("a stretch lies within one bitmap");
        let mut stretch = RoaringBitmap::new();
        stretch.insert_range(low(first)..=low(end - 1));
        let within = bitmap & stretch;
        let (mut runs, offset) = (within.iter(), low(first));
        while let Some(run) = runs.next_range() {
            part.insert_range(run.start() - offset..=run.end() - offset);
        }
    }
    (BlockIndex(first), part)
}

/// Puts one part of an answer for blocks into the whole; what lies beyond `size` counts for nothing.
pub fn collect_part(whole: &mut RoaringTreemap, first: BlockIndex, part: &RoaringBitmap, size: ByteCount) {
    let end = BlockRange::whole_disk(size).end().0;
    let mut runs = part.iter();
    while let Some(run) = runs.next_range() {
        let start = first.0 + u64::from(*run.start());
        let last = first.0 + u64::from(*run.end());
        whole.insert_range(start..last.saturating_add(1).min(end).max(start));
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn through_parts(blocks: &RoaringTreemap, size: ByteCount) -> (usize, RoaringTreemap) {
        let (mut count, mut whole) = (0, RoaringTreemap::new());
        for message in Reading::parts(7, blocks) {
            let Reading::Blocks { id: 7, first, blocks } = message else { panic!("{message:?}") };
            assert!(first.0.is_multiple_of(BLOCKS_PER_PART) && !blocks.is_empty());
            assert!(u64::from(blocks.max().unwrap()) < BLOCKS_PER_PART);
            collect_part(&mut whole, first, &blocks, size);
            count += 1;
        }
        (count, whole)
    }

    #[test]
    fn blocks_come_back_from_their_parts() {
        let huge = ByteCount(1 << 60);
        let mut blocks: RoaringTreemap = (0..3000_u64).map(|n| n * n * 977 % (1 << 40)).collect();
        blocks.insert_range(BLOCKS_PER_PART - 10..3 * BLOCKS_PER_PART + 5);
        blocks.insert_range((1 << 32) - 3..(1 << 32) + 3);
        assert_eq!(through_parts(&blocks, huge).1, blocks);
        assert_eq!(through_parts(&RoaringTreemap::new(), huge), (0, RoaringTreemap::new()));
        let ends: RoaringTreemap = [0, BLOCKS_PER_PART - 1, BLOCKS_PER_PART, 1 << 33].into_iter().collect();
        assert_eq!(through_parts(&ends, huge), (3, ends));
    }

    #[test]
    fn blocks_beyond_the_disk_count_for_nothing() {
        let mut blocks = RoaringTreemap::new();
        blocks.insert_range(0..BLOCKS_PER_PART * 2);
        let (_, whole) = through_parts(&blocks, ByteCount(10 * 4096 + 512));
        assert_eq!((whole.len(), whole.max()), (11, Some(10)));
    }
}
