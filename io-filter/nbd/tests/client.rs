//! The client's machines against servers written by hand, the odd ones above all.

mod support;

use backtide_nbd::client::{Content, Expected, Goal, Handshake, Reply, ReplyParser, Session, Step};
use backtide_nbd::{
    BlockSizes, Cookie, ExportSummary, Intake, NbdError, ProtocolError, ReplyStyle, TransmissionFlags, wire,
};
use backtide_units::{ByteCount, ByteOffset, ByteRange};
use bytes::{Bytes, BytesMut};
use support::{SIZE, contexts, feed, go, option, option_reply, string};
use wire::{option as code, option_reply as reply};

const GREETING: &[u8] = b"NBDMAGICIHAVEOPT\x00\x03";
const FLAGS: [u8; 4] = [0, 0, 0, 3];

struct Client {
    machine: Handshake,
    intake: Intake,
}

impl Client {
    fn new(goal: Goal) -> Self {
        Self { machine: Handshake::new(goal), intake: Intake::new() }
    }

    fn open(name: &str) -> Self {
        Self::new(Goal::Open(name.into()))
    }

    /// What the client answers to bytes of the server.
    fn hears(&mut self, bytes: &[u8]) -> (Vec<u8>, Result<Step, ProtocolError>) {
        feed(&mut self.intake, bytes);
        let mut out = BytesMut::new();
        let step = self.machine.step(&mut self.intake, &mut out);
        (out.to_vec(), step)
    }

    /// The same, where the handshake goes on.
    fn answers(&mut self, bytes: &[u8]) -> Vec<u8> {
        let (written, step) = self.hears(bytes);
        assert_eq!(step, Ok(Step::NeedMore));
        written
    }
}

fn export_info() -> Vec<u8> {
    [&[0, 0][..], &SIZE.to_be_bytes(), &[0, 0b101]].concat()
}

fn block_sizes(minimum: u32, preferred: u32, maximum: u32) -> Vec<u8> {
    let sizes = [minimum, preferred, maximum].map(u32::to_be_bytes).concat();
    [&[0, 3][..], &sizes].concat()
}

/// A client that has sent GO.
fn at_go() -> Client {
    let mut client = Client::open("disk");
    client.answers(GREETING);
    client.answers(&option_reply(code::EXTENDED_HEADERS, reply::ERR_UNSUP, &[]));
    let go_sent = client.answers(&option_reply(code::STRUCTURED_REPLY, reply::ERR_UNSUP, &[]));
    assert_eq!(go_sent, option(code::GO, &go("disk", &[3])));
    client
}

#[test]
fn the_whole_way_to_an_export() {
    let mut client = Client::open("disk");
    let written = client.answers(GREETING);
    assert_eq!(written, [&FLAGS[..], &option(code::EXTENDED_HEADERS, &[])].concat());
    let written = client.answers(&option_reply(code::EXTENDED_HEADERS, reply::ERR_UNSUP, &[]));
    assert_eq!(written, option(code::STRUCTURED_REPLY, &[]));
    let written = client.answers(&option_reply(code::STRUCTURED_REPLY, reply::ACK, &[]));
    let wanted = contexts("disk", &["base:allocation"]);
    assert_eq!(written, option(code::SET_META_CONTEXT, &wanted));
    let context = [&[0, 0, 0, 42][..], b"base:allocation"].concat();
    let sent = option_reply(code::SET_META_CONTEXT, reply::META_CONTEXT, &context);
    assert_eq!(client.answers(&sent), b"");
    let written = client.answers(&option_reply(code::SET_META_CONTEXT, reply::ACK, &[]));
    assert_eq!(written, option(code::GO, &go("disk", &[3])));
    for info in [export_info(), block_sizes(512, 4096, u32::MAX), vec![0, 77, 1, 2]] {
        assert_eq!(client.answers(&option_reply(code::GO, reply::INFO, &info)), b"");
    }
    let (_, step) = client.hears(&option_reply(code::GO, reply::ACK, &[]));
    let expected = Session {
        size: ByteCount(SIZE),
        flags: TransmissionFlags(0b101),
        style: ReplyStyle::Structured,
        base_allocation: Some(42),
        block_sizes: BlockSizes { minimum: 512, preferred: 4096, maximum: 32 << 20 },
    };
    assert_eq!(step, Ok(Step::Transmission(expected)));
    assert!(expected.flags.flush() && !expected.flags.read_only());
}

