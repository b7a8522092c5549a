//! The server's handshake, option by option, in bytes written by hand.

mod support;

use backtide_nbd::server::Step;
use backtide_nbd::{BlockSizes, ProtocolError, ReplyStyle, wire};
use support::{SIZE, Server, Unavailable, contexts, go, option, option_replies, session, string};
use wire::{info, option as code, option_reply as reply};

fn only_error(answers: &[(u32, Vec<u8>)]) -> u32 {
    assert_eq!(answers.len(), 1, "one error is one answer: {answers:?}");
    assert!(!answers[0].1.is_empty(), "an error says why");
    assert!(answers[0].1.len() <= 4096 && str::from_utf8(&answers[0].1).is_ok(), "a string of NBD");
    answers[0].0
}

#[test]
fn export_name_is_answered_with_zeroes_unless_they_were_declined() {
    for (flags, zeroes) in [(0_u32, 124), (1, 124), (3, 0)] {
        let mut server = Server::new();
        let hello = [&flags.to_be_bytes()[..], &option(code::EXPORT_NAME, b"disk")].concat();
        let (written, step) = server.send(&hello);
        assert!(matches!(step, Ok(Step::Transmission(_))), "{step:?}");
        assert_eq!(written.len(), 8 + 2 + zeroes);
        assert_eq!(written[..8], SIZE.to_be_bytes());
        assert!(written[10..].iter().all(|&byte| byte == 0));
    }
}

#[test]
fn export_name_cannot_report_an_error_and_ends_the_connection() {
    let (written, step) = Server::fixed().send(&option(code::EXPORT_NAME, b"nope"));
    assert_eq!(step, Err(ProtocolError::UnknownExport("nope".into())));
    assert!(written.is_empty());
    let (_, step) = Server::fixed().send(&option(code::EXPORT_NAME, &[0xff; 3]));
    assert_eq!(step, Err(ProtocolError::MalformedExportName(3)));
    let (_, step) = Server::fixed().send(&option(code::EXPORT_NAME, &[b'a'; 5000]));
    assert_eq!(step, Err(ProtocolError::MalformedExportName(5000)));
    let (_, step) = Server::fixed().send(&option(code::EXPORT_NAME, &[b'a'; 100_000])[..64]);
    assert_eq!(step, Err(ProtocolError::MalformedExportName(100_000)));
}

#[test]
fn info_describes_and_go_begins() {
    let mut server = Server::fixed();
    let all = go("", &[info::NAME, info::DESCRIPTION, info::BLOCK_SIZE]);
    let answers = server.answers(code::INFO, &all);
    let kinds: Vec<(u32, u8)> =
        answers.iter().map(|(reply, data)| (*reply, *data.get(1).unwrap_or(&99))).collect();
    assert_eq!(kinds, [(3, 0), (3, 1), (3, 2), (3, 3), (reply::ACK, 99)]);
    assert_eq!(answers[1].1, b"\x00\x01disk");
    assert_eq!(answers[2].1, b"\x00\x02a disk");
    assert_eq!(answers[3].1, [0, 3, 0, 0, 0, 1, 0, 0, 16, 0, 2, 0, 0, 0]);

    let (written, step) = server.send(&option(code::GO, &go("disk", &[])));
    let Ok(Step::Transmission(session)) = step else { panic!("GO brought {step:?}") };
    assert_eq!((session.requested.as_str(), session.export.name.as_str()), ("disk", "disk"));
    assert_eq!(session.style, ReplyStyle::Simple);
    assert!(!session.contexts.base_allocation);
    assert_eq!(option_replies(code::GO, &written).last(), Some(&(reply::ACK, vec![])));
}

#[test]
fn df_is_announced_only_with_structured_replies() {
    let flags = |structured: bool| {
        let mut server = Server::fixed();
        if structured {
            assert_eq!(server.answers(code::STRUCTURED_REPLY, &[]), [(reply::ACK, vec![])]);
        }
        let answers = server.answers(code::INFO, &go("disk", &[]));
        u16::from_be_bytes([answers[0].1[10], answers[0].1[11]])
    };
    assert_eq!(flags(false) & (1 << 7), 0);
    assert_eq!(flags(true), flags(false) | (1 << 7));
}

