//! Rounds of retention over several disks in a store with little room: what one disk gives back the next may use, and a store that
//! comes to have too little meanwhile is seen to at once.

use std::sync::Arc;

use backtide_log_receiver::{Config, OnFull, Receiver, Retention};
use backtide_receiver_api::{DiskRetention, ReceiverClient, RetentionReport};
use backtide_storage::MemoryStorage;
use backtide_units::{ByteCount, Lsn};

use crate::{
    agent::*,
    faults::{Fault, Faulty},
    fixture::*,
    retention::{go_on, ladder, vm1, write_history},
};

/// No round comes by itself.
const HOUR: u64 = 3_600_000;
const LOW: ByteCount = ByteCount(4 << 20);

fn config(place: &Place, on_full: OnFull) -> Config {
    let default = "any=1h".to_owned();
    let retention = Retention { on_full, low_bytes: LOW, interval_ms: HOUR, default, ..Retention::default() };
    Config { retention, ..place.config() }
}

/// Two disks, each of which has an image of 4 MiB less to take than its segments give back.
async fn two_disks(receiver: &Receiver) -> (Agent, Agent) {
    let one = write_history(receiver, 6..=150).await;
    let (mut two, _) = Agent::welcomed(receiver, hello(2, "vm2")).await;
    two.first_pass(1006).await;
    go_on(&mut two, 1007..=1150).await;
    (one, two)
}

/// Has rounds done, so many.
async fn until(api: &ReceiverClient, rounds: u64) -> RetentionReport {
    api.set_retention(&vm1(), &ladder("any=1h")).await.unwrap();
    loop {
        let report = api.retention(None).await.unwrap();
        if report.rounds >= rounds {
            return report;
        }
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn the_room_that_one_disk_gives_back_is_the_next_ones_in_the_same_round() {
    let place = Place::new();
    let storage = MemoryStorage::new();
    let config = config(&place, OnFull::Refuse);
    let receiver = Receiver::start_on_storage(Arc::new(storage.clone()), config).await.unwrap();
    let _agents = two_disks(&receiver).await;
    let api = client(&receiver);
    // There is room for the one's image, and half of the other's.
    storage.set_capacity(Some(ByteCount(storage.used().0 + LOW.0 + DISK_BYTES * 3 / 2)));
    let report = until(&api, 1).await;
    assert_eq!(report.rounds, 1);
    for disk in &report.disks {
        assert!(disk.error.is_none(), "{disk:?}");
        assert!(disk.every_point_from.unwrap().lsn.0 % 1000 > 100, "{disk:?}");
    }
    assert!(report.freed_bytes.0 > 2 * DISK_BYTES, "{report:?}");
    receiver.shutdown().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_store_that_comes_to_have_little_room_in_a_round_is_seen_to_at_once() {
    let place = Place::new();
    let storage = Faulty::new();
    let config = config(&place, OnFull::Shrink);
    let receiver = Receiver::start_on_storage(Arc::new(storage.clone()), config).await.unwrap();
    let _agents = two_disks(&receiver).await;
    let api = client(&receiver);
    storage.set(Fault::RoomGoesWithABase(ByteCount(LOW.0 - (1 << 20))));
    let mut report = until(&api, 1).await;
    // Nothing of the other is folded as if there were room, nor in vain.
    let is_as_it_was = |disk: &DiskRetention| {
        let begins = [Lsn(5), Lsn(1006)].contains(&disk.every_point_from.unwrap().lsn);
        disk.error.is_none() && (begins || disk.shrunk > 0)
    };
    assert!(report.disks.iter().any(is_as_it_was), "{report:?}");
    // Nobody asks for the next round.
    while report.disks.iter().all(|disk| disk.shrunk == 0) {
        report = api.retention(None).await.unwrap();
    }
    receiver.shutdown().await;
}
