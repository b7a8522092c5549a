//! What the log holds: one enum, one variant per kind of entry.
//!
//! Versions: a guest write or zero has its LSN, pass data has the pass's *T*. Which bytes a disk has
//! at a point follows from versions alone, never from the order of arrival.

use backtide_units::{ByteCount, ByteRange, CaptureTime, DiskName, Epoch, Lsn, PayloadChecksum};
use bytes::Bytes;
use uuid::Uuid;

use crate::AttachFacts;

/// Largest payload of one entry: an NBD request of 32 MiB.
pub const PAYLOAD_MAX: ByteCount = ByteCount(32 << 20);

/// Largest text (reason, label, name) of one entry.
pub const TEXT_MAX: ByteCount = ByteCount(1024);

/// One entry of a disk's log.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Entry {
    /// A guest write.
    Write {
        /// Its position in the disk's history.
        lsn: Lsn,
        /// When it was captured.
        time: CaptureTime,
        /// Where; its length is the payload's.
        range: ByteRange,
        /// The bytes.
        payload: Bytes,
        /// CRC32C of the payload, computed where the write was captured.
        checksum: PayloadChecksum,
    },
    /// A guest write of zeroes, or a trim, after which the range reads as zeroes too.
    Zero {
        /// Its position in the disk's history.
        lsn: Lsn,
        /// When it was captured.
        time: CaptureTime,
        /// Where.
        range: ByteRange,
        /// Whether the guest discarded the range.
        trim: bool,
    },
    /// The guest flushed: everything up to `lsn` was on stable storage.
    Flush {
        /// The newest write the flush covers.
        lsn: Lsn,
        /// When it was captured.
        time: CaptureTime,
    },
    /// The disk had not changed since `lsn`: a time of which nobody wrote is a point too.
    Unchanged {
        /// Its newest change.
        lsn: Lsn,
        /// Until when.
        time: CaptureTime,
    },
    /// A resync pass begins: changes in `(gap_from, at]` are not in the log and come as pass data.
    PassBegin {
        /// The resync point T.
        at: Lsn,
        /// The newest LSN up to which the sender knows the log to be complete.
        gap_from: Lsn,
        /// When T was frozen.
        time: CaptureTime,
        /// Why the pass is needed.
        reason: PassReason,
    },
    /// Blocks as they were at T.
    PassData {
        /// The resync point T.
        at: Lsn,
        /// Where.
        range: ByteRange,
        /// The bytes.
        content: PassContent,
    },
    /// The pass has delivered everything.
    PassEnd {
        /// The resync point T.
        at: Lsn,
        /// From here on every LSN is a point again: T, or later when the pass was forfeited while
        /// records were forwarded. `None`: the pass moved data but gives no point.
        valid_from: Option<Lsn>,
        /// When it ended.
        time: CaptureTime,
    },
    /// A named point.
    Mark {
        /// The point.
        lsn: Lsn,
        /// When it was set.
        time: CaptureTime,
        /// Its name, up to [`TEXT_MAX`] bytes.
        label: String,
    },
    /// The disk was attached.
    Attach {
        /// Which attach this is.
        epoch: Epoch,
        /// Tells it from an attach with the same epoch by an agent with a copied state.
        attach: Uuid,
        /// The first LSN the agent gives.
        next_lsn: Lsn,
        /// The disk's size.
        size: ByteCount,
        /// The disk's name.
        name: DiskName,
        /// When.
        time: CaptureTime,
        /// What else is known of it.
        facts: AttachFacts,
    },
}

/// What pass data carries.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum PassContent {
    /// Bytes, with the CRC32C computed where they were read.
    Bytes {
        /// The bytes.
        payload: Bytes,
        /// CRC32C of the payload.
        checksum: PayloadChecksum,
    },
    /// The range read as zeroes.
    Zeroes,
}

/// Why a pass was needed: a code both sides know, and a sentence for people.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct PassReason {
    /// The stream protocol's code; the log only keeps it.
    pub code: u8,
    /// The sentence, up to [`TEXT_MAX`] bytes.
    pub text: String,
}

impl Entry {
    /// The payload of a data entry with its checksum.
    pub fn data(&self) -> Option<(&Bytes, &PayloadChecksum)> {
        match self {
            Self::Write { payload, checksum, .. }
            | Self::PassData { content: PassContent::Bytes { payload, checksum }, .. } => {
                Some((payload, checksum))
            }
            Self::PassData { content: PassContent::Zeroes, .. }
            | Self::Zero { .. }
            | Self::Flush { .. }
            | Self::Unchanged { .. }
            | Self::PassBegin { .. }
            | Self::PassEnd { .. }
            | Self::Mark { .. }
            | Self::Attach { .. } => None,
        }
    }

    /// Computes the checksums of pieces that a long payload needs and that did not come with it.
    ///
    /// # Errors
    /// The checksum that the payload has when it is not the one it was captured with.
    pub fn complete(mut self) -> Result<Self, u32> {
        if let Self::Write { payload, checksum, .. }
        | Self::PassData { content: PassContent::Bytes { payload, checksum }, .. } = &mut self
        {
            *checksum = std::mem::take(checksum).complete(payload)?;
        }
        Ok(self)
    }

    /// The version under which readers find this entry's bytes; `None` for entries without any.
    pub fn version(&self) -> Option<Lsn> {
        match self {
            Self::Write { lsn, .. } | Self::Zero { lsn, .. } => Some(*lsn),
            Self::PassData { at, .. } => Some(*at),
            Self::Flush { .. }
            | Self::Unchanged { .. }
            | Self::PassBegin { .. }
            | Self::PassEnd { .. }
            | Self::Mark { .. }
            | Self::Attach { .. } => None,
        }
    }

    /// Bytes of its payload.
    pub fn payload_length(&self) -> ByteCount {
        match self {
            Self::Write { payload, .. }
            | Self::PassData { content: PassContent::Bytes { payload, .. }, .. } => ByteCount::of(payload),
            Self::PassBegin { reason, .. } => ByteCount::of(reason.text.as_bytes()),
            Self::Mark { label, .. } => ByteCount::of(label.as_bytes()),
            Self::Attach { name, facts, .. } => ByteCount::of(&facts.encode(Uuid::nil(), name)),
            Self::Zero { .. }
            | Self::PassData { content: PassContent::Zeroes, .. }
            | Self::Flush { .. }
            | Self::Unchanged { .. }
            | Self::PassEnd { .. } => ByteCount::ZERO,
        }
    }
}
