//! A host is gone, and its disk goes on at another one: the same disk and the same history, at its latest point, while
//! the content still comes. Whoever had the disk is fenced.

use std::path::Path;

use backtide_e2e::{Bench, Load, Model, OtherHost, tools};
use backtide_storage::KillPoint;
use serde_json::{Value, json};

const SIZE: u64 = 8 << 20;

#[test]
fn a_disk_goes_on_at_another_host_and_the_first_is_fenced() {
    let bench = Bench::new();
    let (_receiver, mut first, disk) = bench.protected(SIZE, &[]);
    let load = disk.load(1);
    load.goes_on(120);
    let mut model = Model::of_zeroes(SIZE, Vec::new());
    model.then(load.stop());
    disk.settle();
    let (early, at_early) = (disk.last(), model.clone());
    let (other, second) = OtherHost::start(&bench);

    let unasked = other.failover(&[]);
    assert_eq!(unasked.code, 2, "{unasked:?}");
    assert!(unasked.stderr.contains("CONNECTED"), "{unasked:?}");
    assert!(disk.status()["connected"].as_bool().unwrap(), "nothing was done");
    first.may_complain("fenced");
    let done = other.failover(&["--yes"]);
    assert_eq!(done.code, 0, "{done:?}");
    disk.until("it is fenced", |status| status["reason_code"] == "fenced");
    // What needs the receiver says that the disk is no longer this agent's.
    let back = format!("lsn:{early}");
    for asked in [
        &["mark", "late", "vm1"][..],
        &["verify", "vm1"],
        &["rewind", "vm1", "--to", &back, "--yes"],
        &["resize", "vm1", "--size", "16M"],
    ] {
        let refused = bench.run(asked);
        assert_eq!((refused.code, refused.sentence().contains("vm1 is fenced")), (5, true), "{refused:?}");
    }
    assert_eq!(bench.json(&["pause", "vm1"])["reason_code"], "fenced");
    assert!(bench.json(&["resume", "vm1"])["reason"].to_string().contains("another agent has disk vm1"));
    let shown = bench.plain(&["status"]).stdout;
    assert!(shown.lines().any(|line| line.starts_with("vm1") && line.contains("fenced")), "{shown}");
    // In sync at once, without a pass, and its guest goes on.
    assert_eq!(other.status()["mode"], "sync", "{}", other.status());
    let load = Load::start(&other.uri(), 2);
    load.goes_on(120);
    model.then(load.stop());
    other.settle();
    model.assert_is_in(&bench.path("b.img"), model.len(), "the other host's image");
    assert!(!Path::new(&bench.name("b.img.backtide-incomplete")).exists());
    assert_eq!(disk.holes(), Vec::<Value>::new(), "one history without a hole");
    at_early.assert_is_in(&disk.restore(&format!("lsn:{early}")), at_early.len(), "a point of before");
    model.assert_is_in(&disk.restore("latest"), model.len(), "the latest point");
    let verified = other.run(&["verify", "vm1"]);
    assert_eq!(verified.code, 0, "{verified:?}");
    // The first host comes up again, and again: the disk stays where it is.
    for _ in 0..2 {
        first.kill();
        first = bench.agent();
        first.may_complain("another agent has disk vm1");
        disk.until("it is fenced still", |status| status["reason_code"] == "fenced");
    }
    assert!(other.status()["connected"].as_bool().unwrap(), "{}", other.status());
    assert_eq!(second.stop(), 0);
}

#[test]
fn a_host_that_died_writing_is_left_behind_and_the_next_may_die_too() {
    let bench = Bench::new();
    let (_receiver, first, disk) = bench.protected(SIZE, &[]);
    let load = disk.load(1);
    load.goes_on(100);
    first.kill();
    let written = load.broken();
    let (other, second) = OtherHost::start(&bench);
    let done = other.failover(&["--yes", "--resync-rate", "4096"]);
    assert_eq!(done.code, 0, "{done:?}");
    // What the receiver had is a beginning of what the guest wrote.
    let latest = bench.path("latest.img");
    std::fs::copy(disk.restore("latest"), &latest).unwrap();
    let count = written.model().prefix_in(&latest, "the latest point");
    tools::assert_same(&other.uri(), latest.to_str().unwrap());
    tools::qemu_io(&other.uri(), &["write -P 0x66 1M 1M", "flush"]);
    second.kill();
    let _second = other.agent();
    assert_eq!(other.run(&["limits", "vm1", "--resync-rate", "0"]).code, 0);
    other.settle();
    let mut expected = written.model().after(count);
    expected[1 << 20..2 << 20].fill(0x66);
    std::fs::write(&latest, &expected).unwrap();
    tools::assert_same_images(&latest, &bench.path("b.img"));
    tools::assert_same_images(&latest, &disk.restore("latest"));
}

#[test]
fn a_failover_that_dies_half_way_is_no_disk_and_is_begun_again() {
    let bench = Bench::new();
    let (_receiver, first, disk) = bench.protected(SIZE, &[]);
    disk.qemu_io(&["write -P 0x11 0 6M", "flush"]);
    disk.settle();
    let expected = disk.restore("latest");
    assert_eq!(first.stop(), 0);
    let other = OtherHost::new(&bench);
    let mut doomed = other.doomed(KillPoint::HydrationMade.name());
    // It takes its time to begin, and dies of the first that reaches it.
    while !doomed.is_dead() {
        assert_ne!(other.failover(&["--yes"]).code, 0);
    }
    let _second = other.agent();
    // The image is nobody's disk: all of it is a hole.
    let (image, stream) = (bench.name("b.img"), bench.socket("stream.sock"));
    let plain = other.run(&["attach", "vm1", &image, "--receiver", &stream]);
    assert_eq!(plain.code, 5, "{plain:?}");
    let again = other.failover(&["--yes"]);
    assert_eq!(again.code, 0, "{again:?}");
    other.settle();
    tools::assert_same_images(&expected, &bench.path("b.img"));
    tools::assert_same_images(&expected, &disk.restore("latest"));
}

