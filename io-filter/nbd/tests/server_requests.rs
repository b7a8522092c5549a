//! Requests and replies of the server, in bytes written by hand.

mod support;

use backtide_nbd::server::{Incoming, ReadPart, ReplyEncoder, ReplyTo, RequestParser};
use backtide_nbd::{Command, Extent, Intake, NbdError, ProtocolError, ReplyStyle};
use backtide_units::{ByteCount, ByteOffset};
use bytes::{Bytes, BytesMut};
use support::{Requests, SIZE, feed, request, session};

const READ: u16 = 0;
const WRITE: u16 = 1;
const DISC: u16 = 2;
const FLUSH: u16 = 3;
const TRIM: u16 = 4;
const CACHE: u16 = 5;
const ZEROES: u16 = 6;
const STATUS: u16 = 7;
const MAX: u32 = 32 << 20;

fn of(export: &str) -> Requests {
    Requests::new(&session(export))
}

#[test]
fn every_command_arrives_with_its_flags() {
    let mut requests = of("disk");
    let (offset, length) = (ByteOffset(512), ByteCount(1024));
    assert_eq!(
        requests.command(&request(READ, 4, 1, 512, 1024)),
        Command::Read { offset, length, one_chunk: true }
    );
    assert_eq!(
        requests.command(&[&request(WRITE, 1, 2, 512, 3)[..], b"abc"].concat()),
        Command::Write { offset, data: Bytes::from_static(b"abc"), fua: true }
    );
    assert_eq!(requests.command(&request(FLUSH, 0, 3, 0, 0)), Command::Flush);
    assert_eq!(
        requests.command(&request(TRIM, 0, 4, 512, 1024)),
        Command::Trim { offset, length, fua: false }
    );
    assert_eq!(
        requests.command(&request(ZEROES, 3, 5, 512, 1024)),
        Command::WriteZeroes { offset, length, fua: true, no_hole: true, fast: false }
    );
    assert_eq!(requests.command(&request(CACHE, 0, 6, 512, 1024)), Command::Cache { offset, length });
    assert_eq!(
        requests.command(&request(STATUS, 8, 7, 512, 1024)),
        Command::BlockStatus { offset, length, one: true }
    );
    assert_eq!(requests.try_send(&request(DISC, 0, 0, 0, 0)), Ok(Some(Incoming::Disconnect)));
}

#[test]
fn bad_requests_get_the_specified_errors() {
    use NbdError::{Invalid, NoSpace, NotPermitted, Overflow};
    let huge = u64::MAX - 10;
    for (export, kind, flags, offset, length, expected) in [
        ("disk", READ, 0, SIZE, 1, Invalid),
        ("disk", READ, 0, SIZE - 1, 2, Invalid),
        ("disk", READ, 0, huge, 4096, Invalid),
        ("disk", READ, 2, 0, 1, Invalid),
        ("disk", WRITE, 0, SIZE, 1, NoSpace),
        ("disk", WRITE, 0, huge, 4096, NoSpace),
        ("disk", WRITE, 0, 0, MAX + 1, Invalid),
        ("disk", WRITE, 4, 0, 1, Invalid),
        ("disk", FLUSH, 0, 4096, 0, Invalid),
        ("disk", FLUSH, 8, 0, 0, Invalid),
        ("disk", TRIM, 0, SIZE - 1, 2, Invalid),
        ("disk", TRIM, 2, 0, 1, Invalid),
        ("disk", ZEROES, 0, SIZE - 1, 2, NoSpace),
        ("disk", ZEROES, 0, huge, 4096, NoSpace),
        ("disk", ZEROES, 16, 0, 1, Invalid),
        ("disk", CACHE, 0, SIZE, 1, Invalid),
        ("disk", STATUS, 0, SIZE, 1, Invalid),
        ("disk", STATUS, 0, 0, 0, Invalid),
        ("disk", STATUS, 2, 0, 1, Invalid),
        ("disk", 8, 0, 0, 0, Invalid),
        ("disk", 0xffff, 0, 0, 0, Invalid),
        ("golden", WRITE, 0, 0, 512, NotPermitted),
        ("golden", TRIM, 0, 0, 512, NotPermitted),
        ("golden", ZEROES, 0, 0, 512, NotPermitted),
        ("coarse", READ, 0, 512, 4096, Invalid),
        ("coarse", READ, 0, 0, 512, Invalid),
        ("coarse", WRITE, 0, 512, 4096, Invalid),
    ] {
        let mut requests = of(export);
        let mut bytes = request(kind, flags, 9, offset, length);
        if kind == WRITE {
            bytes.resize(bytes.len() + length as usize, 7);
        }
        assert_eq!(requests.refusal(&bytes), expected, "{export} {kind} {flags} {offset} {length}");
        // Whatever was refused, the next request is understood.
        assert_eq!(requests.command(&request(FLUSH, 0, 0, 0, 0)), Command::Flush);
    }
    // A size large enough for reads beyond the limit; old clients do not know EOVERFLOW.
    let mut session = session("disk");
    session.export.size = ByteCount(1 << 40);
    let mut large = Requests::new(&session);
    assert_eq!(large.refusal(&request(READ, 4, 0, 0, MAX + 1)), Overflow);
    assert_eq!(large.refusal(&request(READ, 0, 0, 0, MAX + 1)), Overflow);
    session.style = ReplyStyle::Simple;
    let mut large = Requests::new(&session);
    assert_eq!(large.refusal(&request(READ, 0, 0, 0, MAX + 1)), Invalid);
    assert!(matches!(large.command(&request(READ, 0, 0, 0, MAX)), Command::Read { .. }));
    assert!(matches!(large.command(&request(TRIM, 0, 0, 0, u32::MAX)), Command::Trim { .. }));
}

