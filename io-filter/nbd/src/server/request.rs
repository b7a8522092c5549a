//! Requests in: from bytes to commands that are already checked against the export.
//!
//! ```text
//! HEADER ─▶ WRITE ─▶ PAYLOAD ─▶ Incoming::Request
//!   ├─▶ contexts of a BLOCK_STATUS ─▶ FILTER ─▶ Incoming::Request, Refused
//!   ├─▶ a payload that is refused ─▶ SKIP it ─▶ Incoming::Refused
//!   ├─▶ anything else ─▶ Incoming::Request, Refused, Disconnect
//!   └─▶ no request at all ─▶ error: framing is lost, drop the connection
//! ```
//!
//! Which commands have a payload: WRITE, and with extended headers those with the flag
//! PAYLOAD_LEN, which says what the header's length counts.
//!
//! Invariants: a command that comes out lies inside the export, is aligned to its minimum block
//! size, is no longer than its maximum where it carries data, writes only to a writable export
//! and has only flags that were offered. The payload of a refused request is never kept.

use backtide_units::{ByteCount, ByteOffset, ByteRange};
use bytes::{Buf, Bytes};

use super::handshake::{Contexts, Session};
use super::option::{BASE_ALLOCATION_ID, DIRTY_BITMAP_ID};
use super::reply::{ReplyTo, Shape};
use crate::wire::{self, command, command_flag, magic};
use crate::{Command, Cookie, Intake, MAX_PAYLOAD, NbdError, ProtocolError, ReplyStyle, TransmissionFlags};

/// What a client sent.
#[derive(Debug, PartialEq, Eq)]
pub enum Incoming {
    /// Do this, and answer there.
    Request(ReplyTo, Command),
    /// Answer this error, for this reason; there is nothing to do.
    Refused(ReplyTo, NbdError, &'static str),
    /// The client is leaving: nothing more will come, finish what is in flight.
    Disconnect,
}

/// The payload of a BLOCK_STATUS that names the contexts it wants begins with the effect length; ids follow.
const FILTER_LENGTH: u64 = 8;
const FILTER_ID_LENGTH: u64 = 4;

#[derive(Clone, Copy, Debug)]
struct Header {
    /// Without PAYLOAD_LEN where that has been understood.
    flags: u16,
    kind: u16,
    cookie: Cookie,
    offset: ByteOffset,
    /// Of the payload if there is one, else what the request is about.
    length: ByteCount,
}

/// What is wrong with a request: the error, and a sentence for people.
type Fault = (NbdError, &'static str);

const FLAGS: Fault = (NbdError::Invalid, "the request has a flag that was not offered");
const NOT_OFFERED: Fault = (NbdError::Invalid, "the command was not offered");
const READ_ONLY: Fault = (NbdError::NotPermitted, "the export is read-only");
const MISALIGNED: Fault = (NbdError::Invalid, "the range is no multiple of the export's block size");
const CONTEXTS: Fault = (NbdError::Invalid, "a context is named that was not chosen, or twice");
const PAYLOAD: Fault = (NbdError::Invalid, "the command has no such payload");
const TOO_LONG: &str = "the range is longer than the largest payload";
const BEYOND: &str = "the range reaches beyond the end of the export";

#[derive(Clone, Copy, Debug)]
enum State {
    Header,
    Payload(Header),
    Filter(Header),
    Skip { to: ReplyTo, fault: Fault, remaining: u64 },
}

/// Reads the requests of one connection.
#[derive(Debug)]
pub struct RequestParser {
    state: State,
    style: ReplyStyle,
    size: ByteCount,
    flags: TransmissionFlags,
    contexts: Contexts,
    minimum_block: u32,
    maximum_length: u64,
}

impl RequestParser {
    /// For the transmission phase of `session`.
    pub fn new(session: &Session) -> Self {
        let sizes = session.export.block_sizes;
        assert!(sizes.minimum.is_power_of_two(), "a block size of {} bytes", sizes.minimum);
        Self {
            state: State::Header,
            style: session.style,
            size: session.export.size,
            flags: session.export.transmission_flags(session.style, session.contexts.any()),
            contexts: session.contexts,
            minimum_block: if session.export.serves_any_range { 1 } else { sizes.minimum },
            maximum_length: u64::from(sizes.maximum).min(MAX_PAYLOAD.0),
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
                    let Some(header) = self.take_header(intake)? else { return Ok(None) };
                    if let Some(incoming) = self.begin(header)? {
                        return Ok(Some(incoming));
                    }
                }
                State::Payload(header) => {
                    let Some(data) = intake.take(header.length.0 as usize) else {
                        return Ok(None);
                    };
                    self.state = State::Header;
                    return Ok(Some(header.into_write(data)));
                }
                State::Filter(header) => {
                    let Some(payload) = intake.take(header.length.0 as usize) else {
                        return Ok(None);
                    };
                    self.state = State::Header;
                    return Ok(Some(self.filtered(header, payload)));
                }
                State::Skip { to, fault: (error, why), remaining } => {
                    let there = usize::try_from(remaining).unwrap_or(usize::MAX);
                    let remaining = remaining - intake.discard(there) as u64;
                    if remaining > 0 {
                        self.state = State::Skip { to, fault: (error, why), remaining };
                        return Ok(None);
                    }
                    self.state = State::Header;
                    return Ok(Some(Incoming::Refused(to, error, why)));
                }
            }
        }
    }

