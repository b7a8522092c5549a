//! Locked points of a running receiver: whoever asks, and however full the store is, they stay.

use std::sync::{
    Arc,
    atomic::{AtomicBool, Ordering},
};

use backtide_log_receiver::{OnFull, Receiver};
use backtide_receiver_api::{ErrorCode, KeepRequest, LockRequest};
use backtide_storage::{MemoryStorage, Storage};
use backtide_units::{ByteCount, Lsn};

use crate::{
    agent::*,
    faults::{Fault, Faulty},
    fixture::*,
    forget::left,
    retention::{config, content, ladder, place_in_a_corner, rounds, vm1, write_history},
};

fn lock(at: Option<&str>, until: &str) -> LockRequest {
    LockRequest { name: vm1(), at: at.map(str::to_owned), until: until.to_owned() }
}

#[tokio::test]
async fn a_locked_point_stays_and_its_lock_never_becomes_shorter() {
    let place = Place::new();
    let receiver = place.start().await;
    let agent = write_history(&receiver, 6..=95).await;
    let api = client(&receiver);
    let report = api.lock(&lock(Some("lsn:44"), "30d")).await.unwrap();
    let locked = report.disks[0].locks[0];
    assert_eq!(locked.point.unwrap().lsn, Lsn(44));
    assert!(locked.ends >= locked.until);
    for (until, code) in
        [("29d", ErrorCode::Refused), ("2020-01-01T00:00:00Z", ErrorCode::Usage), ("soon", ErrorCode::Usage)]
    {
        assert_eq!(api.lock(&lock(Some("lsn:44"), until)).await.unwrap_err().code, code, "{until}");
    }
    // A point that somebody keeps and releases is locked all the same.
    for release in [false, true] {
        api.keep(&KeepRequest { name: vm1(), at: "lsn:44".to_owned(), release, held: None }).await.unwrap();
    }
    let left = rounds(&api, &vm1(), "any=1h").await;
    let single: Vec<Lsn> = left.disks[0].single_points.iter().map(|point| point.lsn).collect();
    assert_eq!(single, [Lsn(44)]);
    let longer = api.lock(&lock(Some("lsn:44"), "2099-01-01T00:00:00Z")).await.unwrap();
    assert!(longer.disks[0].locks[0].until > locked.until);
    let gone = api.lock(&lock(Some("lsn:45"), "1d")).await.unwrap_err();
    assert_eq!(gone.code, ErrorCode::PointInHole);
    drop(agent);
    receiver.shutdown().await;
    let receiver = place.start().await;
    let api = client(&receiver);
    assert_eq!(api.points(&vm1()).await.unwrap().locks[0].until, longer.disks[0].locks[0].until);
    rounds(&api, &vm1(), "any=2h").await;
    assert_eq!(api.points(&vm1()).await.unwrap().first.unwrap().lsn, Lsn(44));
    receiver.shutdown().await;
}

#[tokio::test]
async fn a_disk_that_is_locked_as_a_whole_takes_no_ladder_by_which_points_would_go() {
    let place = Place::new();
    let receiver = place.start().await;
    let _agent = write_history(&receiver, 6..=95).await;
    let api = client(&receiver);
    assert!(api.preview_retention(&vm1(), &ladder("any=1h")).await.unwrap().changes);
    api.lock(&lock(None, "1d")).await.unwrap();
    let preview = api.preview_retention(&vm1(), &ladder("any=1h")).await.unwrap();
    assert!(!preview.changes && preview.locked_until.is_some(), "{preview:?}");
    let refused = api.set_retention(&vm1(), &ladder("any=1h")).await.unwrap_err();
    assert_eq!(refused.code, ErrorCode::Refused);
    assert!(refused.message.contains("every point of it is locked until"), "{refused:?}");
    let report = rounds(&api, &vm1(), "any=999y").await;
    assert_eq!(report.disks[0].oldest.unwrap().lsn, Lsn(5));
    receiver.shutdown().await;
}

#[tokio::test]
async fn a_full_store_shrinks_no_history_that_is_locked() {
    let place = Place::new();
    let storage = MemoryStorage::new();
    let config = config(&place, OnFull::Shrink);
    let receiver = Receiver::start_on_storage(Arc::new(storage.clone()), config).await.unwrap();
    let (mut agent, _) = Agent::welcomed(&receiver, hello(1, "vm1")).await;
    agent.first_pass(5).await;
    for lsn in 6..=200 {
        agent.send(&write(lsn, place_in_a_corner(lsn), content(lsn))).await;
    }
    agent.all_durable().await;
    let api = client(&receiver);
    api.lock(&lock(None, "1d")).await.unwrap();
    storage.set_capacity(Some(ByteCount(storage.used().0 + (3 << 20))));
    let free = storage.free_space().unwrap();
    let full = loop {
        let report = api.retention(None).await.unwrap();
        if report.low.as_ref().is_some_and(|low| low.contains("1 disk is locked")) {
            break report;
        }
    };
    let later = loop {
        let report = api.retention(None).await.unwrap();
        if report.rounds > full.rounds + 3 {
            break report;
        }
    };
    assert_eq!((later.disks[0].shrunk, later.disks[0].oldest.unwrap().lsn), (0, Lsn(5)));
    assert!(storage.free_space().unwrap() <= free);
    drop(agent);
    receiver.shutdown().await;
}

/// Tries until the disk was being forgotten when the point was looked for once more, which it never is in the end.
#[tokio::test(flavor = "multi_thread")]
async fn a_lock_and_a_kept_point_that_are_said_to_have_failed_are_not_there() {
    /// What is promised, one after the other.
    enum Promise {
        Lock,
        LockOfAll,
        Kept,
    }
    let mut promises = vec![Promise::Kept, Promise::LockOfAll, Promise::Lock];
    while let Some(promise) = promises.last() {
        let place = Place::new();
        let storage = Faulty::new();
        let receiver = place.start_on(storage.clone()).await;
        let api = client(&receiver);
        left(write_history(&receiver, 6..=10).await, &api, &vm1()).await;
        storage.set(Fault::SyncsWait);
        let asked = tokio::spawn({
            let api = client(&receiver);
            let locks = match promise {
                Promise::Lock => Some(lock(Some("lsn:8"), "1d")),
                Promise::LockOfAll => Some(lock(None, "1d")),
                Promise::Kept => None,
            };
            async move {
                let Some(lock) = locks else {
                    let (name, at) = (vm1(), "lsn:8".to_owned());
                    return api.keep(&KeepRequest { name, at, release: false, held: None }).await;
                };
                api.lock(&lock).await
            }
        });
        // That of `retention.json`.
        storage.a_sync_waits().await;
        let stop = Arc::new(AtomicBool::new(false));
        let forgetting = tokio::spawn({
            let (api, stop) = (client(&receiver), Arc::clone(&stop));
            async move {
                while !stop.load(Ordering::Relaxed) {
                    api.forget(&vm1()).await.unwrap_err();
                }
            }
        });
        storage.set(Fault::TombstonesUnwritable);
        let ended = asked.await.unwrap();
        stop.store(true, Ordering::Relaxed);
        forgetting.await.unwrap();
        if let Err(failed) = ended {
            assert_eq!((failed.code, failed.hint.as_deref()), (ErrorCode::Busy, None), "{failed:?}");
            let policy = &api.retention(Some(&vm1())).await.unwrap().disks[0];
            assert_eq!((policy.locks.len(), policy.keep.len()), (0, 0), "{policy:?}");
            promises.pop();
        }
        receiver.shutdown().await;
    }
}