#[test]
fn a_read_only_export_offers_no_way_to_change_it() {
    let answers = Server::fixed().answers(code::INFO, &go("golden", &[]));
    let flags = u16::from_be_bytes([answers[0].1[10], answers[0].1[11]]);
    assert_eq!(flags & 0b1000_0110_0011, 0b0000_0000_0011);
}

#[test]
fn refused_options_leave_the_handshake_usable() {
    let mut server = Server::fixed();
    let long = "x".repeat(5000);
    for (option, data, expected) in [
        (code::GO, go("nope", &[]), reply::ERR_UNKNOWN),
        (code::GO, vec![], reply::ERR_INVALID),
        (code::GO, go("disk", &[])[..9].to_vec(), reply::ERR_INVALID),
        (code::GO, [go("disk", &[3]), vec![0]].concat(), reply::ERR_INVALID),
        (code::GO, go(&long, &[]), reply::ERR_TOO_BIG),
        (code::GO, go(&"\u{1}".repeat(4096), &[]), reply::ERR_UNKNOWN),
        (code::GO, [&[0, 0, 0, 1, 0xff][..], &[0, 0]].concat(), reply::ERR_INVALID),
        (code::INFO, go("nope", &[]), reply::ERR_UNKNOWN),
        (code::LIST, vec![1], reply::ERR_INVALID),
        (code::STARTTLS, vec![], reply::ERR_POLICY),
        (4, vec![], reply::ERR_UNSUP),
        (code::EXTENDED_HEADERS, vec![0], reply::ERR_INVALID),
        (12, vec![], reply::ERR_UNSUP),
        (code::GO, go("di\0sk", &[]), reply::ERR_INVALID),
        (0xdead_beef, vec![1, 2, 3], reply::ERR_UNSUP),
        (code::SET_META_CONTEXT, contexts("disk", &["base:allocation"]), reply::ERR_INVALID),
        (code::STRUCTURED_REPLY, vec![0], reply::ERR_INVALID),
        (code::LIST, vec![0; 40_000], reply::ERR_TOO_BIG),
        (0xdead_beef, vec![0; 40_000], reply::ERR_UNSUP),
        (code::GO, vec![0xff; 6], reply::ERR_INVALID),
    ] {
        assert_eq!(only_error(&server.answers(option, &data)), expected, "option {option}");
    }
    assert!(matches!(server.send(&option(code::GO, &go("disk", &[]))).1, Ok(Step::Transmission(_))));
}

#[test]
fn the_rest_of_an_option_that_is_too_long_is_skipped_and_not_kept() {
    let mut server = Server::fixed();
    let huge = option(code::LIST, &vec![0; 3 << 20]);
    let mut written = Vec::new();
    for piece in huge.chunks(10_000) {
        written.extend(server.send(piece).0);
        assert!(server.intake.buffered().len() <= 33 << 10);
    }
    assert_eq!(only_error(&option_replies(code::LIST, &written)), reply::ERR_TOO_BIG);
    assert_eq!(server.answers(code::LIST, &[]).len(), 4);
}

#[test]
fn list_names_every_export() {
    let answers = Server::fixed().answers(code::LIST, &[]);
    let disk = [string("disk"), b"a disk".to_vec()].concat();
    let entries = [disk, string("golden"), string("coarse")].map(|entry| (reply::SERVER, entry));
    assert_eq!(answers[..3], entries);
    assert_eq!(answers[3], (reply::ACK, vec![]));
}

#[test]
fn abort_is_acknowledged() {
    for data in [vec![], vec![0; 40_000]] {
        let (written, step) = Server::fixed().send(&option(code::ABORT, &data));
        assert_eq!(step, Ok(Step::Closed));
        assert_eq!(option_replies(code::ABORT, &written), [(reply::ACK, vec![])]);
    }
}

