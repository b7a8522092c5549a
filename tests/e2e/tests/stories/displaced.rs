//! The image's path leads to another file, or to none, while the agent has it: that is told, the agent does not let go
//! of the guest's data unasked, and nothing that was known of the one file is believed of the other.

use std::{fs, path::Path};

use backtide_e2e::{Bench, Disk, nbd_wire::Connection, tools};
use serde_json::Value;

const SIZE: u64 = 16 << 20;

/// What the guest wrote to the file that has lost its name.
const WRITTEN: &str = "write -P 0x22 0 1M";

fn read(disk: &Disk<'_>, pattern: &str) {
    disk.qemu_io(&[&format!("read -P {pattern} 0 1M")]);
}

/// A copy of the image takes its name; the guest goes on with the old one.
fn replaced(disk: &Disk<'_>) {
    disk.qemu_io(&["write -P 0x11 0 1M", "flush"]);
    disk.settle();
    let copy = format!("{}.copy", disk.image);
    tools::run("cp", &[&disk.image, &copy]);
    fs::rename(&copy, &disk.image).unwrap();
    disk.qemu_io(&[WRITTEN, "flush"]);
    disk.settle();
}

fn error_of(status: &Value) -> &str {
    status["local_error"].as_str().unwrap_or_default()
}

/// Whatever would let go of the file is refused, and the disk goes on.
fn is_not_let_go_of(bench: &Bench, disk: &Disk<'_>, why: &str) {
    disk.until("it is told", |status| error_of(status).contains(why));
    for command in
        [&["detach", "vm1"][..], &["agent", "restart"], &["resize", "vm1", "--size", "32MiB", "--reconnect"]]
    {
        let refused = bench.run(command);
        assert_eq!(refused.code, 5, "{command:?}: {refused:?}");
        assert!(refused.sentence().contains(why), "{command:?}: {refused:?}");
    }
    assert!(bench.run(&["doctor"]).code != 0);
    read(disk, "0x22");
}

#[test]
fn an_image_that_is_replaced_is_kept_open_and_the_other_is_not_believed() {
    let bench = Bench::new();
    let (_receiver, mut agent, disk) = bench.protected(SIZE, &[]);
    agent.may_complain("is not where it was");
    replaced(&disk);
    is_not_let_go_of(&bench, &disk, "is another file than the one in use");
    let refused = bench.run(&["rewind", "vm1", "--to", "latest", "--yes"]);
    assert_ne!(refused.code, 0, "{refused:?}");
    // An agent that ends has no choice. The next one looks at what is there now.
    let before = disk.last();
    assert_eq!(agent.stop(), 0);
    let _agent = bench.agent();
    disk.settle();
    read(&disk, "0x11");
    disk.latest_is_the_image();
    // What was written to the old file is in the history.
    let restored = disk.restore(&format!("lsn:{before}"));
    tools::qemu_io(restored.to_str().unwrap(), &["read -P 0x22 0 1M"]);
}

#[test]
fn an_image_that_is_replaced_and_put_back_is_as_it_was() {
    let bench = Bench::new();
    let (_receiver, mut agent, disk) = bench.protected(SIZE, &[]);
    agent.may_complain("is not where it was");
    let kept = format!("{}.kept", disk.image);
    fs::rename(&disk.image, &kept).unwrap();
    disk.qemu_io(&[WRITTEN, "flush"]);
    is_not_let_go_of(&bench, &disk, "was deleted while it is in use");
    fs::rename(&kept, &disk.image).unwrap();
    disk.until("it is well", |status| error_of(status).is_empty());
    bench.json(&["agent", "restart"]);
    disk.wait("sync");
    read(&disk, "0x22");
    assert_eq!(disk.status()["counters"]["resync_sent_bytes"], 0, "nothing had to be looked at");
}

#[test]
fn a_killed_agents_image_that_was_replaced_is_compared() {
    let bench = Bench::new();
    let (_receiver, mut agent, disk) = bench.protected(SIZE, &[]);
    agent.may_complain("is not where it was");
    replaced(&disk);
    disk.until("it is told", |status| !error_of(status).is_empty());
    agent.kill();
    let _agent = bench.agent();
    disk.settle();
    read(&disk, "0x11");
    disk.latest_is_the_image();
}

