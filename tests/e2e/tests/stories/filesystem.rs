//! A file system of the kernel on a protected disk, cut off in the middle.

use std::path::Path;

use backtide_e2e::{
    Bench,
    kernel_disk::{Mounted, Served, cannot_mount},
    skip, tools,
};

const SIZE: u64 = 128 << 20;

#[test]
fn ext4_is_whole_at_every_point_of_an_interrupted_timeline() {
    if let Some(why) = cannot_mount() {
        return skip(why);
    }
    let bench = Bench::new();
    let options = ["--window", "256KiB", "--guest-delay-max", "0"];
    let (receiver, _agent, disk) = bench.protected(SIZE, &options);
    let served = Served::start(&bench, "disk", &disk.uri(), SIZE);
    tools::run("mkfs.ext4", &["-q", "-F", served.path().to_str().unwrap()]);
    let mounted = match Mounted::at(bench.path("mnt"), &served) {
        Ok(mounted) => mounted,
        Err(why) => return skip(&format!("no ext4 on a loop device here: {why}")),
    };
    write_files(mounted.directory(), "before", 30);
    // The window is small: a slow receiver may have cost a resync, in which nothing can be marked.
    disk.settle();
    bench.json(&["mark", "before-the-cut", "vm1"]);
    disk.settle();
    receiver.kill();
    disk.until("the stream is lost", |status| status["connected"] == false);
    write_files(mounted.directory(), "during", 30);
    disk.until("tracking", |status| status["mode"] == "tracking");
    let _receiver = bench.receiver();
    write_files(mounted.directory(), "after", 30);
    disk.wait("sync");
    write_files(mounted.directory(), "at-last", 30);
    mounted.unmount();
    disk.latest_is_the_image();
    drop(served);

    let holes = disk.holes();
    let outage = holes.iter().find(|hole| hole["reason_code"] == "receiver-away");
    let after = outage.unwrap_or_else(|| panic!("{holes:?}"))["before_lsn"].as_u64().unwrap();
    // For the same reason there may be another hole in the middle.
    let middle = (after + disk.last()) / 2;
    let ends = |hole: &&serde_json::Value| {
        hole["after_lsn"].as_u64() < Some(middle) && hole["before_lsn"].as_u64() > Some(middle)
    };
    let middle = holes.iter().find(ends).map_or(middle, |hole| hole["before_lsn"].as_u64().unwrap());
    for (at, files) in [
        ("mark:before-the-cut".to_owned(), 30),
        (format!("lsn:{after}"), 30),
        (format!("lsn:{middle}"), 30),
        ("latest".to_owned(), 120),
    ] {
        let restored = disk.restore(&at);
        let restored = restored.to_str().unwrap();
        // A crash-consistent point: the journal is replayed first, as the kernel would.
        tools::try_run("e2fsck", &["-fp", restored]);
        tools::run("e2fsck", &["-fn", restored]);
        let list = tools::run("debugfs", &["-R", "ls -p /", restored]);
        let found = list.matches(".file/").count();
        assert!(found >= files, "{at}: {found} files of {files}: {list}");
    }
}

fn write_files(directory: &Path, name: &str, count: u32) {
    use std::io::Write;
    for number in 0..count {
        let path = directory.join(format!("{name}-{number}.file"));
        let mut file = std::fs::File::create(path).unwrap();
        file.write_all(&vec![number as u8 + 1; 50_000]).unwrap();
        file.sync_all().unwrap();
    }
}
