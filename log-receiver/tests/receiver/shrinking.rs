//! A store without room of which some cannot go: what goes instead, and what is said of it.

use std::{fs, os::unix::fs::FileExt};

use backtide_log_receiver::{Config, OnFull, Receiver, Retention};
use backtide_receiver_api::{DiskRetention, KeepRequest, ReceiverClient};
use backtide_storage::{RealStorage, Storage};
use backtide_units::{ByteCount, Lsn};

use crate::{
    agent::*,
    ended_logs::{NEXT, begin_anew, end_the_log, later, reads_as, segments},
    fixture::*,
    retention::{TENS, content, go_on, ladder, rounds, vm1, write_history},
};

/// Turns over a byte of what a record holds in the log that has ended.
fn flip(place: &Place, lsn: u64) {
    let wanted = &content(lsn)[1000..1064];
    for path in segments(place) {
        let mut bytes = fs::read(&path).unwrap();
        let found = bytes.windows(wanted.len()).position(|window| window[1..] == wanted[1..]);
        if let Some(at) = found {
            bytes[at] ^= 0x40;
            let file = fs::OpenOptions::new().write(true).open(&path).unwrap();
            file.write_all_at(&bytes[at..=at], at as u64).unwrap();
            return;
        }
    }
    panic!("no segment has lsn:{lsn}");
}

/// A log that has ended, of which a record is rotten that its newest point needs, which is kept; and one behind it up to LSN 190.
async fn with_a_rotten_older_log(place: &Place) {
    let receiver = place.start().await;
    drop(write_history(&receiver, 6..=95).await);
    receiver.shutdown().await;
    end_the_log(place);
    flip(place, 60);
    let receiver = place.start().await;
    let mut agent = begin_anew(&receiver).await;
    go_on(&mut agent, NEXT + 1..=190).await;
    // Without a point that stays it would go as it is.
    let keep = KeepRequest { name: vm1(), at: "lsn:95".to_owned(), release: false, held: None };
    client(&receiver).keep(&keep).await.unwrap();
    let (mut other, _) = Agent::welcomed(&receiver, hello(2, "vm2")).await;
    other.first_pass(6).await;
    go_on(&mut other, 7..=95).await;
    drop((agent, other));
    receiver.shutdown().await;
}

/// It never has as much room as it wants.
async fn without_room(place: &Place) -> Receiver {
    let free = RealStorage::open(&place.store()).unwrap().free_space().unwrap();
    let low_bytes = ByteCount(free.0 * 2);
    without_room_each(place, low_bytes, 20).await
}

async fn without_room_each(place: &Place, low_bytes: ByteCount, interval_ms: u64) -> Receiver {
    let retention = Retention { on_full: OnFull::Shrink, low_bytes, interval_ms, ..Retention::default() };
    Receiver::start(Config { retention, ..place.config() }).await.unwrap()
}

/// What is told of both disks at one moment, and how many rounds have ended.
async fn both(api: &ReceiverClient) -> (DiskRetention, DiskRetention, u64) {
    let report = api.retention(None).await.unwrap();
    let of = |name: &str| {
        let mut disks = report.disks.iter();
        disks.find(|disk| disk.disk.name.as_str() == name).unwrap().clone()
    };
    (of("vm1"), of("vm2"), report.rounds)
}

