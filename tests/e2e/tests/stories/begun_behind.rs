//! Disks that begin as a point of another one, or go on at another host and come back, in qcow2 files and behind NBD
//! servers.

use std::path::{Path, PathBuf};

use backtide_e2e::{Bench, Disk, Load, Model, OtherHost, tools};
use serde_json::{Value, json};

const SIZE: u64 = 8 << 20;
const MIB: u64 = 1 << 20;

/// A `qemu-nbd` of a raw file of zeroes, and its URI.
fn export(bench: &Bench, name: &str, size: u64) -> (tools::Beside, String) {
    bench.image(&format!("{name}.behind"), size);
    let (image, socket) = (bench.name(&format!("{name}.behind")), bench.name(&format!("{name}.sock")));
    let server = tools::Beside::start("qemu-nbd", &["-f", "raw", "-t", "-e", "8", "-k", &socket, &image]);
    tools::wait_for_socket(socket.as_ref());
    (server, format!("nbd+unix:///?socket={socket}"))
}

fn whole(disk: &Disk<'_>) {
    disk.until("whole", |status| status["hydration"].is_null());
    disk.settle();
}

/// What is served at a URI.
fn content(bench: &Bench, uri: &str) -> PathBuf {
    let found = bench.path("found.img");
    tools::run("qemu-img", &["convert", "-f", "raw", "-O", "raw", uri, found.to_str().unwrap()]);
    found
}

#[test]
fn a_new_disk_begins_in_a_qcow2_file_or_behind_nbd() {
    let bench = Bench::new();
    let (_receiver, agent, disk) = bench.protected(SIZE, &[]);
    let load = disk.load(1);
    load.goes_on(80);
    let at_early = load.stop().model();
    disk.settle();
    let early = disk.last();
    disk.qemu_io(&["write -P 0x77 0 4M", "flush"]);
    disk.settle();
    let from = format!("vm1@lsn:{early}");
    let (_server, uri) = export(&bench, "vm3", SIZE);
    for (name, image, format) in
        [("vm2", bench.name("vm2.qcow2"), json!("qcow2")), ("vm3", uri.clone(), Value::Null)]
    {
        let new = bench.attach(name, &image, &["--from", &from]);
        new.qemu_io(&["write -P 0x33 1k 1k", "flush"]);
        whole(&new);
        let mut expected = at_early.after(at_early.len());
        expected[1024..2048].fill(0x33);
        let model = bench.path("model.img");
        std::fs::write(&model, &expected).unwrap();
        tools::assert_same_images(&model, &content(&bench, &new.uri()));
        tools::assert_same_images(&model, &new.restore("latest"));
        assert_eq!(new.holes(), Vec::<Value>::new());
        bench.json(&["detach", name]);
        if format == "qcow2" {
            assert!(!Path::new(&format!("{image}.backtide-incomplete")).exists());
            let model = model.to_str().unwrap();
            let same = tools::try_run("qemu-img", &["compare", "-f", "qcow2", "-F", "raw", &image, model]);
            assert!(same.0, "{}", same.1);
        } else {
            tools::assert_same(model.to_str().unwrap(), &uri);
        }
    }
    // What may be somebody's is not written, and what has another size is no place for it.
    let refused = |name: &str, image: &str| {
        let stream = bench.socket("stream.sock");
        let said = bench.run(&["attach", name, image, "--receiver", &stream, "--from", &from]);
        assert_eq!(said.code, 5, "{name} {image}: {said:?}");
        said.sentence()
    };
    assert!(refused("vm4", &bench.name("vm2.qcow2")).contains("not empty"));
    assert!(refused("vm4", &uri).contains("somebody's disk"));
    let (_small, small) = export(&bench, "small", SIZE / 2);
    assert!(refused("vm4", &small).contains("4194304 bytes"));
    assert_eq!(agent.stop(), 0);
}

