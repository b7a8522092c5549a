//! When a guest is acknowledged, and what survives then.

use backtide_e2e::Bench;

const SIZE: u64 = 32 << 20;

#[test]
fn what_was_flushed_durably_survives_receiver_and_agent() {
    let bench = Bench::new();
    let (receiver, agent, disk) = bench.protected(SIZE, &["--ack", "durable"]);
    let before = disk.last();
    disk.qemu_io(&["write -P 0x11 0 1M", "write -P 0x22 4M 1M", "flush"]);
    let flushed = disk.last();
    // Both die at once, and the agent never comes back.
    receiver.kill();
    agent.kill();
    let _receiver = bench.receiver();
    let points = disk.points();
    let last = points["last"]["lsn"].as_u64().unwrap();
    assert!(last >= flushed && flushed > before, "{points}");
    backtide_e2e::tools::assert_same_images(disk.image.as_ref(), &disk.restore("latest"));
}

#[test]
fn every_write_is_durable_when_that_was_asked_for() {
    let bench = Bench::new();
    let (receiver, agent, disk) = bench.protected(SIZE, &["--ack", "durable-every-write"]);
    let before = disk.last();
    let load = disk.load(1);
    load.goes_on(50);
    receiver.kill();
    agent.kill();
    let model = load.broken().model();
    let _receiver = bench.receiver();
    let last = disk.points()["last"]["lsn"].as_u64().unwrap();
    let kept = usize::try_from(last - before).unwrap();
    // With `--on-outage continue` the guest goes on without its receiver, which dies first here.
    assert!(kept >= 50, "{kept} of {} acknowledged writes", model.len());
    disk.point_is_the_model(before, kept.min(model.len()), &model);
}

#[test]
fn a_guest_that_shall_block_waits_for_the_receiver() {
    let bench = Bench::new();
    let options = ["--ack", "durable-every-write", "--on-outage", "block"];
    let (receiver, agent, disk) = bench.protected(SIZE, &options);
    let before = disk.last();
    let load = disk.load(1);
    load.goes_on(50);
    receiver.kill();
    disk.until("the stream is lost", |status| status["connected"] == false);
    // Whatever the guest was told is at the receiver, so the disk of the last point has it all.
    let receiver = bench.receiver();
    load.goes_on(50);
    receiver.kill();
    agent.kill();
    let written = load.broken();
    let model = written.model();
    let _receiver = bench.receiver();
    let last = disk.points()["last"]["lsn"].as_u64().unwrap();
    let kept = usize::try_from(last - before).unwrap();
    assert!(kept >= model.len(), "{kept} of {} acknowledged writes", model.len());
    disk.point_is_the_model(before, model.len(), &model);
}

#[test]
fn a_received_acknowledgement_lets_the_guest_go_on() {
    let bench = Bench::new();
    let (receiver, _agent, disk) = bench.protected(SIZE, &["--ack", "received"]);
    let load = disk.load(1);
    load.goes_on(100);
    receiver.kill();
    load.goes_on(100);
    let _receiver = bench.receiver();
    load.goes_on(100);
    load.stop();
    disk.latest_is_the_image();
}

#[test]
fn a_receiver_that_stands_still_does_not_stop_the_guest() {
    let bench = Bench::new();
    let (receiver, _agent, disk) = bench.protected(SIZE, &["--window", "1MiB"]);
    let load = disk.load(1);
    load.goes_on(20);
    receiver.signal("STOP");
    // Far more than window and socket buffers hold.
    load.goes_on(500);
    assert_ne!(disk.status()["mode"], "sync", "{}", disk.status());
    receiver.signal("CONT");
    disk.wait("sync");
    load.goes_on(20);
    load.stop();
    disk.latest_is_the_image();
    let status = disk.status();
    assert!(status["counters"]["window_overflows"].as_u64() >= Some(1), "{status}");
}

#[test]
fn a_receiver_that_hangs_is_not_waited_for_for_ever() {
    let bench = Bench::new();
    let (receiver, _agent, disk) = bench.protected(SIZE, &["--ack", "durable", "--outage-after", "200"]);
    disk.qemu_io(&["write -P 0x11 0 1M", "flush"]);
    assert_eq!(disk.status()["counters"]["degraded_answers"], 0);
    receiver.signal("STOP");
    // The connection stands, and nothing says that nobody is at its other end.
    disk.qemu_io(&["write -P 0x22 1M 1M", "flush"]);
    let status = disk.status();
    assert!(status["counters"]["degraded_answers"].as_u64() >= Some(1), "{status}");
    receiver.signal("CONT");
    disk.latest_is_the_image();
}
