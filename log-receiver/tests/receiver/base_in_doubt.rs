//! A store that cannot say durably where a log begins: nobody is promised what the log may begin without.

use backtide_receiver_api::{ErrorCode, KeepRequest, LockRequest, MountRequest, ReceiverClient};
use backtide_units::Lsn;

use crate::{
    faults::{Fault, Faulty},
    fixture::*,
    going_back::{assert_content, request},
    retention::{TENS, at, ladder, rounds, vm1, write_history},
};

fn keep(at: &str) -> KeepRequest {
    KeepRequest { name: vm1(), at: at.to_owned(), release: false }
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
        api.set_retention(&vm1(), &ladder("forever")).await.unwrap_err(),
        api.mount(&writable).await.unwrap_err(),
    ];
    for error in errors {
        assert_eq!(error.code, ErrorCode::Failed, "{error}");
        assert!(error.message.contains("cannot be promised"), "{error}");
    }
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
    // What stays anyway can be promised, and every point is there for readers.
    api.keep(&keep("lsn:40")).await.unwrap();
    let mount = api.mount(&request("lsn:33", None)).await.unwrap();
    assert_content(&place, &mount, &at(33)).await;
    api.unmount(&mount.id, None).await.unwrap();
    // The store can be written again, and what is promised holds.
    storage.set(Fault::None);
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
    assert_content(&place, &mount, &at(40)).await;
    receiver.shutdown().await;
}