/// The disk was at the first host, whose agent is gone, in `image`; goes on in `there` and comes back, once and again.
fn goes_and_comes_back(bench: &Bench, image: &str, there: &str) {
    let (_receiver, first) = (bench.receiver(), bench.agent());
    let disk = bench.attach("vm1", image, &[]);
    disk.wait("sync");
    let mut model = Model::of_zeroes(SIZE, Vec::new());
    let mut seeds = 1..;
    let mut write = |uri: &str, model: &mut Model| {
        let load = Load::start(uri, seeds.next().expect("there are more numbers"));
        load.goes_on(40);
        model.then(load.stop());
    };
    write(&disk.uri(), &mut model);
    disk.settle();
    let (early, at_early) = (disk.last(), model.clone());
    bench.json(&["detach", "vm1"]);
    let (other, second) = OtherHost::start(bench);
    for round in 0..2 {
        let stream = bench.socket("stream.sock");
        let gone = match round {
            0 => other.run(&["failover", "vm1", there, "--receiver", &stream, "--yes"]),
            // The receiver may not have heard yet that the first let go.
            _ => other.run(&["failback", "vm1", "--yes", "--force"]),
        };
        assert_eq!(gone.code, 0, "{gone:?}");
        write(&other.uri(), &mut model);
        other.settle();
        model.assert_is_in(&content(bench, &other.uri()), model.len(), "the other host's");
        assert_eq!(other.run(&["detach", "vm1"]).code, 0);

        let report = bench.json(&["failback", "vm1", "--yes", "--force", "--wait"]);
        // A server tells no time: who may have written what it serves since the detach is not known.
        let known = !image.contains("://");
        assert_eq!(report["everything_because"].is_null(), known, "{report}");
        let fetched = report["fetched_bytes"].as_u64().unwrap();
        assert!(!known || fetched < 3 * MIB, "{report}");
        whole(&disk);
        model.assert_is_in(&content(bench, &disk.uri()), model.len(), "back");
        write(&disk.uri(), &mut model);
        disk.settle();
        model.assert_is_in(&disk.restore("latest"), model.len(), "the latest point");
        assert_eq!(bench.json(&["verify", "vm1"])["differing_count"], 0);
        bench.json(&["detach", "vm1"]);
    }
    at_early.assert_is_in(&disk.restore(&format!("lsn:{early}")), at_early.len(), "the early point");
    assert_eq!((first.stop(), second.stop()), (0, 0));
}

#[test]
fn a_qcow2_file_goes_on_in_a_qcow2_file_and_comes_back() {
    let bench = Bench::new();
    let image = bench.name("vm1.qcow2");
    tools::run("qemu-img", &["create", "-q", "-f", "qcow2", &image, &SIZE.to_string()]);
    goes_and_comes_back(&bench, &image, &bench.name("b.qcow2"));
    for image in [image, bench.name("b.qcow2")] {
        tools::run("qemu-img", &["check", &image]);
    }
}

/// Where a qcow2 header has its incompatible features, and the one of a file that was not closed in good order.
const FEATURES_AT: usize = 72 + 7;
const IS_DIRTY: u8 = 1;

#[test]
fn what_a_failback_would_do_is_told_without_a_byte_written_to_a_qcow2_file() {
    let bench = Bench::new();
    let (_receiver, mut first) = (bench.receiver(), bench.agent());
    first.may_complain("everything is compared");
    let image = bench.name("vm1.qcow2");
    tools::run("qemu-img", &["create", "-q", "-f", "qcow2", &image, &SIZE.to_string()]);
    let disk = bench.attach("vm1", "vm1.qcow2", &[]);
    disk.wait("sync");
    disk.qemu_io(&["write -P 0x11 0 4M", "flush"]);
    disk.settle();
    bench.json(&["detach", "vm1"]);
    let (other, _second) = OtherHost::start(&bench);
    assert_eq!(other.failover(&["--yes"]).code, 0);
    other.settle();
    assert_eq!(other.run(&["detach", "vm1"]).code, 0);
    // Its host went down: QEMU mends such a file when it is opened to be written.
    let mut header = std::fs::read(&image).unwrap();
    header[FEATURES_AT] |= IS_DIRTY;
    std::fs::write(&image, header).unwrap();
    let state = || (std::fs::read(&image).unwrap(), std::fs::metadata(&image).unwrap().modified().unwrap());
    let before = state();
    // Nobody says yes.
    let unasked = bench.run(&["failback", "vm1"]);
    assert_eq!(unasked.code, 2, "{unasked:?}");
    assert!(unasked.stderr.contains("OVERWRITTEN"), "{unasked:?}");
    assert!(state() == before, "the file was written");
    bench.json(&["failback", "vm1", "--yes", "--wait"]);
    whole(&disk);
    tools::assert_same(&disk.uri(), &bench.name("b.img"));
}

#[test]
fn a_disk_behind_nbd_goes_on_behind_nbd_and_comes_back() {
    let bench = Bench::new();
    let ((_one, image), (_other, there)) = (export(&bench, "a", SIZE), export(&bench, "b", SIZE));
    goes_and_comes_back(&bench, &image, &there);
}
