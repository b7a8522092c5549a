//! The image: directly or through the page cache, by io_uring or by threads.

use std::{os::unix::fs::FileExt, thread};

use backtide_e2e::{Bench, Disk, Guest, LoopDevice, is_root, skip, tools};
use serde_json::Value;

use crate::bad_input::Unmount;

const SIZE: u64 = 64 << 20;

/// Starts a program that may not use io_uring, as in many containers: its system call is refused.
const WITHOUT_IO_URING: [&str; 3] = [
    "perl",
    "-e",
    r#"
    my $prctl = `uname -m` =~ /x86_64/ ? 157 : 167;
    my $rules = pack("(SCCL)4", 0x20,0,0,0, 0x15,0,1,425, 0x06,0,0,0x00050001, 0x06,0,0,0x7fff0000);
    syscall($prctl, 38, 1, 0, 0, 0) == 0 or die "no new privileges: $!";
    syscall($prctl, 22, 2, pack("S x6 P", 4, $rules)) == 0 or die "seccomp: $!";
    exec @ARGV or die "exec: $!";
    "#,
];

/// Starts a program none of whose files may grow beyond 32 MiB, nor be written there.
const SMALL_FILES: [&str; 4] = ["sh", "-c", "ulimit -f 65536; exec \"$@\"", "sh"];

/// What `auto` finds here. Where io_uring is forbidden, the tests of it are tests of its replacement, and
/// say so.
fn engine(disk: &Disk<'_>) -> Value {
    let status = disk.status();
    if status["engine"] != "io_uring" {
        assert_eq!(status["engine"], "pread", "{status}");
        let why = status["engine_reason"].as_str().expect("a reason");
        assert!(why.starts_with("io_uring cannot be used: "), "{why}");
        skip(&format!("io_uring itself is not tested on this machine: {why}"));
    }
    status
}

#[test]
fn a_disk_with_direct_io_is_protected_and_stays_direct_after_a_crash() {
    let bench = Bench::new();
    let (_receiver, agent, disk) = bench.protected(SIZE, &["--cache", "direct"]);
    assert_eq!(engine(&disk)["cache"], "direct");
    tools::Beside::spawn(tools::fio_verified(&disk.uri(), 16 << 20, 0)).succeed();
    let load = disk.load(1);
    load.goes_on(200);
    agent.kill();
    load.broken();
    let _agent = bench.agent();
    assert_eq!(disk.status()["cache"], "direct");
    let load = disk.load(2);
    load.goes_on(100);
    load.stop();
    disk.qemu_io(&["write -z 1M 1M", "discard 4M 2M", "write -f -P 0x33 8M 64k", "read -P 0x33 8M 64k"]);
    disk.settle();
    disk.latest_is_the_image();
}

#[test]
fn without_io_uring_threads_do_the_work_and_status_says_why() {
    let bench = Bench::new();
    let (_receiver, agent) = (bench.receiver(), bench.daemon_under(&WITHOUT_IO_URING, &["agent", "run"]));
    for (name, cache) in [("vm1", "writeback"), ("vm2", "direct")] {
        let image = format!("{name}.img");
        bench.image(&image, SIZE);
        let disk = bench.attach(name, &image, &["--cache", cache]);
        disk.wait("sync");
        let status = disk.status();
        assert_eq!(status["engine"], "pread");
        let why = status["engine_reason"].as_str().expect("a reason");
        assert!(why.starts_with("io_uring cannot be used: Operation not permitted"), "{why}");
        tools::Beside::spawn(tools::fio_verified(&disk.uri(), 16 << 20, 0)).succeed();
        let load = disk.load(1);
        load.goes_on(50);
        load.stop();
        disk.qemu_io(&["write -z 1M 1M", "write -f -P 0x33 8M 64k", "flush"]);
        disk.settle();
        disk.latest_is_the_image();
    }
    assert_eq!(agent.stop(), 0);
}

