//! Whoever is not served for a while costs the agent nothing: what waits for a receiver or a client sleeps.

use std::{
    io::{Read, Write},
    os::unix::net::UnixStream,
};

use backtide_e2e::{Bench, Daemon, Disk, Load, tools};

const SIZE: u64 = 64 << 20;

/// What the disk's thread has worked so far, in nanoseconds of a processor; time that passes counts for nothing.
fn worked(agent: &Daemon) -> u64 {
    let tasks = std::fs::read_dir(format!("/proc/{}/task", agent.id())).expect("read a process's threads");
    let of_disk = tasks
        .flatten()
        .map(|task| task.path())
        .find(|task| std::fs::read_to_string(task.join("comm")).is_ok_and(|name| name.trim() == "disk-vm1"));
    let told = std::fs::read_to_string(of_disk.expect("the disk's thread").join("schedstat"));
    let told = told.expect("the kernel tells what a thread has worked");
    told.split_whitespace().next().expect("a number").parse().expect("a number")
}

/// What it works while it is asked a few things. Meanwhile a thread that turns in circles does nothing else.
fn works(agent: &Daemon, disk: &Disk<'_>) -> u64 {
    let before = worked(agent);
    for _ in 0..20 {
        disk.status();
    }
    worked(agent) - before
}

fn assert_rests(what: &str, agent: &Daemon, disk: &Disk<'_>, idle: u64) {
    let works = works(agent, disk);
    println!("{what}: {works} ns of work, {idle} ns with nothing to wait for");
    assert!(works < 5 * idle + 10_000_000, "{what}: {works} ns of work, {idle} ns with nothing to wait for");
}

#[test]
fn a_receiver_that_takes_nothing_costs_no_work() {
    let bench = Bench::new();
    let (receiver, agent, disk) = bench.protected(SIZE, &[]);
    let idle = works(&agent, &disk);
    receiver.signal("STOP");
    // More than its socket takes, less than is retained.
    disk.qemu_io(&["write -P 1 0 16M", "write -P 2 16M 16M", "flush"]);
    let window = disk.status()["window"]["bytes"].as_u64().expect("a number");
    assert!(window >= 16 << 20, "the receiver took it: {window} bytes are retained");
    assert_rests("a full stream", &agent, &disk, idle);
    receiver.signal("CONT");
    disk.settle();
    disk.latest_is_the_image();
}

#[test]
fn a_guest_that_waits_for_its_receiver_costs_no_work() {
    let bench = Bench::new();
    let options = ["--ack", "durable", "--on-outage", "block"];
    let (receiver, agent, disk) = bench.protected(SIZE, &options);
    let idle = works(&agent, &disk);
    let load = Load::start(&disk.uri(), 1);
    load.goes_on(100);
    receiver.signal("STOP");
    disk.until("the guest waits", |status| !status["guest_waits"].is_null());
    assert_rests("a guest that waits", &agent, &disk, idle);
    receiver.signal("CONT");
    load.goes_on(100);
    load.stop();
    disk.settle();
    disk.latest_is_the_image();
}

#[test]
fn a_client_that_reads_none_of_its_replies_costs_no_work() {
    let bench = Bench::new();
    let (_receiver, agent, disk) = bench.protected(SIZE, &[]);
    tools::qemu_io(&disk.uri(), &["write -P 3 0 32M"]);
    disk.settle();
    let idle = works(&agent, &disk);
    let mut client = UnixStream::connect(bench.path("vm1.nbd")).expect("connect");
    client.write_all(b"\0\0\0\x03IHAVEOPT\0\0\0\x01\0\0\0\0").expect("send");
    client.read_exact(&mut [0; 28]).expect("the default export");
    for cookie in 0..32_u64 {
        let mut request = b"\x25\x60\x95\x13\0\0\0\0".to_vec();
        request.extend(cookie.to_be_bytes());
        request.extend((cookie << 20).to_be_bytes());
        request.extend((1_u32 << 20).to_be_bytes());
        client.write_all(&request).expect("send");
    }
    disk.until("they are read", |status| status["counters"]["reads"].as_u64() >= Some(32));
    assert_rests("a client that reads nothing", &agent, &disk, idle);
    let mut all = vec![0; 32 * (16 + (1 << 20))];
    client.read_exact(&mut all).expect("every reply");
}
