//! Points, mounts and differences, through the control API and with NBD clients that no one here wrote.

use std::{fs, path::Path, process::Command};

use backtide_log_receiver::Receiver;
use backtide_protocol::{Hello, Message};
use backtide_receiver_api::{
    ApiError, ChangedBy, DiffRequest, ErrorCode, FindChangeRequest, Mount, MountRequest, UnavailablePoint,
};
use backtide_units::{ByteCount, ByteOffset, DiskName, Lsn, Reason};

use crate::{agent::*, fixture::*};

fn vm1() -> DiskName {
    "vm1".parse().unwrap()
}

/// What the disk holds at each point, and at LSN 5 nothing.
pub(crate) struct History {
    pub(crate) at_8: Vec<u8>,
    pub(crate) at_20: Vec<u8>,
    pub(crate) at_21: Vec<u8>,
}

/// LSN 5 to 8 in sync, a hole, a pass at 20, and records from there to 21.
pub(crate) async fn write_history(receiver: &Receiver) -> (Agent, History) {
    let mut image = vec![0; DISK_BYTES as usize];
    let (mut agent, _) = Agent::welcomed(receiver, hello(1, "vm1")).await;
    agent.first_pass(5).await;
    agent.send(&write(6, 0, vec![6; 10_000])).await;
    image[..10_000].fill(6);
    agent.send(&write(7, 1 << 20, vec![7; 1 << 20])).await;
    image[1 << 20..2 << 20].fill(7);
    agent.send(&trim(8, 4096, 4096)).await;
    image[4096..8192].fill(0);
    agent.send(&mark(8, "before the outage")).await;
    agent.send(&Message::Flush { lsn: Lsn(8), time: time(8) }).await;
    let at_8 = image.clone();
    agent.send(&pass_begin(20, 8, Reason::ReceiverAway)).await;
    agent.send(&pass_data(20, 3 << 20, vec![20; 65536])).await;
    image[3 << 20..(3 << 20) + 65536].fill(20);
    agent.send(&pass_end(20)).await;
    let at_20 = image.clone();
    agent.send(&write(21, DISK_BYTES - 512, vec![21; 512])).await;
    image[DISK_BYTES as usize - 512..].fill(21);
    agent.all_durable().await;
    (agent, History { at_8, at_20, at_21: image })
}

pub(crate) fn request(at: &str, nbd: Option<String>) -> MountRequest {
    MountRequest {
        name: vm1(),
        at: at.to_owned(),
        nbd,
        temporary: false,
        writable: false,
        changed_since: None,
    }
}

/// Runs a real client, which must succeed.
fn run(program: &str, package: &str, arguments: &[&str]) -> String {
    let output = Command::new(program)
        .args(arguments)
        .output()
        .unwrap_or_else(|error| panic!("cannot run {program} (Debian package {package}): {error}"));
    let stdout = String::from_utf8_lossy(&output.stdout).into_owned();
    let stderr = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{program} {arguments:?}: {stdout}{stderr}");
    stdout
}

pub(crate) async fn assert_content(place: &Place, mount: &Mount, expected: &[u8]) {
    let (copy, model) = (place.path("copy.img"), place.path("model.img"));
    fs::write(&model, expected).unwrap();
    let uri = mount.uri.clone();
    tokio::task::spawn_blocking(move || {
        let text = |path: &Path| path.to_str().unwrap().to_owned();
        run("nbdcopy", "libnbd-bin", &[&uri, &text(&copy)]);
        assert!(fs::read(&copy).unwrap() == fs::read(&model).unwrap(), "nbdcopy of {uri} differs");
        run("qemu-img", "qemu-utils", &["compare", "-f", "raw", "-F", "raw", &uri, &text(&model)]);
        fs::remove_file(copy).unwrap();
    })
    .await
    .unwrap();
}

/// A client meets damage when it reads all of it.
pub(crate) async fn assert_unreadable(place: &Place, mount: &Mount) {
    let (copy, uri) = (place.path("copy.img"), mount.uri.clone());
    let copied = tokio::task::spawn_blocking(move || {
        Command::new("nbdcopy").arg(uri).arg(copy).output().expect("nbdcopy of libnbd-bin")
    });
    let copied = copied.await.unwrap();
    let said = String::from_utf8_lossy(&copied.stderr).into_owned();
    assert!(!copied.status.success() && said.contains("Input/output error"), "{said}");
}

