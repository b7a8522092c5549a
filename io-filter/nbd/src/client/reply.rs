//! Replies in: simple ones, structured chunks and extended ones become the same [`Reply`]s.
//!
//! ```text
//! HEADER ─▶ Reply (nothing more to read)
//!   └─▶ PAYLOAD (data of a read, chunk) ─▶ Reply
//! ```
//!
//! Invariants: a reply names a request in flight; data and holes lie inside their read; no
//! payload is taken that is longer than the request allows.

use backtide_units::{ByteCount, ByteOffset, ByteRange};
use bytes::{Buf, Bytes};

use super::handshake::Session;
use crate::wire::{self, base_allocation, chunk, magic};
use crate::{Command, Cookie, Extent, Intake, NbdError, ProtocolError, ReplyStyle};

/// The longest chunk of extents that is taken, in bytes: two million extents.
const EXTENTS_MAX: u32 = 16 << 20;
/// The longest error chunk that is taken, in bytes: any text the specification allows.
const ERROR_MAX: u32 = 4 + 2 + wire::MAX_STRING as u32 + 8;

/// What the reply to a request in flight may look like.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Expected {
    /// Success or error, nothing else; of a request at this offset.
    Plain(ByteOffset),
    /// The bytes of this range.
    Read(ByteRange),
    /// Extents from this offset on.
    Extents(ByteOffset),
}

impl Expected {
    /// What `request` will be answered with.
    pub fn by(request: &Command) -> Self {
        let range = request.range();
        match request {
            Command::Read { .. } => Self::Read(range),
            Command::BlockStatus { .. } => Self::Extents(range.start()),
            Command::Write { .. }
            | Command::Flush
            | Command::Trim { .. }
            | Command::WriteZeroes { .. }
            | Command::Cache { .. } => Self::Plain(range.start()),
        }
    }

    /// Where the request begins.
    fn offset(self) -> ByteOffset {
        match self {
            Self::Plain(offset) | Self::Extents(offset) => offset,
            Self::Read(range) => range.start(),
        }
    }
}

/// A reply, or one chunk of it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Reply {
    /// Which request.
    pub cookie: Cookie,
    /// What it brings.
    pub content: Content,
    /// Nothing more will come for this request.
    pub last: bool,
}

/// What a reply, or a chunk of it, brings.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Content {
    /// Nothing: success, if no error came before.
    Nothing,
    /// Bytes read.
    Data {
        /// Where on the disk.
        offset: ByteOffset,
        /// The bytes.
        data: Bytes,
    },
    /// Bytes read, all zero.
    Hole(ByteRange),
    /// Extents of `base:allocation` from the request's offset on.
    Extents(Vec<Extent>),
    /// The request failed.
    Error {
        /// How.
        error: NbdError,
        /// The server's words; may be empty.
        text: String,
    },
}

#[derive(Clone, Copy, Debug)]
enum State {
    Header,
    SimpleData { cookie: Cookie, range: ByteRange },
    Chunk { cookie: Cookie, kind: u16, last: bool, length: u32, expected: Expected },
}

/// Reads the replies of one connection.
#[derive(Debug)]
pub struct ReplyParser {
    state: State,
    style: ReplyStyle,
    context: Option<u32>,
}

impl ReplyParser {
    /// For the transmission phase of `session`.
    pub fn new(session: &Session) -> Self {
        Self { state: State::Header, style: session.style, context: session.base_allocation }
    }

    /// The next reply, or `None` when more bytes have to be read. `in_flight` tells what a
    /// cookie's request expects, `None` for a cookie that is not in flight.
    ///
    /// # Errors
    /// When the server breaks the protocol; the connection is of no more use.
    pub fn next(
        &mut self,
        intake: &mut Intake,
        in_flight: impl Fn(Cookie) -> Option<Expected>,
    ) -> Result<Option<Reply>, ProtocolError> {
        loop {
            match self.state {
                State::Header => match self.take_header(intake, &in_flight)? {
                    Taken::Nothing => return Ok(None),
                    Taken::Reply(reply) => return Ok(Some(reply)),
                    Taken::Awaits(state) => self.state = state,
                },
                State::SimpleData { cookie, range } => {
                    let Some(data) = intake.take(range.count().0 as usize) else {
                        return Ok(None);
                    };
                    self.state = State::Header;
                    let content = Content::Data { offset: range.start(), data };
                    return Ok(Some(Reply { cookie, content, last: true }));
                }
                State::Chunk { cookie, kind, last, length, expected } => {
                    let Some(payload) = intake.take(length as usize) else {
                        return Ok(None);
                    };
                    self.state = State::Header;
                    let content = self.chunk_content(kind, payload, expected)?;
                    return Ok(Some(Reply { cookie, content, last }));
                }
            }
        }
    }

