//! A scrub's end, whatever ends it: somebody's word, a restart; and its state, which never waits for a file.

use std::time::Duration;

use backtide_receiver_api::{ReceiverClient, ScrubRequest, ScrubStatus};
use backtide_storage::MemoryStorage;
use backtide_units::ByteCount;

use crate::{
    faults::{Fault, Faulty},
    fixture::*,
    retention::write_history,
};

/// What does not end in this time never does.
const NEVER: Duration = Duration::from_secs(300);

fn at_rate(bytes: u64) -> ScrubRequest {
    ScrubRequest { name: None, bytes_per_second_max: Some(ByteCount(bytes)) }
}

async fn ended(api: &ReceiverClient) -> ScrubStatus {
    loop {
        let status = api.scrub_status().await.unwrap();
        if !status.running {
            return status;
        }
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_scrub_that_was_called_off_stays_that_whenever_the_receiver_ends() {
    let (place, storage) = (Place::new(), MemoryStorage::new());
    let receiver = place.start_on(storage.clone()).await;
    drop(write_history(&receiver, 6..=30).await);
    let api = client(&receiver);
    api.scrub(&at_rate(1)).await.unwrap();
    let called_off = api.cancel_scrub().await.unwrap();
    assert!(called_off.cancelled, "{called_off:?}");
    // What a receiver finds that is started when this one was killed just now.
    let found = storage.copy();
    assert!(ended(&api).await.cancelled);
    receiver.shutdown().await;
    for storage in [found, storage] {
        let receiver = place.start_on(storage).await;
        let status = client(&receiver).scrub_status().await.unwrap();
        assert!(!status.running && status.cancelled && status.ended.is_some(), "{status:?}");
        receiver.shutdown().await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn whoever_asks_how_far_a_scrub_is_does_not_wait_for_its_file() {
    let (place, storage) = (Place::new(), Faulty::new());
    let receiver = place.start_on(storage.clone()).await;
    drop(write_history(&receiver, 6..=30).await);
    let api = client(&receiver);
    storage.set(Fault::SyncsWait);
    let begins = tokio::spawn({
        let api = client(&receiver);
        async move { api.scrub(&at_rate(0)).await }
    });
    storage.a_sync_waits().await;
    let told = async {
        loop {
            if let Ok(status) = api.scrub_status().await {
                return status;
            }
        }
    };
    let status = tokio::time::timeout(NEVER, told).await.expect("it is told while the file is written");
    assert!(status.running, "{status:?}");
    storage.set(Fault::None);
    begins.await.unwrap().unwrap();
    assert!(ended(&api).await.sound);
    receiver.shutdown().await;
}
