//! Extended headers: requests of 64 bits, one shape for every reply, on both sides.

mod support;

use backtide_nbd::client::{Content, Expected, ReplyParser, encode_disconnect, encode_request};
use backtide_nbd::server::{Incoming, ReplyEncoder, RequestParser, Step};
use backtide_nbd::{Command, Cookie, Extent, Intake, NbdError, ProtocolError, ReplyStyle, wire};
use backtide_units::{ByteCount, ByteOffset, ByteRange};
use bytes::{Bytes, BytesMut};
use support::{Requests, SIZE, Server, contexts, extended, extended_session, feed, go, option};
use wire::{option as code, option_reply as reply};

const READ: u16 = 0;
const WRITE: u16 = 1;
const DISC: u16 = 2;
const FLUSH: u16 = 3;
const TRIM: u16 = 4;
const CACHE: u16 = 5;
const ZEROES: u16 = 6;
const STATUS: u16 = 7;
const REQ_ONE: u16 = 1 << 3;
const FAST: u16 = 1 << 4;
const PAYLOAD: u16 = 1 << 5;
/// As large as a disk can be.
const HUGE: u64 = 1 << 62;

/// The requests of a disk of 2^62 bytes with fast zeroes.
fn huge() -> Requests {
    of("disk", HUGE)
}

fn of(export: &str, size: u64) -> Requests {
    let mut session = extended_session(export);
    session.export.size = ByteCount(size);
    session.export.fast_zero = true;
    assert_eq!(session.style, ReplyStyle::Extended);
    Requests::new(&session)
}

/// A reply chunk of extended headers.
fn chunk(kind: u16, cookie: u64, offset: u64, payload: &[u8]) -> Vec<u8> {
    let mut bytes = wire::magic::EXTENDED_REPLY.to_be_bytes().to_vec();
    bytes.extend_from_slice(&1_u16.to_be_bytes());
    bytes.extend_from_slice(&kind.to_be_bytes());
    for word in [cookie, offset, payload.len() as u64] {
        bytes.extend_from_slice(&word.to_be_bytes());
    }
    bytes.extend_from_slice(payload);
    bytes
}

fn words(words: &[u64]) -> Vec<u8> {
    words.iter().flat_map(|word| word.to_be_bytes()).collect()
}

#[test]
fn extended_headers_take_precedence_and_are_kept() {
    let mut server = Server::fixed();
    assert_eq!(server.answers(code::STRUCTURED_REPLY, &[]), [(reply::ACK, vec![])]);
    assert_eq!(server.answers(code::EXTENDED_HEADERS, &[]), [(reply::ACK, vec![])]);
    assert_eq!(server.answers(code::EXTENDED_HEADERS, &[]), [(reply::ACK, vec![])]);
    let back = server.answers(code::STRUCTURED_REPLY, &[]);
    assert_eq!(back[0].0, reply::ERR_EXT_HEADER_REQD);
    let (_, step) = server.send(&option(code::GO, &go("disk", &[])));
    let Ok(Step::Transmission(session)) = step else { panic!("GO brought {step:?}") };
    assert_eq!(session.style, ReplyStyle::Extended);
}

#[test]
fn export_name_after_extended_headers_ends_the_connection() {
    let mut server = Server::fixed();
    server.answers(code::EXTENDED_HEADERS, &[]);
    let (written, step) = server.send(&option(code::EXPORT_NAME, b"disk"));
    assert_eq!(step, Err(ProtocolError::ExportNameAfterExtendedHeaders));
    assert!(written.is_empty());
}

