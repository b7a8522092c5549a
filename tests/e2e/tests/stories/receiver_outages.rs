//! The receiver dies under load: a short outage costs nothing, a long one a hole that says why.

use backtide_e2e::{Bench, tools};

const SIZE: u64 = 64 << 20;

#[test]
fn a_short_outage_under_fio_leaves_no_hole() {
    let bench = Bench::new();
    let (receiver, _agent, disk) = bench.protected(SIZE, &["--window", "64MiB"]);
    let fio = tools::Beside::spawn(tools::fio_verified(&disk.uri(), 24 << 20, 1500));
    let writes = |status: &serde_json::Value| status["counters"]["writes"].as_u64().unwrap();
    disk.until("the guest writes", |status| writes(status) > 500);
    receiver.kill();
    let away = disk.until("the stream is lost", |status| status["connected"] == false);
    disk.until("the guest goes on", |status| writes(status) > writes(&away) + 500);
    assert_eq!(disk.status()["mode"], "sync", "the window lasts: nothing is lost");
    let _receiver = bench.receiver();
    disk.wait("sync");
    fio.succeed();
    disk.latest_is_the_image();
    assert_eq!(disk.holes(), Vec::<serde_json::Value>::new());
    assert_eq!(disk.points()["intervals"].as_array().unwrap().len(), 1);
    let status = disk.status();
    assert_eq!(status["counters"]["window_overflows"], 0, "{status}");
    assert!(status["counters"]["disconnects"].as_u64() >= Some(1), "{status}");
}

#[test]
fn repeated_short_outages_keep_every_point() {
    let bench = Bench::new();
    let (mut receiver, _agent, disk) = bench.protected(SIZE, &["--window", "1GiB"]);
    let before = disk.last();
    let load = disk.load(1);
    for _ in 0..5 {
        load.goes_on(60);
        receiver.kill();
        load.goes_on(60);
        receiver = bench.receiver();
        disk.wait("sync");
    }
    let written = load.stop();
    disk.latest_is_the_image();
    assert_eq!(disk.holes(), Vec::<serde_json::Value>::new());
    let model = written.model();
    assert_eq!(disk.last(), before + model.len() as u64, "one LSN for each write");
    for count in (0..=model.len()).step_by(model.len() / 10) {
        disk.point_is_the_model(before, count, &model);
    }
}

#[test]
fn a_long_outage_is_a_hole_with_a_reason_and_all_around_it_is_exact() {
    let bench = Bench::new();
    let (receiver, _agent, disk) = bench.protected(SIZE, &["--window", "8MiB"]);
    let before = disk.last();
    let load = disk.load(1);
    load.goes_on(200);
    disk.settle();
    receiver.kill();
    disk.until("tracking", |status| status["mode"] == "tracking");
    load.goes_on(200);
    let tracking = disk.status();
    assert_eq!(tracking["reason_code"], "receiver-away", "{tracking}");
    assert!(tracking["dirty"]["blocks"].as_u64() > Some(100), "{tracking}");

    let _receiver = bench.receiver();
    disk.wait("sync");
    load.goes_on(200);
    let model = load.stop().model();
    disk.latest_is_the_image();

    let holes = disk.holes();
    let outages: Vec<_> = holes.iter().filter(|hole| hole["reason_code"] == "receiver-away").collect();
    assert_eq!(outages.len(), 1, "{}", disk.points());
    let outage = outages[0];
    assert_eq!(outage["open"], false);
    let (after, t) = (outage["after_lsn"].as_u64().unwrap(), outage["before_lsn"].as_u64().unwrap());
    // The hole is the outage and nothing more: T is the freeze, everything later is there.
    let last = disk.last();
    let counts = disk.points_are_prefixes(&[before, after - 1, after, t, t + 1, t + 50, last], &model);
    assert_eq!((counts[0], counts[6]), (0, model.len()));
    assert_eq!(counts[2], counts[1] + 1, "one write for each LSN");
    assert_eq!(counts[4], counts[3] + 1, "the first write after the freeze is a point of its own");
    disk.points_are_prefixes(&disk.offered_points(20), &model);
    for lsn in [after + 1, (after + t) / 2, t - 1] {
        let said = disk.restore_fails(&format!("lsn:{lsn}"));
        let error = said.error();
        assert_eq!((said.code, &error["code"]), (4, &"point-in-hole".into()), "{error}");
        assert_eq!(error["details"]["before"]["lsn"], after, "{error}");
        assert_eq!(error["details"]["after"]["lsn"], t, "{error}");
        assert_eq!(error["details"]["hole"]["reason_code"], "receiver-away", "{error}");
        let sentence = said.sentence();
        assert!(sentence.contains(outage["reason"].as_str().unwrap()), "{sentence}");
    }
}

#[test]
fn the_receiver_dies_during_a_resync_and_nothing_offered_is_false() {
    let bench = Bench::new();
    let options = ["--window", "256KiB", "--guest-delay-max", "0", "--resync-buffer", "2MiB"];
    let (mut receiver, _agent, disk) = bench.protected(SIZE, &options);
    let load = disk.load(7);
    for _ in 0..3 {
        load.goes_on(50);
        receiver.kill();
        disk.until("tracking", |status| status["mode"] == "tracking");
        load.goes_on(150);
        receiver = bench.receiver();
        disk.until("a pass", |status| status["mode"] == "resync" || status["mode"] == "sync");
        receiver.kill();
        receiver = bench.receiver();
    }
    disk.wait("sync");
    load.goes_on(50);
    let model = load.stop().model();
    disk.latest_is_the_image();
    let counts = disk.points_are_prefixes(&disk.offered_points(20), &model);
    assert_eq!(counts.last(), Some(&model.len()), "the last point has everything");
}

#[test]
fn a_disk_much_larger_than_all_buffers_is_seeded_and_resynchronized_in_bounded_memory() {
    let bench = Bench::new();
    let (receiver, agent) = (bench.receiver(), bench.agent());
    bench.image("vm1.img", 1 << 30);
    let image = bench.name("vm1.img");
    tools::qemu_io(&image, &["write -P 0x11 0 150M", "write -P 0x22 512M 100M", "write -P 0x33 900M 50M"]);
    let options = ["--window", "4MiB", "--resync-buffer", "2MiB"];
    let disk = bench.attach("vm1", "vm1.img", &options);
    let load = disk.load(3);
    disk.wait("sync");
    load.goes_on(100);
    receiver.kill();
    disk.until("tracking", |status| status["mode"] == "tracking");
    disk.qemu_io(&["write -P 0x44 50M 32M", "write -P 0x55 300M 32M", "write -z 920M 10M"]);
    load.goes_on(100);
    let receiver = bench.receiver();
    disk.wait("sync");
    load.stop();
    disk.latest_is_the_image();
    let mib = |bytes: u64| bytes >> 20;
    assert!(mib(agent.memory_peak()) < 128, "the agent took {} MiB", mib(agent.memory_peak()));
    assert!(mib(receiver.memory_peak()) < 512, "the receiver took {} MiB", mib(receiver.memory_peak()));
}
