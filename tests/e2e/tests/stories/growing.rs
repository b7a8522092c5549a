//! A disk that grows while it is attached.

use std::{
    io::{BufRead, BufReader, Write},
    os::unix::net::UnixStream,
    path::Path,
};

use backtide_e2e::{Bench, Guest, LoopDevice, skip, tools};
use serde_json::{Value, json};

const SIZE: u64 = 64 << 20;
const GROWN: u64 = 96 << 20;

/// Bytes that a resync compared or sent.
fn looked_at(status: &Value) -> u64 {
    let counters = &status["counters"];
    counters["resync_equal_bytes"].as_u64().unwrap() + counters["resync_sent_bytes"].as_u64().unwrap()
}

fn size_of(restored: &Path) -> u64 {
    std::fs::metadata(restored).unwrap().len()
}

#[test]
fn a_disk_grows_and_each_point_has_the_size_of_then() {
    let bench = Bench::new();
    let (_receiver, _agent, disk) = bench.protected(SIZE, &[]);
    disk.qemu_io(&["write -P 0x11 0 32M"]);
    disk.settle();
    let before = disk.last();
    // Grown by hand; what lies there now is not zeroes.
    std::fs::File::options().write(true).open(&disk.image).unwrap().set_len(GROWN).unwrap();
    tools::qemu_io(&disk.image, &[&format!("write -P 0x22 {} 1M", 80 << 20)]);
    let report = bench.json(&["resize", "vm1"]);
    assert_eq!((&report["size_before"], &report["disk"]["size"]), (&json!(SIZE), &json!(GROWN)), "{report}");
    assert_eq!(report["hung_up"], 0);
    let shown = tools::run("nbdinfo", &["--size", &disk.uri()]);
    assert_eq!(shown.trim(), GROWN.to_string(), "new connections see it at once");
    disk.qemu_io(&[&format!("write -P 0x33 {} 1M", GROWN - (1 << 20)), "write -P 0x44 1M 1M"]);
    disk.latest_is_the_image();
    let status = disk.status();
    assert!(looked_at(&status) < 8 << 20, "only what is new is looked at: {status}");
    let old = disk.restore(&format!("lsn:{before}"));
    assert_eq!(size_of(&old), SIZE);
    tools::qemu_io(old.to_str().unwrap(), &["read -P 0x11 0 32M"]);
    assert_eq!(size_of(&disk.restore("latest")), GROWN);
    let mount = bench.json(&["mount", "vm1", "--at", &format!("lsn:{before}")]);
    let shown = tools::run("nbdinfo", &["--size", mount["uri"].as_str().unwrap()]);
    assert_eq!(shown.trim(), SIZE.to_string());
    // Twice in a row, and to an odd size.
    let report = bench.json(&["resize", "vm1"]);
    assert_eq!(report["disk"]["size"], GROWN, "nothing to do: {report}");
    bench.json(&["resize", "vm1", "--size", &(GROWN + 512).to_string()]);
    disk.qemu_io(&[&format!("write -P 0x55 {GROWN} 512")]);
    disk.latest_is_the_image();
}

#[test]
fn a_block_device_grows_under_its_disk() {
    let bench = Bench::new();
    let file = bench.image("behind.img", SIZE);
    let device = match LoopDevice::of(&file, 512) {
        Ok(device) => device,
        Err(why) => return skip(&why),
    };
    let (_receiver, _agent) = (bench.receiver(), bench.agent());
    bench.json(&["attach", "vm1", device.path(), "--receiver", &bench.socket("stream.sock")]);
    let disk = bench.disk("vm1");
    disk.qemu_io(&["write -P 0x11 0 32M"]);
    disk.settle();
    let before = disk.last();
    let grow = |bytes: u64| {
        std::fs::File::options().write(true).open(&file).unwrap().set_len(bytes).unwrap();
        tools::run("losetup", &["-c", device.path()]);
    };
    grow(GROWN);
    tools::qemu_io(device.path(), &[&format!("write -P 0x22 {} 1M", 80 << 20), "flush"]);
    let report = bench.json(&["resize", "vm1"]);
    assert_eq!((&report["size_before"], &report["disk"]["size"]), (&json!(SIZE), &json!(GROWN)), "{report}");
    disk.qemu_io(&[&format!("write -P 0x33 {} 1M", GROWN - (1 << 20)), "write -P 0x44 1M 1M"]);
    disk.settle();
    tools::assert_same(&disk.uri(), disk.restore("latest").to_str().unwrap());
    let status = disk.status();
    assert!(looked_at(&status) <= 33 << 20, "only what is new is looked at: {status}");
    let old = disk.restore(&format!("lsn:{before}"));
    assert_eq!(size_of(&old), SIZE);
    tools::qemu_io(old.to_str().unwrap(), &["read -P 0x11 0 32M"]);
    // Nobody makes a device longer through the agent.
    let refused = bench.run(&["resize", "vm1", "--size", "128MiB"]);
    assert_eq!(
        (refused.code, refused.sentence().contains("the device behind disk vm1")),
        (2, true),
        "{refused:?}"
    );
}

