//! The server's handshake: from the greeting to the transmission phase of one export.
//!
//! ```text
//! greeting ─▶ CLIENT FLAGS ─▶ OPTION ⇄ SKIP (rest of an option that is too long)
//!                               │ ▲
//!                               ├─┼─ export not there yet ▶ Step::Awaited, until it is
//!                               ├─┴─ STARTTLS ──────▶ Step::StartTls, once
//!                               ├─ GO, EXPORT_NAME ─▶ Step::Transmission
//!                               └─ ABORT ───────────▶ Step::Closed
//! ```
//!
//! Invariants: one option is answered per [`Handshake::step`], so that the driver can send the
//! answer before the next one is made; an option's data is kept only up to [`OPTION_MAX`]; a
//! handshake has at most [`OPTIONS_MAX`] options; where TLS is required, nothing is told or chosen
//! without it; nothing chosen in the clear counts under TLS.

use bytes::{BufMut, BytesMut};

use super::option::{self, Options, Refusal, put_refusal, put_reply};
use crate::wire::{self, handshake_flag, magic, option_reply};
use crate::{ExportInfo, ExportSummary, Intake, ProtocolError, ReplyStyle};

/// The longest data of an option that is looked at, in bytes.
const OPTION_MAX: u32 = 32 << 10;
/// The most options in one handshake: enough to ask about a thousand exports.
const OPTIONS_MAX: u32 = 4096;

/// Whether a server's connections are encrypted.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum TlsMode {
    /// Never: STARTTLS is refused.
    #[default]
    Off,
    /// When the client asks for it.
    Optional,
    /// Always: without TLS every other option is refused.
    Required,
}

/// The exports a server has, at the moment it is asked.
pub trait Catalog {
    /// Whether the server is going down: every option is refused.
    fn is_shutting_down(&self) -> bool {
        false
    }

    /// Whether the export a client calls `name` has as many clients as it may: beginning transmission is refused.
    fn is_full(&self, name: &str) -> bool {
        let _ = name;
        false
    }

    /// Whether the export a client calls `name` is not there and will be soon: what asks about it has to wait.
    fn is_awaited(&self, name: &str) -> bool {
        let _ = name;
        false
    }

    /// The export a client calls `name`; "" is the default export.
    fn find(&self, name: &str) -> Option<ExportInfo>;
    /// What LIST shows.
    fn list(&self) -> Vec<ExportSummary>;
}

/// What the handshake has settled.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Session {
    /// The name the client used; may be an alias of the export's.
    pub requested: String,
    /// The export as it was described to the client.
    pub export: ExportInfo,
    /// How replies are framed.
    pub style: ReplyStyle,
    /// In which contexts BLOCK_STATUS may be asked.
    pub contexts: Contexts,
}

/// Metadata contexts that were chosen, or that one answer has.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Contexts {
    /// `base:allocation`.
    pub base_allocation: bool,
    /// The export's dirty bitmap.
    pub dirty_bitmap: bool,
}

impl Contexts {
    /// Whether there is one.
    pub fn any(self) -> bool {
        self.base_allocation || self.dirty_bitmap
    }
}

/// What comes next.
#[derive(Debug, PartialEq, Eq)]
pub enum Step {
    /// More bytes have to be read.
    NeedMore,
    /// An option was answered; send the output, then ask again.
    Answered,
    /// The next option is about an export that is [awaited](Catalog::is_awaited); when the exports have changed, ask
    /// again. Nothing of the option was taken.
    Awaited,
    /// Send the output, go on under TLS, tell [`Handshake::tls_started`], then ask again.
    StartTls,
    /// The handshake is done; send the output, then serve requests.
    Transmission(Box<Session>),
    /// The client ended it in good order; send the output, then close.
    Closed,
}

#[derive(Debug)]
enum State {
    ClientFlags,
    Option,
    Skip { remaining: usize },
}

/// The server's side of one connection's handshake.
#[derive(Debug)]
pub struct Handshake {
    state: State,
    tls: TlsMode,
    secured: bool,
    fixed_newstyle: bool,
    no_zeroes: bool,
    options_left: u32,
    options: Options,
}

impl Handshake {
    /// Begins a handshake: the greeting is appended to `out`.
    pub fn start(tls: TlsMode, out: &mut BytesMut) -> Self {
        out.put_u64(magic::SERVER);
        out.put_u64(magic::OPTION);
        out.put_u16(handshake_flag::FIXED_NEWSTYLE | handshake_flag::NO_ZEROES);
        Self {
            state: State::ClientFlags,
            tls,
            secured: false,
            fixed_newstyle: false,
            no_zeroes: false,
            options_left: OPTIONS_MAX,
            options: Options::default(),
        }
    }

