//! What an operator is told who takes the wrong way: each error names the thing, and the way out.

mod support;

use std::{
    os::unix::fs::{MetadataExt, PermissionsExt},
    process::Stdio,
};

use support::{Bench, Daemon, Said, tool};

/// Daemons and a disk in sync.
fn attached(bench: &Bench) -> (Daemon, Daemon) {
    let daemons = (bench.daemon(&["receiver", "run"]), bench.daemon(&["agent", "run"]));
    let image = bench.image("vm1.img", 4 << 20);
    let stream = bench.socket("stream.sock");
    let said = bench.run(&["attach", "vm1", image.to_str().unwrap(), "--receiver", &stream]);
    assert_eq!(said.code, 0, "{said:?}");
    bench.json(&["wait", "vm1", "--for", "sync", "--timeout", "1m"]);
    daemons
}

fn refused(said: &Said, code: i32, words: &[&str]) {
    assert_eq!(said.code, code, "{said:?}");
    for word in words {
        assert!(said.stderr.contains(word), "{word:?} is missing: {said:?}");
    }
}

#[test]
fn the_wrong_socket_is_told_by_what_it_is() {
    let bench = Bench::new();
    let _daemons = attached(&bench);
    let (agent, receiver, stream) =
        (bench.socket("agent.sock"), bench.socket("receiver.sock"), bench.socket("stream.sock"));
    for command in [&["points", "vm1"][..], &["receiver", "status"]] {
        let said = bench.run(&[command, &["--receiver", &agent]].concat());
        refused(&said, 2, &["is the control API of the agent", "--receiver"]);
    }
    let said = bench.run(&["points", "vm1", "--receiver", &stream]);
    refused(&said, 6, &["where agents stream to", "control API of the receiver"]);
    for command in [&["status"][..], &["pause", "vm1"]] {
        let said = bench.run(&[command, &["--agent", &receiver]].concat());
        refused(&said, 2, &["is the control API of the receiver", "--agent"]);
    }
    let other = bench.image("vm2.img", 1 << 20);
    let said = bench.run(&["attach", "vm2", other.to_str().unwrap(), "--receiver", &receiver]);
    refused(&said, 3, &["this is a control API", "--listen"]);
}

#[test]
fn a_socket_of_somebody_else_is_no_daemon_to_start() {
    if std::fs::metadata("/proc/self").unwrap().uid() != 0 {
        eprintln!("skipped: only root can ask as somebody else");
        return;
    }
    let bench = Bench::new();
    let _agent = bench.daemon(&["agent", "run"]);
    let path = bench.path("agent.sock");
    std::fs::set_permissions(&path, std::fs::Permissions::from_mode(0o600)).unwrap();
    std::fs::set_permissions(bench.path(""), std::fs::Permissions::from_mode(0o755)).unwrap();
    // Root may connect to everything: somebody else has to ask.
    let mut command = std::process::Command::new("setpriv");
    let binary = env!("CARGO_BIN_EXE_backtide");
    let agent = bench.socket("agent.sock");
    command.args(["--reuid=65534", "--clear-groups", "--inh-caps=-all", "--bounding-set=-all"]);
    let run = command.args([binary, "status", "--agent", &agent]).stdin(Stdio::null()).output().unwrap();
    let text = String::from_utf8_lossy(&run.stderr);
    assert_eq!(run.status.code(), Some(6), "{text}");
    assert!(text.contains("permission denied: the socket belongs to user 0"), "{text}");
    assert!(!text.contains("start it"), "{text}");
}

#[test]
fn what_a_paused_disk_does_not_do_is_told_with_the_way_out() {
    let bench = Bench::new();
    let _daemons = attached(&bench);
    bench.json(&["pause", "vm1"]);
    for command in
        [&["resync", "vm1"][..], &["resync", "vm1", "--wait"], &["resync", "vm1", "--compare", "--wait"]]
    {
        refused(&bench.run(command), 5, &["disk vm1 is paused", "backtide resume vm1` first"]);
    }
    let said = bench.run(&["resync", "vm1", "--compare"]);
    refused(&said, 3, &["the resync begins after `backtide resume vm1`"]);
    refused(&bench.run(&["mark", "here", "vm1"]), 5, &["hint: `backtide resume vm1` first"]);
    let said = bench.run(&["rewind", "vm1", "--to", "latest", "--yes"]);
    refused(&said, 5, &["hint: `backtide resume vm1` first"]);
    bench.json(&["resume", "vm1"]);
    let said = bench.run(&["resync", "vm1", "--wait"]);
    assert_eq!(said.code, 0, "{said:?}");
}

#[test]
fn a_disk_that_is_where_it_is_to_go_stays() {
    let bench = Bench::new();
    let _daemons = attached(&bench);
    let uri = bench.json(&["status", "vm1"])["disks"][0]["nbd_uri"].as_str().unwrap().to_owned();
    tool("qemu-utils", "qemu-io", &["-f", "raw", &uri, "-c", "write -P 7 0 4k"]);
    bench.json(&["wait", "vm1", "--for", "durable", "--timeout", "1m"]);
    bench.json(&["mark", "here", "vm1"]);
    for to in ["latest", "mark:here"] {
        let said = bench.run(&["rewind", "vm1", "--to", to]);
        assert_eq!(said.code, 0, "{said:?}");
        assert!(said.stdout.contains("its newest point: there is nothing to do"), "{said:?}");
    }
    tool("qemu-utils", "qemu-io", &["-f", "raw", &uri, "-c", "write -P 9 0 4k"]);
    bench.json(&["wait", "vm1", "--for", "durable", "--timeout", "1m"]);
    let said = bench.run(&["rewind", "vm1", "--to", "mark:here"]);
    assert_eq!(said.code, 2, "it asks: {said:?}");
}

