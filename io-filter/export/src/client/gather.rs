//! Putting the chunks of one reply together.
//!
//! Invariant: a read succeeds only when its chunks bring exactly as many bytes as it asked for;
//! the parser has seen to it that each lies inside the read.

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
    Parts {
        bytes: BytesMut,
        received: u64,
    },
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
                let (bytes, received) = self.parts()?;
                // The buffer is zeroed already; the sum of all chunks has the last word.
                debug_assert!(range.count().0 <= bytes.len() as u64);
                *received += range.count().0;
                Ok(())
            }
            Content::Extents(extents) => {
                self.extents.extend(extents);
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
                Gathered::Parts { bytes, received } if received == range.count().0 => {
                    Ok(Answer::Data(bytes.freeze()))
                }
                Gathered::Nothing if range.is_empty() => Ok(Answer::Data(Bytes::new())),
                Gathered::Nothing | Gathered::Parts { .. } => {
                    Err(ProtocolError::Malformed("read: its chunks do not cover it once"))
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
        let (bytes, received) = self.parts()?;
        let start = (offset.0 - range.start().0) as usize;
        bytes[start..start + data.len()].copy_from_slice(&data);
        *received += data.len() as u64;
        Ok(())
    }

    fn parts(&mut self) -> Result<(&mut BytesMut, &mut u64), ProtocolError> {
        let length = self.range()?.count().0 as usize;
        if matches!(self.data, Gathered::Nothing) {
            self.data = Gathered::Parts { bytes: BytesMut::zeroed(length), received: 0 };
        }
        match &mut self.data {
            Gathered::Parts { bytes, received } => Ok((bytes, received)),
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
