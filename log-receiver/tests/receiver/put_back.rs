//! A store that has less than it had acknowledged, as one has that was put back to an older copy: that is told.

use backtide_log_receiver::Receiver;
use backtide_protocol::{Hello, Message};
use backtide_receiver_api::ReceiverClient;
use backtide_storage::{MemoryStorage, Storage};
use backtide_units::{ByteCount, CaptureTime, Epoch, Lsn, Reason};

use crate::{
    agent::*,
    faults::{Fault, Faulty},
    fixture::*,
    retention::{TENS, files, go_on, ladder, rounds, vm1, write_history},
};

async fn alarms(api: &ReceiverClient) -> Vec<String> {
    api.status().await.unwrap().alarms
}

fn begin(at: u64, gap_from: u64, time: CaptureTime, reason: Reason) -> Message {
    Message::PassBegin { at: Lsn(at), gap_from: Lsn(gap_from), time, reason }
}

/// The pass of an agent that misses what had been acknowledged, which gives a point at this time.
async fn pass(agent: &mut Agent, api: &ReceiverClient, at: u64, gap_from: u64, time: CaptureTime) {
    agent.send(&begin(at, gap_from, time, Reason::ReceiverRolledBack)).await;
    agent.all_durable().await;
    let open = alarms(api).await;
    assert_eq!(
        open.iter().filter(|why| why.contains("has not brought everything anew")).count(),
        1,
        "{open:?}"
    );
    end(agent, at, time).await;
}

async fn end(agent: &mut Agent, at: u64, time: CaptureTime) {
    agent.send(&Message::PassEnd { at: Lsn(at), valid_from: Some(Lsn(at)), time }).await;
    agent.all_durable().await;
}

/// A disk in sync that an agent has; its only point is LSN 5.
async fn in_sync(receiver: &Receiver) -> Agent {
    let (mut agent, _) = Agent::welcomed(receiver, hello(1, "vm1")).await;
    agent.first_pass(5).await;
    agent.all_durable().await;
    agent
}

/// The one alarm, which says what is gone.
fn gone_after(told: &[String], lsn: u64) {
    let [told] = told else { panic!("one alarm, not {told:?}") };
    let text = format!("points and marks after lsn:{lsn} (");
    assert!(told.starts_with("disk vm1: the store had less of it") && told.contains(&text), "{told}");
    assert!(told.contains("this is told until "), "{told}");
}

#[tokio::test]
async fn a_store_that_was_put_back_is_an_alarm_whatever_the_agents_clock_says_and_after_a_start() {
    let year_us = 365 * 24 * 60 * 60 * 1_000_000;
    let now = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH).unwrap().as_micros() as u64;
    for time in [now - year_us, now, now + year_us] {
        let place = Place::new();
        let receiver = place.start().await;
        let mut agent = in_sync(&receiver).await;
        let api = client(&receiver);
        assert_eq!(alarms(&api).await, Vec::<String>::new());
        pass(&mut agent, &api, 60, 5, CaptureTime(time)).await;
        let told = alarms(&api).await;
        gone_after(&told, 5);
        receiver.shutdown().await;
        let receiver = place.start().await;
        assert_eq!(alarms(&client(&receiver)).await, told);
        receiver.shutdown().await;
    }
}

