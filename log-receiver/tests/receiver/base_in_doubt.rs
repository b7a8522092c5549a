//! A store that cannot say durably where a log begins: nobody is promised what the log may begin without.

use backtide_log_receiver::Receiver;
use backtide_protocol::{CloseCode, FailureCode, Reading, ReceiverState};
use backtide_receiver_api::{ErrorCode, KeepRequest, LockRequest, MountRequest, ReceiverClient};
use backtide_units::{ByteOffset, Lsn, Reason};

use crate::{
    agent::*,
    faults::{Fault, Faulty},
    fixture::*,
    going_back::{assert_content, request},
    point_reader::{PointReader, open},
    retention::{TENS, at, go_on, ladder, rounds, vm1, write_history},
};

fn keep(at: &str) -> KeepRequest {
    KeepRequest { name: vm1(), at: at.to_owned(), release: false, held: None }
}

/// A log in doubt that has a base from before. Gives its agent.
async fn in_doubt(receiver: &Receiver, storage: &Faulty) -> Agent {
    let mut agent = write_history(receiver, 6..=31).await;
    let api = client(receiver);
    rounds(&api, &vm1(), TENS).await;
    go_on(&mut agent, 32..=95).await;
    storage.set(Fault::BasesFail);
    rounds(&api, &vm1(), TENS).await;
    assert_refused(&api).await;
    agent
}

/// Has the log fail; its agent stays away.
async fn fail(mut agent: Agent, storage: &Faulty) {
    storage.set(Fault::WritesFail);
    agent.send(&write(96, 0, vec![96; 4096])).await;
    assert_eq!(agent.closed().await.code, CloseCode::Store);
}

/// Fails the log so that a new one begins; gives its agent, with a point at 200.
async fn begin_anew(receiver: &Receiver, storage: &Faulty, agent: Agent) -> Agent {
    let files = storage.memory.files();
    let segment = files.iter().rev().find(|(path, _)| path.extension().is_some_and(|end| end == "seg"));
    fail(agent, storage).await;
    storage.memory.flip_bit(&segment.unwrap().0, ByteOffset(40), 4);
    storage.set(Fault::None);
    let (mut agent, welcome) = Agent::welcomed(receiver, hello(1, "vm1")).await;
    assert_eq!(welcome.state, ReceiverState::New);
    agent.send(&pass_begin(200, 0, Reason::ReceiverRolledBack)).await;
    agent.send(&pass_end(200)).await;
    agent.all_durable().await;
    agent
}

/// Asks for all that would keep a point, or history, that was not to stay.
async fn assert_refused(api: &ReceiverClient) {
    let lock =
        |at: Option<&str>| LockRequest { name: vm1(), at: at.map(str::to_owned), until: "30d".to_owned() };
    let writable = MountRequest { writable: true, ..request("lsn:33", None) };
    let errors = [
        api.keep(&keep("lsn:33")).await.unwrap_err(),
        api.lock(&lock(Some("lsn:33"))).await.unwrap_err(),
        api.lock(&lock(None)).await.unwrap_err(),
        api.mount(&writable).await.unwrap_err(),
    ];
    for error in errors {
        assert_eq!(error.code, ErrorCode::Refused, "{error}");
        assert!(error.message.contains("cannot be promised"), "{error}");
    }
}