    fn take_header(
        &self,
        intake: &mut Intake,
        in_flight: impl Fn(Cookie) -> Option<Expected>,
    ) -> Result<Taken, ProtocolError> {
        let mut bytes = intake.buffered();
        if bytes.len() < wire::SIMPLE_HEADER {
            return Ok(Taken::Nothing);
        }
        let found = bytes.get_u32();
        if found == magic::SIMPLE_REPLY && self.style != ReplyStyle::Extended {
            let (error, cookie) = (bytes.get_u32(), Cookie(bytes.get_u64()));
            intake.consume(wire::SIMPLE_HEADER);
            let expected = in_flight(cookie).ok_or(ProtocolError::UnknownCookie(cookie.0))?;
            return self.simple(cookie, error, expected);
        }
        let (chunk_magic, header) = match self.style {
            ReplyStyle::Simple => (magic::SIMPLE_REPLY, wire::SIMPLE_HEADER),
            ReplyStyle::Structured => (magic::STRUCTURED_REPLY, wire::CHUNK_HEADER),
            ReplyStyle::Extended => (magic::EXTENDED_REPLY, wire::EXTENDED_HEADER),
        };
        if found != chunk_magic {
            let (expected, found) = (u64::from(chunk_magic), u64::from(found));
            return Err(ProtocolError::BadMagic { message: "a reply", expected, found });
        }
        if intake.buffered().len() < header {
            return Ok(Taken::Nothing);
        }
        let (flags, kind) = (bytes.get_u16(), bytes.get_u16());
        let cookie = Cookie(bytes.get_u64());
        let expected = in_flight(cookie).ok_or(ProtocolError::UnknownCookie(cookie.0))?;
        let length = if self.style == ReplyStyle::Extended {
            if ByteOffset(bytes.get_u64()) != expected.offset() {
                return Err(ProtocolError::WrongChunk("another offset than the request's"));
            }
            bytes.get_u64()
        } else {
            u64::from(bytes.get_u32())
        };
        intake.consume(header);
        let length = check_chunk(self.style, kind, length, expected)?;
        let last = flags & chunk::FLAG_DONE != 0;
        Ok(Taken::Awaits(State::Chunk { cookie, kind, last, length, expected }))
    }

    fn simple(&self, cookie: Cookie, error: u32, expected: Expected) -> Result<Taken, ProtocolError> {
        let content = match (NbdError::from_code(error), expected) {
            (Some(error), _) => Content::Error { error, text: String::new() },
            (None, Expected::Plain(_)) => Content::Nothing,
            (None, Expected::Read(range)) if self.style == ReplyStyle::Simple => {
                return Ok(Taken::Awaits(State::SimpleData { cookie, range }));
            }
            (None, Expected::Read(_) | Expected::Extents(_)) => {
                return Err(ProtocolError::WrongChunk("a simple reply where chunks are due"));
            }
        };
        Ok(Taken::Reply(Reply { cookie, content, last: true }))
    }

    fn chunk_content(
        &self,
        kind: u16,
        mut payload: Bytes,
        expected: Expected,
    ) -> Result<Content, ProtocolError> {
        let malformed = |_| ProtocolError::Malformed("reply chunk");
        if kind & chunk::ERROR_BIT != 0 {
            let code = payload.try_get_u32().map_err(malformed)?;
            let length = usize::from(payload.try_get_u16().map_err(malformed)?);
            let text = payload.get(..length).ok_or(ProtocolError::Malformed("error chunk"))?;
            let text = String::from_utf8_lossy(text).into_owned();
            let error = NbdError::from_code(code).ok_or(ProtocolError::Malformed("error chunk"))?;
            return Ok(Content::Error { error, text });
        }
        match kind {
            chunk::NONE => Ok(Content::Nothing),
            chunk::OFFSET_DATA => {
                let offset = ByteOffset(payload.try_get_u64().map_err(malformed)?);
                inside(expected, ByteRange::new(offset, ByteCount::of(&payload)))?;
                Ok(Content::Data { offset, data: payload })
            }
            chunk::OFFSET_HOLE => {
                let offset = ByteOffset(payload.try_get_u64().map_err(malformed)?);
                let length = payload.try_get_u32().map_err(malformed)?;
                inside(expected, ByteRange::new(offset, ByteCount(u64::from(length)))).map(Content::Hole)
            }
            // The kinds were checked with the header; only extents are left.
            _ => self.extents(payload),
        }
    }

