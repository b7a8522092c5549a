//! fsck and scrub: every flipped bit of what is kept is found, named, and costs nothing else.

use std::{fs, path::PathBuf};

use backtide_log_receiver::{StoreFileError, fsck};
use backtide_protocol::Message;
use backtide_receiver_api::{ErrorCode, ReceiverClient, ScrubRequest, ScrubStatus};
use backtide_units::ByteCount;

use crate::{agent::*, fixture::*};

/// A store with two disks; vm1 has sealed segments and an open one. All of it is durable and known so.
async fn fill(place: &Place) {
    let receiver = place.start().await;
    for (number, name, last) in [(1, "vm1", 700), (2, "vm2", 20)] {
        let (mut agent, _) = Agent::welcomed(&receiver, hello(number, name)).await;
        agent.first_pass(5).await;
        for lsn in 6..=last {
            agent.send(&write(lsn, (lsn % 50) * 4096, vec![lsn as u8; 4096])).await;
            if lsn % 100 == 0 {
                agent.all_durable().await;
            }
        }
        agent.send(&Message::Flush { lsn: backtide_units::Lsn(last), time: time(last) }).await;
        agent.all_durable().await;
    }
    receiver.shutdown().await;
}

fn segments(place: &Place) -> Vec<PathBuf> {
    let directory = place.store().join("disks").join(hello(1, "vm1").disk.to_string()).join("segments");
    let mut found: Vec<_> = fs::read_dir(directory).unwrap().map(|entry| entry.unwrap().path()).collect();
    found.retain(|path| path.extension().is_some_and(|extension| extension == "seg"));
    found.sort();
    found
}

/// Every file of the store but the lock, with its content.
fn content(place: &Place) -> Vec<(PathBuf, Vec<u8>)> {
    fn walk(directory: PathBuf, found: &mut Vec<(PathBuf, Vec<u8>)>) {
        for entry in fs::read_dir(directory).unwrap() {
            let path = entry.unwrap().path();
            if path.is_dir() {
                walk(path, found);
            } else {
                found.push((path.clone(), fs::read(&path).unwrap()));
            }
        }
    }
    let mut found = Vec::new();
    walk(place.store(), &mut found);
    found.sort();
    found
}

async fn scrubbed(api: &ReceiverClient, request: &ScrubRequest) -> ScrubStatus {
    let mut status = api.scrub(request).await.unwrap();
    while status.running {
        status = api.scrub_status().await.unwrap();
    }
    status
}

#[tokio::test]
async fn fsck_of_a_sound_store_reads_all_and_changes_nothing() {
    let place = Place::new();
    fill(&place).await;
    let before = content(&place);
    let mut read = ByteCount(0);
    let report = fsck(&place.store(), &mut |done| read = done).unwrap();
    assert!(report.sound, "{report:?}");
    let names: Vec<_> = report.disks.iter().map(|disk| disk.name.clone().unwrap().to_string()).collect();
    assert_eq!(names, ["vm1", "vm2"]);
    assert_eq!(report.disks[0].segments, segments(&place).len() as u64);
    // Attach, begin and end of the pass, the writes, the flush.
    assert_eq!(report.disks[1].entries, 3 + 15 + 1);
    assert!(read.0 >= 700 * 4096, "{read}");
    assert_eq!(content(&place), before, "nothing was changed");
}

#[tokio::test]
async fn fsck_finds_a_flipped_bit_wherever_it_is() {
    let place = Place::new();
    fill(&place).await;
    let files = content(&place);
    let first = &segments(&place)[0];
    for (path, bytes) in &files {
        if path.ends_with("lock") || path.ends_with("spare.new") {
            // No data: a process id, space made ready.
            continue;
        }
        // Of a segment that is sealed: header, an entry, a payload, index, trailer. Of others their middle.
        let length = bytes.len();
        let places = if path == first {
            vec![20, 140, 5000, length / 2, length - 3000, length - 20]
        } else if path.extension().is_some_and(|extension| extension == "seg") {
            vec![300]
        } else {
            vec![length / 2]
        };
        for at in places {
            let mut flipped = bytes.clone();
            flipped[at] ^= 4;
            fs::write(path, &flipped).unwrap();
            let report = fsck(&place.store(), &mut |_| {}).unwrap();
            let all: Vec<&String> =
                report.damage.iter().chain(report.disks.iter().flat_map(|disk| &disk.damage)).collect();
            // Of a log whose entries tell nothing of their end, the place is its directory.
            let name = path.file_name().unwrap().to_str().unwrap();
            let directory = path.parent().unwrap().to_str().unwrap();
            assert!(
                !report.sound && all.iter().any(|damage| damage.contains(name) || damage.contains(directory)),
                "{at} of {name}: {report:?}"
            );
            fs::write(path, bytes).unwrap();
        }
    }
    assert!(fsck(&place.store(), &mut |_| {}).unwrap().sound);
    let mark = place.store().join("disks").join(hello(1, "vm1").disk.to_string()).join("durable");
    fs::write(&mark, b"").unwrap();
    let report = fsck(&place.store(), &mut |_| {}).unwrap();
    let damage = &report.disks[0].damage;
    assert!(damage.len() == 1 && damage[0].contains("durable is damaged"), "an emptied one: {report:?}");
    place.start().await.shutdown().await;
    assert!(fsck(&place.store(), &mut |_| {}).unwrap().sound, "it is written again");
}