#[test]
fn a_disk_cannot_shrink_and_says_so() {
    let bench = Bench::new();
    let (_receiver, agent, disk) = bench.protected(SIZE, &[]);
    let said = bench.run(&["resize", "vm1", "--size", "32MiB"]);
    assert_eq!((said.code, &said.error()["code"]), (5, &json!("refused")), "{said:?}");
    assert_eq!(said.sentence(), format!("disk vm1 cannot shrink from {SIZE} to {} bytes", SIZE / 2));
    assert_eq!(disk.status()["size"], SIZE);
    disk.settle();
    // A shrunk image at an attach, and at the start of the agent.
    bench.json(&["detach", "vm1"]);
    let cut =
        |size: u64| std::fs::File::options().write(true).open(&disk.image).unwrap().set_len(size).unwrap();
    cut(SIZE / 2);
    let stream = bench.socket("stream.sock");
    let said = bench.run(&["attach", "vm1", &disk.image, "--receiver", &stream]);
    assert_eq!(said.code, 5, "{said:?}");
    assert!(said.sentence().contains("a disk cannot shrink"), "{said:?}");
    cut(SIZE);
    bench.attach("vm1", "vm1.img", &[]);
    disk.settle();
    assert_eq!(agent.stop(), 0);
    cut(SIZE / 2);
    let mut agent = bench.agent();
    agent.may_complain("cannot attach the disk again");
    let status = disk.status();
    assert!(status["reason"].as_str().is_some_and(|why| why.contains("a disk cannot shrink")), "{status}");
}

#[test]
fn a_client_that_has_the_disk_open_is_hung_up_only_when_that_was_asked_for() {
    let bench = Bench::new();
    let (_receiver, _agent, disk) = bench.protected(SIZE, &[]);
    let mut guest = Guest::connect(&disk.uri());
    guest.write(0, &[0x11; 4096]).unwrap();
    let said = bench.run(&["resize", "vm1", "--size", &GROWN.to_string()]);
    assert_eq!((said.code, &said.error()["code"]), (5, &json!("busy")), "{said:?}");
    assert!(said.sentence().contains("sees a new size only when it connects again"), "{said:?}");
    guest.write(4096, &[0x22; 4096]).unwrap();
    let said = bench.plain(&["resize", "vm1", "--size", &GROWN.to_string(), "--reconnect"]);
    assert_eq!(said.code, 0, "{said:?}");
    assert!(said.stdout.contains("block_resize") && said.stdout.contains(&GROWN.to_string()), "{said:?}");
    assert!(guest.write(8192, &[0x33; 4096]).is_err(), "this one does not connect again");
    let mut guest = Guest::connect(&disk.uri());
    guest.write(GROWN - 4096, &[0x44; 4096]).unwrap();
    drop(guest);
    disk.latest_is_the_image();
}

#[test]
fn a_qcow2_disk_grows_to_the_size_that_is_named() {
    let bench = Bench::new();
    let (_receiver, _agent) = (bench.receiver(), bench.agent());
    let image = bench.name("vm1.qcow2");
    tools::run("qemu-img", &["create", "-q", "-f", "qcow2", &image, &SIZE.to_string()]);
    let disk = bench.attach("vm1", "vm1.qcow2", &[]);
    disk.qemu_io(&["write -P 0x11 0 8M"]);
    disk.settle();
    let said = bench.run(&["resize", "vm1"]);
    assert_eq!(said.code, 2, "{said:?}");
    let report = bench.json(&["resize", "vm1", "--size", &GROWN.to_string()]);
    assert_eq!(report["disk"]["size"], GROWN, "{report}");
    disk.qemu_io(&[&format!("write -P 0x22 {} 1M", GROWN - (1 << 20))]);
    disk.settle();
    assert!(looked_at(&disk.status()) < 4 << 20, "only what is new: {}", disk.status());
    let restored = disk.restore("latest");
    bench.json(&["detach", "vm1"]);
    let (same, said) = tools::try_run(
        "qemu-img",
        &["compare", "-f", "qcow2", "-F", "raw", &image, restored.to_str().unwrap()],
    );
    assert!(same, "{said}");
}