#[test]
fn a_detach_by_force_gives_the_file_up_and_the_next_attach_compares() {
    let bench = Bench::new();
    let (_receiver, mut agent, disk) = bench.protected(SIZE, &[]);
    agent.may_complain("is not where it was");
    replaced(&disk);
    disk.until("it is told", |status| !error_of(status).is_empty());
    let detached = bench.json_ending(3, &["detach", "vm1", "--force"]);
    assert_eq!(
        detached["resync_due"], true,
        "what is in the image's place now is to be compared: {detached}"
    );
    let image = disk.image.clone();
    let disk = bench.attach("vm1", Path::new(&image).file_name().unwrap().to_str().unwrap(), &[]);
    disk.settle();
    read(&disk, "0x11");
    disk.latest_is_the_image();
}

/// A QEMU that has the image itself open, at this socket.
fn past_the_agent(bench: &Bench, disk: &Disk<'_>, more: &[&str]) -> tools::Beside {
    let socket = bench.name("past-the-agent.sock");
    let _ = fs::remove_file(&socket);
    let arguments = [&["-f", "raw", "-t", "-k", &socket][..], more, &[&disk.image]].concat();
    let server = tools::Beside::start("qemu-nbd", &arguments);
    tools::wait_for_socket(socket.as_ref());
    server
}

/// Past the agent, which does not see what is written.
fn write_past_the_agent(bench: &Bench) {
    let uri = format!("nbd+unix:///?socket={}", bench.name("past-the-agent.sock"));
    tools::qemu_io(&uri, &["write -P 0x33 1M 1M", "flush"]);
}

/// Nothing is to be in the way of giving the file back, so it is not refused.
#[test]
fn a_qemu_that_has_the_image_itself_open_is_told() {
    let bench = Bench::new();
    let (_receiver, _agent, disk) = bench.protected(SIZE, &[]);
    assert_eq!(error_of(&disk.status()), "");
    let reader = past_the_agent(&bench, &disk, &["-r"]);
    assert_eq!(bench.run(&["doctor"]).code, 0, "who only reads it does no harm");
    drop(reader);
    let writer = past_the_agent(&bench, &disk, &[]);
    let told = disk.until("it is told", |status| !error_of(status).is_empty());
    assert!(error_of(&told).contains("a QEMU has the image itself open"), "{told}");
    let marked = bench.run(&["mark", "here", "vm1"]);
    assert_eq!(marked.code, 5, "it is no point: {marked:?}");
    assert!(marked.sentence().contains("written past the agent"), "{marked:?}");
    assert!(bench.run(&["doctor"]).stdout.contains("a QEMU has the image itself open"));
    write_past_the_agent(&bench);
    let detached = bench.json_ending(3, &["detach", "vm1"]);
    assert_eq!(detached["resync_due"], true, "{detached}");
    let attached = bench.attach_ending(3, "vm1", "vm1.img", &[]);
    assert!(!error_of(&attached.status()).is_empty());
    drop(writer);
    attached.until("nobody has it any more", |status| error_of(status).is_empty());
    attached.settle();
    attached.latest_is_the_image();
}

/// What the guest writes meanwhile is not sent: the newest point from before is not the disk.
#[test]
fn a_time_while_a_qemu_writes_past_the_agent_is_in_a_hole_at_once() {
    let bench = Bench::new();
    let (_receiver, _agent, disk) = bench.protected(SIZE, &[]);
    disk.qemu_io(&["write -P 0x11 0 1M", "flush"]);
    disk.settle();
    let writer = past_the_agent(&bench, &disk, &[]);
    disk.until("the receiver has heard of it", |status| {
        status["reason_code"] == "written-past-agent" && status["window"]["bytes"] == 0
    });
    disk.qemu_io(&["write -P 0x22 0 1M", "flush"]);
    let status = disk.status();
    assert_eq!((&status["connected"], &status["open_elsewhere"]), (&true.into(), &true.into()), "{status}");
    let hole = disk.holes().pop().unwrap();
    assert_eq!((&hole["reason_code"], &hole["open"]), (&"written-past-agent".into(), &true.into()), "{hole}");
    let refused = disk.restore_fails("-0s");
    assert_eq!(refused.error()["code"], "point-in-hole", "{refused:?}");
    let points = bench.plain(&["points", "vm1"]);
    assert!(!points.stdout.contains("growing"), "{points:?}");
    drop(writer);
    disk.until("it is compared", |status| error_of(status).is_empty());
    disk.settle();
    disk.latest_is_the_image();
    assert!(bench.plain(&["points", "vm1"]).stdout.contains("growing"));
}

