//! Daemons that may open few files or take few streams, and clients that open many connections and do nothing with them.

use std::{io::Read, os::unix::net::UnixStream};

use backtide_e2e::{Bench, nbd_wire::Connection, tools};

const SIZE: u64 = 16 << 20;

/// So many files may a daemon open, whatever it asks for.
const LIMIT: &str = "64";

#[test]
fn idle_clients_take_no_descriptor_that_somebody_needs() {
    let bench = Bench::new();
    let script = format!("ulimit -n {LIMIT} && exec \"$@\"");
    let limited = ["sh", "-c", &script, "sh"];
    let receiver = bench.daemon_under(&limited, &["receiver", "run"]);
    let agent = bench.daemon_under(&limited, &["agent", "run"]);
    bench.image("vm1.img", SIZE);
    let disk = bench.attach("vm1", "vm1.img", &[]);
    disk.wait("sync");
    let mut guest = Connection::open(&disk.uri());
    guest.write(0, &[1; 4096], false).expect("write");
    for (socket, daemon) in [
        ("agent.sock", &agent),
        ("receiver.sock", &receiver),
        ("stream.sock", &receiver),
        ("vm1.nbd", &agent),
    ] {
        let idle: Vec<_> =
            (0..100).map(|_| UnixStream::connect(bench.path(socket)).expect("connect")).collect();
        // Whoever comes behind them all is served, ...
        bench.json(&["status"]);
        bench.json(&["receiver", "status"]);
        tools::run("nbdinfo", &[&disk.uri()]);
        bench.json(&["pause", "vm1"]);
        bench.json(&["resume", "vm1"]);
        disk.wait("sync");
        // ... and who was there before them is as ever.
        guest.write(4096, &[2; 4096], true).expect("the guest goes on");
        disk.settle();
        assert_eq!(disk.status()["local_error"], serde_json::Value::Null, "{socket}");
        let log = daemon.log();
        let said: Vec<_> = log.lines().filter(|line| line.contains("can be accepted")).collect();
        let of_socket = said.iter().filter(|line| line.contains(socket)).count();
        assert_eq!(of_socket, 1, "one outage, one line: {said:#?}");
        drop(idle);
    }
    drop(guest);
    bench.json(&["detach", "vm1"]);
}

#[test]
fn a_stream_that_says_nothing_keeps_no_agent_from_the_receiver() {
    let bench = Bench::new();
    let receiver = bench.receiver_with("[limits]\nconnections = 2\n");
    let _agent = bench.agent();
    let connect = || UnixStream::connect(bench.path("stream.sock")).expect("connect");
    let ended = |stream: &mut UnixStream| stream.read(&mut [0]).expect("an end in good order") == 0;
    let complained = || receiver.log().lines().filter(|line| line.contains("can be served")).count();
    bench.image("vm1.img", SIZE);
    bench.image("vm2.img", SIZE);
    bench.attach("vm1", "vm1.img", &[]).wait("sync");
    let mut silent: Vec<_> = (0..3).map(|_| connect()).collect();
    assert!(ended(&mut silent[0]) && ended(&mut silent[1]), "each gives way to the next");
    bench.attach("vm2", "vm2.img", &[]).wait("sync");
    assert_eq!(complained(), 0, "{}", receiver.log());
    // Both places are agents' now: they stay, and the log is told once of all who come.
    for _ in 0..5 {
        assert!(ended(&mut connect()));
    }
    assert_eq!(complained(), 1, "{}", receiver.log());
    assert_eq!(bench.disk("vm1").status()["mode"], "sync");
}