#[test]
fn payloads_of_block_status_are_announced_only_where_they_are_served() {
    let flags = |style: u32, context: bool| {
        let mut server = Server::fixed();
        server.answers(style, &[]);
        if context {
            server.answers(code::SET_META_CONTEXT, &contexts("disk", &["base:allocation"]));
        }
        let answers = server.answers(code::INFO, &go("disk", &[]));
        u16::from_be_bytes([answers[0].1[10], answers[0].1[11]])
    };
    const BIT: u16 = 1 << 12;
    assert_eq!(flags(code::STRUCTURED_REPLY, true) & BIT, 0);
    assert_eq!(flags(code::EXTENDED_HEADERS, false) & BIT, 0);
    assert_eq!(flags(code::EXTENDED_HEADERS, true) & BIT, BIT);
}

#[test]
fn lengths_have_64_bits_where_nothing_is_carried() {
    let mut server = huge();
    let (offset, length) = (ByteOffset(512), ByteCount(1 << 61));
    let long = |kind, flags| extended(kind, flags, 1, 512, 1 << 61);
    assert_eq!(server.command(&long(TRIM, 0)), Command::Trim { offset, length, fua: false });
    assert_eq!(
        server.command(&long(ZEROES, FAST)),
        Command::WriteZeroes { offset, length, fua: false, no_hole: false, fast: true }
    );
    assert_eq!(server.command(&long(CACHE, 0)), Command::Cache { offset, length });
    assert_eq!(server.command(&long(STATUS, REQ_ONE)), Command::BlockStatus { offset, length, one: true });
    assert_eq!(server.refusal(&extended(READ, 0, 1, 0, (32 << 20) + 1)), NbdError::Overflow);
    assert_eq!(server.refusal(&extended(READ, 0, 1, 0, u64::from(u32::MAX) + 2)), NbdError::Overflow);
    assert_eq!(server.refusal(&extended(TRIM, 0, 1, 512, HUGE)), NbdError::Invalid);
    assert_eq!(server.refusal(&extended(ZEROES, 0, 1, 512, u64::MAX)), NbdError::NoSpace);
    assert_eq!(server.refusal(&extended(STATUS, 0, 1, 512, u64::MAX)), NbdError::Invalid);
    assert_eq!(server.try_send(&extended(DISC, 0, 0, 0, 0)), Ok(Some(Incoming::Disconnect)));
}

#[test]
fn a_write_has_its_payload_whether_announced_or_not() {
    let mut server = huge();
    // QEMU up to 10.0 does not announce it.
    for flag in [PAYLOAD, 0] {
        let write = [&extended(WRITE, flag | 1, 2, 512, 3)[..], b"abc"].concat();
        let data = Bytes::from_static(b"abc");
        assert_eq!(server.command(&write), Command::Write { offset: ByteOffset(512), data, fua: true });
        assert_eq!(server.command(&extended(FLUSH, 0, 4, 0, 0)), Command::Flush);
    }
    let refused = [extended(WRITE, PAYLOAD, 2, HUGE, 3000), vec![1; 3000]].concat();
    assert_eq!(server.refusal(&refused), NbdError::NoSpace);
    assert_eq!(server.command(&extended(FLUSH, 0, 4, 0, 0)), Command::Flush);
}

#[test]
fn a_payload_nobody_has_a_use_for_is_consumed_and_refused() {
    let mut server = huge();
    for kind in [READ, FLUSH, TRIM, CACHE, ZEROES, 8, 0xffff] {
        let request = [extended(kind, PAYLOAD, 1, 0, 5000), vec![0x55; 5000]].concat();
        assert_eq!(server.refusal(&request), NbdError::Invalid, "command {kind}");
        assert_eq!(server.command(&extended(FLUSH, 0, 0, 0, 0)), Command::Flush);
    }
}

#[test]
fn a_payload_beyond_the_largest_ends_the_connection() {
    for length in [(32 << 20) + 1, u64::from(u32::MAX), u64::MAX] {
        for kind in [WRITE, READ, STATUS] {
            let found = huge().try_send(&extended(kind, PAYLOAD, 1, 0, length));
            assert!(matches!(found, Err(ProtocolError::TooLong { found, .. }) if found == length));
        }
    }
}

