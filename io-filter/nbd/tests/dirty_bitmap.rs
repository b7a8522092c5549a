//! The metadata context `qemu:dirty-bitmap:`, beside `base:allocation` and alone.

mod support;

use backtide_nbd::server::{
    Catalog, Handshake, Incoming, ReplyEncoder, RequestParser, Session, Step, TlsMode,
};
use backtide_nbd::wire::{option as code, option_reply as reply};
use backtide_nbd::{Command, DirtyExtent, ExportInfo, ExportSummary, Extent, Intake, NbdError};
use backtide_units::ByteCount;
use bytes::BytesMut;
use support::{contexts, extended, feed, go, option, option_reply, request};

const STATUS: u16 = 7;
const PAYLOAD: u16 = 1 << 5;
const DIRTY: &str = "qemu:dirty-bitmap:vm1";
const BASE: &str = "base:allocation";

struct One;

impl Catalog for One {
    fn find(&self, _: &str) -> Option<ExportInfo> {
        let info = ExportInfo::new("disk", ByteCount(1 << 30));
        Some(ExportInfo { dirty_bitmap: Some("vm1".to_owned()), ..info })
    }

    fn list(&self) -> Vec<ExportSummary> {
        Vec::new()
    }
}

/// A handshake that speaks `style`, and what the server said to the last thing that was sent.
struct Server {
    machine: Handshake,
    intake: Intake,
}

impl Server {
    fn new(style: u32) -> Self {
        let mut out = BytesMut::new();
        let machine = Handshake::start(TlsMode::Off, &mut out);
        let mut server = Self { machine, intake: Intake::new() };
        server.send(&3_u32.to_be_bytes());
        server.send(&option(style, &[]));
        server
    }

    fn send(&mut self, bytes: &[u8]) -> (Vec<u8>, Option<Session>) {
        feed(&mut self.intake, bytes);
        let mut out = BytesMut::new();
        loop {
            match self.machine.step(&mut self.intake, &One, &mut out).unwrap() {
                Step::NeedMore => return (out.to_vec(), None),
                Step::Transmission(session) => return (out.to_vec(), Some(*session)),
                Step::Answered => {}
                other => panic!("{other:?}"),
            }
        }
    }

    fn session(mut self, chosen: &[&str]) -> Session {
        self.send(&option(code::SET_META_CONTEXT, &contexts("disk", chosen)));
        self.send(&option(code::GO, &go("disk", &[]))).1.expect("GO begins transmission")
    }
}

/// The answer to a question for contexts: those, with their ids.
fn told(option: u32, found: &[(u32, &str)]) -> Vec<u8> {
    let context = |(id, name): &(u32, &str)| {
        let body = [&id.to_be_bytes()[..], name.as_bytes()].concat();
        option_reply(option, reply::META_CONTEXT, &body)
    };
    let mut bytes: Vec<u8> = found.iter().flat_map(context).collect();
    bytes.extend(option_reply(option, reply::ACK, &[]));
    bytes
}

#[test]
fn a_dirty_bitmap_is_listed_by_name_by_namespace_or_with_all() {
    let mut server = Server::new(code::STRUCTURED_REPLY);
    for (queries, found) in [
        (&[][..], &[(0, BASE), (0, DIRTY)][..]),
        (&["qemu:"], &[(0, DIRTY)]),
        (&["qemu:dirty-bitmap:"], &[(0, DIRTY)]),
        (&[DIRTY, "base:"], &[(0, BASE), (0, DIRTY)]),
        (&["qemu:dirty-bitmap:other"], &[]),
    ] {
        let said = server.send(&option(code::LIST_META_CONTEXT, &contexts("disk", queries))).0;
        assert_eq!(said, told(code::LIST_META_CONTEXT, found), "{queries:?}");
    }
    for (queries, found) in [
        (&[DIRTY][..], &[(2, DIRTY)][..]),
        (&[DIRTY, BASE], &[(1, BASE), (2, DIRTY)]),
        (&["qemu:", "qemu:dirty-bitmap:"], &[]),
    ] {
        let said = server.send(&option(code::SET_META_CONTEXT, &contexts("disk", queries))).0;
        assert_eq!(said, told(code::SET_META_CONTEXT, found), "{queries:?}");
    }
}

