//! Putting the chunks of one reply together.
//!
//! Invariants: a read succeeds only when its chunks bring each of its bytes exactly once; the parser has seen to it that
//! each lies inside the read. Block status comes in one chunk: there is one context.

use std::collections::BTreeMap;

use backtide_nbd::client::{Content, Expected};
use backtide_nbd::{Extent, NbdError, ProtocolError};
use backtide_units::{ByteOffset, ByteRange};
use bytes::{Bytes, BytesMut};

/// What a request brought.
#[derive(Debug)]
pub(super) enum Answer {
    /// Success.
    Done,
    /// The bytes of a read.
    Data(Bytes),
    /// Extents.
    Extents(Vec<Extent>),
    /// The server's error and its words.
    Refused(NbdError, String),
}

/// The chunks of one reply so far.
#[derive(Debug)]
pub(super) struct Gather {
    expected: Expected,
    data: Gathered,
    extents: Vec<Extent>,
    refused: Option<(NbdError, String)>,
}

#[derive(Debug)]
enum Gathered {
    Nothing,
    /// One chunk brought all: no copy.
    Whole(Bytes),
    Parts(Parts),
}

/// A read that comes in pieces, in whatever order.
#[derive(Debug)]
struct Parts {
    bytes: BytesMut,
    /// What has not come: from where to where.
    missing: BTreeMap<u64, u64>,
}

/// The most stretches of a read that may be missing between others. Servers send pieces in order, mostly.
const GAPS_MAX: usize = 64 << 10;

impl Parts {
    fn of(range: ByteRange) -> Self {
        let missing = BTreeMap::from([(range.start().0, range.end().0)]);
        Self { bytes: BytesMut::zeroed(range.count().0 as usize), missing }
    }

    /// A piece has come.
    fn came(&mut self, piece: ByteRange) -> Result<(), ProtocolError> {
        let (start, end) = (piece.start().0, piece.end().0);
        let gap = self.missing.range(..=start).next_back().map(|(from, to)| (*from, *to));
        let Some((from, to)) = gap.filter(|(_, to)| end <= *to) else {
            return Err(ProtocolError::Malformed("read: its chunks overlap"));
        };
        self.missing.remove(&from);
        for (from, to) in [(from, start), (end, to)] {
            if from < to {
                self.missing.insert(from, to);
            }
        }
        if self.missing.len() > GAPS_MAX {
            return Err(ProtocolError::Malformed("read: it is scattered over too many chunks"));
        }
        Ok(())
    }
}

impl Gather {
    pub(super) fn new(expected: Expected) -> Self {
        Self { expected, data: Gathered::Nothing, extents: Vec::new(), refused: None }
    }

    /// What the parser has to know about the request.
    pub(super) fn expected(&self) -> Expected {
        self.expected
    }

    /// Takes one chunk.
    pub(super) fn take(&mut self, content: Content) -> Result<(), ProtocolError> {
        match content {
            Content::Nothing => Ok(()),
            Content::Data { offset, data } => self.place(offset, data),
            Content::Hole(range) => {
                // The buffer is zeroed already.
                self.parts()?.came(range)
            }
            Content::Extents(_) if !self.extents.is_empty() => {
                Err(ProtocolError::Malformed("block status: it goes on after all its extents"))
            }
            Content::Extents(extents) => {
                self.extents = extents;
                Ok(())
            }
            Content::Error { error, text } => {
                // The first error tells most.
                self.refused.get_or_insert((error, text));
                Ok(())
            }
        }
    }

    /// The whole answer, after the last chunk.
    pub(super) fn finish(self) -> Result<Answer, ProtocolError> {
        if let Some((error, text)) = self.refused {
            return Ok(Answer::Refused(error, text));
        }
        match self.expected {
            Expected::Plain(_) => Ok(Answer::Done),
            Expected::Extents(_) if self.extents.is_empty() => {
                Err(ProtocolError::Malformed("block status: it has no extents"))
            }
            Expected::Extents(_) => Ok(Answer::Extents(self.extents)),
            Expected::Read(range) => match self.data {
                Gathered::Whole(data) => Ok(Answer::Data(data)),
                Gathered::Parts(Parts { bytes, missing }) if missing.is_empty() => {
                    Ok(Answer::Data(bytes.freeze()))
                }
                Gathered::Nothing if range.is_empty() => Ok(Answer::Data(Bytes::new())),
                Gathered::Nothing | Gathered::Parts(_) => {
                    Err(ProtocolError::Malformed("read: its chunks do not cover it"))
                }
            },
        }
    }

    fn place(&mut self, offset: ByteOffset, data: Bytes) -> Result<(), ProtocolError> {
        let range = self.range()?;
        if data.len() as u64 == range.count().0 && matches!(self.data, Gathered::Nothing) {
            self.data = Gathered::Whole(data);
            return Ok(());
        }
        let parts = self.parts()?;
        let start = (offset.0 - range.start().0) as usize;
        parts.bytes[start..start + data.len()].copy_from_slice(&data);
        parts.came(ByteRange::between(offset, ByteOffset(offset.0 + data.len() as u64)))
    }

    fn parts(&mut self) -> Result<&mut Parts, ProtocolError> {
        let range = self.range()?;
        if matches!(self.data, Gathered::Nothing) {
            self.data = Gathered::Parts(Parts::of(range));
        }
        match &mut self.data {
            Gathered::Parts(parts) => Ok(parts),
            Gathered::Nothing | Gathered::Whole(_) => {
                Err(ProtocolError::Malformed("read: it goes on after all its bytes"))
            }
        }
    }

    fn range(&self) -> Result<ByteRange, ProtocolError> {
        match self.expected {
            Expected::Read(range) => Ok(range),
            Expected::Plain(_) | Expected::Extents(_) => Err(ProtocolError::WrongChunk("data")),
        }
    }
}
