//! The live disk against the receiver: no false alarm under load, no flipped byte overlooked.

use std::os::unix::fs::FileExt;

use backtide_e2e::Bench;

const SIZE: u64 = 64 << 20;

#[test]
fn verify_under_load_finds_no_difference() {
    let bench = Bench::new();
    let (_receiver, _agent, disk) = bench.protected(SIZE, &[]);
    let load = disk.load(1);
    for _ in 0..3 {
        load.goes_on(100);
        let report = bench.json(&["verify", "vm1"]);
        assert_eq!(report["state"], "done", "{report}");
        assert_eq!(
            (&report["differing_count"], &report["compared_bytes"]),
            (&0.into(), &SIZE.into()),
            "{report}"
        );
        assert!(
            report["to_lsn"].as_u64() > report["from_lsn"].as_u64(),
            "the guest wrote meanwhile: {report}"
        );
    }
    load.stop();
    disk.latest_is_the_image();
    assert_eq!(disk.holes(), Vec::<serde_json::Value>::new(), "a verify makes no hole");
}

#[test]
fn verify_finds_a_byte_that_changed_behind_the_agent_and_a_compare_repairs_the_copy() {
    let bench = Bench::new();
    let (_receiver, _agent, disk) = bench.protected(SIZE, &[]);
    disk.qemu_io(&["write -P 0x11 0 8M", "flush"]);
    disk.settle();
    let image = std::fs::OpenOptions::new().write(true).open(&disk.image).unwrap();
    image.write_all_at(&[0x12], (5 << 20) + 4321).unwrap();
    image.write_all_at(&[0x01], SIZE - 1).unwrap();
    let report = bench.json_ending(8, &["verify", "vm1"]);
    let found: Vec<u64> =
        report["differing"].as_array().unwrap().iter().map(|span| span["offset"].as_u64().unwrap()).collect();
    assert_eq!(report["differing_count"], 2, "{report}");
    assert!(found[0] <= (5 << 20) + 4321 && found[0] + 65536 > (5 << 20) + 4321, "{report}");
    assert!(found[1] < SIZE && found[1] + 65536 >= SIZE, "{report}");
    let said = bench.plain(&["verify", "vm1"]);
    assert!(said.code == 8 && said.stdout.contains("DIFFERS"), "{said:?}");
    // The disk is what the guest has: a compare brings the receiver to it.
    bench.json(&["resync", "vm1", "--compare", "--wait"]);
    assert_eq!(bench.json(&["verify", "vm1"])["differing_count"], 0);
    disk.latest_is_the_image();
}

#[test]
fn verify_repairs_what_differs_when_told_to() {
    let bench = Bench::new();
    let (_receiver, _agent, disk) = bench.protected(SIZE, &[]);
    disk.qemu_io(&["write -P 0x11 0 8M", "flush"]);
    disk.settle();
    let image = std::fs::OpenOptions::new().write(true).open(&disk.image).unwrap();
    image.write_all_at(&[0x12], (5 << 20) + 4321).unwrap();
    let load = disk.load(1);
    load.goes_on(50);
    let said = bench.plain(&["verify", "vm1", "--repair"]);
    assert!(said.code == 3 && said.stdout.contains("repaired"), "{said:?}");
    load.goes_on(50);
    load.stop();
    let sent = disk.status()["counters"]["resync_sent_bytes"].as_u64().unwrap();
    assert!(sent <= 4 << 20, "only what differs: {sent}");
    assert_eq!(bench.json(&["verify", "vm1", "--repair"])["differing_count"], 0);
    disk.latest_is_the_image();
}
