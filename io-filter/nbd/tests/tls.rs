//! What STARTTLS changes in the handshake, on both sides; the encryption itself is the driver's.

mod support;

use backtide_nbd::client::{self, Goal};
use backtide_nbd::server::{Step, TlsMode};
use backtide_nbd::{Intake, ProtocolError, ReplyStyle, wire};
use bytes::BytesMut;
use support::{Server, Unavailable, contexts, feed, go, option, option_replies, option_reply};
use wire::{option as code, option_reply as reply};

/// A server after the flags of a usual client.
fn server(tls: TlsMode) -> Server {
    let mut server = Server::with(tls);
    assert_eq!(server.send(&3_u32.to_be_bytes()).1, Ok(Step::NeedMore));
    server
}

/// The one answer to an option that leaves the handshake usable.
fn answer(server: &mut Server, code: u32, data: &[u8]) -> u32 {
    let answers = server.answers(code, data);
    answers.last().expect("every option is answered").0
}

/// Starts TLS as a driver does.
fn start_tls(server: &mut Server) {
    let (written, step) = server.send(&option(code::STARTTLS, &[]));
    assert_eq!(step, Ok(Step::StartTls));
    assert_eq!(option_replies(code::STARTTLS, &written), [(reply::ACK, vec![])]);
    server.tls_started();
}

#[test]
fn a_server_without_tls_refuses_starttls_and_never_demands_it() {
    let mut server = server(TlsMode::Off);
    assert_eq!(answer(&mut server, code::STARTTLS, &[]), reply::ERR_POLICY);
    for option in (0..20).filter(|&option| option != code::EXPORT_NAME && option != code::ABORT) {
        assert_ne!(answer(&mut server, option, &[]), reply::ERR_TLS_REQD, "option {option}");
    }
}

#[test]
fn where_tls_is_required_nothing_else_is_told() {
    let mut server = server(TlsMode::Required);
    for (option, data) in [
        (code::LIST, vec![]),
        (code::INFO, go("disk", &[])),
        (code::GO, go("disk", &[])),
        (code::GO, go("nope", &[])),
        (code::GO, vec![]),
        (code::STRUCTURED_REPLY, vec![]),
        (code::EXTENDED_HEADERS, vec![]),
        (code::LIST_META_CONTEXT, contexts("disk", &[])),
        (code::SET_META_CONTEXT, contexts("disk", &["base:allocation"])),
        (4, vec![]),
        (0xdead_beef, vec![1, 2, 3]),
        (code::LIST, vec![0; 40_000]),
    ] {
        assert_eq!(answer(&mut server, option, &data), reply::ERR_TLS_REQD, "option {option}");
    }
    assert_eq!(answer(&mut server, code::STARTTLS, &[1]), reply::ERR_INVALID);
    start_tls(&mut server);
    assert_eq!(answer(&mut server, code::LIST, &[]), reply::ACK);
    assert_eq!(answer(&mut server, 0xdead_beef, &[]), reply::ERR_UNSUP);
    let (_, step) = server.send(&option(code::GO, &go("disk", &[])));
    assert!(matches!(step, Ok(Step::Transmission(_))), "{step:?}");
}

#[test]
fn where_tls_is_required_export_name_without_it_ends_the_connection_and_abort_is_heard() {
    let (written, step) = server(TlsMode::Required).send(&option(code::EXPORT_NAME, b"disk"));
    assert!(matches!(step, Err(ProtocolError::ExportNameRefused(_))), "{step:?}");
    assert!(written.is_empty());
    let (written, step) = server(TlsMode::Required).send(&option(code::ABORT, &[]));
    assert_eq!(step, Ok(Step::Closed));
    assert_eq!(option_replies(code::ABORT, &written), [(reply::ACK, vec![])]);
    // A client of the old handshake cannot ask for TLS, and gets nothing.
    let mut old = Server::with(TlsMode::Required);
    assert_eq!(old.send(&0_u32.to_be_bytes()).1, Ok(Step::NeedMore));
    let (_, step) = old.send(&option(code::EXPORT_NAME, b"disk"));
    assert!(matches!(step, Err(ProtocolError::ExportNameRefused(_))), "{step:?}");
}

#[test]
fn where_tls_is_optional_it_is_never_demanded() {
    let mut server = server(TlsMode::Optional);
    assert_eq!(answer(&mut server, code::LIST, &[]), reply::ACK);
    assert_eq!(answer(&mut server, code::INFO, &go("nope", &[])), reply::ERR_UNKNOWN);
    let (_, step) = server.send(&option(code::GO, &go("disk", &[])));
    assert!(matches!(step, Ok(Step::Transmission(_))), "{step:?}");
}

#[test]
fn starttls_comes_once() {
    for tls in [TlsMode::Optional, TlsMode::Required] {
        let mut server = server(tls);
        start_tls(&mut server);
        assert_eq!(answer(&mut server, code::STARTTLS, &[]), reply::ERR_INVALID);
        assert_eq!(answer(&mut server, code::LIST, &[]), reply::ACK);
    }
}

