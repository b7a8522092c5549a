//! The store's directory: one receiver at a time, of a version it knows, and nobody else's.

use std::fs;

use backtide_protocol::{CloseCode, Hello};
use backtide_units::Lsn;

use crate::{agent::*, fixture::*};

#[tokio::test]
async fn two_receivers_never_open_one_store() {
    let place = Place::new();
    let receiver = place.start().await;
    let mut config = place.config();
    config.run = Some(place.path("other-run"));
    let why = place.refusal(config).await;
    assert!(why.contains("is open in another receiver"), "{why}");
    assert!(why.contains(&std::process::id().to_string()), "{why}");
    receiver.shutdown().await;
    place.start().await.shutdown().await;
}

#[tokio::test]
async fn a_store_keeps_its_identity() {
    let place = Place::new();
    let first = place.start().await;
    let id = first.store_id();
    first.shutdown().await;
    let second = place.start().await;
    assert_eq!(second.store_id(), id);
    second.shutdown().await;
}

#[tokio::test]
async fn a_store_file_of_another_version_or_damaged_is_refused() {
    let place = Place::new();
    place.start().await.shutdown().await;
    let path = place.store().join("store.json");
    let good = fs::read_to_string(&path).unwrap();
    for (from, to, expected) in [
        ("\"version\": 1", "\"version\": 7", "has store version 7, this build reads version 1"),
        ("\"version\": 1", "\"revision\": 1", "expected a version, found none"),
        ("backtide-store", "frontside-store", "expected magic \"backtide-store\", found \"frontside-store\""),
        ("\"checksum\": \"", "\"checksum\": \"x", "checksum expected"),
        ("{", "", "is damaged"),
    ] {
        assert!(good.contains(from), "{good}");
        fs::write(&path, good.replacen(from, to, 1)).unwrap();
        let why = place.refusal(place.config()).await;
        assert!(why.contains(expected), "{why}");
    }
    fs::write(&path, good).unwrap();
    place.start().await.shutdown().await;
}

#[tokio::test]
async fn a_directory_with_other_things_does_not_become_a_store() {
    let place = Place::new();
    fs::create_dir_all(place.store()).unwrap();
    fs::write(place.store().join("holiday.jpg"), "").unwrap();
    let why = place.refusal(place.config()).await;
    assert!(why.contains("found \"holiday.jpg\""), "{why}");
    assert!(!place.store().join("store.json").exists());
}

#[tokio::test]
async fn a_damaged_disk_is_told_and_the_others_are_served() {
    let place = Place::new();
    let receiver = place.start().await;
    for (number, name) in [(1, "vm1"), (2, "vm2")] {
        let (mut agent, _) = Agent::welcomed(&receiver, hello(number, name)).await;
        agent.first_pass(5).await;
        // In turns: later entries are what proves that earlier ones were acknowledged.
        for turn in 0..10 {
            for lsn in 6 + turn * 100..106 + turn * 100 {
                agent.send(&write(lsn, 0, vec![lsn as u8; 4096])).await;
            }
            agent.all_durable().await;
        }
    }
    receiver.shutdown().await;
    // A segment in the middle of vm1's log is gone.
    let segments = place.store().join("disks").join(hello(1, "vm1").disk.to_string()).join("segments");
    fs::remove_file(segments.join("0000000000000002.seg")).unwrap();

    let receiver = place.start().await;
    let api = client(&receiver);
    let sick = hello(1, "vm1").disk.to_string().parse().unwrap();
    let disks = api.disks(Some(&sick)).await.unwrap().disks;
    let error = disks[0].error.clone().unwrap();
    assert!(error.contains("0000000000000002.seg"), "{error}");
    assert_eq!(disks[0].name.as_str(), "vm1", "it keeps its name");
    let (_agent, welcome) = Agent::welcomed(&receiver, hello(2, "vm2")).await;
    assert_eq!(welcome.durable, Lsn(1005));
    receiver.shutdown().await;
}

