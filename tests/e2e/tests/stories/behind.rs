//! Disks that are not raw files: qcow2, and whatever an NBD server serves.

use std::os::unix::fs::FileExt;

use backtide_e2e::{Bench, Disk, tools};

const SIZE: u64 = 64 << 20;

#[test]
fn a_qcow2_image_is_protected_through_its_own_server() {
    let bench = Bench::new();
    let (_receiver, agent) = (bench.receiver(), bench.agent());
    let image = bench.name("vm1.qcow2");
    tools::run("qemu-img", &["create", "-q", "-f", "qcow2", &image, &SIZE.to_string()]);
    tools::run("qemu-io", &["-f", "qcow2", &image, "-c", "write -P 0x11 0 8M"]);
    let disk = bench.attach("vm1", "vm1.qcow2", &[]);
    disk.wait("sync");
    assert_eq!(disk.status()["size"], SIZE);
    let load = disk.load(1);
    load.goes_on(100);
    load.stop();
    // The qemu-nbd of a killed agent is ended by the next, or it would keep the image locked.
    agent.kill();
    let agent = bench.agent();
    disk.wait("sync");
    disk.qemu_io(&["write -P 0x22 20M 4M", "discard 1M 1M", "flush"]);
    disk.settle();
    let restored = disk.restore("latest");
    assert_eq!(agent.stop(), 0);
    // Its qemu-nbd ended with it, or the image would still be locked.
    let restored = restored.to_str().unwrap();
    let (same, said) = tools::try_run("qemu-img", &["compare", "-f", "qcow2", "-F", "raw", &image, restored]);
    assert!(same, "{said}");
    tools::run("qemu-img", &["check", &image]);
}

#[test]
fn a_disk_behind_nbd_is_protected_and_survives_a_crash_of_the_agent() {
    let bench = Bench::new();
    let (_receiver, agent) = (bench.receiver(), bench.agent());
    bench.image("behind.img", SIZE);
    let (image, socket) = (bench.name("behind.img"), bench.name("behind.sock"));
    let _server = tools::Beside::start("qemu-nbd", &["-f", "raw", "-t", "-e", "8", "-k", &socket, &image]);
    tools::wait_for_socket(socket.as_ref());
    let disk = bench.attach("vm1", &format!("nbd+unix:///?socket={socket}"), &[]);
    disk.wait("sync");
    assert_eq!(disk.status()["engine"], "nbd");
    let load = disk.load(1);
    load.goes_on(200);
    agent.kill();
    load.broken();
    let _agent = bench.agent();
    let load = disk.load(2);
    load.goes_on(100);
    load.stop();
    disk.qemu_io(&["write -z 1M 1M", "discard 4M 2M", "flush"]);
    disk.settle();
    tools::assert_same(&image, disk.restore("latest").to_str().unwrap());
}

#[test]
fn nbdkit_in_memory_is_a_disk_too() {
    let bench = Bench::new();
    let (_receiver, _agent) = (bench.receiver(), bench.agent());
    let socket = bench.name("memory.sock");
    let _server = tools::Beside::start("nbdkit", &["-f", "-U", &socket, "memory", "64M"]);
    tools::wait_for_socket(socket.as_ref());
    let uri = format!("nbd+unix:///?socket={socket}");
    let disk = bench.attach("vm1", &uri, &[]);
    disk.wait("sync");
    tools::Beside::spawn(tools::fio_verified(&disk.uri(), 16 << 20, 0)).succeed();
    disk.settle();
    tools::assert_same(&uri, disk.restore("latest").to_str().unwrap());
}

#[test]
fn a_disk_behind_with_large_blocks_hands_them_on_to_the_guest() {
    let bench = Bench::new();
    let (_receiver, _agent) = (bench.receiver(), bench.agent());
    let socket = bench.name("coarse.sock");
    let policy = ["blocksize-minimum=4096", "blocksize-maximum=64K", "blocksize-error-policy=error"];
    let mut arguments = vec!["-f", "-U", &socket, "--filter=blocksize-policy", "memory", "64M"];
    arguments.extend(policy);
    let _server = tools::Beside::start("nbdkit", &arguments);
    tools::wait_for_socket(socket.as_ref());
    let uri = format!("nbd+unix:///?socket={socket}");
    let disk = bench.attach("vm1", &uri, &[]);
    disk.wait("sync");
    let shown = tools::run("nbdinfo", &[&disk.uri()]);
    assert!(shown.contains("block_size_minimum: 4096"), "{shown}");
    assert!(shown.contains("block_size_maximum: 33554432"), "{shown}");
    disk.qemu_io(&["write -P 0x11 512 1024", "write -P 0x22 1M 8M", "write -z 2M 4k", "read -P 0x11 512 1k"]);
    disk.settle();
    tools::assert_same(&uri, disk.restore("latest").to_str().unwrap());
}

