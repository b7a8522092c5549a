//! The agent dies, or ends in good order: what it knew is in the bitmap, or everything is compared.

use backtide_e2e::{Bench, tools};

const SIZE: u64 = 64 << 20;

#[test]
fn an_agent_killed_under_load_compares_and_loses_nothing() {
    let bench = Bench::new();
    let (_receiver, agent, disk) = bench.protected(SIZE, &[]);
    let before = disk.last();
    let load = disk.load(1);
    load.goes_on(300);
    agent.kill();
    let first = load.broken();
    let agent = bench.agent();
    disk.wait("sync");
    let status = disk.status();
    assert_eq!(status["reason_code"].as_str().map(str::is_empty), Some(false), "{status}");
    assert!(status["counters"]["passes"].as_u64() >= Some(1), "{status}");
    // A point in the middle of what was acknowledged before the crash.
    let model = first.model();
    disk.point_is_the_model(before, 150, &model);
    let load = disk.load(2);
    load.goes_on(100);
    load.stop();
    disk.latest_is_the_image();
    let holes = disk.holes();
    assert!(holes.iter().all(|hole| hole["reason_code"] == "agent-crashed"), "{holes:?}");
    assert_eq!(holes.len(), 1, "the crash is one hole: {holes:?}");
    let kept = holes[0]["after_lsn"].as_u64().unwrap() - before;
    let acknowledged = model.len() as u64;
    assert!(kept <= acknowledged + 1, "{kept} points of {acknowledged} writes");
    if kept <= acknowledged {
        disk.point_is_the_model(before, usize::try_from(kept).unwrap(), &model);
    }
    assert_eq!(agent.stop(), 0);
}

#[test]
fn an_agent_killed_while_the_receiver_is_away_loses_nothing() {
    let bench = Bench::new();
    let (receiver, agent, disk) = bench.protected(SIZE, &["--window", "256KiB", "--guest-delay-max", "0"]);
    let load = disk.load(1);
    load.goes_on(100);
    receiver.kill();
    disk.until("tracking", |status| status["mode"] == "tracking");
    load.goes_on(100);
    agent.kill();
    load.broken();
    let agent = bench.agent();
    let load = disk.load(2);
    load.goes_on(50);
    agent.kill();
    load.broken();
    let _agent = bench.agent();
    let _receiver = bench.receiver();
    disk.latest_is_the_image();
}

#[test]
fn an_agent_ended_in_good_order_sends_only_what_changed() {
    let bench = Bench::new();
    let (receiver, agent) = (bench.receiver(), bench.agent());
    bench.image("vm1.img", SIZE);
    tools::qemu_io(&bench.name("vm1.img"), &["write -P 0x11 0 48M"]);
    let disk = bench.attach("vm1", "vm1.img", &["--window", "256KiB", "--guest-delay-max", "0"]);
    disk.settle();
    receiver.kill();
    disk.until("the stream is lost", |status| status["connected"] == false);
    disk.qemu_io(&["write -P 0x22 1M 4M"]);
    let dirty = disk.until("tracking", |status| status["mode"] == "tracking")["dirty"]["bytes"].as_u64();
    assert_eq!(dirty, Some(4 << 20));
    assert_eq!(agent.stop(), 0);
    let _agent = bench.agent();
    assert_eq!(disk.status()["dirty"]["bytes"], 4 << 20, "the bitmap was saved: {}", disk.status());
    let _receiver = bench.receiver();
    disk.settle();
    let counters = disk.status()["counters"].clone();
    let sent = counters["resync_sent_bytes"].as_u64().unwrap();
    assert!((4 << 20..6 << 20).contains(&sent), "only the changed 4 MiB go again: {counters}");
    disk.latest_is_the_image();
}

#[test]
fn an_agent_restarted_under_load_has_one_timeline() {
    let bench = Bench::new();
    let (_receiver, agent, disk) = bench.protected(SIZE, &[]);
    let before = disk.last();
    let load = disk.load(1);
    load.goes_on(200);
    assert_eq!(agent.stop(), 0);
    let model = load.broken().model();
    let _agent = bench.agent();
    disk.settle();
    assert_eq!(disk.status()["counters"]["resync_sent_bytes"], 0, "everything was there: {}", disk.status());
    disk.point_is_the_model(before, model.len(), &model);
    disk.qemu_io(&["write -P 0x22 1M 4M"]);
    disk.latest_is_the_image();
}

#[test]
fn a_disk_detached_and_attached_again_goes_on_where_it_was() {
    let bench = Bench::new();
    let (receiver, _agent, disk) = bench.protected(SIZE, &["--window", "256KiB", "--guest-delay-max", "0"]);
    disk.qemu_io(&["write -P 0x11 0 16M"]);
    disk.settle();
    let history = disk.status()["history"].clone();
    let uuid = disk.status()["uuid"].clone();
    let detached = bench.json(&["detach", "vm1"]);
    assert_eq!(
        (&detached["mode"], &detached["reason_code"], &detached["connected"]),
        (&"detached".into(), &"detached".into(), &false.into()),
        "{detached}"
    );
    tools::assert_same_images(bench.path("vm1.img").as_ref(), &disk.restore("latest"));

    let disk = bench.attach("vm1", "vm1.img", &["--window", "256KiB", "--guest-delay-max", "0"]);
    disk.settle();
    let status = disk.status();
    assert_eq!((&status["history"], &status["uuid"]), (&history, &uuid));
    assert_eq!(status["counters"]["resync_sent_bytes"], 0, "nothing was missing: {status}");

    // Without the receiver what is missing is in the saved bitmap, and the detach says so.
    receiver.kill();
    disk.until("the stream is lost", |status| status["connected"] == false);
    disk.qemu_io(&["write -P 0x22 20M 2M"]);
    bench.json_ending(3, &["detach", "vm1"]);
    let disk = bench.attach_ending(3, "vm1", "vm1.img", &[]);
    let _receiver = bench.receiver();
    disk.settle();
    let sent = disk.status()["counters"]["resync_sent_bytes"].as_u64().unwrap();
    assert!((2 << 20..3 << 20).contains(&sent), "only what changed: {}", disk.status());
    disk.latest_is_the_image();
}

#[test]
fn an_image_changed_while_detached_is_compared() {
    let bench = Bench::new();
    let (_receiver, _agent, disk) = bench.protected(SIZE, &[]);
    disk.qemu_io(&["write -P 0x11 0 32M"]);
    disk.settle();
    bench.json(&["detach", "vm1"]);
    tools::qemu_io(&disk.image, &["write -P 0x22 10M 1M"]);
    let disk = bench.attach("vm1", "vm1.img", &[]);
    disk.latest_is_the_image();
    let sent = disk.status()["counters"]["resync_sent_bytes"].as_u64().unwrap();
    assert!((1 << 20..2 << 20).contains(&sent), "the compare sends what differs: {}", disk.status());
}
