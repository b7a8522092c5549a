//! A scrub's end, whatever ends it: somebody's word, a restart; and its state, which never waits for a file.

use std::{fs, process::Command, time::Duration};

use backtide_receiver_api::{ReceiverClient, ScrubRequest, ScrubStatus};
use backtide_storage::MemoryStorage;
use backtide_units::ByteCount;

use crate::{
    agent::*,
    faults::{Fault, Faulty},
    fixture::*,
    going_back::request,
    retention::{content, files, write_history},
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

#[tokio::test(flavor = "multi_thread")]
async fn a_place_that_was_found_is_not_forgotten_by_a_scrub_that_names_only_others() {
    const PLACES: u64 = 150;
    let place = Place::new();
    let receiver = place.start().await;
    let (mut agent, _) = Agent::welcomed(&receiver, hello(1, "vm1")).await;
    agent.first_pass(5).await;
    let lsns = 6..6 + PLACES;
    for lsn in lsns.clone() {
        agent.send(&write(lsn, lsn * 4096, content(lsn)[..4096].to_vec())).await;
    }
    agent.all_durable().await;
    drop(agent);
    // Each of them rots.
    let mut found = 0;
    for path in files(&place, "seg") {
        let mut bytes = fs::read(&path).unwrap();
        for lsn in lsns.clone() {
            let wanted = &content(lsn)[..64];
            if let Some(at) = bytes.windows(64).position(|window| window == wanted) {
                bytes[at + 7] ^= 1;
                found += 1;
            }
        }
        let file = fs::OpenOptions::new().write(true).open(&path).unwrap();
        std::os::unix::fs::FileExt::write_all_at(&file, &bytes, 0).unwrap();
    }
    assert_eq!(found, PLACES);
    // A read meets the last one.
    let api = client(&receiver);
    let mount = api.mount(&request("latest", None)).await.unwrap();
    let read = format!("read {} 4k", (lsns.end - 1) * 4096);
    let output = tokio::task::spawn_blocking(move || {
        Command::new("qemu-io").args(["-r", "-f", "raw", &mount.uri, "-c", &read]).output().unwrap()
    });
    let output = output.await.unwrap();
    assert!(String::from_utf8_lossy(&output.stdout).contains("failed") || !output.status.success());
    let known = async || {
        let alarms = api.status().await.unwrap().alarms;
        alarms.into_iter().filter(|alarm| alarm.contains(".seg")).collect::<Vec<_>>()
    };
    let [met] = &known().await[..] else { panic!("one place is known") };
    api.scrub(&at_rate(0)).await.unwrap();
    let status = ended(&api).await;
    assert_eq!((status.disks[0].damage.len(), status.disks[0].more_damage), (100, PLACES - 100));
    let (known, at) = (known().await, met.split_once(':').map_or(&met[..], |(_, why)| why));
    let at = at.split_once(',').map_or(at, |(at, _)| at);
    assert!(known.iter().any(|alarm| alarm.contains(at)), "{met} is damaged still: {known:#?}");
    receiver.shutdown().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_scrub_calls_no_disk_sound_whose_directory_cannot_be_listed() {
    let (place, storage) = (Place::new(), Faulty::new());
    let receiver = place.start_on(storage.clone()).await;
    drop(write_history(&receiver, 6..=10).await);
    let api = client(&receiver);
    storage.set(Fault::DisksUnlistable);
    api.scrub(&at_rate(0)).await.unwrap();
    let status = ended(&api).await;
    assert!(!status.sound && status.disks[0].damage[0].contains("list "), "{status:?}");
    storage.set(Fault::None);
    api.scrub(&at_rate(0)).await.unwrap();
    assert!(ended(&api).await.sound);
    receiver.shutdown().await;
}