#[test]
fn what_a_server_prefers_is_cut_to_the_longest_request_and_can_be_served_on() {
    let info = |preferred, maximum| {
        let mut client = at_go();
        for info in [export_info(), block_sizes(4096, preferred, maximum)] {
            client.answers(&option_reply(code::GO, reply::INFO, &info));
        }
        let Ok(Step::Transmission(session)) = client.hears(&option_reply(code::GO, reply::ACK, &[])).1 else {
            panic!("not done")
        };
        session.block_sizes
    };
    for (preferred, maximum, expected) in
        [(64 << 20, 128 << 20, 32 << 20), (64 << 20, u32::MAX, 32 << 20), (65_536, 40_960, 32_768)]
    {
        let sizes = info(preferred, maximum);
        assert!(sizes.are_valid(), "{sizes:?}");
        assert_eq!((sizes.minimum, sizes.preferred), (4096, expected));
    }
}

#[test]
fn a_server_without_go_or_options_gets_export_name() {
    let zeroes = |count: usize| [&SIZE.to_be_bytes()[..], &[0, 1], &vec![0; count]].concat();
    let mut client = at_go();
    let written = client.answers(&option_reply(code::GO, reply::ERR_UNSUP, &[]));
    assert_eq!(written, option(code::EXPORT_NAME, b"disk"));
    assert!(matches!(client.hears(&zeroes(0)).1, Ok(Step::Transmission(_))));

    let mut client = Client::open("disk");
    let written = client.answers(b"NBDMAGICIHAVEOPT\x00\x00");
    assert_eq!(written, [&[0; 4][..], &option(code::EXPORT_NAME, b"disk")].concat());
    assert_eq!(client.answers(&zeroes(123)), b"");
    let Ok(Step::Transmission(session)) = client.hears(&[0]).1 else { panic!("not done") };
    assert_eq!((session.size, session.style), (ByteCount(SIZE), ReplyStyle::Simple));
}

#[test]
fn a_list_is_gathered_and_ended_with_abort() {
    let mut client = Client::new(Goal::List);
    assert_eq!(client.answers(GREETING), [&FLAGS[..], &option(code::LIST, &[])].concat());
    let entry = [string("one"), b"the first".to_vec()].concat();
    client.answers(&option_reply(code::LIST, reply::SERVER, &entry));
    let (written, step) = client.hears(&option_reply(code::LIST, reply::ACK, &[]));
    assert_eq!(written, option(code::ABORT, &[]));
    let one = ExportSummary { name: "one".into(), description: "the first".into() };
    assert_eq!(step, Ok(Step::Listed(vec![one])));
}

#[test]
fn refusals_carry_the_servers_words() {
    let error = |reply, text: &[u8]| at_go().hears(&option_reply(code::GO, reply, text)).1.unwrap_err();
    let unknown = error(reply::ERR_UNKNOWN, b"try \x1b[31manother").to_string();
    assert_eq!(unknown, "server refuses the export \"disk\": no such export: try [31manother");
    assert_eq!(error(reply::ERR_TLS_REQD, b""), ProtocolError::TlsRequired);
    assert!(error(0x8000_0077, b"").to_string().contains("0x80000077"));
    let mut client = Client::new(Goal::List);
    client.answers(GREETING);
    let (_, step) = client.hears(&option_reply(code::LIST, reply::ERR_POLICY, b""));
    assert!(matches!(step, Err(ProtocolError::Refused { .. })), "{step:?}");
}

