//! Whatever a peer sends: no panic, and no memory beyond the limits.

mod support;

use backtide_nbd::client::{self, Expected, ReplyParser};
use backtide_nbd::server::{Handshake, Incoming, RequestParser, Session, Step, TlsMode};
use backtide_nbd::{Cookie, Intake, MAX_PAYLOAD, ReplyStyle, wire};
use backtide_units::{ByteCount, ByteOffset, ByteRange};
use bytes::BytesMut;
use proptest::{collection::vec, prelude::*, sample::select, test_runner::TestCaseError};
use support::{
    Three, client_session, contexts, extended, extended_session, feed, go, option, option_reply, request,
    session,
};

/// Arbitrary bytes, or something that is almost right.
fn almost(right: impl Strategy<Value = Vec<u8>> + 'static) -> impl Strategy<Value = Vec<u8>> {
    let damaged = (right, any::<prop::sample::Index>(), any::<u8>()).prop_map(|(bytes, at, byte)| {
        let mut bytes = bytes;
        if !bytes.is_empty() && byte % 4 == 0 {
            let at = at.index(bytes.len());
            bytes[at] = byte;
        }
        bytes
    });
    prop_oneof![4 => damaged, 1 => vec(any::<u8>(), 0..100)]
}

fn some_option() -> impl Strategy<Value = Vec<u8>> {
    let data = prop_oneof![
        vec(any::<u8>(), 0..60),
        Just(go("disk", &[0, 1, 2, 3])),
        Just(contexts("disk", &["base:allocation", "base:"])),
        Just(vec![]),
    ];
    (0_u32..13, data).prop_map(|(code, data)| option(code, &data))
}

fn some_request() -> impl Strategy<Value = Vec<u8>> {
    let offset = select(vec![0, 512, 4096, support::SIZE - 1, u64::MAX - 1]);
    let length = select(vec![0_u32, 1, 512, 70_000, 33 << 20, u32::MAX]);
    (0_u16..10, 0_u16..64, any::<u64>(), offset, length)
        .prop_map(|(kind, flags, cookie, offset, length)| request(kind, flags, cookie, offset, length))
}

fn some_chunk() -> impl Strategy<Value = Vec<u8>> {
    let kind = select(vec![0_u16, 1, 2, 5, 6, 0x8001, 0x8002, 7, 0xffff]);
    (any::<bool>(), kind, 0_u64..3, 0_u16..2, vec(any::<u8>(), 0..40)).prop_map(
        |(simple, kind, cookie, flags, payload)| {
            if simple {
                let error = u32::from(kind) & 31;
                return [&0x6744_6698_u32.to_be_bytes()[..], &error.to_be_bytes(), &cookie.to_be_bytes()]
                    .concat();
            }
            let mut bytes = 0x668e_33ef_u32.to_be_bytes().to_vec();
            bytes.extend_from_slice(&flags.to_be_bytes());
            bytes.extend_from_slice(&kind.to_be_bytes());
            bytes.extend_from_slice(&cookie.to_be_bytes());
            bytes.extend_from_slice(&(payload.len() as u32).to_be_bytes());
            bytes.extend_from_slice(&payload);
            bytes
        },
    )
}

fn some_answer() -> impl Strategy<Value = Vec<u8>> {
    let reply = select(vec![1_u32, 2, 3, 4, 0x8000_0001, 0x8000_0006, 9]);
    let data = prop_oneof![
        vec(any::<u8>(), 0..40),
        Just([&[0; 2][..], &[0, 0, 0, 0, 0, 1, 0, 0, 0, 1]].concat()),
        Just(vec![0, 3, 0, 0, 0, 1, 0, 0, 16, 0, 2, 0, 0, 0]),
        Just(vec![]),
    ];
    (select(vec![3_u32, 5, 7, 8, 10, 11]), reply, data)
        .prop_map(|(code, reply, data)| option_reply(code, reply, &data))
}

fn some_extended_request() -> impl Strategy<Value = Vec<u8>> {
    let offset = select(vec![0, 512, 4096, support::SIZE - 1, u64::MAX - 1]);
    let length = select(vec![0_u64, 1, 12, 512, 16, 70_000, 33 << 20, 1 << 40, u64::MAX]);
    let payload = prop_oneof![
        Just(vec![]),
        vec(any::<u8>(), 0..40),
        Just([0_u32, 512, 1].into_iter().flat_map(u32::to_be_bytes).collect()),
    ];
    (0_u16..10, 0_u16..128, any::<u64>(), offset, length, payload).prop_map(
        |(kind, flags, cookie, offset, length, payload)| {
            [extended(kind, flags, cookie, offset, length), payload].concat()
        },
    )
}

/// A structured chunk with the header of an extended one, at the offset of a read.
fn widened(chunk: Vec<u8>) -> Vec<u8> {
    let Some((header, payload)) = chunk.split_first_chunk::<20>() else { return chunk };
    let offset: u64 = if header[15] == 1 { 512 } else { 0 };
    let mut bytes = wire::magic::EXTENDED_REPLY.to_be_bytes().to_vec();
    bytes.extend_from_slice(&header[4..16]);
    bytes.extend_from_slice(&offset.to_be_bytes());
    bytes.extend_from_slice(&[0; 4]);
    bytes.extend_from_slice(&header[16..]);
    bytes.extend_from_slice(payload);
    bytes
}

