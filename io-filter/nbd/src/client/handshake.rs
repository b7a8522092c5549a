//! The client's handshake: from the server's greeting to transmission, or to a list of exports.
//!
//! ```text
//! GREETING ─▶ EXTENDED_HEADERS ─▶ SET_META_CONTEXT ─▶ GO ─▶ Step::Transmission
//!    │           │                       ▲             ▲ │
//!    │           └─ no ─▶ STRUCTURED_REPLY ─ no ───────┘ │
//!    │                                                   └─ unknown ─▶ EXPORT_NAME ─▶ Transmission
//!    ├─ server without fixed newstyle ────────────────────────────▶ EXPORT_NAME
//!    └─ the goal is a list ─▶ LIST ─▶ Step::Listed
//! ```
//!
//! Where TLS is wanted, STARTTLS goes before all of it, and nothing else is ever sent without.
//!
//! Invariants: one option is out at a time; an answer of more than [`ANSWER_MAX`] bytes and a
//! list of more than [`LIST_MAX`] exports are errors.

use backtide_units::ByteCount;
use bytes::{Buf, BufMut, BytesMut};

use crate::wire::{self, base_allocation, handshake_flag, info, magic, option, option_reply};
use crate::{BlockSizes, ExportSummary, Intake, ProtocolError, ReplyStyle, TransmissionFlags};

/// The longest answer to an option that is taken, in bytes.
const ANSWER_MAX: u32 = 32 << 10;
/// The longest list of exports that is taken.
const LIST_MAX: usize = 10_000;

/// What the client wants.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Goal {
    /// Use the export of this name.
    Open(String),
    /// Learn which exports there are.
    List,
}

/// What the handshake has settled.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Session {
    /// The export's size.
    pub size: ByteCount,
    /// What it can do.
    pub flags: TransmissionFlags,
    /// How replies are framed.
    pub style: ReplyStyle,
    /// The id of `base:allocation`, if BLOCK_STATUS may be asked.
    pub base_allocation: Option<u32>,
    /// Block size constraints; the defaults when the server announced none. The maximum is at
    /// most [`MAX_PAYLOAD`](crate::MAX_PAYLOAD).
    pub block_sizes: BlockSizes,
}

/// What comes next.
#[derive(Debug, PartialEq, Eq)]
pub enum Step {
    /// Send the output, then read more.
    NeedMore,
    /// Go on under TLS and tell [`Handshake::tls_started`], then ask again.
    StartTls,
    /// The handshake is done: send the output, then requests.
    Transmission(Session),
    /// The server's exports: send the output, then close.
    Listed(Vec<ExportSummary>),
}

#[derive(Clone, Copy, Debug)]
enum State {
    Greeting,
    /// The driver is about to start TLS.
    StartingTls,
    /// An answer to this option is awaited.
    Answer(u32),
    /// The bare answer to EXPORT_NAME is awaited.
    ExportName,
}

/// The client's side of one connection's handshake.
#[derive(Debug)]
pub struct Handshake {
    goal: Goal,
    state: State,
    tls: bool,
    no_zeroes: bool,
    style: ReplyStyle,
    base_allocation: Option<u32>,
    described: Option<(ByteCount, TransmissionFlags)>,
    block_sizes: BlockSizes,
    listed: Vec<ExportSummary>,
}

impl Handshake {
    /// Begins a handshake; the server speaks first.
    pub fn new(goal: Goal) -> Self {
        Self {
            goal,
            state: State::Greeting,
            tls: false,
            no_zeroes: false,
            style: ReplyStyle::Simple,
            base_allocation: None,
            described: None,
            block_sizes: BlockSizes::default(),
            listed: Vec::new(),
        }
    }

    /// The same, under TLS or not at all.
    pub fn with_tls(goal: Goal) -> Self {
        Self { tls: true, ..Self::new(goal) }
    }

    /// From here on everything travels under TLS: what comes first is appended to `out`.
    ///
    /// # Panics
    /// When TLS was not about to start.
    pub fn tls_started(&mut self, out: &mut BytesMut) {
        assert!(matches!(self.state, State::StartingTls), "TLS was started unasked");
        self.first_option(out);
    }

