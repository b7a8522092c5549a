//! An outage longer than memory lasts: what goes to the spill comes back in order and leaves no hole,
//! whoever dies meanwhile; a full spill is said, and a hole as short as it can be.

use backtide_e2e::{Bench, Daemon, Disk};
use serde_json::Value;

const SIZE: u64 = 64 << 20;

/// Far less than what is written during an outage; the guest is held back to what the spill takes,
/// however slow the disk is that it lies on.
const OPTIONS: [&str; 4] = ["--window", "1MiB", "--guest-delay-max", "1000"];

fn agent(bench: &Bench, size: &str) -> Daemon {
    bench.daemon(&["agent", "run", "--spill-dir", &bench.name("spill"), "--spill-size", size])
}

fn protected<'bench>(bench: &'bench Bench, size: &str) -> (Daemon, Daemon, Disk<'bench>) {
    let (receiver, agent) = (bench.receiver(), agent(bench, size));
    bench.image("vm1.img", SIZE);
    let disk = bench.attach("vm1", "vm1.img", &OPTIONS);
    disk.settle();
    (receiver, agent, disk)
}

fn spilled(status: &Value) -> u64 {
    status["counters"]["spilled_bytes"].as_u64().unwrap()
}

fn more_is_spilled_than_memory_holds(disk: &Disk<'_>) {
    disk.until("it is spilled", |status| {
        assert_eq!(status["mode"], "sync", "{status}");
        spilled(status) > 2 << 20
    });
}

/// What the files in the spill's directory take.
fn files_in(bench: &Bench) -> u64 {
    let disks = std::fs::read_dir(bench.path("spill")).unwrap();
    let files = disks.flat_map(|disk| std::fs::read_dir(disk.unwrap().path()).unwrap());
    files.map(|file| file.unwrap().metadata().unwrap().len()).sum()
}

#[test]
fn an_outage_longer_than_memory_lasts_leaves_no_hole() {
    let bench = Bench::new();
    let (receiver, agent, disk) = protected(&bench, "256MiB");
    let before = disk.last();
    let load = disk.load(1);
    load.goes_on(50);
    receiver.kill();
    disk.until("the stream is lost", |status| status["connected"] == false);
    load.goes_on(200);
    more_is_spilled_than_memory_holds(&disk);
    // 3: the receiver does not have it yet.
    bench.json_ending(3, &["mark", "during", "vm1"]);
    let away = disk.status();
    assert_eq!((&away["mode"], &away["reason_code"]), (&"sync".into(), &"retaining".into()), "{away}");
    assert!(away["spill"]["records"].as_u64() > Some(100), "{away}");
    assert_eq!(away["spill"]["limit"], 256 << 20);
    assert!(bench.plain(&["status", "vm1"]).stdout.contains(" of 256.0 MiB"), "{away}");
    let _receiver = bench.receiver();
    load.goes_on(50);
    let model = load.stop().model();
    disk.latest_is_the_image();
    assert_eq!(disk.holes(), Vec::<Value>::new());
    let status = disk.status();
    assert_eq!(status["counters"]["window_overflows"], 0, "{status}");
    assert!(status["counters"]["unspilled_bytes"].as_u64() > Some(1 << 20), "{status}");
    assert_eq!(disk.last(), before + model.len() as u64, "one LSN for each write");
    for tenth in 0..=5 {
        disk.point_is_the_model(before, model.len() * tenth / 5, &model);
    }
    let marked = disk.restore("mark:during");
    assert!(model.prefix_in(&marked, "the mark") >= 250);
    disk.until("the spill is empty", |status| status["spill"]["bytes"] == 0);
    assert_eq!(files_in(&bench), 0);
    assert_eq!(agent.stop(), 0);
}

