//! A new disk that begins as a point of another one: used and protected at once, with a history of its own that names
//! where it comes from.

use std::path::Path;

use backtide_e2e::{Bench, Disk, tools};
use serde_json::{Value, json};

const SIZE: u64 = 8 << 20;

/// Attaches a new disk as a point of vm1.
fn attach_from<'bench>(bench: &'bench Bench, name: &str, at: &str) -> Disk<'bench> {
    let from = format!("vm1@{at}");
    bench.attach(name, &bench.name(&format!("{name}.img")), &["--from", &from])
}

fn whole(disk: &Disk<'_>) {
    disk.until("whole", |status| status["hydration"].is_null());
    disk.settle();
}

#[test]
fn a_new_disk_begins_as_a_point_of_another_and_both_go_on() {
    let bench = Bench::new();
    let (_receiver, agent, disk) = bench.protected(SIZE, &[]);
    let load = disk.load(1);
    load.goes_on(80);
    let written = load.stop();
    disk.settle();
    let (early, at_early) = (disk.last(), written.model());
    disk.qemu_io(&["write -P 0x77 0 4M", "flush"]);
    disk.settle();

    let new = attach_from(&bench, "vm2", &format!("lsn:{early}"));
    let origin = new.status()["origin"].clone();
    assert_eq!((&origin["disk"], &origin["lsn"]), (&json!("vm1"), &json!(early)), "{origin}");
    // It is the point, to whoever reads it at once, and whoever writes parts of blocks.
    new.qemu_io(&["write -P 0x33 1k 1k", "flush"]);
    whole(&new);
    assert!(!Path::new(&bench.name("vm2.img.backtide-incomplete")).exists());
    let mut expected = at_early.after(at_early.len());
    expected[1024..2048].fill(0x33);
    let model = bench.path("model.img");
    std::fs::write(&model, &expected).unwrap();
    tools::assert_same_images(&model, &bench.path("vm2.img"));
    new.latest_is_the_image();
    // Its own history begins with it, and the other's has not changed.
    assert_eq!(new.holes(), Vec::<Value>::new());
    at_early.assert_is_in(&disk.restore(&format!("lsn:{early}")), at_early.len(), "the point");
    disk.qemu_io(&["read -P 0x77 0 4M"]);
    let held = bench.json(&["retention", "show", "vm1"])["disks"][0]["held"].clone();
    assert_eq!(held, json!([]), "nobody needs the point any more");
    // It is a disk as any other.
    assert_eq!(agent.stop(), 0);
    let _agent = bench.agent();
    new.wait("sync");
    assert_eq!(new.status()["origin"], origin);
}

#[test]
fn a_new_disk_waits_for_its_receiver_and_outlives_its_agent() {
    let bench = Bench::new();
    let (_receiver, agent, disk) = bench.protected(SIZE, &[]);
    disk.qemu_io(&["write -P 0x11 0 8M", "flush"]);
    disk.settle();
    // So slow that it lasts.
    let image = bench.name("vm2.img");
    let options = ["--from", "vm1@latest", "--resync-rate", "4096"];
    let new = bench.attach("vm2", &image, &options);
    assert_eq!(new.status()["hydration"]["kind"], "origin");
    let held = bench.json(&["retention", "show", "vm1"])["disks"][0]["held"].clone();
    assert_eq!(held.as_array().map(Vec::len), Some(1), "{held}");
    new.qemu_io(&["write -P 0x22 1M 1M", "flush"]);
    agent.kill();
    let _agent = bench.agent();
    assert_eq!(new.status()["hydration"]["kind"], "origin");
    bench.json(&["limits", "vm2", "--resync-rate", "0"]);
    whole(&new);
    new.qemu_io(&["read -P 0x11 0 1M", "read -P 0x22 1M 1M", "read -P 0x11 2M 6M"]);
    new.latest_is_the_image();
}

#[test]
fn what_may_be_somebodys_image_is_not_taken() {
    let bench = Bench::new();
    let (_receiver, _agent, disk) = bench.protected(SIZE, &[]);
    disk.qemu_io(&["write -P 0x11 0 1M", "flush"]);
    disk.settle();
    let refused = |code: i32, name: &str, image: &str, from: &str| {
        let stream = bench.socket("stream.sock");
        let said = bench.run(&["attach", name, image, "--receiver", &stream, "--from", from]);
        assert_eq!(said.code, code, "{name} {image} {from}: {said:?}");
        said.sentence()
    };
    let other = bench.path("other.img");
    std::fs::write(&other, vec![0x44; 4096]).unwrap();
    refused(5, "vm2", other.to_str().unwrap(), "vm1@latest");
    assert_eq!(std::fs::read(&other).unwrap(), vec![0x44; 4096]);
    // A disk that has all its blocks in a hole is one all the same.
    let sparse = bench.image("sparse.img", SIZE);
    refused(5, "vm2", sparse.to_str().unwrap(), "vm1@latest");
    let new = bench.name("new.img");
    refused(5, "vm1", &new, "vm1@latest");
    refused(4, "vm2", &new, "vm1@mark:never");
    refused(4, "vm2", &new, "vm9@latest");
    refused(2, "vm2", &new, "vm1");
    assert!(!Path::new(&new).exists(), "nothing was made");
}
