//! After the welcome: what goes into the log, what is acknowledged when, what ends the connection.

use std::cell::Cell;

use backtide_protocol::{
    CloseCode, Compare, CompareItem, CompareResult, Content, Hello, Message, Ping, Record, RecordBody,
};
use backtide_recovery::LogOptions;
use backtide_segment::Bucket;
use backtide_storage::Storage;
use backtide_units::{ByteCount, CaptureTime, Epoch, Lsn};

use super::fixture::*;
use crate::{Disk, DiskError, Effect, entries};

/// In sync, the log at LSN 5, everything durable and acknowledged up to frame 3.
fn in_sync(bench: &mut Bench) -> Peer {
    let (mut peer, _) = bench.welcomed(hello());
    peer.tell(bench, pass_begin(5, 0));
    peer.tell(bench, pass_end(5));
    bench.commit(disk(7));
    assert_eq!(peer.settle(bench), [Seen::Ack { received: 3, durable: 3 }]);
    peer
}

fn the_disk(bench: &mut Bench) -> &mut Disk {
    bench.disks.get_mut(disk(7)).unwrap()
}

#[test]
fn a_batch_is_acknowledged_once_and_durable_only_when_it_is() {
    let mut bench = Bench::new();
    let mut peer = in_sync(&mut bench);
    for lsn in 6..10 {
        peer.tell(&mut bench, write(lsn, lsn - 1));
    }
    assert_eq!(peer.settle(&mut bench), [Seen::Ack { received: 7, durable: 3 }]);
    assert_eq!(peer.settle(&mut bench), [], "nothing new to say");
    let ticket = the_disk(&mut bench).ticket().unwrap();
    // Arrives while the sync is under way: not covered by it.
    peer.tell(&mut bench, write(10, 9));
    assert_eq!(peer.settle(&mut bench), [Seen::Ack { received: 8, durable: 3 }]);
    the_disk(&mut bench).synced(ticket.sync());
    assert_eq!(peer.settle(&mut bench), [Seen::Ack { received: 8, durable: 7 }]);
    bench.commit(disk(7));
    assert_eq!(peer.settle(&mut bench), [Seen::Ack { received: 8, durable: 8 }]);
}

#[test]
fn a_ping_is_durable_with_what_came_before_it() {
    let mut bench = Bench::new();
    let mut peer = in_sync(&mut bench);
    peer.tell(&mut bench, Message::Ping(Ping::default()));
    assert_eq!(peer.settle(&mut bench), [Seen::Ack { received: 4, durable: 4 }]);
    peer.tell(&mut bench, write(6, 5));
    peer.tell(&mut bench, Message::Ping(Ping::default()));
    assert_eq!(peer.settle(&mut bench), [Seen::Ack { received: 6, durable: 4 }]);
    bench.commit(disk(7));
    assert_eq!(peer.settle(&mut bench), [Seen::Ack { received: 6, durable: 6 }]);
}

#[test]
fn undurable_bytes_are_counted_until_they_are_durable() {
    let mut bench = Bench::new();
    let mut peer = in_sync(&mut bench);
    assert_eq!(the_disk(&mut bench).undurable_bytes(), ByteCount::ZERO);
    peer.tell(&mut bench, write(6, 5));
    assert_eq!(the_disk(&mut bench).undurable_bytes(), ByteCount(64 + 16));
    bench.commit(disk(7));
    assert_eq!(the_disk(&mut bench).undurable_bytes(), ByteCount::ZERO);
}

#[test]
fn what_has_no_payload_counts_with_its_place_in_the_index() {
    let mut bench = Bench::new();
    let mut peer = in_sync(&mut bench);
    let body = RecordBody::Zero;
    let range = range(1, SIZE.0 - 2);
    let zero = Record { lsn: Lsn(6), previous: Lsn(5), time: CaptureTime(6000), range, body };
    let extents = Bucket::split(range).len() as u64;
    assert!(extents > 2);
    peer.tell(&mut bench, Message::Record(zero));
    assert_eq!(the_disk(&mut bench).undurable_bytes(), ByteCount(64 + 64 * extents));
}

#[test]
fn a_missing_record_is_noticed() {
    let mut bench = Bench::new();
    let mut peer = in_sync(&mut bench);
    let (code, why) = peer.refused(&mut bench, write(8, 7));
    assert_eq!(code, CloseCode::Invalid);
    assert!(why.contains("follows LSN 5") && why.contains("something is missing"), "{why}");
}

#[test]
fn an_lsn_is_not_used_twice() {
    let mut bench = Bench::new();
    let mut peer = in_sync(&mut bench);
    assert_eq!(peer.refused(&mut bench, write(5, 5)).0, CloseCode::Invalid);
}