#[test]
fn a_disk_behind_an_nbd_server_grows_with_what_the_server_tells() {
    let bench = Bench::new();
    let (_receiver, _agent) = (bench.receiver(), bench.agent());
    let image = bench.image("behind.img", SIZE);
    let socket = bench.name("behind.sock");
    let _server = tools::Beside::start("nbdkit", &["-f", "-U", &socket, "file", image.to_str().unwrap()]);
    tools::wait_for_socket(socket.as_ref());
    let uri = format!("nbd+unix:///?socket={socket}");
    let disk = bench.attach("vm1", &uri, &[]);
    disk.qemu_io(&["write -P 0x11 0 16M"]);
    disk.settle();
    // nbdkit tells each new connection what its file has then.
    std::fs::File::options().write(true).open(&image).unwrap().set_len(GROWN).unwrap();
    let report = bench.json(&["resize", "vm1"]);
    assert_eq!(report["disk"]["size"], GROWN, "{report}");
    disk.qemu_io(&[&format!("write -P 0x22 {} 1M", GROWN - (1 << 20))]);
    disk.settle();
    assert!(looked_at(&disk.status()) < 4 << 20, "only what is new: {}", disk.status());
    tools::assert_same(&uri, disk.restore("latest").to_str().unwrap());
}

/// A monitor of QEMU's, spoken to in QMP.
struct Monitor(BufReader<UnixStream>);

impl Monitor {
    fn connect(path: &Path) -> Self {
        tools::wait_for_socket(path);
        let mut monitor = Self(BufReader::new(UnixStream::connect(path).unwrap()));
        assert!(monitor.next_line()["QMP"].is_object());
        monitor.succeed("qmp_capabilities", &json!({}));
        monitor
    }

    fn next_line(&mut self) -> Value {
        let mut line = String::new();
        self.0.read_line(&mut line).unwrap();
        serde_json::from_str(&line).unwrap()
    }

    fn succeed(&mut self, command: &str, arguments: &Value) -> Value {
        let text = format!("{}\n", json!({"execute": command, "arguments": arguments}));
        self.0.get_mut().write_all(text.as_bytes()).unwrap();
        loop {
            let answer = self.next_line();
            if answer["event"].is_null() {
                assert!(answer["error"].is_null(), "{command}: {answer}");
                return answer["return"].clone();
            }
        }
    }
}

#[test]
fn qemu_shows_its_guest_the_new_size_as_the_command_says() {
    let bench = Bench::new();
    let (_receiver, _agent, disk) = bench.protected(SIZE, &[]);
    let (guest, monitor) = (bench.name("guest.sock"), bench.path("qmp.sock"));
    let behind = format!(
        "driver=nbd,node-name=disk0,export=vm1,reconnect-delay=60,server.type=unix,server.path={}",
        bench.name("vm1.nbd")
    );
    let chardev = format!("socket,id=qmp,path={},server=on,wait=off", monitor.display());
    let arguments = [
        ["--blockdev", &behind],
        ["--chardev", &chardev],
        ["--monitor", "chardev=qmp"],
        ["--nbd-server", &format!("addr.type=unix,addr.path={guest}")],
        ["--export", "type=nbd,id=guest,node-name=disk0,name=guest,writable=on"],
    ];
    let _qemu = tools::Beside::start("qemu-storage-daemon", arguments.as_flattened());
    tools::wait_for_socket(guest.as_ref());
    let uri = format!("nbd+unix:///guest?socket={guest}");
    tools::qemu_io(&uri, &["write -P 0x11 0 1M"]);
    bench.json(&["resize", "vm1", "--size", &GROWN.to_string(), "--reconnect"]);
    // The next request finds the connection gone and makes a new one.
    tools::qemu_io(&uri, &["read -P 0x11 0 1M"]);
    let mut monitor = Monitor::connect(&monitor);
    // A virtual machine's device allows it; an export does not, so it goes and comes again.
    monitor.succeed("block-export-del", &json!({"id": "guest", "mode": "hard"}));
    while !monitor.succeed("query-block-exports", &json!({})).as_array().unwrap().is_empty() {}
    monitor.succeed("block_resize", &json!({"node-name": "disk0", "size": GROWN}));
    let export =
        json!({"type": "nbd", "id": "again", "node-name": "disk0", "name": "guest", "writable": true});
    monitor.succeed("block-export-add", &export);
    tools::qemu_io(&uri, &[&format!("write -P 0x22 {} 1M", GROWN - (1 << 20))]);
    disk.latest_is_the_image();
}
