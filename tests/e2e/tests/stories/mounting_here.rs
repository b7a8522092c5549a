//! Points that an agent serves on its own host, of a receiver that is elsewhere.

use std::{collections::BTreeSet, io};

use backtide_e2e::{
    Bench, Disk, Guest, OtherHost, Said,
    kernel_disk::{Served, cannot_mount},
    skip, tools,
};
use serde_json::Value;

const SIZE: u64 = 32 << 20;

fn json(said: &Said) -> Value {
    assert_eq!(said.code, 0, "{said:?}");
    serde_json::from_str(&said.stdout).expect("JSON on stdout")
}

/// A disk with some history, and a point of it that is not the latest.
fn with_history<'bench>(bench: &'bench Bench) -> (Disk<'bench>, String) {
    bench.image("vm1.img", SIZE);
    let disk = bench.attach("vm1", "vm1.img", &[]);
    disk.wait("sync");
    let load = disk.load(5);
    load.goes_on(300);
    let point = format!("lsn:{}", disk.last());
    load.goes_on(300);
    load.stop();
    disk.settle();
    (disk, point)
}

struct Mount<'host, 'bench> {
    host: &'host OtherHost<'bench>,
    id: String,
    uri: String,
}

impl<'host, 'bench> Mount<'host, 'bench> {
    fn of(bench: &Bench, host: &'host OtherHost<'bench>, point: &str, rest: &[&str]) -> Self {
        let stream = bench.socket("stream.sock");
        let mount = ["mount", "vm1", "--at", point, "--here", "--stream", &stream];
        let told = json(&host.run(&[&mount, rest].concat()));
        let text = |field: &str| told[field].as_str().expect("a text").to_owned();
        Self { host, id: text("id"), uri: text("uri") }
    }

    fn told(&self) -> Value {
        let all = json(&self.host.run(&["mount", "--here"]));
        let all = all["mounts"].as_array().expect("a list");
        all.iter().find(|mount| mount["id"] == self.id.as_str()).expect("it is mounted").clone()
    }
}

/// What the receiver keeps, and for whom.
fn held(bench: &Bench) -> Vec<Value> {
    let retention = bench.json(&["retention", "show", "vm1"]);
    retention["disks"][0]["held"].as_array().expect("what is held").clone()
}

/// So often is looked at what has to come about; each look runs a command.
const LOOKS_MAX: usize = 3000;

/// Looks until it is so: what never comes about is a failure.
fn until(what: &str, reached: impl Fn() -> bool) {
    assert!((0..LOOKS_MAX).any(|_| reached()), "it never came about: {what}");
}

#[test]
fn a_point_reads_the_same_here_as_where_it_is_kept_whatever_the_cache_holds() {
    let bench = Bench::new();
    let (_receiver, _agent) = (bench.receiver(), bench.agent());
    let (disk, point) = with_history(&bench);
    let restored = disk.restore(&point);
    let (host, _other) = OtherHost::start(&bench);
    for cache in ["0", "1MiB", "1GiB"] {
        let mount = Mount::of(&bench, &host, &point, &["--cache-size", cache]);
        // Twice, so that the second finds what the first has left.
        for _ in 0..2 {
            tools::assert_same(&mount.uri, &restored.display().to_string());
        }
        let told = mount.told();
        assert!(told["cache"]["bytes"].as_u64() <= told["cache"]["limit"].as_u64(), "{told}");
        let refused = Guest::connect(&mount.uri).write(0, &[1; 512]).unwrap_err();
        assert_eq!(refused.kind(), io::ErrorKind::PermissionDenied, "{refused}");
        json(&host.run(&["unmount", &mount.id, "--here"]));
        assert!(Guest::try_connect(&mount.uri).is_err(), "nobody serves it any more");
    }
}