    /// Whether the payload of a request is awaited: an end here cuts it off.
    pub fn is_inside(&self) -> bool {
        match self.state {
            State::Header => false,
            State::Payload(_) | State::Filter(_) | State::Skip { .. } => true,
        }
    }

    fn take_header(&self, intake: &mut Intake) -> Result<Option<Header>, ProtocolError> {
        let (header, length) = match self.style {
            ReplyStyle::Simple | ReplyStyle::Structured => {
                let Some(bytes) = intake.buffered().first_chunk() else { return Ok(None) };
                (Header::decode(bytes)?, wire::REQUEST_HEADER)
            }
            ReplyStyle::Extended => {
                let Some(bytes) = intake.buffered().first_chunk() else { return Ok(None) };
                (Header::decode_extended(bytes)?, wire::EXTENDED_HEADER)
            }
        };
        intake.consume(length);
        Ok(Some(header))
    }

    /// What a header begins: a request that is all there, or a state that awaits its payload.
    fn begin(&mut self, mut header: Header) -> Result<Option<Incoming>, ProtocolError> {
        // QEMU up to 10.0 sends its writes without the flag, though the specification wants it; what
        // follows them is a payload nevertheless.
        let mut has_payload = header.kind == command::WRITE;
        if self.style == ReplyStyle::Extended {
            has_payload |= header.flags & command_flag::PAYLOAD_LEN != 0;
            header.flags &= !command_flag::PAYLOAD_LEN;
        }
        if header.kind == command::DISC {
            return Ok(Some(Incoming::Disconnect));
        }
        if !has_payload {
            return Ok(Some(self.without_payload(header)));
        }
        if self.style == ReplyStyle::Extended && header.length.0 > self.maximum_length {
            // Nothing so long was ever to be sent; skipping could take forever.
            let (found, limit) = (header.length.0, self.maximum_length);
            return Err(ProtocolError::TooLong { what: "the payload of a request", found, limit });
        }
        let fault = if header.kind == command::WRITE {
            match self.check_write(header) {
                Ok(()) => {
                    self.state = State::Payload(header);
                    return Ok(None);
                }
                Err(fault) => fault,
            }
        } else if header.kind == command::BLOCK_STATUS
            && self.flags.block_status_payload()
            && [1, 2].iter().any(|ids| header.length.0 == FILTER_LENGTH + ids * FILTER_ID_LENGTH)
        {
            self.state = State::Filter(header);
            return Ok(None);
        } else {
            PAYLOAD
        };
        let to = header.reply_to(Shape::Plain);
        self.state = State::Skip { to, fault, remaining: header.length.0 };
        Ok(None)
    }

    /// A BLOCK_STATUS that names the contexts it wants.
    fn filtered(&self, header: Header, mut payload: Bytes) -> Incoming {
        let length = ByteCount(payload.get_u64());
        let mut contexts = Contexts::default();
        while payload.has_remaining() {
            let (named, chosen) = match payload.get_u32() {
                BASE_ALLOCATION_ID => (&mut contexts.base_allocation, self.contexts.base_allocation),
                DIRTY_BITMAP_ID => (&mut contexts.dirty_bitmap, self.contexts.dirty_bitmap),
                _ => return header.refused(Shape::Plain, CONTEXTS),
            };
            if !chosen || std::mem::replace(named, true) {
                return header.refused(Shape::Plain, CONTEXTS);
            }
        }
        self.in_contexts(Header { length, ..header }, contexts)
    }

    fn without_payload(&self, header: Header) -> Incoming {
        self.in_contexts(header, self.contexts)
    }

    fn in_contexts(&self, header: Header, contexts: Contexts) -> Incoming {
        let shape = match header.kind {
            command::READ => {
                Shape::Read { length: header.length, one_chunk: header.flags & command_flag::DF != 0 }
            }
            command::BLOCK_STATUS => {
                let one = header.flags & command_flag::REQ_ONE != 0;
                Shape::Status { length: header.length, one, contexts }
            }
            command::WRITE_ZEROES if header.flags & command_flag::FAST_ZERO != 0 => Shape::FastZero,
            _ => Shape::Plain,
        };
        match self.check(header) {
            Ok(command) => Incoming::Request(header.reply_to(shape), command),
            Err(fault) => header.refused(shape, fault),
        }
    }

