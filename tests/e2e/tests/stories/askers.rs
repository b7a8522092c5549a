//! Who asked for a change of the agent's disks may go away: the change comes to its end.

use std::{
    io,
    os::unix::net::{UnixListener, UnixStream},
};

use backtide_e2e::{Bench, http, tools};
use serde_json::json;

const SIZE: u64 = 16 << 20;

/// A disk behind NBD, so that a test can hold it up.
fn behind(bench: &Bench) -> (tools::Beside, String) {
    bench.image("behind.img", SIZE);
    let (image, socket) = (bench.name("behind.img"), bench.name("behind.sock"));
    let server = tools::Beside::start("qemu-nbd", &["-f", "raw", "-t", "-e", "8", "-k", &socket, &image]);
    tools::wait_for_socket(socket.as_ref());
    (server, socket)
}

#[test]
fn a_detach_comes_to_its_end_without_its_asker() {
    let bench = Bench::new();
    let (_receiver, _agent) = (bench.receiver(), bench.agent());
    let (server, socket) = behind(&bench);
    let uri = format!("nbd+unix:///?socket={socket}");
    let disk = bench.attach("vm1", &uri, &[]);
    disk.qemu_io(&["write -P 0x11 0 1M"]);
    disk.settle();
    // The flush of the detach waits for the disk behind.
    server.signal("STOP");
    let asker = http::ask(&bench.path("agent.sock"), "DELETE", "/v1/disks/vm1", None);
    while bench.run(&["status", "vm1"]).code != 5 {}
    drop(asker);
    bench.json(&["status"]);
    server.signal("CONT");
    // Not "attached already": the detach has the agent to itself until it is done.
    let disk = bench.attach("vm1", &uri, &[]);
    disk.settle();
}

#[test]
fn an_attach_comes_to_its_end_without_its_asker() {
    let bench = Bench::new();
    let (_receiver, _agent) = (bench.receiver(), bench.agent());
    let (_server, socket) = behind(&bench);
    let between = UnixListener::bind(bench.path("between.sock")).unwrap();
    let uri = format!("nbd+unix:///?socket={}", bench.name("between.sock"));
    let body = json!({"name": "vm1", "image": uri, "receiver": bench.socket("stream.sock")});
    let asker = http::ask(&bench.path("agent.sock"), "POST", "/v1/disks", Some(&body));
    // The agent waits for the server's greeting.
    let (first, _) = between.accept().unwrap();
    drop(asker);
    bench.json(&["status"]);
    std::thread::spawn(move || {
        pass_on(first, &socket);
        for stream in between.incoming() {
            pass_on(stream.expect("accept a client"), &socket);
        }
    });
    while bench.run(&["status", "vm1"]).code == 4 {}
    bench.json(&["wait", "vm1", "--for", "sync"]);
}

/// Carries bytes both ways between a client and the server at `socket`.
fn pass_on(client: UnixStream, socket: &str) {
    let server = UnixStream::connect(socket).expect("connect to the server behind");
    let ends = [
        (client.try_clone().expect("clone a socket"), server.try_clone().expect("clone a socket")),
        (server, client),
    ];
    for (mut from, mut to) in ends {
        std::thread::spawn(move || {
            // Either end may go away at any time.
            let _ = io::copy(&mut from, &mut to);
            let _ = to.shutdown(std::net::Shutdown::Write);
        });
    }
}
