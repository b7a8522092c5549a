//! What an agent trusts, and whom it finds again, when it or a disk begins anew.

use std::{os::unix::net::UnixListener, time::SystemTime};

use backtide_e2e::{Bench, LoopDevice, skip, tools};
use serde_json::Value;

const SIZE: u64 = 64 << 20;

#[test]
fn an_attach_that_fails_leaves_the_saved_tracking_as_good_as_it_was() {
    let bench = Bench::new();
    let (_receiver, _agent, disk) = bench.protected(SIZE, &[]);
    disk.qemu_io(&["write -P 0x11 0 32M"]);
    disk.settle();
    bench.json(&["detach", "vm1"]);
    let _taken = UnixListener::bind(bench.path("taken.sock")).unwrap();
    let taken = format!("nbd+unix:///vm1?socket={}", bench.name("taken.sock"));
    let stream = bench.socket("stream.sock");
    let said = bench.run(&["attach", "vm1", &disk.image, "--receiver", &stream, "--nbd", &taken]);
    assert_eq!(said.code, 5, "{said:?}");
    let disk = bench.attach("vm1", "vm1.img", &[]);
    disk.settle();
    let status = disk.status();
    assert_eq!(status["counters"]["passes"], 0, "nothing is compared or sent again: {status}");
    disk.latest_is_the_image();
}

#[test]
fn a_restart_that_could_save_no_record_is_refused_and_the_disk_stays() {
    let bench = Bench::new();
    let (_receiver, mut agent, disk) = bench.protected(SIZE, &[]);
    agent.may_complain("cannot");
    // As with a full state directory: nothing new can be written.
    agent.limit_files("0");
    let refused = bench.run(&["agent", "restart"]);
    assert_eq!(
        (refused.code, refused.sentence().contains("nothing can be written in")),
        (5, true),
        "{refused:?}"
    );
    agent.limit_files("unlimited");
    disk.qemu_io(&["write -P 0x11 0 64k"]);
    bench.json(&["agent", "restart"]);
    disk.settle();
    disk.latest_is_the_image();
}

#[test]
fn a_disk_whose_image_is_missing_at_the_start_is_attached_when_it_is_there() {
    let bench = Bench::new();
    let (_receiver, agent, disk) = bench.protected(SIZE, &[]);
    assert_eq!(agent.stop(), 0);
    std::fs::rename(&disk.image, bench.path("away.img")).unwrap();
    let mut agent = bench.agent();
    agent.may_complain("cannot attach the disk again");
    let status = disk.status();
    assert_eq!(status["reason_code"], "not-attached", "{status}");
    assert!(status["reason"].as_str().is_some_and(|reason| reason.contains("there is no image")), "{status}");
    // Somebody tries it by hand, too early.
    let said = bench.run(&["attach", "vm1", &disk.image, "--receiver", &bench.socket("stream.sock")]);
    assert_eq!(said.code, 4, "{said:?}");
    assert_eq!(disk.status()["reason_code"], "not-attached");
    std::fs::rename(bench.path("away.img"), &disk.image).unwrap();
    while disk.status()["reason_code"] == "not-attached" {}
    disk.qemu_io(&["write -P 0x11 0 1M"]);
    disk.latest_is_the_image();
}

#[test]
fn a_damaged_record_is_named_and_costs_no_other_disk_its_protection() {
    let bench = Bench::new();
    let (_receiver, agent, damaged) = bench.protected(SIZE, &[]);
    bench.image("vm2.img", SIZE);
    let disk = bench.attach("vm2", "vm2.img", &[]);
    assert_eq!(agent.stop(), 0);
    let record = bench.path("state/vm1.json");
    let kept = std::fs::read(&record).unwrap();
    std::fs::write(&record, "{\"version\": 1, \"name\": \"vm").unwrap();
    let mut agent = bench.agent();
    agent.may_complain("cannot use the disk's record");
    disk.qemu_io(&["write -P 0x11 0 1M"]);
    disk.latest_is_the_image();
    let said = bench.run(&["status"]);
    assert_eq!(said.code, 3, "{said:?}");
    let status: Value = serde_json::from_str(&said.stdout).unwrap();
    assert_eq!(status["disks"].as_array().unwrap().len(), 2, "{status}");
    let status = damaged.status();
    assert_eq!(status["reason_code"], "not-attached", "{status}");
    let named = |text: &str| text.contains("vm1.json is damaged");
    assert!(status["reason"].as_str().is_some_and(named), "{status}");
    let log = agent.log();
    assert!(log.lines().any(|line| line.contains("cannot use the disk's record") && named(line)), "{log}");
    let refused = bench.run(&["detach", "vm1"]);
    assert!(refused.code == 1 && refused.stderr.contains("that gives the disk up"), "{refused:?}");
    // Put back, it is as good as before.
    std::fs::write(&record, kept).unwrap();
    while damaged.status()["reason_code"] == "not-attached" {}
    damaged.qemu_io(&["write -P 0x22 0 1M"]);
    damaged.latest_is_the_image();
}

