//! A point of which something is damaged: refused where that is known, and a disk that meets it has a way out.

use std::{os::unix::fs::FileExt, path::Path};

use backtide_e2e::{Bench, tools};
use serde_json::Value;

const SIZE: u64 = 8 << 20;

/// Flips a bit in the middle of the data that `pattern` marks in the log.
fn flip(store: &Path, pattern: u8) {
    let listed = tools::run("find", &[store.to_str().unwrap(), "-name", "*.seg"]);
    let found = listed.lines().any(|path| {
        let bytes = std::fs::read(path).unwrap();
        let place = bytes.windows(4096).position(|window| window.iter().all(|byte| *byte == pattern));
        let Some(at) = place.map(|place| place + 2000) else { return false };
        let file = std::fs::OpenOptions::new().write(true).open(path).unwrap();
        file.write_all_at(&[bytes[at] ^ 1], at as u64).unwrap();
        true
    });
    assert!(found, "the data are in the log");
}

#[test]
fn a_disk_that_meets_damage_is_set_to_another_point_and_a_known_one_is_refused() {
    let bench = Bench::new();
    let receiver = bench.receiver_with("[limits]\nsegment_bytes = 1048576\n");
    let mut agent = bench.agent();
    agent.may_complain("a missing block is damaged at the receiver");
    bench.image("vm1.img", SIZE);
    let disk = bench.attach("vm1", "vm1.img", &[]);
    disk.wait("sync");
    disk.qemu_io(&["write -P 0x11 0 2M", "flush"]);
    disk.settle();
    let (good, at_good) = (disk.last(), bench.path("good.img"));
    std::fs::copy(&disk.image, &at_good).unwrap();
    disk.qemu_io(&["write -P 0x5c 1M 64k", "flush"]);
    disk.settle();
    let bad = disk.last();
    disk.qemu_io(&["write -P 0x33 4M 2M", "write -P 0x44 1M 64k", "flush"]);
    disk.settle();
    let (late, at_late) = (disk.last(), bench.path("late.img"));
    std::fs::copy(&disk.image, &at_late).unwrap();
    assert_eq!(receiver.stop(), 0);
    // A receiver that has nothing of it in memory, and begins with a log that is sound.
    let mut receiver = bench.receiver_with("[limits]\nsegment_bytes = 1048576\n");
    receiver.may_complain("cannot read a point for an agent");
    disk.settle();
    flip(&bench.path("store"), 0x5c);

    // Nobody knows yet.
    bench.json(&["rewind", "vm1", "--to", &format!("lsn:{bad}"), "--yes"]);
    let stuck = |said: &Value| said["disks"][0]["hydration"]["stuck"] == true;
    let status = loop {
        let said = bench.run(&["status", "vm1"]);
        let status: Value = serde_json::from_str(&said.stdout).unwrap();
        assert_eq!(said.code, if stuck(&status) { 3 } else { 0 }, "{said:?}");
        if stuck(&status) {
            break status["disks"][0].clone();
        }
    };
    assert_eq!(status["hydration"]["damaged_bytes"], 65536, "{status}");
    // What is not damaged is the point, and can be used.
    disk_reads(&status, &["read -P 0x11 0 1M", "read -P 0 4M 2M"]);

    let to_good = format!("lsn:{good}");
    let refused = bench.run(&["rewind", "vm1", "--to", &to_good, "--yes"]);
    assert_eq!(refused.code, 5, "{refused:?}");
    bench.json(&["rewind", "vm1", "--to", &to_good, "--yes", "--force", "--wait"]);
    disk.settle();
    tools::assert_same_images(Path::new(&disk.image), &at_good);
    disk.latest_is_the_image();
    assert_eq!(bench.json(&["verify", "vm1"])["differing_count"], 0);

    // By now it is known.
    let known = bench.run(&["rewind", "vm1", "--to", &format!("lsn:{bad}"), "--yes"]);
    assert_eq!(known.code, 8, "{known:?}");
    assert!(known.sentence().contains("the first at offset 1048576"), "{known:?}");
    let stream = bench.socket("stream.sock");
    let image = bench.name("vm2.img");
    let begin = ["attach", "vm2", &image, "--receiver", &stream, "--from", &format!("vm1@lsn:{bad}")];
    let known = bench.run(&begin);
    assert_eq!(known.code, 8, "{known:?}");
    // A point after it does not have it.
    bench.json(&["rewind", "vm1", "--to", &format!("lsn:{late}"), "--yes", "--wait"]);
    disk.settle();
    tools::assert_same_images(Path::new(&disk.image), &at_late);
    let held = bench.json(&["retention", "show", "vm1"])["disks"][0]["held"].clone();
    assert_eq!(held, serde_json::json!([]), "nobody needs a point any more");
}

fn disk_reads(status: &Value, steps: &[&str]) {
    tools::qemu_io(status["nbd_uri"].as_str().unwrap(), steps);
}