    fn extents(&self, mut payload: Bytes) -> Result<Content, ProtocolError> {
        let malformed = ProtocolError::Malformed("list of extents");
        let context = payload.try_get_u32().map_err(|_| ProtocolError::Malformed("extents"))?;
        if Some(context) != self.context {
            return Err(ProtocolError::WrongChunk("extents of a context that was not chosen"));
        }
        let wide = self.style == ReplyStyle::Extended;
        if wide && payload.try_get_u32().ok().map(|count| count as usize) != Some(payload.len() / 16) {
            return Err(ProtocolError::Malformed("count of extents"));
        }
        let mut extents = Vec::with_capacity(payload.len() / if wide { 16 } else { 8 });
        while payload.has_remaining() {
            // The chunk's length was checked to be whole extents.
            let (length, flags) = if wide {
                (payload.get_u64(), payload.get_u64())
            } else {
                (u64::from(payload.get_u32()), u64::from(payload.get_u32()))
            };
            // The contexts of `base:` have 32 bits of flags.
            if length == 0 || flags > u64::from(u32::MAX) {
                return Err(malformed);
            }
            extents.push(Extent {
                length: ByteCount(length),
                hole: flags & u64::from(base_allocation::HOLE) != 0,
                zero: flags & u64::from(base_allocation::ZERO) != 0,
            });
        }
        if extents.is_empty() { Err(malformed) } else { Ok(Content::Extents(extents)) }
    }
}

enum Taken {
    Nothing,
    Reply(Reply),
    Awaits(State),
}

/// The length of a chunk's payload, if this kind and length can answer the request; judged
/// before any of it is read.
fn check_chunk(style: ReplyStyle, kind: u16, length: u64, expected: Expected) -> Result<u32, ProtocolError> {
    let fits = |limit: u64| match u32::try_from(length) {
        Ok(taken) if length <= limit => Ok(taken),
        Ok(_) | Err(_) => Err(ProtocolError::TooLong { what: "a reply chunk", found: length, limit }),
    };
    if kind & chunk::ERROR_BIT != 0 {
        return fits(u64::from(ERROR_MAX));
    }
    let (extents, head, each) = match style {
        ReplyStyle::Simple | ReplyStyle::Structured => (chunk::BLOCK_STATUS, 4, 8),
        ReplyStyle::Extended => (chunk::BLOCK_STATUS_EXT, 8, 16),
    };
    match (kind, expected) {
        (chunk::NONE, _) => fits(0),
        (chunk::OFFSET_DATA, Expected::Read(range)) if length > 8 => fits(range.count().0.saturating_add(8)),
        (chunk::OFFSET_HOLE, Expected::Read(_)) if length == 12 => fits(12),
        (kind, Expected::Extents(_)) if kind == extents && length % each == head => {
            fits(u64::from(EXTENTS_MAX))
        }
        (_, Expected::Plain(_)) => Err(ProtocolError::WrongChunk("data for a plain request")),
        (_, Expected::Read(_)) => Err(ProtocolError::WrongChunk("not what a read brings")),
        (_, Expected::Extents(_)) => Err(ProtocolError::WrongChunk("not what block status brings")),
    }
}

fn inside(expected: Expected, found: Option<ByteRange>) -> Result<ByteRange, ProtocolError> {
    match (expected, found) {
        (Expected::Read(range), Some(found)) if range.contains(found) && !found.is_empty() => Ok(found),
        (Expected::Read(_) | Expected::Plain(_) | Expected::Extents(_), _) => {
            Err(ProtocolError::WrongChunk("bytes outside the read"))
        }
    }
}
