//! What a failback trusts: not a receiver that was put back within a pass, nor an image that is not the disk's, nor an epoch that
//! two agents had; and the same command again goes on with what is under way.

use std::path::Path;

use backtide_e2e::{Bench, Daemon, Disk, OtherHost, Relay, http, tools};
use serde_json::{Value, json};

const SIZE: u64 = 64 << 20;
const MIB: u64 = 1 << 20;

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

/// The other host has the disk, writes, and lets go of it.
fn there_and_back(other: &OtherHost<'_>, gone: &[&str]) {
    let gone = match gone {
        ["failover", rest @ ..] => other.failover(rest),
        command => other.run(command),
    };
    assert_eq!(gone.code, 0, "{gone:?}");
    tools::qemu_io(&other.uri(), &["write -P 0x22 40M 64k", "flush"]);
    other.settle();
    assert_eq!(other.run(&["detach", "vm1"]).code, 0);
}

/// The disk here is what it was at the other host.
fn is_what_it_was_there(bench: &Bench, disk: &Disk<'_>) {
    disk.whole();
    tools::assert_same_images(Path::new(&disk.image), &bench.path("b.img"));
    disk.latest_is_the_image();
    assert_eq!(bench.json(&["verify", "vm1"])["differing_count"], 0);
}

/// The receiver is stopped, and begins with the copy of its store.
fn put_back(bench: &Bench, receiver: Daemon) -> Daemon {
    assert_eq!(receiver.stop(), 0);
    tools::run("rm", &["-r", &bench.name("store")]);
    std::fs::rename(bench.path("old"), bench.path("store")).unwrap();
    bench.receiver()
}

/// Copies the receiver's store to `old` within a pass that goes on afterwards, and has come further when this returns. The
/// agent may take a receiver for dead that stands still for the copy; then that was another pass, and it is done again.
fn copied_within_a_pass(bench: &Bench, disk: &Disk<'_>, receiver: &Daemon) {
    let dirty = |status: &Value| status["dirty"]["bytes"].as_u64().unwrap();
    let pass = |status: &Value| status["resync"]["at"].clone();
    loop {
        let begun = disk.until("a pass has begun", |status| status["resync"].is_object());
        let at_first = begun["resync"]["total_bytes"].as_u64().unwrap();
        let came = disk
            .until("something has come", |status| pass(status) != pass(&begun) || dirty(status) < at_first);
        // Its begin is in the copy, so that what is lost is blocks of it, which have no LSN.
        let at = begun["resync"]["at"].as_u64();
        let receivers = || http::call(&bench.path("receiver.sock"), "GET", "/v1/disks", None);
        while receivers()["disks"][0]["durable"].as_u64() < at {}
        receiver.signal("STOP");
        tools::run("cp", &["-a", &bench.name("store"), &bench.name("old")]);
        receiver.signal("CONT");
        bench.json(&["limits", "vm1", "--resync-rate", "512KiB"]);
        let more = disk.until("more has come", |status| {
            pass(status) != pass(&begun) || dirty(status) + 2 * MIB < dirty(&came)
        });
        bench.json(&["limits", "vm1", "--resync-rate", "4096"]);
        if pass(&came) == pass(&begun) && pass(&more) == pass(&begun) {
            return;
        }
        tools::run("rm", &["-r", &bench.name("old")]);
    }
}

