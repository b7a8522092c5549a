//! What follows from a handshake: the rows of the table, each with real processes. More of them are in
//! the stories of outages, crashes and damage.

use std::{os::unix::fs::FileExt, path::Path};

use backtide_e2e::{Bench, tools};
use serde_json::Value;

const SIZE: u64 = 64 << 20;

/// Where the sign of life lies in a tracking file, and the last capture time in it.
const LIFE_AT: u64 = 4096;
const CAPTURED: usize = 40;

/// Bytes that a resync compared or sent.
fn looked_at(status: &Value) -> u64 {
    let counters = &status["counters"];
    counters["resync_equal_bytes"].as_u64().unwrap() + counters["resync_sent_bytes"].as_u64().unwrap()
}

#[test]
fn an_unknown_disk_gets_a_history_a_short_outage_a_replay_and_a_long_one_a_resync() {
    let bench = Bench::new();
    let options = ["--window", "256KiB", "--guest-delay-max", "0"];
    let (receiver, _agent, disk) = bench.protected(SIZE, &options);
    let history = disk.status()["history"].clone();
    assert!(history.is_string(), "a new history");
    assert_eq!(disk.status()["counters"]["passes"], 1, "the first protection");

    receiver.kill();
    disk.until("the stream is lost", |status| status["connected"] == false);
    disk.qemu_io(&["write -P 0x11 0 64k"]);
    let receiver = bench.receiver();
    disk.settle();
    let status = disk.status();
    assert_eq!((&status["counters"]["passes"], &status["history"]), (&1.into(), &history), "{status}");
    assert_eq!(disk.holes(), Vec::<Value>::new(), "a replay leaves none");

    receiver.kill();
    disk.until("the stream is lost", |status| status["connected"] == false);
    disk.qemu_io(&["write -P 0x22 8M 4M"]);
    let _receiver = bench.receiver();
    disk.settle();
    let status = disk.status();
    assert_eq!((&status["counters"]["passes"], &status["history"]), (&2.into(), &history), "{status}");
    assert!((4 << 20..6 << 20).contains(&looked_at(&status)), "only what the bitmap says: {status}");
    assert_eq!(disk.holes()[0]["reason_code"], "receiver-away");
    disk.latest_is_the_image();
}

#[test]
fn another_history_of_the_disk_is_an_alarm_and_compared_whole() {
    let bench = Bench::new();
    let (receiver, mut agent, disk) = bench.protected(SIZE, &[]);
    agent.may_complain("has lost the history");
    agent.may_complain("keeps another history");
    disk.qemu_io(&["write -P 0x11 0 32M"]);
    disk.settle();
    let first = disk.status()["history"].clone();
    assert_eq!(receiver.stop(), 0);
    std::fs::rename(bench.path("store"), bench.path("first")).unwrap();
    let receiver = bench.receiver();
    disk.qemu_io(&["write -P 0x22 8M 1M"]);
    disk.settle();
    assert_ne!(disk.status()["history"], first);
    assert_eq!(receiver.stop(), 0);
    // The first store turns up again: it has the disk, and not what this agent means.
    tools::run("rm", &["-r", &bench.name("store")]);
    std::fs::rename(bench.path("first"), bench.path("store")).unwrap();
    let before = looked_at(&disk.status());
    let _receiver = bench.receiver();
    disk.wait("sync");
    let status = disk.status();
    assert_eq!(status["history"], first);
    assert!(looked_at(&status) - before >= 32 << 20, "all of it: {status}");
    assert!(agent.log().contains("keeps another history of disk vm1"), "it is an alarm");
    let holes = disk.holes();
    assert!(holes.iter().any(|hole| hole["reason_code"] == "foreign-history"), "{holes:?}");
    disk.latest_is_the_image();
}