#[test]
fn what_was_read_is_here_while_the_receiver_is_not_and_the_rest_when_it_is_back() {
    let bench = Bench::new();
    let (receiver, _agent) = (bench.receiver(), bench.agent());
    let (disk, point) = with_history(&bench);
    let expected = std::fs::read(disk.restore(&point)).expect("read the restored point");
    let (host, _other) = OtherHost::start(&bench);
    let mount = Mount::of(&bench, &host, &point, &[]);
    let mut guest = Guest::connect(&mount.uri);
    let half = expected.len() / 2;
    let mut buffer = vec![0; half];
    guest.read(0, &mut buffer).expect("read a half");
    assert!(buffer == expected[..half]);
    receiver.kill();
    guest.read(0, &mut buffer).expect("read what is here");
    assert!(buffer == expected[..half]);
    // Asked for while nobody is there, and answered when somebody is again.
    let rest = std::thread::spawn(move || {
        let mut buffer = vec![0; half];
        guest.read(half as u64, &mut buffer).map(|()| buffer)
    });
    until("the receiver is missed", || !mount.told()["last_error"].is_null());
    let _receiver = bench.receiver();
    assert!(rest.join().expect("a thread").expect("read the rest") == expected[half..]);
}

#[test]
fn what_its_blocks_hold_a_mount_asks_for_when_it_is_asked_itself() {
    let bench = Bench::new();
    let (receiver, _agent) = (bench.receiver(), bench.agent());
    let (_disk, point) = with_history(&bench);
    let (host, _other) = OtherHost::start(&bench);
    let mount = Mount::of(&bench, &host, &point, &["--changed-since", "lsn:1"]);
    receiver.kill();
    let uri = mount.uri.clone();
    let map = std::thread::spawn(move || tools::run("nbdinfo", &["--map", "--totals", &uri]));
    until("the receiver is missed", || !mount.told()["last_error"].is_null());
    let _receiver = bench.receiver();
    assert!(map.join().expect("a thread").contains("data"), "the map comes with the receiver");
}

#[test]
fn a_mount_outlives_its_agent_and_its_point_is_kept_until_it_was_ended() {
    let bench = Bench::new();
    let (_receiver, _agent) = (bench.receiver(), bench.agent());
    let (disk, point) = with_history(&bench);
    let restored = disk.restore(&point).display().to_string();
    let (host, other) = OtherHost::start(&bench);
    let mount = Mount::of(&bench, &host, &point, &["--changed-since", "lsn:1"]);
    assert_eq!(format!("lsn:{}", held(&bench)[0]["lsn"]), point);
    other.kill();
    assert_eq!(held(&bench).len(), 1, "whoever comes back finds it");
    let other = host.agent();
    until_served(&mount);
    tools::assert_same(&mount.uri, &restored);
    json(&host.run(&["agent", "restart"]));
    until_served(&mount);
    tools::assert_same(&mount.uri, &restored);
    json(&host.run(&["unmount", &mount.id, "--here"]));
    until("nobody needs the point", || held(&bench).is_empty());
    other.stop();
    let _other = host.agent();
    assert_eq!(json(&host.run(&["mount", "--here"]))["mounts"], Value::Array(Vec::new()));
}

#[test]
fn tools_read_what_changed_between_two_points_here_too() {
    let bench = Bench::new();
    let (_receiver, _agent) = (bench.receiver(), bench.agent());
    let (_disk, point) = with_history(&bench);
    let (host, _other) = OtherHost::start(&bench);
    let mount = Mount::of(&bench, &host, "latest", &["--changed-since", &point]);
    let at_receiver = bench.json(&["mount", "vm1", "--at", "latest", "--changed-since", &point]);
    let map = |uri: &str, context: &str| -> Vec<(u64, u64, u64)> {
        let text = tools::run("nbdinfo", &["--json", &format!("--map={context}"), uri]);
        let map: Vec<Value> = serde_json::from_str(&text).expect("a map in JSON");
        let number = |extent: &Value, field: &str| extent[field].as_u64().expect("a number");
        map.iter().map(|one| (number(one, "offset"), number(one, "length"), number(one, "type"))).collect()
    };
    let there = at_receiver["uri"].as_str().expect("a URI");
    let changed = map(there, "qemu:dirty-bitmap:vm1");
    assert!(changed.len() > 2, "{changed:?}");
    assert_eq!(map(&mount.uri, "qemu:dirty-bitmap:vm1"), changed);
    // What is allocated is known here in blocks, and there in bytes.
    let blocks_with_data = |map: Vec<(u64, u64, u64)>| -> BTreeSet<u64> {
        let data = map.into_iter().filter(|(_, _, kind)| *kind == 0);
        data.flat_map(|(offset, length, _)| offset / 4096..(offset + length).div_ceil(4096)).collect()
    };
    let data = blocks_with_data(map(there, "base:allocation"));
    assert!(!data.is_empty());
    assert_eq!(blocks_with_data(map(&mount.uri, "base:allocation")), data);
}