#[test]
fn a_refusal_names_its_cause() {
    for (export, kind, offset, length, cause) in [
        ("golden", ZEROES, 0, 512, "read-only"),
        ("disk", READ, SIZE, 512, "beyond the end"),
        ("disk", READ, 0, MAX + 1, "beyond the end"),
        ("coarse", READ, 512, 4096, "block size"),
        ("disk", FLUSH, 0, 1, "a flush has neither"),
        ("disk", 99, 0, 0, "was not offered"),
    ] {
        let refused = of(export).try_send(&request(kind, 0, 1, offset, length));
        let Ok(Some(Incoming::Refused(_, _, why))) = refused else { panic!("{cause}: {refused:?}") };
        assert!(why.contains(cause), "{why}");
    }
}

/// The parts in which a READ of `data` is answered, as (start, length, zero).
fn parts(style: ReplyStyle, flags: u16, data: &[u8]) -> Vec<(usize, usize, bool)> {
    let mut session = session("disk");
    session.style = style;
    session.export.size = ByteCount(1 << 30);
    let (mut parser, mut intake) = (RequestParser::new(&session), Intake::new());
    feed(&mut intake, &request(READ, flags, 1, 512, data.len() as u32));
    let Ok(Some(Incoming::Request(to, _))) = parser.next(&mut intake) else { panic!("a READ is taken") };
    let whole = ReadPart { start: 0, length: data.len(), zero: false };
    let parts = ReplyEncoder::new(&session).parts(to, data).unwrap_or_else(|| vec![whole]);
    parts.into_iter().map(|part| (part.start, part.length, part.zero)).collect()
}

