//! What is wrong is refused: one clear sentence, the right exit code, nothing lost.

use std::os::unix::net::UnixListener;

use backtide_e2e::{Bench, is_root, skip, tools};

const SIZE: u64 = 16 << 20;

#[test]
fn wrong_attaches_are_refused_with_a_sentence_that_names_what_is_wrong() {
    let bench = Bench::new();
    let (_receiver, _agent, disk) = bench.protected(SIZE, &[]);
    bench.image("odd.img", 1_000_001);
    bench.image("empty.img", 0);
    bench.image("good.img", SIZE);
    bench.image("locked.img", SIZE);
    std::os::unix::fs::symlink("vm1.img", bench.path("link.img")).unwrap();
    std::os::unix::fs::symlink("nowhere.img", bench.path("dangling.img")).unwrap();
    let _taken = UnixListener::bind(bench.path("taken.sock")).unwrap();
    let other = OtherAgent::with(&bench, "locked.img");
    let vast = format!("nbd+unix:///?socket={}", bench.name("vast.sock"));
    let _vast = tools::Beside::start("nbdkit", &["-f", "-U", &bench.name("vast.sock"), "memory", "4E"]);
    tools::wait_for_socket(&bench.path("vast.sock"));
    let stream = bench.socket("stream.sock");
    let path = |name: &str| bench.name(name);
    let taken = format!("nbd+unix:///vm2?socket={}", bench.name("taken.sock"));
    let nobody = format!("nbd+unix:///?socket={}", bench.name("nobody.sock"));
    let cases: &[(&str, &[&str], i32, &str)] = &[
        ("missing image", &["attach", "vm2", &path("none.img")], 4, "none.img"),
        ("odd size", &["attach", "vm2", &path("odd.img")], 2, "512"),
        (
            "no disk is as large",
            &["attach", "vm2", &vast],
            2,
            "has 4611686018427387904 bytes (4194304 TiB), and a disk has 281474976710656 at most (256 TiB)",
        ),
        ("no size", &["attach", "vm2", &path("empty.img")], 2, "empty.img"),
        ("a directory", &["attach", "vm2", &path("store")], 2, "store"),
        ("locked image", &["attach", "vm2", &path("locked.img")], 5, "locked.img"),
        ("same image twice", &["attach", "vm2", &path("vm1.img")], 5, "it is disk vm1 of this agent"),
        ("another name of it", &["attach", "vm2", &path("link.img")], 5, "it is disk vm1 of this agent"),
        ("a link to nowhere", &["attach", "vm2", &path("dangling.img")], 4, "nowhere.img"),
        ("same name twice", &["attach", "vm1", &path("good.img")], 5, "vm1"),
        ("address in use", &["attach", "vm2", &path("good.img"), "--nbd", &taken], 5, "taken.sock"),
        ("no server behind", &["attach", "vm2", &nobody], 6, "nobody.sock"),
        ("wrong name", &["attach", "vm 2", &path("good.img")], 2, "vm 2"),
        ("wrong URI", &["attach", "vm2", "nbd+unix://x"], 2, "nbd+unix://x"),
        ("wrong policy", &["attach", "vm2", &path("good.img"), "--ack", "soon"], 2, "soon"),
        ("wrong size", &["attach", "vm2", &path("good.img"), "--window", "lots"], 2, "lots"),
    ];
    let mut wrong = Vec::new();
    for (what, arguments, code, named) in cases {
        let said = bench.run(&[arguments, &["--receiver", &stream][..]].concat());
        if said.code != *code || !said.stderr.contains(named) {
            wrong.push(format!("{what}: expected {code} and {named:?}, found {said:?}"));
            continue;
        }
        said.sentence();
    }
    assert!(wrong.is_empty(), "{}", wrong.join("\n"));
    assert_eq!(bench.json(&["status"])["disks"].as_array().unwrap().len(), 1, "none of them is attached");
    disk.qemu_io(&["write -P 0x11 0 1M"]);
    disk.latest_is_the_image();
    assert_eq!(other.0.stop(), 0);
}

/// A second agent, which has an image of the bench attached.
struct OtherAgent(backtide_e2e::Daemon);

impl OtherAgent {
    fn with(bench: &Bench, image: &str) -> Self {
        let api = bench.socket("other.sock");
        let agent = bench.daemon(&["agent", "run", "--api", &api, "--state", &bench.name("other")]);
        let stream = bench.socket("stream.sock");
        let image = bench.name(image);
        bench.json(&["--agent", &api, "attach", "other", &image, "--receiver", &stream]);
        Self(agent)
    }
}