#[tokio::test(flavor = "multi_thread")]
async fn newer_history_does_not_go_for_want_of_room_while_older_history_cannot() {
    let place = Place::new();
    with_a_rotten_older_log(&place).await;
    let receiver = without_room(&place).await;
    let api = client(&receiver);
    let seen = loop {
        let (rotten, other, rounds) = both(&api).await;
        if rotten.error.is_some() && other.shrunk > 0 {
            break rounds;
        }
    };
    let (rotten, other) = loop {
        let (rotten, other, rounds) = both(&api).await;
        if rounds > seen + 3 {
            break (rotten, other);
        }
    };
    assert!(rotten.error.as_ref().unwrap().contains("a part of it cannot be read"), "{rotten:?}");
    assert_eq!((rotten.shrunk, rotten.every_point_from.unwrap().lsn), (0, Lsn(5)));
    assert!(other.every_point_from.unwrap().lsn > Lsn(6));
    // Nothing of it has gone, in either log.
    let points = api.points(&vm1()).await.unwrap();
    let ranges: Vec<_> = points.intervals.iter().map(|of| (of.from_lsn.0, of.to_lsn.0)).collect();
    assert_eq!(ranges, [(5, 95), (NEXT, 190)]);
    reads_as(&place, &api, NEXT + 1, &later(NEXT + 1)).await;
    // When it is whole again the older log goes before the newer, and it is told.
    flip(&place, 60);
    let (rotten, alarms) = loop {
        let (rotten, _, _) = both(&api).await;
        let alarms = api.status().await.unwrap().alarms;
        if rotten.shrunk > 0 && alarms.iter().any(|alarm| alarm.contains("promises is gone")) {
            break (rotten, alarms);
        }
    };
    assert!(rotten.error.is_none() && rotten.every_point_from.unwrap().lsn >= Lsn(NEXT), "{alarms:?}");
    receiver.shutdown().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn while_there_is_room_newer_history_grows_old_whatever_keeps_the_older() {
    let place = Place::new();
    with_a_rotten_older_log(&place).await;
    let receiver = place.start().await;
    let api = client(&receiver);
    let report = rounds(&api, &vm1(), TENS).await;
    let of = &report.disks[0];
    assert!(of.error.as_ref().unwrap().contains("a part of it cannot be read"), "{of:?}");
    let single: Vec<u64> = of.single_points.iter().map(|point| point.lsn.0).collect();
    assert!(single.contains(&110) && !single.contains(&50), "{single:?}");
    assert_eq!(api.points(&vm1()).await.unwrap().intervals[0].to_lsn, Lsn(95));
    receiver.shutdown().await;
}

/// Has one round done, where none comes by itself; gives what is told of both disks then.
async fn one_round(api: &ReceiverClient) -> (DiskRetention, DiskRetention) {
    let before = api.retention(None).await.unwrap().rounds;
    api.set_retention(&vm1(), &ladder("forever")).await.unwrap();
    loop {
        let (one, two, rounds) = both(api).await;
        if rounds > before {
            assert_eq!(rounds, before + 1);
            return (one, two);
        }
    }
}

fn single(disk: &DiskRetention) -> Vec<u64> {
    disk.single_points.iter().map(|point| point.lsn.0).collect()
}

/// vm1 with single points at tens of seconds, of which one is kept, and every point of the last of them; vm2 with every point
/// from LSN 50 on. The last records of both are in a segment that is not full.
async fn with_single_points(place: &Place) -> (Agent, Agent) {
    let receiver = place.start().await;
    let mut one = write_history(&receiver, 6..=95).await;
    let api = client(&receiver);
    rounds(&api, &vm1(), TENS).await;
    let keep = KeepRequest { name: vm1(), at: "lsn:20".to_owned(), release: false, held: None };
    api.keep(&keep).await.unwrap();
    rounds(&api, &vm1(), "forever").await;
    go_on(&mut one, 96..=130).await;
    let (mut two, _) = Agent::welcomed(&receiver, hello(2, "vm2")).await;
    two.first_pass(50).await;
    go_on(&mut two, 51..=130).await;
    receiver.shutdown().await;
    (one, two)
}

#[tokio::test(flavor = "multi_thread")]
async fn for_want_of_room_the_oldest_goes_first_of_all_disks_and_single_points_too() {
    const HOUR: u64 = 3_600_000;
    let place = Place::new();
    drop(with_single_points(&place).await);
    let free = RealStorage::open(&place.store()).unwrap().free_space().unwrap();
    let receiver = without_room_each(&place, ByteCount(free.0 * 2), HOUR).await;
    let api = client(&receiver);
    // The first only looks what there is.
    let (one, two) = one_round(&api).await;
    let from = one.every_point_from.unwrap().lsn;
    assert_eq!((one.shrunk, two.shrunk), (0, 0));
    assert_eq!(single(&one), (1..from.0.div_ceil(10)).map(|ten| ten * 10).collect::<Vec<_>>());
    assert!(from > Lsn(70), "{one:?}");
    let (one, two) = one_round(&api).await;
    assert_eq!((one.shrunk, two.shrunk), (1, 0), "the point of LSN 10 is older than that of LSN 50");
    assert!(single(&one).starts_with(&[20, 60]) || single(&one).starts_with(&[20, 50]), "{one:?}");
    assert_eq!(one.every_point_from.unwrap().lsn, from);
    // Until nothing goes any more.
    let mut before = (one, two);
    let alarms = loop {
        let (one, two) = one_round(&api).await;
        let shrunk = (one.shrunk - before.0.shrunk, two.shrunk - before.1.shrunk);
        assert!(shrunk == (0, 1) || shrunk == (1, 0) || shrunk == (0, 0), "one disk a round: {shrunk:?}");
        assert!(single(&one).contains(&20), "what is kept stays: {one:?}");
        if one.every_point_from.unwrap().lsn > from {
            assert!(single(&before.0) == [20], "single points go first: {before:?}");
        }
        before = (one, two);
        if shrunk == (0, 0) {
            break api.status().await.unwrap().alarms;
        }
    };
    let (one, two) = before;
    assert!(one.every_point_from.unwrap().lsn > from && two.every_point_from.unwrap().lsn > Lsn(100));
    assert!(alarms.iter().any(|alarm| alarm.contains("no more history can go")), "{alarms:?}");
    // Nobody made single points of what everything was kept of for ever.
    assert_eq!((single(&one), single(&two)), (vec![20], vec![]));
    // What comes grows old in turn, and leaves no more either.
    let (mut two, _) = Agent::welcomed(&receiver, hello(2, "vm2")).await;
    go_on(&mut two, 131..=190).await;
    let (_, two) = one_round(&api).await;
    assert!(two.every_point_from.unwrap().lsn > Lsn(140), "{two:?}");
    assert_eq!(single(&two), Vec::<u64>::new());
    receiver.shutdown().await;
}