    /// Takes what it can from `intake`, appends what has to be sent to `out`.
    ///
    /// # Errors
    /// When the server refuses the goal or breaks the protocol.
    pub fn step(&mut self, intake: &mut Intake, out: &mut BytesMut) -> Result<Step, ProtocolError> {
        loop {
            let step = match self.state {
                State::Greeting => self.take_greeting(intake, out)?,
                State::StartingTls => return Ok(Step::StartTls),
                State::Answer(sent) => self.take_answer(sent, intake, out)?,
                State::ExportName => self.take_export_name(intake)?,
            };
            if let Some(step) = step {
                return Ok(step);
            }
        }
    }

    fn take_greeting(
        &mut self,
        intake: &mut Intake,
        out: &mut BytesMut,
    ) -> Result<Option<Step>, ProtocolError> {
        let mut bytes = intake.buffered();
        // The magic numbers are judged as soon as they are there: a peer that is no NBD server
        // may never send more.
        let Ok(server) = bytes.try_get_u64() else { return Ok(Some(Step::NeedMore)) };
        check_magic("an NBD server", magic::SERVER, server)?;
        let Ok(style) = bytes.try_get_u64() else { return Ok(Some(Step::NeedMore)) };
        if style == magic::OLDSTYLE {
            return Err(ProtocolError::Oldstyle);
        }
        check_magic("a newstyle NBD server", magic::OPTION, style)?;
        let Ok(flags) = bytes.try_get_u16() else { return Ok(Some(Step::NeedMore)) };
        intake.consume(8 + 8 + 2);

        self.no_zeroes = flags & handshake_flag::NO_ZEROES != 0;
        let known = handshake_flag::FIXED_NEWSTYLE | handshake_flag::NO_ZEROES;
        out.put_u32(u32::from(flags & known));
        let fixed = flags & handshake_flag::FIXED_NEWSTYLE != 0;
        match &self.goal {
            Goal::Open(_) | Goal::List if self.tls && fixed => self.send(option::STARTTLS, &[], out),
            Goal::Open(_) | Goal::List if self.tls => {
                return Err(ProtocolError::TlsRefused("it knows no options".to_owned()));
            }
            Goal::Open(_) | Goal::List if fixed => self.first_option(out),
            Goal::Open(_) => self.send_export_name(out),
            Goal::List => {
                return Err(refused("to list its exports", "it knows no options"));
            }
        }
        Ok(None)
    }

    fn first_option(&mut self, out: &mut BytesMut) {
        match &self.goal {
            Goal::Open(_) => self.send(option::EXTENDED_HEADERS, &[], out),
            Goal::List => self.send(option::LIST, &[], out),
        }
    }

    fn take_answer(
        &mut self,
        sent: u32,
        intake: &mut Intake,
        out: &mut BytesMut,
    ) -> Result<Option<Step>, ProtocolError> {
        let mut bytes = intake.buffered();
        if bytes.len() < wire::OPTION_REPLY_HEADER {
            return Ok(Some(Step::NeedMore));
        }
        check_magic("an option reply", magic::OPTION_REPLY, bytes.get_u64())?;
        let (option, reply, length) = (bytes.get_u32(), bytes.get_u32(), bytes.get_u32());
        if option != sent {
            return Err(ProtocolError::Malformed("option reply: it answers another option"));
        }
        if length > ANSWER_MAX {
            let (found, limit) = (u64::from(length), u64::from(ANSWER_MAX));
            return Err(ProtocolError::TooLong { what: "an option reply", found, limit });
        }
        let Some(data) = bytes.get(..length as usize) else {
            return Ok(Some(Step::NeedMore));
        };
        let data = data.to_vec();
        intake.consume(wire::OPTION_REPLY_HEADER + data.len());
        if reply == option_reply::ERR_TLS_REQD {
            return Err(ProtocolError::TlsRequired);
        }
        match sent {
            option::STARTTLS if reply == option_reply::ACK && intake.buffered().is_empty() => {
                self.state = State::StartingTls;
            }
            option::STARTTLS if reply == option_reply::ACK => {
                return Err(ProtocolError::ServerDataBeforeTls);
            }
            option::STARTTLS => return Err(ProtocolError::TlsRefused(explain(reply, &data))),
            option::EXTENDED_HEADERS => match reply {
                option_reply::ACK => self.chunks_granted(ReplyStyle::Extended, out),
                _ => self.send(option::STRUCTURED_REPLY, &[], out),
            },
            option::STRUCTURED_REPLY => match reply {
                option_reply::ACK => self.chunks_granted(ReplyStyle::Structured, out),
                _ => self.send_go(out),
            },
            option::SET_META_CONTEXT => self.context_answered(reply, &data, out)?,
            option::GO => return self.go_answered(reply, &data, out),
            _ => return self.list_answered(reply, &data, out),
        }
        Ok(None)
    }