#[test]
fn a_disk_behind_that_fails_is_an_error_of_the_guest_and_nothing_else() {
    let bench = Bench::new();
    let (_receiver, mut agent) = (bench.receiver(), bench.agent());
    agent.may_complain("error");
    let (socket, trigger) = (bench.name("faulty.sock"), bench.name("fail-now"));
    let arguments = [
        "-f",
        "-U",
        &socket,
        "--filter=error",
        "memory",
        "64M",
        "error=EIO",
        "error-pwrite-rate=100%",
        &format!("error-file={trigger}"),
    ];
    let _server = tools::Beside::start("nbdkit", &arguments);
    tools::wait_for_socket(socket.as_ref());
    let uri = format!("nbd+unix:///?socket={socket}");
    let disk = bench.attach("vm1", &uri, &[]);
    disk.wait("sync");
    disk.qemu_io(&["write -P 0x11 0 1M"]);
    std::fs::write(&trigger, "").unwrap();
    let (_, said) = tools::try_run("qemu-io", &["-f", "raw", &disk.uri(), "-c", "write -P 0x22 512k 1M"]);
    assert!(said.contains("Input/output error"), "the guest has the error of its disk: {said}");
    std::fs::remove_file(&trigger).unwrap();
    disk.qemu_io(&["write -P 0x33 8M 1M"]);
    disk.settle();
    tools::assert_same(&uri, disk.restore("latest").to_str().unwrap());
    assert!(disk.status()["counters"]["errors"].as_u64() >= Some(1), "{}", disk.status());
}

#[test]
fn a_lost_qemu_nbd_is_started_again_and_the_guest_notices_nothing() {
    let bench = Bench::new();
    let (_receiver, _agent) = (bench.receiver(), bench.agent());
    let image = bench.name("vm1.qcow2");
    tools::run("qemu-img", &["create", "-q", "-f", "qcow2", &image, &SIZE.to_string()]);
    let disk = bench.attach("vm1", "vm1.qcow2", &[]);
    disk.wait("sync");
    let load = disk.load(1);
    for _ in 0..3 {
        load.goes_on(50);
        let id = std::fs::read_to_string(bench.path("vm1.qemu-nbd.pid")).unwrap();
        tools::run("kill", &["-s", "KILL", id.trim()]);
        load.goes_on(50);
    }
    let model = load.stop().model();
    disk.settle();
    assert_eq!(disk.status()["local_error"], serde_json::Value::Null);
    let restored = disk.restore("latest");
    model.assert_is_in(&restored, model.len(), "latest");
    bench.json(&["detach", "vm1"]);
    let (same, said) = tools::try_run(
        "qemu-img",
        &["compare", "-f", "qcow2", "-F", "raw", &image, restored.to_str().unwrap()],
    );
    assert!(same, "{said}");
}

#[test]
fn a_qemu_nbd_that_says_much_is_listened_to() {
    let bench = Bench::new();
    let _receiver = bench.receiver();
    // Far more than a pipe holds, before it serves.
    let script = "#!/bin/sh\nhead -c 1000000 /dev/zero | tr '\\0' x >&2\nexec \"$REAL_QEMU_NBD\" \"$@\"\n";
    bench.script("bin/qemu-nbd", script);
    let real = tools::run("sh", &["-c", "command -v qemu-nbd"]);
    let path = format!("{}:{}", bench.name("bin"), std::env::var("PATH").unwrap());
    let _agent = bench.daemon_with(&["agent", "run"], &[("PATH", &path), ("REAL_QEMU_NBD", real.trim())]);
    let image = bench.name("vm1.qcow2");
    tools::run("qemu-img", &["create", "-q", "-f", "qcow2", &image, &SIZE.to_string()]);
    let disk = bench.attach("vm1", "vm1.qcow2", &[]);
    disk.qemu_io(&["write -P 0x11 0 1M"]);
    disk.settle();
    bench.json(&["detach", "vm1"]);
}

