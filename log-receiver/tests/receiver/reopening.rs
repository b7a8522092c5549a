//! A log that failed is opened again for the next hello, and whoever waits for that waits alone.

use std::{sync::Arc, time::Duration};

use backtide_log_receiver::Receiver;
use backtide_protocol::{CloseCode, Hello, Message, ReceiverState};
use backtide_units::{Epoch, Lsn};

use crate::{
    agent::*,
    faults::{Fault, Faulty},
    fixture::*,
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