#[test]
fn a_damaged_record_holds_up_a_restart_only_where_its_disk_is_served() {
    let bench = Bench::new();
    let (_receiver, mut agent, disk) = bench.protected(SIZE, &[]);
    agent.may_complain("cannot use the disk's record");
    let junk = bench.path("state/vm9.json");
    std::fs::write(&junk, "{").unwrap();
    bench.json(&["agent", "restart"]);
    disk.qemu_io(&["write -P 0x11 0 1M"]);
    disk.latest_is_the_image();
    assert_eq!(bench.disk("vm9").status()["reason_code"], "not-attached");
    // With the disk's own record the next agent would not have it any more.
    let record = bench.path("state/vm1.json");
    let kept = std::fs::read(&record).unwrap();
    std::fs::write(&record, "{").unwrap();
    let refused = bench.run(&["agent", "restart"]);
    assert!(refused.code == 5 && refused.sentence().contains("vm1.json is damaged"), "{refused:?}");
    assert!(!refused.sentence().contains("vm9"), "{refused:?}");
    disk.qemu_io(&["write -P 0x22 0 1M"]);
    disk.latest_is_the_image();
    std::fs::write(&record, kept).unwrap();
    std::fs::remove_file(&junk).unwrap();
    bench.json(&["agent", "restart"]);
    disk.latest_is_the_image();
    assert_eq!(agent.stop(), 0);
}

#[test]
fn capture_times_never_go_back_over_attaches() {
    let bench = Bench::new();
    let (_receiver, agent, disk) = bench.protected(SIZE, &[]);
    disk.qemu_io(&["write -P 0x11 0 1M"]);
    disk.settle();
    assert_eq!(agent.stop(), 0);
    // As if the clock had been an hour ahead and was set right meanwhile.
    let now = SystemTime::now().duration_since(SystemTime::UNIX_EPOCH).unwrap().as_micros();
    let ahead = u64::try_from(now).unwrap() + 3600 * 1_000_000;
    let path = bench.path("state/vm1.json");
    let mut record: Value = serde_json::from_slice(&std::fs::read(&path).unwrap()).unwrap();
    record["last_time"] = ahead.into();
    std::fs::write(&path, record.to_string()).unwrap();
    let _agent = bench.agent();
    let mut last = ahead;
    for pattern in ["0x22", "0x33"] {
        disk.qemu_io(&[&format!("write -P {pattern} 0 1M")]);
        disk.settle();
        let point = disk.points()["last"].clone();
        assert!(point["time"].as_u64() >= Some(last), "not before {last}: {point}");
        last = point["time"].as_u64().unwrap();
        bench.json(&["detach", "vm1"]);
        bench.attach("vm1", "vm1.img", &[]);
    }
}

#[test]
fn an_nbd_disk_is_compared_after_a_detach_for_anybody_may_have_written_it() {
    let bench = Bench::new();
    let (_receiver, _agent) = (bench.receiver(), bench.agent());
    bench.image("behind.img", SIZE);
    let (image, socket) = (bench.name("behind.img"), bench.name("behind.sock"));
    let _server = tools::Beside::start("qemu-nbd", &["-f", "raw", "-t", "-e", "8", "-k", &socket, &image]);
    tools::wait_for_socket(socket.as_ref());
    let uri = format!("nbd+unix:///?socket={socket}");
    let disk = bench.attach("vm1", &uri, &[]);
    disk.qemu_io(&["write -P 0x11 0 32M"]);
    disk.settle();
    bench.json(&["detach", "vm1"]);
    tools::qemu_io(&uri, &["write -P 0x22 10M 1M"]);
    let disk = bench.attach("vm1", &uri, &[]);
    disk.settle();
    tools::assert_same(&uri, disk.restore("latest").to_str().unwrap());
    let holes = disk.holes();
    assert_eq!(holes.last().map(|hole| &hole["reason_code"]), Some(&"bitmap-untrusted".into()), "{holes:?}");
}