#[test]
fn block_status_can_be_filtered_to_the_one_context() {
    let mut server = huge();
    let filter = |payload: &[u8]| {
        [extended(STATUS, PAYLOAD, 7, 4096, payload.len() as u64), payload.to_vec()].concat()
    };
    let with = |length: u64, ids: &[u32]| {
        filter(
            &[&length.to_be_bytes()[..], &ids.iter().flat_map(|id| id.to_be_bytes()).collect::<Vec<_>>()]
                .concat(),
        )
    };
    let (offset, length) = (ByteOffset(4096), ByteCount(1 << 40));
    assert_eq!(server.command(&with(1 << 40, &[1])), Command::BlockStatus { offset, length, one: false });
    for (what, bytes) in [
        ("an unknown context", with(4096, &[2])),
        ("a context twice", with(4096, &[1, 1])),
        ("no context", with(4096, &[])),
        ("a payload cut off", filter(&[0; 7])),
        ("a payload that is no list", filter(&[0; 13])),
        ("a range beyond the end", with(HUGE, &[1])),
        ("an endless list", with(4096, &[1; 10_000])),
    ] {
        assert_eq!(server.refusal(&bytes), NbdError::Invalid, "{what}");
        assert_eq!(server.command(&extended(FLUSH, 0, 0, 0, 0)), Command::Flush);
    }
}

#[test]
fn compact_requests_are_not_understood_any_more_and_the_flag_not_before() {
    let found = huge().try_send(&[support::request(FLUSH, 0, 0, 0, 0), vec![0; 4]].concat());
    assert!(matches!(found, Err(ProtocolError::BadMagic { .. })), "{found:?}");
    let (mut parser, mut intake) = (RequestParser::new(&support::session("disk")), Intake::new());
    feed(&mut intake, &support::request(READ, PAYLOAD, 0, 0, 512));
    assert!(matches!(parser.next(&mut intake), Ok(Some(Incoming::Refused(_, NbdError::Invalid, _)))));
}

#[test]
fn every_reply_is_a_chunk_that_repeats_cookie_and_offset() {
    let mut server = huge();
    let cookie = 0x0102_0304_0506_0708;
    let done = server.reply(&extended(TRIM, 0, cookie, 512, 1 << 40), |e, to, out| e.done(to, out));
    assert_eq!(done, chunk(0, cookie, 512, &[]));
    let failed = server.reply(&extended(TRIM, 0, cookie, 512, 1), |e, to, out| {
        e.error(to, NbdError::NoSpace, "no", out);
    });
    assert_eq!(failed, chunk(0x8001, cookie, 512, b"\0\0\0\x1c\0\x02no"));
    let read = server.reply(&extended(READ, 0, cookie, 512, 2), |e, to, out| {
        e.read_header(to, ByteCount(2), out);
        out.extend_from_slice(b"ab");
    });
    assert_eq!(read, chunk(1, cookie, 512, b"\0\0\0\0\0\0\x02\0ab"));
    let nothing =
        server.reply(&extended(READ, 0, cookie, 512, 0), |e, to, out| e.read_header(to, ByteCount(0), out));
    assert_eq!(nothing, chunk(0, cookie, 512, &[]));
    let extents = [Extent::hole(ByteCount(1 << 50)), Extent::data(ByteCount(u64::MAX))];
    let status =
        server.reply(&extended(STATUS, 0, cookie, 512, 1 << 60), |e, to, out| e.extents(to, &extents, out));
    let expected = words(&[1 << 32 | 2, 1 << 50, 3, (1 << 60) - (1 << 50), 0]);
    assert_eq!(status, chunk(6, cookie, 512, &expected));
    let refused = server.reply(&extended(READ, 0, cookie, HUGE, 1), |e, to, out| {
        e.error(to, NbdError::Invalid, "", out);
    });
    assert_eq!(refused, chunk(0x8001, cookie, HUGE, b"\0\0\0\x16\0\0"));
}

