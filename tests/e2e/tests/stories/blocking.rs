//! A guest that waits for its receiver, as `--on-outage block` has it: that is told, and its disk can be given up.

use std::process::{Child, Command, Stdio};

use backtide_e2e::{Bench, Daemon, Disk, OtherHost};
use serde_json::{Value, json};

const SIZE: u64 = 8 << 20;

/// A guest waits for every write to be durable.
const BLOCK: [&str; 4] = ["--ack", "durable-every-write", "--on-outage", "block"];

/// A client in a process of its own that writes once.
fn client(disk: &Disk<'_>) -> Child {
    let mut command = Command::new("qemu-io");
    command.args(["-f", "raw", "-c", "write -P 0x22 4M 64k", &disk.uri()]).stdout(Stdio::null());
    command.spawn().expect("run qemu-io")
}

/// The disk without its receiver.
fn left_alone(bench: &Bench) -> (Daemon, Disk<'_>) {
    let (receiver, agent, disk) = bench.protected(SIZE, &BLOCK);
    disk.qemu_io(&["write -P 0x11 0 1M", "flush"]);
    receiver.kill();
    disk.until("the stream is lost", |status| status["connected"] == false);
    (agent, disk)
}

fn waits(disk: &Disk<'_>) -> Value {
    disk.until("the guest waits", |status| !status["guest_waits"].is_null())
}

#[test]
fn a_disk_whose_waiting_client_was_killed_is_detached() {
    let bench = Bench::new();
    let (_agent, disk) = left_alone(&bench);
    let mut client = client(&disk);
    let status = waits(&disk);
    assert_eq!(status["guest_waits"]["requests"], 1, "{status}");
    assert_eq!(status["reason_code"], "guest-waits", "{status}");
    let told = bench.plain(&["status", "vm1"]);
    assert!(told.stdout.contains("1 request for the receiver, for "), "{told:?}");
    let busy = bench.run(&["detach", "vm1"]);
    assert_eq!((busy.code, busy.error()["code"].clone()), (5, json!("busy")), "{busy:?}");
    assert!(busy.error()["hint"].to_string().contains("detach vm1 --force"), "{busy:?}");
    client.kill().unwrap();
    client.wait().unwrap();
    let alone = disk.until("the client has gone", |status| status["clients"] == 0);
    assert_eq!(alone["guest_waits"], Value::Null, "nobody waits: {alone}");
    // What it wrote is in the bitmap.
    bench.json_ending(3, &["detach", "vm1"]);
    let _receiver = bench.receiver();
    bench.attach("vm1", "vm1.img", &BLOCK).latest_is_the_image();
}

#[test]
fn a_disk_whose_guest_waits_is_given_up_when_that_is_forced() {
    let bench = Bench::new();
    let (_agent, disk) = left_alone(&bench);
    let load = disk.load(1);
    waits(&disk);
    let forced = bench.run(&["detach", "vm1", "--force"]);
    assert_eq!(forced.code, 3, "{forced:?}");
    assert!(forced.stderr.contains("1 request of the guest that waited"), "{forced:?}");
    let last: Value = serde_json::from_str(&forced.stdout).unwrap();
    assert_eq!(last["guest_waits"]["requests"], 1, "{last}");
    // An answer, in the words of the client's crate, not a connection that just ends.
    let written = load.broken();
    assert!(written.writes.is_empty(), "{written:?}");
    assert_eq!(written.broken.unwrap().to_string(), "other error from device");
    let _receiver = bench.receiver();
    bench.attach("vm1", "vm1.img", &BLOCK).latest_is_the_image();
}

#[test]
fn a_fenced_disk_says_that_its_guest_waits_and_what_to_do() {
    let bench = Bench::new();
    let (_receiver, mut first, disk) = bench.protected(SIZE, &BLOCK);
    let load = disk.load(1);
    load.goes_on(20);
    let (other, _second) = OtherHost::start(&bench);
    first.may_complain("fenced");
    let done = other.failover(&["--yes"]);
    assert_eq!(done.code, 0, "{done:?}");
    disk.until("it is fenced", |status| status["reason_code"] == "fenced");
    let status = waits(&disk);
    assert_eq!(status["reason_code"], "fenced", "{status}");
    assert!(status["reason"].as_str().unwrap().contains("the guest has waited for "), "{status}");
    for command in [&["status", "vm1"][..], &["status"], &["doctor"]] {
        let told = bench.plain(command);
        assert_ne!(told.code, 0, "{command:?}: {told:?}");
        for way in ["detach vm1 --force", "failback vm1", "--take-over"] {
            assert!(told.stdout.contains(way), "{command:?}, {way}: {told:?}");
        }
    }
    assert_eq!(bench.run(&["detach", "vm1"]).code, 5);
    bench.json_ending(3, &["detach", "vm1", "--force"]);
    load.broken();
    other.settle();
}
