//! Points that can be written: a file system made on one, a receiver killed under it.

use backtide_e2e::{
    Bench, Load, Reconnecting,
    kernel_disk::{Served, cannot_mount},
    skip, tools,
};

const SIZE: u64 = 64 << 20;

/// Guests whose requests are under way together, behind a QEMU that connects again.
fn load_on(guest: &Reconnecting) -> Vec<Load> {
    (0..4).map(|seed| Load::start(&guest.uri, seed)).collect()
}

#[test]
fn to_the_guest_of_a_mount_a_receiver_or_an_agent_that_is_started_again_is_a_pause() {
    let bench = Bench::new();
    let (receiver, agent, disk) = bench.protected(SIZE, &[]);
    disk.qemu_io(&["write -P 0x11 0 1M"]);
    disk.settle();
    let [there, here] = ["there.sock", "here.sock"].map(|name| bench.path(name));
    for (socket, rest) in [(&there, &[][..]), (&here, &["--here"][..])] {
        let uri = format!("nbd+unix:///vm1?socket={}", socket.display());
        let mount = ["mount", "vm1", "--at", "latest", "--writable", "--nbd", uri.as_str()];
        bench.json(&[&mount[..], rest].concat());
    }
    let guests = [&there, &here].map(|socket| Reconnecting::before(&bench, "vm1", socket));
    let [there, here] = [&guests[0], &guests[1]].map(load_on);
    let go_on = |loads: &[Load]| loads.iter().for_each(|load| load.goes_on(50));
    go_on(&there);
    let mut receiver = receiver;
    for _ in 0..3 {
        assert_eq!(receiver.stop(), 0);
        receiver = bench.receiver();
        go_on(&there);
    }
    go_on(&here);
    let mut agent = agent;
    for _ in 0..3 {
        assert_eq!(agent.stop(), 0);
        agent = bench.agent();
        go_on(&here);
    }
    for load in there.into_iter().chain(here) {
        load.stop();
    }
}

#[test]
fn what_was_written_to_a_mount_survives_a_killed_receiver_and_no_longer_than_wanted() {
    let bench = Bench::new();
    let (receiver, _agent, disk) = bench.protected(SIZE, &[]);
    disk.qemu_io(&["write -P 0x11 0 1M"]);
    disk.settle();
    let mount = bench.json(&["mount", "vm1", "--at", "latest", "--writable"]);
    let (id, uri) = (mount["id"].as_str().unwrap(), mount["uri"].as_str().unwrap());
    tools::qemu_io(uri, &["write -P 0x22 64k 64k", "write -z 128k 64k", "flush", "write -P 0x33 8M 64k"]);
    receiver.kill();
    let receiver = bench.receiver();
    let shown = bench.plain(&["mount"]);
    assert!(shown.stdout.contains(id), "{shown:?}");
    let story = ["read -P 0x11 0 64k", "read -P 0x22 64k 64k", "read -P 0 128k 64k", "read -P 0x33 8M 64k"];
    tools::qemu_io(uri, &story);
    disk.wait("sync");
    // What the disk itself holds is not touched by any of it.
    disk.latest_is_the_image();

    assert_eq!(bench.plain(&["unmount", id]).code, 2);
    assert_eq!(bench.plain(&["unmount", id, "--keep"]).code, 0);
    assert!(!tools::try_run("nbdinfo", &[uri]).0, "nothing is served after unmount");
    assert_eq!(bench.json(&["mount"])["kept"][0]["id"], id);
    assert_eq!(receiver.stop(), 0);
    assert!(bench.plain(&["fsck", &bench.name("store")]).stdout.contains(id));
    let _receiver = bench.receiver();
    let socket = bench.name("elsewhere.sock");
    let elsewhere = format!("nbd+unix:///?socket={socket}");
    bench.json(&["mount", "--kept", id, "--nbd", &elsewhere]);
    tools::qemu_io(&elsewhere, &story);
    assert_eq!(bench.plain(&["unmount", id, "--discard"]).code, 0);
    assert_eq!(bench.json(&["mount"]), serde_json::json!({"mounts": [], "kept": []}));
    assert_eq!(bench.run(&["mount", "--kept", id]).code, 4);
    assert_eq!(bench.run(&["unmount", id, "--discard"]).code, 4);
    // Two receivers on, nothing else is ever called like it.
    let other = bench.json(&["mount", "vm1", "--at", "latest"]);
    assert_ne!(other["id"], id, "{other}");
}

#[test]
fn a_file_system_made_on_a_mount_is_whole_after_the_receiver_is_killed() {
    if let Some(why) = cannot_mount() {
        return skip(why);
    }
    let bench = Bench::new();
    let (receiver, _agent, disk) = bench.protected(SIZE, &[]);
    disk.qemu_io(&["write -P 0x11 0 1M"]);
    disk.settle();
    let mount = bench.json(&["mount", "vm1", "--at", "latest", "--writable"]);
    let uri = mount["uri"].as_str().unwrap();
    let served = Served::start(&bench, "disk", uri, SIZE);
    let served_name = served.path().to_str().unwrap();
    let file = bench.path("file");
    std::fs::write(&file, vec![0x5a; 3 << 20]).unwrap();
    tools::run("mkfs.ext4", &["-q", "-F", served_name]);
    tools::run("debugfs", &["-w", "-R", &format!("write {} file", bench.name("file")), served_name]);
    // Each of them has synced what it wrote.
    drop(served);
    receiver.kill();
    let _receiver = bench.receiver();
    let copy = bench.name("copy.img");
    tools::run("nbdcopy", &[uri, &copy]);
    tools::run("e2fsck", &["-fn", &copy]);
    tools::run("debugfs", &["-R", &format!("dump file {}", bench.name("dumped")), &copy]);
    assert!(std::fs::read(bench.path("dumped")).unwrap() == std::fs::read(&file).unwrap());
}