    fn chunks_granted(&mut self, style: ReplyStyle, out: &mut BytesMut) {
        self.style = style;
        let mut data = BytesMut::new();
        put_string(&mut data, self.export());
        data.put_u32(1);
        put_string(&mut data, base_allocation::NAME);
        self.send(option::SET_META_CONTEXT, &data, out);
    }

    fn context_answered(
        &mut self,
        reply: u32,
        mut data: &[u8],
        out: &mut BytesMut,
    ) -> Result<(), ProtocolError> {
        if reply != option_reply::META_CONTEXT {
            // An error is no failure: the export is used without BLOCK_STATUS. What is wrong
            // with its name, GO will say better.
            if reply != option_reply::ACK {
                self.base_allocation = None;
            }
            self.send_go(out);
            return Ok(());
        }
        let id = data.try_get_u32().map_err(|_| ProtocolError::Malformed("metadata context"))?;
        if data == base_allocation::NAME.as_bytes() {
            self.base_allocation = Some(id);
        }
        Ok(())
    }

    fn go_answered(
        &mut self,
        reply: u32,
        data: &[u8],
        out: &mut BytesMut,
    ) -> Result<Option<Step>, ProtocolError> {
        match reply {
            option_reply::INFO => self.take_info(data).map(|()| None),
            option_reply::ACK => {
                let (size, flags) =
                    self.described.ok_or(ProtocolError::Malformed("answer to GO: it tells no size"))?;
                Ok(Some(Step::Transmission(self.session(size, flags))))
            }
            // A server with extended headers has GO, and they have no other way to begin.
            option_reply::ERR_UNSUP if self.style != ReplyStyle::Extended => {
                self.send_export_name(out);
                Ok(None)
            }
            error => {
                let what = format!("the export {:?}", self.export());
                Err(refused(what, explain(error, data)))
            }
        }
    }

    fn take_info(&mut self, mut data: &[u8]) -> Result<(), ProtocolError> {
        let malformed = |_| ProtocolError::Malformed("piece of information about the export");
        match data.try_get_u16().map_err(malformed)? {
            info::EXPORT => {
                let size = ByteCount(data.try_get_u64().map_err(malformed)?);
                let flags = TransmissionFlags(data.try_get_u16().map_err(malformed)?);
                self.described = Some((size, flags));
            }
            info::BLOCK_SIZE => {
                let sizes = BlockSizes {
                    minimum: data.try_get_u32().map_err(malformed)?,
                    preferred: data.try_get_u32().map_err(malformed)?,
                    maximum: data.try_get_u32().map_err(malformed)?,
                };
                self.block_sizes = usable(sizes)?;
            }
            // Information that nobody asked for is to be ignored.
            _ => {}
        }
        Ok(())
    }

    fn list_answered(
        &mut self,
        reply: u32,
        mut data: &[u8],
        out: &mut BytesMut,
    ) -> Result<Option<Step>, ProtocolError> {
        match reply {
            option_reply::SERVER => {
                let malformed = ProtocolError::Malformed("entry of the list of exports");
                let Ok(length) = data.try_get_u32() else { return Err(malformed) };
                let Some((name, text)) = data.split_at_checked(length as usize) else {
                    return Err(malformed);
                };
                if self.listed.len() == LIST_MAX {
                    let (found, limit) = (LIST_MAX as u64 + 1, LIST_MAX as u64);
                    return Err(ProtocolError::TooLong { what: "exports", found, limit });
                }
                self.listed.push(ExportSummary {
                    name: String::from_utf8_lossy(name).into_owned(),
                    description: String::from_utf8_lossy(text).into_owned(),
                });
                Ok(None)
            }
            option_reply::ACK => {
                put_option(out, option::ABORT, &[]);
                Ok(Some(Step::Listed(std::mem::take(&mut self.listed))))
            }
            error => Err(refused("to list its exports", explain(error, data))),
        }
    }

