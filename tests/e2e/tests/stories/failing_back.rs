//! Back at the first host: the disk goes on there with the image it had, and only what differs travels, whoever dies
//! meanwhile; what was written there without the receiver is overwritten, and every point of both hosts stays.
//!
//! Every kill point of a failback is reached once; `BACKTIDE_KILL_ROUNDS=n` goes through all of them n times.

use std::path::Path;

use backtide_e2e::{Bench, Daemon, Disk, Load, Model, OtherHost, kill_rounds, tools};
use backtide_storage::KillPoint;
use serde_json::{Value, json};

const SIZE: u64 = 64 << 20;
const MIB: u64 = 1 << 20;

/// A load on the disk wherever it is served; what it did is in the model.
fn write(uri: &str, model: &mut Model, seed: u64, count: u64) {
    let load = Load::start(uri, seed);
    load.goes_on(count);
    model.then(load.stop());
}

/// Waits until the agent has noted that it lived after the image was written last: an image that was written long after the
/// last sign of life is trusted by nobody.
fn seen_alive(bench: &Bench, disk: &Disk<'_>) {
    let written = std::fs::metadata(&disk.image).unwrap().modified().unwrap();
    let written = written.duration_since(std::time::UNIX_EPOCH).unwrap().as_micros();
    loop {
        let tracking = std::fs::read(bench.path("state/vm1.tracking")).unwrap();
        let sign = tracking[4096..4104].try_into().unwrap();
        if u128::from(u64::from_le_bytes(sign)) >= written {
            return;
        }
        disk.status();
    }
}

/// The disk is at the other host, which has filled `b.img`, and the first host's agent is back, without it.
fn gone_over<'bench>(
    bench: &'bench Bench,
    disk: &Disk<'_>,
    first: Daemon,
) -> (OtherHost<'bench>, Daemon, Daemon) {
    seen_alive(bench, disk);
    first.kill();
    let (other, second) = OtherHost::start(bench);
    let done = other.failover(&["--yes"]);
    assert_eq!(done.code, 0, "{done:?}");
    let mut first = bench.agent();
    first.may_complain("fenced");
    first.may_complain("another agent has disk vm1");
    disk.until("it is fenced", |status| status["reason_code"] == "fenced");
    (other, second, first)
}

fn bytes(report: &Value, name: &str) -> u64 {
    report[name].as_u64().unwrap_or_else(|| panic!("no {name}: {report}"))
}

#[test]
fn only_what_differs_comes_back() {
    let bench = Bench::new();
    let (_receiver, first, disk) = bench.protected(SIZE, &[]);
    disk.qemu_io(&["write -P 0x11 0 48M", "flush"]);
    disk.settle();
    // What was hot is not any more.
    assert_eq!(first.stop(), 0);
    let first = bench.agent();
    disk.settle();
    disk.qemu_io(&["write -P 0x12 8M 64k", "flush"]);
    disk.settle();
    let (early, at_early) = (disk.last(), bench.path("early.img"));
    std::fs::copy(&disk.image, &at_early).unwrap();
    let (other, second, first) = gone_over(&bench, &disk, first);
    tools::qemu_io(&other.uri(), &["write -P 0x22 20M 1M", "write -z 30M 64k", "flush"]);
    other.settle();
    // A guest of the first host that nobody has told.
    disk.qemu_io(&["write -P 0x33 40M 128k", "flush"]);

    let busy = bench.run(&["failback", "vm1", "--yes"]);
    assert_eq!((busy.code, busy.error()["code"].clone()), (5, json!("busy")), "{busy:?}");
    bench.json_ending(3, &["detach", "vm1"]);
    // The agent that keeps it may be started again, and again.
    assert_eq!(first.stop(), 0);
    let first = bench.agent();
    let connected = bench.run(&["failback", "vm1", "--yes"]);
    assert_eq!((connected.code, connected.error()["code"].clone()), (5, json!("busy")), "{connected:?}");
    // Nobody is fenced for a disk that could not be served here.
    let taken = std::os::unix::net::UnixListener::bind(bench.path("vm1.nbd")).unwrap();
    let unserved = bench.run(&["failback", "vm1", "--yes", "--force"]);
    assert_eq!((unserved.code, unserved.sentence().contains("vm1.nbd")), (5, true), "{unserved:?}");
    assert_eq!(other.status()["connected"], true);
    drop(taken);
    std::fs::remove_file(bench.path("vm1.nbd")).unwrap();
    // Nor for one of which nothing can be kept here.
    first.limit_files("32768");
    let full = bench.run(&["failback", "vm1", "--yes", "--force"]);
    assert_eq!((full.code, full.sentence().contains("in the state directory")), (5, true), "{full:?}");
    assert_eq!(other.status()["connected"], true);
    first.limit_files("unlimited");
    assert_eq!(other.run(&["detach", "vm1"]).code, 0);
    assert_eq!(second.stop(), 0);
    let unasked = bench.run(&["failback", "vm1"]);
    assert_eq!(unasked.code, 2, "{unasked:?}");
    assert!(unasked.stderr.contains("OVERWRITTEN"), "{unasked:?}");

    let report = bench.json(&["failback", "vm1", "--yes", "--wait"]);
    assert_eq!(report["everything_because"], Value::Null, "{report}");
    // What was hot when the first agent died, what the other host wrote, and what was written here since.
    let (hot, there, here) = (4 * MIB, MIB + (64 << 10), 128 << 10);
    let fetched = bytes(&report, "fetched_bytes");
    assert!((there + here..=hot + there + here).contains(&fetched), "{report}");
    assert!(bytes(&report, "lost_bytes") >= here, "{report}");
    assert_eq!(bytes(&report, "kept_bytes"), 48 * MIB - fetched, "{report}");
    disk.whole();
    tools::assert_same_images(Path::new(&disk.image), &bench.path("b.img"));
    disk.latest_is_the_image();
    assert_eq!(bench.json(&["verify", "vm1"])["differing_count"], 0);
    assert_eq!(disk.holes(), Vec::<Value>::new(), "one history without a hole");
    tools::assert_same_images(&at_early, &disk.restore(&format!("lsn:{early}")));
    disk.qemu_io(&["write -P 0x44 0 64k", "flush"]);
    disk.latest_is_the_image();
}

