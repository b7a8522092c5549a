//! `receiver run` and `agent run` as processes of their own, through a lost receiver and back.

mod support;

use std::process::Stdio;

use support::{Bench, Daemon, exit_code, same, signal, tool};

const SIZE: u64 = 64 << 20;

fn receiver(bench: &Bench) -> Daemon {
    bench.daemon(&["receiver", "run"])
}

fn agent(bench: &Bench) -> Daemon {
    bench.daemon(&["agent", "run"])
}

/// Attaches `vm1` with a window that an outage soon overflows.
fn attach(bench: &Bench) -> support::Said {
    let image = bench.image("vm1.img", SIZE);
    let stream = bench.socket("stream.sock");
    bench.run(&[
        "--json",
        "attach",
        "vm1",
        image.to_str().unwrap(),
        "--receiver",
        &stream,
        "--window",
        "1MiB",
    ])
}

fn write(bench: &Bench, pattern: &str, at: &str, length: &str) {
    let status = bench.json(&["status", "vm1"]);
    let uri = status["disks"][0]["nbd_uri"].as_str().unwrap();
    let command = format!("write -P {pattern} {at} {length}");
    tool("qemu-utils", "qemu-io", &["-f", "raw", uri, "-c", &command, "-c", "flush"]);
}

fn wait(bench: &Bench, state: &str) {
    bench.json(&["wait", "vm1", "--for", state, "--timeout", "1m"]);
}

#[test]
fn an_attach_without_its_receiver_tracks_and_says_so() {
    let bench = Bench::new();
    let agent = agent(&bench);
    let said = attach(&bench);
    assert_eq!(said.code, 3, "done with a warning: {said:?}");
    let disk: serde_json::Value = serde_json::from_str(&said.stdout).unwrap();
    assert_eq!(disk["connected"], false, "{disk}");
    let warning: serde_json::Value = serde_json::from_str(said.stderr.trim()).unwrap();
    assert!(warning["warning"].as_str().unwrap().contains("stream.sock"), "{warning}");

    let late = bench.run(&["--json", "wait", "vm1", "--for", "sync", "--timeout", "200ms"]);
    assert_eq!(late.code, 1, "{late:?}");
    let twice = attach(&bench);
    assert_eq!(twice.code, 5, "{twice:?}");

    let shown = bench.run(&["status", "vm1"]);
    assert!(shown.stdout.contains("everything that the disk holds is to be sent"), "{shown:?}");
    let detached = bench.run(&["detach", "vm1"]);
    assert_eq!(detached.code, 3, "{detached:?}");
    assert!(detached.stderr.contains("the receiver lacks everything of disk vm1"), "{detached:?}");
    assert_eq!(attach(&bench).code, 3);

    let receiver = receiver(&bench);
    wait(&bench, "sync");
    assert_eq!(bench.json(&["status"])["disks"][0]["mode"], "sync");
    assert_eq!((agent.interrupt(), receiver.interrupt()), (0, 0));
}

#[test]
fn the_settings_of_a_receiver_are_looked_at_beside_the_one_that_runs() {
    let bench = Bench::new();
    let check = ["receiver", "run", "--check"];
    let found = bench.json(&check);
    assert_eq!((&found["store_id"], &found["disks"]), (&serde_json::Value::Null, &0.into()), "{found}");
    assert!(!bench.path("store").exists(), "it only looks");
    let receiver = receiver(&bench);
    let agent = agent(&bench);
    assert_eq!(attach(&bench).code, 0);
    let found = bench.json(&check);
    assert_eq!((&found["store_id"], &found["disks"]), (&receiver.ready["store_id"], &1.into()), "{found}");
    let said = bench.run(&[&check[..], &["--listen", "tcp://0.0.0.0:7301"]].concat());
    assert_eq!(said.code, 5, "{said:?}");
    std::fs::write(bench.path("store/store.json"), "{").unwrap();
    let said = bench.run(&check);
    assert_eq!(said.code, 8, "{said:?}");
    assert!(said.stderr.contains("store.json"), "{said:?}");
    assert_eq!((agent.interrupt(), receiver.interrupt()), (0, 0));
}