#[test]
fn what_was_settled_in_the_clear_is_forgotten_under_tls() {
    for style in [code::STRUCTURED_REPLY, code::EXTENDED_HEADERS] {
        let mut server = server(TlsMode::Optional);
        answer(&mut server, style, &[]);
        answer(&mut server, code::SET_META_CONTEXT, &contexts("disk", &["base:allocation"]));
        start_tls(&mut server);
        let contexts = contexts("disk", &["base:allocation"]);
        assert_eq!(answer(&mut server, code::SET_META_CONTEXT, &contexts), reply::ERR_INVALID);
        let (_, step) = server.send(&option(code::GO, &go("disk", &[])));
        let Ok(Step::Transmission(session)) = step else { panic!("GO brought {step:?}") };
        assert_eq!((session.style, session.contexts.base_allocation), (ReplyStyle::Simple, false));
    }
}

#[test]
fn options_smuggled_in_before_tls_end_the_connection() {
    let smuggled = [option(code::STARTTLS, &[]), option(code::LIST, &[])].concat();
    let (_, step) = server(TlsMode::Optional).send(&smuggled);
    assert_eq!(step, Err(ProtocolError::DataBeforeTls(16)));
}

#[test]
fn a_server_going_down_says_so_to_every_option() {
    let mut server = server(TlsMode::Off);
    server.becomes(Unavailable::ShuttingDown);
    for (option, data) in [
        (code::LIST, vec![]),
        (code::GO, go("disk", &[])),
        (code::STARTTLS, vec![]),
        (99, vec![]),
        (code::LIST, vec![0; 40_000]),
    ] {
        assert_eq!(answer(&mut server, option, &data), reply::ERR_SHUTDOWN, "option {option}");
    }
    assert_eq!(server.send(&option(code::ABORT, &[])).1, Ok(Step::Closed));
}

#[test]
fn a_full_server_answers_but_begins_no_transmission() {
    let full = |tls| {
        let mut server = server(tls);
        server.becomes(Unavailable::Full);
        server
    };
    let mut server = full(TlsMode::Off);
    assert_eq!(answer(&mut server, code::LIST, &[]), reply::ACK);
    for option in [code::INFO, code::GO] {
        assert_eq!(answer(&mut server, option, &go("disk", &[])), reply::ERR_POLICY, "option {option}");
    }
    let (_, step) = server.send(&option(code::EXPORT_NAME, b"disk"));
    assert!(matches!(step, Err(ProtocolError::ExportNameRefused(_))), "{step:?}");
    // One export is full, and no other.
    assert_eq!(answer(&mut full(TlsMode::Off), code::INFO, &go("golden", &[])), reply::ACK);
    // Whether it is full is nobody's business before TLS.
    let mut server = full(TlsMode::Required);
    assert_eq!(answer(&mut server, code::GO, &go("disk", &[])), reply::ERR_TLS_REQD);
}

/// A client that wants TLS; what it says to each message of the server.
struct Client {
    machine: client::Handshake,
    intake: Intake,
}

impl Client {
    fn greeted(goal: Goal) -> Self {
        let mut client = Self { machine: client::Handshake::with_tls(goal), intake: Intake::new() };
        let (written, step) = client.hears(b"NBDMAGICIHAVEOPT\x00\x03");
        assert_eq!(step, Ok(client::Step::NeedMore));
        assert_eq!(written, [&3_u32.to_be_bytes()[..], &option(code::STARTTLS, &[])].concat());
        client
    }

    fn hears(&mut self, bytes: &[u8]) -> (Vec<u8>, Result<client::Step, ProtocolError>) {
        feed(&mut self.intake, bytes);
        let mut out = BytesMut::new();
        let step = self.machine.step(&mut self.intake, &mut out);
        (out.to_vec(), step)
    }
}

#[test]
fn the_client_starts_tls_before_anything_else() {
    for (goal, first) in [(Goal::Open("disk".into()), code::EXTENDED_HEADERS), (Goal::List, code::LIST)] {
        let mut client = Client::greeted(goal);
        let (written, step) = client.hears(&option_reply(code::STARTTLS, reply::ACK, &[]));
        assert_eq!((written, step), (vec![], Ok(client::Step::StartTls)));
        let mut out = BytesMut::new();
        client.machine.tls_started(&mut out);
        assert_eq!(out, option(first, &[]));
    }
}

#[test]
fn the_client_goes_on_without_tls_in_no_case() {
    for refusal in [reply::ERR_UNSUP, reply::ERR_POLICY, reply::ERR_INVALID] {
        let mut client = Client::greeted(Goal::List);
        let (written, step) = client.hears(&option_reply(code::STARTTLS, refusal, b"no"));
        assert!(matches!(step, Err(ProtocolError::TlsRefused(_))), "{step:?}");
        assert!(written.is_empty());
    }
    let mut old = Client { machine: client::Handshake::with_tls(Goal::List), intake: Intake::new() };
    let (_, step) = old.hears(b"NBDMAGICIHAVEOPT\x00\x00");
    assert!(matches!(step, Err(ProtocolError::TlsRefused(_))), "{step:?}");
    let mut client = Client::greeted(Goal::List);
    let smuggled = [option_reply(code::STARTTLS, reply::ACK, &[]), vec![0]].concat();
    assert_eq!(client.hears(&smuggled).1, Err(ProtocolError::ServerDataBeforeTls));
}
