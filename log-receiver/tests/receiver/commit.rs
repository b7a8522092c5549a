//! When the receiver makes durable what it has: at once for who waits, gathered for the others.
//!
//! A disk of which nobody asked anything shows that the interval has not ended: it would be durable too.

use std::sync::Arc;

use backtide_log_receiver::{Config, Receiver};
use backtide_protocol::{Message, Ping};
use backtide_storage::MemoryStorage;
use backtide_units::{ByteCount, Lsn, Reason};

use crate::{
    agent::{Agent, hello, pass_begin, pass_data, write},
    faults::{Fault, Faulty},
    fixture::Place,
};

/// One thread, so that the disks share their interval, which no test lives to see the end of.
fn patient(place: &Place) -> Config {
    let mut config = place.config();
    config.limits.ingest_threads = 1;
    config.limits.commit_interval_ms = 60_000;
    config
}

/// A disk that is in sync at LSN 5, all of it durable.
async fn synced(receiver: &Receiver, number: u128, name: &str) -> Agent {
    let (mut agent, _) = Agent::welcomed(receiver, hello(number, name)).await;
    agent.first_pass(5).await;
    agent.send(&Message::Hasten { durable: true }).await;
    agent.all_durable().await;
    agent
}

/// What is received and durable now.
async fn heard(agent: &mut Agent) -> (u64, u64) {
    agent.send(&Message::Hasten { durable: false }).await;
    loop {
        match agent.next().await {
            Some(Message::Ack { received, durable, .. }) if received == agent.sent => {
                return (received, durable);
            }
            Some(Message::Ack { .. } | Message::Ping(_)) => {}
            other => panic!("expected an acknowledgement, found {other:?}"),
        }
    }
}

#[tokio::test]
async fn who_asks_is_not_kept_waiting_and_the_others_gather() {
    let place = Place::new();
    let receiver = Receiver::start(patient(&place)).await.unwrap();
    let mut quiet = synced(&receiver, 1, "quiet").await;
    let mut asking = synced(&receiver, 2, "asking").await;
    quiet.send(&write(6, 0, vec![6; 4096])).await;
    let record = quiet.sent;
    let (received, durable) = heard(&mut quiet).await;
    assert!(received > record && durable < record, "received {received}, durable {durable}");
    for lsn in 6..16 {
        asking.send(&write(lsn, 0, vec![6; 4096])).await;
        asking.send(&Message::Hasten { durable: true }).await;
        asking.all_durable().await;
    }
    let (_, durable) = heard(&mut quiet).await;
    assert!(durable < record, "the interval has not ended: what was asked for did not wait for it");
    quiet.send(&Message::Hasten { durable: true }).await;
    quiet.all_durable().await;
    receiver.shutdown().await;
}

#[tokio::test]
async fn enough_of_it_is_not_gathered_any_longer() {
    let place = Place::new();
    let mut config = patient(&place);
    config.limits.commit_bytes = ByteCount(64 << 10);
    let receiver = Receiver::start(config).await.unwrap();
    let mut quiet = synced(&receiver, 1, "quiet").await;
    let mut busy = synced(&receiver, 2, "busy").await;
    quiet.send(&write(6, 0, vec![6; 4096])).await;
    let record = quiet.sent;
    heard(&mut quiet).await;
    for lsn in 6..22 {
        busy.send(&write(lsn, 0, vec![6; 4096])).await;
    }
    busy.all_durable().await;
    let (_, durable) = heard(&mut quiet).await;
    assert!(durable < record, "the interval has not ended: 64 KiB did not wait for it");
    receiver.shutdown().await;
}

/// Nobody waits for one block of a pass, and a pass has many.
#[tokio::test]
async fn more_of_a_pass_is_gathered_than_of_what_guests_write() {
    let place = Place::new();
    let mut config = patient(&place);
    config.limits.commit_bytes = ByteCount(64 << 10);
    let receiver = Receiver::start(config).await.unwrap();
    let mut agent = synced(&receiver, 1, "vm1").await;
    agent.send(&pass_begin(6, 5, Reason::Forced)).await;
    for number in 0..4 {
        agent.send(&pass_data(6, number << 16, vec![6; 64 << 10])).await;
    }
    let first = agent.sent - 3;
    let (_, durable) = heard(&mut agent).await;
    assert!(durable < first, "four times what guests may write does not end the interval");
    for number in 4..8 {
        agent.send(&pass_data(6, number << 16, vec![6; 64 << 10])).await;
    }
    agent.all_durable().await;
    receiver.shutdown().await;
}