    fn take_export_name(&mut self, intake: &mut Intake) -> Result<Option<Step>, ProtocolError> {
        let zeroes = if self.no_zeroes { 0 } else { wire::EXPORT_NAME_ZEROES };
        let mut bytes = intake.buffered();
        if bytes.len() < 8 + 2 + zeroes {
            return Ok(Some(Step::NeedMore));
        }
        let (size, flags) = (ByteCount(bytes.get_u64()), TransmissionFlags(bytes.get_u16()));
        intake.consume(8 + 2 + zeroes);
        Ok(Some(Step::Transmission(self.session(size, flags))))
    }

    fn session(&self, size: ByteCount, flags: TransmissionFlags) -> Session {
        Session {
            size,
            flags,
            style: self.style,
            base_allocation: self.base_allocation,
            block_sizes: self.block_sizes,
        }
    }

    fn export(&self) -> &str {
        match &self.goal {
            Goal::Open(name) => name,
            Goal::List => "",
        }
    }

    fn send(&mut self, option: u32, data: &[u8], out: &mut BytesMut) {
        put_option(out, option, data);
        self.state = State::Answer(option);
    }

    fn send_go(&mut self, out: &mut BytesMut) {
        let mut data = BytesMut::new();
        put_string(&mut data, self.export());
        data.put_u16(1);
        data.put_u16(info::BLOCK_SIZE);
        self.send(option::GO, &data, out);
    }

    fn send_export_name(&mut self, out: &mut BytesMut) {
        put_option(out, option::EXPORT_NAME, self.export().as_bytes());
        self.state = State::ExportName;
    }
}

/// Block sizes within what the specification allows, the maximum cut to what we can take, and what is preferred to that.
fn usable(sizes: BlockSizes) -> Result<BlockSizes, ProtocolError> {
    let BlockSizes { minimum, preferred, maximum } = sizes;
    let sane = minimum.is_power_of_two()
        && minimum <= 64 << 10
        && preferred.is_power_of_two()
        && preferred >= minimum
        && maximum >= minimum;
    if !sane {
        return Err(ProtocolError::Malformed("set of block size constraints"));
    }
    let maximum = maximum.min(crate::MAX_PAYLOAD.0 as u32);
    let maximum = maximum - maximum % minimum;
    // What it prefers may be longer than that: then it is the longest that is a power of two.
    Ok(BlockSizes { minimum, preferred: preferred.min(1 << maximum.ilog2()), maximum })
}

fn check_magic(message: &'static str, expected: u64, found: u64) -> Result<(), ProtocolError> {
    if found == expected { Ok(()) } else { Err(ProtocolError::BadMagic { message, expected, found }) }
}

fn refused(what: impl Into<String>, reason: impl Into<String>) -> ProtocolError {
    ProtocolError::Refused { what: what.into(), reason: reason.into() }
}

/// The server's error, in its own words if it has some.
fn explain(error: u32, text: &[u8]) -> String {
    let meaning = match error {
        option_reply::ERR_UNSUP => "option not supported",
        option_reply::ERR_POLICY => "forbidden by policy",
        option_reply::ERR_INVALID => "invalid request",
        option_reply::ERR_UNKNOWN => "no such export",
        option_reply::ERR_SHUTDOWN => "server is shutting down",
        option_reply::ERR_BLOCK_SIZE_REQD => "block size constraints required",
        option_reply::ERR_TOO_BIG => "request too big",
        _ => "unknown error",
    };
    let text = String::from_utf8_lossy(text);
    if text.is_empty() {
        format!("{meaning} ({error:#x})")
    } else {
        // The text ends up in logs and on terminals.
        let clean: String = text.chars().filter(|c| !c.is_control()).take(200).collect();
        format!("{meaning}: {clean}")
    }
}

fn put_option(out: &mut BytesMut, option: u32, data: &[u8]) {
    out.put_u64(magic::OPTION);
    out.put_u32(option);
    out.put_u32(data.len() as u32);
    out.put_slice(data);
}

fn put_string(out: &mut BytesMut, string: &str) {
    out.put_u32(string.len() as u32);
    out.put_slice(string.as_bytes());
}
