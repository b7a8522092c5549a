//! Every disk of an agent, and every mount of a receiver, by its name on one socket.

use std::process::{Command, Stdio};

use backtide_e2e::{Bench, Held, Load, Reconnecting, tools};

const SIZE: u64 = 16 << 20;

/// The URI of an export on the unix socket `socket` of this bench.
fn at(bench: &Bench, export: &str, socket: &str) -> String {
    format!("nbd+unix:///{export}?socket={}", bench.name(socket))
}

fn size_of(uri: &str) -> Option<u64> {
    let (known, said) = tools::try_run("nbdinfo", &["--size", uri]);
    known.then(|| said.trim().parse().expect("a size"))
}

#[test]
fn every_disk_is_an_export_of_one_socket() {
    let bench = Bench::new();
    let _receiver = bench.receiver();
    let agent = bench.daemon(&["agent", "run", "--nbd-listen", &at(&bench, "", "disks.nbd")]);
    assert_eq!(bench.json(&["status"])["nbd_listen"], at(&bench, "", "disks.nbd"));
    let uri = |export: &str| at(&bench, export, "disks.nbd");
    assert_eq!(size_of(&uri("")), None, "there is no disk yet");
    let mut disks = Vec::new();
    for (name, bytes) in [("vm1", SIZE), ("vm2", 2 * SIZE)] {
        let image = format!("{name}.img");
        bench.image(&image, bytes);
        disks.push(bench.attach(name, &image, &[]));
        assert_eq!(size_of(&uri(name)), Some(bytes));
        let only = disks.len() == 1;
        assert_eq!(size_of(&uri("")), only.then_some(bytes), "the only disk is the default");
    }
    let list = tools::run("nbdinfo", &["--list", &uri("")]);
    for part in ["export=\"vm1\"", "export=\"vm2\"", "description: protected by backtide"] {
        assert!(list.contains(part), "{part} is not in {list}");
    }
    bench.image("pattern", SIZE);
    tools::run("qemu-io", &["-f", "raw", &bench.name("pattern"), "-c", "write -P 0x5a 3M 9M"]);
    tools::run("nbdcopy", &["--connections=4", &bench.name("pattern"), &uri("vm1")]);
    tools::qemu_io(&uri("vm2"), &["write -P 0x6b 1M 1M", "flush", "read -P 0x6b 1M 1M"]);
    for disk in &disks {
        disk.settle();
        disk.latest_is_the_image();
    }
    tools::assert_same(&bench.name("pattern"), &uri("vm1"));
    // Who has come that way is a client like any other.
    let mut guest = Command::new("qemu-io")
        .args(["-f", "raw", &uri("vm1")])
        .stdin(Stdio::piped())
        .stdout(Stdio::null())
        .spawn()
        .expect("run qemu-io");
    disks[0].until("a client is there", |status| status["clients"] == 1);
    assert!(bench.run(&["detach", "vm1"]).sentence().contains("an NBD client has the disk open"));
    drop(guest.stdin.take());
    guest.wait().expect("wait for qemu-io");
    disks[0].until("it is gone", |status| status["clients"] == 0);
    bench.json(&["detach", "vm1"]);
    assert_eq!(size_of(&uri("vm1")), None, "detached");
    assert_eq!(size_of(&uri("")), Some(2 * SIZE), "the only one that is left");
    let said = bench.run(&[
        "attach",
        "vm3",
        &bench.name("vm1.img"),
        "--receiver",
        &bench.socket("stream.sock"),
        "--nbd",
        &uri("vm3"),
    ]);
    assert!(said.sentence().contains("in use"), "{said:?}");
    assert_eq!(agent.stop(), 0);
    assert!(!bench.path("disks.nbd").exists(), "the file of the socket is left");
}

#[test]
fn a_chosen_disk_is_the_default_on_a_port_of_loopback() {
    let bench = Bench::new();
    let _receiver = bench.receiver();
    let file = bench.path("agent.toml");
    let free = std::net::TcpListener::bind("127.0.0.1:0").expect("bind").local_addr().expect("an address");
    let server = format!("nbd://{free}");
    std::fs::write(&file, format!("nbd_listen = \"{server}/vm2\"\n")).expect("write");
    let _agent = bench.daemon(&["agent", "run", "--config", file.to_str().expect("text")]);
    for (name, bytes) in [("vm1", SIZE), ("vm2", 2 * SIZE)] {
        bench.image(name, bytes);
        bench.attach(name, name, &[]);
    }
    for (export, bytes) in [("", 2 * SIZE), ("vm1", SIZE), ("vm2", 2 * SIZE)] {
        assert_eq!(size_of(&format!("{server}/{export}")), Some(bytes), "{export:?}");
    }
    bench.json(&["agent", "restart"]);
    assert_eq!(bench.json(&["status"])["nbd_listen"], format!("{server}/vm2"));
    assert_eq!(size_of(&server), Some(2 * SIZE));
    std::fs::write(&file, format!("nbd_listen = \"{free}\"\n")).expect("write");
    let said = bench.run(&["agent", "run", "--config", file.to_str().expect("text")]);
    assert_eq!(said.code, 2, "{said:?}");
    assert!(said.sentence().contains("nbd_listen"), "{said:?}");
}

