//! Daemons that may open few files, and clients that open many connections and do nothing with them.

use std::os::unix::net::UnixStream;

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