#[test]
fn what_cannot_be_mounted_here_is_refused_in_a_sentence() {
    let bench = Bench::new();
    let (_receiver, _agent) = (bench.receiver(), bench.agent());
    let (_disk, point) = with_history(&bench);
    let (host, _other) = OtherHost::start(&bench);
    let stranger = host.run(&["mount", "vm1", "--at", &point, "--here"]);
    assert_eq!(stranger.code, 2, "{stranger:?}");
    assert!(stranger.sentence().contains("does not know the receiver"));
    let nobody = bench.socket("nobody.sock");
    let away = host.run(&["mount", "vm1", "--at", &point, "--here", "--stream", &nobody]);
    assert_eq!(away.code, 6, "{away:?}");
    assert!(away.sentence().contains("nobody.sock"));
    let unknown = host.run(&["unmount", "vm1-7", "--here"]);
    assert_eq!(unknown.code, 4, "{unknown:?}");
    // The agent that has the disk knows where its receiver is.
    let own = bench.json(&["mount", "vm1", "--at", &point, "--here"]);
    tools::run("nbdinfo", &[own["uri"].as_str().expect("a URI")]);
}

/// Waits until an agent serves `mount` again.
fn until_served(mount: &Mount<'_, '_>) {
    until("it is served again", || {
        mount.host.run(&["mount", "--here"]);
        Guest::try_connect(&mount.uri).is_ok()
    });
}

/// Every byte of `uri` is that of `expected`.
fn assert_holds(uri: &str, expected: &[u8]) {
    let mut found = vec![0; expected.len()];
    Guest::connect(uri).read(0, &mut found).expect("read all of it");
    let differs = found.iter().zip(expected).position(|(one, other)| one != other);
    assert_eq!(differs, None, "the first byte that differs");
}