#[test]
fn only_a_fast_zero_fails_as_not_supported() {
    let failed = |flags, error| {
        let fail = |e: ReplyEncoder, to, out: &mut BytesMut| e.error(to, error, "", out);
        huge().reply(&extended(ZEROES, flags, 1, 0, 512), fail)[35]
    };
    assert_eq!(failed(FAST, NbdError::NotSupported), 95);
    assert_eq!(failed(FAST, NbdError::Overflow), 95, "its length is no reason");
    assert_eq!(failed(0, NbdError::NotSupported), 22);
    assert_eq!(failed(0, NbdError::Overflow), 75);
    // Where it was not offered, the flag is unknown.
    let (mut parser, mut intake) = (RequestParser::new(&extended_session("disk")), Intake::new());
    feed(&mut intake, &extended(ZEROES, FAST, 1, 0, 512));
    assert!(matches!(parser.next(&mut intake), Ok(Some(Incoming::Refused(_, NbdError::Invalid, _)))));
}

#[test]
fn extents_come_in_whole_blocks() {
    let hole = |length| Extent::hole(ByteCount(length));
    let data = |length| Extent::data(ByteCount(length));
    // `coarse` has blocks of 4096 bytes and here ends in the middle of one.
    let of = |flags, length, extents: &[Extent]| {
        let mut server = of("coarse", 5 * 4096 + 100);
        let bytes =
            server.reply(&extended(STATUS, flags, 1, 0, length), |e, to, out| e.extents(to, extents, out));
        let words: Vec<u64> =
            bytes[40..].chunks(8).map(|word| u64::from_be_bytes(word.try_into().unwrap())).collect();
        words.chunks(2).map(|pair| (pair[0], pair[1])).collect::<Vec<_>>()
    };
    let whole = 5 * 4096 + 100;
    assert_eq!(of(0, whole, &[hole(8192), data(whole)]), [(8192, 3), (3 * 4096 + 100, 0)]);
    // A block that is partly data is data.
    assert_eq!(
        of(0, whole, &[hole(5000), data(100), hole(whole)]),
        [(4096, 3), (4096, 0), (3 * 4096 + 100, 3)]
    );
    assert_eq!(of(0, 8192, &[hole(100), hole(3996), hole(4096)]), [(8192, 3)]);
    assert_eq!(of(REQ_ONE, whole, &[hole(5000), data(whole)]), [(4096, 3)]);
    // What is told ends inside a block: the rest of it may be data.
    assert_eq!(of(0, whole, &[hole(4100)]), [(4096, 3)]);
    assert_eq!(of(0, whole, &[hole(100)]), [(4096, 0)]);
}

/// The parser's answer to bytes of the server, with a read of 512..1536 in flight as 1, block
/// status at 4096 as 2 and a trim at 8192 as 3.
fn parsed(bytes: &[u8]) -> Result<Content, ProtocolError> {
    let (mut client, mut intake) = (support::client_session(ReplyStyle::Extended), Intake::new());
    client.base_allocation = Some(42);
    feed(&mut intake, bytes);
    let reply = ReplyParser::new(&client).next(&mut intake, |cookie| match cookie.0 {
        1 => ByteRange::new(ByteOffset(512), ByteCount(1024)).map(Expected::Read),
        2 => Some(Expected::Extents(ByteOffset(4096))),
        3 => Some(Expected::Plain(ByteOffset(8192))),
        _ => None,
    })?;
    Ok(reply.expect("all of it is there").content)
}

