//! What the tests of this crate share: a catalog, bytes written by hand, and a disk in memory
//! served by our machines over blocking streams.

#![allow(dead_code, reason = "each test file uses its part")]

use std::io::{Read, Write};

use backtide_nbd::server::{
    Catalog, Handshake, Incoming, ReplyEncoder, ReplyTo, RequestParser, Session, Step, TlsMode,
};
use backtide_nbd::{
    Command, ExportInfo, ExportSummary, Extent, Intake, NbdError, ProtocolError, ReplyStyle, wire,
};
use backtide_units::ByteCount;
use bytes::{BufMut, BytesMut};

/// The size of the export `disk`.
pub(crate) const SIZE: u64 = 1 << 20;

/// `disk` (also the default), `golden` (read-only) and `coarse` (blocks of 4096 bytes);
/// `patient`, which is not listed, has coarse blocks and serves any range.
pub(crate) struct Three(pub(crate) Option<Unavailable>);

/// Why new clients are not served.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(crate) enum Unavailable {
    ShuttingDown,
    /// Of `disk`, under that name.
    Full,
    /// The same export is not there yet.
    Awaited,
}

impl Catalog for Three {
    fn is_shutting_down(&self) -> bool {
        self.0 == Some(Unavailable::ShuttingDown)
    }

    fn is_full(&self, name: &str) -> bool {
        self.0 == Some(Unavailable::Full) && name == "disk"
    }

    fn is_awaited(&self, name: &str) -> bool {
        self.0 == Some(Unavailable::Awaited) && name == "disk"
    }

    fn find(&self, name: &str) -> Option<ExportInfo> {
        let mut info = ExportInfo::new(name, ByteCount(SIZE));
        match name {
            "" | "disk" => {
                info.name = "disk".into();
                info.description = "a disk".into();
            }
            "golden" => info.read_only = true,
            "coarse" => info.block_sizes.minimum = 4096,
            "patient" => {
                info.block_sizes.minimum = 4096;
                info.serves_any_range = true;
            }
            _ => return None,
        }
        Some(info)
    }

    fn list(&self) -> Vec<ExportSummary> {
        let named = |name: &str| ExportSummary { name: name.into(), description: String::new() };
        let disk = ExportSummary { name: "disk".into(), description: "a disk".into() };
        vec![disk, named("golden"), named("coarse")]
    }
}

/// Puts `bytes` where a driver would read them to.
pub(crate) fn feed(intake: &mut Intake, bytes: &[u8]) {
    let mut rest = bytes;
    while !rest.is_empty() {
        let mut space = intake.space();
        let count = space.remaining_mut().min(rest.len());
        space.put_slice(&rest[..count]);
        rest = &rest[count..];
    }
}

/// An option as it travels.
pub(crate) fn option(code: u32, data: &[u8]) -> Vec<u8> {
    let mut bytes = wire::magic::OPTION.to_be_bytes().to_vec();
    bytes.extend_from_slice(&code.to_be_bytes());
    bytes.extend_from_slice(&(data.len() as u32).to_be_bytes());
    bytes.extend_from_slice(data);
    bytes
}

/// An answer to an option as it travels.
pub(crate) fn option_reply(code: u32, reply: u32, data: &[u8]) -> Vec<u8> {
    let mut bytes = wire::magic::OPTION_REPLY.to_be_bytes().to_vec();
    bytes.extend_from_slice(&code.to_be_bytes());
    bytes.extend_from_slice(&reply.to_be_bytes());
    bytes.extend_from_slice(&(data.len() as u32).to_be_bytes());
    bytes.extend_from_slice(data);
    bytes
}

/// A string with its length in front.
pub(crate) fn string(text: &str) -> Vec<u8> {
    [&(text.len() as u32).to_be_bytes(), text.as_bytes()].concat()
}

/// The data of GO and INFO.
pub(crate) fn go(name: &str, wanted: &[u16]) -> Vec<u8> {
    let mut data = string(name);
    data.extend_from_slice(&(wanted.len() as u16).to_be_bytes());
    data.extend(wanted.iter().flat_map(|kind| kind.to_be_bytes()));
    data
}

/// The data of SET_META_CONTEXT and LIST_META_CONTEXT.
pub(crate) fn contexts(name: &str, queries: &[&str]) -> Vec<u8> {
    let mut data = string(name);
    data.extend_from_slice(&(queries.len() as u32).to_be_bytes());
    data.extend(queries.iter().flat_map(|query| string(query)));
    data
}

/// A request's header as it travels.
pub(crate) fn request(kind: u16, flags: u16, cookie: u64, offset: u64, length: u32) -> Vec<u8> {
    let mut bytes = wire::magic::REQUEST.to_be_bytes().to_vec();
    bytes.extend_from_slice(&flags.to_be_bytes());
    bytes.extend_from_slice(&kind.to_be_bytes());
    bytes.extend_from_slice(&cookie.to_be_bytes());
    bytes.extend_from_slice(&offset.to_be_bytes());
    bytes.extend_from_slice(&length.to_be_bytes());
    bytes
}

