//! When a guest is acknowledged, and what survives then.

use backtide_e2e::{Bench, Daemon, Written};

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

/// How many of its writes a guest was promised, which flushes after every fiftieth.
fn promised(policy: &str, written: &Written) -> usize {
    let answered = written.writes.len();
    match policy {
        // The flush that was not answered promises nothing.
        "durable" if written.unanswered.is_none() => (answered - 1) / 50 * 50,
        "durable" => answered / 50 * 50,
        _ => answered,
    }
}

/// Ends a load under `policy` by `death` at a moment that nobody chose, and looks for what the guest
/// was promised in what the receiver has then.
fn what_was_promised_is_kept(policy: &str, death: impl FnOnce(&Bench, Daemon, Daemon) -> Daemon) {
    let bench = Bench::new();
    let (receiver, agent, disk) = bench.protected(SIZE, &["--ack", policy, "--on-outage", "block"]);
    let before = disk.last();
    let load = disk.load(1);
    let more = 50 + u64::from(std::process::id()) % 97;
    load.goes_on(more);
    let receiver = death(&bench, receiver, agent);
    let written = load.broken();
    let (promised, model) = (promised(policy, &written), written.model());
    let last = disk.points()["last"]["lsn"].as_u64().expect("a point");
    let kept = usize::try_from(last - before).expect("a small number");
    assert!(kept >= promised, "{policy}, after {more} writes: {kept} of {promised} promised are kept");
    disk.point_is_the_model(before, promised, &model);
    drop(receiver);
}

#[test]
fn what_was_promised_survives_the_agents_death_at_any_moment() {
    for policy in ["received", "durable", "durable-every-write"] {
        what_was_promised_is_kept(policy, |_, receiver, agent| {
            agent.kill();
            receiver
        });
    }
}

#[test]
fn what_was_promised_as_durable_survives_the_death_of_both_at_any_moment() {
    for policy in ["durable", "durable-every-write"] {
        what_was_promised_is_kept(policy, |bench, receiver, agent| {
            receiver.kill();
            agent.kill();
            bench.receiver()
        });
    }
}
