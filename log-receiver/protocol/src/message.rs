//! What the two sides say to each other.
//!
//! Order is meaning: the receiver applies the agent's messages in the order they come, so
//! "everything before this message" is well defined on both sides.

use backtide_units::{ByteRange, CaptureTime, LogPosition, Lsn, PayloadChecksum, Reason};
use bytes::Bytes;

use crate::{
    hello::{Closed, Hello, Welcome},
    reading::Reading,
};

/// One message of the stream.
#[derive(Clone, Debug, PartialEq)]
pub enum Message {
    /// Agent: who is there. The first frame, once.
    Hello(Hello),
    /// Receiver: the answer that accepts a hello.
    Welcome(Welcome),
    /// Agent: one guest write, zeroing or trim.
    Record(Record),
    /// Agent: the guest has flushed everything up to `lsn`.
    Flush {
        /// The last LSN the flush covers.
        lsn: Lsn,
        /// When it completed.
        time: CaptureTime,
    },
    /// Agent: the disk has not changed since `lsn`. Sent now and then by one in sync that is idle, so that a time
    /// of which nobody wrote is one that can be gone back to.
    Unchanged {
        /// Its newest change.
        lsn: Lsn,
        /// Until when.
        time: CaptureTime,
    },
    /// Agent: a resync pass frozen at `at` begins. Changes in `(gap_from, at]` are not in the log.
    PassBegin {
        /// The resync point T. Above every LSN used before.
        at: Lsn,
        /// The last LSN that is in the log without a gap.
        gap_from: Lsn,
        /// When T was.
        time: CaptureTime,
        /// Why there is a gap.
        reason: Reason,
    },
    /// Agent: bytes of the disk as they were at the pass's T.
    PassData {
        /// The resync point T.
        at: Lsn,
        /// Which bytes.
        range: ByteRange,
        /// Their content.
        data: Data,
    },
    /// Agent: the pass has delivered everything.
    PassEnd {
        /// The resync point T.
        at: Lsn,
        /// The first LSN that can be read back now; none when the pass moved data but gives no point.
        valid_from: Option<Lsn>,
        /// When the pass ended.
        time: CaptureTime,
    },
    /// Agent: a name for the state after `lsn`.
    Mark {
        /// The marked point.
        lsn: Lsn,
        /// When it was marked.
        time: CaptureTime,
        /// The name, at most [`LABEL_BYTES_MAX`] bytes.
        label: String,
    },
    /// Agent: are these bytes the same at yours?
    Compare(Compare),
    /// Receiver: the answer to a [`Compare`].
    CompareResult(CompareResult),
    /// Receiver: how far the agent's frames have come.
    Ack {
        /// Frames up to this sequence number are in memory.
        received: u64,
        /// Frames up to this sequence number survive power loss.
        durable: u64,
        /// As many entries of the disk's log do.
        position: LogPosition,
    },
    /// Agent: somebody waits for the frames before this one.
    Hasten {
        /// Whether to hear that they are durable; otherwise that they are in memory.
        durable: bool,
    },
    /// Either side: are you there? An agent's ping is acknowledged like any frame.
    Ping(Ping),
    /// Either side: the connection ends here, and why.
    Close(Closed),
    /// Either side, on a connection that reads a point and feeds no log.
    Reading(Reading),
}

impl Message {
    /// What kind of message it is, for people.
    pub fn name(&self) -> &'static str {
        match self {
            Self::Hello(_) => "hello",
            Self::Welcome(_) => "welcome",
            Self::Record(_) => "record",
            Self::Flush { .. } => "flush",
            Self::Unchanged { .. } => "unchanged",
            Self::PassBegin { .. } => "pass-begin",
            Self::PassData { .. } => "pass-data",
            Self::PassEnd { .. } => "pass-end",
            Self::Mark { .. } => "mark",
            Self::Compare(_) => "compare",
            Self::CompareResult(_) => "compare-result",
            Self::Ack { .. } => "ack",
            Self::Hasten { .. } => "hasten",
            Self::Ping(_) => "ping",
            Self::Close(_) => "close",
            Self::Reading(reading) => reading.name(),
        }
    }
}

