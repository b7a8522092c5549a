//! `backtide up` and what it says to try next, with clients that no one here wrote.

mod support;

use support::{Bench, Daemon, exit_code, same, signal, tool};

const SIZE: u64 = 32 << 20;

fn up(bench: &Bench, image: &str) -> Daemon {
    let directory = bench.path("d");
    bench.daemon(&["up", image, "--dir", directory.to_str().unwrap()])
}

/// Writes a pattern through NBD.
fn write(daemon: &Daemon, pattern: &str, at: &str, length: &str) {
    let uri = daemon.ready["nbd_uri"].as_str().unwrap();
    let command = format!("write -P {pattern} {at} {length}");
    tool("qemu-utils", "qemu-io", &["-f", "raw", uri, "-c", &command, "-c", "flush"]);
}

/// Asks the daemons of an `up`.
struct Asked<'a> {
    bench: &'a Bench,
    agent: String,
    receiver: String,
}

impl<'a> Asked<'a> {
    fn of(bench: &'a Bench, daemon: &Daemon) -> Self {
        let text = |field: &str| daemon.ready[field].as_str().unwrap().to_owned();
        Self { bench, agent: text("agent"), receiver: text("receiver") }
    }

    fn agent(&self, arguments: &[&str]) -> serde_json::Value {
        self.bench.json(&[arguments, &["--agent", &self.agent]].concat())
    }

    fn receiver(&self, arguments: &[&str]) -> serde_json::Value {
        self.bench.json(&[arguments, &["--receiver", &self.receiver]].concat())
    }
}

#[test]
fn a_second_up_continues_the_history_and_every_point_comes_back() {
    let bench = Bench::new();
    let image = bench.image("vm1.img", SIZE);
    let first_copy = bench.path("first.img");

    let daemon = up(&bench, image.to_str().unwrap());
    assert_eq!(daemon.ready["name"], "vm1");
    let asked = Asked::of(&bench, &daemon);
    asked.agent(&["wait", "vm1", "--for", "sync", "--timeout", "1m"]);
    write(&daemon, "0x11", "1M", "5000k");
    let marked = asked.agent(&["mark", "first", "vm1"]);
    assert_eq!(marked["marks"][0]["recoverable"], true, "{marked}");
    std::fs::copy(&image, &first_copy).unwrap();
    assert_eq!(daemon.interrupt(), 0);

    let daemon = up(&bench, image.to_str().unwrap());
    let asked = Asked::of(&bench, &daemon);
    asked.agent(&["wait", "vm1", "--for", "sync", "--timeout", "1m"]);
    write(&daemon, "0x22", "3M", "8M");
    asked.agent(&["wait", "vm1", "--for", "durable", "--timeout", "1m"]);

    let points = asked.receiver(&["points", "vm1"]);
    assert_eq!(points["marks"][0]["label"], "first", "{points}");
    for (at, expected) in [("mark:first", &first_copy), ("latest", &image)] {
        let output = bench.path("restored.img");
        let output = output.to_str().unwrap();
        let report = asked.receiver(&["restore", "vm1", "--at", at, "--output", output, "--force"]);
        assert_eq!(report["verified"], true, "{report}");
        assert!(same(expected, output.as_ref()), "{at} differs");
    }

    let mount = asked.receiver(&["mount", "vm1", "--at", "mark:first"]);
    let uri = mount["uri"].as_str().unwrap();
    tool("qemu-utils", "qemu-img", &["compare", "-f", "raw", "-F", "raw", uri, first_copy.to_str().unwrap()]);
    let mounts = asked.receiver(&["mount"]);
    assert_eq!(mounts["mounts"][0]["id"], mount["id"], "{mounts}");
    asked.receiver(&["unmount", mount["id"].as_str().unwrap()]);
    assert_eq!(asked.receiver(&["mount"])["mounts"], serde_json::json!([]));

    let diff = asked.receiver(&["diff", "vm1", "--from", "mark:first"]);
    let offsets: Vec<u64> =
        diff["ranges"].as_array().unwrap().iter().map(|range| range["offset"].as_u64().unwrap()).collect();
    assert_eq!(offsets, [3 << 20], "{diff}");

    let verify = asked.agent(&["verify", "vm1"]);
    assert_eq!(
        (verify["state"].as_str(), verify["differing_count"].as_u64()),
        (Some("done"), Some(0)),
        "{verify}"
    );
    assert_eq!(daemon.interrupt(), 0);
}

