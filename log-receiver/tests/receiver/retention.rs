//! Retention of a running receiver: what a ladder keeps can be gone back to, the rest is said to be gone, and the store
//! shrinks.

use std::fs;

use backtide_log_receiver::{Config, OnFull, Receiver, Retention, fsck};
use backtide_protocol::{Message, Record};
use backtide_receiver_api::{
    ErrorCode, KeepRequest, MountRequest, OverlayFate, ReceiverClient, RemountRequest, RetentionReport,
    RetentionRequest, ScrubRequest,
};
use backtide_recovery::time_text;
use backtide_storage::{MemoryStorage, Storage};
use backtide_units::{ByteCount, CaptureTime, DiskName, Lsn};

use crate::{
    agent::*,
    fixture::*,
    going_back::{assert_content, request},
};

/// Records of 64 KiB: about fifteen fill a segment.
const RECORD: usize = 64 << 10;

/// Captured in 1970, every point is older than an hour; those at tens of seconds stay for a hundred years.
pub(crate) const TENS: &str = "any=1h per-10s=100y";

pub(crate) fn vm1() -> DiskName {
    "vm1".parse().unwrap()
}

pub(crate) fn ladder(text: &str) -> RetentionRequest {
    RetentionRequest { ladder: Some(text.to_owned()) }
}

/// The first point is LSN 5; records from then on go around on the disk.
pub(crate) async fn write_history(receiver: &Receiver, lsns: std::ops::RangeInclusive<u64>) -> Agent {
    let (mut agent, _) = Agent::welcomed(receiver, hello(1, "vm1")).await;
    agent.first_pass(5).await;
    go_on(&mut agent, lsns).await;
    agent
}

pub(crate) async fn go_on(agent: &mut Agent, lsns: std::ops::RangeInclusive<u64>) {
    for lsn in lsns {
        agent.send(&write(lsn, place(lsn) as u64, content(lsn))).await;
    }
    agent.all_durable().await;
}

fn place(lsn: u64) -> usize {
    (lsn as usize * RECORD) % (DISK_BYTES as usize)
}