#[test]
fn a_receiver_that_was_put_back_within_a_pass_cannot_pass_for_one_that_has_it() {
    let bench = Bench::new();
    let (receiver, mut first, disk) = bench.protected(SIZE, &["--window", "1MiB"]);
    disk.qemu_io(&["write -P 0x11 0 16M", "flush"]);
    disk.settle();
    assert_eq!(receiver.stop(), 0);
    // More than the window keeps: only a pass brings it.
    disk.qemu_io(&["write -P 0x12 0 16M", "flush"]);
    bench.json(&["limits", "vm1", "--resync-rate", "4096"]);
    let mut receiver = bench.receiver();
    first.may_complain("no stream to the receiver");
    copied_within_a_pass(&bench, &disk, &receiver);
    bench.json_ending(3, &["detach", "vm1"]);
    receiver.may_complain("the disk's log");
    let _receiver = put_back(&bench, receiver);
    let (other, _second) = OtherHost::start(&bench);
    there_and_back(&other, &["failover", "--yes"]);
    first.may_complain("everything is compared");
    let report = bench.json(&["failback", "vm1", "--yes"]);
    let why = report["everything_because"].as_str().unwrap_or_else(|| panic!("{report}"));
    assert!(why.contains("had been durable here"), "{why}");
    bench.json(&["limits", "vm1", "--resync-rate", "0"]);
    is_what_it_was_there(&bench, &disk);
}

#[test]
fn an_image_that_is_not_the_one_the_disk_had_is_not_overwritten_unasked() {
    let bench = Bench::new();
    let (_receiver, _first, disk) = bench.protected(SIZE, &[]);
    disk.qemu_io(&["write -P 0x11 0 8M", "flush"]);
    disk.settle();
    bench.json(&["detach", "vm1"]);
    let (other, _second) = OtherHost::start(&bench);
    there_and_back(&other, &["failover", "--yes"]);
    let somebodys = bench.image("c.img", SIZE);
    tools::qemu_io(somebodys.to_str().unwrap(), &["write -P 0x77 0 1M"]);
    for size in [SIZE, SIZE / 2] {
        std::fs::File::options().write(true).open(&somebodys).unwrap().set_len(size).unwrap();
        let at_image = std::fs::read(&somebodys).unwrap();
        std::fs::rename(&disk.image, bench.path("kept.img")).unwrap();
        std::fs::rename(&somebodys, &disk.image).unwrap();
        let said = bench.run(&["failback", "vm1", "--yes"]);
        assert_eq!((said.code, said.error()["code"].clone()), (5, json!("refused")), "{said:?}");
        let shown = said.error()["hint"].as_str().unwrap().contains("--force");
        assert!(shown, "{said:?}");
        assert!(std::fs::read(&disk.image).unwrap() == at_image, "it was not touched");
        std::fs::rename(&disk.image, &somebodys).unwrap();
        std::fs::rename(bench.path("kept.img"), &disk.image).unwrap();
    }
    // With the right one nothing has changed.
    let report = bench.json(&["failback", "vm1", "--yes", "--wait"]);
    assert_eq!(
        (&report["everything_because"], &report["fetched_bytes"]),
        (&Value::Null, &json!(64 << 10)),
        "{report}"
    );
    is_what_it_was_there(&bench, &disk);
    bench.json(&["detach", "vm1"]);
    there_and_back(&other, &["failback", "vm1", "--yes"]);
    std::fs::rename(&somebodys, &disk.image).unwrap();
    let report = bench.json(&["failback", "vm1", "--yes", "--force", "--wait"]);
    let why = report["everything_because"].as_str().unwrap_or_else(|| panic!("{report}"));
    assert!(why.contains("it is not that one"), "{why}");
    is_what_it_was_there(&bench, &disk);
}

