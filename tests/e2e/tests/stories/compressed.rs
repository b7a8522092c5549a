//! A journal that is compressed, in one way and then in another, is read as any other.

use backtide_e2e::{Bench, tools};

const SIZE: u64 = 32 << 20;

fn settings(compression: &str) -> String {
    format!("[limits]\nsegment_bytes = 1048576\njournal_compression = \"{compression}\"\n")
}

#[test]
fn points_of_a_compressed_journal_are_what_was_written() {
    let bench = Bench::new();
    let mut receiver = bench.receiver_with(&settings("zstd"));
    let _agent = bench.agent();
    bench.image("vm1.img", SIZE);
    let disk = bench.attach("vm1", "vm1.img", &[]);
    disk.wait("sync");
    let before = disk.last();
    let load = disk.load(3);
    let mut written = 0;
    for compression in ["lz4", "none", "zstd"] {
        written += 150;
        load.goes_on(150);
        disk.settle();
        receiver.kill();
        receiver = bench.receiver_with(&settings(compression));
        disk.wait("sync");
    }
    let model = load.stop().model();
    disk.qemu_io(&["write -P 0x5c 1M 2M", "write -P 0x33 5000 3000"]);
    disk.settle();
    disk.latest_is_the_image();
    disk.point_is_the_model(before, written - 10, &model);
    let scrub = bench.json(&["scrub"]);
    assert_eq!(scrub["sound"], true, "{scrub}");
    let store = bench.name("store");
    let listed = tools::run("find", &[&store, "-name", "*.seg"]);
    let listings: Vec<String> = listed.lines().map(|path| bench.plain(&["inspect", path]).stdout).collect();
    for method in [" by zstd", " by lz4"] {
        assert!(listings.iter().any(|listing| listing.contains(method)), "{method}: {listings:?}");
    }
}