#[test]
fn a_failover_that_cannot_be_leaves_the_disk_where_it_is() {
    let bench = Bench::new();
    let (_receiver, _first, disk) = bench.protected(SIZE, &[]);
    disk.qemu_io(&["write -P 0x11 0 1M", "flush"]);
    disk.settle();
    let (other, _second) = OtherHost::start(&bench);
    std::fs::write(bench.path("b.img"), vec![1; 4096]).unwrap();
    let refused = other.failover(&["--yes"]);
    assert_eq!((refused.code, refused.error()["code"].clone()), (5, json!("exists")), "{refused:?}");
    std::fs::remove_file(bench.path("b.img")).unwrap();
    // What can be told before is: nobody is fenced for a disk that could not be made, or served.
    let (nowhere, stream) = (bench.name("nowhere/b.img"), bench.socket("stream.sock"));
    let refused = other.run(&["failover", "vm1", &nowhere, "--receiver", &stream, "--yes"]);
    assert_eq!(refused.code, 1, "{refused:?}");
    assert!(refused.sentence().contains("make a file in"), "{refused:?}");
    let socket = bench.path("busy.sock");
    let _busy = std::os::unix::net::UnixListener::bind(&socket).unwrap();
    let busy = format!("nbd+unix:///vm1?socket={}", socket.display());
    let refused = other.failover(&["--yes", "--nbd", &busy]);
    assert_eq!(refused.code, 5, "{refused:?}");
    assert!(disk.status()["connected"].as_bool().unwrap() && !bench.path("b.img").exists());
    // The host that has the disk does not take it over from itself.
    let (image, stream) = (bench.name("c.img"), bench.socket("stream.sock"));
    let own = bench.run(&["failover", "vm1", &image, "--receiver", &stream, "--yes"]);
    assert_eq!(own.code, 5, "{own:?}");
    assert_eq!(disk.status()["mode"], "sync");
    disk.qemu_io(&["write -P 0x12 0 1M", "flush"]);
    disk.settle();
    disk.latest_is_the_image();
}

#[test]
fn a_disk_whose_log_is_in_doubt_goes_on_at_another_host() {
    let bench = Bench::new();
    let (receiver, first, disk) = bench.protected(SIZE, &[]);
    disk.qemu_io(&["write -P 0x11 0 1M", "write -P 0x5c 4M 64k", "flush"]);
    disk.settle();
    // A power cut takes both, and a byte of the log.
    first.kill();
    assert_eq!(receiver.stop(), 0);
    let listed = tools::run("find", &[&bench.name("store"), "-name", "*.seg"]);
    let flipped = listed.lines().any(|path| {
        let mut bytes = std::fs::read(path).unwrap();
        let Some(at) = bytes.windows(4096).position(|window| window == [0x5c; 4096]) else { return false };
        bytes[at + 2000] ^= 1;
        std::fs::write(path, bytes).unwrap();
        true
    });
    assert!(flipped, "the data are in the log");
    let mut receiver = bench.receiver();
    for complaint in ["damaged", "is to be compared"] {
        receiver.may_complain(complaint);
    }
    let other = OtherHost::new(&bench);
    let mut second = other.agent();
    for complaint in ["is damaged", "damaged at"] {
        second.may_complain(complaint);
    }
    // A warning where the damage was met by the time that it says how the disk is.
    let done = other.failover(&["--yes"]);
    assert!([0, 3].contains(&done.code), "{done:?}");
    // All of it is there but what is damaged.
    tools::qemu_io(&other.uri(), &["read -P 0x11 0 1M", "write -P 0x22 4M 64k", "flush"]);
    other.settle();
    tools::qemu_io(&other.uri(), &["read -P 0x11 0 1M", "read -P 0x22 4M 64k", "read -P 0 5M 1M"]);
    assert_eq!(other.run(&["verify", "vm1"]).code, 0);
}

#[test]
fn a_failover_that_fails_after_the_fence_says_so_and_goes_on() {
    let bench = Bench::new();
    let (_receiver, mut first, disk) = bench.protected(SIZE, &[]);
    disk.qemu_io(&["write -P 0x11 0 1M", "flush"]);
    disk.settle();
    let (other, second) = OtherHost::start(&bench);
    first.may_complain("fenced");
    // Nobody is fenced for a disk of which nothing can be kept there.
    second.limit_files("32768");
    let refused = other.failover(&["--yes"]);
    assert_eq!((refused.code, refused.error()["code"].clone()), (5, json!("refused")), "{refused:?}");
    assert!(refused.sentence().contains("cannot be written in the state directory"), "{refused:?}");
    assert!(disk.status()["connected"].as_bool().unwrap() && !bench.path("b.img").exists());
    // Its new image cannot be as large as that.
    second.limit_files("6291456");
    let failed = other.failover(&["--yes"]);
    assert_ne!(failed.code, 0, "{failed:?}");
    assert!(failed.sentence().contains("whoever had disk vm1 is fenced by now"), "{failed:?}");
    disk.until("it is fenced", |status| status["reason_code"] == "fenced");
    second.limit_files("unlimited");
    let again = other.failover(&["--yes"]);
    assert_eq!(again.code, 0, "{again:?}");
    other.settle();
    tools::assert_same_images(Path::new(&disk.image), &bench.path("b.img"));
    assert_eq!(second.stop(), 0);
}
