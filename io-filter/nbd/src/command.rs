//! What a request asks for, and the pieces of answers, apart from how they look on the wire.

use backtide_units::{ByteCount, ByteOffset, ByteRange};
use bytes::Bytes;

/// The client's name for a request; its reply repeats it.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Cookie(pub u64);

/// How the messages of a connection are framed, as the handshake settled it.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum ReplyStyle {
    /// Every reply is a simple one.
    #[default]
    Simple,
    /// READ and BLOCK_STATUS are answered in chunks.
    Structured,
    /// Extended headers: requests have lengths of 64 bits, everything is answered in chunks.
    Extended,
}

/// One request of the transmission phase.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Command {
    /// Read `length` bytes.
    Read {
        /// First byte.
        offset: ByteOffset,
        /// How many bytes.
        length: ByteCount,
        /// The answer must be a single chunk (DF).
        one_chunk: bool,
    },
    /// Write `data`.
    Write {
        /// First byte.
        offset: ByteOffset,
        /// The bytes to write.
        data: Bytes,
        /// Answer only when durable.
        fua: bool,
    },
    /// Make every write that was answered durable.
    Flush,
    /// Discard; afterwards the range may read as anything, with Backtide as zeroes.
    Trim {
        /// First byte.
        offset: ByteOffset,
        /// How many bytes.
        length: ByteCount,
        /// Answer only when durable.
        fua: bool,
    },
    /// Make the range read as zeroes.
    WriteZeroes {
        /// First byte.
        offset: ByteOffset,
        /// How many bytes.
        length: ByteCount,
        /// Answer only when durable.
        fua: bool,
        /// The range must stay allocated.
        no_hole: bool,
        /// Fail with [`NbdError::NotSupported`](crate::NbdError) rather than be slow.
        fast: bool,
    },
    /// Read ahead.
    Cache {
        /// First byte.
        offset: ByteOffset,
        /// How many bytes.
        length: ByteCount,
    },
    /// Tell which parts are holes or zeroes.
    BlockStatus {
        /// First byte.
        offset: ByteOffset,
        /// How many bytes.
        length: ByteCount,
        /// The first extent is enough.
        one: bool,
    },
}

/// The kind of a [`Command`], without its data.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum CommandKind {
    /// READ.
    Read,
    /// WRITE.
    Write,
    /// FLUSH.
    Flush,
    /// TRIM.
    Trim,
    /// WRITE_ZEROES.
    WriteZeroes,
    /// CACHE.
    Cache,
    /// BLOCK_STATUS.
    BlockStatus,
}

impl Command {
    /// What kind of request this is.
    pub fn kind(&self) -> CommandKind {
        match self {
            Self::Read { .. } => CommandKind::Read,
            Self::Write { .. } => CommandKind::Write,
            Self::Flush => CommandKind::Flush,
            Self::Trim { .. } => CommandKind::Trim,
            Self::WriteZeroes { .. } => CommandKind::WriteZeroes,
            Self::Cache { .. } => CommandKind::Cache,
            Self::BlockStatus { .. } => CommandKind::BlockStatus,
        }
    }

    /// Whether it is one of a client that writes: a change, or a flush.
    pub fn is_of_a_writer(&self) -> bool {
        match self {
            Self::Write { .. } | Self::Trim { .. } | Self::WriteZeroes { .. } | Self::Flush => true,
            Self::Read { .. } | Self::Cache { .. } | Self::BlockStatus { .. } => false,
        }
    }

    /// The bytes of the disk it is about: none for a flush.
    ///
    /// Commands of a [`RequestParser`](crate::server::RequestParser) are inside their export.
    ///
    /// # Panics
    /// When the range ends beyond `u64`, which only a command made by hand can.
    pub fn range(&self) -> ByteRange {
        let (offset, length) = match self {
            Self::Flush => (ByteOffset::ZERO, ByteCount::ZERO),
            Self::Write { offset, data, .. } => (*offset, ByteCount::of(data)),
            Self::Read { offset, length, .. }
            | Self::Trim { offset, length, .. }
            | Self::WriteZeroes { offset, length, .. }
            | Self::Cache { offset, length }
            | Self::BlockStatus { offset, length, .. } => (*offset, *length),
        };
        ByteRange::new(offset, length).expect("a command's range ends within u64")
    }
}

/// One run of the answer to BLOCK_STATUS, in the context `base:allocation`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Extent {
    /// How many bytes; extents follow each other without gaps.
    pub length: ByteCount,
    /// Not allocated.
    pub hole: bool,
    /// Reads as zeroes.
    pub zero: bool,
}

/// One run of the answer to BLOCK_STATUS, in a context `qemu:dirty-bitmap:`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct DirtyExtent {
    /// How many bytes; extents follow each other without gaps.
    pub length: ByteCount,
    /// They may have changed.
    pub dirty: bool,
}

impl Extent {
    /// Allocated bytes of unknown content.
    pub fn data(length: ByteCount) -> Self {
        Self { length, hole: false, zero: false }
    }

    /// Bytes that are not allocated and read as zeroes.
    pub fn hole(length: ByteCount) -> Self {
        Self { length, hole: true, zero: true }
    }

    /// Puts it behind the last of `extents`, joined with that when it is of the same kind. False when it is another one
    /// and there are `max` already.
    pub fn append_to(self, extents: &mut Vec<Self>, max: usize) -> bool {
        let full = extents.len() >= max;
        match extents.last_mut() {
            Some(last) if (last.hole, last.zero) == (self.hole, self.zero) => last.length.0 += self.length.0,
            Some(_) | None if full => return false,
            Some(_) | None => extents.push(self),
        }
        true
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn extents_of_one_kind_are_joined_also_where_there_is_no_room_for_another() {
        let mut extents = Vec::new();
        assert!(Extent::data(ByteCount(1)).append_to(&mut extents, 2));
        assert!(Extent::hole(ByteCount(2)).append_to(&mut extents, 2));
        assert!(Extent::hole(ByteCount(3)).append_to(&mut extents, 2));
        // Allocated zeroes are of another kind than a hole.
        assert!(!Extent { length: ByteCount(4), hole: false, zero: true }.append_to(&mut extents, 2));
        assert_eq!(extents, [Extent::data(ByteCount(1)), Extent::hole(ByteCount(5))]);
    }
}