#[test]
fn a_read_only_server_is_no_disk() {
    let bench = Bench::new();
    let (_receiver, _agent) = (bench.receiver(), bench.agent());
    bench.image("behind.img", SIZE);
    let (image, socket) = (bench.name("behind.img"), bench.name("behind.sock"));
    let _server = tools::Beside::start("qemu-nbd", &["-f", "raw", "-r", "-t", "-k", &socket, &image]);
    tools::wait_for_socket(socket.as_ref());
    let uri = format!("nbd+unix:///?socket={socket}");
    let refused = bench.run(&["attach", "vm1", &uri, "--receiver", &bench.socket("stream.sock")]);
    assert_ne!(refused.code, 0, "{refused:?}");
    assert!(refused.stderr.contains("read-only") && refused.stderr.contains(&socket), "{refused:?}");
}

#[test]
fn what_a_server_refuses_of_what_the_last_one_had_answered_is_told_once_and_sent_as_it_is() {
    let bench = Bench::new();
    let (_receiver, mut agent) = (bench.receiver(), bench.agent());
    for expected in
        ["the disk behind failed", "the disk behind refuses changes", "blocks are not as a guest was told"]
    {
        agent.may_complain(expected);
    }
    agent.may_complain("the local disk refused a guest request");
    bench.image("behind.img", SIZE);
    let (image, socket, full) = (bench.name("behind.img"), bench.name("behind.sock"), bench.name("full"));
    let serve = || {
        let trigger = format!("error-file={full}");
        let faults = ["error=ENOSPC", "error-pwrite-rate=100%", "error-zero-rate=100%", &trigger];
        let arguments = ["-f", "-U", &socket, "--filter=error", "file", &image].into_iter().chain(faults);
        let _ = std::fs::remove_file(&socket);
        let server = tools::Beside::start("nbdkit", &arguments.collect::<Vec<_>>());
        tools::wait_for_socket(socket.as_ref());
        server
    };
    let server = serve();
    let disk = bench.attach("vm1", &format!("nbd+unix:///?socket={socket}"), &[]);
    disk.wait("sync");
    let uri = disk.uri();
    let written = ["-f", "raw", &uri, "-c", "write -P 0x11 1M 64k", "-c", "sleep 1000000000"];
    let guest = tools::Beside::start("qemu-io", &written);
    disk.until("it is written", |status| status["counters"]["writes"].as_u64() >= Some(1));
    // It has answered, and goes with what it had not made stable; the next has no room for it.
    server.kill();
    std::fs::write(&full, "").unwrap();
    std::fs::OpenOptions::new()
        .write(true)
        .open(&image)
        .unwrap()
        .write_all_at(&[0; 64 << 10], 1 << 20)
        .unwrap();
    let _server = serve();
    guest.kill();
    // A guest that closes the disk flushes it, too.
    let steps = ["-c", "read -P 0 1M 64k", "-c", "flush", "-c", "flush"];
    let (_, said) = tools::try_run("qemu-io", &[&["-f", "raw", uri.as_str()][..], &steps].concat());
    assert!(said.contains("read 65536/65536") && !said.contains("verification failed"), "{said}");
    assert_eq!(disk.status()["counters"]["errors"], 1, "one flush of these failed");
    std::fs::remove_file(&full).unwrap();
    disk.qemu_io(&["write -P 0x33 8M 64k"]);
    disk.settle();
    assert_eq!(bench.json(&["verify", "vm1"])["differing_count"], 0);
    tools::assert_same(&image, disk.restore("latest").to_str().unwrap());
}