#[tokio::test]
async fn a_store_that_is_moved_away_is_noticed_and_comes_back() {
    let place = Place::new();
    let receiver = place.start().await;
    let api = client(&receiver);
    let (mut agent, first) = Agent::welcomed(&receiver, hello(1, "vm1")).await;
    agent.first_pass(5).await;
    agent.all_durable().await;
    assert_eq!(api.status().await.unwrap().alarms, Vec::<String>::new());
    fs::rename(place.store(), place.path("elsewhere")).unwrap();
    agent.send(&write(6, 0, vec![6; 4096])).await;
    let closed = agent.closed().await;
    assert_eq!(closed.code, CloseCode::Store);
    assert!(closed.message.contains("was moved, removed or replaced"), "{closed:?}");
    for number in [1, 2] {
        let refused = Agent::refused(&receiver, hello(number, &format!("vm{number}"))).await;
        assert_eq!(refused.code, CloseCode::Store, "{refused:?}");
        assert!(refused.message.contains("put it back"), "{refused:?}");
    }
    assert!(!place.store().exists(), "nothing is made in its place");
    fs::create_dir(place.store()).unwrap();
    let refused = Agent::refused(&receiver, hello(2, "vm2")).await;
    assert!(refused.message.contains("was moved, removed or replaced"), "{refused:?}");
    let alarms = api.status().await.unwrap().alarms;
    assert!(alarms[0].contains("was moved, removed or replaced"), "{alarms:?}");

    fs::remove_dir(place.store()).unwrap();
    fs::rename(place.path("elsewhere"), place.store()).unwrap();
    let again = Hello { history: Some(first.history), ..hello(1, "vm1") };
    let (mut agent, welcome) = Agent::welcomed(&receiver, again).await;
    assert!(welcome.durable >= Lsn(5), "{welcome:?}");
    agent.send(&write(welcome.durable.0 + 1, 0, vec![7; 4096])).await;
    agent.all_durable().await;
    assert_eq!(api.status().await.unwrap().alarms, Vec::<String>::new());
    receiver.shutdown().await;
}

#[tokio::test]
async fn a_segment_removed_under_the_receiver_is_an_error_and_no_acknowledgement() {
    let place = Place::new();
    let receiver = place.start().await;
    let (mut agent, _) = Agent::welcomed(&receiver, hello(1, "vm1")).await;
    agent.first_pass(5).await;
    agent.all_durable().await;
    let segments = place.store().join("disks").join(hello(1, "vm1").disk.to_string()).join("segments");
    fs::remove_file(segments.join("0000000000000001.seg")).unwrap();
    agent.send(&write(6, 0, vec![6; 4096])).await;
    let closed = agent.closed().await;
    assert_eq!(closed.code, CloseCode::Store);
    assert!(closed.message.contains("was removed while it was in use"), "{closed:?}");
    receiver.shutdown().await;
}

#[tokio::test]
async fn a_log_that_lost_its_acknowledged_end_says_so_before_the_agent_comes() {
    let place = Place::new();
    let receiver = place.start().await;
    let (mut agent, first) = Agent::welcomed(&receiver, hello(1, "vm1")).await;
    agent.first_pass(5).await;
    for lsn in 6..=20 {
        agent.send(&write(lsn, 0, vec![lsn as u8; 4096])).await;
    }
    agent.all_durable().await;
    receiver.shutdown().await;
    let disk = place.store().join("disks").join(hello(1, "vm1").disk.to_string());
    let segment = disk.join("segments").join("0000000000000001.seg");
    // The header, attach and pass, and about half of the records.
    fs::OpenOptions::new().write(true).open(&segment).unwrap().set_len(40_000).unwrap();

    let receiver = place.start().await;
    let api = client(&receiver);
    let vm1 = "vm1".parse().unwrap();
    let points = api.points(&vm1).await.unwrap();
    let damage = points.damage.expect("it is said");
    assert!(damage.contains("the end of the log") && damage.contains("(lsn:20) were durable"), "{damage}");
    let hole = points.holes.last().unwrap();
    assert!(hole.open && hole.reason_code == "damaged", "{hole:?}");
    let left = points.last.unwrap().lsn;
    assert!(Lsn(6) <= left && left < Lsn(20), "{left}");
    assert!(api.status().await.unwrap().alarms[0].contains("the end of the log"));
    // The agent hears where the log really ends.
    let again = Hello { history: Some(first.history), ..hello(1, "vm1") };
    let (mut agent, welcome) = Agent::welcomed(&receiver, again).await;
    assert_eq!(welcome.durable, left);
    agent.send(&write(left.0 + 1, 0, vec![9; 4096])).await;
    agent.all_durable().await;
    let points = api.points(&vm1).await.unwrap();
    assert_eq!((points.damage, points.holes.len()), (None, 0), "what follows exactly has lost nothing");
    receiver.shutdown().await;
}