#[test]
fn the_engine_can_be_chosen() {
    let bench = Bench::new();
    let _receiver = bench.receiver();
    bench.image("vm1.img", SIZE);
    let threads = bench.daemon(&["agent", "run", "--io-engine", "threads"]);
    let disk = bench.attach("vm1", "vm1.img", &[]);
    let status = disk.status();
    assert_eq!(status["engine"], "pread");
    assert_eq!(status["engine_reason"], "asked for by the agent's configuration");
    bench.json(&["detach", "vm1"]);
    assert_eq!(threads.stop(), 0);
    // Who insists on what is forbidden is told so.
    let _agent = bench.daemon_under(&WITHOUT_IO_URING, &["agent", "run", "--io-engine", "io-uring"]);
    let stream = bench.socket("stream.sock");
    let refused = bench.run(&["attach", "vm1", &bench.name("vm1.img"), "--receiver", &stream]);
    assert_eq!(refused.code, 1);
    let sentence = refused.sentence();
    assert!(sentence.starts_with("io_uring cannot be used: Operation not permitted"), "{sentence}");
}

#[test]
fn the_thread_of_a_busy_disk_looks_for_requests_and_that_can_be_forbidden() {
    let bench = Bench::new();
    let _receiver = bench.receiver();
    bench.image("vm1.img", SIZE);
    let polled = |disk: &Disk| disk.status()["counters"]["polled_us"].as_u64().expect("a time");
    let write = |disk: &Disk| disk.qemu_io(&["write -P 1 0 4k"; 32]);
    let agent = bench.daemon(&["agent", "run", "--poll-max", "0"]);
    let disk = bench.attach("vm1", "vm1.img", &[]);
    write(&disk);
    assert_eq!(polled(&disk), 0);
    bench.json(&["detach", "vm1"]);
    assert_eq!(agent.stop(), 0);
    let processors = std::thread::available_parallelism().expect("a number of processors").get();
    let agent = bench.daemon(&["agent", "run", "--poll-max", "10000"]);
    let disk = bench.attach("vm1", "vm1.img", &[]);
    write(&disk);
    while processors > 1 && polled(&disk) == 0 {
        write(&disk);
    }
    bench.json(&["detach", "vm1"]);
    // Each of whose requests waits for the device.
    let disk = bench.attach("vm1", "vm1.img", &["--cache", "direct"]);
    write(&disk);
    assert_eq!(polled(&disk), 0);
    bench.json(&["detach", "vm1"]);
    assert_eq!(agent.stop(), 0);
    let refused = bench.run(&["agent", "run", "--poll-max", "10001"]);
    assert_eq!(refused.code, 2);
    assert!(
        refused.sentence().contains("poll_max_us is 10001 microseconds, expected at most 10000"),
        "{refused:?}"
    );
}

#[test]
fn what_cannot_be_direct_is_refused_with_the_way_out() {
    let bench = Bench::new();
    let _agent = bench.agent();
    let stream = bench.socket("stream.sock");
    let refused =
        bench.run(&["attach", "vm1", "nbd://127.0.0.1:1/x", "--receiver", &stream, "--cache", "direct"]);
    assert_eq!(refused.code, 2);
    assert!(refused.sentence().contains("is an NBD server"), "{refused:?}");
}

#[test]
fn a_device_with_large_blocks_takes_small_writes_of_many_clients() {
    let bench = Bench::new();
    let image = bench.image("device.img", SIZE);
    let device = match LoopDevice::of(&image, 4096) {
        Ok(device) => device,
        Err(why) => return skip(&why),
    };
    let (_receiver, _agent) = (bench.receiver(), bench.agent());
    std::os::unix::fs::symlink(device.path(), bench.path("vm1.img")).unwrap();
    let disk = bench.attach("vm1", "vm1.img", &["--cache", "direct"]);
    disk.wait("sync");
    let info = tools::run("nbdinfo", &[&disk.uri()]);
    assert!(info.contains("block_size_minimum: 4096"), "{info}");
    // Eight clients that never asked for block sizes have a sector of each block.
    let writers: Vec<_> = (0..8u8)
        .map(|sector| {
            let mut guest = Guest::connect(&disk.uri());
            thread::spawn(move || {
                for round in 0..3 {
                    for block in 0..64 {
                        let data = [sector * 16 + round; 512];
                        guest.write(block * 4096 + u64::from(sector) * 512, &data).unwrap();
                    }
                }
                guest.flush().unwrap();
            })
        })
        .collect();
    for writer in writers {
        writer.join().unwrap();
    }
    let content = std::fs::read(device.path()).unwrap();
    for (place, sector) in content[..64 * 4096].chunks(512).enumerate() {
        let expected = (place % 8) as u8 * 16 + 2;
        assert!(sector.iter().all(|&byte| byte == expected), "sector {place}");
    }
    let load = disk.load(1);
    load.goes_on(100);
    load.stop();
    disk.qemu_io(&["write -z 1M 1M", "discard 4M 2M", "flush"]);
    disk.settle();
    tools::assert_same(device.path(), disk.restore("latest").to_str().unwrap());
    drop(disk);
    bench.json(&["detach", "vm1"]);
}