#[test]
fn nothing_lies_beyond_the_end_of_the_disk() {
    let at_end = write_at(6, 5, SIZE.0 - 2, b"four");
    let pass = pass_data(9, SIZE.0 - 2, b"four");
    let item = CompareItem { range: range(SIZE.0 - 1, 2), content: Content::Zeroes };
    let compare = Message::Compare(Compare { id: 1, at: Lsn(5), items: vec![item] });
    for message in [at_end, pass, compare] {
        let mut bench = Bench::new();
        let mut peer = in_sync(&mut bench);
        if matches!(message, Message::PassData { .. }) {
            peer.tell(&mut bench, pass_begin(9, 5));
        }
        let (code, why) = peer.refused(&mut bench, message);
        assert_eq!(code, CloseCode::Invalid);
        assert!(why.contains("beyond the end of the disk at 1048576"), "{why}");
    }
}

#[test]
fn marks_and_flushes_are_of_what_was_received() {
    for message in [mark(6, "ahead"), flush(6)] {
        let mut bench = Bench::new();
        let mut peer = in_sync(&mut bench);
        let (code, why) = peer.refused(&mut bench, message);
        assert_eq!(code, CloseCode::Invalid);
        assert!(why.contains("the log has only reached 5"), "{why}");
    }
}

#[test]
fn passes_out_of_order_are_refused() {
    for message in [pass_end(9), pass_data(9, 0, b"abcd"), pass_begin(5, 5), pass_begin(9, 9)] {
        let mut bench = Bench::new();
        let mut peer = in_sync(&mut bench);
        assert_eq!(peer.refused(&mut bench, message).0, CloseCode::Invalid);
    }
}

#[test]
fn a_mark_sent_again_is_the_same_mark_and_the_newest_of_a_label_counts() {
    let mut bench = Bench::new();
    let mut peer = in_sync(&mut bench);
    peer.tell(&mut bench, mark(5, "nightly"));
    let appended = the_disk(&mut bench).appended();
    peer.tell(&mut bench, mark(5, "nightly"));
    assert_eq!(the_disk(&mut bench).appended(), appended);
    peer.tell(&mut bench, write(6, 5));
    peer.tell(&mut bench, mark(6, "nightly"));
    let snapshot = the_disk(&mut bench).snapshot().unwrap();
    let point = "mark:nightly".parse().unwrap();
    assert_eq!(snapshot.resolve(&point, TIME).unwrap(), Lsn(6));
}

#[test]
fn a_flush_sent_again_is_the_same_point() {
    let mut bench = Bench::new();
    let mut peer = in_sync(&mut bench);
    for message in [flush(5), write(6, 5), flush(6)] {
        peer.tell(&mut bench, message);
    }
    bench.commit(disk(7));
    peer.settle(&mut bench);
    // The acknowledgement is lost.
    let (mut again, welcome) = bench.welcomed(hello());
    assert_eq!(welcome.durable, Lsn(6));
    again.tell(&mut bench, flush(5));
    again.tell(&mut bench, flush(6));
    let seen = again.settle(&mut bench);
    assert_eq!(seen, [Seen::Ack { received: 3, durable: 3 }], "it is taken all the same");
    let snapshot = the_disk(&mut bench).snapshot().unwrap();
    assert_eq!(snapshot.timeline().flushes().0, 2);
    let points = snapshot.flush_points(Lsn::MAX, 8).unwrap();
    assert_eq!(points.iter().map(|point| point.lsn).collect::<Vec<_>>(), [Lsn(6), Lsn(5)]);
}

#[test]
fn a_refused_message_leaves_the_log_in_use() {
    let mut bench = Bench::new();
    let mut peer = in_sync(&mut bench);
    peer.refused(&mut bench, write(8, 7));
    let (mut again, welcome) = bench.welcomed(hello());
    assert_eq!(welcome.durable, Lsn(5));
    again.tell(&mut bench, write(6, 5));
}

#[test]
fn a_compare_sees_what_was_received_before_it_at_its_lsn() {
    let mut bench = Bench::new();
    let mut peer = in_sync(&mut bench);
    peer.tell(&mut bench, write_at(6, 5, 0, b"old!"));
    peer.tell(&mut bench, pass_begin(9, 6));
    peer.tell(&mut bench, write_at(10, 9, 0, b"new!"));
    let hash = |bytes: &[u8]| Content::Hash(*blake3::hash(bytes).as_bytes());
    let items = vec![
        CompareItem { range: range(0, 4), content: hash(b"old!") },
        CompareItem { range: range(0, 4), content: hash(b"new!") },
        CompareItem { range: range(0, 4096), content: Content::Zeroes },
        CompareItem { range: range(4096, SIZE.0 - 4096), content: Content::Zeroes },
    ];
    let question = Message::Compare(Compare { id: 77, at: Lsn(9), items });
    let mut effects = peer.effects(&mut bench, question);
    // What comes later changes nothing.
    peer.tell(&mut bench, pass_data(9, 4096, b"late"));
    let Some(Effect::Compare(job)) = effects.pop() else { panic!("no compare") };
    let answer = job.run().unwrap();
    assert_eq!((answer.id, answer.differing), (77, vec![1, 2]));
}