#[test]
fn an_agent_killed_in_an_outage_keeps_what_was_spilled() {
    let bench = Bench::new();
    let (receiver, killed, disk) = protected(&bench, "256MiB");
    let before = disk.last();
    let load = disk.load(2);
    load.goes_on(50);
    receiver.kill();
    disk.until("the stream is lost", |status| status["connected"] == false);
    load.goes_on(200);
    more_is_spilled_than_memory_holds(&disk);
    killed.kill();
    let written = load.broken();
    let model = written.model();
    let _agent = agent(&bench, "256MiB");
    let found = disk.status();
    let records = found["spill"]["records"].as_u64().unwrap();
    assert!(records > 100, "{found}");
    let _receiver = bench.receiver();
    disk.latest_is_the_image();
    let holes = disk.holes();
    assert_eq!(holes.len(), 1, "what was written last is a hole: {holes:?}");
    assert_eq!(holes[0]["reason_code"], "agent-crashed", "{holes:?}");
    let after = holes[0]["after_lsn"].as_u64().unwrap() - before;
    assert!(after >= records, "the hole begins behind what was spilled: {after} of {records}");
    // A write whose answer the guest never got may be there.
    let kept = (after as usize).min(model.len());
    for tenth in 0..=5 {
        disk.point_is_the_model(before, kept * tenth / 5, &model);
    }
    disk.qemu_io(&["write -P 0x22 1M 4M"]);
    disk.latest_is_the_image();
}

#[test]
fn an_agent_restarted_in_an_outage_leaves_no_hole() {
    let bench = Bench::new();
    let (receiver, stopped, disk) = protected(&bench, "256MiB");
    let before = disk.last();
    let load = disk.load(3);
    load.goes_on(50);
    receiver.kill();
    disk.until("the stream is lost", |status| status["connected"] == false);
    load.goes_on(200);
    assert_eq!(stopped.stop(), 0);
    let written = load.broken();
    let stopped = agent(&bench, "256MiB");
    let found = disk.status();
    assert_eq!((&found["mode"], &found["dirty"]["blocks"]), (&"sync".into(), &0.into()), "{found}");
    // Once more, and with writes of both in it.
    disk.qemu_io(&["write -P 0x22 1M 256k"]);
    assert_eq!(stopped.stop(), 0);
    let _agent = agent(&bench, "256MiB");
    let _receiver = bench.receiver();
    disk.latest_is_the_image();
    assert_eq!(disk.holes(), Vec::<Value>::new());
    assert_eq!(disk.status()["counters"]["resync_sent_bytes"], 0, "{}", disk.status());
    let model = written.model();
    for tenth in 0..=5 {
        disk.point_is_the_model(before, model.len() * tenth / 5, &model);
    }
}

#[test]
fn a_full_spill_is_said_and_keeps_what_it_has() {
    let bench = Bench::new();
    let (receiver, _agent, disk) = protected(&bench, "1MiB");
    let before = disk.last();
    let load = disk.load(4);
    load.goes_on(50);
    receiver.kill();
    let full = disk.until("tracking", |status| status["mode"] == "tracking");
    assert_eq!(full["reason_code"], "spill-full", "{full}");
    assert!(files_in(&bench) <= 1 << 20, "the limit is kept");
    let records = full["spill"]["records"].as_u64().unwrap();
    assert!(records > 20, "{full}");
    load.goes_on(50);
    let _receiver = bench.receiver();
    disk.wait("sync");
    load.goes_on(20);
    let model = load.stop().model();
    disk.latest_is_the_image();
    let holes = disk.holes();
    assert_eq!(holes.len(), 1, "{holes:?}");
    assert_eq!(holes[0]["reason_code"], "spill-full", "{holes:?}");
    let (after, t) = (holes[0]["after_lsn"].as_u64().unwrap(), holes[0]["before_lsn"].as_u64().unwrap());
    assert!(after >= before + records, "the hole begins behind what was spilled: {holes:?}");
    disk.points_are_prefixes(&[before, after - 10, after, t, t + 1, disk.last()], &model);
}