#[test]
fn a_hole_is_shown_and_a_point_in_it_is_refused_with_its_neighbors() {
    let bench = Bench::new();
    let first = receiver(&bench);
    let agent = agent(&bench);
    assert_eq!(attach(&bench).code, 0);
    wait(&bench, "sync");
    write(&bench, "0x11", "0", "512k");
    wait(&bench, "durable");
    let before = bench.path("before.img");
    std::fs::copy(bench.path("vm1.img"), &before).unwrap();

    first.kill();
    write(&bench, "0x22", "1M", "512k");
    let lost = bench.json(&["status", "vm1"])["disks"][0]["lsn"]["last"].as_u64().unwrap();
    write(&bench, "0x33", "8M", "16M");
    wait(&bench, "tracking");
    let second = receiver(&bench);
    wait(&bench, "sync");
    wait(&bench, "durable");

    let points = bench.json(&["points", "vm1"]);
    let holes: Vec<_> =
        points["holes"].as_array().unwrap().iter().filter(|hole| hole["after_lsn"] != 0).collect();
    assert_eq!(holes.len(), 1, "{points}");
    assert_eq!(holes[0]["reason_code"], "receiver-away", "{points}");
    let text = bench.run(&["points", "vm1"]).stdout;
    assert!(text.contains("HOLE") && text.contains(holes[0]["reason"].as_str().unwrap()), "{text}");

    let output = bench.path("out.img");
    let output = output.to_str().unwrap();
    let inside = bench.run(&["--json", "restore", "vm1", "--at", &format!("lsn:{lost}"), "--output", output]);
    assert_eq!(inside.code, 4, "{inside:?}");
    let error: serde_json::Value = serde_json::from_str(inside.stderr.trim()).unwrap();
    let details = &error["error"]["details"];
    assert_eq!(error["error"]["code"], "point-in-hole", "{error}");
    assert_eq!(details["before"]["lsn"], holes[0]["after_lsn"], "{error}");
    assert_eq!(details["after"]["lsn"], holes[0]["before_lsn"], "{error}");
    assert!(!bench.path("out.img").exists());

    let after = holes[0]["after_lsn"].as_u64().unwrap();
    bench.json(&["restore", "vm1", "--at", &format!("lsn:{after}"), "--output", output]);
    assert!(same(&before, output.as_ref()), "the last point before the hole differs");
    bench.json(&["restore", "vm1", "--at", "latest", "--output", output, "--force"]);
    assert!(same(&bench.path("vm1.img"), output.as_ref()), "the latest point differs");
    for (wrong, code) in [("lsn:99999999", 4), ("mark:none", 4), ("yesterday", 2)] {
        let said = bench.run(&["restore", "vm1", "--at", wrong, "--output", output, "--force"]);
        assert_eq!(said.code, code, "{wrong}: {said:?}");
    }
    let unknown = bench.run(&["points", "vm9"]);
    assert_eq!(unknown.code, 4, "{unknown:?}");
    assert_eq!((agent.interrupt(), second.interrupt()), (0, 0));
}

#[test]
fn the_agent_remembers_its_disks() {
    let bench = Bench::new();
    let receiver = receiver(&bench);
    let first = agent(&bench);
    assert_eq!(attach(&bench).code, 0);
    wait(&bench, "sync");
    assert_eq!(bench.json(&["pause", "vm1"])["mode"], "paused");
    assert_eq!(bench.json(&["resume", "vm1"])["name"], "vm1");
    wait(&bench, "sync");
    first.kill();
    let second = agent(&bench);
    wait(&bench, "sync");
    assert_eq!(bench.json(&["resync", "vm1", "--full", "--wait"])["mode"], "sync");
    write(&bench, "0x44", "0", "64k");
    wait(&bench, "durable");
    assert_eq!(bench.json(&["detach", "vm1"])["mode"], "detached");
    let gone = bench.run(&["pause", "vm1"]);
    assert_eq!(gone.code, 4, "{gone:?}");
    assert_eq!((second.interrupt(), receiver.interrupt()), (0, 0));
}

#[test]
fn an_interrupted_restore_unmounts_and_leaves_nothing() {
    let bench = Bench::new();
    let receiver = receiver(&bench);
    let agent = agent(&bench);
    assert_eq!(attach(&bench).code, 0);
    wait(&bench, "sync");
    // The other end of the restore is a server that takes the connection and answers nothing, so
    // the restore is certain to be under way when it is interrupted.
    let silent = bench.path("silent.sock");
    let listener = std::os::unix::net::UnixListener::bind(&silent).unwrap();
    let output = format!("nbd+unix:///?socket={}", silent.display());
    let child = bench
        .command(&["restore", "vm1", "--at", "latest", "--output", &output])
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .unwrap();
    let connection = listener.accept().unwrap();
    assert_eq!(bench.json(&["mount"])["mounts"].as_array().unwrap().len(), 1);
    signal(&child, "INT");
    let ended = child.wait_with_output().unwrap();
    assert_eq!(exit_code(ended.status), 130, "{ended:?}");
    drop(connection);
    assert_eq!(bench.json(&["mount"])["mounts"], serde_json::json!([]));
    assert_eq!((agent.interrupt(), receiver.interrupt()), (0, 0));
}

/// Runs a daemon that cannot print that it is ready until it answers, and gives its log.
fn lives_with_full_stdout(bench: &Bench, arguments: &[&str], ask: &[&str]) -> String {
    let full = std::fs::File::options().write(true).open("/dev/full").unwrap();
    let log = bench.path(&format!("full-{}.log", arguments[0]));
    let mut command = bench.command(arguments);
    let mut child = command.stdout(full).stderr(std::fs::File::create(&log).unwrap()).spawn().unwrap();
    loop {
        let said = bench.run(ask);
        match said.code {
            0 | 3 => break,
            // Nobody answers.
            6 => assert_eq!(child.try_wait().unwrap(), None, "{}", std::fs::read_to_string(&log).unwrap()),
            _ => panic!("{said:?}"),
        }
    }
    signal(&child, "INT");
    assert_eq!(exit_code(child.wait().unwrap()), 0);
    std::fs::read_to_string(log).unwrap()
}

#[test]
fn daemons_that_cannot_print_that_they_are_ready_go_on_and_a_full_store_is_told_at_the_start() {
    let bench = Bench::new();
    let file = bench.path("receiver.toml");
    std::fs::write(&file, "[limits]\nfree_bytes_min = 4611686018427387904\n").unwrap();
    let run = ["receiver", "run", "--config", file.to_str().unwrap()];
    let log = lives_with_full_stdout(&bench, &run, &["receiver", "status"]);
    assert!(log.contains("cannot print that this is ready"), "{log}");
    assert!(log.contains("are kept in reserve"), "{log}");
    let log = lives_with_full_stdout(&bench, &["agent", "run"], &["status"]);
    assert!(log.contains("cannot print that this is ready"), "{log}");
}
