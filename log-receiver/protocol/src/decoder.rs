//! Finds frames in a byte stream: the driver reads into [`Decoder::buffer`], then takes messages
//! until there is none.
//!
//! Holds at most one frame beyond what has been taken: a driver that stops reading stops growth.

use bytes::{Bytes, BytesMut};

use crate::{
    FRAME_HEADER_BYTES, PAYLOAD_BYTES_MAX, ProtocolError,
    frame::{self, Header},
    message::Sequenced,
};

/// Reads below this size would cost a system call for few frames.
const READ_BYTES: usize = 256 * 1024;

/// The receiving end of one direction of a connection.
#[derive(Debug)]
pub struct Decoder {
    buffer: BytesMut,
    /// The header of the frame whose payload is still arriving.
    header: Option<Header>,
    next_seq: u64,
    /// The longest payload taken.
    payload_bytes_max: u64,
    /// The stream is unusable after the first error.
    failed: bool,
}

impl Default for Decoder {
    fn default() -> Self {
        Self::new()
    }
}

impl Decoder {
    /// For a new connection: expects frame 1.
    pub fn new() -> Self {
        Self::limited(PAYLOAD_BYTES_MAX)
    }

    /// For a new connection whose peer has no reason to send longer payloads than this.
    pub fn limited(payload_bytes_max: u64) -> Self {
        Self { buffer: BytesMut::new(), header: None, next_seq: 1, payload_bytes_max, failed: false }
    }

    /// For frames that were kept: expects frame `seq`, with payloads of any length a frame may have.
    pub fn starting_at(seq: u64) -> Self {
        Self { next_seq: seq, ..Self::new() }
    }

    /// The peer has said who it is: from here on it may send payloads as long as this.
    pub fn limit(&mut self, payload_bytes_max: u64) {
        self.payload_bytes_max = payload_bytes_max;
    }

    /// How many bytes wait for the rest of their frame.
    pub fn unfinished(&self) -> usize {
        self.buffer.len() + self.header.map_or(0, |_| FRAME_HEADER_BYTES)
    }

    /// Where the driver appends what it read; there is room for a useful read, and for the rest of
    /// the frame that is arriving.
    pub fn buffer(&mut self) -> &mut BytesMut {
        let missing = match &self.header {
            Some(header) => (header.payload_bytes as usize).saturating_sub(self.buffer.len()),
            None => 0,
        };
        self.buffer.reserve(missing.max(READ_BYTES));
        &mut self.buffer
    }

    /// The next whole message, or `None` until more bytes are there.
    ///
    /// # Errors
    /// Whatever makes the stream unusable; the connection has to be closed then.
    ///
    /// # Panics
    /// When called again after an error.
    pub fn next_message(&mut self) -> Result<Option<Sequenced>, ProtocolError> {
        assert!(!self.failed, "a failed stream is not read on");
        let result = self.advance();
        self.failed = result.is_err();
        result
    }

    fn advance(&mut self) -> Result<Option<Sequenced>, ProtocolError> {
        let header = match self.header {
            Some(header) => header,
            None => {
                let Some(bytes) = self.buffer.first_chunk::<FRAME_HEADER_BYTES>() else { return Ok(None) };
                let header = Header::decode(bytes)?;
                if header.seq != self.next_seq {
                    return Err(ProtocolError::Sequence { expected: self.next_seq, found: header.seq });
                }
                if u64::from(header.payload_bytes) > self.payload_bytes_max {
                    let found = header.payload_bytes.into();
                    return Err(ProtocolError::TooLarge { found, limit: self.payload_bytes_max });
                }
                let _ = self.buffer.split_to(FRAME_HEADER_BYTES);
                self.header = Some(header);
                header
            }
        };
        if self.buffer.len() < header.payload_bytes as usize {
            return Ok(None);
        }
        let payload: Bytes = self.buffer.split_to(header.payload_bytes as usize).freeze();
        self.header = None;
        self.next_seq += 1;
        frame::decode(&header, payload).map(Some)
    }
}

#[cfg(test)]
mod tests;