    /// From here on everything travels under TLS. What was settled before is forgotten: anybody
    /// may have sent it.
    ///
    /// # Panics
    /// When TLS was not asked for.
    pub fn tls_started(&mut self) {
        assert!(self.tls != TlsMode::Off && !self.secured, "TLS was started unasked");
        self.secured = true;
        self.options = Options::default();
    }

    /// Takes what it can from `intake`, appends answers to `out`.
    ///
    /// # Errors
    /// When the connection has to be dropped. `out` may hold an answer worth trying to send.
    pub fn step(
        &mut self,
        intake: &mut Intake,
        catalog: &dyn Catalog,
        out: &mut BytesMut,
    ) -> Result<Step, ProtocolError> {
        loop {
            match self.state {
                State::ClientFlags => {
                    let Some(flags) = intake.buffered().first_chunk::<4>() else {
                        return Ok(Step::NeedMore);
                    };
                    self.take_client_flags(u32::from_be_bytes(*flags))?;
                    intake.consume(4);
                    self.state = State::Option;
                }
                State::Option => return self.take_option(intake, catalog, out),
                State::Skip { remaining } => {
                    let remaining = remaining - intake.discard(remaining);
                    if remaining > 0 {
                        self.state = State::Skip { remaining };
                        return Ok(Step::NeedMore);
                    }
                    self.state = State::Option;
                }
            }
        }
    }

    fn take_client_flags(&mut self, flags: u32) -> Result<(), ProtocolError> {
        let fixed = u32::from(handshake_flag::FIXED_NEWSTYLE);
        let no_zeroes = u32::from(handshake_flag::NO_ZEROES);
        if flags & !(fixed | no_zeroes) != 0 {
            return Err(ProtocolError::UnknownClientFlags(flags));
        }
        self.fixed_newstyle = flags & fixed != 0;
        self.no_zeroes = flags & no_zeroes != 0;
        Ok(())
    }

    fn take_option(
        &mut self,
        intake: &mut Intake,
        catalog: &dyn Catalog,
        out: &mut BytesMut,
    ) -> Result<Step, ProtocolError> {
        let Some(header) = intake.buffered().first_chunk::<{ wire::OPTION_HEADER }>() else {
            return Ok(Step::NeedMore);
        };
        let [magic_bytes @ .., _, _, _, _, _, _, _, _] = header;
        let found = u64::from_be_bytes(*magic_bytes);
        if found != magic::OPTION {
            let expected = magic::OPTION;
            return Err(ProtocolError::BadMagic { message: "an option", expected, found });
        }
        let code = u32::from_be_bytes([header[8], header[9], header[10], header[11]]);
        let length = u32::from_be_bytes([header[12], header[13], header[14], header[15]]);
        if code != wire::option::EXPORT_NAME && !self.fixed_newstyle {
            return Err(ProtocolError::OptionWithoutFixedNewstyle(code));
        }
        let data_length = length as usize;
        let complete = intake.buffered().len() >= wire::OPTION_HEADER + data_length;
        if length <= OPTION_MAX && !complete {
            return Ok(Step::NeedMore);
        }
        if complete {
            let data = &intake.buffered()[wire::OPTION_HEADER..][..data_length];
            let about = option::export_of(code, data).filter(|_| self.closed_to(code, catalog).is_none());
            if about.is_some_and(|name| catalog.is_awaited(name)) {
                return Ok(Step::Awaited);
            }
        }

        self.options_left =
            self.options_left.checked_sub(1).ok_or(ProtocolError::TooManyOptions(OPTIONS_MAX))?;
        intake.consume(wire::OPTION_HEADER);
        if length > OPTION_MAX {
            if code == wire::option::EXPORT_NAME {
                return Err(ProtocolError::MalformedExportName(length));
            }
            if code == wire::option::ABORT {
                put_reply(out, code, option_reply::ACK, &[]);
                return Ok(Step::Closed);
            }
            let refusal = self.closed_to(code, catalog).unwrap_or_else(|| too_long(code, length));
            if code == wire::option::SET_META_CONTEXT {
                // As any that fails: nothing is chosen any more.
                self.options.forget_contexts();
            }
            put_refusal(out, code, &refusal);
            self.state = State::Skip { remaining: data_length };
            return Ok(Step::Answered);
        }
        let step = self.answer(code, &intake.buffered()[..data_length], catalog, out)?;
        intake.consume(data_length);
        if step == Step::StartTls && !intake.buffered().is_empty() {
            // What came along in the clear must not be taken for something that came under TLS.
            return Err(ProtocolError::DataBeforeTls(intake.buffered().len()));
        }
        Ok(step)
    }