/// The store can be written again: what was promised holds, also over a power cut, and nothing else.
async fn what_was_promised_holds(place: &Place, storage: Faulty, receiver: Receiver, agent: Agent) {
    storage.set(Fault::None);
    let api = client(&receiver);
    let report = rounds(&api, &vm1(), TENS).await;
    assert!(report.disks[0].error.is_none(), "{report:?}");
    let single = report.disks[0].single_points.clone();
    assert!(single.iter().any(|point| point.lsn == Lsn(40)));
    assert_eq!(api.keep(&keep("lsn:33")).await.unwrap_err().code, ErrorCode::PointInHole);
    api.set_retention(&vm1(), &ladder("forever")).await.unwrap();
    drop(agent);
    receiver.shutdown().await;
    storage.memory.crash(1);
    let receiver = place.start_on(storage).await;
    let api = client(&receiver);
    assert_eq!(api.retention(Some(&vm1())).await.unwrap().disks[0].single_points, single);
    let mount = api.mount(&request("lsn:40", None)).await.unwrap();
    assert_content(place, &mount, &at(40)).await;
    receiver.shutdown().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn nobody_is_promised_what_a_log_may_begin_without() {
    let place = Place::new();
    let storage = Faulty::new();
    let receiver = place.start_on(storage.clone()).await;
    let agent = write_history(&receiver, 6..=95).await;
    let api = client(&receiver);
    storage.set(Fault::BasesFail);
    for _ in 0..2 {
        let report = rounds(&api, &vm1(), TENS).await;
        assert!(report.disks[0].error.as_deref().unwrap().contains("bases"), "{report:?}");
        assert_refused(&api).await;
    }
    assert!(api.mounts().await.unwrap().mounts.is_empty());
    // An agent that needs it hears that it is refused, not that nobody is there.
    let mut reader = PointReader::open(&receiver, open("vm1", Some(33))).await;
    let hold = |id| Reading::Hold { id, owner: "a rewind".to_owned() };
    let refused = reader.done(hold).await.unwrap_err();
    assert_eq!(refused.code, FailureCode::Refused, "{refused:?}");
    // A ladder promises no point.
    api.set_retention(&vm1(), &ladder("any=10s per-10s=2y")).await.unwrap();
    api.set_retention(&vm1(), &ladder(TENS)).await.unwrap();
    // What stays anyway can be promised, and every point is there for readers.
    api.keep(&keep("lsn:40")).await.unwrap();
    let mount = api.mount(&request("lsn:33", None)).await.unwrap();
    assert_content(&place, &mount, &at(33)).await;
    api.unmount(&mount.id, None).await.unwrap();
    what_was_promised_holds(&place, storage, receiver, agent).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_doubt_about_a_log_that_failed_ends_without_its_agent() {
    let (place, storage) = (Place::new(), Faulty::new());
    let receiver = place.start_on(storage.clone()).await;
    let agent = in_doubt(&receiver, &storage).await;
    fail(agent, &storage).await;
    let api = client(&receiver);
    storage.set(Fault::BasesFail);
    rounds(&api, &vm1(), TENS).await;
    assert_refused(&api).await;
    storage.set(Fault::None);
    rounds(&api, &vm1(), TENS).await;
    api.keep(&keep("lsn:33")).await.unwrap();
    receiver.shutdown().await;
    storage.memory.crash(3);
    let receiver = place.start_on(storage).await;
    let mount = client(&receiver).mount(&request("lsn:33", None)).await.unwrap();
    assert_content(&place, &mount, &at(33)).await;
    receiver.shutdown().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_doubt_ends_with_its_own_log_and_not_with_a_newer_one() {
    let (place, storage) = (Place::new(), Faulty::new());
    let receiver = place.start_on(storage.clone()).await;
    let agent = in_doubt(&receiver, &storage).await;
    let _agent = begin_anew(&receiver, &storage, agent).await;
    let api = client(&receiver);
    storage.set(Fault::FirstLogsFail);
    let report = rounds(&api, &vm1(), TENS).await;
    assert!(report.disks[0].error.as_deref().unwrap().contains("a log of the disk begins"), "{report:?}");
    assert_refused(&api).await;
    api.keep(&keep("lsn:200")).await.unwrap();
    storage.set(Fault::None);
    rounds(&api, &vm1(), TENS).await;
    api.set_retention(&vm1(), &ladder("forever")).await.unwrap();
    receiver.shutdown().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn points_of_older_logs_are_promised_while_a_newer_one_is_in_doubt() {
    let (place, storage) = (Place::new(), Faulty::new());
    let receiver = place.start_on(storage.clone()).await;
    let agent = write_history(&receiver, 6..=95).await;
    let mut agent = begin_anew(&receiver, &storage, agent).await;
    // Of the older one single points are left by then, and none of them goes.
    let api = client(&receiver);
    rounds(&api, &vm1(), TENS).await;
    go_on(&mut agent, 201..=295).await;
    storage.set(Fault::BasesFail);
    rounds(&api, &vm1(), TENS).await;
    for at in ["lsn:203", "lsn:207"] {
        let refused = api.keep(&keep(at)).await.unwrap_err();
        assert!(refused.message.contains("cannot be promised"), "{refused}");
    }
    for at in ["lsn:10", "lsn:20", "lsn:30", "lsn:295"] {
        api.keep(&keep(at)).await.unwrap();
    }
    receiver.shutdown().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_start_promises_nothing_of_a_log_that_is_not_open_and_cannot_be_made_durable() {
    let (place, storage) = (Place::new(), Faulty::new());
    let receiver = place.start_on(storage.clone()).await;
    let agent = in_doubt(&receiver, &storage).await;
    drop(begin_anew(&receiver, &storage, agent).await);
    receiver.shutdown().await;
    storage.set(Fault::FirstLogsFail);
    let receiver = place.start_on(storage.clone()).await;
    let api = client(&receiver);
    assert_refused(&api).await;
    // What the newer log has is not in doubt with it.
    api.keep(&keep("lsn:200")).await.unwrap();
    let mount = api.mount(&request("lsn:33", None)).await.unwrap();
    assert_content(&place, &mount, &at(33)).await;
    api.unmount(&mount.id, None).await.unwrap();
    storage.set(Fault::None);
    rounds(&api, &vm1(), TENS).await;
    api.set_retention(&vm1(), &ladder("forever")).await.unwrap();
    receiver.shutdown().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn nobody_is_promised_what_a_log_that_has_ended_may_begin_without() {
    let (place, storage) = (Place::new(), Faulty::new());
    let receiver = place.start_on(storage.clone()).await;
    let agent = write_history(&receiver, 6..=95).await;
    let agent = begin_anew(&receiver, &storage, agent).await;
    storage.set(Fault::BasesFail);
    let api = client(&receiver);
    for _ in 0..2 {
        let report = rounds(&api, &vm1(), TENS).await;
        assert!(report.disks[0].error.as_deref().unwrap().contains("bases"), "{report:?}");
        assert_refused(&api).await;
    }
    // What stays anyway can be promised, and what the newer log has; every point is there for readers.
    for at in ["lsn:40", "lsn:200"] {
        api.keep(&keep(at)).await.unwrap();
    }
    let mount = api.mount(&request("lsn:33", None)).await.unwrap();
    assert_content(&place, &mount, &at(33)).await;
    api.unmount(&mount.id, None).await.unwrap();
    what_was_promised_holds(&place, storage, receiver, agent).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_log_that_begins_nowhere_is_in_doubt_no_longer_than_its_store_cannot_be_written() {
    let (place, storage) = (Place::new(), Faulty::new());
    let receiver = place.start_on(storage.clone()).await;
    let agent = in_doubt(&receiver, &storage).await;
    drop(begin_anew(&receiver, &storage, agent).await);
    receiver.shutdown().await;
    for (path, _) in storage.memory.files() {
        let name = path.file_name().unwrap().to_str().unwrap();
        if name.starts_with("base.") || name.ends_with(".base") {
            storage.memory.flip_bit(&path, ByteOffset(40), 4);
        }
    }
    storage.set(Fault::FirstLogsFail);
    let receiver = place.start_on(storage.clone()).await;
    let api = client(&receiver);
    let all = LockRequest { name: vm1(), at: None, until: "30d".to_owned() };
    assert_eq!(api.lock(&all).await.unwrap_err().code, ErrorCode::Refused);
    api.keep(&keep("lsn:200")).await.unwrap();
    storage.set(Fault::None);
    rounds(&api, &vm1(), TENS).await;
    api.lock(&all).await.unwrap();
    receiver.shutdown().await;
}
