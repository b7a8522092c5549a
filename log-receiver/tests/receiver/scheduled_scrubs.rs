//! Scrubs that nobody has asked for.

use std::{fs, sync::Arc};

use backtide_log_receiver::{Config, Receiver, Scrubbing};
use backtide_receiver_api::{ReceiverClient, ReceiverStatus, ScrubRequest, ScrubStatus};
use backtide_storage::MemoryStorage;
use backtide_units::ByteCount;

use crate::{
    fixture::*,
    retention::{files, write_history},
};

const WEEK_US: u64 = 7 * 24 * 60 * 60 * 1_000_000;

/// A week after each the next.
fn weekly(place: &Place) -> Config {
    let every = Some("7d".to_owned().try_into().unwrap());
    Config { scrub: Scrubbing { every, bytes_per_second_max: ByteCount(0) }, ..place.config() }
}

/// And full with less room than this.
fn full_below(place: &Place, bytes: u64) -> Config {
    let mut config = weekly(place);
    config.limits.free_bytes_min = ByteCount(bytes);
    config
}

/// The one that has ended, whoever wanted it; waits for it.
async fn ended(api: &ReceiverClient) -> ScrubStatus {
    loop {
        if let Ok(status) = api.scrub_status().await
            && !status.running
        {
            return status;
        }
    }
}

fn next(status: &ReceiverStatus) -> (u64, Option<&str>) {
    let next = status.scrub_next.as_ref().expect("one is to come");
    (next.at.0, next.waits.as_deref())
}

#[tokio::test(flavor = "multi_thread")]
async fn one_that_is_due_begins_by_itself_and_tells_what_it_finds_as_any_other() {
    let place = Place::new();
    let receiver = place.start().await;
    let api = client(&receiver);
    drop(write_history(&receiver, 6..=60).await);
    assert_eq!(api.status().await.unwrap().scrub_next, None, "nobody has said that any begins by itself");
    receiver.shutdown().await;
    api.scrub_status().await.unwrap_err();
    // It rots while nobody looks.
    let segment = files(&place, "seg").into_iter().next().unwrap();
    let mut bytes = fs::read(&segment).unwrap();
    bytes[5000] ^= 1;
    fs::write(&segment, &bytes).unwrap();

    let receiver = Receiver::start(weekly(&place)).await.unwrap();
    let api = client(&receiver);
    let first = ended(&api).await;
    assert!(!first.sound && !first.cancelled, "{first:?}");
    let status = api.status().await.unwrap();
    assert!(status.alarms.iter().any(|alarm| alarm.contains("0000000001.seg")), "{status:?}");
    assert_eq!(next(&status), (first.ended.unwrap().0 + WEEK_US, None));
    // One of a disk puts it off by nothing.
    let one = ScrubRequest { name: Some("vm1".parse().unwrap()), bytes_per_second_max: None };
    assert_eq!(api.scrub(&one).await.unwrap().bytes_per_second_max, ByteCount(0), "as it is configured");
    let of_one = ended(&api).await;
    assert_eq!(next(&api.status().await.unwrap()).0, first.ended.unwrap().0 + WEEK_US);
    receiver.shutdown().await;

    let receiver = Receiver::start(weekly(&place)).await.unwrap();
    let api = client(&receiver);
    assert_eq!(next(&api.status().await.unwrap()), (first.ended.unwrap().0 + WEEK_US, None));
    assert_eq!(api.scrub_status().await.unwrap(), of_one, "none was due");
    // One that somebody asks for counts.
    api.scrub(&ScrubRequest::default()).await.unwrap();
    let asked = ended(&api).await;
    assert_eq!(next(&api.status().await.unwrap()), (asked.ended.unwrap().0 + WEEK_US, None));
    receiver.shutdown().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn what_is_damaged_outside_of_the_disks_is_an_alarm_too_until_a_scrub_finds_it_whole() {
    let place = Place::new();
    let receiver = place.start().await;
    let api = client(&receiver);
    let file = place.store().join("store.json");
    let whole = fs::read(&file).unwrap();
    let told = async || {
        api.scrub(&ScrubRequest::default()).await.unwrap();
        ended(&api).await;
        api.status().await.unwrap().alarms
    };
    fs::write(&file, &whole[1..]).unwrap();
    let alarms = told().await;
    assert!(alarms.len() == 1 && alarms[0].contains("store.json is damaged"), "{alarms:?}");
    fs::write(&file, whole).unwrap();
    assert_eq!(told().await, Vec::<String>::new());
    receiver.shutdown().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_store_that_is_full_is_not_scrubbed_and_status_says_that_it_waits() {
    let (place, storage) = (Place::new(), MemoryStorage::new());
    let receiver = place.start_on(storage.clone()).await;
    drop(write_history(&receiver, 6..=30).await);
    receiver.shutdown().await;
    storage.set_capacity(Some(ByteCount(64 << 20)));
    let start = async |bytes| {
        let config = full_below(&place, bytes);
        Receiver::start_on_storage(Arc::new(storage.clone()), config).await.unwrap()
    };
    let receiver = start(64 << 20).await;
    let status = client(&receiver).status().await.unwrap();
    assert_eq!((next(&status).1, &status.scrub), (Some("the store is full"), &None), "{status:?}");
    receiver.shutdown().await;
    let receiver = start(1 << 20).await;
    let api = client(&receiver);
    assert!(ended(&api).await.sound);
    assert_eq!(next(&api.status().await.unwrap()).1, None);
    receiver.shutdown().await;
}
