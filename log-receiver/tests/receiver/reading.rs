//! Points read over the stream: the same as a mount gives, held while they are read and as long as an owner
//! wants, and nobody else's trouble.

use backtide_log_receiver::Receiver;
use backtide_protocol::{
    AckPolicy, Blocks, CloseCode, FETCH_BYTES_MAX, FailureCode, Hello, Message, OnOutage, OpenPoint,
    OriginPoint, PROTOCOL_VERSION, Ping, Reading,
};
use backtide_receiver_api::{DiffRequest, ErrorCode, KeepRequest};
use backtide_units::{
    BlockRange, ByteCount, ByteOffset, ByteRange, DiskName, Epoch, HistoryId, LogPosition, Lsn,
};
use roaring::RoaringTreemap;
use uuid::Uuid;

use crate::{
    agent::*,
    fixture::*,
    going_back::{History, assert_content, request, write_history},
    point_reader::{PointReader, open},
    retention::{self, TENS, ladder, rounds},
};

const BLOCK: usize = 4096;

fn differing(a: &[u8], b: &[u8]) -> RoaringTreemap {
    let blocks = a.chunks(BLOCK).zip(b.chunks(BLOCK)).zip(0_u64..);
    blocks.filter(|((a, b), _)| a != b).map(|(_, index)| index).collect()
}