#[test]
fn unknown_disks_points_and_mounts_are_not_found() {
    let bench = Bench::new();
    let (_receiver, _agent, disk) = bench.protected(SIZE, &[]);
    disk.qemu_io(&["write -P 0x11 0 1M"]);
    disk.settle();
    let output = bench.name("out.img");
    let dangling = bench.name("dangling.img");
    std::os::unix::fs::symlink("nowhere.img", &dangling).unwrap();
    fn to(output: &str) -> [&str; 6] {
        ["restore", "vm1", "--at", "latest", "--output", output]
    }
    let restore = |disk, at| bench.run(&["restore", disk, "--at", at, "--output", &output]);
    let cases = [
        ("status", bench.run(&["status", "vm9"]), 4, "vm9"),
        ("pause", bench.run(&["pause", "vm9"]), 4, "vm9"),
        ("verify", bench.run(&["verify", "vm9"]), 4, "vm9"),
        ("mark", bench.run(&["mark", "here", "vm1", "vm9"]), 4, "vm9"),
        ("points", bench.run(&["points", "vm9"]), 4, "vm9"),
        ("mount", bench.run(&["mount", "vm9", "--at", "latest"]), 4, "vm9"),
        ("unmount", bench.run(&["unmount", "vm1-77"]), 4, "vm1-77"),
        ("restore to a directory", bench.run(&to(&bench.name("store"))), 2, "is a directory"),
        ("restore to a link to nowhere", bench.run(&to(&dangling)), 5, "nowhere.img"),
        ("restore", restore("vm9", "latest"), 4, "vm9"),
        ("future point", restore("vm1", "lsn:123456789"), 4, "lsn:123456789"),
        ("unknown mark", restore("vm1", "mark:none"), 4, "none"),
        ("too early", restore("vm1", "2001-01-01T00:00:00Z"), 4, "2001-01-01"),
        ("no point", restore("vm1", "yesterday"), 2, "yesterday"),
        ("no lsn", restore("vm1", "lsn:x"), 2, "lsn:x"),
    ];
    let wrong: Vec<String> = cases
        .iter()
        .filter(|(_, said, code, named)| said.code != *code || !said.sentence().contains(named))
        .map(|(what, said, code, named)| format!("{what}: expected {code} and {named:?}, found {said:?}"))
        .collect();
    assert!(wrong.is_empty(), "{}", wrong.join("\n"));
    assert!(!bench.path("out.img").exists());
}

#[test]
fn daemons_that_are_not_there_are_unreachable_and_second_daemons_are_refused() {
    let bench = Bench::new();
    for command in [&["status"][..], &["pause", "vm1"], &["points", "vm1"], &["mount"]] {
        let said = bench.run(command);
        assert_eq!(said.code, 6, "{command:?}: {said:?}");
        assert!(said.sentence().contains(".sock"), "{command:?}: {said:?}");
    }
    let (_receiver, _agent) = (bench.receiver(), bench.agent());
    let other = bench.socket("other.sock");
    for (what, command) in [
        ("store in use", &["receiver", "run", "--api", &other, "--listen", &bench.socket("s2.sock")][..]),
        ("receiver's address in use", &["receiver", "run", "--store", &bench.name("store2")]),
        ("state in use", &["agent", "run", "--api", &other]),
        ("agent's address in use", &["agent", "run", "--state", &bench.name("state2")]),
    ] {
        let said = bench.run(command);
        assert_eq!(said.code, 5, "{what}: {said:?}");
        said.sentence();
    }
    // The first ones are still there.
    assert_eq!(bench.json(&["status"])["disks"], serde_json::json!([]));
    assert_eq!(bench.json(&["mount"])["mounts"], serde_json::json!([]));
}

#[test]
fn a_receiver_that_is_away_at_attach_is_no_obstacle() {
    let bench = Bench::new();
    let _agent = bench.agent();
    bench.image("vm1.img", SIZE);
    let disk = bench.attach_ending(3, "vm1", "vm1.img", &[]);
    disk.qemu_io(&["write -P 0x11 0 1M"]);
    let status = disk.status();
    assert_eq!((&status["mode"], &status["connected"]), (&"tracking".into(), &false.into()), "{status}");
    assert_eq!(status["last_error"]["code"], "unreachable", "{status}");
    let _receiver = bench.receiver();
    disk.latest_is_the_image();
}