/// Bytes that do not compress.
pub(crate) fn content(lsn: u64) -> Vec<u8> {
    let mut state = lsn;
    let mut word = || {
        state = state.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mixed = (state ^ (state >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        (mixed ^ (mixed >> 27)).to_le_bytes()
    };
    (0..RECORD / 8).flat_map(|_| word()).collect()
}

pub(crate) fn at(lsn: u64) -> Vec<u8> {
    let mut image = vec![0; DISK_BYTES as usize];
    (6..=lsn).for_each(|lsn| image[place(lsn)..place(lsn) + RECORD].copy_from_slice(&content(lsn)));
    image
}

/// Waits for rounds that began after now to end.
pub(crate) async fn rounds(api: &ReceiverClient, name: &DiskName, wanted: &str) -> RetentionReport {
    let begun = api.retention(None).await.unwrap().rounds;
    loop {
        let seen = api.retention(None).await.unwrap().rounds;
        let mut report = api.set_retention(name, &ladder(wanted)).await.unwrap();
        while report.rounds <= seen {
            report = api.retention(Some(name)).await.unwrap();
        }
        // The one that was under way does not count.
        if report.rounds > begun + 1 {
            return report;
        }
    }
}

/// The files of the store whose names end so, at whatever depth.
pub(crate) fn files(place: &Place, ending: &str) -> Vec<std::path::PathBuf> {
    let mut dirs = vec![place.store()];
    let mut found = Vec::new();
    while let Some(dir) = dirs.pop() {
        for entry in fs::read_dir(dir).unwrap() {
            let path = entry.unwrap().path();
            if path.is_dir() {
                dirs.push(path);
            } else if path.extension().is_some_and(|name| name == ending) {
                found.push(path);
            }
        }
    }
    found.sort();
    found
}

#[tokio::test(flavor = "multi_thread")]
async fn what_the_ladder_keeps_can_be_gone_back_to_and_the_rest_is_said_to_be_gone() {
    let place = Place::new();
    let receiver = place.start().await;
    let mut agent = write_history(&receiver, 6..=95).await;
    let api = client(&receiver);
    // A point in the middle of what goes is mounted, another is to stay.
    let mounted = api.mount(&request("lsn:33", None)).await.unwrap();
    let keep = KeepRequest { name: vm1(), at: "lsn:44".to_owned(), release: false, held: None };
    assert_eq!(api.keep(&keep).await.unwrap().disks[0].keep[0].lsn, Lsn(44));
    // What is written to a mounted point is kept, and the point with it, also when the receiver starts again.
    let writable = MountRequest { writable: true, ..request("lsn:52", None) };
    let overlay = api.mount(&writable).await.unwrap().id;
    api.unmount(&overlay, Some(OverlayFate::Keep)).await.unwrap();
    let preview = api.preview_retention(&vm1(), &ladder(TENS)).await.unwrap();
    assert!(preview.changes && preview.log_bytes_freed.0 > 4 << 20, "{preview:?}");
    // Each record is a chunk of its own, and none is written twice between two points that are kept.
    let floor = preview.every_point_from.unwrap().lsn.0;
    assert_eq!(preview.fold_read_bytes.0, (floor - 5) * RECORD as u64, "{preview:?}");
    let before = api.points(&vm1()).await.unwrap();
    assert_eq!((before.holes.len(), before.intervals.len()), (0, 1), "a preview changes nothing");

    let report = rounds(&api, &vm1(), TENS).await;
    let disk = &report.disks[0];
    assert!(report.error.is_none() && disk.error.is_none(), "{report:?}");
    assert_eq!(disk.every_point_from, preview.every_point_from);
    assert_eq!(disk.single_points, preview.keep);
    // What was told to be the most is, but for the tables of packs.
    let (taken, told) = (report.image_bytes.0, preview.fold_write_bytes_max.0);
    assert!(taken > told / 2 && taken < told + told / 50, "{taken} of {told}");
    let single: Vec<u64> = disk.single_points.iter().map(|point| point.lsn.0).collect();
    let expected: Vec<u64> = (1..=9).map(|tens| tens * 10).chain([44, 52]).collect();
    let mut expected: Vec<u64> = expected.into_iter().filter(|lsn| *lsn < 95).collect();
    expected.sort();
    assert_eq!(single, expected);
    let points = api.points(&vm1()).await.unwrap();
    assert!(points.holes.iter().all(|hole| hole.reason_code == "thinned"), "{points:?}");
    let refused = api.mount(&request("lsn:45", None)).await.unwrap_err();
    assert_eq!(refused.code, ErrorCode::PointInHole);

    // The mounted point reads as ever; when it has ended, its segments go.
    assert_content(&place, &mounted, &at(33)).await;
    let with_mount = files(&place, "seg").len();
    api.unmount(&mounted.id, None).await.unwrap();
    rounds(&api, &vm1(), TENS).await;
    assert!(files(&place, "seg").len() < with_mount);
    assert!(files(&place, "seg").len() <= 3, "{:?}", files(&place, "seg"));
    for lsn in [20, 44, 90, 95] {
        let mount = api.mount(&request(&format!("lsn:{lsn}"), None)).await.unwrap();
        assert_content(&place, &mount, &at(lsn)).await;
    }
    // It goes on, also after a start.
    go_on(&mut agent, 96..=130).await;
    drop(agent);
    receiver.shutdown().await;
    assert!(fsck(&place.store(), &mut |_| {}).unwrap().sound);
    let receiver = place.start().await;
    let api = client(&receiver);
    assert_eq!(api.retention(Some(&vm1())).await.unwrap().disks[0].ladder, "any=1h per-10s=100y");
    let report = rounds(&api, &vm1(), TENS).await;
    assert!(report.disks[0].single_points.iter().any(|point| point.lsn == Lsn(110)), "{report:?}");
    let again = api.remount(&overlay, &RemountRequest::default()).await.unwrap();
    assert_eq!(again.lsn, Lsn(52), "{again:?}");
    assert_content(&place, &again, &at(52)).await;
    for lsn in [10, 44, 110, 130] {
        let mount = api.mount(&request(&format!("lsn:{lsn}"), None)).await.unwrap();
        assert_content(&place, &mount, &at(lsn)).await;
    }
    receiver.shutdown().await;
}

#[tokio::test]
async fn a_released_point_goes_and_gives_its_room_back() {
    let place = Place::new();
    let receiver = place.start().await;
    let _agent = write_history(&receiver, 6..=95).await;
    let api = client(&receiver);
    let keep = |release| KeepRequest { name: vm1(), at: "lsn:44".to_owned(), release, held: None };
    api.keep(&keep(false)).await.unwrap();
    let with = rounds(&api, &vm1(), "any=1h").await;
    assert_eq!(with.disks[0].single_points.len(), 1, "{with:?}");
    api.keep(&keep(true)).await.unwrap();
    let mut without = rounds(&api, &vm1(), "any=1h").await;
    assert!(without.disks[0].single_points.is_empty(), "{without:?}");
    // A report that was under way when the point went has its image: then a later round gives the room back.
    while without.image_bytes >= with.image_bytes {
        without = rounds(&api, &vm1(), "any=1h").await;
    }
    let refused = api.keep(&keep(false)).await.unwrap_err();
    assert!(matches!(refused.code, ErrorCode::PointInHole | ErrorCode::PointNotFound), "{refused:?}");
    let wrong = api.set_retention(&vm1(), &ladder("sometimes")).await.unwrap_err();
    assert_eq!(wrong.code, ErrorCode::Usage);
    receiver.shutdown().await;
}

#[tokio::test]
async fn damage_of_images_is_found_by_fsck_and_by_a_scrub() {
    let place = Place::new();
    let receiver = place.start().await;
    let agent = write_history(&receiver, 6..=95).await;
    let api = client(&receiver);
    rounds(&api, &vm1(), TENS).await;
    drop(agent);
    receiver.shutdown().await;
    let sound = fsck(&place.store(), &mut |_| {}).unwrap();
    assert!(sound.sound, "{sound:?}");
    let pack = files(&place, "pack")[0].clone();
    let mut bytes = fs::read(&pack).unwrap();
    bytes[70_000] ^= 1;
    fs::write(&pack, &bytes).unwrap();
    let report = fsck(&place.store(), &mut |_| {}).unwrap();
    let name = pack.file_name().unwrap().to_str().unwrap();
    assert!(!report.sound && report.disks[0].damage.iter().any(|damage| damage.contains(name)), "{report:?}");
    let receiver = place.start().await;
    let api = client(&receiver);
    let mut status =
        api.scrub(&ScrubRequest { name: None, bytes_per_second_max: Some(ByteCount(0)) }).await.unwrap();
    while status.running {
        status = api.scrub_status().await.unwrap();
    }
    assert!(!status.sound && status.disks[0].damage[0].contains(name), "{status:?}");
    assert!(status.done_bytes <= status.total_bytes);
    receiver.shutdown().await;
    // The base of the log is there twice.
    bytes[70_000] ^= 1;
    fs::write(&pack, &bytes).unwrap();
    let base = place.store().join("disks").join(hello(1, "vm1").disk.to_string()).join("base.2");
    let mut bytes = fs::read(&base).unwrap();
    bytes[50] ^= 1;
    fs::write(&base, &bytes).unwrap();
    let report = fsck(&place.store(), &mut |_| {}).unwrap();
    assert!(report.disks[0].damage[0].contains("base.2"), "{report:?}");
    place.start().await.shutdown().await;
    assert!(fsck(&place.store(), &mut |_| {}).unwrap().sound, "it is written again");
}

pub(crate) fn config(place: &Place, on_full: OnFull) -> Config {
    let retention =
        Retention { on_full, low_bytes: ByteCount(4 << 20), interval_ms: 20, ..Retention::default() };
    Config { retention, ..place.config() }
}

#[tokio::test]
async fn a_store_that_is_nearly_full_says_so_and_shrinks_only_when_told_to() {
    for on_full in [OnFull::Refuse, OnFull::Shrink] {
        let place = Place::new();
        let storage = MemoryStorage::new();
        let receiver =
            Receiver::start_on_storage(std::sync::Arc::new(storage.clone()), config(&place, on_full))
                .await
                .unwrap();
        // All of it lies in the first quarter of the disk: an image is small beside the log.
        let (mut agent, _) = Agent::welcomed(&receiver, hello(1, "vm1")).await;
        agent.first_pass(5).await;
        for lsn in 6..=200 {
            agent.send(&write(lsn, place_in_a_corner(lsn), content(lsn))).await;
        }
        agent.all_durable().await;
        let api = client(&receiver);
        assert_eq!(api.status().await.unwrap().alarms, Vec::<String>::new());
        storage.set_capacity(Some(ByteCount(storage.used().0 + (3 << 20))));
        let status = loop {
            let report = api.retention(None).await.unwrap();
            let status = api.status().await.unwrap();
            // A later look than the one that shrunk it has found room.
            let done = match on_full {
                OnFull::Refuse => report.low.is_some(),
                OnFull::Shrink => report.disks[0].shrunk > 0 && report.low.is_none(),
            };
            if !status.alarms.is_empty() && done {
                break status;
            }
        };
        let report = api.retention(None).await.unwrap();
        let points = api.points(&vm1()).await.unwrap();
        match on_full {
            OnFull::Refuse => {
                assert!(status.alarms[0].contains("nearly full"), "{status:?}");
                assert_eq!(points.first.unwrap().lsn, Lsn(5), "nothing goes");
                assert_eq!(report.disks[0].shrunk, 0);
            }
            OnFull::Shrink => {
                let left = &report.disks[0].every_point_from.as_ref().unwrap().time;
                let said = format!(
                    "promises is gone: every change was to be kept for ever, and those since {} are left",
                    time_text(*left)
                );
                assert!(status.alarms.iter().any(|alarm| alarm.contains(&said)), "{said}: {status:?}");
                assert!(report.disks[0].every_point_from.as_ref().unwrap().lsn > Lsn(5), "{report:?}");
                assert_eq!(points.last.unwrap().lsn, Lsn(200));
                assert!(storage.free_space().unwrap().0 > 4 << 20);
            }
        }
        drop(agent);
        receiver.shutdown().await;
        // It is said as long as it is so, whoever was started since.
        let receiver =
            Receiver::start_on_storage(std::sync::Arc::new(storage.clone()), config(&place, on_full));
        let receiver = receiver.await.unwrap();
        let api = client(&receiver);
        let alarms = api.status().await.unwrap().alarms;
        let told = alarms.iter().any(|alarm| alarm.contains("promises is gone"));
        assert_eq!(told, on_full == OnFull::Shrink, "{alarms:?}");
        if on_full == OnFull::Shrink {
            // Points of 1970 are older than a day.
            api.set_retention(&vm1(), &ladder("any=24h")).await.unwrap();
            let alarms = api.status().await.unwrap().alarms;
            assert!(!alarms.iter().any(|alarm| alarm.contains("promises is gone")), "{alarms:?}");
        }
        receiver.shutdown().await;
    }
}

#[tokio::test]
async fn a_record_of_long_ago_takes_no_newer_history_with_it() {
    let store = Place::new();
    let receiver = store.start().await;
    let mut agent = write_history(&receiver, 6..=95).await;
    let Message::Record(record) = write(96, place(96) as u64, content(96)) else { unreachable!() };
    agent.send(&Message::Record(Record { time: CaptureTime(0), ..record })).await;
    agent.all_durable().await;
    let api = client(&receiver);
    assert_eq!(api.points(&vm1()).await.unwrap().last.unwrap().time, time(95));
    let report = rounds(&api, &vm1(), TENS).await;
    let single: Vec<u64> = report.disks[0].single_points.iter().map(|point| point.lsn.0).collect();
    assert_eq!(single, (1..=9).map(|tens| tens * 10).collect::<Vec<u64>>());
    let mounted = api.mount(&request("lsn:50", None)).await.unwrap();
    assert_content(&store, &mounted, &at(50)).await;
    drop(agent);
    receiver.shutdown().await;
}

#[tokio::test]
async fn history_that_a_mount_holds_is_given_up_once_and_the_alarm_says_why_no_more_goes() {
    let place = Place::new();
    let storage = MemoryStorage::new();
    let config = config(&place, OnFull::Shrink);
    let receiver = Receiver::start_on_storage(std::sync::Arc::new(storage.clone()), config).await.unwrap();
    let (mut agent, _) = Agent::welcomed(&receiver, hello(1, "vm1")).await;
    agent.first_pass(5).await;
    for lsn in 6..=200 {
        agent.send(&write(lsn, place_in_a_corner(lsn), content(lsn))).await;
    }
    agent.all_durable().await;
    let api = client(&receiver);
    let mounted = api.mount(&request("lsn:33", None)).await.unwrap();
    storage.set_capacity(Some(ByteCount(storage.used().0 + (3 << 20))));
    let held = loop {
        let report = api.retention(None).await.unwrap();
        if report.low.as_ref().is_some_and(|low| low.contains("still there")) {
            break report;
        }
    };
    let later = loop {
        let report = api.retention(None).await.unwrap();
        if report.rounds > held.rounds + 3 {
            break report;
        }
    };
    assert_eq!(later.disks[0].shrunk, 1, "{later:?}");
    assert_eq!(later.disks[0].every_point_from, held.disks[0].every_point_from);
    // What is held is there, and not only said to be.
    let mut expected = vec![0; DISK_BYTES as usize];
    for lsn in 6..=33 {
        let at = place_in_a_corner(lsn) as usize;
        expected[at..at + RECORD].copy_from_slice(&content(lsn));
    }
    assert_content(&place, &mounted, &expected).await;
    api.unmount(&mounted.id, None).await.unwrap();
    while api.retention(None).await.unwrap().low.is_some() {}
    assert!(storage.free_space().unwrap().0 > 4 << 20);
    drop(agent);
    receiver.shutdown().await;
}

#[tokio::test]
async fn while_an_overlays_record_cannot_be_read_no_history_goes() {
    let place = Place::new();
    let receiver = place.start().await;
    let agent = write_history(&receiver, 6..=95).await;
    let writable = MountRequest { writable: true, ..request("lsn:52", None) };
    let overlay = client(&receiver).mount(&writable).await.unwrap().id;
    client(&receiver).unmount(&overlay, Some(OverlayFate::Keep)).await.unwrap();
    drop(agent);
    receiver.shutdown().await;
    fs::write(place.store().join("overlays").join(format!("{overlay}.json")), "{").unwrap();
    let receiver = place.start().await;
    let api = client(&receiver);
    let report = rounds(&api, &vm1(), TENS).await;
    let why = report.disks[0].error.clone().unwrap_or_default();
    assert!(why.contains(&format!("above which point overlay {overlay} lies")), "{report:?}");
    assert!(api.points(&vm1()).await.unwrap().holes.is_empty());
    api.discard(&overlay).await.unwrap();
    let report = rounds(&api, &vm1(), TENS).await;
    assert!(report.disks[0].error.is_none() && !report.disks[0].single_points.is_empty(), "{report:?}");
    receiver.shutdown().await;
}

pub(crate) fn place_in_a_corner(lsn: u64) -> u64 {
    (lsn % 4) * RECORD as u64
}

#[tokio::test]
async fn a_receiver_does_not_start_with_a_default_that_is_none() {
    let place = Place::new();
    let mut config = place.config();
    config.retention.default = "a while".to_owned();
    let why = place.refusal(config).await;
    assert!(why.contains("\"a while\" is no retention"), "{why}");
}