/// A request's header with extended headers, as it travels.
pub(crate) fn extended(kind: u16, flags: u16, cookie: u64, offset: u64, length: u64) -> Vec<u8> {
    let mut bytes = wire::magic::EXTENDED_REQUEST.to_be_bytes().to_vec();
    bytes.extend_from_slice(&flags.to_be_bytes());
    bytes.extend_from_slice(&kind.to_be_bytes());
    for word in [cookie, offset, length] {
        bytes.extend_from_slice(&word.to_be_bytes());
    }
    bytes
}

/// A server machine and what it wrote.
pub(crate) struct Server {
    machine: Handshake,
    catalog: Three,
    pub(crate) intake: Intake,
    out: BytesMut,
}

impl Server {
    /// After the greeting, which is taken off.
    pub(crate) fn new() -> Self {
        Self::with(TlsMode::Off)
    }

    /// The same with TLS.
    pub(crate) fn with(tls: TlsMode) -> Self {
        let mut out = BytesMut::new();
        let machine = Handshake::start(tls, &mut out);
        assert_eq!(&out[..], b"NBDMAGICIHAVEOPT\x00\x03");
        Self { machine, catalog: Three(None), intake: Intake::new(), out: BytesMut::new() }
    }

    /// After the flags of a usual client.
    pub(crate) fn fixed() -> Self {
        let mut server = Self::new();
        assert_eq!(server.send(&3_u32.to_be_bytes()).1, Ok(Step::NeedMore));
        server
    }

    /// The driver has started TLS.
    pub(crate) fn tls_started(&mut self) {
        self.machine.tls_started();
    }

    /// What it says to new clients from now on.
    pub(crate) fn becomes(&mut self, unavailable: Unavailable) {
        self.catalog = Three(Some(unavailable));
    }

    /// It takes every client again.
    pub(crate) fn recovers(&mut self) {
        self.catalog = Three(None);
    }

    /// Sends bytes; what is written until the machine wants more, or comes to an end.
    pub(crate) fn send(&mut self, bytes: &[u8]) -> (Vec<u8>, Result<Step, ProtocolError>) {
        feed(&mut self.intake, bytes);
        loop {
            let step = self.machine.step(&mut self.intake, &self.catalog, &mut self.out);
            if step != Ok(Step::Answered) {
                return (self.out.split().to_vec(), step);
            }
        }
    }

    /// Sends an option that does not end the handshake; the answers.
    pub(crate) fn answers(&mut self, code: u32, data: &[u8]) -> Vec<(u32, Vec<u8>)> {
        let (written, step) = self.send(&option(code, data));
        assert_eq!(step, Ok(Step::NeedMore));
        option_replies(code, &written)
    }
}

/// The type and data of each answer to option `code`.
pub(crate) fn option_replies(code: u32, mut bytes: &[u8]) -> Vec<(u32, Vec<u8>)> {
    let mut replies = Vec::new();
    while !bytes.is_empty() {
        let word = |at: usize| u32::from_be_bytes(bytes[at..at + 4].try_into().unwrap());
        assert_eq!(bytes[..8], wire::magic::OPTION_REPLY.to_be_bytes());
        assert_eq!(word(8), code);
        let end = wire::OPTION_REPLY_HEADER + word(16) as usize;
        replies.push((word(12), bytes[wire::OPTION_REPLY_HEADER..end].to_vec()));
        bytes = &bytes[end..];
    }
    replies
}

/// The session of a client that asked for `name`, structured replies and `base:allocation`.
pub(crate) fn session(name: &str) -> Session {
    session_with(wire::option::STRUCTURED_REPLY, name)
}

/// The same with extended headers.
pub(crate) fn extended_session(name: &str) -> Session {
    session_with(wire::option::EXTENDED_HEADERS, name)
}

fn session_with(style: u32, name: &str) -> Session {
    let mut server = Server::fixed();
    server.answers(style, &[]);
    let chosen = contexts(name, &[wire::base_allocation::NAME]);
    server.answers(wire::option::SET_META_CONTEXT, &chosen);
    let data = go(name, &[wire::info::BLOCK_SIZE]);
    match server.send(&option(wire::option::GO, &data)).1 {
        Ok(Step::Transmission(session)) => *session,
        other => panic!("GO brought {other:?}"),
    }
}

/// A server's parser and encoder of one session.
pub(crate) struct Requests {
    pub(crate) parser: RequestParser,
    pub(crate) intake: Intake,
    encoder: ReplyEncoder,
}

impl Requests {
    pub(crate) fn new(session: &Session) -> Self {
        let (parser, encoder) = (RequestParser::new(session), ReplyEncoder::new(session));
        Self { parser, encoder, intake: Intake::new() }
    }