    /// Checks a request without payload and says what it asks for.
    fn check(&self, header: Header) -> Result<Command, Fault> {
        let offset = header.offset;
        let length = header.length;
        let flag = |bit: u16| header.flags & bit != 0;
        let fua = flag(command_flag::FUA);
        match header.kind {
            command::READ => {
                let df = if self.flags.df() { command_flag::DF } else { 0 };
                self.check_flags(header, df)?;
                self.check_range(header, NbdError::Invalid)?;
                if length.0 > self.maximum_length {
                    // EOVERFLOW tells to ask for less at once; old clients do not know it.
                    let knows = self.style != ReplyStyle::Simple;
                    return Err((if knows { NbdError::Overflow } else { NbdError::Invalid }, TOO_LONG));
                }
                Ok(Command::Read { offset, length, one_chunk: flag(command_flag::DF) })
            }
            command::FLUSH => {
                self.check_flags(header, 0)?;
                self.offered(self.flags.flush())?;
                // Offset and length are reserved; a client that sets them means something else.
                if offset != ByteOffset::ZERO || length != ByteCount::ZERO {
                    return Err((NbdError::Invalid, "a flush has neither offset nor length"));
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
                self.offered(self.contexts.any())?;
                if length.0 == 0 {
                    return Err((NbdError::Invalid, "there is no status of no bytes"));
                }
                self.check_range(header, NbdError::Invalid)?;
                Ok(Command::BlockStatus { offset, length, one: flag(command_flag::REQ_ONE) })
            }
            // Among them RESIZE, which is not offered.
            _ => Err(NOT_OFFERED),
        }
    }

    fn check_write(&self, header: Header) -> Result<(), Fault> {
        self.check_flags(header, 0)?;
        self.check_writable()?;
        if header.length.0 > self.maximum_length {
            return Err((NbdError::Invalid, TOO_LONG));
        }
        self.check_range(header, NbdError::NoSpace)
    }

    /// FUA is allowed on every command once it was offered; where nothing is written it has no
    /// effect.
    fn check_flags(&self, header: Header, allowed: u16) -> Result<(), Fault> {
        let fua = if self.flags.fua() { command_flag::FUA } else { 0 };
        if header.flags & !(allowed | fua) == 0 { Ok(()) } else { Err(FLAGS) }
    }

    fn check_writable(&self) -> Result<(), Fault> {
        if self.flags.read_only() { Err(READ_ONLY) } else { Ok(()) }
    }

    fn offered(&self, offered: bool) -> Result<(), Fault> {
        if offered { Ok(()) } else { Err(NOT_OFFERED) }
    }

    /// Inside the export (else `beyond`) and aligned to its blocks.
    fn check_range(&self, header: Header, beyond: NbdError) -> Result<(), Fault> {
        let range = ByteRange::new(header.offset, header.length).ok_or((beyond, BEYOND))?;
        if range.end().0 > self.size.0 {
            return Err((beyond, BEYOND));
        }
        let mask = u64::from(self.minimum_block) - 1;
        // The last block of an export may be short.
        let end_aligned = range.end().0 & mask == 0 || range.end().0 == self.size.0;
        if header.offset.0 & mask == 0 && end_aligned { Ok(()) } else { Err(MISALIGNED) }
    }
}

impl Header {
    fn decode(bytes: &[u8; wire::REQUEST_HEADER]) -> Result<Self, ProtocolError> {
        let [head @ .., a, b, c, d] = bytes;
        Self::begin(head, magic::REQUEST, u64::from(u32::from_be_bytes([*a, *b, *c, *d])))
    }

    fn decode_extended(bytes: &[u8; wire::EXTENDED_HEADER]) -> Result<Self, ProtocolError> {
        let [head @ .., a, b, c, d, e, f, g, h] = bytes;
        Self::begin(head, magic::EXTENDED_REQUEST, u64::from_be_bytes([*a, *b, *c, *d, *e, *f, *g, *h]))
    }

    /// What both kinds of header begin with.
    #[inline]
    fn begin(bytes: &[u8; 24], expected: u32, length: u64) -> Result<Self, ProtocolError> {
        let u32_at = |at: usize| u32::from_be_bytes([bytes[at], bytes[at + 1], bytes[at + 2], bytes[at + 3]]);
        let u64_at = |at: usize| u64::from(u32_at(at)) << 32 | u64::from(u32_at(at + 4));
        let found = u32_at(0);
        if found != expected {
            let (expected, found) = (u64::from(expected), u64::from(found));
            return Err(ProtocolError::BadMagic { message: "a request", expected, found });
        }
        Ok(Self {
            flags: u16::from_be_bytes([bytes[4], bytes[5]]),
            kind: u16::from_be_bytes([bytes[6], bytes[7]]),
            cookie: Cookie(u64_at(8)),
            offset: ByteOffset(u64_at(16)),
            length: ByteCount(length),
        })
    }

    fn reply_to(self, shape: Shape) -> ReplyTo {
        ReplyTo { cookie: self.cookie, offset: self.offset, shape }
    }

    fn refused(self, shape: Shape, (error, why): Fault) -> Incoming {
        Incoming::Refused(self.reply_to(shape), error, why)
    }

    fn into_write(self, data: Bytes) -> Incoming {
        let fua = self.flags & command_flag::FUA != 0;
        let write = Command::Write { offset: self.offset, data, fua };
        Incoming::Request(self.reply_to(Shape::Plain), write)
    }
}
