//! A disk whose directory is away, as after somebody moved it aside: what it needs stays, it is told, and can be ended.

use std::fs;

use backtide_receiver_api::{ErrorCode, ReceiverClient};
use backtide_units::DiskName;

use crate::{
    fixture::*,
    forget::two_disks,
    going_back::{assert_content, request},
    retention::{TENS, at, files, rounds, vm1},
};

/// What is said of images of disks that are away.
async fn told(api: &ReceiverClient) -> Vec<String> {
    let alarms = api.status().await.unwrap().alarms;
    alarms.into_iter().filter(|alarm| alarm.contains("is missing")).collect()
}

#[tokio::test(flavor = "multi_thread")]
async fn a_disk_whose_directory_is_away_keeps_its_images_until_it_is_back_or_forgotten() {
    let place = Place::new();
    let receiver = place.start().await;
    two_disks(&receiver).await;
    let api = client(&receiver);
    rounds(&api, &vm1(), TENS).await;
    let uuid = api.disks(Some(&vm1())).await.unwrap().disks[0].uuid;
    assert_eq!(told(&api).await, [""; 0]);
    receiver.shutdown().await;
    let (dir, aside) = (place.store().join("disks").join(uuid.to_string()), place.path("aside"));
    let packs = files(&place, "pack");
    assert!(!packs.is_empty());
    fs::rename(&dir, &aside).unwrap();

    // The first round gives room back.
    let receiver = place.start().await;
    let api = client(&receiver);
    let vm2: DiskName = "vm2".parse().unwrap();
    let report = rounds(&api, &vm2, "forever").await;
    assert!(report.error.is_none(), "{report:?}");
    assert_eq!(files(&place, "pack"), packs);
    let alarms = told(&api).await;
    let way_out = format!("backtide forget {uuid} --yes");
    assert!(alarms.len() == 1 && alarms[0].contains(&way_out), "{alarms:?}");
    receiver.shutdown().await;
    fs::rename(&aside, &dir).unwrap();
    let receiver = place.start().await;
    let api = client(&receiver);
    rounds(&api, &vm2, "forever").await;
    assert_eq!(told(&api).await, [""; 0]);
    let mounted = api.mount(&request("lsn:30", None)).await.unwrap();
    assert_content(&place, &mounted, &at(30)).await;
    api.unmount(&mounted.id, None).await.unwrap();
    receiver.shutdown().await;

    // It does not come back.
    fs::rename(&dir, &aside).unwrap();
    let receiver = place.start().await;
    let api = client(&receiver);
    let by_id: DiskName = uuid.to_string().parse().unwrap();
    assert_eq!(api.forget(&by_id).await.unwrap().uuid, uuid);
    let report = rounds(&api, &vm2, "forever").await;
    assert_eq!(report.image_bytes.0, 0, "{report:?}");
    assert_eq!(told(&api).await, [""; 0]);
    assert_eq!(api.forget(&by_id).await.unwrap_err().code, ErrorCode::NotFound);
    receiver.shutdown().await;
}
