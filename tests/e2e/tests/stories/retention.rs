//! Old history is folded into images while the disk is in use, and what is kept can be gone back to.

use backtide_e2e::{Bench, tools};

const SIZE: u64 = 32 << 20;

const SETTINGS: &str = "[limits]\nsegment_bytes = 1048576\n[retention]\ninterval_ms = 100\n";

#[test]
fn kept_points_outlive_the_log_and_the_disk_resyncs_against_images() {
    let bench = Bench::new();
    let receiver = bench.receiver_with(SETTINGS);
    let agent = bench.agent();
    bench.image("vm1.img", SIZE);
    let disk = bench.attach("vm1", "vm1.img", &[]);
    disk.wait("sync");
    disk.qemu_io(&["write -P 0x11 0 2M", "write -P 0x22 8M 64k"]);
    disk.settle();
    bench.json(&["mark", "kept", "vm1"]);
    std::fs::copy(&disk.image, bench.path("kept.img")).unwrap();
    disk.qemu_io(&["write -P 0x33 1M 4M", "discard 8M 64k"]);
    disk.settle();
    let middle = disk.last();
    disk.qemu_io(&["write -P 0x44 2M 4M", "write -P 0x55 16M 1M"]);
    disk.settle();

    bench.json(&["retention", "keep", "vm1", "--at", "mark:kept"]);
    let none = bench.plain(&["retention", "release", "vm1", "--at", "latest"]);
    assert_eq!(none.code, 4, "{none:?}");
    assert!(none.stderr.contains("no point of disk vm1 is kept at latest"), "{none:?}");
    let preview = bench.json(&["retention", "preview", "vm1", "any=1s"]);
    assert_eq!(preview["ladder"], "any=1s");
    let set = bench.run(&["retention", "set", "vm1", "any=1s", "--yes"]);
    assert_eq!(set.code, 0, "{set:?}");
    assert!(set.stderr.contains("kept for 1s only"), "{set:?}");
    let retention = loop {
        let report = bench.json(&["retention", "show", "vm1"]);
        let disk = report["disks"][0].clone();
        assert_eq!(disk["error"], serde_json::Value::Null, "{report}");
        if disk["every_point_from"]["lsn"].as_u64().unwrap() > middle {
            break disk;
        }
    };
    assert_eq!(retention["single_points"].as_array().unwrap().len(), 1, "{retention}");
    assert!(disk.holes().iter().any(|hole| hole["reason_code"] == "thinned"), "{:?}", disk.holes());
    tools::assert_same_images(&bench.path("kept.img"), &disk.restore("mark:kept"));
    assert_eq!(disk.restore_fails(&format!("lsn:{middle}")).code, 4);
    disk.latest_is_the_image();

    // What the receiver has is an image by now: a compare of everything finds no difference, and mends one.
    bench.json(&["resync", "vm1", "--compare", "--wait"]);
    disk.latest_is_the_image();
    agent.kill();
    let file = std::fs::OpenOptions::new().write(true).open(&disk.image).unwrap();
    std::os::unix::fs::FileExt::write_all_at(&file, &[0x66; 8192], 20 << 20).unwrap();
    receiver.kill();
    let _receiver = bench.receiver_with(SETTINGS);
    let _agent = bench.agent();
    disk.wait("sync");
    bench.json(&["resync", "vm1", "--compare", "--wait"]);
    disk.settle();
    disk.latest_is_the_image();
    tools::assert_same_images(&bench.path("kept.img"), &disk.restore("mark:kept"));
}