/// The answer to a BLOCK_STATUS, as chunks: their flags, and the 32-bit words of their bodies.
fn chunks(session: &Session, bytes: &[u8], header: usize) -> Vec<(u16, Vec<u32>)> {
    let (mut parser, mut intake) = (RequestParser::new(session), Intake::new());
    feed(&mut intake, bytes);
    let Ok(Some(Incoming::Request(to, Command::BlockStatus { .. }))) = parser.next(&mut intake) else {
        panic!("no block status")
    };
    let mut out = BytesMut::new();
    let dirty = |length, dirty| DirtyExtent { length: ByteCount(length), dirty };
    let extents = [Extent::hole(ByteCount(4096)), Extent::data(ByteCount(4096))];
    let changes = [dirty(512, false), dirty(1000, true), dirty(24, true), dirty(1 << 20, false)];
    ReplyEncoder::new(session).statuses(to, &extents, &changes, &mut out);
    let mut rest = &out[..];
    let mut chunks = Vec::new();
    while !rest.is_empty() {
        let flags = u16::from_be_bytes(rest[4..6].try_into().unwrap());
        let length = u32::from_be_bytes(rest[header - 4..header].try_into().unwrap()) as usize;
        let words = rest[header..header + length].chunks(4);
        chunks.push((flags, words.map(|word| u32::from_be_bytes(word.try_into().unwrap())).collect()));
        rest = &rest[header + length..];
    }
    chunks
}

#[test]
fn each_context_that_was_chosen_is_a_chunk_and_the_last_ends_the_reply() {
    let status = request(STATUS, 0, 9, 0, 8192);
    let of = |chosen: &[&str]| chunks(&Server::new(code::STRUCTURED_REPLY).session(chosen), &status, 20);
    let base = vec![1, 4096, 3, 4096, 0];
    let dirty = vec![2, 512, 0, 1024, 1, 8192 - 1536, 0];
    assert_eq!(of(&[BASE, DIRTY]), [(0, base.clone()), (1, dirty.clone())]);
    assert_eq!(of(&[BASE]), [(1, base)]);
    assert_eq!(of(&[DIRTY]), [(1, dirty)]);
}

#[test]
fn a_request_names_the_contexts_it_wants_among_those_chosen() {
    let status = |ids: &[u32]| {
        let payload =
            [&8192_u64.to_be_bytes()[..], &ids.iter().flat_map(|id| id.to_be_bytes()).collect::<Vec<_>>()];
        let payload = payload.concat();
        [extended(STATUS, PAYLOAD, 9, 0, payload.len() as u64), payload].concat()
    };
    let both = Server::new(code::EXTENDED_HEADERS).session(&[BASE, DIRTY]);
    let ids = |bytes: &[u8]| {
        let chunks = chunks(&both, bytes, 32);
        chunks.iter().map(|(flags, words)| (*flags, words[0])).collect::<Vec<_>>()
    };
    assert_eq!(ids(&status(&[1])), [(1, 1)]);
    assert_eq!(ids(&status(&[2])), [(1, 2)]);
    assert_eq!(ids(&status(&[2, 1])), [(0, 1), (1, 2)]);
    assert_eq!(ids(&extended(STATUS, 0, 9, 0, 8192)), [(0, 1), (1, 2)], "all that were chosen");
    let one = Server::new(code::EXTENDED_HEADERS).session(&[BASE]);
    for (session, wrong) in [(&both, &[2, 2][..]), (&both, &[3]), (&one, &[2]), (&one, &[1, 2])] {
        let (mut parser, mut intake) = (RequestParser::new(session), Intake::new());
        feed(&mut intake, &status(wrong));
        let found = parser.next(&mut intake).unwrap();
        assert!(matches!(found, Some(Incoming::Refused(_, NbdError::Invalid, _))), "{wrong:?}: {found:?}");
    }
}
