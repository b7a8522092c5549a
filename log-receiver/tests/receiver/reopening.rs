//! A log that failed is opened again for the next hello, and whoever waits for that waits alone.

use std::{sync::Arc, time::Duration};

use backtide_log_receiver::{Config, Receiver, Retention};
use backtide_protocol::{CloseCode, Hello, Message, ReceiverState};
use backtide_receiver_api::{PointsReport, ReceiverClient};
use backtide_units::{ByteCount, ByteOffset, ByteRange, Epoch, Lsn, Reason};

use crate::{
    agent::*,
    faults::{Fault, Faulty},
    fixture::*,
    going_back::{assert_content, request},
    retention::{rounds, vm1},
};

/// What does not end in this time never does.
const NEVER: Duration = Duration::from_secs(300);

#[tokio::test(flavor = "multi_thread")]
async fn a_log_that_is_opened_again_on_a_slow_device_holds_up_no_other_disk() {
    let (place, storage) = (Place::new(), Faulty::new());
    let mut config = place.config();
    config.limits.ingest_threads = 1;
    let receiver = Receiver::start_on_storage(Arc::new(storage.clone()), config).await.unwrap();
    let api = client(&receiver);
    let (mut one, first) = Agent::welcomed(&receiver, hello(1, "vm1")).await;
    let (mut two, _) = Agent::welcomed(&receiver, hello(2, "vm2")).await;
    for agent in [&mut one, &mut two] {
        agent.first_pass(5).await;
        agent.all_durable().await;
    }
    storage.set(Fault::WritesFail);
    one.send(&write(6, 0, vec![6; 4096])).await;
    assert_eq!(one.closed().await.code, CloseCode::Store);

    storage.set(Fault::OpensWait);
    let again = Hello { history: Some(first.history), ..hello(1, "vm1") };
    let mut coming = Box::pin(Agent::welcomed(&receiver, again));
    let others = async {
        storage.a_sync_waits().await;
        two.send(&write(6, 0, vec![6; 4096])).await;
        two.all_durable().await;
        let disks = api.disks(None).await.unwrap().disks;
        assert_eq!(disks.iter().map(|disk| disk.durable).collect::<Vec<_>>(), [Lsn(0), Lsn(6)], "{disks:?}");
        // A hello that may not have the disk is refused at once.
        let other = Hello { epoch: Epoch(0), ..hello(1, "vm1") };
        assert_eq!(Agent::refused(&receiver, other).await.code, CloseCode::Fenced);
    };
    tokio::select! {
        biased;
        _ = &mut coming => panic!("welcomed before the log was open"),
        done = tokio::time::timeout(NEVER, others) => done.expect("others are served"),
    }
    storage.set(Fault::None);
    let (mut one, welcome) = coming.await;
    assert_eq!((welcome.state, welcome.durable), (ReceiverState::Known, Lsn(5)));
    one.send(&write(6, 0, vec![6; 4096])).await;
    one.all_durable().await;
    receiver.shutdown().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn who_waits_for_a_log_that_is_opened_again_fills_no_memory() {
    let (place, storage) = (Place::new(), Faulty::new());
    let receiver = place.start_on(storage.clone()).await;
    let (mut one, first) = Agent::welcomed(&receiver, hello(1, "vm1")).await;
    let (mut two, _) = Agent::welcomed(&receiver, hello(2, "vm2")).await;
    for agent in [&mut one, &mut two] {
        agent.first_pass(5).await;
        agent.all_durable().await;
    }
    storage.set(Fault::WritesFail);
    one.send(&write(6, 0, vec![6; 4096])).await;
    assert_eq!(one.closed().await.code, CloseCode::Store);
    storage.set(Fault::OpensWait);
    let mut flood = Agent::connect(&receiver).await;
    let hello = Hello { history: Some(first.history), ..hello(1, "vm1") };
    flood.send(&Message::Hello(hello)).await;
    storage.a_sync_waits().await;
    let bytes = vec![0; 16 << 20];
    let others = async {
        // As many turns as the flood would need, if it were taken.
        for lsn in 6..106 {
            two.send(&write(lsn, 0, vec![6; 4096])).await;
            two.all_durable().await;
        }
    };
    tokio::select! {
        biased;
        () = flood.send_raw(&bytes) => panic!("all of it was taken"),
        () = others => {}
    }
    drop(flood);
    storage.set(Fault::None);
    receiver.shutdown().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn what_is_left_of_a_log_is_read_while_other_disks_go_on() {
    let (place, storage) = (Place::new(), Faulty::new());
    let mut config = place.config();
    config.limits.ingest_threads = 1;
    let receiver = Receiver::start_on_storage(Arc::new(storage.clone()), config).await.unwrap();
    let api = client(&receiver);
    let (mut one, _) = Agent::welcomed(&receiver, hello(1, "vm1")).await;
    let (mut two, _) = Agent::welcomed(&receiver, hello(2, "vm2")).await;
    for agent in [&mut one, &mut two] {
        agent.first_pass(5).await;
        agent.all_durable().await;
    }
    storage.set(Fault::WritesFail);
    one.send(&write(6, 0, vec![6; 4096])).await;
    assert_eq!(one.closed().await.code, CloseCode::Store);
    storage.set(Fault::OpensWait);
    let name = "vm1".parse().unwrap();
    let mut asked = Box::pin(api.points(&name));
    let others = async {
        storage.a_sync_waits().await;
        for lsn in 6..20 {
            two.send(&write(lsn, 0, vec![6; 4096])).await;
            two.all_durable().await;
        }
    };
    tokio::select! {
        biased;
        found = &mut asked => panic!("answered before the log could be read: {found:?}"),
        done = tokio::time::timeout(NEVER, others) => done.expect("others are served"),
    }
    storage.set(Fault::None);
    assert_eq!(asked.await.unwrap().last.map(|last| last.lsn), Some(Lsn(5)));
    receiver.shutdown().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn what_cannot_be_read_of_a_failed_log_is_not_tried_at_each_question_but_when_something_changed() {
    let (place, storage) = (Place::new(), Faulty::new());
    // The only rounds are those that are asked for.
    let retention = Retention { interval_ms: 1 << 40, ..Retention::default() };
    let config = Config { retention, ..place.config() };
    let receiver = Receiver::start_on_storage(Arc::new(storage.clone()), config).await.unwrap();
    let api = client(&receiver);
    let (mut one, first) = Agent::welcomed(&receiver, hello(1, "vm1")).await;
    one.first_pass(5).await;
    one.all_durable().await;
    storage.set(Fault::WritesFail);
    one.send(&write(6, 0, vec![6; 4096])).await;
    assert_eq!(one.closed().await.code, CloseCode::Store);
    storage.set(Fault::SegmentsUnlistable);
    let questions = async || {
        let before = storage.unlisted();
        for _ in 0..10 {
            let why = api.points(&vm1()).await.unwrap_err().to_string();
            assert!(why.contains("injected failure of a write"), "{why}");
        }
        storage.unlisted() - before
    };
    let once = questions().await;
    assert!((1..10).contains(&once), "{once}");
    assert_eq!(questions().await, 0, "nothing has changed");
    // A hello that has tried to open the log in vain has it tried again, once.
    let again = Hello { history: Some(first.history), ..hello(1, "vm1") };
    assert_eq!(Agent::refused(&receiver, again).await.code, CloseCode::Store);
    let tried = storage.unlisted();
    let why = api.points(&vm1()).await.unwrap_err().to_string();
    assert!(why.contains("injected failure of a listing") && storage.unlisted() > tried, "{why}");
    let before = storage.unlisted();
    assert!(api.points(&vm1()).await.is_err());
    assert_eq!(storage.unlisted(), before);
    // What can be read is, soon after, though no agent comes.
    storage.set(Fault::None);
    let points = loop {
        rounds(&api, &vm1(), "any=1000y").await;
        if let Ok(points) = api.points(&vm1()).await {
            break points;
        }
    };
    assert_eq!(points.last.map(|last| last.lsn), Some(Lsn(5)));
    receiver.shutdown().await;
}

/// The points of vm1 when they are as they are to be.
async fn points_once(api: &ReceiverClient, so: impl Fn(&PointsReport) -> bool) -> PointsReport {
    loop {
        let points = api.points(&vm1()).await.unwrap();
        if so(&points) {
            return points;
        }
        tokio::task::yield_now().await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn what_the_device_could_not_read_at_the_start_is_there_when_it_can_be_read() {
    let (place, storage) = (Place::new(), Faulty::new());
    let receiver = place.start_on(storage.clone()).await;
    let (mut agent, first) = Agent::welcomed(&receiver, hello(1, "vm1")).await;
    agent.first_pass(5).await;
    for lsn in 6..=600 {
        agent.send(&write(lsn, 0, vec![lsn as u8; 4096])).await;
        if lsn % 100 == 0 {
            agent.all_durable().await;
        }
    }
    drop(agent);
    receiver.shutdown().await;
    let files = storage.memory.files();
    let segments: Vec<_> =
        files.iter().filter(|(path, _)| path.extension().is_some_and(|end| end == "seg")).collect();
    let [_, (second, bytes), _, ..] = &segments[..] else { panic!("three segments") };
    let all = ByteRange::new(ByteOffset(0), ByteCount(bytes.len() as u64)).unwrap();

    storage.memory.make_unreadable(second, all);
    // Rounds come one after another.
    let retention = Retention { interval_ms: 1, ..Retention::default() };
    let config = Config { retention, ..place.config() };
    let receiver = Receiver::start_on_storage(Arc::new(storage.clone()), config).await.unwrap();
    let api = client(&receiver);
    for _ in 0..2 {
        let points = api.points(&vm1()).await.unwrap();
        let last = points.last.expect("what stands before it").lsn;
        assert!(last > Lsn(5) && last < Lsn(600), "{points:?}");
        assert!(points.damage.is_some_and(|why| why.contains("0000000000000002.seg")), "it is told");
        let told =
            |warning: Option<String>| warning.is_some_and(|why| why.contains("newest point that is left"));
        let latest = api.resolve(&vm1(), "latest").await.unwrap();
        assert!(
            latest.lsn == last && told(latest.warning),
            "what newer points there were is not given in silence"
        );
        assert_eq!(api.resolve(&vm1(), &format!("lsn:{last}")).await.unwrap().warning, None);
        let mount = api.mount(&request("latest", None)).await.unwrap();
        assert!(mount.lsn == last && told(mount.warning), "nor to who mounts it");
        api.unmount(&mount.id, None).await.unwrap();
    }
    storage.memory.make_unreadable(second, ByteRange::default());
    let points = points_once(&api, |points| points.damage.is_none()).await;
    assert_eq!(points.last.map(|last| last.lsn), Some(Lsn(600)), "{points:?}");
    assert!(points.holes.iter().all(|hole| !hole.open), "{points:?}");
    let disk = api.disks(Some(&vm1())).await.unwrap().disks.remove(0);
    assert!(disk.error.is_none() && disk.damage.is_empty(), "{disk:?}");
    let mount = api.mount(&request("latest", None)).await.unwrap();
    assert_eq!(mount.warning, None);
    let mut content = vec![0; DISK_BYTES as usize];
    content[..4096].fill(600u64 as u8);
    assert_content(&place, &mount, &content).await;
    let again = Hello { history: Some(first.history), ..hello(1, "vm1") };
    let (_agent, welcome) = Agent::welcomed(&receiver, again).await;
    assert_eq!((welcome.state, welcome.durable), (ReceiverState::Known, Lsn(600)));
    receiver.shutdown().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn who_asks_for_the_newest_point_is_warned_of_damage_alone() {
    let place = Place::new();
    let receiver = place.start().await;
    let (mut agent, _) = Agent::welcomed(&receiver, hello(1, "vm1")).await;
    agent.first_pass(5).await;
    // A hole that is open for as long as a pass takes.
    agent.send(&pass_begin(60, 5, Reason::ReceiverRolledBack)).await;
    agent.all_durable().await;
    let api = client(&receiver);
    let points = points_once(&api, |points| points.holes.last().is_some_and(|hole| hole.open)).await;
    assert_eq!(points.last.map(|last| last.lsn), Some(Lsn(5)));
    assert_eq!(api.resolve(&vm1(), "latest").await.unwrap().warning, None);
    receiver.shutdown().await;
}
