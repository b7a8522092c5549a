use backtide_protocol::Data;
use backtide_units::{ByteOffset, CaptureTime, Reason};
use bytes::Bytes;

use super::*;

const TIME: CaptureTime = CaptureTime(1);

fn record(lsn: u64) -> Message {
    let range = ByteRange::new(ByteOffset(0), ByteCount(4)).expect("a range");
    let body = RecordBody::Write(Data::capture(Bytes::from_static(b"four")));
    Message::Record(Record { lsn: Lsn(lsn), previous: Lsn(lsn - 1), time: TIME, range, body })
}

fn end_after_dropping(valid_from: u64) -> Option<Lsn> {
    let mut window = Window::new(Lsn::ZERO);
    let reason = Reason::FirstAttach;
    window.push(Message::PassBegin { at: Lsn(1), gap_from: Lsn::ZERO, time: TIME, reason });
    window.push(record(2));
    let sent = [window.send(2), window.send(3)];
    assert!(sent.iter().all(Option::is_some));
    window.push(record(3));
    window.push(Message::PassEnd { at: Lsn(1), valid_from: Some(Lsn(valid_from)), time: TIME });
    window.abandon_unsent_records(&mut DirtyBitmap::new());
    assert_eq!(window.log_end(), Lsn(2));
    match window.send(4) {
        Some(Message::PassEnd { valid_from, .. }) => valid_from,
        other => panic!("expected the pass's end, found {other:?}"),
    }
}

#[test]
fn what_was_sent_of_a_pass_is_bounded_until_it_is_durable() {
    let data = |block: u64| Message::PassData {
        at: Lsn(1),
        range: ByteRange::between(ByteOffset(block * 4096), ByteOffset(block * 4096 + 4)),
        data: Data::capture(Bytes::from_static(&[1; 4])),
    };
    let mut window = Window::new(Lsn(0));
    let mut lsn = 0;
    let mut fill = |window: &mut Window| {
        let mut seq = 0;
        while window.has_places() {
            lsn += 1;
            // A guest's own writes take none of them.
            for message in [data(lsn), record(lsn)] {
                seq += 1;
                window.push(message);
                window.send(seq);
            }
        }
        seq
    };
    let seq = fill(&mut window);
    assert_eq!(seq, 2 * PLACES_MAX as u64);
    assert!(window.pop_durable(1).is_some() && window.has_places());
    while window.pop_durable(seq).is_some() {}
    assert_eq!((window.places, window.is_empty()), (0, true));
    fill(&mut window);
    window.rewind();
    assert!(window.has_places(), "on another connection nothing has been sent");
}

#[test]
fn a_pass_offers_no_point_that_needs_dropped_records() {
    assert_eq!(end_after_dropping(3), None);
    assert_eq!(end_after_dropping(2), Some(Lsn(2)));
}

#[test]
fn what_followed_a_record_is_sent_again_where_the_receiver_may_not_have_it() {
    let flush = |lsn| Message::Flush { lsn: Lsn(lsn), time: TIME };
    let unchanged = Message::Unchanged { lsn: Lsn(2), time: TIME };
    let mut window = Window::new(Lsn::ZERO);
    // A flush may cover less than what came before it.
    let entries = [record(1), flush(1), record(2), flush(2), unchanged.clone(), record(3), flush(3)];
    for message in entries {
        window.push(message);
    }
    window.trim_to(Lsn(2));
    let left: Vec<Message> = (2..).map_while(|seq| window.send(seq)).collect();
    assert_eq!(left, [flush(2), unchanged, record(3), flush(3)]);
    window.rewind();
    window.push(flush(2));
    window.trim_to(Lsn(3));
    let left: Vec<Message> = (2..).map_while(|seq| window.send(seq)).collect();
    assert_eq!(left, [flush(3), flush(2)]);
}