#[tokio::test]
async fn it_is_told_also_where_only_marks_are_gone_and_where_a_hole_was_open_already() {
    let place = Place::new();
    let receiver = place.start().await;
    let mut agent = in_sync(&receiver).await;
    let api = client(&receiver);
    // No point is missing between these.
    pass(&mut agent, &api, 6, 5, CaptureTime(6)).await;
    assert!(api.points(&vm1()).await.unwrap().holes.is_empty());
    gone_after(&alarms(&api).await, 5);
    receiver.shutdown().await;

    let place = Place::new();
    let receiver = place.start().await;
    let mut agent = in_sync(&receiver).await;
    let api = client(&receiver);
    agent.send(&begin(20, 5, CaptureTime(20), Reason::ReceiverAway)).await;
    pass(&mut agent, &api, 60, 20, CaptureTime(60)).await;
    gone_after(&alarms(&api).await, 5);
    let hole = api.points(&vm1()).await.unwrap().holes.remove(0);
    assert_eq!((hole.reason_code.as_str(), hole.before_lsn), ("receiver-rolled-back", Some(Lsn(60))));
    receiver.shutdown().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_ladder_that_removes_the_hole_does_not_end_the_alarm() {
    let place = Place::new();
    let receiver = place.start().await;
    let mut agent = write_history(&receiver, 6..=95).await;
    let api = client(&receiver);
    pass(&mut agent, &api, 100, 95, time(100)).await;
    go_on(&mut agent, 101..=190).await;
    while !api.points(&vm1()).await.unwrap().holes.iter().all(|hole| hole.reason_code == "thinned") {
        rounds(&api, &vm1(), TENS).await;
    }
    gone_after(&alarms(&api).await, 95);
    receiver.shutdown().await;
}

#[tokio::test]
async fn it_is_told_of_a_disk_that_had_a_damaged_log_once() {
    let place = Place::new();
    let receiver = place.start().await;
    drop(in_sync(&receiver).await);
    receiver.shutdown().await;
    let segment = files(&place, "seg").pop().unwrap();
    let mut bytes = std::fs::read(&segment).unwrap();
    bytes[40] ^= 0x10;
    std::fs::write(&segment, bytes).unwrap();
    let receiver = place.start().await;
    let api = client(&receiver);
    let (mut agent, _) = Agent::welcomed(&receiver, Hello { epoch: Epoch(2), ..hello(1, "vm1") }).await;
    let only_damage = async || {
        let told = alarms(&api).await;
        assert!(told.iter().all(|why| why.contains("0000000000000001.seg")), "{told:?}");
    };
    // What went with that log is told as its damage.
    agent.send(&begin(60, 0, CaptureTime(60), Reason::ReceiverRolledBack)).await;
    agent.all_durable().await;
    only_damage().await;
    end(&mut agent, 60, CaptureTime(60)).await;
    only_damage().await;
    pass(&mut agent, &api, 70, 60, CaptureTime(70)).await;
    let mut told = alarms(&api).await;
    told.retain(|why| !why.contains("0000000000000001.seg"));
    gone_after(&told, 60);
    receiver.shutdown().await;
}

#[tokio::test]
async fn another_store_than_the_agent_had_is_not_said_to_have_been_put_back() {
    let place = Place::new();
    let receiver = place.start().await;
    let api = client(&receiver);
    let (mut agent, _) = Agent::welcomed(&receiver, hello(1, "vm1")).await;
    agent.send(&begin(60, 0, CaptureTime(60), Reason::ReceiverRolledBack)).await;
    agent.all_durable().await;
    let told = alarms(&api).await;
    assert!(
        told.len() == 1 && told[0].contains("this is another store than it had, or one that"),
        "{told:?}"
    );
    assert!(!told[0].contains("put back") && !told[0].contains("acknowledged"), "{told:?}");
    end(&mut agent, 60, CaptureTime(60)).await;
    assert_eq!(alarms(&api).await, Vec::<String>::new());
    receiver.shutdown().await;
}

#[tokio::test]
async fn while_its_log_is_out_of_use_nothing_that_its_agent_is_still_bringing_is_past() {
    let place = Place::new();
    let storage = Faulty::new();
    let receiver = place.start_on(storage.clone()).await;
    let (mut agent, first) = Agent::welcomed(&receiver, hello(1, "vm1")).await;
    agent.first_pass(5).await;
    let api = client(&receiver);
    agent.send(&begin(60, 5, CaptureTime(60), Reason::ReceiverRolledBack)).await;
    agent.all_durable().await;
    storage.set(Fault::WritesFail);
    agent.send(&pass_data(60, 0, vec![60; 4096])).await;
    agent.closed().await;
    let lacking = |told: Vec<String>| {
        let told: Vec<_> = told.into_iter().filter(|why| why.contains("the store had less of it")).collect();
        let [only] = &told[..] else { panic!("one alarm, not {told:?}") };
        only.clone()
    };
    let told = lacking(alarms(&api).await);
    assert!(told.contains("has not brought everything anew yet"), "{told}");
    let refused = api.dismiss(&vm1()).await.unwrap_err();
    assert!(refused.message.contains("nothing is told that is past"), "{refused}");

    storage.set(Fault::None);
    let again = Hello { history: Some(first.history), ..hello(1, "vm1") };
    let (mut agent, _) = Agent::welcomed(&receiver, again).await;
    assert_eq!(lacking(alarms(&api).await), told);
    end(&mut agent, 60, CaptureTime(60)).await;
    storage.set(Fault::WritesFail);
    agent.send(&write(61, 0, vec![61; 4096])).await;
    agent.closed().await;
    let told = lacking(alarms(&api).await);
    assert!(told.contains("has brought everything anew since"), "{told}");
    storage.set(Fault::None);
    assert_eq!(api.dismiss(&vm1()).await.unwrap().shortfalls.len(), 1);
    receiver.shutdown().await;
}

#[tokio::test]
async fn a_ladder_that_a_full_store_does_not_take_comes_with_what_to_do() {
    let place = Place::new();
    let storage = MemoryStorage::new();
    let memory = std::sync::Arc::new(storage.clone());
    let receiver = Receiver::start_on_storage(memory, place.config()).await.unwrap();
    let (mut agent, _) = Agent::welcomed(&receiver, hello(1, "vm1")).await;
    agent.first_pass(5).await;
    agent.all_durable().await;
    storage.set_capacity(Some(storage.used()));
    assert_eq!(storage.free_space().unwrap(), ByteCount(0));
    let refused =
        client(&receiver).set_retention(&"vm1".parse().unwrap(), &ladder("any=24h")).await.unwrap_err();
    assert!(refused.hint.as_ref().is_some_and(|hint| hint.contains("no room")), "{refused:?}");
    receiver.shutdown().await;
}
