//! A new disk that begins as a point of another one: used and protected at once, with a history of its own that names
//! where it comes from.

use std::path::Path;

use backtide_e2e::{Bench, Disk, Load, Model, OtherHost, kill_rounds, tools};
use backtide_storage::KillPoint;
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
    // A person who keeps the same point and releases it takes nothing from the disk that needs it.
    let at = format!("lsn:{}", held[0]["lsn"]);
    bench.json(&["retention", "keep", "vm1", "--at", &at]);
    let released = bench.json(&["retention", "release", "vm1", "--at", &at]);
    assert_eq!(released["disks"][0]["held"], held);
    let none = bench.plain(&["retention", "release", "vm1", "--at", &at]);
    assert_eq!(none.code, 4, "{none:?}");
    assert!(none.stderr.contains("--held 'missing blocks of disk"), "{none:?}");
    new.qemu_io(&["write -P 0x22 1M 1M", "flush"]);
    agent.kill();
    let _agent = bench.agent();
    assert_eq!(new.status()["hydration"]["kind"], "origin");
    bench.json(&["limits", "vm2", "--resync-rate", "0"]);
    whole(&new);
    new.qemu_io(&["read -P 0x11 0 1M", "read -P 0x22 1M 1M", "read -P 0x11 2M 6M"]);
    new.latest_is_the_image();
}

/// A disk of the receiver whose agent goes on, and what it was at a point of before.
fn with_a_point(disk: &Disk<'_>) -> (String, Model) {
    let mut model = Model::of_zeroes(SIZE, Vec::new());
    disk.guest_writes(&mut model, 1, 80);
    let point = format!("vm1@lsn:{}", disk.last());
    let at_point = model.clone();
    disk.guest_writes(&mut model, 2, 80);
    (point, at_point)
}

#[test]
fn another_host_begins_with_a_point_of_a_disk_that_goes_on() {
    let bench = Bench::new();
    let (_receiver, _first, disk) = bench.protected(SIZE, &[]);
    let (point, mut expected) = with_a_point(&disk);
    let (other, _second) = OtherHost::start(&bench);
    let (image, stream) = (bench.name("vm2.img"), bench.socket("stream.sock"));
    let attach = ["attach", "vm2", &image, "--receiver", &stream, "--from", &point];
    let attached = other.run(&attach);
    assert_eq!(attached.code, 0, "{attached:?}");
    let status = |name: &str| -> Value {
        let said = other.run(&["status", name]);
        serde_json::from_str::<Value>(&said.stdout).expect("a status is JSON")["disks"][0].clone()
    };
    // Both are written to, each by its own guest.
    let (there, here) = (Load::start(status("vm2")["nbd_uri"].as_str().unwrap(), 3), disk.load(4));
    there.goes_on(60);
    here.goes_on(60);
    here.stop();
    expected.then(there.stop());
    for state in ["sync", "durable"] {
        assert_eq!(other.run(&["wait", "vm2", "--for", state]).code, 0);
    }
    while !status("vm2")["hydration"].is_null() {}
    expected.assert_is_in(Path::new(&image), expected.len(), "the other host's");
    let origin = status("vm2")["origin"].clone();
    assert_eq!((&origin["disk"], format!("vm1@lsn:{}", origin["lsn"])), (&json!("vm1"), point), "{origin}");
    let of_receiver = bench.json(&["points", "vm2"]);
    assert_eq!(of_receiver["origin"]["disk"], "vm1", "{of_receiver}");
    disk.latest_is_the_image();
    let held = bench.json(&["retention", "show", "vm1"])["disks"][0]["held"].clone();
    assert_eq!(held, json!([]), "nobody needs the point any more");
}

#[test]
fn whoever_dies_when_a_disk_begins_leaves_one_that_begins_again_or_goes_on() {
    // Whether the disk is there when the agent is back; an attach is known from its record on.
    let steps = [
        (KillPoint::HydrationMade, Some(false)),
        (KillPoint::AttachTracking, None),
        (KillPoint::AttachRecord, None),
        (KillPoint::AttachServed, Some(true)),
        (KillPoint::HydrationStored, Some(true)),
        (KillPoint::HydrationNoted, Some(true)),
        (KillPoint::HydrationFinished, Some(true)),
    ];
    let bench = Bench::new();
    let (_receiver, mut agent, disk) = bench.protected(SIZE, &[]);
    let (point, at_point) = with_a_point(&disk);
    // The agent that begins it has no other: the kill points are those of the new one.
    bench.json(&["detach", "vm1"]);
    let stream = bench.socket("stream.sock");
    for (round, (step, is_there)) in (0..kill_rounds(1)).flat_map(|_| steps).enumerate() {
        let (name, image) = (format!("new{round}"), bench.name(&format!("new{round}.img")));
        let attach = ["attach", &name, &image, "--receiver", &stream, "--from", &point];
        assert_eq!(agent.stop(), 0);
        let mut doomed = bench.doomed(&["agent", "run"], step.name());
        while !doomed.is_dead() && ![0, 3].contains(&bench.run(&["status"]).code) {}
        // An answer or none.
        bench.run(&attach);
        assert!(doomed.died(), "{} is never reached", step.name());
        agent = bench.agent();
        let there = bench.run(&["status", &name]).code != 4;
        assert!(is_there.is_none_or(|is| is == there), "{}: {there}", step.name());
        if !there {
            bench.json(&attach);
        }
        let new = bench.disk(&name);
        let image = Path::new(&image);
        whole(&new);
        at_point.assert_is_in(image, at_point.len(), step.name());
        assert_eq!(bench.json(&["verify", &name])["differing_count"], 0, "{}", step.name());
        assert_eq!(new.status()["origin"]["disk"], "vm1");
        // What its history may lack is what a crash costs any disk.
        let holes = new.holes();
        assert!(
            holes.iter().all(|hole| hole["reason_code"] == "agent-crashed"),
            "{}: {holes:?}",
            step.name()
        );
        at_point.assert_is_in(&new.restore("latest"), at_point.len(), step.name());
        bench.json(&["detach", &name]);
    }
    let held = bench.json(&["retention", "show", "vm1"])["disks"][0]["held"].clone();
    assert_eq!(held, json!([]), "nobody needs the point any more");
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
