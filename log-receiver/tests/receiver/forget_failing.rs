//! Disks that are forgotten while something goes wrong: the caller leaves, a sync fails, one is still under way.

use std::path::Path;

use backtide_protocol::{CloseCode, FailureCode, ReceiverState};
use backtide_receiver_api::{ErrorCode, ReceiverClient};
use backtide_storage::MemoryStorage;
use backtide_units::{DiskName, Lsn};

use crate::{
    agent::*,
    faults::{Fault, Faulty},
    fixture::*,
    forget::{higher, left, two_disks},
    point_reader::{PointReader, open},
    retention::{vm1, write_history},
};

/// The name of vm1 when nobody knows it by its own any more.
fn uuid() -> DiskName {
    hello(1, "vm1").disk.to_string().parse().unwrap()
}

/// So many round trips that the receiver has seen whatever came before.
async fn a_while(api: &ReceiverClient) {
    for _ in 0..20 {
        api.mounts().await.unwrap();
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_disk_is_forgotten_though_its_caller_has_gone() {
    let place = Place::new();
    let storage = Faulty::new();
    let receiver = place.start_on(storage.clone()).await;
    let api = client(&receiver);
    left(write_history(&receiver, 6..=40).await, &api, &vm1()).await;
    storage.set(Fault::SyncsWait);
    let caller = tokio::spawn({
        let api = client(&receiver);
        async move { api.forget(&vm1()).await }
    });
    // The tombstone's.
    storage.a_sync_waits().await;
    caller.abort();
    assert!(caller.await.is_err_and(|gone| gone.is_cancelled()));
    a_while(&api).await;
    storage.set(Fault::None);
    while let Err(error) = api.points(&uuid()).await
        && error.code != ErrorCode::NotFound
    {
        assert_eq!(error.code, ErrorCode::Busy, "{error:?}");
    }
    assert!(api.disks(None).await.unwrap().disks.is_empty());
    let (_, welcome) = Agent::welcomed(&receiver, higher("vm1")).await;
    assert_eq!(welcome.state, ReceiverState::New);
    receiver.shutdown().await;
}

/// Every sync that can fail, one after the other.
#[tokio::test(flavor = "multi_thread")]
async fn what_is_told_to_have_failed_deletes_nothing_later_or_can_be_asked_for_again() {
    let place = Place::new();
    let storage = MemoryStorage::new();
    let receiver = place.start_on(storage.clone()).await;
    two_disks(&receiver).await;
    receiver.shutdown().await;
    let (mut stayed, mut went) = (0, 0);
    for sync in 0.. {
        let storage = storage.copy();
        let receiver = place.start_on(storage.clone()).await;
        let api = client(&receiver);
        storage.fail_sync_after(sync);
        if let Ok(done) = api.forget(&vm1()).await {
            assert_eq!(done.name, vm1());
            receiver.shutdown().await;
            break;
        }
        match api.points(&uuid()).await {
            Ok(_) => {
                stayed += 1;
                let (mut agent, _) = Agent::welcomed(&receiver, hello(1, "vm1")).await;
                agent.send(&write(41, 0, vec![4; 4096])).await;
                agent.all_durable().await;
                left(agent, &api, &vm1()).await;
            }
            Err(error) => {
                assert_eq!(error.code, ErrorCode::Busy, "{error:?}");
                went += 1;
                let told = Agent::refused(&receiver, higher("vm1")).await;
                assert!(
                    told.code == CloseCode::Busy && told.message.contains("is being forgotten"),
                    "{told:?}"
                );
                let done = api.forget(&uuid()).await.unwrap();
                assert_eq!(done.name, vm1());
                assert_eq!(api.forget(&uuid()).await.unwrap_err().code, ErrorCode::NotFound);
                assert!(api.status().await.unwrap().alarms.is_empty());
            }
        }
        let is_there = api.points(&uuid()).await.is_ok();
        receiver.shutdown().await;
        // The process ends, or the power.
        for crashed in [false, true] {
            let storage = storage.copy();
            if crashed {
                storage.crash(sync);
            }
            let receiver = place.start_on(storage).await;
            if is_there {
                let points = client(&receiver).points(&vm1()).await.unwrap();
                assert_eq!(points.last.unwrap().lsn, Lsn(41), "sync {sync}, crashed: {crashed}");
            } else {
                let (_, welcome) = Agent::welcomed(&receiver, higher("vm1")).await;
                assert_eq!(welcome.state, ReceiverState::New);
            }
            receiver.shutdown().await;
        }
    }
    assert!(stayed > 1 && went > 1, "{stayed} stayed, {went} went");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_tombstone_that_cannot_be_taken_back_keeps_its_disk_from_every_agent() {
    let place = Place::new();
    let storage = Faulty::new();
    let receiver = place.start_on(storage.clone()).await;
    let api = client(&receiver);
    left(write_history(&receiver, 6..=40).await, &api, &vm1()).await;
    storage.set(Fault::TombstonesFail);
    let failed = api.forget(&vm1()).await.unwrap_err();
    assert_eq!(failed.code, ErrorCode::Failed, "{failed:?}");
    assert!(failed.hint.unwrap().contains("no agent gets it"), "{}", failed.message);
    assert_eq!(Agent::refused(&receiver, hello(1, "vm1")).await.code, CloseCode::Busy);
    assert_eq!(api.status().await.unwrap().alarms.len(), 1);
    storage.set(Fault::None);
    let done = api.forget(&vm1()).await.unwrap();
    assert!(done.log_bytes.0 > 0, "{done:?}");
    assert!(api.status().await.unwrap().alarms.is_empty());
    assert_eq!(api.points(&vm1()).await.unwrap_err().code, ErrorCode::NotFound);
    receiver.shutdown().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_disk_that_is_being_synced_is_forgotten_when_that_has_ended() {
    let place = Place::new();
    let storage = Faulty::new();
    let receiver = place.start_on(storage.clone()).await;
    let api = client(&receiver);
    let mut agent = write_history(&receiver, 6..=40).await;
    storage.set(Fault::SyncsWait);
    agent.send(&write(41, 0, vec![4; 4096])).await;
    storage.a_sync_waits().await;
    left(agent, &api, &vm1()).await;
    let forget = tokio::spawn({
        let api = client(&receiver);
        async move { api.forget(&vm1()).await }
    });
    a_while(&api).await;
    let noted = storage.memory.files().iter().any(|(path, _)| path.starts_with(Path::new("forgotten")));
    assert!(!noted, "its outcome could reach the disk that is attached by that name later");
    storage.set(Fault::None);
    forget.await.unwrap().unwrap();
    let (_, welcome) = Agent::welcomed(&receiver, higher("vm1")).await;
    assert_eq!((welcome.state, welcome.durable), (ReceiverState::New, Lsn::ZERO));
    receiver.shutdown().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_hold_that_is_refused_holds_nothing() {
    let place = Place::new();
    let receiver = place.start().await;
    let api = client(&receiver);
    left(write_history(&receiver, 6..=40).await, &api, &vm1()).await;
    let mut reader = PointReader::open(&receiver, open("vm1", Some(20))).await;
    api.forget(&vm1()).await.unwrap();
    let owner = "mount m1 of an agent (x)".to_owned();
    let hold = |id| backtide_protocol::Reading::Hold { id, owner: owner.clone() };
    assert_eq!(reader.done(hold).await.unwrap_err().code, FailureCode::Failed);
    let (agent, _) = Agent::welcomed(&receiver, higher("vm1")).await;
    left(agent, &api, &vm1()).await;
    api.forget(&vm1()).await.unwrap();
    receiver.shutdown().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn what_ends_a_hold_is_named() {
    let place = Place::new();
    let receiver = place.start().await;
    let api = client(&receiver);
    left(write_history(&receiver, 6..=40).await, &api, &vm1()).await;
    let mut reader = PointReader::open(&receiver, open("vm1", Some(20))).await;
    for (owner, hint) in
        [("mount m1 of an agent (x)", "backtide unmount m1 --here"), ("a rewind", "backtide status")]
    {
        reader.done(|id| backtide_protocol::Reading::Hold { id, owner: owner.to_owned() }).await.unwrap();
        let refused = api.forget(&vm1()).await.unwrap_err();
        assert!(refused.hint.as_ref().unwrap().contains(hint), "{refused:?}");
        reader.done(|id| backtide_protocol::Reading::Release { id, owner: owner.to_owned() }).await.unwrap();
    }
    receiver.shutdown().await;
}