#[test]
fn zeroes_are_told_to_whoever_understands_that() {
    use ReplyStyle::{Simple, Structured};
    const DF: u16 = 4;
    const KIB: usize = 1 << 10;
    let zeroes = vec![0; 200 * KIB];
    for length in [1, 63, 64, 65, 512, 4096, 128 * KIB, 200 * KIB] {
        let mut data = zeroes[..length].to_vec();
        assert_eq!(parts(Simple, 0, &data), [(0, length, false)], "{length}");
        for flags in [0, DF] {
            assert_eq!(
                parts(Structured, flags, &data),
                [(0, length, true)],
                "{length}: one chunk all the same"
            );
        }
        // Whichever byte it is.
        for at in [0, length / 2, length - 1] {
            data[at] = 1;
            assert_eq!(parts(Structured, DF, &data), [(0, length, false)], "{at} of {length}");
            data[at] = 0;
        }
    }
    let mut data = zeroes;
    data[70 * KIB] = 1;
    let expected = [(0, 64 * KIB, true), (64 * KIB, 64 * KIB, false), (128 * KIB, 72 * KIB, true)];
    assert_eq!(parts(Structured, 0, &data), expected);
    assert_eq!(parts(Structured, DF, &data), [(0, 200 * KIB, false)]);
    assert_eq!(
        parts(Structured, 0, &data[..100 * KIB]),
        [(0, 100 * KIB, false)],
        "short ones stay in one piece"
    );
    data.fill(1);
    assert_eq!(parts(Structured, 0, &data), [(0, 200 * KIB, false)]);
    assert_eq!(parts(Structured, 0, &[]), [(0, 0, false)]);
}

#[test]
fn parts_of_a_read_look_as_specified() {
    let read = request(READ, 0, 7, 512, 4);
    let written = reply(ReplyStyle::Structured, &read, |encoder, to, out| {
        encoder.part(to, ReadPart { start: 0, length: 1, zero: false }, false, out);
        out.extend_from_slice(b"a");
        encoder.part(to, ReadPart { start: 1, length: 3, zero: true }, true, out);
    });
    let head = |flags: u8, kind: u8, length: u8| {
        [&[0x66, 0x8e, 0x33, 0xef, 0, flags, 0, kind][..], &7_u64.to_be_bytes(), &[0, 0, 0, length]].concat()
    };
    let data = [&head(0, 1, 9)[..], &512_u64.to_be_bytes(), b"a"].concat();
    let hole = [&head(1, 2, 12)[..], &513_u64.to_be_bytes(), &3_u32.to_be_bytes()].concat();
    assert_eq!(written, [data, hole].concat());
}

#[test]
fn block_status_without_its_context_is_refused() {
    let mut session = session("disk");
    session.contexts.base_allocation = false;
    let mut requests = Requests::new(&session);
    assert_eq!(requests.refusal(&request(STATUS, 0, 0, 0, 512)), NbdError::Invalid);
}

#[test]
fn the_payload_of_a_refused_write_is_skipped_and_not_kept() {
    let mut requests = of("golden");
    assert_eq!(requests.try_send(&request(WRITE, 0, 1, 0, u32::MAX)), Ok(None));
    assert!(requests.parser.is_inside());
    let mut left = u32::MAX as usize;
    let piece = vec![0; 200 << 10];
    while left > piece.len() {
        assert_eq!(requests.try_send(&piece), Ok(None));
        assert_eq!(requests.intake.buffered().len() + requests.intake.payload_missing(), 0);
        left -= piece.len();
    }
    assert_eq!(requests.refusal(&piece[..left]), NbdError::NotPermitted);
    assert!(!requests.parser.is_inside());
}

#[test]
fn a_long_write_may_arrive_in_any_pieces() {
    let data: Vec<u8> = (0..300_000_u32).map(|at| at as u8).collect();
    for piece in [1000, 65_536, 262_144, 1 << 20] {
        let mut requests = of("disk");
        let bytes = [request(WRITE, 0, 1, 0, data.len() as u32), data.clone()].concat();
        let mut taken = None;
        for part in bytes.chunks(piece) {
            assert_eq!(taken, None);
            taken = requests.try_send(part).expect("the framing is right");
        }
        let Some(Incoming::Request(_, Command::Write { data: got, .. })) = taken else {
            panic!("no write but {taken:?}");
        };
        assert!(got == data);
    }
}

#[test]
fn a_broken_request_is_an_error_that_names_what_was_found() {
    let mut requests = of("disk");
    feed(&mut requests.intake, &[0x11; 28]);
    assert_eq!(
        requests.parser.next(&mut requests.intake),
        Err(ProtocolError::BadMagic { message: "a request", expected: 0x2560_9513, found: 0x1111_1111 })
    );
}

