//! The receiver asks: for what the disk has somewhere, which it is told a little at a time while nothing else waits for that, and
//! how what happens now is stamped.

use std::time::Duration;

use backtide_io_filter::{
    Change, Effect, Filter, IoFailure, IoId, LocalData, LocalOp, Now, OnOutage, RequestId, Resume, Settings,
};
use backtide_protocol::{Message, Ping, Reading, ReceiverState};
use backtide_tracking::DirtyBitmap;
use backtide_units::{ByteCount, ByteOffset, ByteRange, CaptureTime, Lsn};
use bytes::Bytes;

use crate::common::{at, welcome};

/// Not a whole number of blocks.
const SIZE: u64 = 64 * 4096 + 512;

fn now() -> Now {
    at(0)
}

/// A disk that is connected, and in its first pass.
fn connected() -> Filter {
    let settings = Settings {
        size: ByteCount(SIZE),
        on_outage: OnOutage::Block,
        guest_delay_max: Duration::ZERO,
        unchanged_every: Duration::from_secs(30),
        ..crate::common::settings()
    };
    let mut filter = Filter::new(settings, Resume::New, now());
    filter.connected(now(), &welcome(ReceiverState::New, Lsn::ZERO));
    let scan = effects(&mut filter).into_iter().find_map(|effect| match effect {
        Effect::Scan(io) => Some(io),
        _ => None,
    });
    filter.scanned(now(), scan.expect("a scan was asked for"), &DirtyBitmap::new());
    sent(&mut filter);
    filter
}

fn effects(filter: &mut Filter) -> Vec<Effect> {
    std::iter::from_fn(|| filter.next_effect()).collect()
}

fn sent(filter: &mut Filter) -> Vec<Message> {
    let mut messages = Vec::new();
    while filter.has_to_send() {
        messages.push(filter.poll_send(now()).expect("it has something").1);
    }
    messages
}

fn range(start: u64, count: u64) -> ByteRange {
    ByteRange::new(ByteOffset(start), ByteCount(count)).unwrap()
}

fn ask(filter: &mut Filter, id: u64, range: ByteRange) {
    filter.receive(now(), Message::Reading(Reading::Fetch { id, range }));
}

fn reads(filter: &mut Filter) -> Vec<(IoId, ByteRange)> {
    let read = |effect| match effect {
        Effect::Local(io, LocalOp::Read(range)) => Some((io, range)),
        _ => None,
    };
    effects(filter).into_iter().filter_map(read).collect()
}

/// Block n is full of n.
fn content(range: ByteRange) -> Bytes {
    (range.start().0..range.end().0).map(|at| (at / 4096) as u8).collect()
}

#[test]
fn what_is_asked_for_is_read_in_whole_blocks_and_told_exactly() {
    let mut filter = connected();
    // Within blocks, at the end of the disk, and zeroes.
    for (id, asked, read) in [
        (1, range(5000, 9000), range(4096, 3 * 4096)),
        (2, range(SIZE - 600, 600), range(63 * 4096, 4096 + 512)),
        (3, range(0, 512), range(0, 4096)),
    ] {
        ask(&mut filter, id, asked);
        let [(io, found)] = reads(&mut filter)[..] else { panic!("one read") };
        assert_eq!(found, read);
        assert!(sent(&mut filter).is_empty(), "nothing is known yet");
        filter.local_done(now(), io, Ok(LocalData::Read(content(read))));
        let answers = sent(&mut filter);
        let [Message::Reading(Reading::Piece { id: answered, range, data })] = &answers[..] else {
            panic!("{answers:?}")
        };
        assert_eq!((*answered, *range), (id, asked));
        let expected = content(asked);
        let zeroes = expected.iter().all(|byte| *byte == 0);
        assert_eq!(*data.bytes(), if zeroes { Bytes::new() } else { expected });
    }
}

#[test]
fn what_cannot_be_read_is_said_and_too_much_at_once_ends_the_stream() {
    let mut filter = connected();
    ask(&mut filter, 1, range(0, 4096));
    let (io, _) = reads(&mut filter)[0];
    filter.local_done(now(), io, Err(IoFailure { errno: 5 }));
    ask(&mut filter, 2, range(SIZE - 1, 2));
    let answers = sent(&mut filter);
    let failed = |message: &Message| matches!(message, Message::Reading(Reading::Failed { .. }));
    assert!(answers.len() == 2 && answers.iter().all(failed), "{answers:?}");
    for id in 3..=6 {
        ask(&mut filter, id, range(0, 4096));
    }
    assert_eq!(reads(&mut filter).len(), 4);
    ask(&mut filter, 7, range(0, 4096));
    assert!(effects(&mut filter).iter().any(|effect| matches!(effect, Effect::Disconnect { .. })));
    let mut filter = connected();
    ask(&mut filter, 1, range(0, (64 << 10) + 1));
    assert!(effects(&mut filter).iter().any(|effect| matches!(effect, Effect::Disconnect { .. })));
}