#[test]
fn an_agent_that_comes_up_fenced_still_knows_what_differs() {
    let bench = Bench::new();
    let (_receiver, first, disk) = bench.protected(SIZE, &[]);
    disk.qemu_io(&["write -P 0x11 0 32M", "flush"]);
    disk.settle();
    assert_eq!(first.stop(), 0);
    let first = bench.agent();
    disk.settle();
    let (other, mut second, first) = gone_over(&bench, &disk, first);
    tools::qemu_io(&other.uri(), &["write -P 0x22 20M 1M", "flush"]);
    other.settle();
    // Its agent dies, and ends in good order, and each time a guest has written.
    disk.qemu_io(&["write -P 0x33 4M 64k", "flush"]);
    seen_alive(&bench, &disk);
    first.kill();
    let mut first = bench.agent();
    first.may_complain("another agent has disk vm1");
    disk.qemu_io(&["write -P 0x34 8M 64k", "flush"]);
    assert_eq!(first.stop(), 0);
    let mut first = bench.agent();
    first.may_complain("another agent has disk vm1");
    bench.json_ending(3, &["detach", "vm1"]);
    // The other agent is hung up on, and told so.
    second.may_complain("fenced");
    let report = bench.json(&["failback", "vm1", "--yes", "--force", "--wait"]);
    assert_eq!(report["everything_because"], Value::Null, "{report}");
    let fetched = bytes(&report, "fetched_bytes");
    assert!((MIB + (128 << 10)..16 * MIB).contains(&fetched), "{report}");
    disk.whole();
    tools::assert_same_images(Path::new(&disk.image), &bench.path("b.img"));
    disk.latest_is_the_image();
}

#[test]
fn whoever_dies_in_a_failback_leaves_a_disk_that_comes_back() {
    const SIZE: u64 = 4 << 20;
    // Which step: the first steps leave the disk at the receiver only, the others here.
    let steps = [
        (KillPoint::TakenOver, false),
        (KillPoint::HydrationMade, false),
        (KillPoint::TakenTracking, false),
        (KillPoint::AttachTracking, true),
        (KillPoint::AttachRecord, true),
        (KillPoint::AttachServed, true),
        (KillPoint::HydrationStored, true),
        (KillPoint::HydrationNoted, true),
        (KillPoint::HydrationFinished, true),
    ];
    let bench = Bench::new();
    let (_receiver, mut first, disk) = bench.protected(SIZE, &["--cache", "direct"]);
    let (other, _second) = OtherHost::start(&bench);
    let mut model = Model::of_zeroes(SIZE, Vec::new());
    let mut points = Vec::new();
    let mut seeds = 1..;
    let mut seed = || seeds.next().expect("there are more numbers");
    for (round, (step, is_here)) in (0..kill_rounds(1)).flat_map(|_| steps).enumerate() {
        write(&disk.uri(), &mut model, seed(), 40);
        disk.settle();
        points.push((disk.last(), model.clone()));
        bench.json(&["detach", "vm1"]);
        assert_eq!(first.stop(), 0);
        let gone = match round {
            0 => other.failover(&["--yes"]),
            _ => other.run(&["failback", "vm1", "--yes"]),
        };
        assert_eq!(gone.code, 0, "{gone:?}");
        write(&other.uri(), &mut model, seed(), 40);
        other.settle();
        model.assert_is_in(&bench.path("b.img"), model.len(), "the other host's image");
        assert_eq!(other.run(&["detach", "vm1"]).code, 0);
        let mut doomed = bench.doomed(&["agent", "run"], step.name());
        // It takes its time to begin, and to die.
        while !doomed.is_dead() {
            let said = bench.run(&["failback", "vm1", "--yes"]);
            let told = said.code == 0 || said.code == 6 || said.error()["code"] == "busy";
            assert!(told || doomed.is_dead(), "{}: {said:?}", step.name());
        }
        assert!(doomed.died(), "{} is never reached", step.name());
        first = bench.agent();
        if matches!(step, KillPoint::HydrationMade | KillPoint::TakenTracking) {
            // What the image has would be overwritten, and not become the latest content.
            let stream = bench.socket("stream.sock");
            let kept = bench.run(&["attach", "vm1", &disk.image, "--receiver", &stream, "--take-over"]);
            let told = kept.sentence().contains("a failback of disk vm1 was cut off");
            assert_eq!((kept.code, told), (5, true), "{kept:?}");
        }
        if !is_here {
            let report = bench.json(&["failback", "vm1", "--yes"]);
            // Its tracking file is that of the first attempt by then.
            let why = match step {
                KillPoint::TakenTracking => json!("an earlier failback was cut off"),
                _ => Value::Null,
            };
            assert_eq!(report["everything_because"], why, "{report}");
        }
        disk.whole();
        model.assert_is_in(Path::new(&disk.image), model.len(), step.name());
        assert_eq!(bench.json(&["verify", "vm1"])["differing_count"], 0, "{}", step.name());
    }
    disk.latest_is_the_image();
    for (lsn, model) in points {
        let at = format!("lsn:{lsn}");
        model.assert_is_in(&disk.restore(&at), model.len(), &at);
    }
}