#[test]
fn what_was_written_here_outlives_agent_and_receiver_until_it_is_discarded() {
    let bench = Bench::new();
    let (receiver, _agent) = (bench.receiver(), bench.agent());
    let (disk, point) = with_history(&bench);
    let mut expected = std::fs::read(disk.restore(&point)).expect("read the restored point");
    let (host, other) = OtherHost::start(&bench);
    // What is written is no part of the cache, and larger than that.
    let mount = Mount::of(&bench, &host, &point, &["--writable", "--cache-size", "1MiB"]);
    let mut guest = Guest::connect(&mount.uri);
    let write = |guest: &mut Guest, expected: &mut Vec<u8>, at: usize, length: usize, byte: u8| {
        guest.write(at as u64, &vec![byte; length]).expect("write to the mount");
        expected[at..at + length].fill(byte);
    };
    write(&mut guest, &mut expected, 4 << 20, 3 << 20, 0x21);
    write(&mut guest, &mut expected, (9 << 20) + 512, 7 * 512, 0x22);
    guest.flush().expect("flush");
    // Not flushed: a killed agent is no power cut.
    write(&mut guest, &mut expected, (5 << 20) + 1024, 10_240, 0x23);
    assert_holds(&mount.uri, &expected);
    let told = mount.told();
    assert!(told["overlay"]["bytes"].as_u64() >= Some(3 << 20), "{told}");
    assert!(told["cache"]["bytes"].as_u64() <= Some(1 << 20), "{told}");
    other.kill();
    let other = host.agent();
    until_served(&mount);
    assert_holds(&mount.uri, &expected);

    // Whole blocks need nothing of the receiver, nor do those that were written before.
    receiver.kill();
    let mut guest = Guest::connect(&mount.uri);
    write(&mut guest, &mut expected, 20 << 20, 64 << 10, 0x24);
    write(&mut guest, &mut expected, (20 << 20) + 512, 512, 0x25);
    guest.flush().expect("flush");
    let mut buffer = vec![0; 64 << 10];
    guest.read(20 << 20, &mut buffer).expect("read what was written");
    assert!(buffer == expected[20 << 20..][..64 << 10]);
    let _receiver = bench.receiver();
    assert_holds(&mount.uri, &expected);
    json(&host.run(&["agent", "restart"]));
    until_served(&mount);
    assert_holds(&mount.uri, &expected);

    let undecided = host.run(&["unmount", &mount.id, "--here"]);
    assert_eq!(undecided.code, 2, "{undecided:?}");
    assert!(undecided.sentence().contains("kept or discarded"));
    json(&host.run(&["unmount", &mount.id, "--here", "--keep"]));
    assert!(Guest::try_connect(&mount.uri).is_err(), "nobody serves it any more");
    assert_eq!(other.stop(), 0);
    let _other = host.agent();
    let listed = json(&host.run(&["mount", "--here"]));
    assert_eq!(
        (&listed["mounts"], &listed["kept"][0]["id"]),
        (&Value::Array(Vec::new()), &mount.id.as_str().into())
    );
    assert_eq!(held(&bench).len(), 1, "without its point nothing in it could be read");
    let elsewhere = format!("nbd+unix:///?socket={}", bench.name("elsewhere.sock"));
    json(&host.run(&["mount", "--kept", &mount.id, "--here", "--nbd", &elsewhere]));
    assert_holds(&elsewhere, &expected);
    assert_eq!(host.run(&["mount", "--kept", &mount.id, "--here"]).code, 5);
    json(&host.run(&["unmount", &mount.id, "--here", "--discard"]));
    assert_eq!(json(&host.run(&["mount", "--here"])), serde_json::json!({"mounts": [], "kept": []}));
    assert_eq!(host.run(&["mount", "--kept", &mount.id, "--here"]).code, 4);
    assert_eq!(host.run(&["unmount", &mount.id, "--here", "--discard"]).code, 4);
    until("nobody needs the point", || held(&bench).is_empty());
    let left = std::fs::read_dir(bench.path("b/state/overlays")).expect("list the overlays").count();
    assert_eq!(left, 0);
}

#[test]
fn a_file_system_made_on_a_mount_here_is_whole_after_its_agent_is_killed() {
    if let Some(why) = cannot_mount() {
        return skip(why);
    }
    let bench = Bench::new();
    let (_receiver, _agent) = (bench.receiver(), bench.agent());
    let (_disk, point) = with_history(&bench);
    let (host, other) = OtherHost::start(&bench);
    let mount = Mount::of(&bench, &host, &point, &["--writable"]);
    let served = Served::start(&bench, "disk", &mount.uri, SIZE);
    let served_name = served.path().to_str().expect("a path");
    let file = bench.path("file");
    std::fs::write(&file, vec![0x5a; 3 << 20]).expect("write a file");
    tools::run("mkfs.ext4", &["-q", "-F", served_name]);
    tools::run("debugfs", &["-w", "-R", &format!("write {} file", bench.name("file")), served_name]);
    // Each of them has synced what it wrote.
    drop(served);
    other.kill();
    let _other = host.agent();
    until_served(&mount);
    let copy = bench.name("copy.img");
    tools::run("nbdcopy", &[&mount.uri, &copy]);
    tools::run("e2fsck", &["-fn", &copy]);
    tools::run("debugfs", &["-R", &format!("dump file {}", bench.name("dumped")), &copy]);
    let dumped = std::fs::read(bench.path("dumped")).expect("read the dumped file");
    assert!(dumped == std::fs::read(&file).expect("read the file"));
}