#[test]
fn servers_that_make_no_sense_are_errors() {
    let (_, step) = Client::open("").hears(b"HTTP/1.1 400 Bad Request");
    assert!(matches!(step, Err(ProtocolError::BadMagic { .. })), "{step:?}");
    let (_, step) = Client::open("").hears(b"SSH-2.0-x");
    assert!(matches!(step, Err(ProtocolError::BadMagic { .. })), "told before all is there");
    let (_, step) = Client::open("").hears(b"NBDMAGIC\x00\x00\x42\x02\x81\x86\x12\x53");
    assert_eq!(step, Err(ProtocolError::Oldstyle));

    let wrong_option = option_reply(code::LIST, reply::ACK, &[]);
    assert!(matches!(at_go().hears(&wrong_option).1, Err(ProtocolError::Malformed(_))));
    let no_size = option_reply(code::GO, reply::ACK, &[]);
    assert!(matches!(at_go().hears(&no_size).1, Err(ProtocolError::Malformed(_))));
    let mut long = option_reply(code::GO, reply::INFO, &[]);
    long[16..20].copy_from_slice(&u32::MAX.to_be_bytes());
    assert!(matches!(at_go().hears(&long).1, Err(ProtocolError::TooLong { .. })));
    for (minimum, preferred, maximum) in
        [(0, 4096, 4096), (3, 4096, 4096), (512, 256, 4096), (4096, 4096, 512), (1 << 20, 1 << 20, 1 << 25)]
    {
        let info = option_reply(code::GO, reply::INFO, &block_sizes(minimum, preferred, maximum));
        let (_, step) = at_go().hears(&info);
        assert!(matches!(step, Err(ProtocolError::Malformed(_))), "{minimum} {preferred} {maximum}");
    }
}

/// The parser's answer to bytes of the server, with a read of 512..1536 in flight as 1, block
/// status as 2 and a flush as 3.
fn parsed(style: ReplyStyle, bytes: &[u8]) -> Result<Option<Reply>, ProtocolError> {
    let session = Session {
        size: ByteCount(SIZE),
        flags: TransmissionFlags(1),
        style,
        base_allocation: Some(42),
        block_sizes: BlockSizes::default(),
    };
    let mut intake = Intake::new();
    feed(&mut intake, bytes);
    ReplyParser::new(&session).next(&mut intake, |cookie| match cookie.0 {
        1 => ByteRange::new(ByteOffset(512), ByteCount(1024)).map(Expected::Read),
        2 => Some(Expected::Extents(ByteOffset(4096))),
        3 => Some(Expected::Plain(ByteOffset(0))),
        _ => None,
    })
}

fn chunk(last: bool, kind: u16, cookie: u64, payload: &[u8]) -> Vec<u8> {
    let mut bytes = wire::magic::STRUCTURED_REPLY.to_be_bytes().to_vec();
    bytes.extend_from_slice(&u16::from(last).to_be_bytes());
    bytes.extend_from_slice(&kind.to_be_bytes());
    bytes.extend_from_slice(&cookie.to_be_bytes());
    bytes.extend_from_slice(&(payload.len() as u32).to_be_bytes());
    bytes.extend_from_slice(payload);
    bytes
}

fn simple(error: u32, cookie: u64) -> Vec<u8> {
    let magic = wire::magic::SIMPLE_REPLY.to_be_bytes();
    [&magic[..], &error.to_be_bytes(), &cookie.to_be_bytes()].concat()
}