#[test]
fn an_image_that_nobody_can_vouch_for_is_replaced_whole() {
    let bench = Bench::new();
    let (_receiver, mut first, disk) = bench.protected(SIZE, &[]);
    first.may_complain("everything is compared");
    let (other, _second) = OtherHost::start(&bench);
    let absent = other.run(&["failback", "vm1", "--yes"]);
    assert_eq!(absent.code, 4, "{absent:?}");
    disk.qemu_io(&["write -P 0x11 0 8M", "flush"]);
    disk.settle();
    bench.json(&["detach", "vm1"]);
    let own = bench.run(&["failback", "vm1", "--yes"]);
    assert_eq!((own.code, own.error()["code"].clone()), (5, json!("refused")), "{own:?}");
    let spoilt: [&dyn Fn(); 2] = [
        &|| {
            let tracking = bench.path("state/vm1.tracking");
            let mut bytes = std::fs::read(&tracking).unwrap();
            bytes[20] ^= 1;
            std::fs::write(&tracking, bytes).unwrap();
        },
        &|| tools::qemu_io(&disk.image, &["write -P 0x55 12M 64k"]),
    ];
    for (round, spoil) in spoilt.iter().enumerate() {
        let gone = match round {
            0 => other.failover(&["--yes"]),
            _ => other.run(&["failback", "vm1", "--yes"]),
        };
        assert_eq!(gone.code, 0, "{gone:?}");
        tools::qemu_io(&other.uri(), &["write -P 0x22 2M 64k", "write -z 6M 64k", "flush"]);
        other.settle();
        assert_eq!(other.run(&["detach", "vm1"]).code, 0);
        spoil();
        let report = bench.json(&["failback", "vm1", "--yes", "--wait"]);
        assert!(report["everything_because"].is_string(), "{report}");
        assert_eq!(report["kept_bytes"], 0, "{report}");
        disk.whole();
        tools::assert_same_images(Path::new(&disk.image), &bench.path("b.img"));
        disk.latest_is_the_image();
        assert_eq!(bench.json(&["verify", "vm1"])["differing_count"], 0);
        bench.json(&["detach", "vm1"]);
    }
}

#[test]
fn a_receiver_that_was_put_back_to_a_copy_before_cannot_pass_for_one_that_has_everything() {
    let bench = Bench::new();
    let (receiver, mut first, disk) = bench.protected(SIZE, &[]);
    disk.qemu_io(&["write -P 0x11 0 4M", "flush"]);
    disk.settle();
    assert_eq!(receiver.stop(), 0);
    tools::run("cp", &["-a", &bench.name("store"), &bench.name("old")]);
    let receiver = bench.receiver();
    disk.settle();
    disk.qemu_io(&["write -P 0x12 2M 64k", "flush"]);
    disk.settle();
    bench.json(&["detach", "vm1"]);
    assert_eq!(receiver.stop(), 0);
    tools::run("rm", &["-r", &bench.name("store")]);
    std::fs::rename(bench.path("old"), bench.path("store")).unwrap();
    let _receiver = bench.receiver();
    let (other, _second) = OtherHost::start(&bench);
    let gone = other.failover(&["--yes"]);
    assert_eq!(gone.code, 0, "{gone:?}");
    // As many as were lost, and more: their LSNs say nothing of it.
    let load = Load::start(&other.uri(), 1);
    load.goes_on(40);
    load.stop();
    other.settle();
    assert_eq!(other.run(&["detach", "vm1"]).code, 0);
    first.may_complain("everything is compared");
    let report = bench.json(&["failback", "vm1", "--yes", "--wait"]);
    let why = report["everything_because"].as_str().unwrap_or_else(|| panic!("{report}"));
    assert!(why.contains("had been durable here"), "{why}");
    disk.whole();
    tools::assert_same_images(Path::new(&disk.image), &bench.path("b.img"));
    disk.latest_is_the_image();
}