#[tokio::test]
async fn the_end_of_the_interval_makes_everything_durable() {
    let place = Place::new();
    let mut config = patient(&place);
    config.limits.commit_interval_ms = 1;
    let receiver = Receiver::start(config).await.unwrap();
    let mut first = synced(&receiver, 1, "first").await;
    let mut second = synced(&receiver, 2, "second").await;
    for lsn in 6..16 {
        first.send(&write(lsn, 0, vec![6; 4096])).await;
        second.send(&write(lsn, 0, vec![6; 4096])).await;
        first.all_durable().await;
        second.all_durable().await;
    }
    receiver.shutdown().await;
}

/// An agent that hears nothing takes the receiver for hung.
#[tokio::test]
async fn a_ping_is_answered_while_the_receiver_gathers() {
    let place = Place::new();
    let receiver = Receiver::start(patient(&place)).await.unwrap();
    let mut agent = synced(&receiver, 1, "vm1").await;
    agent.send(&write(6, 0, vec![6; 4096])).await;
    let record = agent.sent;
    agent.send(&Message::Ping(Ping::default())).await;
    let durable = loop {
        match agent.next().await {
            Some(Message::Ack { received, durable, .. }) if received == agent.sent => break durable,
            Some(Message::Ack { .. } | Message::Ping(_)) => {}
            other => panic!("expected an acknowledgement, found {other:?}"),
        }
    };
    assert!(durable < record, "it did not wait for the sync");
    receiver.shutdown().await;
}

/// Whoever waits at the same moment shares a sync, and all of it is there after a power cut.
#[tokio::test]
async fn disks_that_wait_at_once_are_made_durable_together() {
    let place = Place::new();
    let storage = MemoryStorage::new();
    storage.share_syncs(true);
    let receiver = Receiver::start_on_storage(Arc::new(storage.clone()), patient(&place)).await.unwrap();
    let mut agents = Vec::new();
    for number in 1..=8u64 {
        let mut agent = synced(&receiver, number.into(), &format!("vm{number}")).await;
        agent.send(&write(6, 0, vec![6; 4096])).await;
        heard(&mut agent).await;
        agents.push(agent);
    }
    let before = storage.counts().syncs;
    // It has everything made durable that gathers, at one moment.
    receiver.shutdown().await;
    assert_eq!(storage.counts().syncs, before + 2, "one of all, and one flush");
    storage.crash(3);
    let receiver = Receiver::start_on_storage(Arc::new(storage), patient(&place)).await.unwrap();
    for number in 1..=8u64 {
        let (_, welcome) = Agent::welcomed(&receiver, hello(number.into(), &format!("vm{number}"))).await;
        assert_eq!(welcome.durable, Lsn(6), "disk {number}");
    }
    receiver.shutdown().await;
}

/// What is to be done beside one disk's sync is nobody else's trouble.
#[tokio::test]
async fn a_disk_whose_chores_panic_takes_no_other_disk_along() {
    let place = Place::new();
    let storage = Faulty::new();
    storage.memory.share_syncs(true);
    let receiver = Receiver::start_on_storage(Arc::new(storage.clone()), patient(&place)).await.unwrap();
    let mut agents = Vec::new();
    for number in 1..=8u64 {
        let mut agent = synced(&receiver, number.into(), &format!("vm{number}")).await;
        // The last one has used enough of its segment for more to be reserved.
        let bytes = if number == 8 { 48 << 10 } else { 4096 };
        agent.send(&write(6, 0, vec![6; bytes])).await;
        heard(&mut agent).await;
        agents.push(agent);
    }
    storage.set(Fault::ReservationsPanic);
    let before = storage.memory.counts().syncs;
    receiver.shutdown().await;
    assert_eq!(storage.memory.counts().syncs, before + 2, "the others were synced, together");
    storage.set(Fault::None);
    storage.memory.crash(3);
    let receiver = Receiver::start_on_storage(Arc::new(storage), patient(&place)).await.unwrap();
    for number in 1..8u64 {
        let (_, welcome) = Agent::welcomed(&receiver, hello(number.into(), &format!("vm{number}"))).await;
        assert_eq!(welcome.durable, Lsn(6), "disk {number}");
    }
    receiver.shutdown().await;
}