#[test]
fn the_same_disk_of_two_agents_has_one_writer() {
    let bench = Bench::new();
    let (_receiver, agent, disk) = bench.protected(SIZE, &[]);
    disk.qemu_io(&["write -P 0x11 0 1M"]);
    disk.settle();
    // A host restored from a backup: the same record of the disk, an older epoch.
    assert_eq!(agent.stop(), 0);
    tools::run("cp", &["-a", &bench.name("state"), &bench.name("stale")]);
    tools::run("cp", &[&bench.name("vm1.img"), &bench.name("moved.img")]);
    let agent = bench.agent();
    disk.settle();
    assert_eq!(agent.stop(), 0);
    let agent = bench.agent();
    disk.settle();
    let api = bench.socket("stale.sock");
    assert_eq!(agent.stop(), 0);
    let mut stale = bench.daemon(&["agent", "run", "--api", &api, "--state", &bench.name("stale")]);
    stale.may_complain("fenced");
    let told = loop {
        let said = bench.run(&["--agent", &api, "status", "vm1"]);
        let told: serde_json::Value = serde_json::from_str(&said.stdout).expect("a status is JSON");
        let status = told["disks"][0].clone();
        assert_ne!(status["connected"], true, "a lower epoch is refused: {status}");
        let fenced = status["reason_code"] == "fenced" || status["last_error"]["code"] == "fenced";
        if said.code == 3 {
            assert!(fenced, "{status}");
            break status;
        }
        assert_eq!(said.code, 0, "{said:?}");
    };
    // Its guest is served all the same, and the receiver has nothing of it.
    let uri = told["nbd_uri"].clone();
    let restored = disk.restore("latest");
    tools::qemu_io(uri.as_str().unwrap(), &["write -P 0x99 0 1M"]);
    tools::assert_same_images(&restored, &disk.restore("latest"));
}

#[test]
fn a_full_receiver_costs_the_guest_nothing() {
    if !is_root() {
        return skip("only root mounts a small file system");
    }
    let bench = Bench::new();
    let store = bench.path("store");
    std::fs::create_dir(&store).unwrap();
    let options = ["-t", "tmpfs", "-o", "size=24M", "none", store.to_str().unwrap()];
    if let (false, said) = tools::try_run("mount", &options) {
        return skip(&format!("tmpfs cannot be mounted here: {said}"));
    }
    let _mounted = Unmount(store.to_str().unwrap().to_owned());
    let mut receiver = bench.receiver_with("[limits]\nfree_bytes_min = 4194304\nsegment_bytes = 4194304\n");
    receiver.may_complain("space");
    receiver.may_complain("full");
    let _agent = bench.agent();
    bench.image("vm1.img", 64 << 20);
    let disk = bench.attach("vm1", "vm1.img", &["--window", "1MiB"]);
    disk.wait("sync");
    let load = disk.load(1);
    let full = disk.until("the receiver is full, and said to be", |status| {
        status["mode"] == "tracking" && status["last_error"]["code"] == "store"
    });
    let message = full["last_error"]["message"].as_str().unwrap();
    assert!(message.contains("full") && message.contains("store"), "{message}");
    assert!(full["dirty"]["blocks"].as_u64() > Some(0), "{full}");
    // Tried again and again, it is connected for a moment each time.
    disk.until("who refuses is named", |status| {
        status["reason"].as_str().is_some_and(|reason| reason.contains("the receiver refuses data: "))
    });
    let kept = bench.json_ending(3, &["receiver", "status"]);
    assert!(kept["alarms"].to_string().contains("the store is full: data is refused until"), "{kept}");
    load.goes_on(300);
    let model = load.stop().model();
    // What it had it still has.
    let counts = disk.points_are_prefixes(&disk.offered_points(10), &model);
    assert!(counts.last() < Some(&model.len()) && counts.last() > Some(&0), "{counts:?}");
    // With room again everything goes on by itself.
    tools::run("mount", &["-o", "remount,size=400M", store.to_str().unwrap()]);
    disk.latest_is_the_image();
    model.assert_is_in(disk.image.as_ref(), model.len(), "the image");
}

/// Unmounts at the end of a test.
pub(crate) struct Unmount(pub(crate) String);

impl Drop for Unmount {
    fn drop(&mut self) {
        tools::try_run("umount", &["-l", &self.0]);
    }
}

#[test]
fn what_is_no_file_of_a_store_is_refused_by_inspect_in_one_sentence() {
    let bench = Bench::new();
    let image = bench.image("vm1.img", 4096);
    std::fs::write(bench.path("empty"), "").unwrap();
    for name in [image.to_str().unwrap(), &bench.name("empty")] {
        let said = bench.run(&["inspect", name]);
        assert_eq!((said.code, said.stdout.as_str()), (2, ""), "{said:?}");
        let sentence = said.sentence();
        assert!(sentence.contains(name) && sentence.contains("is no file of a store"), "{sentence}");
    }
    assert_eq!(bench.run(&["inspect", bench.name("").as_str()]).code, 2);
    assert_eq!(bench.run(&["inspect", &bench.name("nothing")]).code, 4);
}