/// The reply `encode` makes to a request, as it travels.
fn reply(style: ReplyStyle, bytes: &[u8], encode: impl Fn(ReplyEncoder, ReplyTo, &mut BytesMut)) -> Vec<u8> {
    let mut session = session("disk");
    session.style = style;
    Requests::new(&session).reply(bytes, encode)
}

#[test]
fn replies_look_as_specified() {
    use ReplyStyle::{Simple, Structured};
    let read = request(READ, 0, 0x0102_0304_0506_0708, 512, 2);
    let cookie = [1, 2, 3, 4, 5, 6, 7, 8];
    let simple = |error: u8| [&[0x67, 0x44, 0x66, 0x98, 0, 0, 0, error][..], &cookie].concat();
    let chunk = |kind: [u8; 2], rest: &[u8]| {
        [&[0x66, 0x8e, 0x33, 0xef, 0, 1, kind[0], kind[1]][..], &cookie, rest].concat()
    };

    let flush = request(FLUSH, 0, 0x0102_0304_0506_0708, 0, 0);
    for style in [Simple, Structured] {
        assert_eq!(reply(style, &flush, |e, to, out| e.done(to, out)), simple(0));
        let failed = reply(style, &flush, |e, to, out| e.error(to, NbdError::NoSpace, "", out));
        assert_eq!(failed, simple(28));
    }
    // A simple reply has no room for a text.
    let failed = |style| reply(style, &flush, |e, to, out| e.error(to, NbdError::NoSpace, "x", out));
    assert_eq!(failed(Simple), simple(28));
    assert_eq!(failed(Structured), chunk([0x80, 1], &[0, 0, 0, 7, 0, 0, 0, 28, 0, 1, b'x']));
    let header = |style| reply(style, &read, |e, to, out| e.read_header(to, ByteCount(2), out));
    assert_eq!(header(Simple), simple(0));
    assert_eq!(header(Structured), chunk([0, 1], &[0, 0, 0, 10, 0, 0, 0, 0, 0, 0, 2, 0]));

    let failed = |style| reply(style, &read, |e, to, out| e.error(to, NbdError::Io, "no", out));
    assert_eq!(failed(Simple), simple(5));
    assert_eq!(failed(Structured), chunk([0x80, 1], &[0, 0, 0, 8, 0, 0, 0, 5, 0, 2, b'n', b'o']));
}

/// The extents a client gets, as (length, flags).
fn extents(flags: u16, length: u32, extents: &[Extent]) -> Vec<(u32, u32)> {
    let status = request(STATUS, flags, 1, 0, length);
    let written = reply(ReplyStyle::Structured, &status, |e, to, out| e.extents(to, extents, out));
    let words: Vec<u32> =
        written[20..].chunks(4).map(|word| u32::from_be_bytes(word.try_into().unwrap())).collect();
    assert_eq!(words[0], 1, "the context's id");
    words[1..].chunks(2).map(|pair| (pair[0], pair[1])).collect()
}

#[test]
fn extents_are_joined_cut_and_never_empty() {
    let data = |length| Extent::data(ByteCount(length));
    let hole = |length| Extent::hole(ByteCount(length));
    assert_eq!(extents(0, 4096, &[data(10), data(20), hole(0), hole(5)]), [(30, 0), (5, 3)]);
    assert_eq!(extents(0, 4096, &[hole(1 << 40), data(7)]), [(4096, 3)]);
    assert_eq!(extents(8, 4096, &[data(10), data(10), hole(5)]), [(20, 0)]);
    assert_eq!(extents(0, 100, &[data(60), hole(60)]), [(60, 0), (40, 3)]);
}

#[test]
fn texts_of_errors_are_cut() {
    let read = request(READ, 0, 1, 512, 2);
    let text = "ä".repeat(5000);
    let written = reply(ReplyStyle::Structured, &read, |e, to, out| e.error(to, NbdError::Io, &text, out));
    assert_eq!(written[24..26], 4096_u16.to_be_bytes());
    assert_eq!(written.len(), 20 + 4 + 2 + 4096);
    assert!(std::str::from_utf8(&written[26..]).is_ok());
}