#[tokio::test(flavor = "multi_thread")]
async fn mounted_points_read_exactly_as_they_were() {
    let place = Place::new();
    let receiver = place.start().await;
    let (mut agent, history) = write_history(&receiver).await;
    let api = client(&receiver);
    let empty = vec![0; DISK_BYTES as usize];
    let points: [(&str, u64, &[u8]); 6] = [
        ("lsn:5", 5, &empty),
        ("lsn:8", 8, &history.at_8),
        ("mark:before the outage", 8, &history.at_8),
        ("1970-01-01T00:00:08Z", 8, &history.at_8),
        ("lsn:20", 20, &history.at_20),
        ("latest", 21, &history.at_21),
    ];
    let mut ids = Vec::new();
    for (number, (at, lsn, content)) in points.iter().enumerate() {
        let mount = api.mount(&request(at, None)).await.unwrap();
        assert_eq!((mount.id.clone(), mount.lsn), (format!("vm1-{}", number + 1), Lsn(*lsn)), "{at}");
        assert_eq!(mount.time, time(*lsn), "{at}");
        assert_content(&place, &mount, content).await;
        ids.push(mount.id);
    }
    // The log grows on; a mounted point does not change.
    for lsn in 22..600 {
        agent.send(&write(lsn, 0, vec![lsn as u8; 8192])).await;
    }
    agent.all_durable().await;
    let mounts = api.mounts().await.unwrap().mounts;
    assert_eq!(mounts.len(), points.len());
    for (mount, (_, _, content)) in mounts.iter().zip(points) {
        assert_content(&place, mount, content).await;
    }
    for id in ids {
        assert_eq!(api.unmount(&id, None).await.unwrap().id, id);
        assert!(!place.path(&format!("run/{id}.sock")).exists());
    }
    assert_eq!(api.unmount("vm1-1", None).await.unwrap_err().code, ErrorCode::NotFound);
    receiver.shutdown().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_mount_is_read_only_sparse_and_where_it_was_asked_for() {
    let place = Place::new();
    let receiver = place.start().await;
    let (_agent, _) = write_history(&receiver).await;
    let socket = place.path("here.sock");
    let uri = format!("nbd+unix:///yesterday?socket={}", socket.display());
    let mount = client(&receiver).mount(&request("lsn:8", Some(uri.clone()))).await.unwrap();
    assert_eq!(mount.uri, uri);
    tokio::task::spawn_blocking(move || {
        let info = run("nbdinfo", "libnbd-bin", &["--json", &uri]);
        let info: serde_json::Value = serde_json::from_str(&info).unwrap();
        let export = &info["exports"][0];
        assert_eq!(export["is_read_only"], true);
        assert_eq!(export["export-size"], DISK_BYTES);
        let map = run("nbdinfo", "libnbd-bin", &["--map", "--json", &uri]);
        let map: Vec<serde_json::Value> = serde_json::from_str(&map).unwrap();
        let data: u64 = map.iter().filter(|e| e["type"] == 0).map(|e| e["length"].as_u64().unwrap()).sum();
        assert!(((1 << 20)..(2 << 20)).contains(&data), "{map:?}");
    })
    .await
    .unwrap();
    receiver.shutdown().await;
}

#[tokio::test]
async fn the_timeline_tells_intervals_holes_and_marks() {
    let place = Place::new();
    let receiver = place.start().await;
    let (mut agent, _) = write_history(&receiver).await;
    let api = client(&receiver);
    let points = api.points(&vm1()).await.unwrap();
    let intervals: Vec<_> = points.intervals.iter().map(|i| (i.from_lsn.0, i.to_lsn.0, i.open)).collect();
    assert_eq!(intervals, [(5, 8, false), (20, 21, true)]);
    let hole = points.holes.last().unwrap();
    assert_eq!((hole.after_lsn, hole.before_lsn, hole.open), (Lsn(8), Some(Lsn(20)), false));
    assert_eq!((hole.from_time, hole.to_time), (time(8), Some(time(20))));
    assert_eq!(hole.reason_code, "receiver-away");
    assert_eq!(hole.reason, Reason::ReceiverAway.to_string());
    let mark = &points.marks[0];
    assert_eq!((mark.label.as_str(), mark.lsn, mark.recoverable), ("before the outage", Lsn(8), true));
    assert_eq!((points.flush_points.count, points.flush_points.last.unwrap().lsn), (1, Lsn(8)));
    assert_eq!((points.first.unwrap().lsn, points.last.unwrap().lsn), (Lsn(5), Lsn(21)));

    // While a pass is open its hole is, and none of its points is offered.
    agent.send(&pass_begin(40, 21, Reason::LinkTooSlow)).await;
    agent.all_durable().await;
    let points = api.points(&vm1()).await.unwrap();
    let hole = points.holes.last().unwrap();
    assert_eq!((hole.after_lsn, hole.open, hole.reason_code.as_str()), (Lsn(21), true, "link-too-slow"));
    assert!(!points.intervals.last().unwrap().open);
    assert_eq!(api.resolve(&vm1(), "latest").await.unwrap().lsn, Lsn(21));
    receiver.shutdown().await;
}

fn details(error: &ApiError) -> UnavailablePoint {
    serde_json::from_value(error.details.clone().unwrap()).unwrap()
}

#[tokio::test]
async fn a_point_that_cannot_be_had_says_why_and_what_can() {
    let place = Place::new();
    let receiver = place.start().await;
    let (_agent, _) = write_history(&receiver).await;
    let api = client(&receiver);

    let error = api.mount(&request("lsn:12", None)).await.unwrap_err();
    assert_eq!(error.code, ErrorCode::PointInHole);
    assert!(error.message.contains("the receiver was away longer than"), "{error}");
    let around = details(&error);
    assert_eq!((around.before.unwrap().lsn, around.after.unwrap().lsn), (Lsn(8), Lsn(20)));
    assert_eq!(around.hole.unwrap().reason_code, "receiver-away");

    let error = api.resolve(&vm1(), "lsn:99").await.unwrap_err();
    assert_eq!(error.code, ErrorCode::PointNotFound);
    assert_eq!(details(&error).before.unwrap().lsn, Lsn(21));
    assert_eq!(api.resolve(&vm1(), "mark:nowhere").await.unwrap_err().code, ErrorCode::PointNotFound);
    assert_eq!(api.resolve(&vm1(), "yesterday").await.unwrap_err().code, ErrorCode::Usage);

    let error = api.points(&"vm2".parse().unwrap()).await.unwrap_err();
    assert_eq!((error.code, error.hint.as_deref()), (ErrorCode::NotFound, Some("the receiver keeps vm1")));
    let uuid = hello(1, "vm1").disk.to_string().parse().unwrap();
    assert_eq!(api.resolve(&uuid, "lsn:8").await.unwrap().disk.name, vm1());
    receiver.shutdown().await;
}

#[tokio::test]
async fn what_changed_between_two_points() {
    let place = Place::new();
    let receiver = place.start().await;
    let (_agent, _) = write_history(&receiver).await;
    let api = client(&receiver);
    let diff = |from: &str, to: &str| DiffRequest { from: from.to_owned(), to: to.to_owned() };
    let forth = api.diff(&vm1(), &diff("lsn:8", "latest")).await.unwrap();
    let ranges: Vec<_> = forth.ranges.iter().map(|span| (span.offset.0, span.length.0)).collect();
    assert_eq!(ranges, [(3 << 20, 65536), (DISK_BYTES - 4096, 4096)]);
    assert_eq!((forth.granularity.0, forth.bytes.0), (4096, 65536 + 4096));
    let back = api.diff(&vm1(), &diff("latest", "lsn:8")).await.unwrap();
    assert_eq!(back.ranges, forth.ranges);
    assert!(api.diff(&vm1(), &diff("lsn:8", "lsn:8")).await.unwrap().ranges.is_empty());
    receiver.shutdown().await;
}

#[tokio::test]
async fn damage_is_an_error_with_its_place_and_never_data() {
    let place = Place::new();
    let receiver = place.start().await;
    let (mut agent, _) = write_history(&receiver).await;
    // Sealed and left behind, so that nothing of it is in memory.
    for lsn in 22..600 {
        agent.send(&write(lsn, 0, vec![lsn as u8; 8192])).await;
    }
    agent.all_durable().await;
    let segments = place.store().join("disks").join(hello(1, "vm1").disk.to_string()).join("segments");
    for entry in fs::read_dir(segments).unwrap() {
        let path = entry.unwrap().path();
        let mut content = fs::read(&path).unwrap();
        if let Some(at) = content.windows(4096).position(|window| window == [20; 4096]) {
            content[at + 100] ^= 1;
            fs::write(&path, content).unwrap();
        }
    }
    let mount = client(&receiver).mount(&request("lsn:20", None)).await.unwrap();
    let output = tokio::task::spawn_blocking(move || {
        Command::new("nbdcopy").args([&mount.uri, "null:"]).output().unwrap()
    })
    .await
    .unwrap();
    assert!(!output.status.success());
    let text = String::from_utf8_lossy(&output.stderr);
    assert!(text.contains("Input/output error"), "{text}");
    receiver.shutdown().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn mounts_are_bounded_and_an_address_in_use_is_named() {
    let place = Place::new();
    let mut config = place.config();
    config.limits.mounts = 2;
    let receiver = Receiver::start(config).await.unwrap();
    let (_agent, history) = write_history(&receiver).await;
    let api = client(&receiver);
    let first = api.mount(&request("lsn:8", None)).await.unwrap();
    let error = api.mount(&request("lsn:20", Some(first.uri.clone()))).await.unwrap_err();
    assert_eq!(error.code, ErrorCode::Busy);
    assert!(error.message.contains("vm1-1.sock is in use"), "{error}");
    let uri = format!("nbd+unix:///twenty?socket={}", place.path("twenty.sock").display());
    let twenty = api.mount(&request("lsn:20", Some(uri))).await.unwrap();
    let error = api.mount(&request("latest", None)).await.unwrap_err();
    assert_eq!(
        (error.code, error.message.as_str()),
        (ErrorCode::Busy, "the receiver has its limit of 2 mounts")
    );
    assert_content(&place, &twenty, &history.at_20).await;
    assert_eq!(api.unmount(&twenty.id, None).await.unwrap().id, "vm1-3");
    api.mount(&request("latest", None)).await.unwrap();
    receiver.shutdown().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_temporary_mount_ends_with_its_client() {
    let place = Place::new();
    let receiver = place.start().await;
    let (_agent, _) = write_history(&receiver).await;
    let api = client(&receiver);
    let kept = api.mount(&request("latest", None)).await.unwrap();
    let mount = api.mount(&MountRequest { temporary: true, ..request("latest", None) }).await.unwrap();
    let nbd = backtide_export::Client::connect(&mount.uri.parse().unwrap()).await.unwrap();
    while api.mounts().await.unwrap().mounts.iter().any(|found| found.clients == 0 && found.id == mount.id) {}
    drop(nbd);
    while api.mounts().await.unwrap().mounts.len() > 1 {}
    assert_eq!(api.mounts().await.unwrap().mounts[0].id, kept.id, "others stay");
    receiver.shutdown().await;
}

#[tokio::test]
async fn a_mount_of_a_disk_that_has_grown_tells_the_size_it_serves() {
    let place = Place::new();
    let receiver = place.start().await;
    let (mut agent, first) = Agent::welcomed(&receiver, hello(1, "vm1")).await;
    agent.first_pass(5).await;
    agent.all_durable().await;
    let size = ByteCount(DISK_BYTES * 2);
    let grown = Hello { history: Some(first.history), size, next_lsn: Lsn(6), ..hello(1, "vm1") };
    let (mut agent, _) = Agent::welcomed(&receiver, grown).await;
    agent.send(&write(6, DISK_BYTES, vec![6; 4096])).await;
    agent.all_durable().await;
    let api = client(&receiver);
    for (at, expected) in [("lsn:5", ByteCount(DISK_BYTES)), ("lsn:6", size)] {
        let mount = api.mount(&request(at, None)).await.unwrap();
        assert_eq!((mount.size, mount.disk.size), (expected, size), "{at}");
    }
    receiver.shutdown().await;
}

#[tokio::test]
async fn the_last_change_of_a_block_is_found_with_the_point_before_it() {
    let place = Place::new();
    let receiver = place.start().await;
    let (_agent, _) = write_history(&receiver).await;
    let api = client(&receiver);
    let find = async |offset: u64, at: &str| {
        let request = FindChangeRequest { offset: ByteOffset(offset), at: at.to_owned() };
        api.find_change(&vm1(), &request).await
    };
    let told = async |offset: u64, at: &str| {
        let change = find(offset, at).await.unwrap().change?;
        Some((change.lsn.0, change.time, change.by, change.before.map(|before| before.lsn.0)))
    };
    let write = ChangedBy::Write;
    assert_eq!(told(0, "latest").await, Some((6, time(6), write, Some(5))));
    assert_eq!(told(5000, "latest").await, Some((8, time(8), write, Some(7))), "a trim is a change");
    assert_eq!(told(5000, "lsn:7").await, Some((6, time(6), write, Some(5))));
    assert_eq!(told(5000, "lsn:5").await, None);
    assert_eq!(told(3 << 20, "latest").await.map(|told| (told.0, told.2)), Some((20, ChangedBy::Resync)));
    assert_eq!(told(3 << 20, "latest").await.unwrap().3, Some(8), "the hole is between");
    assert_eq!(told(3 << 20, "lsn:8").await, None);
    assert_eq!(told(DISK_BYTES - 1, "latest").await, Some((21, time(21), write, Some(20))));
    assert_eq!(told(2 << 20, "latest").await, None, "never written");
    let block = find(DISK_BYTES - 1, "latest").await.unwrap().block;
    assert_eq!((block.offset.0, block.length.0), (DISK_BYTES - 4096, 4096));
    assert_eq!(find(DISK_BYTES, "latest").await.unwrap_err().code, ErrorCode::Usage);
    assert_eq!(find(0, "lsn:12").await.unwrap_err().code, ErrorCode::PointInHole);
    receiver.shutdown().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn foreign_tools_read_what_changed_between_two_points() {
    let place = Place::new();
    let receiver = place.start().await;
    let (_agent, _) = write_history(&receiver).await;
    let api = client(&receiver);
    let mounted =
        |at: &str, since: &str| MountRequest { changed_since: Some(since.to_owned()), ..request(at, None) };
    let refused = MountRequest { writable: true, ..mounted("latest", "lsn:8") };
    assert_eq!(api.mount(&refused).await.unwrap_err().code, ErrorCode::Usage);
    assert_eq!(api.mount(&mounted("latest", "lsn:12")).await.unwrap_err().code, ErrorCode::PointInHole);
    let mount = api.mount(&mounted("latest", "lsn:8")).await.unwrap();
    let context = mount.changed_since.clone().unwrap().context;
    assert_eq!(context, "qemu:dirty-bitmap:vm1");
    let back = api.mount(&mounted("lsn:6", "lsn:8")).await.unwrap();
    let maps = tokio::task::spawn_blocking(move || {
        let dirty = |map: &str, kind: &dyn Fn(&serde_json::Value) -> bool| -> Vec<(u64, u64)> {
            let map: Vec<serde_json::Value> = serde_json::from_str(map).unwrap();
            let number = |extent: &serde_json::Value, name: &str| extent[name].as_u64().unwrap();
            let dirty = map.iter().filter(|extent| kind(extent));
            dirty.map(|e| (number(e, "offset").max(number(e, "start")), number(e, "length"))).collect()
        };
        let info = |uri: &str| {
            let map = run("nbdinfo", "libnbd-bin", &[&format!("--map={context}"), "--json", uri]);
            dirty(&map.replace("\"offset\"", "\"start\": 0, \"offset\""), &|extent| extent["type"] == 1)
        };
        let both = run("nbdinfo", "libnbd-bin", &["--list", &mount.uri]);
        assert!(both.contains("base:allocation") && both.contains(&context), "{both}");
        let socket = mount.uri.split("socket=").nth(1).unwrap();
        let options = format!(
            "driver=nbd,export={},server.type=unix,server.path={socket},x-dirty-bitmap={context}",
            mount.id
        );
        let map = run("qemu-img", "qemu-utils", &["map", "--output=json", "--image-opts", &options]);
        let qemu = dirty(&map.replace("\"start\"", "\"offset\": 0, \"start\""), &|e| e["data"] == false);
        (info(&mount.uri), qemu, info(&back.uri))
    })
    .await
    .unwrap();
    let changed = vec![(3 << 20, 65536), (DISK_BYTES - 4096, 4096)];
    assert_eq!((maps.0, maps.1), (changed.clone(), changed));
    // To an older point, too: a MiB was written, and a block discarded.
    assert_eq!(maps.2, [(4096, 4096), (1 << 20, 1 << 20)]);
    receiver.shutdown().await;
}

#[tokio::test]
async fn the_last_flush_point_that_is_told_is_a_point() {
    let place = Place::new();
    let receiver = place.start().await;
    let (mut agent, _) = Agent::welcomed(&receiver, hello(1, "vm1")).await;
    agent.first_pass(5).await;
    agent.send(&write(6, 0, vec![6; 4096])).await;
    agent.send(&Message::Flush { lsn: Lsn(6), time: time(6) }).await;
    // One that was submitted while nothing was forwarded ends when the next pass has begun.
    agent.send(&pass_begin(20, 6, Reason::LinkTooSlow)).await;
    agent.send(&Message::Flush { lsn: Lsn(10), time: time(10) }).await;
    agent.send(&pass_end(20)).await;
    agent.all_durable().await;
    let api = client(&receiver);
    let points = api.points(&vm1()).await.unwrap();
    assert_eq!(points.flush_points.last.map(|last| last.lsn), Some(Lsn(6)), "{points:?}");
    assert_eq!(points.flush_points.count, 2);
    drop(agent);
    receiver.shutdown().await;
}
