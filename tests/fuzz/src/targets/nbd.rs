//! NBD: what a client says to a server, what a server says to a client, and what people write as a URI.

use backtide_nbd::{
    Cookie, ExportInfo, ExportSummary, Intake, MAX_PAYLOAD, NbdUri,
    client::{self, Expected, Goal, ReplyParser},
    server::{Catalog, Handshake, Incoming, RequestParser, Step, TlsMode},
    wire,
};
use backtide_units::{ByteCount, ByteOffset, ByteRange};
use bytes::{BufMut, BytesMut};

use super::leave;
use crate::Target;

const SIZE: ByteCount = ByteCount(1 << 20);

pub(super) fn targets() -> Vec<Target> {
    let uris = [
        "nbd://example.org:10809/disk",
        "nbd+unix:///disk?socket=/run/x.sock",
        "nbds+unix://user@/a%20b?socket=/run/x.sock&tls-certificates=/etc/pki",
        "nbd://[::1]/",
    ];
    let uris = uris.map(|uri| uri.as_bytes().to_vec()).to_vec();
    let servers = vec![server_talk(true), server_talk(false)];
    let clients = vec![client_talk(true), client_talk(false)];
    vec![
        Target { name: "nbd server", seeds: 6000, samples: servers, mend: leave, take: server },
        Target { name: "nbd client", seeds: 6000, samples: clients, mend: leave, take: client },
        Target { name: "nbd uri", seeds: 6000, samples: uris, mend: leave, take: uri },
    ]
}

struct One;

impl Catalog for One {
    fn find(&self, name: &str) -> Option<ExportInfo> {
        (name.is_empty() || name == "disk").then(|| ExportInfo::new("disk", SIZE))
    }

    fn list(&self) -> Vec<ExportSummary> {
        vec![ExportSummary { name: "disk".to_owned(), description: String::new() }]
    }
}

fn option(out: &mut Vec<u8>, code: u32, data: &[u8]) {
    out.put_u64(wire::magic::OPTION);
    out.put_u32(code);
    out.put_u32(data.len() as u32);
    out.put_slice(data);
}

fn answer(out: &mut Vec<u8>, code: u32, reply: u32, data: &[u8]) {
    out.put_u64(wire::magic::OPTION_REPLY);
    out.put_u32(code);
    out.put_u32(reply);
    out.put_u32(data.len() as u32);
    out.put_slice(data);
}

/// A length, the name, then what follows it.
fn named(rest: &[u8]) -> Vec<u8> {
    [&4_u32.to_be_bytes()[..], b"disk", rest].concat()
}

fn contexts() -> Vec<u8> {
    named(&[&1_u32.to_be_bytes()[..], &15_u32.to_be_bytes(), b"base:allocation"].concat())
}

/// What a client says: options, then requests of every kind.
fn server_talk(structured: bool) -> Vec<u8> {
    let mut out = 3_u32.to_be_bytes().to_vec();
    option(&mut out, wire::option::LIST, &[]);
    if structured {
        option(&mut out, wire::option::STRUCTURED_REPLY, &[]);
        option(&mut out, wire::option::SET_META_CONTEXT, &contexts());
    }
    option(&mut out, wire::option::GO, &named(&[0, 1, 0, 3]));
    for kind in [0_u16, 1, 3, 4, 5, 6, 7] {
        let length = if kind == 3 { 0 } else { 4096_u32 };
        out.put_u32(0x2560_9513);
        out.put_u16(0);
        out.put_u16(kind);
        out.put_u64(u64::from(kind));
        out.put_u64(8192);
        out.put_u32(length);
        if kind == 1 {
            out.put_bytes(5, length as usize);
        }
    }
    out
}