#[test]
fn up_refuses_what_it_cannot_protect() {
    let bench = Bench::new();
    let directory = bench.path("d");
    let directory = directory.to_str().unwrap();
    let missing = bench.run(&["up", bench.path("none.img").to_str().unwrap(), "--dir", directory]);
    assert_eq!(missing.code, 4, "{missing:?}");
    assert!(missing.stderr.contains("none.img"), "{missing:?}");
    let odd = bench.image("odd.img", 1000);
    let odd = bench.run(&["up", odd.to_str().unwrap(), "--dir", bench.path("e").to_str().unwrap()]);
    assert_eq!(odd.code, 2, "{odd:?}");
    assert!(odd.stderr.contains("512"), "{odd:?}");

    let image = bench.image("vm1.img", 1 << 20);
    let daemon = bench.daemon(&["up", image.to_str().unwrap(), "--dir", bench.path("f").to_str().unwrap()]);
    let second = bench.run(&["up", image.to_str().unwrap(), "--dir", bench.path("g").to_str().unwrap()]);
    assert_eq!(second.code, 5, "a locked image: {second:?}");
    let third = bench.run(&["up", image.to_str().unwrap(), "--dir", bench.path("f").to_str().unwrap()]);
    assert_eq!(third.code, 5, "a store in use: {third:?}");
    assert_eq!(daemon.interrupt(), 0);
}

#[test]
fn an_up_after_an_unclean_end_has_the_options_that_it_is_given() {
    let bench = Bench::new();
    let image = bench.image("vm1.img", SIZE);
    let image = image.to_str().unwrap();
    up(&bench, image).kill();
    let directory = bench.path("d");
    let command = ["up", image, "--dir", directory.to_str().unwrap(), "--ack", "durable", "--window", "8M"];
    let is_so = |daemon: &Daemon| {
        let disk = Asked::of(&bench, daemon).agent(&["wait", "vm1", "--for", "sync", "--timeout", "1m"]);
        assert_eq!((&disk["ack"], &disk["limits"]["window_bytes"]), (&"durable".into(), &(8 << 20).into()));
        disk["epoch"].as_u64().unwrap()
    };
    let daemon = bench.daemon(&command);
    let first = is_so(&daemon);
    daemon.kill();
    // What it has already is not attached a second time: a guest may be there.
    let daemon = bench.daemon(&command);
    assert_eq!(is_so(&daemon), first + 1);
    daemon.kill();
    let daemon = up(&bench, image);
    is_so(&daemon);
    assert_eq!(daemon.interrupt(), 0);
}

#[test]
fn an_up_that_cannot_say_where_the_disk_is_fails() {
    let bench = Bench::new();
    let image = bench.image("vm1.img", SIZE);
    let directory = bench.path("d");
    let mut command = bench.command(&["up", image.to_str().unwrap(), "--dir", directory.to_str().unwrap()]);
    let full = std::fs::File::options().write(true).open("/dev/full").unwrap();
    let ended = command.stdout(full).output().unwrap();
    assert_eq!(ended.status.code(), Some(1), "{ended:?}");
    assert!(String::from_utf8_lossy(&ended.stderr).contains("stdout"), "{ended:?}");
}

#[test]
fn an_up_whose_image_does_not_answer_can_be_interrupted() {
    let bench = Bench::new();
    // Whoever connects is accepted, and hears nothing.
    let silent = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    let image = format!("nbd://{}/vm1", silent.local_addr().unwrap());
    let directory = bench.path("d");
    let mut command = bench.command(&["up", &image, "--dir", directory.to_str().unwrap()]);
    let child = command.stdout(std::process::Stdio::piped()).spawn().unwrap();
    let _held = silent.accept().unwrap();
    signal(&child, "INT");
    let ended = child.wait_with_output().unwrap();
    assert_eq!((exit_code(ended.status), ended.stdout.len()), (130, 0));
    assert!(!directory.exists(), "nothing was ever protected in it");
}