#[test]
fn new_data_is_refused_above_the_reserve_and_taken_again_when_there_is_room() {
    let mut bench = Bench::new();
    let mut peer = in_sync(&mut bench);
    let used = bench.storage.used();
    bench.storage.set_capacity(Some(ByteCount(used.0 + 60_000)));
    let (code, why) = peer.refused(&mut bench, write_at(6, 5, 0, &[6; 4096]));
    assert_eq!(code, CloseCode::Store);
    assert!(why.contains("is full"), "{why}");
    assert_eq!(bench.refused(hello()).0, CloseCode::Store);
    bench.storage.set_capacity(None);
    let (mut again, welcome) = bench.welcomed(hello());
    assert_eq!(welcome.durable, Lsn(5));
    again.tell(&mut bench, write(6, 5));
}

#[test]
fn a_failed_sync_ends_the_connection_and_the_next_one_is_told_the_truth() {
    let mut bench = Bench::new();
    let mut peer = in_sync(&mut bench);
    peer.tell(&mut bench, write(6, 5));
    bench.storage.fail_sync_after(0);
    bench.commit(disk(7));
    match peer.settle(&mut bench).as_slice() {
        [Seen::Close(CloseCode::Store, why), Seen::End] => assert!(!why.is_empty()),
        other => panic!("{other:?}"),
    }
    assert!(the_disk(&mut bench).failure().is_some());
    let (mut again, welcome) = bench.welcomed(hello());
    assert!(welcome.durable == Lsn(5) || welcome.durable == Lsn(6), "{}", welcome.durable);
    let next = welcome.durable.0 + 1;
    again.tell(&mut bench, write(next, next - 1));
    bench.commit(disk(7));
    assert_eq!(again.settle(&mut bench), [Seen::Ack { received: 2, durable: 2 }]);
}

#[test]
fn a_sync_from_before_the_log_was_opened_again_proves_nothing() {
    let mut bench = Bench::new();
    let mut peer = in_sync(&mut bench);
    peer.tell(&mut bench, write(6, 5));
    let early = the_disk(&mut bench).ticket().unwrap();
    peer.tell(&mut bench, write(7, 6));
    let failing = the_disk(&mut bench).ticket().unwrap();
    bench.storage.fail_sync_after(0);
    the_disk(&mut bench).synced(failing.sync());
    assert!(the_disk(&mut bench).failure().is_some());
    let mut again = bench.connect();
    again.send(&mut bench, Message::Hello(Hello { epoch: Epoch(2), ..hello() }));
    let before = the_disk(&mut bench).durable();
    the_disk(&mut bench).synced(early.sync());
    assert_eq!(the_disk(&mut bench).durable(), before);
}

#[test]
fn a_compare_that_nobody_waits_for_stops_within_a_long_range() {
    const WINDOWS: u64 = 64;
    let mut bench = Bench::new();
    let size = ByteCount(WINDOWS << 30);
    let (mut peer, _) = bench.welcomed(Hello { size, ..hello() });
    peer.tell(&mut bench, pass_begin(5, 0));
    let mut stopped_after = |wanted_times: u64| {
        let items = vec![CompareItem { range: range(0, size.0), content: Content::Zeroes }; 2];
        let question = Message::Compare(Compare { id: 1, at: Lsn(5), items });
        let mut effects = peer.effects(&mut bench, question);
        let Some(Effect::Compare(job)) = effects.pop() else { panic!("no compare") };
        let asked = Cell::new(0);
        let wanted = || {
            asked.set(asked.get() + 1);
            asked.get() <= wanted_times
        };
        (job.run_while(wanted).unwrap(), asked.get())
    };
    assert_eq!(stopped_after(0), (None, 1), "one that was queued does nothing");
    assert_eq!(stopped_after(10), (None, 11), "within the first item");
    let all = 2 * (1 + WINDOWS);
    assert_eq!(stopped_after(all), (Some(CompareResult { id: 1, differing: vec![] }), all));
}

#[test]
fn a_log_that_a_full_device_has_torn_is_out_of_use() {
    let mut bench = Bench::with(LogOptions { buffer_bytes_max: ByteCount(4096), ..LogOptions::default() });
    in_sync(&mut bench);
    // A file system that does not keep what it has reserved.
    let files = bench.storage.files().into_iter();
    let (path, _) =
        files.clone().find(|(path, _)| path.extension().is_some_and(|name| name == "seg")).unwrap();
    bench.storage.open(&path).unwrap().set_len(ByteCount(512)).unwrap();
    bench.storage.set_capacity(Some(bench.storage.used()));
    let Message::Record(record) = write_at(6, 5, 0, &[6; 16384]) else { panic!("no record") };
    let refused = the_disk(&mut bench).append(entries::record(record), ByteCount(16384));
    assert!(matches!(refused, Err(DiskError::Store(_))));
    assert!(the_disk(&mut bench).failure().is_some(), "part of the entry may be in the file");
}