/// It waits for them to go, and for the comparison, whatever the receiver says.
#[test]
fn a_guest_that_waits_while_a_qemu_writes_past_the_agent_is_told_what_for() {
    let bench = Bench::new();
    let block = ["--ack", "durable-every-write", "--on-outage", "block"];
    let (_receiver, _agent, disk) = bench.protected(SIZE, &block);
    let writer = past_the_agent(&bench, &disk, &[]);
    disk.until("it is told", |status| status["reason_code"] == "written-past-agent");
    let uri = disk.uri();
    let guest = tools::Beside::start("qemu-io", &["-f", "raw", "-c", "write -P 0x22 4M 64k", &uri]);
    let waits = disk.until("it has waited", |status| status["guest_waits"]["seconds"].as_f64() >= Some(10.0));
    let reason = waits["reason"].as_str().unwrap();
    assert!(reason.contains("until nobody else has the image open and everything was compared"), "{waits}");
    let told = bench.plain(&["status", "vm1"]);
    assert_eq!(told.code, 3, "{told:?}");
    assert!(told.stdout.contains("shut down the program that has "), "{told:?}");
    assert!(!told.stdout.contains("said nothing") && !told.stdout.contains("answers;"), "{told:?}");
    for wait in [&["resync", "vm1", "--compare", "--wait"][..], &["resync", "vm1"]] {
        let refused = bench.run(wait);
        assert_eq!(refused.code, 5, "{wait:?}: {refused:?}");
        assert!(refused.sentence().contains("a QEMU has its image itself open"), "{refused:?}");
    }
    drop(writer);
    guest.succeed();
    disk.settle();
    disk.latest_is_the_image();
}

/// As long as a guest is there the file's time tells nothing, and it does not when the QEMU has gone.
#[test]
fn what_a_qemu_wrote_past_the_agent_is_compared_when_it_has_let_go_of_the_image() {
    let bench = Bench::new();
    let (_receiver, _agent, disk) = bench.protected(SIZE, &[]);
    disk.qemu_io(&["write -P 0x11 0 1M", "flush"]);
    disk.settle();
    let before = disk.last();
    disk.qemu_io(&["write -P 0x22 0 1M", "flush"]);
    disk.settle();
    let guest = Connection::open(&disk.uri());
    let writer = past_the_agent(&bench, &disk, &[]);
    write_past_the_agent(&bench);
    disk.until("it is told", |status| !error_of(status).is_empty());
    let rewind = ["rewind", "vm1", "--to", &format!("lsn:{before}"), "--yes"];
    drop(guest);
    disk.until("the guest has gone", |status| status["clients"] == 0);
    let refused = bench.run(&rewind);
    assert_eq!(refused.code, 5, "{refused:?}");
    assert!(refused.sentence().contains("a QEMU has the image itself open"), "{refused:?}");
    let guest = Connection::open(&disk.uri());
    drop(writer);
    // Not before it is compared.
    let told = disk.until("it is compared", |status| error_of(status).is_empty());
    assert_eq!((&told["mode"], &told["counters"]["passes"]), (&"sync".into(), &2.into()), "{told}");
    assert_eq!(disk.holes().last().unwrap()["reason_code"], "written-past-agent");
    disk.settle();
    disk.latest_is_the_image();
    assert_eq!(bench.run(&["doctor"]).code, 0);
    drop(guest);
    disk.until("the guest has gone", |status| status["clients"] == 0);
    bench.json(&rewind);
    disk.whole();
    read(&disk, "0x11");
    disk.latest_is_the_image();
}