#[test]
fn an_answer_is_for_the_stream_that_asked_and_a_write_does_not_wait_for_it() {
    let mut filter = connected();
    ask(&mut filter, 1, range(0, 4096));
    ask(&mut filter, 2, range(0, 4096));
    let read = reads(&mut filter);
    filter.local_done(now(), read[0].0, Ok(LocalData::Read(content(read[0].1))));
    let change = Change::Write { range: range(0, 4096), data: Bytes::from(vec![7; 4096]), fua: false };
    filter.submit(now(), RequestId(1), change);
    let write = effects(&mut filter).into_iter().find_map(|effect| match effect {
        Effect::Local(io, LocalOp::Change(_)) => Some(io),
        _ => None,
    });
    filter.local_done(now(), write.expect("it is written beside the read"), Ok(LocalData::Changed));
    assert!(filter.is_quiet(), "nothing that a guest or a detach waits for");
    filter.disconnected(now());
    filter.connected(now(), &welcome(ReceiverState::New, Lsn::ZERO));
    filter.local_done(now(), read[1].0, Ok(LocalData::Read(content(read[1].1))));
    let answers = sent(&mut filter);
    assert!(!answers.iter().any(|message| matches!(message, Message::Reading(_))), "{answers:?}");
}

#[test]
fn reads_for_streams_that_are_gone_count_until_they_end_and_nothing_waits_for_them() {
    let mut filter = connected();
    for id in 1..=3 {
        ask(&mut filter, id, range(0, 4096));
    }
    let mut left = reads(&mut filter);
    assert_eq!(left.len(), 3);
    for id in 4..20 {
        filter.disconnected(now());
        filter.connected(now(), &welcome(ReceiverState::New, Lsn::ZERO));
        sent(&mut filter);
        ask(&mut filter, id, range(0, 4096));
        left.extend(reads(&mut filter));
        assert!(left.len() <= 4, "reads pile up on storage that stands still");
        assert!(filter.is_quiet(), "a detach waits for what nobody asks any more");
    }
    let answers = sent(&mut filter);
    let failed = answers.iter().find_map(|message| match message {
        Message::Reading(Reading::Failed { id, .. }) => Some(*id),
        _ => None,
    });
    assert_eq!(failed, Some(19), "{answers:?}");
    assert!(!effects(&mut filter).iter().any(|effect| matches!(effect, Effect::Disconnect { .. })));
    for (io, range) in left {
        filter.local_done(now(), io, Ok(LocalData::Read(content(range))));
    }
    ask(&mut filter, 20, range(0, 4096));
    assert_eq!(reads(&mut filter).len(), 1, "there is room again");
}

#[test]
fn what_the_receivers_clock_shows_is_answered_once_and_before_all_else() {
    let mut filter = connected();
    filter.hasten();
    let shown = |micros| Message::Ping(Ping { sent: Some(CaptureTime(micros)), heard: None });
    filter.receive(now(), shown(7));
    filter.receive(now(), shown(8));
    let answer = |messages: &[Message]| match messages {
        [Message::Ping(Ping { sent: Some(sent), heard: Some(heard) }), ..] => (sent.0, heard.0),
        other => panic!("{other:?}"),
    };
    let messages = sent(&mut filter);
    // The pass that runs was begun now, and has ended.
    assert_eq!(answer(&messages), (now().wall.0 + 2, 8), "the newest");
    assert!(messages[1..].iter().all(|message| !matches!(message, Message::Ping(_))), "{messages:?}");
    filter.receive(now(), Message::Ping(Ping::default()));
    assert_eq!(sent(&mut filter), [], "it shows nothing");
    // A clock that was set back stamps what happens later than it shows, and so it answers.
    filter.not_before(CaptureTime(now().wall.0 + 60_000_000));
    filter.receive(now(), shown(9));
    assert_eq!(answer(&sent(&mut filter)), (now().wall.0 + 60_000_001, 9));
    filter.receive(now(), shown(10));
    filter.disconnected(now());
    assert!(!filter.has_to_send(), "nobody is there");
}