/// The clocks of both sides, by which the receiver knows how the one differs that stamps what it keeps: it says what its own
/// shows, and the agent answers with that and how it stamps what happens now.
///
/// However long the two are under way, the answer was stamped between the moment that it came from and the one at
/// which it arrives.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Ping {
    /// The sender's clock; of an agent, the stamp that a change would get now. None where it does not say.
    pub sent: Option<CaptureTime>,
    /// The receiver's clock that this answers. None where it answers none.
    pub heard: Option<CaptureTime>,
}

/// The longest label of a mark, in bytes.
pub const LABEL_BYTES_MAX: usize = 256;

/// One guest write, zeroing or trim, with its place in the disk's history.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Record {
    /// Its LSN.
    pub lsn: Lsn,
    /// The LSN the log stands at before this record: shows the receiver that nothing is missing.
    pub previous: Lsn,
    /// When it completed locally.
    pub time: CaptureTime,
    /// Which bytes it changed.
    pub range: ByteRange,
    /// To what.
    pub body: RecordBody,
}

/// What a record did to its range.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum RecordBody {
    /// Wrote these bytes.
    Write(Data),
    /// Zeroed it and kept the space.
    Zero,
    /// Trimmed it: it reads as zeroes.
    Trim,
}

/// Bytes with the checksum they got where they were captured; both travel and are stored together,
/// so that damage anywhere between is found.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Data {
    bytes: Bytes,
    checksum: PayloadChecksum,
}

impl Data {
    /// Takes the checksum of `bytes` now.
    pub fn capture(bytes: Bytes) -> Self {
        let checksum = PayloadChecksum::captured(crc32c::crc32c(&bytes));
        Self { bytes, checksum }
    }

    /// Bytes whose checksum was verified just now, or will be by whoever reads them.
    pub fn with_checksum(bytes: Bytes, checksum: PayloadChecksum) -> Self {
        Self { bytes, checksum }
    }

    /// The bytes.
    pub fn bytes(&self) -> &Bytes {
        &self.bytes
    }

    /// Their CRC32C.
    pub fn crc32c(&self) -> u32 {
        self.checksum.whole()
    }

    /// Their CRC32C, and those of their pieces when the bytes were received and not captured here.
    pub fn checksum(&self) -> &PayloadChecksum {
        &self.checksum
    }

    /// Whether bytes and checksum agree.
    pub fn is_sound(&self) -> bool {
        crc32c::crc32c(&self.bytes) == self.checksum.whole()
    }
}

/// A question: which of these ranges hold something else at the receiver?
///
/// The receiver answers from the newest versions at or below `at`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Compare {
    /// Comes back in the answer.
    pub id: u64,
    /// The LSN to compare at.
    pub at: Lsn,
    /// At most [`COMPARE_ITEMS_MAX`] ranges.
    pub items: Vec<CompareItem>,
}

/// One range to compare.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct CompareItem {
    /// Which bytes.
    pub range: ByteRange,
    /// What the agent's disk holds there.
    pub content: Content,
}

/// What a compared range holds at the agent.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Content {
    /// Bytes with this BLAKE3; such a range has at most [`COMPARE_CHUNK_BYTES_MAX`] bytes.
    Hash([u8; 32]),
    /// Zeroes, at most [`COMPARE_ZEROES_BYTES_MAX`] bytes: the receiver answers from its extents where it can.
    Zeroes,
}

/// The most items of one [`Compare`].
pub const COMPARE_ITEMS_MAX: usize = 4096;

/// The longest range compared by its hash, in bytes.
pub const COMPARE_CHUNK_BYTES_MAX: u64 = 64 * 1024;

/// The longest range that is compared with zeroes, in bytes: what a receiver looks through for one question is bounded, whatever size
/// its disk is said to have.
pub const COMPARE_ZEROES_BYTES_MAX: u64 = 64 << 20;

/// Which items of a [`Compare`] differ.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct CompareResult {
    /// The question's id.
    pub id: u64,
    /// Positions in the question's items, ascending.
    pub differing: Vec<u32>,
}

/// A message with its place in its sender's stream: 1 for the first frame, then one more each.
#[derive(Clone, Debug, PartialEq)]
pub struct Sequenced {
    /// The sequence number.
    pub seq: u64,
    /// The message.
    pub message: Message,
}