#[test]
fn a_disk_for_other_machines_in_the_clear_is_refused_until_it_is_said_that_it_may_be() {
    let bench = Bench::new();
    let socket = std::net::TcpListener::bind("0.0.0.0:0").unwrap();
    let port = socket.local_addr().unwrap().port();
    drop(socket);
    let uri = format!("nbd://0.0.0.0:{port}/vm1");
    let image = bench.image("vm1.img", 4 << 20);
    let stream = bench.socket("stream.sock");
    let attach = ["attach", "vm1", image.to_str().unwrap(), "--receiver", &stream, "--nbd", &uri];
    let agent = bench.daemon(&["agent", "run"]);
    refused(&bench.run(&attach), 5, &["in the clear", "--insecure"]);
    let relative = [&attach[..6], &["nbd+unix:///vm1?socket=here.sock"]].concat();
    refused(&bench.run(&relative), 2, &["relative path"]);
    assert_eq!(agent.interrupt(), 0);
    refused(&bench.run(&["agent", "run", "--nbd-listen", &uri]), 2, &["in the clear", "--insecure"]);
    refused(&bench.run(&["receiver", "run", "--nbd-listen", &uri]), 2, &["in the clear", "--insecure"]);
    let agent = bench.daemon(&["agent", "run", "--insecure"]);
    assert_eq!(bench.run(&attach).code, 3, "its receiver is not there");
    let doctor = bench.run(&["doctor"]);
    assert!(doctor.stdout.contains(&format!("nbd: disk vm1 is served at {uri} in the clear")), "{doctor:?}");
    assert_eq!(agent.interrupt(), 0);
    // What was allowed when it was attached is not any more.
    refused(
        &bench.run(&["agent", "run", "--check"]),
        5,
        &["disk vm1: it could not be served", "in the clear"],
    );
    let agent = bench.daemon(&["agent", "run"]);
    let status = bench.run(&["status", "vm1"]);
    assert_eq!(status.code, 3, "{status:?}");
    assert!(status.stdout.contains("in the clear"), "{status:?}");
    assert!(std::net::TcpStream::connect(("127.0.0.1", port)).is_err(), "nobody is served");
    assert_eq!(agent.interrupt(), 0);
}

#[test]
fn names_that_nothing_can_be_written_to_are_told() {
    let bench = Bench::new();
    let _daemons = attached(&bench);
    let restore = |output: &str| bench.run(&["restore", "vm1", "--at", "latest", "--output", output]);
    refused(&restore(""), 2, &["the output has no name"]);
    refused(&restore("-"), 2, &["standard output", "backtide mount"]);
    let said = bench.run(&["restore", "vm1", "--at", "2026-03-01T12:00:00", "--output", "x"]);
    refused(&said, 2, &["has no zone: add Z"]);
    let state = bench.path("state");
    refused(&bench.run(&["fsck", state.to_str().unwrap()]), 2, &["is an agent's state directory"]);
}

#[test]
fn doctor_tells_what_the_receiver_is_alarmed_of() {
    let bench = Bench::new();
    let daemons = attached(&bench);
    assert_eq!(daemons.0.interrupt(), 0);
    std::fs::write(bench.path("store/retention.json"), "not ours").unwrap();
    let _receiver = bench.daemon(&["receiver", "run"]);
    let status = bench.run(&["--json", "receiver", "status"]);
    let status: serde_json::Value = serde_json::from_str(&status.stdout).unwrap();
    let alarm = status["alarms"][0].as_str().unwrap().to_owned();
    let doctor = bench.run(&["--json", "doctor"]);
    let doctor: serde_json::Value = serde_json::from_str(&doctor.stdout).unwrap();
    let told = doctor["findings"].as_array().unwrap().iter().find(|finding| finding["check"] == "alarms");
    assert_eq!(told.expect("an alarm is told")["message"], alarm.as_str());
}

#[test]
fn a_time_in_an_outage_is_given_with_a_warning_and_is_waited_for() {
    let bench = Bench::new();
    let _daemons = attached(&bench);
    bench.json(&["pause", "vm1"]);
    let output = bench.path("out.img");
    let output = output.to_str().unwrap();
    let said = bench.run(&["restore", "vm1", "--at", "-0s", "--output", output]);
    refused(&said, 3, &["later than what the receiver has heard of disk vm1", "its agent is not connected"]);
    let points = bench.run(&["points", "vm1"]);
    assert!(points.stdout.contains("and nothing newer: its agent is not connected"), "{points:?}");
    let said = bench.run(&["wait", "vm1", "--for", "point", "--at", "-0s", "--timeout", "200ms"]);
    refused(&said, 1, &["its agent is not connected"]);
    for kept in [&["keep", "vm1", "--at", "-0s"][..], &["lock", "vm1", "--at", "-0s", "--until", "1h"]] {
        let said = bench.run(&[&["retention"], kept].concat());
        refused(&said, 3, &["later than what the receiver has heard of disk vm1"]);
    }
    let said = bench.run(&["restore", "vm1", "--at", "latest", "--output", output, "--force"]);
    assert_eq!(said.code, 0, "{said:?}");
}
