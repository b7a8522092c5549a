//! Requests in: from bytes to commands that are already checked against the export.
//!
//! ```text
//! HEADER ─▶ WRITE ─▶ PAYLOAD ─▶ Incoming::Request
//!   ├─▶ WRITE that is refused ─▶ SKIP its payload ─▶ Incoming::Refused
//!   ├─▶ anything else ─▶ Incoming::Request, Refused, Disconnect
//!   └─▶ no request at all ─▶ error: framing is lost, drop the connection
//! ```
//!
//! Invariants: a command that comes out lies inside the export, is aligned to its minimum block
//! size, is no longer than its maximum where it carries data, writes only to a writable export
//! and has only flags that were offered. The payload of a refused WRITE is never kept.

use backtide_units::{ByteCount, ByteOffset, ByteRange};
use bytes::Bytes;

use super::handshake::Session;
use super::reply::{ReplyTo, Shape};
use crate::wire::{self, command, command_flag, magic};
use crate::{Command, Cookie, Intake, MAX_PAYLOAD, NbdError, ProtocolError, TransmissionFlags};

/// What a client sent.
#[derive(Debug, PartialEq, Eq)]
pub enum Incoming {
    /// Do this, and answer there.
    Request(ReplyTo, Command),
    /// Answer this error; there is nothing to do.
    Refused(ReplyTo, NbdError),
    /// The client is leaving: nothing more will come, finish what is in flight.
    Disconnect,
}

#[derive(Clone, Copy, Debug)]
struct Header {
    flags: u16,
    kind: u16,
    cookie: Cookie,
    offset: ByteOffset,
    length: u32,
}

#[derive(Clone, Copy, Debug)]
enum State {
    Header,
    Payload(Header),
    Skip { to: ReplyTo, error: NbdError, remaining: usize },
}

/// Reads the requests of one connection.
#[derive(Debug)]
pub struct RequestParser {
    state: State,
    size: ByteCount,
    flags: TransmissionFlags,
    block_status: bool,
    minimum_block: u32,
    maximum_length: u32,
}

impl RequestParser {
    /// For the transmission phase of `session`.
    pub fn new(session: &Session) -> Self {
        let sizes = session.export.block_sizes;
        assert!(sizes.minimum.is_power_of_two(), "a block size of {} bytes", sizes.minimum);
        Self {
            state: State::Header,
            size: session.export.size,
            flags: session.export.transmission_flags(session.style),
            block_status: session.base_allocation,
            minimum_block: sizes.minimum,
            maximum_length: sizes.maximum.min(MAX_PAYLOAD.0 as u32),
        }
    }

    /// The next request, or `None` when more bytes have to be read.
    ///
    /// # Errors
    /// When the bytes are no request; the connection has to be dropped.
    pub fn next(&mut self, intake: &mut Intake) -> Result<Option<Incoming>, ProtocolError> {
        loop {
            match self.state {
                State::Header => {
                    let Some(bytes) = intake.buffered().first_chunk() else {
                        return Ok(None);
                    };
                    let header = Header::decode(bytes)?;
                    intake.consume(wire::REQUEST_HEADER);
                    if header.kind != command::WRITE {
                        return Ok(Some(self.without_payload(header)));
                    }
                    self.state = match self.check_write(header) {
                        Ok(()) => State::Payload(header),
                        Err(error) => State::Skip {
                            to: header.reply_to(Shape::Plain),
                            error,
                            remaining: header.length as usize,
                        },
                    };
                }
                State::Payload(header) => {
                    let Some(data) = intake.take(header.length as usize) else {
                        return Ok(None);
                    };
                    self.state = State::Header;
                    return Ok(Some(header.into_write(data)));
                }
                State::Skip { to, error, remaining } => {
                    let remaining = remaining - intake.discard(remaining);
                    if remaining > 0 {
                        self.state = State::Skip { to, error, remaining };
                        return Ok(None);
                    }
                    self.state = State::Header;
                    return Ok(Some(Incoming::Refused(to, error)));
                }
            }
        }
    }

    /// Whether the payload of a request is awaited: an end here cuts it off.
    pub fn is_inside(&self) -> bool {
        match self.state {
            State::Header => false,
            State::Payload(_) | State::Skip { .. } => true,
        }
    }

    fn without_payload(&self, header: Header) -> Incoming {
        let shape = match header.kind {
            command::READ => Shape::Read { offset: header.offset, length: header.length },
            command::BLOCK_STATUS => {
                Shape::Status { length: header.length, one: header.flags & command_flag::REQ_ONE != 0 }
            }
            command::DISC => return Incoming::Disconnect,
            _ => Shape::Plain,
        };
        let to = header.reply_to(shape);
        match self.check(header) {
            Ok(command) => Incoming::Request(to, command),
            Err(error) => Incoming::Refused(to, error),
        }
    }

