//! Pause, resume, forced resyncs: what an operator does, and what the timeline says of it.

use backtide_e2e::Bench;

const SIZE: u64 = 64 << 20;

#[test]
fn a_pause_is_a_hole_that_an_operator_made() {
    let bench = Bench::new();
    let (_receiver, _agent, disk) = bench.protected(SIZE, &[]);
    let before = disk.last();
    let load = disk.load(1);
    load.goes_on(100);
    assert_eq!(bench.json(&["pause", "vm1"])["mode"], "paused");
    load.goes_on(100);
    let paused = disk.status();
    assert_eq!((&paused["mode"], &paused["reason_code"]), (&"paused".into(), &"paused".into()), "{paused}");
    assert!(paused["dirty"]["blocks"].as_u64() > Some(50), "{paused}");
    bench.json(&["resume", "vm1"]);
    disk.wait("sync");
    load.goes_on(100);
    let model = load.stop().model();
    disk.latest_is_the_image();
    let holes = disk.holes();
    assert_eq!(holes.len(), 1, "{holes:?}");
    assert_eq!(holes[0]["reason_code"], "paused");
    let ends = [holes[0]["after_lsn"].as_u64().unwrap(), holes[0]["before_lsn"].as_u64().unwrap()];
    let counts = disk.points_are_prefixes(&[before, ends[0], ends[1], disk.last()], &model);
    // What the receiver had not made durable yet when the stream ended is in the hole too.
    assert!(counts[2] >= counts[1] + 100, "a hundred writes in the pause: {counts:?}");
    assert_eq!((counts[0], counts[3]), (0, model.len()));
}

#[test]
fn a_pause_outlives_the_agent() {
    let bench = Bench::new();
    let (_receiver, agent, disk) = bench.protected(SIZE, &[]);
    bench.json(&["pause", "vm1"]);
    agent.kill();
    let _agent = bench.agent();
    assert_eq!(disk.status()["mode"], "paused");
    disk.qemu_io(&["write -P 0x11 0 1M"]);
    bench.json(&["resume", "vm1"]);
    disk.latest_is_the_image();
}

#[test]
fn forced_resyncs_in_sync_change_nothing_that_can_be_gone_back_to() {
    let bench = Bench::new();
    // No pass gives its moment up because the machine is busy.
    let (_receiver, _agent, disk) = bench.protected(SIZE, &["--guest-delay-max", "10000"]);
    let before = disk.last();
    let load = disk.load(1);
    for kind in [&["--compare"][..], &["--full"], &[]] {
        load.goes_on(100);
        let disk = bench.json(&[&["resync", "vm1", "--wait"], kind].concat());
        assert_eq!((&disk["mode"], &disk["connected"]), (&"sync".into(), &true.into()), "{kind:?}: {disk}");
    }
    load.goes_on(50);
    let model = load.stop().model();
    disk.latest_is_the_image();
    disk.points_are_prefixes(&disk.offered_points(20), &model);
    let every_eighth: Vec<u64> = (before..=disk.last()).step_by(model.len() / 8).collect();
    assert_eq!(disk.holes(), Vec::<serde_json::Value>::new());
    disk.points_are_prefixes(&every_eighth, &model);
}

#[test]
fn a_resync_forced_while_the_receiver_is_away_is_done_when_it_is_back() {
    let bench = Bench::new();
    let (receiver, _agent, disk) = bench.protected(SIZE, &[]);
    disk.qemu_io(&["write -P 0x11 0 4M"]);
    disk.settle();
    receiver.kill();
    disk.until("the stream is lost", |status| status["connected"] == false);
    bench.json(&["resync", "vm1", "--compare"]);
    disk.qemu_io(&["write -P 0x22 8M 4M"]);
    let _receiver = bench.receiver();
    disk.wait("sync");
    assert!(disk.status()["counters"]["passes"].as_u64() >= Some(1), "{}", disk.status());
    disk.latest_is_the_image();
}

#[test]
fn a_detach_says_that_a_compare_is_due() {
    let bench = Bench::new();
    let (receiver, _agent, disk) = bench.protected(SIZE, &[]);
    receiver.kill();
    disk.until("the stream is lost", |status| status["connected"] == false);
    bench.json(&["resync", "vm1", "--compare"]);
    let detached = bench.json_ending(3, &["detach", "vm1"]);
    assert_eq!(detached["resync_due"], true, "{detached}");
}

#[test]
fn a_mark_of_a_disk_that_does_not_forward_is_refused() {
    let bench = Bench::new();
    let (_receiver, _agent, disk) = bench.protected(SIZE, &[]);
    bench.json(&["pause", "vm1"]);
    let said = bench.run(&["mark", "while-paused", "vm1"]);
    assert_eq!(said.code, 5, "{said:?}");
    assert!(said.sentence().contains("vm1"), "{said:?}");
    bench.json(&["resume", "vm1"]);
    disk.wait("sync");
    let said = disk.restore_fails("mark:while-paused");
    assert_eq!(said.code, 4, "{said:?}");
}

#[test]
fn the_resync_rate_is_obeyed_and_shown() {
    let bench = Bench::new();
    let (_receiver, _agent) = (bench.receiver(), bench.agent());
    bench.image("vm1.img", SIZE);
    backtide_e2e::tools::qemu_io(&bench.name("vm1.img"), &["write -P 0x11 0 8M"]);
    let disk = bench.attach("vm1", "vm1.img", &["--resync-rate", "4MiB"]);
    let status = disk.until("a pass with a rate", |status| {
        status["mode"] == "sync" || status["resync"]["done_bytes"].as_u64() > Some(1 << 20)
    });
    assert_eq!(status["mode"], "resync", "8 MiB at 4 MiB a second are not there at once: {status}");
    assert_eq!(status["resync"]["total_bytes"], 8 << 20, "{status}");
    disk.latest_is_the_image();
}