#[test]
fn a_write_that_the_image_takes_in_part_fails_and_its_blocks_are_compared() {
    for cache in ["writeback", "direct"] {
        let bench = Bench::new();
        let (_receiver, mut agent) = (bench.receiver(), bench.daemon_under(&SMALL_FILES, &["agent", "run"]));
        agent.may_complain("the local disk refused a guest request");
        bench.image("vm1.img", SIZE);
        let disk = bench.attach("vm1", "vm1.img", &["--cache", cache]);
        disk.wait("sync");
        disk.qemu_io(&["write -P 0x11 30M 2M"]);
        let (_, said) = tools::try_run("qemu-io", &["-f", "raw", &disk.uri(), "-c", "write -P 0x22 31M 2M"]);
        assert!(said.contains("write failed: No space left on device"), "{cache}: {said}");
        assert_eq!(disk.status()["counters"]["failed_changes"], 1);
        // What it did take differs from what the receiver has, until a pass has sent it.
        disk.qemu_io(&["write -P 0x33 1M 64k", "flush"]);
        disk.until("compared", |status| status["dirty"]["blocks"] == 0);
        disk.settle();
        disk.latest_is_the_image();
        disk.qemu_io(&["read -P 0x11 30M 1M", "read -P 0 32M 1M"]);
    }
}

/// There what was just written is in what the file system calls a hole.
#[test]
fn what_a_file_without_extents_has_in_its_holes_is_protected() {
    if !is_root() {
        return skip("only root mounts a file system");
    }
    let bench = Bench::new();
    let (file, at) = (bench.image("ext3.img", 256 << 20), bench.name("ext3"));
    std::fs::create_dir(&at).unwrap();
    let file = file.to_str().unwrap();
    tools::run("mkfs.ext4", &["-q", "-F", "-O", "^extents,^64bit", file]);
    if let (false, said) = tools::try_run("mount", &["-o", "loop", file, &at]) {
        return skip(&format!("ext4 cannot be mounted here: {said}"));
    }
    let _mounted = Unmount(at.clone());
    let (_receiver, agent) = (bench.receiver(), bench.agent());
    let image = format!("{at}/vm1.img");
    let file = std::fs::File::create(&image).unwrap();
    file.set_len(16 << 20).unwrap();
    // Of many lengths at many places, half of them synced: then some are beside what has a place on the device.
    let mut number = 5_u64;
    let mut below = |end: u64| {
        number = number.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1);
        (number >> 33) % end
    };
    for write in 0..200 {
        let (blocks, place) = (below(16) + 1, below(4080));
        file.write_all_at(&vec![write + 1; 4096 * blocks as usize], place * 4096).unwrap();
        if write == 100 {
            file.sync_all().unwrap();
        }
    }
    let disk = bench.attach("vm1", "ext3/vm1.img", &[]);
    disk.latest_is_the_image();
    let mut write = |byte: u8| format!("write -P {byte} {}k {}k", below(4080) * 4, (below(16) + 1) * 4);
    let mut writes: Vec<String> = (1..=200).map(&mut write).collect();
    writes.insert(100, "flush".to_owned());
    disk.qemu_io(&writes.iter().map(String::as_str).collect::<Vec<_>>());
    agent.kill();
    let _agent = bench.agent();
    assert_eq!(bench.json(&["wait", "vm1", "--for", "sync"])["mode"], "sync");
    assert_eq!(bench.json(&["verify", "vm1"])["differing_count"], 0);
    disk.latest_is_the_image();
}
