//! Points that an agent serves on its own host, of a receiver that is elsewhere.

use std::{collections::BTreeSet, io};

use backtide_e2e::{Bench, Disk, Guest, OtherHost, Said, tools};
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
    until("it is served again", || {
        host.run(&["mount", "--here"]);
        Guest::try_connect(&mount.uri).is_ok()
    });
    tools::assert_same(&mount.uri, &restored);
    json(&host.run(&["agent", "restart"]));
    until("it is served again", || {
        host.run(&["mount", "--here"]);
        Guest::try_connect(&mount.uri).is_ok()
    });
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