#[test]
fn what_a_qemu_wrote_past_an_agent_that_was_killed_since_is_compared() {
    let bench = Bench::new();
    let (receiver, agent, disk) = bench.protected(SIZE, &[]);
    let guest = Connection::open(&disk.uri());
    let writer = past_the_agent(&bench, &disk, &[]);
    write_past_the_agent(&bench);
    disk.until("it is told", |status| !error_of(status).is_empty());
    // Nothing can be compared.
    receiver.kill();
    drop(writer);
    disk.until("it has gone", |status| error_of(status).contains("somebody else has written the image"));
    agent.kill();
    drop(guest);
    let _agent = bench.agent();
    assert!(error_of(&disk.status()).contains("somebody else has written the image"));
    let _receiver = bench.receiver();
    disk.until("it is compared", |status| error_of(status).is_empty());
    disk.settle();
    disk.latest_is_the_image();
}

/// Not by its locks, for it takes none: by the file's time, as long as nobody uses the disk.
#[test]
fn what_is_written_to_the_image_of_an_idle_disk_is_told_and_compared() {
    let bench = Bench::new();
    let (receiver, mut agent, disk) = bench.protected(SIZE, &[]);
    agent.may_complain("is not where it was");
    disk.qemu_io(&["write -P 0x11 0 1M", "write -z 8M 1M", "discard 10M 1M", "flush"]);
    disk.settle();
    // What the agent does itself is nobody else's, and what it sends is none of the image's.
    bench.json(&["resync", "vm1", "--compare", "--wait"]);
    // It has looked at the file while nobody used the disk.
    let away = bench.name("away.img");
    for (from, to, is_away) in [(&disk.image, &away, true), (&away, &disk.image, false)] {
        fs::rename(from, to).unwrap();
        disk.until("it has looked", |status| error_of(status).is_empty() != is_away);
    }
    let input = bench.path("other");
    fs::write(&input, [0x44; 64 << 10]).unwrap();
    let dd_to = |image: &str, seek: &str| {
        let (from, to) = (format!("if={}", input.display()), format!("of={image}"));
        tools::run("dd", &[&from, &to, "bs=64k", seek, "conv=notrunc", "status=none"]);
    };
    let dd = |seek: &str| dd_to(&disk.image, seek);
    let passes = || disk.status()["counters"]["passes"].as_u64().unwrap();
    let is_compared = |before: u64| {
        disk.until("it is compared", |status| status["counters"]["passes"].as_u64() > Some(before));
        disk.until("it is over", |status| error_of(status).is_empty());
        disk.settle();
        disk.latest_is_the_image();
    };
    let before = passes();
    dd("seek=32");
    is_compared(before);
    // Also by another name, while the agent does not find it.
    let before = passes();
    fs::rename(&disk.image, &away).unwrap();
    disk.until("it has looked", |status| error_of(status).contains("was deleted"));
    dd_to(&away, "seek=96");
    fs::rename(&away, &disk.image).unwrap();
    is_compared(before);
    // An agent that ends at once, and one that is killed while nothing can be compared.
    dd("seek=48");
    let detached = bench.json_ending(3, &["detach", "vm1"]);
    assert_eq!(detached["resync_due"], true, "{detached}");
    assert!(error_of(&detached).contains("somebody else has written the image"), "{detached}");
    // It says so unless it is over already.
    let attached = bench.run(&["attach", "vm1", &disk.image, "--receiver", &bench.socket("stream.sock")]);
    assert!(matches!(attached.code, 0 | 3), "{attached:?}");
    disk.until("it is compared", |status| error_of(status).is_empty());
    disk.settle();
    disk.latest_is_the_image();
    receiver.kill();
    dd("seek=64");
    disk.until("it is told", |status| error_of(status).contains("somebody else has written the image"));
    agent.kill();
    let _agent = bench.agent();
    let _receiver = bench.receiver();
    disk.until("it is compared", |status| error_of(status).is_empty());
    disk.settle();
    disk.latest_is_the_image();
}