    /// Checks a request without payload and says what it asks for.
    fn check(&self, header: Header) -> Result<Command, NbdError> {
        let offset = header.offset;
        let length = ByteCount(u64::from(header.length));
        let flag = |bit: u16| header.flags & bit != 0;
        let fua = flag(command_flag::FUA);
        match header.kind {
            command::READ => {
                let df = if self.flags.df() { command_flag::DF } else { 0 };
                self.check_flags(header, df)?;
                self.check_range(header, NbdError::Invalid)?;
                if header.length > self.maximum_length {
                    let one_chunk = flag(command_flag::DF);
                    return Err(if one_chunk { NbdError::Overflow } else { NbdError::Invalid });
                }
                Ok(Command::Read { offset, length, one_chunk: flag(command_flag::DF) })
            }
            command::FLUSH => {
                self.check_flags(header, 0)?;
                self.offered(self.flags.flush())?;
                // Offset and length are reserved; a client that sets them means something else.
                if offset != ByteOffset::ZERO || header.length != 0 {
                    return Err(NbdError::Invalid);
                }
                Ok(Command::Flush)
            }
            command::TRIM => {
                self.check_flags(header, 0)?;
                self.check_writable()?;
                self.offered(self.flags.trim())?;
                self.check_range(header, NbdError::Invalid)?;
                Ok(Command::Trim { offset, length, fua })
            }
            command::WRITE_ZEROES => {
                let fast = if self.flags.fast_zero() { command_flag::FAST_ZERO } else { 0 };
                self.check_flags(header, command_flag::NO_HOLE | fast)?;
                self.check_writable()?;
                self.offered(self.flags.write_zeroes())?;
                self.check_range(header, NbdError::NoSpace)?;
                let no_hole = flag(command_flag::NO_HOLE);
                let fast = flag(command_flag::FAST_ZERO);
                Ok(Command::WriteZeroes { offset, length, fua, no_hole, fast })
            }
            command::CACHE => {
                self.check_flags(header, 0)?;
                self.offered(self.flags.cache())?;
                self.check_range(header, NbdError::Invalid)?;
                Ok(Command::Cache { offset, length })
            }
            command::BLOCK_STATUS => {
                self.check_flags(header, command_flag::REQ_ONE)?;
                self.offered(self.block_status && header.length > 0)?;
                self.check_range(header, NbdError::Invalid)?;
                Ok(Command::BlockStatus { offset, length, one: flag(command_flag::REQ_ONE) })
            }
            _ => Err(NbdError::Invalid),
        }
    }

    fn check_write(&self, header: Header) -> Result<(), NbdError> {
        self.check_flags(header, 0)?;
        self.check_writable()?;
        if header.length > self.maximum_length {
            return Err(NbdError::Invalid);
        }
        self.check_range(header, NbdError::NoSpace)
    }

    /// FUA is allowed on every command once it was offered; where nothing is written it has no
    /// effect.
    fn check_flags(&self, header: Header, allowed: u16) -> Result<(), NbdError> {
        let fua = if self.flags.fua() { command_flag::FUA } else { 0 };
        if header.flags & !(allowed | fua) == 0 { Ok(()) } else { Err(NbdError::Invalid) }
    }

    fn check_writable(&self) -> Result<(), NbdError> {
        if self.flags.read_only() { Err(NbdError::NotPermitted) } else { Ok(()) }
    }

    fn offered(&self, offered: bool) -> Result<(), NbdError> {
        if offered { Ok(()) } else { Err(NbdError::Invalid) }
    }

    /// Inside the export (else `beyond`) and aligned to its blocks.
    fn check_range(&self, header: Header, beyond: NbdError) -> Result<(), NbdError> {
        let length = ByteCount(u64::from(header.length));
        let range = ByteRange::new(header.offset, length).ok_or(beyond)?;
        if range.end().0 > self.size.0 {
            return Err(beyond);
        }
        let mask = u64::from(self.minimum_block) - 1;
        // The last block of an export may be short.
        let end_aligned = range.end().0 & mask == 0 || range.end().0 == self.size.0;
        if header.offset.0 & mask == 0 && end_aligned { Ok(()) } else { Err(NbdError::Invalid) }
    }
}

impl Header {
    fn decode(bytes: &[u8; wire::REQUEST_HEADER]) -> Result<Self, ProtocolError> {
        let u32_at = |at: usize| u32::from_be_bytes([bytes[at], bytes[at + 1], bytes[at + 2], bytes[at + 3]]);
        let u64_at = |at: usize| u64::from(u32_at(at)) << 32 | u64::from(u32_at(at + 4));
        if u32_at(0) != magic::REQUEST {
            return Err(ProtocolError::BadMagic {
                message: "a request",
                expected: u64::from(magic::REQUEST),
                found: u64::from(u32_at(0)),
            });
        }
        Ok(Self {
            flags: u16::from_be_bytes([bytes[4], bytes[5]]),
            kind: u16::from_be_bytes([bytes[6], bytes[7]]),
            cookie: Cookie(u64_at(8)),
            offset: ByteOffset(u64_at(16)),
            length: u32_at(24),
        })
    }

    fn reply_to(self, shape: Shape) -> ReplyTo {
        ReplyTo { cookie: self.cookie, shape }
    }

    fn into_write(self, data: Bytes) -> Incoming {
        let fua = self.flags & command_flag::FUA != 0;
        let write = Command::Write { offset: self.offset, data, fua };
        Incoming::Request(self.reply_to(Shape::Plain), write)
    }
}