/// Of an agent that was killed nobody knows what it had written lately: that is compared by checksums, and stays where it is the
/// same.
#[test]
fn what_may_differ_after_a_crash_and_does_not_is_not_sent() {
    let bench = Bench::new();
    let (_receiver, first, disk) = bench.protected(SIZE, &[]);
    // Extents all over the disk are hot, and everything of them is at the receiver.
    disk.qemu_io(&["write -P 0x11 0 32M", "write -P 0x12 48M 64k", "flush"]);
    disk.settle();
    seen_alive(&bench, &disk);
    first.kill();
    let (other, _second) = OtherHost::start(&bench);
    there_and_back(&other, &["failover", "--yes"]);
    let mut first = bench.agent();
    first.may_complain("another agent has disk vm1");
    first.may_complain("fenced");
    disk.until("it is fenced", |status| status["reason_code"] == "fenced");
    bench.json_ending(3, &["detach", "vm1"]);
    let way = Relay::before(&bench.path("way.sock"), bench.path("stream.sock"));
    let way_there = bench.socket("way.sock");
    let report = bench.json(&["failback", "vm1", "--receiver", &way_there, "--yes", "--wait"]);
    let came = way.bytes_back();
    assert_eq!(report["everything_because"], Value::Null, "{report}");
    let may_differ = report["fetched_bytes"].as_u64().unwrap();
    assert!(may_differ >= 32 * MIB, "{report}");
    // What was written there, as chunks of 64 KiB, and the answers to some hundred questions.
    assert!((64 << 10..MIB).contains(&came), "{came} bytes came, of {may_differ} that may differ");
    is_what_it_was_there(&bench, &disk);
}

#[test]
fn two_agents_with_one_epoch_leave_no_dead_end_and_no_old_image() {
    let bench = Bench::new();
    let (_receiver, first, disk) = bench.protected(SIZE, &[]);
    disk.qemu_io(&["write -P 0x11 0 8M", "flush"]);
    disk.settle();
    assert_eq!(first.stop(), 0);
    // A copy of the first host's state goes on at another one, with a copy of the image.
    let other = OtherHost::new(&bench);
    tools::run("cp", &["-a", &bench.name("state"), &bench.name("b/state")]);
    tools::run("cp", &[&disk.image, &bench.name("b.img")]);
    let record = bench.path("b/state/vm1.json");
    let text = std::fs::read_to_string(&record).unwrap();
    std::fs::write(&record, text.replace(&disk.image, &bench.name("b.img"))).unwrap();
    let mut second = other.agent();
    second.may_complain("everything is compared");
    other.settle();
    tools::qemu_io(&other.uri(), &["write -P 0x22 40M 64k", "flush"]);
    other.settle();
    assert_eq!(other.run(&["detach", "vm1"]).code, 0);
    let mut first = bench.agent();
    first.may_complain("another agent has disk vm1");
    first.may_complain("fenced");
    first.may_complain("everything is compared");
    let fenced = disk.until("it is fenced", |status| status["reason_code"] == "fenced");
    assert_eq!(fenced["epoch"], other_epoch(&bench), "both had it");
    bench.json(&["detach", "vm1"]);
    let report = bench.json(&["failback", "vm1", "--yes", "--wait"]);
    let why = report["everything_because"].as_str().unwrap_or_else(|| panic!("{report}"));
    assert!(why.contains("nobody knows how"), "{why}");
    is_what_it_was_there(&bench, &disk);
}

/// The epoch that the receiver knows.
fn other_epoch(bench: &Bench) -> Value {
    let record = std::fs::read_to_string(bench.path("b/state/vm1.json")).unwrap();
    let record: Value = serde_json::from_str(&record).unwrap();
    record["epoch"].clone()
}