#[test]
fn restarts_and_deaths_are_a_pause_on_the_shared_socket_too() {
    let bench = Bench::new();
    let _receiver = bench.receiver();
    let listen = at(&bench, "", "disks.nbd");
    let environment = [("BACKTIDE_NBD_LISTEN", listen.as_str())];
    let mut held = Held { holder: Some(bench.daemon_with(&["agent", "run", "--hold"], &environment)) };
    held.holder.as_mut().expect("it runs").may_complain("the agent has died");
    let mut disks = Vec::new();
    for name in ["vm1", "vm2"] {
        bench.image(&format!("{name}.img"), SIZE);
        disks.push(bench.attach(name, &format!("{name}.img"), &[]));
        disks.last().expect("one").wait("sync");
    }
    let guest = Reconnecting::before(&bench, "vm1", &bench.path("disks.nbd"));
    let load = Load::start(&guest.uri, 1);
    load.goes_on(100);
    bench.json(&["agent", "restart"]);
    load.goes_on(100);
    held.kill_agent();
    load.goes_on(100);
    bench.json(&["agent", "restart"]);
    load.goes_on(100);
    let written = load.stop();
    for disk in &disks {
        disk.latest_is_the_image();
    }
    written.model().assert_is_in(&disks[0].restore("latest"), written.writes.len(), "latest");
    drop(guest);
    // A disk that is set back, or has another size, is found under its name as before.
    disks[1].qemu_io(&["write -P 1 0 1M"]);
    let point = disks[1].last();
    disks[1].qemu_io(&["write -P 2 0 1M"]);
    disks[1].until("nobody is there", |status| status["clients"] == 0);
    disks[1].rewind(point);
    tools::qemu_io(&at(&bench, "vm2", "disks.nbd"), &["read -P 1 0 1M"]);
    disks[1].whole();
    disks[1].until("nobody is there", |status| status["clients"] == 0);
    bench.json(&["resize", "vm2", "--size", "32M"]);
    assert_eq!(size_of(&at(&bench, "vm2", "disks.nbd")), Some(2 * SIZE));
    assert_eq!(held.stop(), 0);
    assert!(!bench.path("disks.nbd").exists(), "the file of the socket is left");
}

#[test]
fn every_mount_is_an_export_of_one_socket() {
    let bench = Bench::new();
    let _receiver = bench.receiver_with(&format!("nbd_listen = \"{}\"\n", at(&bench, "", "points.nbd")));
    let _agent = bench.agent();
    bench.image("vm1.img", SIZE);
    let disk = bench.attach("vm1", "vm1.img", &[]);
    disk.wait("sync");
    disk.qemu_io(&["write -P 1 0 1M"]);
    bench.json(&["mark", "before", "vm1"]);
    disk.qemu_io(&["write -P 2 0 1M"]);
    disk.settle();
    let uri = |export: &str| at(&bench, export, "points.nbd");
    let mut mounts = Vec::new();
    for point in ["mark:before", "latest"] {
        let mount = bench.json(&["mount", "vm1", "--at", point]);
        mounts.push(mount["id"].as_str().expect("an id").to_owned());
        assert_eq!(size_of(&uri("")).is_some(), mounts.len() == 1, "the only mount is the default");
    }
    let list = tools::run("nbdinfo", &["--list", &uri("")]);
    for (id, byte) in mounts.iter().zip([1, 2]) {
        assert!(list.contains(&format!("export=\"{id}\"")), "{id} is not in {list}");
        tools::run("qemu-io", &["-r", "-f", "raw", &uri(id), "-c", &format!("read -P {byte} 0 1M")]);
    }
    let writable = bench.json(&["mount", "vm1", "--at", "latest", "--writable"]);
    let id = writable["id"].as_str().expect("an id");
    tools::qemu_io(&uri(id), &["write -P 3 0 1M", "flush", "read -P 3 0 1M", "read -P 0 1M 1M"]);
    bench.json(&["unmount", &mounts[0]]);
    assert_eq!(size_of(&uri(&mounts[0])), None, "unmounted");
    assert_eq!(size_of(&uri(&mounts[1])), Some(SIZE));
}
