//! Under a service manager, played here: sockets that it opened or keeps, and what it is told.

use std::{
    io::Read,
    os::{
        fd::OwnedFd,
        unix::net::{UnixDatagram, UnixListener, UnixStream},
    },
};

use backtide_e2e::Bench;
use backtide_socket::passing;

const SIZE: u64 = 16 << 20;

/// What a service manager hears.
struct Manager {
    inbox: UnixDatagram,
}

impl Manager {
    fn of(bench: &Bench) -> Self {
        Self { inbox: UnixDatagram::bind(bench.path("notify.sock")).unwrap() }
    }

    /// The next message with this line, and the socket that came with it.
    fn hears(&self, line: &str) -> (String, Option<OwnedFd>) {
        loop {
            let (text, mut sockets) = passing::receive(&self.inbox).unwrap();
            if text.lines().any(|other| other.starts_with(line)) {
                return (text, sockets.pop());
            }
        }
    }
}

fn name_in(text: &str) -> String {
    text.lines().find_map(|line| line.strip_prefix("FDNAME=")).expect("a name").to_owned()
}

#[test]
fn a_service_manager_keeps_the_sockets_and_hears_how_it_goes() {
    let bench = Bench::new();
    let manager = Manager::of(&bench);
    let address = bench.name("notify.sock");
    let environment = [("NOTIFY_SOCKET", address.as_str()), ("WATCHDOG_USEC", "300000")];
    let _receiver = bench.receiver();
    let agent = bench.daemon_with(&["agent", "run"], &environment);
    assert!(name_in(&manager.hears("FDSTORE=1").0).starts_with("backtide-api-"));
    assert!(manager.hears("READY=1").0.contains("STATUS=no disks"));
    manager.hears("WATCHDOG=1");
    bench.image("vm1.img", SIZE);
    let disk = bench.attach("vm1", "vm1.img", &[]);
    let (text, socket) = manager.hears("FDSTORE=1");
    let name = name_in(&text);
    assert!(name.starts_with("backtide-disk-vm1-"), "{name}");
    disk.wait("sync");
    agent.kill();
    // Nobody accepts, and nobody is refused: the client is served by the next agent.
    let mut client = UnixStream::connect(bench.path("vm1.nbd")).unwrap();
    let agent = bench.activated_agent(&name, socket.unwrap(), &environment);
    let mut greeting = [0; 8];
    client.read_exact(&mut greeting).unwrap();
    assert_eq!(&greeting, b"NBDMAGIC");
    assert!(manager.hears("READY=1").0.contains("STATUS=1 disk: 1 "));
    disk.qemu_io(&["write -P 0x11 0 1M"]);
    bench.json(&["agent", "restart"]);
    manager.hears("RELOADING=1");
    manager.hears("READY=1");
    manager.hears("WATCHDOG=1");
    disk.qemu_io(&["read -P 0x11 0 1M"]);
    disk.latest_is_the_image();
    drop(client);
    bench.json(&["detach", "vm1"]);
    assert_eq!(name_in(&manager.hears("FDSTOREREMOVE=1").0), name);
    assert!(!bench.path("vm1.nbd").exists());
    assert_eq!(agent.stop(), 0);
    manager.hears("STOPPING=1");
    assert!(bench.path("agent.sock").exists(), "the service manager has its socket still");
}

#[test]
fn a_socket_that_a_service_manager_opened_is_used_and_left() {
    let bench = Bench::new();
    let listener = UnixListener::bind(bench.path("vm1.nbd")).unwrap();
    let _receiver = bench.receiver();
    let agent = bench.activated_agent("web.socket", listener.into(), &[]);
    bench.image("vm1.img", SIZE);
    let disk = bench.attach("vm1", "vm1.img", &[]);
    disk.qemu_io(&["write -P 0x11 0 1M"]);
    bench.json(&["agent", "restart"]);
    disk.qemu_io(&["read -P 0x11 0 1M"]);
    disk.settle();
    bench.json(&["detach", "vm1"]);
    assert!(bench.path("vm1.nbd").exists(), "it is not the agent's to remove");
    bench.attach("vm1", "vm1.img", &[]);
    disk.qemu_io(&["read -P 0x11 0 1M"]);
    assert_eq!(agent.stop(), 0);
    assert!(bench.path("vm1.nbd").exists());
}

#[test]
fn a_holder_passes_the_signs_of_life_on() {
    let bench = Bench::new();
    let manager = Manager::of(&bench);
    let address = bench.name("notify.sock");
    // The watchdog's process is the holder, which is no process of the agent's.
    let environment =
        [("NOTIFY_SOCKET", address.as_str()), ("WATCHDOG_USEC", "300000"), ("WATCHDOG_PID", "1")];
    let holder = bench.daemon_with(&["agent", "run", "--hold"], &environment);
    manager.hears("READY=1");
    manager.hears("WATCHDOG=1");
    manager.hears("WATCHDOG=1");
    assert_eq!(holder.stop(), 0);
}
