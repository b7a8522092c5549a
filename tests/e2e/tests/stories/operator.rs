//! What an operator does besides the everyday: a lost state directory, work that is called off, a
//! terminal that is closed.

use std::process::Stdio;

use backtide_e2e::{Bench, http, tools};

const SIZE: u64 = 64 << 20;

#[test]
fn an_agent_that_lost_its_state_adopts_the_history_the_receiver_keeps() {
    let bench = Bench::new();
    let (receiver, agent, disk) = bench.protected(SIZE, &[]);
    disk.qemu_io(&["write -P 0x11 0 32M"]);
    disk.settle();
    let (history, uuid) = (disk.status()["history"].clone(), disk.status()["uuid"].clone());
    let early = format!("lsn:{}", disk.last());
    let was = disk.restore(&early);
    // What the guest writes while the receiver is away, nobody has later.
    receiver.kill();
    disk.qemu_io(&["write -P 0x21 12M 1M"]);
    agent.kill();
    std::fs::remove_dir_all(bench.path("state")).unwrap();
    tools::qemu_io(&disk.image, &["write -P 0x22 10M 1M"]);
    let _receiver = bench.receiver();
    let _agent = bench.agent();

    let stream = bench.socket("stream.sock");
    let attach = ["attach", "vm1", &disk.image, "--receiver", &stream];
    let said = bench.run(&attach);
    assert_eq!((said.code, said.error()["code"].as_str()), (5, Some("refused")), "{said:?}");
    assert!(said.error()["hint"].as_str().unwrap().contains("--adopt"), "{said:?}");
    assert_eq!(bench.json(&["status"])["disks"], serde_json::json!([]), "it is not attached for nothing");

    let said =
        bench.run(&[&attach[..], &["--adopt", "--receiver-api", &bench.socket("nobody.sock")]].concat());
    assert_eq!(said.code, 6, "{said:?}");
    bench.json(&[&attach[..], &["--adopt"]].concat());
    disk.latest_is_the_image();
    let holes = disk.holes();
    assert_eq!((holes.len(), &holes[0]["reason_code"]), (1, &"bitmap-untrusted".into()), "{holes:?}");
    let status = disk.status();
    assert_eq!((&status["history"], &status["uuid"]), (&history, &uuid), "{status}");
    let sent = status["counters"]["resync_sent_bytes"].as_u64().unwrap();
    assert!((2 << 20..3 << 20).contains(&sent), "the compare sends what differs: {status}");
    tools::assert_same_images(&was, &disk.restore(&early));
    // From now on the agent knows it by itself.
    bench.json(&["detach", "vm1"]);
    let said = bench.run(&[&attach[..], &["--adopt"]].concat());
    assert_eq!((said.code, said.error()["code"].as_str()), (5, Some("exists")), "{said:?}");
    bench.json(&attach);
    disk.settle();
}

#[test]
fn a_disk_that_another_agent_has_connected_is_not_adopted() {
    let bench = Bench::new();
    let (_receiver, _agent, _disk) = bench.protected(SIZE, &[]);
    bench.image("copy.img", SIZE);
    let api = bench.socket("other.sock");
    let _other = bench.daemon(&["agent", "run", "--api", &api, "--state", &bench.name("other")]);
    let (image, stream) = (bench.name("copy.img"), bench.socket("stream.sock"));
    let said = bench.run(&["--agent", &api, "attach", "vm1", &image, "--receiver", &stream, "--adopt"]);
    assert_eq!((said.code, said.error()["code"].as_str()), (5, Some("busy")), "{said:?}");
}

/// A verify that cannot end: the disk behind it stands still.
fn endless(bench: &Bench) -> (tools::Beside, backtide_e2e::Daemon, backtide_e2e::Daemon) {
    let (receiver, agent) = (bench.receiver(), bench.agent());
    bench.image("behind.img", SIZE);
    let (image, socket) = (bench.name("behind.img"), bench.name("behind.sock"));
    let server = tools::Beside::start("qemu-nbd", &["-f", "raw", "-t", "-e", "8", "-k", &socket, &image]);
    tools::wait_for_socket(socket.as_ref());
    bench.attach("vm1", &format!("nbd+unix:///?socket={socket}"), &[]).settle();
    server.signal("STOP");
    (server, receiver, agent)
}

#[test]
fn a_verify_is_called_off() {
    let bench = Bench::new();
    let (server, _receiver, _agent) = endless(&bench);
    let said = bench.run(&["verify", "vm1", "--cancel"]);
    assert_eq!(said.code, 4, "there is none yet: {said:?}");
    assert_eq!(bench.json(&["verify", "vm1", "--no-wait"])["state"], "running");
    let ended = bench.json(&["verify", "vm1", "--cancel"]);
    assert_eq!((&ended["state"], ended["ended"].is_null()), (&"failed".into(), false), "{ended}");
    assert!(ended["error"]["message"].as_str().unwrap().contains("cancelled"), "{ended}");
    server.signal("CONT");
    assert_eq!(bench.json(&["verify", "vm1"])["state"], "done", "the next one is not in its way");
}

#[test]
fn ctrl_c_ends_the_verify_it_waits_for() {
    let bench = Bench::new();
    let (_server, _receiver, _agent) = endless(&bench);
    let command = bench
        .command(&["--json", "verify", "vm1"])
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .expect("run backtide");
    while bench.run(&["verify", "vm1", "--last"]).code == 4 {}
    tools::run("kill", &["-s", "INT", &command.id().to_string()]);
    let output = command.wait_with_output().expect("wait for backtide");
    let stderr = String::from_utf8(output.stderr).unwrap();
    assert_eq!(output.status.code(), Some(130), "{stderr}");
    assert_eq!(stderr.trim(), r#"{"error":{"code":"interrupted","message":"interrupted"}}"#);
    let ended = http::call(&bench.path("agent.sock"), "GET", "/v1/disks/vm1/verify", None);
    assert_eq!(ended["state"], "failed", "{ended}");
}

#[test]
fn a_closed_terminal_does_not_end_a_daemon() {
    let bench = Bench::new();
    let (receiver, agent, disk) = bench.protected(SIZE, &[]);
    receiver.signal("HUP");
    agent.signal("HUP");
    disk.qemu_io(&["write -P 0x11 0 1M"]);
    disk.latest_is_the_image();
    assert_eq!((agent.stop(), receiver.stop()), (0, 0), "they end when they are told to");
}