/// Whatever comes out of the parser lies inside the export, and nothing more is held.
fn requests_are_inside(session: &Session, messages: Vec<Vec<u8>>) -> Result<(), TestCaseError> {
    let (mut parser, mut intake) = (RequestParser::new(session), Intake::new());
    for message in messages {
        feed(&mut intake, &message);
        loop {
            match parser.next(&mut intake) {
                Ok(Some(Incoming::Request(to, command))) => {
                    let whole = ByteRange::new(ByteOffset::ZERO, session.export.size).unwrap();
                    prop_assert!(whole.contains(command.range()));
                    prop_assert!(to.data_length() <= MAX_PAYLOAD);
                }
                Ok(Some(Incoming::Refused(..))) => {}
                Ok(None) => break,
                Ok(Some(Incoming::Disconnect)) | Err(_) => return Ok(()),
            }
        }
        check_bounds(&intake);
    }
    Ok(())
}

/// No more is held than the read buffer and one payload.
fn check_bounds(intake: &Intake) {
    assert!(intake.buffered().len() <= 256 << 10);
    assert!(intake.payload_missing() as u64 <= MAX_PAYLOAD.0 + 8);
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(2000))]

    #[test]
    fn a_server_survives_any_handshake(
        tls in select(vec![TlsMode::Off, TlsMode::Optional, TlsMode::Required]),
        flags in 0_u32..5,
        messages in vec(almost(some_option()), 0..12),
    ) {
        let (mut intake, mut out) = (Intake::new(), BytesMut::new());
        let mut machine = Handshake::start(tls, &mut out);
        feed(&mut intake, &flags.to_be_bytes());
        'connection: for message in messages {
            feed(&mut intake, &message);
            loop {
                out.clear();
                match machine.step(&mut intake, &Three(None), &mut out) {
                    Ok(Step::Answered) => {}
                    Ok(Step::NeedMore) => break,
                    Ok(Step::StartTls) => machine.tls_started(),
                    Ok(Step::Transmission(_) | Step::Closed | Step::Awaited) | Err(_) => break 'connection,
                }
                prop_assert!(out.len() < 20_000);
            }
            check_bounds(&intake);
        }
    }

    #[test]
    fn a_server_survives_any_request(
        export in select(vec!["disk", "golden", "coarse"]),
        messages in vec(almost(some_request()), 0..12),
    ) {
        requests_are_inside(&session(export), messages)?;
    }

    #[test]
    fn a_server_survives_any_extended_request(
        export in select(vec!["disk", "golden", "coarse"]),
        messages in vec(almost(some_extended_request()), 0..12),
    ) {
        requests_are_inside(&extended_session(export), messages)?;
    }

    #[test]
    fn a_client_survives_any_handshake(
        tls in any::<bool>(),
        goal in select(vec![client::Goal::List, client::Goal::Open("disk".into())]),
        greeting in almost(Just(b"NBDMAGICIHAVEOPT\x00\x03".to_vec())),
        messages in vec(almost(some_answer()), 0..12),
    ) {
        let (mut intake, mut out) = (Intake::new(), BytesMut::new());
        let mut machine =
            if tls { client::Handshake::with_tls(goal) } else { client::Handshake::new(goal) };
        for message in std::iter::once(greeting).chain(messages) {
            feed(&mut intake, &message);
            match machine.step(&mut intake, &mut out) {
                Ok(client::Step::NeedMore) => {}
                Ok(client::Step::StartTls) => machine.tls_started(&mut out),
                Ok(client::Step::Transmission(_) | client::Step::Listed(_)) | Err(_) => break,
            }
            prop_assert!(out.len() < 20_000);
            check_bounds(&intake);
        }
    }

    #[test]
    fn a_client_survives_any_reply(
        extended in any::<bool>(),
        messages in vec(almost(some_chunk()), 0..12),
    ) {
        let style = if extended { ReplyStyle::Extended } else { ReplyStyle::Structured };
        let session = client_session(style);
        let (mut parser, mut intake) = (ReplyParser::new(&session), Intake::new());
        let range = ByteRange::new(ByteOffset(512), ByteCount(1024)).unwrap();
        let in_flight = |cookie: Cookie| match cookie.0 {
            0 => Some(Expected::Plain(ByteOffset(0))),
            1 => Some(Expected::Read(range)),
            2 => Some(Expected::Extents(ByteOffset(0))),
            _ => None,
        };
        'connection: for message in messages {
            let message = if extended { widened(message) } else { message };
            feed(&mut intake, &message);
            loop {
                match parser.next(&mut intake, in_flight) {
                    Ok(Some(reply)) => match reply.content {
                        client::Content::Data { offset, data } => {
                            let found = ByteRange::new(offset, ByteCount::of(&data)).unwrap();
                            prop_assert!(range.contains(found));
                        }
                        client::Content::Hole(found) => prop_assert!(range.contains(found)),
                        client::Content::Extents(extents) => prop_assert!(!extents.is_empty()),
                        client::Content::Nothing | client::Content::Error { .. } => {}
                    },
                    Ok(None) => break,
                    Err(_) => break 'connection,
                }
            }
            check_bounds(&intake);
        }
    }
}

#[test]
fn every_error_keeps_its_code() {
    for error in backtide_nbd::NbdError::ALL {
        assert_eq!(backtide_nbd::NbdError::from_code(error.code()), Some(error));
    }
    assert_eq!(backtide_nbd::NbdError::from_code(0), None);
    let unknown = backtide_nbd::NbdError::from_code(4711);
    assert_eq!(unknown, Some(backtide_nbd::NbdError::Invalid));
    assert_eq!(wire::REQUEST_HEADER, 28);
}