#[tokio::test]
async fn fsck_names_a_lost_segment_and_a_lost_end() {
    let place = Place::new();
    fill(&place).await;
    let lost = segments(&place)[1].clone();
    fs::remove_file(&lost).unwrap();
    let second = place.store().join("disks").join(hello(2, "vm2").disk.to_string());
    let segment = second.join("segments").join("0000000000000001.seg");
    fs::OpenOptions::new().write(true).open(segment).unwrap().set_len(30_000).unwrap();
    let report = fsck(&place.store(), &mut |_| {}).unwrap();
    let damage = &report.disks[0].damage;
    assert!(damage.iter().any(|damage| damage.contains("0000000000000002.seg is missing")), "{damage:?}");
    assert!(report.disks[0].entries > 300, "what stands behind the lost one is read too: {report:?}");
    let damage = &report.disks[1].damage;
    assert!(damage.iter().any(|damage| damage.contains("the end of the log")), "{damage:?}");
}

#[tokio::test]
async fn fsck_leaves_a_store_in_use_and_other_directories_alone() {
    let place = Place::new();
    let receiver = place.start().await;
    let error = fsck(&place.store(), &mut |_| {}).unwrap_err();
    assert!(matches!(error, StoreFileError::Locked { .. }), "{error}");
    receiver.shutdown().await;
    assert!(fsck(&place.store(), &mut |_| {}).unwrap().sound);
    fs::create_dir(place.path("empty")).unwrap();
    for name in ["empty", "nowhere"] {
        assert!(fsck(&place.path(name), &mut |_| {}).is_err(), "{name}");
    }
    assert!(!place.path("nowhere").exists() && fs::read_dir(place.path("empty")).unwrap().next().is_none());
}

/// Damage of vm1 is told wherever somebody asks, and none of vm2.
async fn is_remembered(api: &ReceiverClient, place: &str) {
    let damage = api.points(&"vm1".parse().unwrap()).await.unwrap().damage;
    assert!(damage.as_ref().is_some_and(|damage| damage.contains(place)), "{damage:?}");
    assert_eq!(api.points(&"vm2".parse().unwrap()).await.unwrap().damage, None);
    let disks = api.disks(None).await.unwrap().disks;
    assert!(disks[0].damage[0].contains(place) && disks[1].damage.is_empty(), "{disks:?}");
    let alarms = api.status().await.unwrap().alarms;
    assert!(alarms.len() == 1 && alarms[0].contains("disk vm1") && alarms[0].contains(place), "{alarms:?}");
}

#[tokio::test]
async fn a_scrub_finds_a_flipped_bit_while_the_receiver_works_and_says_how_far_it_is() {
    let place = Place::new();
    fill(&place).await;
    let receiver = place.start().await;
    let api = client(&receiver);
    assert_eq!(api.scrub_status().await.unwrap_err().code, ErrorCode::NotFound);
    let everything = ScrubRequest { bytes_per_second_max: Some(ByteCount(0)), ..ScrubRequest::default() };
    let status = scrubbed(&api, &everything).await;
    assert!(status.sound && !status.cancelled, "{status:?}");
    assert_eq!((status.disks.len(), status.done_bytes), (2, status.total_bytes));
    assert_eq!(api.status().await.unwrap().scrub, Some(status));

    let segment = &segments(&place)[0];
    let whole = fs::read(segment).unwrap();
    let mut bytes = whole.clone();
    bytes[5000] ^= 1;
    fs::write(segment, bytes).unwrap();
    let status = scrubbed(&api, &everything).await;
    assert!(!status.sound && status.disks[1].sound, "{status:?}");
    assert!(status.disks[0].damage[0].contains("0000000000000001.seg is damaged at byte"), "{status:?}");
    let one = ScrubRequest { name: Some("vm2".parse().unwrap()), ..everything.clone() };
    let status = scrubbed(&api, &one).await;
    assert!(status.sound && status.disks.len() == 1, "{status:?}");
    // It is remembered, until a scrub of the disk finds it sound.
    is_remembered(&api, "0000000000000001.seg is damaged at byte").await;
    fs::write(segment, whole).unwrap();
    let status = scrubbed(&api, &everything).await;
    assert!(status.sound, "{status:?}");
    assert!(api.status().await.unwrap().alarms.is_empty());
    assert_eq!(api.points(&"vm1".parse().unwrap()).await.unwrap().damage, None);
    let unknown = ScrubRequest { name: Some("vm9".parse().unwrap()), ..everything.clone() };
    assert_eq!(api.scrub(&unknown).await.unwrap_err().code, ErrorCode::NotFound);

    // So slow that it would take weeks: one at a time, and it can be called off.
    let slow = ScrubRequest { bytes_per_second_max: Some(ByteCount(1)), ..ScrubRequest::default() };
    assert!(api.scrub(&slow).await.unwrap().running);
    assert_eq!(api.scrub(&everything).await.unwrap_err().code, ErrorCode::Busy);
    let mut status = api.cancel_scrub().await.unwrap();
    while status.running {
        status = api.scrub_status().await.unwrap();
    }
    assert!(status.cancelled && status.done_bytes < status.total_bytes, "{status:?}");
    receiver.shutdown().await;
}