#[test]
fn every_kind_of_chunk_is_understood() {
    let got = |bytes: &[u8]| {
        let reply = parsed(ReplyStyle::Structured, bytes).unwrap().unwrap();
        (reply.cookie.0, reply.content, reply.last)
    };
    let at = |offset: u64, rest: &[u8]| [&offset.to_be_bytes()[..], rest].concat();
    let data = Content::Data { offset: ByteOffset(600), data: Bytes::from_static(b"abc") };
    assert_eq!(got(&chunk(false, 1, 1, &at(600, b"abc"))), (1, data, false));
    let hole = ByteRange::new(ByteOffset(512), ByteCount(1024)).unwrap();
    assert_eq!(got(&chunk(true, 2, 1, &at(512, &[0, 0, 4, 0]))), (1, Content::Hole(hole), true));
    assert_eq!(got(&chunk(true, 0, 1, &[])), (1, Content::Nothing, true));
    let error = Content::Error { error: NbdError::Io, text: "no".into() };
    assert_eq!(got(&chunk(true, 0x8001, 2, b"\0\0\0\x05\0\x02no")), (2, error.clone(), true));
    let with_offset = chunk(false, 0x8002, 1, b"\0\0\0\x05\0\x02no\0\0\0\0\0\0\x02\0");
    assert_eq!(got(&with_offset), (1, error, false));
    let extents = [0, 0, 0, 42, 0, 0, 2, 0, 0, 0, 0, 3];
    let hole = backtide_nbd::Extent::hole(ByteCount(512));
    assert_eq!(got(&chunk(true, 5, 2, &extents)), (2, Content::Extents(vec![hole]), true));
    assert_eq!(got(&simple(0, 3)), (3, Content::Nothing, true));
    let error = Content::Error { error: NbdError::Invalid, text: String::new() };
    assert_eq!(got(&simple(4711, 1)), (1, error, true));
}

#[test]
fn chunks_that_do_not_fit_their_request_are_errors() {
    let at = |offset: u64, rest: &[u8]| [&offset.to_be_bytes()[..], rest].concat();
    for (what, bytes) in [
        ("an unknown cookie", simple(0, 9)),
        ("an unknown cookie in a chunk", chunk(true, 0, 9, &[])),
        ("simple data where chunks are due", simple(0, 1)),
        ("data before the read", chunk(true, 1, 1, &at(500, &[0; 20]))),
        ("data after the read", chunk(true, 1, 1, &at(1530, &[0; 20]))),
        ("data that is no data", chunk(true, 1, 1, &at(512, &[]))),
        ("more data than was asked", chunk(true, 1, 1, &at(512, &[0; 1025]))),
        ("an offset beyond everything", chunk(true, 1, 1, &at(u64::MAX, &[0; 2]))),
        ("a hole outside", chunk(true, 2, 1, &at(0, &[0, 0, 0, 9]))),
        ("data for a flush", chunk(true, 1, 3, &at(0, &[0]))),
        ("extents for a read", chunk(true, 5, 1, &[0; 12])),
        ("extents of another context", chunk(true, 5, 2, &[0; 12])),
        ("no extents", chunk(true, 5, 2, &[0, 0, 0, 42])),
        ("an empty extent", chunk(true, 5, 2, &[0, 0, 0, 42, 0, 0, 0, 0, 0, 0, 0, 0])),
        ("an unknown chunk", chunk(true, 9, 1, &[])),
        ("an error that is none", chunk(true, 0x8001, 1, &[0; 6])),
        ("an error cut off", chunk(true, 0x8001, 1, b"\0\0\0\x05\0\x09no")),
        ("an endless error", chunk(true, 0x8001, 1, &[1; 5000])),
        ("no reply at all", vec![0; 20]),
    ] {
        assert!(parsed(ReplyStyle::Structured, &bytes).is_err(), "{what} was taken");
    }
    assert!(parsed(ReplyStyle::Simple, &chunk(true, 0, 3, &[])).is_err(), "was not negotiated");
}

#[test]
fn simple_data_needs_no_length() {
    let data: Vec<u8> = (0..1024_u32).map(|at| at as u8).collect();
    let bytes = [simple(0, 1), data.clone()].concat();
    let reply = parsed(ReplyStyle::Simple, &bytes).unwrap().unwrap();
    let content = Content::Data { offset: ByteOffset(512), data: data.into() };
    assert_eq!(reply, Reply { cookie: Cookie(1), content, last: true });
    assert_eq!(parsed(ReplyStyle::Simple, &bytes[..500]), Ok(None));
}
