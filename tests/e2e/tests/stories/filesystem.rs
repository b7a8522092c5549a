//! A file system of the kernel on a protected disk, cut off in the middle.

use std::{
    os::unix::fs::FileTypeExt,
    path::{Path, PathBuf},
};

use backtide_e2e::{Bench, is_root, skip, tools};

const SIZE: u64 = 128 << 20;

/// A mount that ends with the test.
struct Mounted(PathBuf);

impl Mounted {
    fn at(directory: PathBuf, what: &Path, options: &str) -> Result<Self, String> {
        std::fs::create_dir(&directory).unwrap();
        let directory_name = directory.to_str().unwrap();
        match tools::try_run("mount", &["-o", options, what.to_str().unwrap(), directory_name]) {
            (true, _) => Ok(Self(directory)),
            (false, said) => Err(said),
        }
    }
}

impl Drop for Mounted {
    fn drop(&mut self) {
        // Lazily: the server behind may be gone.
        tools::try_run("umount", &["-l", self.0.to_str().unwrap()]);
    }
}

/// Why this machine cannot do it, if it cannot.
fn obstacle() -> Option<&'static str> {
    let device = |path: &str| std::fs::metadata(path).is_ok_and(|found| found.file_type().is_char_device());
    if !is_root() {
        return Some("only root mounts a file system");
    }
    if !device("/dev/fuse") || !device("/dev/loop-control") {
        return Some("there is no /dev/fuse or /dev/loop-control");
    }
    if !tools::is_there("nbdfuse") {
        return Some("there is no nbdfuse, which is in the Debian package libnbd-bin");
    }
    None
}

#[test]
fn ext4_is_whole_at_every_point_of_an_interrupted_timeline() {
    if let Some(why) = obstacle() {
        return skip(why);
    }
    let bench = Bench::new();
    let options = ["--window", "256KiB", "--guest-delay-max", "0"];
    let (receiver, _agent, disk) = bench.protected(SIZE, &options);
    let served = bench.path("disk");
    std::fs::write(&served, "").unwrap();
    let nbdfuse = tools::Beside::start("nbdfuse", &[served.to_str().unwrap(), &disk.uri()]);
    let _fuse = Unfuse(served.clone());
    while std::fs::metadata(&served).is_ok_and(|found| found.len() != SIZE) {
        std::thread::yield_now();
    }
    tools::run("mkfs.ext4", &["-q", "-F", served.to_str().unwrap()]);
    let mounted = match Mounted::at(bench.path("mnt"), &served, "loop") {
        Ok(mounted) => mounted,
        Err(why) => return skip(&format!("no ext4 on a loop device here: {why}")),
    };
    write_files(&mounted.0, "before", 30);
    // The window is small: a slow receiver may have cost a resync, in which nothing can be marked.
    disk.settle();
    bench.json(&["mark", "before-the-cut", "vm1"]);
    disk.settle();
    receiver.kill();
    disk.until("the stream is lost", |status| status["connected"] == false);
    write_files(&mounted.0, "during", 30);
    disk.until("tracking", |status| status["mode"] == "tracking");
    let _receiver = bench.receiver();
    write_files(&mounted.0, "after", 30);
    disk.wait("sync");
    write_files(&mounted.0, "at-last", 30);
    drop(mounted);
    wait_until_unmounted(&bench.path("mnt"));
    disk.latest_is_the_image();
    drop(nbdfuse);

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

/// Ends what nbdfuse serves.
struct Unfuse(PathBuf);

impl Drop for Unfuse {
    fn drop(&mut self) {
        tools::try_run("umount", &["-l", self.0.to_str().unwrap()]);
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

fn wait_until_unmounted(directory: &Path) {
    let name = directory.to_str().unwrap();
    while std::fs::read_to_string("/proc/self/mountinfo").unwrap().contains(name) {
        std::thread::yield_now();
    }
}