/// What a server says: the greeting, answers to options, then replies.
fn client_talk(structured: bool) -> Vec<u8> {
    let mut out = b"NBDMAGICIHAVEOPT\x00\x03".to_vec();
    answer(&mut out, wire::option::EXTENDED_HEADERS, wire::option_reply::ERR_UNSUP, &[]);
    if structured {
        answer(&mut out, wire::option::STRUCTURED_REPLY, wire::option_reply::ACK, &[]);
        let context = [&[0, 0, 0, 42][..], b"base:allocation"].concat();
        let (set, meta) = (wire::option::SET_META_CONTEXT, wire::option_reply::META_CONTEXT);
        answer(&mut out, set, meta, &context);
        answer(&mut out, set, wire::option_reply::ACK, &[]);
    } else {
        answer(&mut out, wire::option::STRUCTURED_REPLY, wire::option_reply::ERR_UNSUP, &[]);
    }
    let info = [&[0, 0][..], &SIZE.0.to_be_bytes(), &[0, 0b101]].concat();
    answer(&mut out, wire::option::GO, wire::option_reply::INFO, &info);
    answer(&mut out, wire::option::GO, wire::option_reply::ACK, &[]);
    if structured {
        for (kind, payload) in [(1_u16, [&[0; 8][..], &[9; 512]].concat()), (0x8001, vec![0, 0, 0, 5, 0, 0])]
        {
            out.put_u32(0x668e_33ef);
            out.put_u16(u16::from(kind == 0x8001));
            out.put_u16(kind);
            out.put_u64(0);
            out.put_u32(payload.len() as u32);
            out.put_slice(&payload);
        }
    } else {
        out.put_u32(0x6744_6698);
        out.put_u32(0);
        out.put_u64(0);
        out.put_bytes(9, 512);
    }
    out
}

/// Puts as much of `bytes` into the intake as a driver would; gives the rest.
fn feed<'a>(intake: &mut Intake, bytes: &'a [u8]) -> &'a [u8] {
    let mut space = intake.space();
    let count = space.remaining_mut().min(bytes.len());
    space.put_slice(&bytes[..count]);
    &bytes[count..]
}

fn check_bounds(intake: &Intake) {
    assert!(intake.buffered().len() <= 256 << 10);
    assert!(intake.payload_missing() as u64 <= MAX_PAYLOAD.0 + 8);
}

fn server(bytes: &[u8]) {
    let (mut out, mut intake, mut rest) = (BytesMut::new(), Intake::new(), bytes);
    let mut handshake = Handshake::start(TlsMode::Off, &mut out);
    let session = loop {
        match handshake.step(&mut intake, &One, &mut out) {
            Ok(Step::Answered) => {}
            Ok(Step::Transmission(session)) => break session,
            Ok(Step::NeedMore) if !rest.is_empty() => rest = feed(&mut intake, rest),
            Ok(Step::NeedMore | Step::Awaited | Step::StartTls | Step::Closed) | Err(_) => return,
        }
        check_bounds(&intake);
    };
    let mut parser = RequestParser::new(&session);
    let whole = ByteRange::between(ByteOffset::ZERO, ByteOffset(SIZE.0));
    loop {
        match parser.next(&mut intake) {
            Ok(Some(Incoming::Request(to, command))) => {
                assert!(whole.contains(command.range()) && to.data_length() <= MAX_PAYLOAD);
            }
            Ok(Some(Incoming::Refused(..))) => {}
            Ok(None) if !rest.is_empty() => rest = feed(&mut intake, rest),
            Ok(None | Some(Incoming::Disconnect)) | Err(_) => return,
        }
        check_bounds(&intake);
    }
}

fn client(bytes: &[u8]) {
    let (mut out, mut intake, mut rest) = (BytesMut::new(), Intake::new(), bytes);
    let mut handshake = client::Handshake::new(Goal::Open("disk".to_owned()));
    let session = loop {
        match handshake.step(&mut intake, &mut out) {
            Ok(client::Step::Transmission(session)) => break session,
            Ok(client::Step::NeedMore) if !rest.is_empty() => rest = feed(&mut intake, rest),
            Ok(client::Step::NeedMore | client::Step::StartTls | client::Step::Listed(_)) | Err(_) => return,
        }
        check_bounds(&intake);
    };
    let mut parser = ReplyParser::new(&session);
    let expected = |_: Cookie| Some(Expected::Read(ByteRange::between(ByteOffset::ZERO, ByteOffset(512))));
    loop {
        match parser.next(&mut intake, expected) {
            Ok(Some(_)) => {}
            Ok(None) if !rest.is_empty() => rest = feed(&mut intake, rest),
            Ok(None) | Err(_) => return,
        }
        check_bounds(&intake);
    }
}

fn uri(bytes: &[u8]) {
    let Ok(uri) = String::from_utf8_lossy(bytes).parse::<NbdUri>() else { return };
    // What is understood is understood again when it is shown.
    let shown = uri.to_string();
    assert_eq!(shown.parse::<NbdUri>().as_ref(), Ok(&uri), "{shown}");
}