    /// Why an option is refused whatever it says.
    fn closed_to(&self, code: u32, catalog: &dyn Catalog) -> Option<Refusal> {
        use wire::option::{ABORT, STARTTLS};
        if code == ABORT {
            return None;
        }
        if catalog.is_shutting_down() {
            return Some(Refusal::shutdown());
        }
        // Above all nothing is told before TLS.
        let in_the_clear = self.tls == TlsMode::Required && !self.secured;
        (in_the_clear && code != STARTTLS).then(Refusal::tls_required)
    }

    /// Why one that begins transmission is refused, and INFO too, since what that tells a GO has to tell.
    fn full_for(code: u32, data: &[u8], catalog: &dyn Catalog) -> Option<Refusal> {
        use wire::option::{EXPORT_NAME, GO, INFO};
        let name = option::export_of(code, data).filter(|_| matches!(code, INFO | GO | EXPORT_NAME))?;
        catalog.is_full(name).then(|| Refusal::policy("the server has as many clients as it may"))
    }

    /// Answers one whole option.
    fn answer(
        &mut self,
        code: u32,
        data: &[u8],
        catalog: &dyn Catalog,
        out: &mut BytesMut,
    ) -> Result<Step, ProtocolError> {
        let refusal = self.closed_to(code, catalog).or_else(|| Self::full_for(code, data, catalog));
        if let Some(refusal) = refusal {
            if code == wire::option::EXPORT_NAME {
                return Err(ProtocolError::ExportNameRefused(refusal.text));
            }
            put_refusal(out, code, &refusal);
            return Ok(Step::Answered);
        }
        let answered = match code {
            wire::option::EXPORT_NAME => return self.export_name(data, catalog, out),
            wire::option::ABORT => {
                put_reply(out, code, option_reply::ACK, &[]);
                return Ok(Step::Closed);
            }
            wire::option::LIST => option::list(data, catalog, out),
            wire::option::INFO => self.options.describe(code, data, catalog, out).map(drop),
            wire::option::GO => match self.options.describe(code, data, catalog, out) {
                Ok(session) => return Ok(Step::Transmission(Box::new(session))),
                Err(refusal) => Err(refusal),
            },
            wire::option::STRUCTURED_REPLY => self.options.structured_reply(data, out),
            wire::option::EXTENDED_HEADERS => self.options.extended_headers(data, out),
            wire::option::LIST_META_CONTEXT => self.options.list_contexts(data, catalog, out),
            wire::option::SET_META_CONTEXT => self.options.set_contexts(data, catalog, out),
            wire::option::STARTTLS => match option::start_tls(self.tls, self.secured, data, out) {
                Ok(()) => return Ok(Step::StartTls),
                Err(refusal) => Err(refusal),
            },
            unknown => Err(unknown_option(unknown)),
        };
        if let Err(refusal) = answered {
            put_refusal(out, code, &refusal);
        }
        Ok(Step::Answered)
    }

    /// EXPORT_NAME: the answer is no option reply, and an error can only be a closed connection.
    fn export_name(
        &mut self,
        data: &[u8],
        catalog: &dyn Catalog,
        out: &mut BytesMut,
    ) -> Result<Step, ProtocolError> {
        if self.options.style() == ReplyStyle::Extended {
            return Err(ProtocolError::ExportNameAfterExtendedHeaders);
        }
        let name = match std::str::from_utf8(data) {
            Ok(name) if data.len() <= wire::MAX_STRING && !data.contains(&0) => name,
            Ok(_) | Err(_) => return Err(ProtocolError::MalformedExportName(data.len() as u32)),
        };
        let export = catalog.find(name).ok_or_else(|| ProtocolError::UnknownExport(name.to_owned()))?;
        let session = self.options.session(name, export);
        out.put_u64(session.export.size.0);
        out.put_u16(session.export.transmission_flags(session.style, session.contexts.any()).0);
        if !self.no_zeroes {
            out.put_bytes(0, wire::EXPORT_NAME_ZEROES);
        }
        Ok(Step::Transmission(Box::new(session)))
    }
}

fn unknown_option(code: u32) -> Refusal {
    Refusal::unsupported(format!("unknown option {code}"))
}

/// Why an option is refused of which more comes than any needs.
fn too_long(code: u32, length: u32) -> Refusal {
    use wire::option::{
        ABORT, EXPORT_NAME, EXTENDED_HEADERS, GO, INFO, LIST, LIST_META_CONTEXT, SET_META_CONTEXT, STARTTLS,
        STRUCTURED_REPLY,
    };
    match code {
        ABORT | EXPORT_NAME | EXTENDED_HEADERS | GO | INFO | LIST | LIST_META_CONTEXT | SET_META_CONTEXT
        | STARTTLS | STRUCTURED_REPLY => {
            Refusal::too_big(format!("option data of {length} bytes, the limit is {OPTION_MAX}"))
        }
        unknown => unknown_option(unknown),
    }
}