#[test]
fn the_client_understands_every_kind_of_chunk() {
    assert_eq!(parsed(&chunk(0, 3, 8192, &[])), Ok(Content::Nothing));
    let data = Content::Data { offset: ByteOffset(600), data: Bytes::from_static(b"abc") };
    let sent = [&words(&[600])[..], b"abc"].concat();
    assert_eq!(parsed(&chunk(1, 1, 512, &sent)), Ok(data));
    let hole = ByteRange::new(ByteOffset(512), ByteCount(1024)).unwrap();
    let sent = [&words(&[512])[..], &[0, 0, 4, 0]].concat();
    assert_eq!(parsed(&chunk(2, 1, 512, &sent)), Ok(Content::Hole(hole)));
    let extents = words(&[42 << 32 | 2, 1 << 50, 3, 5, 0]);
    let expected = vec![Extent::hole(ByteCount(1 << 50)), Extent::data(ByteCount(5))];
    assert_eq!(parsed(&chunk(6, 2, 4096, &extents)), Ok(Content::Extents(expected)));
    let error = Content::Error { error: NbdError::Io, text: "no".into() };
    assert_eq!(parsed(&chunk(0x8001, 3, 8192, b"\0\0\0\x05\0\x02no")), Ok(error));
}

#[test]
fn the_client_refuses_chunks_that_do_not_fit() {
    let mut endless = chunk(1, 1, 512, &[]);
    endless[24..].copy_from_slice(&u64::MAX.to_be_bytes());
    for (what, bytes) in [
        ("another offset", chunk(0, 3, 512, &[])),
        ("an unknown cookie", chunk(0, 9, 0, &[])),
        ("a simple reply", [&[0x67, 0x44, 0x66, 0x98][..], &[0; 28]].concat()),
        ("a structured chunk", [&[0x66, 0x8e, 0x33, 0xef][..], &[0; 28]].concat()),
        ("extents of 32 bits", chunk(5, 2, 4096, &[0, 0, 0, 42, 0, 0, 2, 0, 0, 0, 0, 3])),
        ("no extents", chunk(6, 2, 4096, &words(&[42 << 32]))),
        ("a wrong count", chunk(6, 2, 4096, &words(&[42 << 32 | 2, 5, 0]))),
        ("an empty extent", chunk(6, 2, 4096, &words(&[42 << 32 | 1, 0, 0]))),
        ("flags beyond 32 bits", chunk(6, 2, 4096, &words(&[42 << 32 | 1, 5, 1 << 32]))),
        ("extents of another context", chunk(6, 2, 4096, &words(&[41 << 32 | 1, 5, 0]))),
        ("an endless chunk", endless),
    ] {
        assert!(parsed(&bytes).is_err(), "{what} was taken");
    }
}

#[test]
fn the_clients_requests_are_what_the_server_understands() {
    let (offset, length) = (ByteOffset(4096), ByteCount(1 << 50));
    let data = Bytes::from_static(b"abc");
    for command in [
        Command::Read { offset, length: ByteCount(512), one_chunk: true },
        Command::Write { offset, data, fua: true },
        Command::Flush,
        Command::Trim { offset, length, fua: true },
        Command::WriteZeroes { offset, length, fua: false, no_hole: true, fast: true },
        Command::Cache { offset, length },
        Command::BlockStatus { offset, length, one: true },
    ] {
        let mut out = BytesMut::new();
        encode_request(&mut out, ReplyStyle::Extended, Cookie(7), &command);
        if let Command::Write { data, .. } = &command {
            out.extend_from_slice(data);
        }
        assert_eq!(huge().command(&out), command);
    }
    let mut out = BytesMut::new();
    encode_disconnect(&mut out, ReplyStyle::Extended);
    assert_eq!(huge().try_send(&out), Ok(Some(Incoming::Disconnect)));
}

#[test]
fn extended_requests_may_arrive_byte_by_byte() {
    let mut server = of("disk", SIZE);
    let write = [&extended(WRITE, PAYLOAD, 2, 512, 3)[..], b"abc"].concat();
    for byte in &write[..write.len() - 1] {
        assert_eq!(server.try_send(&[*byte]), Ok(None));
    }
    assert!(matches!(server.try_send(b"c"), Ok(Some(Incoming::Request(..)))));
}