fn owned(owner: &str, hold: bool) -> impl Fn(u64) -> Reading {
    move |id| match hold {
        true => Reading::Hold { id, owner: owner.to_owned() },
        false => Reading::Release { id, owner: owner.to_owned() },
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_point_read_over_the_stream_is_what_a_mount_of_it_gives() {
    let place = Place::new();
    let receiver = place.start().await;
    let (_agent, History { at_8, at_20, at_21 }) = write_history(&receiver).await;
    let api = client(&receiver);
    let empty = vec![0; DISK_BYTES as usize];
    let uuid = hello(1, "vm1").disk;
    for (disk, lsn, image, step) in [
        ("vm1", Some(5), &empty, FETCH_BYTES_MAX),
        ("vm1", Some(8), &at_8, 64 << 10),
        (uuid.to_string().as_str(), Some(20), &at_20, 10_000),
        ("vm1", None, &at_21, FETCH_BYTES_MAX),
    ] {
        let mut reader = PointReader::open(&receiver, open(disk, lsn)).await;
        let at = lsn.unwrap_or(21);
        assert_eq!((reader.opened.disk, reader.opened.lsn, reader.opened.time), (uuid, Lsn(at), time(at)));
        assert_eq!((reader.opened.size, reader.opened.latest), (ByteCount(DISK_BYTES), Lsn(21)));
        assert!(reader.image(step).await == *image, "lsn {at}");
        let mount = api.mount(&request(&format!("lsn:{at}"), None)).await.unwrap();
        assert_content(&place, &mount, image).await;
        // Outside of the blocks with data there is none.
        let data = reader.blocks(Blocks::Data).await.unwrap();
        assert!(differing(image, &empty).is_subset(&data), "lsn {at}");
        assert!(data.len() < DISK_BYTES / BLOCK as u64, "lsn {at}: most is known to be zero");
        assert_eq!(reader.part_by_part(Blocks::DataIn).await, data, "lsn {at}");
        for (other, content) in [(5, &empty), (8, &at_8), (20, &at_20), (21, &at_21)] {
            let changed = reader.blocks(Blocks::Changed(Lsn(other))).await.unwrap();
            assert!(differing(image, content).is_subset(&changed), "{at} and {other}");
            let in_parts = reader.part_by_part(|part| Blocks::ChangedIn(Lsn(other), part)).await;
            assert_eq!(in_parts, changed, "{at} and {other}");
            let asked = DiffRequest { from: format!("lsn:{at}"), to: format!("lsn:{other}") };
            let mut told = RoaringTreemap::new();
            for span in api.diff(&"vm1".parse().unwrap(), &asked).await.unwrap().ranges {
                let range = ByteRange::new(span.offset, span.length).unwrap();
                told.insert_range(BlockRange::touched_by(range).indices());
            }
            assert_eq!(changed, told, "{at} and {other}");
        }
    }
    receiver.shutdown().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn what_came_after_the_last_point_is_told_as_changed() {
    let place = Place::new();
    let receiver = place.start().await;
    let (mut agent, History { at_21, .. }) = write_history(&receiver).await;
    // A pass that never ends: what it brought is no point, and is there.
    agent.send(&pass_begin(30, 21, backtide_units::Reason::ReceiverAway)).await;
    agent.send(&pass_data(30, 40960, vec![30; 8192])).await;
    agent.all_durable().await;
    let mut reader = PointReader::open(&receiver, open("vm1", None)).await;
    assert_eq!(reader.opened.lsn, Lsn(21));
    assert!(reader.image(FETCH_BYTES_MAX).await == at_21);
    let later = reader.blocks(Blocks::Changed(Lsn::MAX)).await.unwrap();
    assert_eq!(later, [10, 11].into_iter().collect());
}

#[tokio::test(flavor = "multi_thread")]
async fn what_cannot_be_read_is_refused_with_the_reason() {
    let place = Place::new();
    let receiver = place.start().await;
    let (_agent, _) = write_history(&receiver).await;
    let history = PointReader::open(&receiver, open("vm1", Some(8))).await.opened.history;
    let foreign = HistoryId(Uuid::from_u128(3));
    for (open, code, why) in [
        (open("vm2", None), CloseCode::Refused, "there is no disk \"vm2\""),
        (open("vm1", Some(12)), CloseCode::Refused, "lsn:12"),
        (OpenPoint { history: Some(foreign), ..open("vm1", Some(8)) }, CloseCode::Refused, "another point"),
        (OpenPoint { version: PROTOCOL_VERSION + 1, ..open("vm1", None) }, CloseCode::Version, "version"),
        (OpenPoint { reader: String::new(), ..open("vm1", None) }, CloseCode::Invalid, "1 to 256 bytes"),
    ] {
        let closed = PointReader::refused(&receiver, open).await;
        assert_eq!(closed.code, code, "{}", closed.message);
        assert!(closed.message.contains(why), "{}", closed.message);
    }
    let open = OpenPoint { history: Some(history), ..open("vm1", Some(8)) };
    let mut reader = PointReader::open(&receiver, open.clone()).await;
    // Whether it can be told what changed since is known without the answer.
    let none = BlockRange::from(0..0);
    assert_eq!(reader.blocks(Blocks::ChangedIn(Lsn(20), none)).await.unwrap(), RoaringTreemap::new());
    // Also of an LSN that is no point, as long as the log reaches below it.
    let since_a_hole = reader.blocks(Blocks::Changed(Lsn(12))).await.unwrap();
    let whole = BlockRange::whole_disk(ByteCount(DISK_BYTES));
    assert_eq!(reader.blocks(Blocks::ChangedIn(Lsn(12), whole)).await.unwrap(), since_a_hole);
    assert_eq!(reader.blocks(Blocks::ChangedIn(Lsn(12), none)).await.unwrap(), RoaringTreemap::new());
    let beyond = ByteRange::new(ByteOffset(DISK_BYTES - 512), ByteCount(1024)).unwrap();
    let failure = reader.done(|id| Reading::Fetch { id, range: beyond }).await.unwrap_err();
    assert_eq!(failure.code, FailureCode::Invalid, "{}", failure.message);
    // The connection goes on after a question that makes no sense, and ends with a message that is none.
    assert_eq!(reader.image(FETCH_BYTES_MAX).await.len() as u64, DISK_BYTES);
    reader.agent.send(&Message::Flush { lsn: Lsn(8), time: time(8) }).await;
    let closed = reader.agent.closed().await;
    assert_eq!((closed.code, closed.message.contains("flush")), (CloseCode::Invalid, true));
    let mut reader = PointReader::open(&receiver, open).await;
    receiver.shutdown().await;
    assert_eq!(reader.agent.closed().await.code, CloseCode::Bye);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_point_stays_while_it_is_read_and_while_it_is_held() {
    let place = Place::new();
    let receiver = place.start().await;
    let _agent = retention::write_history(&receiver, 6..=95).await;
    let api = client(&receiver);
    let vm1 = "vm1".parse().unwrap();
    let mut reader = PointReader::open(&receiver, open("vm1", Some(33))).await;
    let mut held = PointReader::open(&receiver, open("vm1", Some(44))).await;
    held.done(owned("rewind of vm1", true)).await.unwrap();
    // Another point of the same owner takes the place of the first.
    let mut again = PointReader::open(&receiver, open("vm1", Some(47))).await;
    again.done(owned("rewind of vm1", true)).await.unwrap();
    // What the first connection releases is its own point, which is held no longer.
    held.done(owned("rewind of vm1", false)).await.unwrap();
    drop((held, again));
    let report = rounds(&api, &vm1, TENS).await;
    let [point] = &report.disks[0].held[..] else { panic!("{:?}", report.disks[0].held) };
    assert_eq!((point.owner.as_str(), point.lsn, point.time), ("rewind of vm1", Lsn(47), time(47)));
    let singles: Vec<u64> = report.disks[0].single_points.iter().map(|point| point.lsn.0).collect();
    assert!(singles.contains(&47) && !singles.contains(&33) && !singles.contains(&44), "{singles:?}");
    // Gone for others, and still here for who reads it.
    assert!(reader.image(100_000).await == retention::at(33));
    let failure = reader.done(owned("late", true)).await.unwrap_err();
    assert_eq!(failure.code, FailureCode::Gone, "{}", failure.message);
    let mut later = PointReader::open(&receiver, open("vm1", Some(47))).await;
    let gone = later.blocks(Blocks::Changed(Lsn(34))).await.unwrap_err();
    assert_eq!(gone.code, FailureCode::Gone, "{}", gone.message);
    assert_eq!(PointReader::refused(&receiver, open("vm1", Some(33))).await.code, CloseCode::Refused);
    receiver.shutdown().await;

    let receiver = place.start().await;
    let api = client(&receiver);
    rounds(&api, &vm1, TENS).await;
    let mut held = PointReader::open(&receiver, open("vm1", Some(47))).await;
    assert!(held.image(FETCH_BYTES_MAX).await == retention::at(47));
    held.done(owned("somebody else", false)).await.unwrap();
    assert_eq!(api.retention(Some(&vm1)).await.unwrap().disks[0].held.len(), 1);
    held.done(owned("rewind of vm1", false)).await.unwrap();
    assert!(api.retention(Some(&vm1)).await.unwrap().disks[0].held.is_empty());
    // By hand, too.
    held.done(owned("rewind of vm1", true)).await.unwrap();
    let release = KeepRequest {
        name: vm1.clone(),
        at: "lsn:47".to_owned(),
        release: true,
        held: Some("rewind of vm1".to_owned()),
    };
    assert!(api.keep(&release).await.unwrap().disks[0].held.is_empty());
    let report = rounds(&api, &vm1, TENS).await;
    assert!(!report.disks[0].single_points.iter().any(|point| point.lsn == Lsn(47)));
    assert_eq!(report.disks[0].ladder, ladder(TENS).ladder.unwrap());
    receiver.shutdown().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_point_that_is_released_stays_held_until_its_owner_or_a_person_names_the_hold() {
    let place = Place::new();
    let receiver = place.start().await;
    let _agent = retention::write_history(&receiver, 6..=20).await;
    let api = client(&receiver);
    let vm1: DiskName = "vm1".parse().unwrap();
    let mut held = PointReader::open(&receiver, open("vm1", Some(12))).await;
    held.done(owned("rewind of vm1", true)).await.unwrap();
    let ask = |at: &str, release, held: Option<&str>| {
        let (name, at, held) = (vm1.clone(), at.to_owned(), held.map(str::to_owned));
        KeepRequest { name, at, release, held }
    };
    api.keep(&ask("lsn:12", false, None)).await.unwrap();
    let released = api.keep(&ask("lsn:12", true, None)).await.unwrap();
    assert!(released.disks[0].keep.is_empty(), "{released:?}");
    assert_eq!(released.disks[0].held.len(), 1, "the agent needs it still: {released:?}");
    for (at, owner, why) in [
        ("lsn:12", None, "is kept at lsn:12, so none was released"),
        ("lsn:13", Some("rewind of vm1"), "\"rewind of vm1\" holds nothing at lsn:13"),
        ("lsn:12", Some("rewind of vm2"), "\"rewind of vm2\" holds nothing at lsn:12"),
    ] {
        let refused = api.keep(&ask(at, true, owner)).await.unwrap_err();
        assert_eq!(refused.code, ErrorCode::NotFound, "{refused:?}");
        assert!(refused.message.contains(why), "{refused:?}");
        // The way out is in it where there is one.
        let named = refused.hint.as_ref().is_some_and(|hint| hint.contains("--held 'rewind of vm1'"));
        assert_eq!(named, owner.is_none(), "{refused:?}");
    }
    let wrong = api.keep(&ask("lsn:12", false, Some("rewind of vm1"))).await.unwrap_err();
    assert_eq!(wrong.code, ErrorCode::Usage, "{wrong:?}");
    assert_eq!(api.retention(Some(&vm1)).await.unwrap().disks[0].held.len(), 1);
    let gone = api.keep(&ask("lsn:12", true, Some("rewind of vm1"))).await.unwrap();
    assert!(gone.disks[0].held.is_empty(), "{gone:?}");
    receiver.shutdown().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_kept_point_that_has_gone_is_released_all_the_same() {
    let place = Place::new();
    let receiver = place.start().await;
    drop(retention::write_history(&receiver, 6..=20).await);
    let vm1: DiskName = "vm1".parse().unwrap();
    let keep = |release| KeepRequest { name: vm1.clone(), at: "lsn:12".to_owned(), release, held: None };
    assert_eq!(client(&receiver).keep(&keep(false)).await.unwrap().disks[0].keep.len(), 1);
    receiver.shutdown().await;
    std::fs::remove_dir_all(place.store().join("disks")).unwrap();
    let receiver = place.start().await;
    let _agent = retention::write_history(&receiver, 6..=8).await;
    let api = client(&receiver);
    assert!(api.keep(&keep(false)).await.is_err());
    assert!(api.keep(&keep(true)).await.unwrap().disks[0].keep.is_empty());
    assert!(api.keep(&keep(true)).await.is_err(), "nothing is kept there");
    receiver.shutdown().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn an_agent_that_takes_no_answers_disturbs_nobody() {
    let place = Place::new();
    let receiver = place.start().await;
    let (mut agent, History { at_21, .. }) = write_history(&receiver).await;
    let mut slow = PointReader::open(&receiver, open("vm1", None)).await;
    // So many as a socket holds, of which the receiver takes a part.
    for _ in 0..60 {
        slow.fetch(1 << 20, FETCH_BYTES_MAX).await;
    }
    let mut reader = PointReader::open(&receiver, open("vm1", None)).await;
    assert!(reader.image(4096).await == at_21);
    agent.send(&write(22, 0, vec![22; 512])).await;
    agent.all_durable().await;
    // All of its questions are answered when it comes to take them.
    for _ in 0..120 {
        slow.next().await;
    }
    receiver.shutdown().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn pings_of_an_agent_that_takes_nothing_are_not_all_answered() {
    let place = Place::new();
    let receiver = place.start().await;
    let (_agent, _) = write_history(&receiver).await;
    let mut reader = PointReader::open(&receiver, open("vm1", None)).await;
    // More than a socket holds of answers to them.
    const PINGS: usize = 50_000;
    for _ in 0..PINGS {
        reader.agent.send(&Message::Ping(Ping::default())).await;
    }
    let asked = reader.fetch(0, 4096).await;
    let mut answered = 0;
    loop {
        match reader.agent.next().await {
            Some(Message::Ping(_)) => answered += 1,
            Some(Message::Reading(Reading::Answered { id })) if id == asked => break,
            Some(Message::Reading(Reading::Piece { .. })) => {}
            other => panic!("expected an answer, found {other:?}"),
        }
    }
    assert!((1..PINGS / 2).contains(&answered), "{answered}");
    receiver.shutdown().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn what_an_agent_left_is_known_only_when_all_it_was_told_of_was_here_then() {
    let place = Place::new();
    let receiver = place.start().await;
    let (mut agent, _) = write_history(&receiver).await;
    agent.send(&pass_begin(30, 21, backtide_units::Reason::ReceiverAway)).await;
    agent.send(&pass_data(30, 40960, vec![30; 8192])).await;
    agent.all_durable().await;
    let history = PointReader::open(&receiver, open("vm1", None)).await.opened.history;
    // The agent of a receiver that was put back: its hello names LSNs of which nothing came.
    let attach = |epoch: Epoch| Hello {
        history: Some(history),
        epoch,
        attach: Uuid::from_u128(epoch.0.into()),
        next_lsn: Lsn(90),
        ..hello(1, "vm1")
    };
    let (last, taken) = (Epoch(2), Epoch(2).taken_over());
    drop(Agent::welcomed(&receiver, attach(last)).await);
    let (mut other, welcome) = Agent::welcomed(&receiver, attach(taken)).await;
    let entries = welcome.position.0;
    other.send(&pass_begin(100, 21, backtide_units::Reason::ResyncInterrupted)).await;
    other.send(&pass_data(100, 40960, vec![21; 4096])).await;
    other.send(&pass_end(100)).await;
    other.all_durable().await;
    let mut reader = PointReader::open(&receiver, open("vm1", None)).await;
    let mut left = async |durable: u64, entries: u64| {
        let (durable, entries) = (Lsn(durable), LogPosition(entries));
        reader.blocks(Blocks::Left { epoch: last, durable, entries }).await
    };
    // Up to 30 it has them, and the other agent brought one block after that; up to 21 it lacks the pass.
    assert_eq!(left(30, entries).await.unwrap(), [10].into_iter().collect());
    assert_eq!(left(21, entries - 1).await.unwrap(), [10, 11].into_iter().collect());
    for (durable, entries) in [(31, entries), (89, entries), (30, entries + 1)] {
        let gone = left(durable, entries).await.unwrap_err();
        assert!(gone.code == FailureCode::Gone && gone.message.contains("had been durable here"), "{gone:?}");
    }
    // Nor is it known what changed after a point where the log has less than it had.
    let mut reader = PointReader::open(&receiver, open("vm1", Some(20))).await;
    let since = reader.blocks(Blocks::Changed(Lsn::MAX)).await.unwrap();
    assert_eq!(reader.blocks(Blocks::Changed(Lsn(100))).await.unwrap(), since);
    let beyond = reader.blocks(Blocks::Changed(Lsn(101))).await.unwrap_err();
    assert!(
        beyond.code == FailureCode::Gone && beyond.message.contains("beyond the end of the log"),
        "{beyond:?}"
    );
    let mut after = async |durable: u64, entries: u64| {
        reader.blocks(Blocks::After { durable: Lsn(durable), entries: LogPosition(entries) }).await
    };
    assert_eq!(after(100, entries).await.unwrap(), since);
    for (durable, entries) in [(101, entries), (100, entries + 100)] {
        let gone = after(durable, entries).await.unwrap_err();
        assert!(gone.code == FailureCode::Gone && gone.message.contains("had been durable here"), "{gone:?}");
    }
    receiver.shutdown().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn whoever_asks_is_told_how_a_disk_was_answered_and_what_it_began_as() {
    let place = Place::new();
    let receiver = place.start().await;
    let origin = OriginPoint {
        receiver: "tcp://keeper:7400".to_owned(),
        disk: hello(9, "golden").disk,
        name: "golden".parse().unwrap(),
        lsn: Lsn(70),
        time: time(7),
    };
    let first = Hello {
        ack: Some(AckPolicy::Durable),
        on_outage: Some(OnOutage::Block),
        origin: Some(origin),
        ..hello(1, "vm1")
    };
    drop(Agent::welcomed(&receiver, first).await);
    // Another agent, which knows nothing of that.
    drop(Agent::welcomed(&receiver, Hello { epoch: Epoch(2), ..hello(1, "vm1") }).await);
    let told = async |receiver: &Receiver| {
        let disk = client(receiver).disks(None).await.unwrap().disks.remove(0);
        (
            disk.ack,
            disk.on_outage,
            disk.origin.map(|origin| (origin.disk.to_string(), origin.lsn, origin.time)),
        )
    };
    let said = |text: &str| Some(text.to_owned());
    let expected = (said("durable"), said("block"), Some(("golden".to_owned(), Lsn(70), time(7))));
    assert_eq!(told(&receiver).await, expected);
    receiver.shutdown().await;
    let receiver = place.start().await;
    assert_eq!(told(&receiver).await, expected);
    receiver.shutdown().await;
}
