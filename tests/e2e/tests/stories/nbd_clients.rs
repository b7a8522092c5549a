//! What a guest's NBD client may ask for, and how many of them there may be.

use std::{
    io::Read,
    os::unix::{fs::MetadataExt, net::UnixStream},
    process::Command,
};

use backtide_e2e::{Bench, tools};

const SIZE: u64 = 16 << 20;

#[test]
fn zeroes_that_have_to_be_fast_are_or_fail_at_once() {
    let bench = Bench::new();
    let (_receiver, _agent, disk) = bench.protected(SIZE, &[]);
    let uri = disk.uri();
    tools::run("qemu-io", &["-f", "raw", &uri, "-c", "write -P 7 0 8M"]);
    // The judge of what this file system can is a program that asks it the same.
    let probe = bench.image("probe", SIZE);
    let can = |how: &str| {
        let fallocate = Command::new("fallocate").args([how, "-l", "64K"]).arg(&probe).output();
        fallocate.expect("run fallocate").status.success()
    };
    for (how, write, at) in [("--punch-hole", "write -z -n -u", "1M"), ("--zero-range", "write -z -n", "2M")]
    {
        let command = format!("{write} {at} 64k");
        let (done, said) = tools::try_run("qemu-io", &["-f", "raw", &uri, "-c", &command]);
        assert_eq!(done, can(how), "{command}: {said}");
        if done {
            tools::run("qemu-io", &["-f", "raw", &uri, "-c", &format!("read -P 0 {at} 64k")]);
        }
    }
    // Whatever was refused has cost nothing: the disk is in sync, and has been all the time.
    disk.settle();
    let counters = &disk.status()["counters"];
    assert_eq!((&counters["passes"], &counters["failed_changes"]), (&1.into(), &0.into()), "{counters}");
    tools::assert_same(&disk.image, disk.restore("latest").to_str().expect("text"));
}

#[test]
fn so_many_clients_are_served_as_the_settings_say() {
    let bench = Bench::new();
    let _receiver = bench.receiver_with("[nbd]\nconnections = 2\n");
    let file = bench.path("agent.toml");
    std::fs::write(&file, "[nbd]\nconnections = 1\nbytes = 4194304\nhandshake_ms = 300\n").expect("write");
    let _agent = bench.daemon(&["agent", "run", "--config", file.to_str().expect("text")]);
    bench.image("vm1.img", SIZE);
    let disk = bench.attach("vm1", "vm1.img", &[]);
    disk.wait("sync");
    let uri = disk.uri();
    // A client that is served, and more in flight than the limit: it takes turns.
    let load = "write -P 1 0 4M";
    let fast = [
        "-f",
        "raw",
        &uri,
        "-c",
        load,
        "-c",
        "aio_write -P 2 0 4M",
        "-c",
        "aio_write -P 3 4M 4M",
        "-c",
        "aio_flush",
    ];
    tools::run("qemu-io", &fast);
    disk.until("nobody is there", |status| status["clients"] == 0);
    let mut holder = Command::new("qemu-io")
        .args(["-f", "raw", &uri])
        .stdin(std::process::Stdio::piped())
        .stdout(std::process::Stdio::null())
        .spawn()
        .expect("run qemu-io");
    disk.until("a client is served", |status| status["clients"] == 1);
    let (served, said) = tools::try_run("qemu-io", &["-f", "raw", &uri, "-c", "read 0 4k"]);
    assert!(!served, "one too many: {said}");
    drop(holder.stdin.take());
    holder.wait().expect("wait for qemu-io");
    disk.until("it is gone", |status| status["clients"] == 0);
    tools::run("qemu-io", &["-f", "raw", &uri, "-c", "read -P 3 4M 4M"]);
    // Who says nothing is cut off after the time that was set.
    let socket = uri.split_once("socket=").expect("a socket").1;
    let mut silent = UnixStream::connect(socket).expect("connect");
    let mut greeting = Vec::new();
    silent.read_to_end(&mut greeting).expect("read");
    assert!(greeting.starts_with(b"NBDMAGIC"), "{greeting:?}");

    std::fs::write(&file, "[nbd]\nrequests = 0\n").expect("write");
    let said = bench.run(&["agent", "run", "--config", file.to_str().expect("text")]);
    assert_eq!(said.code, 2, "{said:?}");
    assert!(said.sentence().contains("requests"), "{said:?}");
}

#[test]
fn zeroes_that_keep_their_space_keep_it() {
    let bench = Bench::new();
    let _receiver = bench.receiver();
    // Whether space can be given back here, and zeroes be made without writing them.
    let probe = bench.image("probe", SIZE);
    std::fs::write(&probe, vec![1; 64 << 10]).expect("write");
    let can = |how: &str| {
        let fallocate = Command::new("fallocate").args([how, "-l", "64K"]).arg(&probe).output();
        fallocate.expect("run fallocate").status.success()
    };
    let gives_back = can("--punch-hole");
    for engine in ["auto", "threads"] {
        let agent = bench.daemon(&["agent", "run", "--io-engine", engine]);
        for cache in ["writeback", "direct"] {
            let (name, image) = (format!("{cache}-{engine}"), format!("{cache}-{engine}.img"));
            let path = bench.image(&image, SIZE);
            let disk = bench.attach(&name, &image, &["--cache", cache]);
            let allocated = || {
                let file = std::fs::File::open(&path).expect("open the image");
                // Until then the file system may not know itself.
                file.sync_all().expect("sync the image");
                file.metadata().expect("look at the image").blocks() * 512
            };
            disk.qemu_io(&["write -P 7 0 8M", "flush"]);
            let written = allocated();
            assert!(written >= 8 << 20, "{name}: {written} bytes for 8 MiB");
            disk.qemu_io(&["write -z 1M 2M", "flush", "read -P 0 1M 2M"]);
            assert!(allocated() >= written, "{name}: zeroes that were to keep their space gave it back");
            // Space that was not there is there afterwards: a guest that writes it later finds room.
            disk.qemu_io(&["write -z 12M 2M", "flush", "read -P 0 12M 2M"]);
            let provided = allocated();
            assert!(provided >= written + (2 << 20), "{name}: {provided} bytes, {written} before 2 MiB more");
            disk.qemu_io(&["write -z -u 1M 2M", "flush", "read -P 0 1M 2M"]);
            let left = allocated();
            assert_eq!(left + (2 << 20) <= provided, gives_back, "{name}: {left} bytes, {provided} before");
            disk.settle();
            disk.latest_is_the_image();
        }
        assert_eq!(agent.stop(), 0);
    }
}
