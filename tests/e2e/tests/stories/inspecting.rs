//! Every file of a store can be looked into, and a flipped bit in any of them is told.

use std::{
    fs::OpenOptions,
    os::unix::fs::FileExt,
    path::{Path, PathBuf},
};

use backtide_e2e::{Bench, tools};

const SIZE: u64 = 32 << 20;

const SETTINGS: &str = "[limits]\nsegment_bytes = 1048576\n[retention]\ninterval_ms = 100\n";

fn ending(path: &Path) -> String {
    let name = path.file_name().unwrap().to_str().unwrap();
    name.rsplit_once('.').map_or(name, |(_, ending)| ending).to_owned()
}

/// All files but the lock, and what holds nothing yet.
fn files(store: &Path) -> Vec<PathBuf> {
    let listed = tools::run("find", &[store.to_str().unwrap(), "-type", "f"]);
    let mut found: Vec<PathBuf> = listed.lines().map(PathBuf::from).collect();
    found.retain(|path| !["lock", "new"].contains(&ending(path).as_str()));
    found.sort();
    found
}

/// Where bits are flipped: in each part of the file.
fn places(path: &Path) -> Vec<u64> {
    let length = std::fs::metadata(path).unwrap().len();
    match ending(path).as_str() {
        "seg" => vec![3, 20],
        "pack" => vec![3, 20, 100, length - 5],
        "map" => vec![3, 20, 520, 1040],
        "data" => vec![3, 20, 4200],
        _ => vec![3, length / 2, length - 5],
    }
}

fn flip(path: &Path, at: u64) {
    let file = OpenOptions::new().read(true).write(true).open(path).unwrap();
    let mut byte = [0];
    file.read_exact_at(&mut byte, at).unwrap();
    file.write_all_at(&[byte[0] ^ 4], at).unwrap();
}

/// Looks into each file as it is, and with a bit flipped in each of its parts; gives the kinds of files.
fn each_is_looked_into(bench: &Bench) -> Vec<String> {
    let mut kinds = Vec::new();
    for path in files(&bench.path("store")) {
        let name = path.to_str().unwrap();
        let said = bench.plain(&["inspect", name]);
        assert_eq!(said.code, 0, "{said:?}");
        assert!(said.stdout.starts_with(name) && said.stdout.lines().count() > 1, "{said:?}");
        for at in places(&path) {
            flip(&path, at);
            let said = bench.run(&["inspect", name]);
            assert_eq!(said.code, 8, "byte {at} of {name}: {said:?}");
            assert!(said.stderr.contains("is damaged"), "byte {at} of {name}: {said:?}");
            flip(&path, at);
        }
        kinds.push(match ending(&path).as_str() {
            "json" => path.file_name().unwrap().to_str().unwrap().to_owned(),
            ending => ending.to_owned(),
        });
    }
    kinds
}

#[test]
fn every_file_of_a_store_is_printed_and_a_flipped_bit_in_any_of_them_ends_with_8() {
    let bench = Bench::new();
    let mut receiver = bench.receiver_with(SETTINGS);
    receiver.may_complain("forgotten");
    let agent = bench.agent();
    bench.image("vm1.img", SIZE);
    bench.image("vm2.img", SIZE);
    let other = bench.attach("vm2", "vm2.img", &[]);
    other.wait("sync");
    bench.json(&["detach", "vm2"]);
    while bench.json(&["receiver", "status"])["connected"] != 0 {}
    bench.json(&["forget", "vm2", "--yes"]);
    let disk = bench.attach("vm1", "vm1.img", &[]);
    disk.wait("sync");
    disk.qemu_io(&["write -P 0x11 0 2M", "write -P 0x22 8M 64k"]);
    disk.settle();
    let middle = disk.last();
    disk.qemu_io(&["write -P 0x44 2M 4M", "write -P 0x55 16M 1M"]);
    disk.settle();
    let mount = bench.json(&["mount", "vm1", "--at", "latest", "--writable"]);
    tools::qemu_io(mount["uri"].as_str().unwrap(), &["write -P 0x33 0 64k", "flush"]);
    bench.json(&["unmount", mount["id"].as_str().unwrap(), "--keep"]);
    bench.json(&["retention", "set", "vm1", "any=1s", "--yes"]);
    let folded =
        || bench.json(&["retention", "show", "vm1"])["disks"][0]["every_point_from"]["lsn"].as_u64().unwrap();
    while folded() <= middle {}
    // What a scrub has found, and that is whole again.
    let segment = files(&bench.path("store")).into_iter().find(|path| ending(path) == "seg").unwrap();
    let beside = segment.parent().unwrap().parent().unwrap().join("disk.json");
    receiver.may_complain("damage");
    flip(&beside, 20);
    assert_eq!(bench.run(&["scrub", "--rate", "0"]).code, 8);
    flip(&beside, 20);
    assert_eq!(bench.run(&["scrub", "--rate", "0"]).code, 0);
    assert_eq!(agent.stop(), 0);
    assert_eq!(receiver.stop(), 0);

    let kinds = each_is_looked_into(&bench);
    let json = ["store.json", "retention.json", "findings.json", "scrub.json", "mounts.json", "disk.json"];
    for kind in json.into_iter().chain(["durable", "1", "2", "seg", "pack", "map", "data", "vm1-1.json"]) {
        assert!(kinds.iter().any(|found| found == kind), "no {kind} in {kinds:?}");
    }
    let stones = std::fs::read_dir(bench.path("store").join("forgotten")).unwrap();
    assert_eq!(stones.count(), 1, "{kinds:?}");
}

#[test]
fn what_stands_beside_a_log_that_was_put_back_and_cut_is_printed_and_known_by_its_name_when_it_is_damaged() {
    let bench = Bench::new();
    let receiver = bench.receiver_with(SETTINGS);
    let mut agent = bench.agent();
    agent.may_complain("the receiver");
    bench.image("vm1.img", SIZE);
    let disk = bench.attach("vm1", "vm1.img", &[]);
    disk.wait("sync");
    disk.qemu_io(&["write -P 0x11 4M 8M"]);
    disk.settle();
    assert_eq!(receiver.stop(), 0);
    tools::run("cp", &["-a", &bench.name("store"), &bench.name("old")]);
    let receiver = bench.receiver_with(SETTINGS);
    disk.qemu_io(&["write -P 0x22 0 1M", "flush"]);
    disk.settle();
    assert_eq!(receiver.stop(), 0);
    let store = bench.name("store");
    tools::run("rm", &["-r", &store]);
    std::fs::rename(bench.path("old"), &store).unwrap();
    let receiver = bench.receiver_with(SETTINGS);
    disk.settle();
    assert_eq!(agent.stop(), 0);
    assert_eq!(receiver.stop(), 0);
    let segments: Vec<_> =
        files(&bench.path("store")).into_iter().filter(|path| ending(path) == "seg").collect();
    std::fs::remove_file(&segments[2]).unwrap();
    assert_eq!(bench.plain(&["fsck", &store, "--repair"]).code, 3);
    let kinds = each_is_looked_into(&bench);
    for kind in ["shortfalls.json", "cut.json"] {
        assert!(kinds.iter().any(|found| found == kind), "no {kind} in {kinds:?}");
    }
}