#[test]
fn contexts_are_listed_by_name_by_namespace_or_all() {
    let mut server = Server::fixed();
    server.answers(code::STRUCTURED_REPLY, &[]);
    for (queries, found) in [
        (&[][..], true),
        (&["base:"], true),
        (&["qemu:x", "base:allocation"], true),
        (&["qemu:"], false),
        (&["base:alloc"], false),
    ] {
        let answers = server.answers(code::LIST_META_CONTEXT, &contexts("disk", queries));
        assert_eq!(answers.len(), 1 + usize::from(found), "{queries:?}");
        assert_eq!(answers.last(), Some(&(reply::ACK, vec![])));
    }
}

#[test]
fn block_status_needs_its_context_chosen_for_the_same_export() {
    assert!(session("disk").contexts.base_allocation);
    let chosen = |context_of: &str, again: Option<&[u8]>| {
        let mut server = Server::fixed();
        server.answers(code::STRUCTURED_REPLY, &[]);
        server.answers(code::SET_META_CONTEXT, &contexts(context_of, &["base:allocation"]));
        if let Some(data) = again {
            server.answers(code::SET_META_CONTEXT, data);
        }
        match server.send(&option(code::GO, &go("disk", &[]))).1 {
            Ok(Step::Transmission(session)) => session.contexts.base_allocation,
            other => panic!("GO brought {other:?}"),
        }
    };
    assert!(chosen("disk", None));
    assert!(!chosen("golden", None), "chosen for another export");
    assert!(!chosen("disk", Some(&contexts("disk", &["base:"]))), "a namespace chooses nothing");
    assert!(!chosen("disk", Some(&contexts("disk", &[]))), "nothing was asked for");
    assert!(!chosen("disk", Some(&[1, 2])), "a malformed choice forgets the last one");
    assert!(!chosen("disk", Some(&contexts("nope", &["base:allocation"]))));
    assert!(!chosen("disk", Some(&[0; 40_000])), "one that is too long to be read");
}

#[test]
fn a_count_of_queries_beyond_the_data_is_refused() {
    let mut server = Server::fixed();
    server.answers(code::STRUCTURED_REPLY, &[]);
    let data = [string("disk"), u32::MAX.to_be_bytes().to_vec()].concat();
    assert_eq!(only_error(&server.answers(code::SET_META_CONTEXT, &data)), reply::ERR_INVALID);
}

#[test]
fn broken_handshakes_end_the_connection() {
    let (_, step) = Server::new().send(&4_u32.to_be_bytes());
    assert_eq!(step, Err(ProtocolError::UnknownClientFlags(4)));
    let hello = [&0_u32.to_be_bytes()[..], &option(code::LIST, &[])].concat();
    let (_, step) = Server::new().send(&hello);
    assert_eq!(step, Err(ProtocolError::OptionWithoutFixedNewstyle(code::LIST)));
    let (_, step) = Server::fixed().send(&[0; 16]);
    assert!(matches!(step, Err(ProtocolError::BadMagic { found: 0, .. })), "{step:?}");
}

#[test]
fn a_handshake_has_a_bounded_number_of_options() {
    let mut server = Server::fixed();
    let many = option(code::STRUCTURED_REPLY, &[]).repeat(4096);
    assert_eq!(server.send(&many).1, Ok(Step::NeedMore));
    let (_, step) = server.send(&option(code::STRUCTURED_REPLY, &[]));
    assert_eq!(step, Err(ProtocolError::TooManyOptions(4096)));
}

#[test]
fn a_handshake_may_arrive_byte_by_byte() {
    let mut server = Server::new();
    let whole = [
        3_u32.to_be_bytes().to_vec(),
        option(code::STRUCTURED_REPLY, &[]),
        option(code::GO, &go("disk", &[3])),
    ]
    .concat();
    let mut last = Ok(Step::NeedMore);
    for byte in whole {
        assert_eq!(last, Ok(Step::NeedMore));
        last = server.send(&[byte]).1;
    }
    assert!(matches!(last, Ok(Step::Transmission(_))));
}

