//! Every state with every message.

use backtide_protocol::{
    CloseCode, Closed, Compare, CompareItem, CompareResult, Content, Data, Message, Ping, Reading,
    ReceiverState, Welcome,
};
use backtide_units::{HistoryId, LogPosition, Lsn};
use uuid::Uuid;

use super::fixture::*;

#[derive(Clone, Copy, Debug)]
enum In {
    AwaitHello,
    AwaitClaim,
    Streaming,
    Ended,
}

/// What a message leads to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Then {
    Nothing,
    Compare,
    Recalled,
    End,
    Invalid,
}

/// A session in the state, on a disk whose log stands at LSN 5 in the pass at 5.
fn session_in(bench: &mut Bench, state: In) -> Peer {
    match state {
        In::AwaitHello => bench.connect(),
        In::AwaitClaim => {
            let mut peer = bench.connect();
            peer.tell(bench, Message::Hello(hello()));
            peer
        }
        In::Streaming => {
            let (mut peer, _) = bench.welcomed(hello());
            peer.tell(bench, pass_begin(5, 0));
            peer
        }
        In::Ended => {
            let mut peer = bench.connect();
            peer.session.lost(&mut bench.disks);
            peer
        }
    }
}

fn recalled(id: u64) -> Message {
    let data = Data::capture(vec![7; 4096].into());
    Message::Reading(Reading::Piece { id, range: range(0, 4096), data })
}

fn close() -> Message {
    Message::Close(Closed::new(CloseCode::Bye, "detached"))
}

/// One of each kind, all of them good ones in the streaming state but for the direction.
fn messages() -> Vec<(Message, Then)> {
    let welcome = Welcome {
        version: 1,
        history: HistoryId(Uuid::nil()),
        state: ReceiverState::New,
        durable: Lsn(0),
        highest: Lsn(0),
        position: LogPosition::default(),
        in_pass: false,
        last_time: None,
        last_attach: None,
    };
    let item = CompareItem { range: range(0, 4096), content: Content::Zeroes };
    vec![
        (Message::Hello(hello()), Then::Invalid),
        (Message::Welcome(welcome), Then::Invalid),
        (write(6, 5), Then::Nothing),
        (flush(5), Then::Nothing),
        (pass_begin(9, 5), Then::Nothing),
        (pass_data(5, 0, b"abcd"), Then::Nothing),
        (pass_end(5), Then::Nothing),
        (mark(5, "here"), Then::Nothing),
        (Message::Compare(Compare { id: 1, at: Lsn(5), items: vec![item] }), Then::Compare),
        (Message::CompareResult(CompareResult { id: 1, differing: vec![] }), Then::Invalid),
        (Message::Ack { received: 1, durable: 1, position: LogPosition(1) }, Then::Invalid),
        (Message::Hasten { durable: true }, Then::Nothing),
        (Message::Ping(Ping::default()), Then::Nothing),
        (Message::Reading(Reading::Answered { id: 1 }), Then::Invalid),
        (recalled(3), Then::Recalled),
        (close(), Then::End),
    ]
}

#[test]
fn every_state_answers_every_message_as_written() {
    for state in [In::AwaitHello, In::AwaitClaim, In::Streaming, In::Ended] {
        for (message, streaming) in messages() {
            let is_hello = matches!(message, Message::Hello(_));
            let is_close = matches!(message, Message::Close(_));
            let expected = match state {
                In::Streaming => streaming,
                In::Ended => Then::Nothing,
                In::AwaitHello if is_hello => Then::Nothing,
                In::AwaitHello | In::AwaitClaim if is_close => Then::End,
                In::AwaitHello | In::AwaitClaim => Then::Invalid,
            };
            let mut bench = Bench::new();
            let mut peer = session_in(&mut bench, state);
            let text = format!("{message:?} in {state:?}");
            let found = match peer.send(&mut bench, message).as_slice() {
                [] => Then::Nothing,
                [Seen::Compare] => Then::Compare,
                [Seen::Recalled(3)] => Then::Recalled,
                [Seen::End] => Then::End,
                [Seen::Close(CloseCode::Invalid, why), Seen::End] if !why.is_empty() => Then::Invalid,
                other => panic!("{text}: {other:?}"),
            };
            assert_eq!(found, expected, "{text}");
        }
    }
}

#[test]
fn an_ended_session_does_nothing_more() {
    let mut bench = Bench::new();
    let mut peer = session_in(&mut bench, In::Streaming);
    assert_eq!(peer.send(&mut bench, close()), [Seen::End]);
    assert_eq!(peer.send(&mut bench, close()), []);
    assert_eq!(peer.settle(&mut bench), []);
    let reason = Closed::new(CloseCode::Bye, "");
    assert_eq!(seen(peer.session.close(&mut bench.disks, reason)), []);
    assert_eq!(peer.session.disk(), None);
}