#[test]
fn a_disk_behind_that_comes_back_with_another_size_is_not_used() {
    let bench = Bench::new();
    let (_receiver, mut agent) = (bench.receiver(), bench.agent());
    agent.may_complain("the disk behind stays away");
    agent.may_complain("the disk behind failed");
    bench.image("behind.img", SIZE);
    let (image, socket) = (bench.name("behind.img"), bench.name("behind.sock"));
    let serve = || {
        let server = tools::Beside::start("qemu-nbd", &["-f", "raw", "-t", "-e", "8", "-k", &socket, &image]);
        tools::wait_for_socket(socket.as_ref());
        server
    };
    let resize =
        |size: u64| std::fs::File::options().write(true).open(&image).unwrap().set_len(size).unwrap();
    let server = serve();
    let disk = bench.attach("vm1", &format!("nbd+unix:///?socket={socket}"), &[]);
    disk.qemu_io(&["write -P 0x11 0 1M"]);
    disk.settle();
    let uri = disk.uri();
    server.kill();
    resize(SIZE * 2);
    let server = serve();
    // A request finds out; it may fail, when this machine is slow.
    let _guest = tools::Beside::start("qemu-io", &["-f", "raw", &uri, "-c", "read 0 1M"]);
    let status = disk.until("the size is seen to differ", |status| {
        status["local_error"].as_str().is_some_and(|text| text.contains(&(SIZE * 2).to_string()))
    });
    let text = status["local_error"].as_str().unwrap();
    assert!(text.contains(&SIZE.to_string()) && text.contains(&socket), "both sizes and the disk: {text}");
    server.kill();
    resize(SIZE);
    let _server = serve();
    disk.until("it is used again", |status| status["local_error"].is_null());
    disk.qemu_io(&["write -P 0x22 0 1M"]);
    disk.settle();
    tools::assert_same(&image, disk.restore("latest").to_str().unwrap());
}

/// A disk with a block at 1 MiB that cannot be read while a file `bad` is there.
fn disk_with_a_bad_block(directory: &str, socket: &str) -> tools::Beside {
    let overlaps = "[ -e bad ] && [ $4 -le 1048576 ] && [ $(($4 + $3)) -gt 1048576 ]";
    let pread = format!(
        "pread=if {overlaps}; then echo 'EIO a bad block' >&2; exit 1; fi; \
         dd if=disk.img iflag=skip_bytes,count_bytes skip=$4 count=$3 bs=1M status=none"
    );
    let pwrite =
        "pwrite=dd of=disk.img conv=notrunc oflag=seek_bytes seek=$4 bs=1M iflag=fullblock status=none";
    let directory = format!("cd={directory}");
    let script = |line: &str| line.replacen('=', &format!("=cd {} && ", &directory[3..]), 1);
    let arguments = [
        "-f".to_owned(),
        "-U".to_owned(),
        socket.to_owned(),
        "eval".to_owned(),
        "get_size=echo 2097152".to_owned(),
        "can_write=exit 0".to_owned(),
        "can_flush=exit 0".to_owned(),
        "flush=exit 0".to_owned(),
        script(&pread),
        script(pwrite),
    ];
    let server = tools::Beside::start("nbdkit", &arguments.each_ref().map(String::as_str));
    tools::wait_for_socket(socket.as_ref());
    server
}

#[test]
fn a_block_that_cannot_be_read_is_named_and_holds_up_no_other() {
    let bench = Bench::new();
    let (_receiver, mut agent) = (bench.receiver(), bench.agent());
    agent.may_complain("cannot be read");
    agent.may_complain("the disk behind failed");
    let image = bench.image("disk.img", 2 << 20);
    tools::qemu_io(image.to_str().unwrap(), &["write -P 0x11 0 2M"]);
    std::fs::write(bench.path("bad"), "").unwrap();
    let socket = bench.name("bad.sock");
    let directory = bench.path("").to_str().unwrap().to_owned();
    let _server = disk_with_a_bad_block(&directory, &socket);
    let disk = bench.attach("vm1", &format!("nbd+unix:///?socket={socket}"), &[]);
    let status =
        disk.until("the pass ends without it", |status| status["reason_code"] == "local-read-failed");
    let bad = serde_json::json!({"blocks": 1, "offset": 1 << 20, "length": 4096});
    assert_eq!(status["unreadable"], bad, "{status}");
    assert_eq!(status["dirty"]["blocks"], 1, "only that one is missing: {status}");
    assert_eq!(disk.points()["intervals"], serde_json::json!([]), "there is no point without it");
    std::fs::remove_file(bench.path("bad")).unwrap();
    bench.json(&["resync", "vm1"]);
    disk.settle();
    assert_eq!(disk.status()["unreadable"], serde_json::Value::Null);
    tools::assert_same(image.to_str().unwrap(), disk.restore("latest").to_str().unwrap());
}