    /// What becomes of one request, as soon as it is told.
    pub(crate) fn try_send(&mut self, bytes: &[u8]) -> Result<Option<Incoming>, ProtocolError> {
        let mut incoming = None;
        for piece in bytes.chunks(32 << 10) {
            assert_eq!(incoming, None, "one request was sent");
            feed(&mut self.intake, piece);
            incoming = self.parser.next(&mut self.intake)?;
        }
        Ok(incoming)
    }

    /// What a request asks for that is taken.
    pub(crate) fn command(&mut self, bytes: &[u8]) -> Command {
        match self.try_send(bytes) {
            Ok(Some(Incoming::Request(_, command))) => command,
            other => panic!("not taken: {other:?}"),
        }
    }

    /// Why a request is refused.
    pub(crate) fn refusal(&mut self, bytes: &[u8]) -> NbdError {
        match self.try_send(bytes) {
            Ok(Some(Incoming::Refused(_, error, why))) => {
                assert!(!why.is_empty(), "a refusal says why");
                error
            }
            other => panic!("not refused: {other:?}"),
        }
    }

    /// The reply `encode` makes to a request, as it travels.
    pub(crate) fn reply(
        &mut self,
        bytes: &[u8],
        encode: impl Fn(ReplyEncoder, ReplyTo, &mut BytesMut),
    ) -> Vec<u8> {
        let mut out = BytesMut::new();
        match self.try_send(bytes) {
            Ok(Some(Incoming::Request(to, _) | Incoming::Refused(to, ..))) => {
                encode(self.encoder, to, &mut out);
            }
            other => panic!("not taken: {other:?}"),
        }
        out.to_vec()
    }
}

/// A client's session with framing of `style`, on a disk of [`SIZE`] bytes that serves everything.
pub(crate) fn client_session(style: ReplyStyle) -> backtide_nbd::client::Session {
    backtide_nbd::client::Session {
        size: ByteCount(SIZE),
        flags: session("disk").export.transmission_flags(style, true),
        style,
        base_allocation: Some(1),
        block_sizes: backtide_nbd::BlockSizes::default(),
    }
}

/// Serves a disk in memory over a blocking stream until the client leaves.
pub(crate) fn serve(mut stream: impl Read + Write, disk: &mut [u8]) -> Result<(), ProtocolError> {
    let (mut intake, mut out) = (Intake::new(), BytesMut::new());
    let mut machine = Handshake::start(TlsMode::Off, &mut out);
    let session = loop {
        let step = machine.step(&mut intake, &Three(None), &mut out)?;
        stream.write_all(&out.split()).expect("the client reads");
        match step {
            Step::Answered => {}
            Step::NeedMore if read_some(&mut stream, &mut intake) => {}
            Step::Transmission(session) => break session,
            Step::StartTls | Step::Awaited => unreachable!("TLS is off, and every export is there"),
            Step::NeedMore | Step::Closed => return Ok(()),
        }
    };
    let mut parser = RequestParser::new(&session);
    let encoder = ReplyEncoder::new(&session);
    loop {
        match parser.next(&mut intake)? {
            Some(Incoming::Request(to, command)) => carry_out(disk, command, encoder, to, &mut out),
            Some(Incoming::Refused(to, error, why)) => encoder.error(to, error, why, &mut out),
            Some(Incoming::Disconnect) => return Ok(()),
            None if read_some(&mut stream, &mut intake) => {}
            None => return Ok(()),
        }
        stream.write_all(&out.split()).expect("the client reads");
    }
}

/// Does `command` on a disk in memory and writes its reply.
pub(crate) fn carry_out(
    disk: &mut [u8],
    command: Command,
    encoder: ReplyEncoder,
    to: ReplyTo,
    out: &mut BytesMut,
) {
    let range = command.range();
    let bytes = &mut disk[range.start().0 as usize..range.end().0 as usize];
    match command {
        Command::Read { length, .. } => {
            encoder.read_header(to, length, out);
            out.extend_from_slice(bytes);
        }
        Command::Write { data, .. } => {
            bytes.copy_from_slice(&data);
            encoder.done(to, out);
        }
        Command::Trim { .. } | Command::WriteZeroes { .. } => {
            bytes.fill(0);
            encoder.done(to, out);
        }
        Command::Flush | Command::Cache { .. } => encoder.done(to, out),
        Command::BlockStatus { length, .. } => {
            let half = ByteCount(length.0 / 2);
            encoder.extents(to, &[Extent::hole(half), Extent::data(length)], out);
        }
    }
}

/// Reads what is there; false at the end.
pub(crate) fn read_some(stream: &mut impl Read, intake: &mut Intake) -> bool {
    let mut space = intake.space();
    let mut buffer = vec![0; space.remaining_mut().min(64 << 10)];
    let count = stream.read(&mut buffer).unwrap_or(0);
    space.put_slice(&buffer[..count]);
    count > 0
}