/// Its agent ended in good order and could not attach it again; nobody keeps from it who gives it up then.
#[test]
fn an_nbd_disk_that_is_given_up_while_its_server_is_away_is_compared() {
    let bench = Bench::new();
    let (_receiver, agent) = (bench.receiver(), bench.agent());
    bench.image("behind.img", SIZE);
    let (image, socket) = (bench.name("behind.img"), bench.name("behind.sock"));
    let serve = || {
        let server = tools::Beside::start("qemu-nbd", &["-f", "raw", "-t", "-e", "8", "-k", &socket, &image]);
        tools::wait_for_socket(socket.as_ref());
        server
    };
    let server = serve();
    let uri = format!("nbd+unix:///?socket={socket}");
    let disk = bench.attach("vm1", &uri, &[]);
    disk.qemu_io(&["write -P 0x11 0 32M"]);
    disk.settle();
    assert_eq!(agent.stop(), 0);
    drop(server);
    std::fs::remove_file(&socket).unwrap();
    let mut agent = bench.agent();
    agent.may_complain("cannot attach the disk again");
    assert_eq!(disk.status()["reason_code"], "not-attached");
    let given_up = bench.json_ending(3, &["detach", "vm1"]);
    assert_eq!(given_up["resync_due"], true, "what the receiver lacks is not known: {given_up}");
    let _server = serve();
    tools::qemu_io(&uri, &["write -P 0x22 10M 1M"]);
    let disk = bench.attach("vm1", &uri, &[]);
    disk.settle();
    tools::assert_same(&uri, disk.restore("latest").to_str().unwrap());
    let holes = disk.holes();
    assert_eq!(holes.last().map(|hole| &hole["reason_code"]), Some(&"bitmap-untrusted".into()), "{holes:?}");
}

#[test]
fn a_block_device_is_compared_after_a_detach_for_anybody_may_have_written_it() {
    let bench = Bench::new();
    let image = bench.image("device.img", SIZE);
    let device = match LoopDevice::of(&image, 512) {
        Ok(device) => device,
        Err(why) => return skip(&why),
    };
    let (_receiver, _agent) = (bench.receiver(), bench.agent());
    let stream = bench.socket("stream.sock");
    let attach = || bench.json(&["attach", "vm1", device.path(), "--receiver", &stream]);
    let uri = attach()["nbd_uri"].as_str().unwrap().to_owned();
    let settle = || {
        bench.json(&["wait", "vm1", "--for", "sync"]);
        bench.json(&["wait", "vm1", "--for", "durable"]);
    };
    tools::qemu_io(&uri, &["write -P 0x11 0 32M"]);
    settle();
    bench.json(&["detach", "vm1"]);
    // Through another name of the device, whose own time of change stays as it was.
    let alias = bench.name("alias");
    tools::run("cp", &["-a", device.path(), &alias]);
    // A file system may allow no devices.
    let name = if std::fs::File::open(&alias).is_ok() { &alias } else { device.path() };
    tools::qemu_io(name, &["write -P 0x22 10M 1M", "flush"]);
    attach();
    settle();
    let output = bench.name("restored.img");
    bench.json(&["restore", "vm1", "--at", "latest", "--output", &output]);
    tools::assert_same(device.path(), &output);
    bench.json(&["detach", "vm1"]);
}

/// Somebody waits for the image, and writes it as soon as the agent lets go of it.
#[test]
fn an_image_written_in_the_middle_of_its_detach_is_compared() {
    let bench = Bench::new();
    let _receiver = bench.receiver();
    let agent = bench.daemon_with(&["agent", "run"], &[("BACKTIDE_STOP_AT", "detach-unlocked")]);
    bench.image("vm1.img", SIZE);
    let disk = bench.attach("vm1", "vm1.img", &[]);
    disk.qemu_io(&["write -P 0x11 0 32M"]);
    disk.settle();
    let detach = tools::Beside::spawn(bench.command(&["detach", "vm1"]));
    while !agent.is_stopped() {}
    tools::qemu_io(&disk.image, &["write -P 0x22 10M 1M"]);
    agent.signal("CONT");
    detach.succeed();
    let disk = bench.attach("vm1", "vm1.img", &[]);
    disk.latest_is_the_image();
}

#[test]
fn an_agent_whose_state_directory_is_in_use_says_what_to_do() {
    let bench = Bench::new();
    let _agent = bench.agent();
    let refused = bench.run(&["agent", "run", "--api", &bench.socket("other.sock")]);
    assert_eq!(refused.code, 5, "{refused:?}");
    let sentence = refused.sentence();
    let start = format!("the state directory {} is locked: another agent uses it; ", bench.name("state"));
    assert!(sentence.starts_with(&start) && sentence.ends_with("with --state"), "{sentence}");
}