#[test]
fn an_agent_that_was_fenced_stays_so_until_somebody_has_it_take_the_disk_over() {
    let bench = Bench::new();
    let (_receiver, agent, disk) = bench.protected(SIZE, &[]);
    disk.qemu_io(&["write -P 0x11 0 32M"]);
    disk.settle();
    assert_eq!(agent.stop(), 0);
    tools::run("cp", &["-a", &bench.name("state"), &bench.name("copy")]);
    for _ in 0..3 {
        let agent = bench.agent();
        disk.settle();
        assert_eq!(agent.stop(), 0);
    }
    // The host is restored from the copy, with its disk, whose times are as they were.
    tools::run("rm", &["-r", &bench.name("state")]);
    std::fs::rename(bench.path("copy"), bench.path("state")).unwrap();
    let mut agent = bench.agent();
    agent.may_complain("fenced");
    disk.until("it is fenced", |status| status["reason_code"] == "fenced");
    let record = || std::fs::read_to_string(bench.path("state/vm1.json")).unwrap();
    while !record().contains("\"fenced\": true") {}
    // Neither its death nor a restart is a reason to take the disk away from whoever has it. It is served.
    agent.kill();
    let mut agent = bench.agent();
    agent.may_complain("another agent has disk vm1");
    disk.until("it is fenced still", |status| status["reason_code"] == "fenced");
    disk.qemu_io(&["write -P 0x22 0 1M"]);
    bench.json_ending(3, &["detach", "vm1"]);
    let (image, stream) = (bench.name("vm1.img"), bench.socket("stream.sock"));
    let attach = ["attach", "vm1", &image, "--receiver", &stream];
    let refused = bench.run(&attach);
    assert_eq!(refused.code, 5, "{refused:?}");
    assert!(refused.sentence().contains("another agent has had disk vm1"), "{refused:?}");
    assert!(refused.error()["hint"].as_str().is_some_and(|hint| hint.contains("--take-over")), "{refused:?}");
    bench.json(&[&attach[..], &["--take-over"]].concat());
    disk.wait("sync");
    assert!(looked_at(&disk.status()) >= 31 << 20, "all of it: {}", disk.status());
    let holes = disk.holes();
    assert!(holes.iter().any(|hole| hole["reason_code"] == "agent-rolled-back"), "{holes:?}");
    disk.latest_is_the_image();
}

/// Makes a copy of a state directory as old as if it had been made an hour earlier.
fn an_hour_older(state: &Path) {
    const HOUR: u64 = 3600 * 1_000_000;
    let file = std::fs::File::options().read(true).write(true).open(state.join("vm1.tracking")).unwrap();
    let mut life = [0; CAPTURED + 8 + 4];
    file.read_exact_at(&mut life, LIFE_AT).unwrap();
    let captured = u64::from_le_bytes(life[CAPTURED..CAPTURED + 8].try_into().unwrap());
    assert!(captured > HOUR, "the agent has signed");
    life[CAPTURED..CAPTURED + 8].copy_from_slice(&(captured - HOUR).to_le_bytes());
    let checksum = crc32c::crc32c(&life[..CAPTURED + 8]);
    life[CAPTURED + 8..].copy_from_slice(&checksum.to_le_bytes());
    file.write_all_at(&life, LIFE_AT).unwrap();
    let path = state.join("vm1.json");
    let mut record: Value = serde_json::from_slice(&std::fs::read(&path).unwrap()).unwrap();
    record["last_time"] = (captured - HOUR).into();
    std::fs::write(path, record.to_string()).unwrap();
}