#[test]
fn coarse_blocks_are_told_and_demanded() {
    let mut server = Server::fixed();
    let answers = server.answers(code::GO, &go("coarse", &[info::NAME]));
    assert_eq!(answers[0], (reply::INFO, vec![0, 3, 0, 0, 16, 0, 0, 0, 16, 0, 2, 0, 0, 0]));
    assert_eq!((answers.len(), answers[1].0), (2, reply::ERR_BLOCK_SIZE_REQD));
    let (_, step) = server.send(&option(code::GO, &go("coarse", &[info::BLOCK_SIZE])));
    assert!(matches!(step, Ok(Step::Transmission(_))), "{step:?}");
}

#[test]
fn coarse_blocks_are_told_and_not_demanded_where_any_range_is_served() {
    // The kernel's own `nbd-client` asks for nothing, and ends when it is refused.
    let mut server = Server::fixed();
    let answers = server.answers(code::INFO, &go("patient", &[]));
    assert_eq!(answers[1], (reply::INFO, vec![0, 3, 0, 0, 16, 0, 0, 0, 16, 0, 2, 0, 0, 0]));
    let (_, step) = server.send(&option(code::GO, &go("patient", &[])));
    assert!(matches!(step, Ok(Step::Transmission(_))), "{step:?}");
}

#[test]
fn unknown_information_is_ignored_and_go_tells_what_info_told() {
    let mut server = Server::fixed();
    let wanted = go("disk", &[77, info::BLOCK_SIZE, 0xffff]);
    let told = server.answers(code::INFO, &wanted);
    assert_eq!(told.last(), Some(&(reply::ACK, vec![])));
    assert_eq!((told[0].0, told[0].1.len()), (reply::INFO, 12));
    let (written, step) = server.send(&option(code::GO, &wanted));
    assert!(matches!(step, Ok(Step::Transmission(_))), "{step:?}");
    assert_eq!(option_replies(code::GO, &written), told, "and nothing after it");
}

#[test]
fn block_sizes_are_what_the_specification_allows() {
    let valid = |minimum, preferred, maximum| BlockSizes { minimum, preferred, maximum }.are_valid();
    assert!(valid(1, 512, 512) && valid(65_536, 65_536, u32::MAX) && BlockSizes::default().are_valid());
    for (minimum, preferred, maximum) in [
        (0, 512, 512),
        (3, 512, 512),
        (1 << 17, 1 << 17, 1 << 20),
        (1, 256, 512),
        (1, 600, 1024),
        (1, 4096, 512),
    ] {
        assert!(!valid(minimum, preferred, maximum), "{minimum} {preferred} {maximum}");
    }
}

#[test]
fn an_option_about_an_export_that_is_awaited_is_left_until_it_is_there() {
    for (asked, data) in [
        (code::EXPORT_NAME, b"disk".to_vec()),
        (code::INFO, go("disk", &[])),
        (code::GO, go("disk", &[])),
        (code::LIST_META_CONTEXT, contexts("disk", &[])),
        (code::SET_META_CONTEXT, contexts("disk", &["base:allocation"])),
    ] {
        let mut server = Server::fixed();
        server.answers(code::STRUCTURED_REPLY, &[]);
        server.becomes(Unavailable::Awaited);
        let others = [(code::LIST, vec![]), (code::INFO, go("golden", &[]))];
        for (other, data) in others {
            assert_eq!(server.answers(other, &data).last().unwrap().0, reply::ACK, "others do not wait");
        }
        let mut sent = option(asked, &data);
        for _ in 0..2 {
            let (written, step) = server.send(&sent);
            assert_eq!((written, step), (vec![], Ok(Step::Awaited)), "option {asked}");
            sent.clear();
        }
        server.recovers();
        let (written, step) = server.send(&[]);
        assert!(!written.is_empty(), "option {asked} is answered");
        let begins = matches!(step, Ok(Step::Transmission(_)));
        assert_eq!(begins, matches!(asked, code::EXPORT_NAME | code::GO), "option {asked}: {step:?}");
    }
    // A server that goes down does not let anybody wait.
    let mut server = Server::fixed();
    server.becomes(Unavailable::ShuttingDown);
    assert_eq!(only_error(&server.answers(code::GO, &go("disk", &[]))), reply::ERR_SHUTDOWN);
}