#[test]
fn the_same_command_again_goes_on_with_what_is_under_way() {
    let bench = Bench::new();
    let (_receiver, _first, disk) = bench.protected(SIZE, &["--ack", "durable"]);
    disk.qemu_io(&["write -P 0x11 0 8M", "flush"]);
    disk.settle();
    bench.json(&["limits", "vm1", "--resync-rate", "4096"]);
    bench.json(&["detach", "vm1"]);
    let (other, _second) = OtherHost::start(&bench);
    there_and_back(&other, &["failover", "--yes"]);
    let known = other.run(&["failback", "vm1", "--yes"]);
    assert_eq!(known.code, 5, "nobody has had it since: {known:?}");
    bench.json(&["failback", "vm1", "--yes"]);
    let again = bench.json(&["failback", "vm1"]);
    assert_eq!(
        (&again["here_already"], &again["fetched_bytes"]),
        (&json!(true), &json!(64 << 10)),
        "{again}"
    );
    assert_eq!(again["disk"]["ack"], "durable", "{again}");
    bench.json(&["limits", "vm1", "--resync-rate", "0"]);
    let done = bench.json(&["failback", "vm1", "--wait"]);
    assert_eq!((&done["here_already"], &done["disk"]["hydration"]), (&json!(true), &Value::Null), "{done}");
    is_what_it_was_there(&bench, &disk);

    let early = disk.last();
    disk.qemu_io(&["write -P 0x44 0 1M", "flush"]);
    disk.settle();
    bench.json(&["limits", "vm1", "--resync-rate", "4096"]);
    let to = format!("lsn:{early}");
    let first = bench.json(&["rewind", "vm1", "--to", &to, "--yes"]);
    assert_eq!(first["under_way"], false, "{first}");
    disk.until("a pass has begun", |status| status["resync"].is_object());
    let again = bench.json(&["rewind", "vm1", "--to", &to]);
    assert_eq!((&again["under_way"], &again["from"]), (&json!(true), &first["from"]), "{again}");
    assert_eq!(again["disk"]["epoch"], first["disk"]["epoch"], "nothing was done");
    // What is written from now on is not undone by doing nothing.
    disk.qemu_io(&["write -P 0x55 32M 64k", "flush"]);
    let nobody = || disk.until("nobody has it open", |status| status["clients"] == 0);
    nobody();
    let said = bench.run(&["rewind", "vm1", "--to", &to, "--yes"]);
    assert_eq!((said.code, said.error()["code"].clone()), (5, json!("busy")), "{said:?}");
    assert!(said.sentence().contains("what was written stays"), "{said:?}");
    disk.qemu_io(&["read -P 0x55 32M 64k"]);
    bench.json(&["limits", "vm1", "--resync-rate", "0"]);
    disk.whole();
    nobody();
    let undone = bench.json(&["rewind", "vm1", "--to", &to, "--yes"]);
    assert_eq!(undone["under_way"], false, "{undone}");
    disk.whole();
    tools::assert_same_images(Path::new(&disk.image), &bench.path("b.img"));
}

#[test]
fn a_disk_keeps_its_promise_to_its_guest_wherever_it_goes_on() {
    let bench = Bench::new();
    let (_receiver, _first, disk) = bench.protected(SIZE, &["--ack", "durable", "--on-outage", "block"]);
    disk.qemu_io(&["write -P 0x11 0 1M", "flush"]);
    disk.settle();
    bench.json(&["detach", "vm1"]);
    let (other, _second) = OtherHost::start(&bench);
    let gone = other.failover(&["--yes"]);
    assert_eq!(gone.code, 0, "{gone:?}");
    let promise = || [other.status()["ack"].clone(), other.status()["on_outage"].clone()];
    assert_eq!(promise(), ["durable", "block"]);
    other.settle();
    assert_eq!(other.run(&["detach", "vm1"]).code, 0);
    let (image, stream) = (bench.name("b.img"), bench.socket("stream.sock"));
    let again = other.run(&["attach", "vm1", &image, "--receiver", &stream]);
    assert_eq!(again.code, 0, "{again:?}");
    assert_eq!(promise(), ["durable", "block"], "nobody has said otherwise");
    // Somebody says otherwise there, and the disk takes that along.
    let detached = other.run(&["detach", "vm1"]);
    assert_eq!(detached.code, 0, "{detached:?}");
    let attach =
        ["attach", "vm1", &image, "--receiver", &stream, "--ack", "received", "--on-outage", "continue"];
    let again = other.run(&attach);
    assert_eq!(again.code, 0, "{again:?}");
    other.settle();
    assert_eq!(other.run(&["detach", "vm1"]).code, 0);
    // The receiver may not have heard yet that it let go.
    bench.json(&["failback", "vm1", "--yes", "--force", "--wait"]);
    assert_eq!([&disk.status()["ack"], &disk.status()["on_outage"]], ["received", "continue"]);
}