/// A guest decides about every byte of a raw disk. A header of another format there must not be believed: it may name any
/// file of the host.
#[test]
fn what_others_write_to_a_data_file_is_found() {
    let bench = Bench::new();
    let (_receiver, agent) = (bench.receiver(), bench.agent());
    let (image, data) = (bench.name("vm1.qcow2"), bench.path("vm1.raw"));
    let option = format!("data_file={}", data.display());
    tools::run("qemu-img", &["create", "-q", "-f", "qcow2", "-o", &option, &image, &SIZE.to_string()]);
    // The guest's data lies where its tables say from here on: they are written no more.
    tools::run("qemu-io", &["-f", "qcow2", &image, "-c", "write -P 0x11 0 8M"]);
    let disk = bench.attach("vm1", "vm1.qcow2", &[]);
    disk.settle();
    disk.qemu_io(&["write -P 0x12 1M 1M", "flush"]);
    disk.settle();
    let passes = |disk: &Disk<'_>| disk.status()["counters"]["passes"].as_u64().unwrap();
    // Nobody else has it open.
    let write =
        |command: &str| while !tools::try_run("qemu-io", &["-f", "qcow2", &image, "-c", command]).0 {};
    let is_the_latest = |disk: &Disk<'_>| {
        disk.settle();
        tools::assert_same(&disk.uri(), disk.restore("latest").to_str().unwrap());
    };
    bench.json(&["detach", "vm1"]);
    let disk = bench.attach("vm1", "vm1.qcow2", &[]);
    disk.settle();
    assert_eq!(passes(&disk), 0, "nobody has written it");
    bench.json(&["detach", "vm1"]);
    write("write -P 0x21 2M 64k");
    let disk = bench.attach("vm1", "vm1.qcow2", &[]);
    is_the_latest(&disk);
    assert_eq!(passes(&disk), 1);
    // Long after the agent has died.
    agent.kill();
    let server = std::fs::read_to_string(bench.path("vm1.qemu-nbd.pid")).unwrap();
    tools::try_run("kill", &["-s", "KILL", server.trim()]);
    write("write -P 0x22 3M 64k");
    let later = std::time::SystemTime::now() + std::time::Duration::from_secs(3600);
    std::fs::File::options().write(true).open(&data).unwrap().set_modified(later).unwrap();
    let _agent = bench.agent();
    is_the_latest(&bench.disk("vm1"));
}

#[test]
fn what_a_guest_writes_into_a_raw_disk_makes_it_no_qcow2_file() {
    let bench = Bench::new();
    let (receiver, agent, disk) = bench.protected(SIZE, &[]);
    let (secret, evil) = (bench.image("secret", 1 << 16), bench.name("evil.qcow2"));
    std::fs::write(&secret, vec![0x5e; 1 << 16]).unwrap();
    let (secret, size) = (secret.to_str().unwrap(), SIZE.to_string());
    tools::run("qemu-img", &["create", "-q", "-f", "qcow2", "-b", secret, "-F", "raw", &evil, &size]);
    tools::run("nbdcopy", &[&evil, &disk.uri()]);
    disk.settle();
    let is_raw = || {
        let (header, found) = (std::fs::read(&evil).unwrap(), bench.path("found.img"));
        tools::run("nbdcopy", &[&disk.uri(), found.to_str().unwrap()]);
        assert!(std::fs::read(found).unwrap().starts_with(&header), "the disk is what its guest wrote");
    };
    is_raw();
    agent.kill();
    let agent = bench.agent();
    disk.settle();
    is_raw();
    // Under another name it is another file, and somebody has to say what.
    bench.json(&["detach", "vm1"]);
    std::fs::rename(bench.path("vm1.img"), bench.path("moved.img")).unwrap();
    let (moved, stream) = (bench.name("moved.img"), bench.socket("stream.sock"));
    let attach = ["attach", "vm1", &moved, "--receiver", &stream];
    let refused = bench.run(&attach);
    assert_eq!(refused.code, 5, "{refused:?}");
    assert!(
        refused.sentence().contains("looks like qcow2, and the image of disk vm1 was raw"),
        "{refused:?}"
    );
    bench.json(&[&attach[..], &["--format", "raw"]].concat());
    is_raw();
    assert_eq!((agent.stop(), receiver.stop()), (0, 0));
}