#[test]
fn a_state_directory_put_back_from_a_copy_is_noticed_where_no_file_tells() {
    let bench = Bench::new();
    let (receiver, agent) = (bench.receiver(), bench.agent());
    bench.image("behind.img", SIZE);
    let (image, socket) = (bench.name("behind.img"), bench.name("behind.sock"));
    let _server = tools::Beside::start("qemu-nbd", &["-f", "raw", "-t", "-e", "8", "-k", &socket, &image]);
    tools::wait_for_socket(socket.as_ref());
    let uri = format!("nbd+unix:///?socket={socket}");
    let disk = bench.attach("vm1", &uri, &[]);
    disk.qemu_io(&["write -P 0x11 0 16M"]);
    disk.settle();
    let signed = || {
        let state = std::fs::read(bench.path("state/vm1.tracking")).unwrap();
        let at = usize::try_from(LIFE_AT).unwrap() + CAPTURED;
        state[at..at + 8] != [0; 8]
    };
    while !signed() {}
    tools::run("cp", &["-a", &bench.name("state"), &bench.name("copy")]);
    disk.qemu_io(&["write -P 0x22 20M 1M"]);
    disk.settle();
    // These the receiver never sees, and only the state that is going to be lost knows of them.
    assert_eq!(receiver.stop(), 0);
    disk.qemu_io(&["write -P 0x33 40M 1M"]);
    agent.kill();
    tools::run("rm", &["-r", &bench.name("state")]);
    std::fs::rename(bench.path("copy"), bench.path("state")).unwrap();
    an_hour_older(&bench.path("state"));
    let _receiver = bench.receiver();
    let mut agent = bench.agent();
    agent.may_complain("put back from a copy");
    disk.settle();
    assert!(agent.log().contains("newer than this agent's state"), "it is an alarm");
    tools::assert_same(&image, disk.restore("latest").to_str().unwrap());
    let holes = disk.holes();
    assert!(holes.iter().any(|hole| hole["reason_code"] == "agent-rolled-back"), "{holes:?}");
}

#[test]
fn a_store_whose_numbers_fit_and_which_another_life_of_the_disk_has_written_is_compared() {
    let bench = Bench::new();
    let (receiver, agent, disk) = bench.protected(SIZE, &[]);
    disk.qemu_io(&["write -P 0x11 0 32M"]);
    disk.settle();
    let kept = |from: &[&str], to: &str| {
        std::fs::create_dir(bench.path(to)).unwrap();
        from.iter().for_each(|one| drop(tools::run("cp", &["-a", &bench.name(one), &bench.name(to)])));
    };
    let put_back = |what: &[&str], from: &str| {
        for one in what {
            // The image stays the file that it is, as where a whole volume is put back.
            if *one != "vm1.img" {
                tools::run("rm", &["-r", &bench.name(one)]);
            }
            tools::run("cp", &["-a", &format!("{}/{one}", bench.name(from)), &bench.name(one)]);
        }
    };
    assert_eq!((agent.stop(), receiver.stop()), (0, 0));
    kept(&["state", "vm1.img", "store"], "all");
    // Two lives that go on from there, as long as each other.
    let live = |pattern: &str, offset: &str| {
        let (receiver, agent) = (bench.receiver(), bench.agent());
        disk.qemu_io(&[&format!("write -P {pattern} {offset} 1M")]);
        disk.settle();
        assert_eq!((agent.stop(), receiver.stop()), (0, 0));
    };
    live("0x22", "8M");
    kept(&["store"], "newer");
    put_back(&["state", "vm1.img", "store"], "all");
    live("0x33", "20M");
    put_back(&["store"], "newer");
    let (_receiver, mut agent) = (bench.receiver(), bench.agent());
    agent.may_complain("last written by an attach that this agent knows nothing of");
    disk.settle();
    assert!(agent.log().contains("last written by an attach"), "it is an alarm: {}", agent.log());
    disk.latest_is_the_image();
    let holes = disk.holes();
    assert!(holes.iter().any(|hole| hole["reason_code"] == "foreign-history"), "{holes:?}");
}

#[test]
fn what_an_agent_captured_after_its_last_sign_of_life_is_no_reason_for_an_alarm_later() {
    let bench = Bench::new();
    let (receiver, agent, disk) = bench.protected(SIZE, &[]);
    disk.qemu_io(&["write -P 0x11 0 8M"]);
    disk.settle();
    agent.kill();
    assert_eq!(receiver.stop(), 0);
    let mut agent = bench.agent();
    agent.may_complain("no stream to the receiver");
    bench.json_ending(3, &["detach", "vm1"]);
    let _receiver = bench.receiver();
    let disk = bench.attach("vm1", "vm1.img", &[]);
    disk.settle();
    assert!(!agent.log().contains("put back from a copy"), "{}", agent.log());
    disk.latest_is_the_image();
}
